"""The line that a command ends with when it runs without the install, or with that of another checkout.

Python puts the folder of a command's file first on the search path, so `python launchers/train.py` finds this file when
it looks for the package `launchers`. The file then steps aside for the installed package.
"""

import importlib
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != here]
del sys.modules[__name__]
try:
    found = importlib.import_module("launchers").__path__
except ModuleNotFoundError as error:
    if error.name != "launchers":
        raise
    install = f"{sys.executable} -m pip install -e {here.parent}"
    sys.exit(f"error: {here.parent} is not installed for {sys.executable}; run: {install}")
if here not in [Path(place).resolve() for place in found]:
    sys.exit(
        f"error: {sys.executable} has the packages of {Path(found[0]).parent} installed, not of {here.parent}; "
        f"run: {sys.executable} -m pip install -e {here.parent}"
    )
