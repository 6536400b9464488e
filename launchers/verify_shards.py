"""Check every byte of packed data against its index, and name every fault.

`python launchers/verify_shards.py data/imagenet256/codes`
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from launchers.setup.command_line import Command, run_launcher, say
from data_pipeline.files.damage import DamagedData
from data_pipeline.making.verification import folders_of, verify_shards
from data_pipeline.remote.cache import CacheConfig
from data_pipeline.shards.index import Index, Storage

PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """The settings of a check of a packed folder against its index; `folder=` may be left out."""

    folder: str = field(metadata={"is_bare": True})  # with an index.json, or with such folders in it; or a URL
    decode: bool = False  # decode every image, and unpack every code
    cache: CacheConfig = field(default_factory=CacheConfig)


def launch(command: Command[VerifyConfig]) -> None:
    """Check a folder or its splits. Raises DamagedData if there are faults, which have been said by then."""
    config = command.config
    folders = folders_of(config.folder)
    if command.dry_run:
        say(f"would read all of {', '.join(folders)}")
        return
    faults = sum(verify_folder(folder, config) for folder in folders)
    if faults:
        raise DamagedData(
            f"{config.folder}: {faults} fault{'s' if faults > 1 else ''}, named above; copy or pack these shards again"
        )


def verify_folder(folder: str, config: VerifyConfig) -> int:
    """Check one folder, with progress, say its faults, and return their number."""
    storage = Storage(folder, config.cache)
    try:
        index = Index.read(storage)
    except DamagedData as fault:
        say(f"fault: {fault}")
        return 1
    total = sum(shard.bytes for shard in index.shards)
    num_bytes = num_faults = 0
    start = said = time.monotonic()
    reports = verify_shards(storage, index, decode=config.decode, threads=min(8, os.cpu_count() or 1))
    for number, report in enumerate(reports, 1):
        num_bytes += report.bytes
        num_faults += len(report.faults)
        for fault in report.faults:
            say(f"fault: {fault}")
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            rate = num_bytes / (said - start)
            say(
                f"{storage}: {number} of {len(index.shards)} shards, {rate / 1e6:.0f} MB/s, faults: {num_faults}, "
                f"{(total - num_bytes) / rate:.0f} s left"
            )
    seconds = max(time.monotonic() - start, 1e-9)
    depth = "every sample decoded" if config.decode else "every byte read"
    say(
        f"{storage}: {index.num_samples} samples in {len(index.shards)} shards, {num_bytes / 1e6:.1f} MB, {depth},"
        f" {num_bytes / seconds / 1e6:.0f} MB/s: {num_faults or 'no'} fault{'s' if num_faults != 1 else ''}"
    )
    return num_faults


def main() -> None:
    """Run the launcher."""
    run_launcher(VerifyConfig, launch, __doc__)


if __name__ == "__main__":
    main()
