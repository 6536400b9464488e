"""Coverage-guided fuzzing of one target: `python tests/fuzz/fuzz.py shard 60`. What it finds goes to build/fuzz.

It starts from tests/fuzz/corpus/TARGET, which stays as it is, and keeps what reaches new code in build/fuzz/TARGET.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent / "support")]
MAX_BYTES = {"image": 16384, "shard": 16384}
MEMORY_MB = 2048
SLOW_SECONDS = 10

with atheris.instrument_imports(include=["data_pipeline", "launchers", "training", "tarfile", "yaml", "json"]):
    from fuzz_targets import TARGETS


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in TARGETS or not sys.argv[2].isdigit():
        sys.exit(f"error: usage is fuzz.py TARGET SECONDS, with TARGET one of {', '.join(TARGETS)}")
    target, seconds = sys.argv[1:]
    grown = ROOT / "build" / "fuzz" / target
    grown.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_BYTES.get(target, 4096)}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-timeout={SLOW_SECONDS}",
        f"-artifact_prefix={grown.parent}/{target}-",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(grown), str(HERE / "corpus" / target)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
