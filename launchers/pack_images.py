"""A folder of images, or the word `digits`, to image shards.

`python launchers/pack_images.py source=/data/imagenet out=data/imagenet256/images resize_short_side=288`
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.index import Index  # noqa: E402
from data_pipeline.packing import encoding, is_packed, pack_images  # noqa: E402
from launchers.command_line import Command, run_launcher, say  # noqa: E402
from launchers.config import PackConfig  # noqa: E402


def launch(command: Command[PackConfig]) -> None:
    config = command.config
    if command.dry_run:
        say(f"would pack {config.source} into {config.out}/train and {config.out}/val")
        return
    out = Path(config.out)
    if is_packed(out) and was_packed_so(out, config):
        say(f"{config.source} is packed in {out} already; nothing to do")
        return
    report = pack_images(
        config.source,
        out,
        samples_per_shard=config.samples_per_shard,
        seed=config.seed,
        val_fraction=config.val_fraction,
        resize_short_side=config.resize_short_side,
        report=say,
    )
    say(f"packed {report.train.num_samples} training and {report.val.num_samples} validation images into {config.out}")


def was_packed_so(out: Path, config: PackConfig) -> bool:
    """Whether `out` holds this source, packed with this seed and size; if not, pack_images refuses to overwrite it."""
    found = Index.read(out / "train").meta
    wanted = {"source": config.source, "seed": config.seed, "encoding": encoding(config.resize_short_side)}
    return all(found.get(name) == value for name, value in wanted.items())


def main() -> None:
    run_launcher(PackConfig, launch, __doc__)


if __name__ == "__main__":
    main()
