"""The folders of the repository that the tests are part of."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
CONFIGS = ROOT / "configs"
