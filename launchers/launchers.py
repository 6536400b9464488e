"""The line that a command says when it runs without the install.

Python puts the folder of a command's file first on the search path, so `python launchers/train.py` finds this file when
it looks for the package `launchers`. The file steps aside for the installed package.
"""

import importlib
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
install = f"run: {sys.executable} -m pip install -e {here.parent}"
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != here]
del sys.modules[__name__]
try:
    found = [Path(place).resolve() for place in importlib.import_module("launchers").__path__]
except ModuleNotFoundError as error:
    if error.name != "launchers":
        raise
    sys.exit(f"error: {here.parent} is not installed for {sys.executable}; {install}")
if here not in found:
    sys.exit(
        f"error: {sys.executable} has the packages of {found[0].parent} installed, not of {here.parent}; {install}"
    )
