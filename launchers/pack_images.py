"""Pack a folder of images, or the word `digits`, into image shards.

`python launchers/pack_images.py source=/data/imagenet out=data/imagenet256/images`

Larger images are scaled down to a short side of 288 pixels, which is what crops of 256 are taken from
(`resize_short_side=576` for 512, `null` to keep every file as it is).

The same command, started again or several times at once, here or on any machine that sees both folders, goes on with
the shards that nobody works on. It leaves report.json and contact_sheet.png beside the shards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from launchers.setup.command_line import Command, run_launcher, say, say_nothing
from data_pipeline.making.claims import forget_finished_work
from data_pipeline.making.pack_report import report_lines
from data_pipeline.making.packing import REPORT_NAME, encoding, is_packed, pack_images, refuse_packed_otherwise
from launchers.figures.contact_sheet import SHEET_NAME, write_contact_sheet
from training.engine.place import place_of


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """The settings of a packing of a folder of images, or of the word `digits`, into image shards."""

    source: str
    out: str
    labels: bool = True  # folders are classes; false: pictures without classes, for stage 1 and for model.num_classes=0
    val_fraction: float = 0.0  # held out of `source` when it has no train/ and val/ of its own
    # pixels, to which longer short sides are scaled down: 1.125 times the crops of the official recipe; null: none are
    resize_short_side: int | None = 288
    samples_per_shard: int = 10_000
    seed: int = 0


def launch(command: Command[PackConfig]) -> None:
    """Pack, unless the same is packed there already."""
    config, out = command.config, Path(command.config.out)
    if command.dry_run:
        say(f"would pack {config.source} into {config.out}/train and {config.out}/val")
        return
    if is_packed(out):
        refuse_packed_otherwise(out, options_of(config))
        forget_finished_work(out)
        say(f"{config.source} is packed in {out} already; nothing to do")
    else:
        pack(config, out)
    if not (out / SHEET_NAME).exists():  # as after a kill between the last shard and here
        write_contact_sheet(out, seed=config.seed)


def pack(config: PackConfig, out: Path) -> None:
    """Pack beside other workers, and print the report where this is the first of its launcher."""
    speaks = place_of(os.environ).rank == 0  # of workers that one launcher has started
    report = pack_images(
        config.source,
        out,
        samples_per_shard=config.samples_per_shard,
        seed=config.seed,
        val_fraction=config.val_fraction,
        resize_short_side=config.resize_short_side,
        labels=config.labels,
        report=say if speaks else say_nothing,
    )
    if speaks:
        for line in report_lines(report.counts):
            say(line)
        say(f"packed into {out}; see {REPORT_NAME} and {SHEET_NAME} there")


def options_of(config: PackConfig) -> dict[str, object]:
    """Return what the indexes of a packed folder must say for there to be nothing to do."""
    return {
        "source": config.source,
        "seed": config.seed,
        "encoding": encoding(config.resize_short_side),
        "val_fraction": config.val_fraction,
        "samples_per_shard": config.samples_per_shard,
        "labels": config.labels,
    }


def main() -> None:
    """Run the launcher."""
    run_launcher(PackConfig, launch, __doc__)


if __name__ == "__main__":
    main()
