"""Index WebDataset tars that lie somewhere already: they are read once, and stay as they are.

`python launchers/index_shards.py --shards '/data/imagenet/train-{0000..1281}.tar' --out data/imagenet/train`
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, run_launcher, say
from data_pipeline.files.urls import without_query
from data_pipeline.images.decoding import JSON_KEY, MAX_LABEL
from data_pipeline.making.indexing import expand_shards, index_shards
from data_pipeline.remote.cache import CacheConfig, ShardCache
from data_pipeline.shards.index import Index, Storage, is_complete


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """The settings of an index for WebDataset tars, which stay where and as they are."""

    shards: tuple[str, ...]  # paths or URLs, with {000..127} for many; or one .txt file with one of them in each line
    out: str  # the folder for index and tables
    classes: int | None = None  # how many there are; none: as many as the labels found need
    json_label: str = JSON_KEY  # the field that is the class number, where a sample has json and no cls
    labels: bool = True  # false: pictures without classes, for stage 1 and for model.num_classes=0
    decode: bool = False  # decode every image, and list those that cannot be
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("shards is empty; give paths or URLs of .tar files")
        if self.classes is not None and not 1 <= self.classes <= MAX_LABEL + 1:
            raise ValueError(f"classes is {self.classes}; it must be 1 to {MAX_LABEL + 1}")
        if not self.labels and self.classes is not None:
            raise ValueError(f"classes is {self.classes}, but labels=false takes pictures without classes; drop one")

    @property
    def label_key(self) -> str | None:
        """The field of the class number; None where there are no classes."""
        return self.json_label if self.labels else None


def launch(command: Command[IndexConfig]) -> None:
    """Index the tars, unless the same is indexed there already, and say what was left out."""
    config = command.config
    out = Path(config.out)
    locations = expand_shards(config.shards)
    if command.dry_run:
        say(f"would index {len(locations)} tars, {without_query(locations[0])} first, into {out}")
        return
    if is_complete(out):
        refuse_another(out, config, locations)
        say(f"{out} is the index of these {len(locations)} tars already; nothing to do")
        return
    index, work = index_shards(
        config.shards,
        out,
        num_classes=config.classes,
        json_label=config.label_key,
        decode=config.decode,
        cache=ShardCache(config.cache),
        report=say,
    )
    for row in work.skipped[:5]:
        say(f"left out: {row['shard']}: sample {row['key']}: {row['reason']}")
    ignored = ", ".join(f"{count} {kind}" for kind, count in work.ignored.most_common(10))
    say(
        f"indexed {index.num_samples} samples of {len(index.meta['classes'])} classes in {len(index.shards)} tars into"
        f" {out}; {work.num_skipped} samples left out{' (skipped.jsonl)' if work.skipped else ''};"
        f" members not read: {ignored or 'none'}"
    )


def refuse_another(out: Path, config: IndexConfig, locations: list[str]) -> None:
    """Raise ValueError if `out` is the index of other tars, or made with other settings; the first is named."""
    index = Index.read(out)
    found_locations = [shard.location for shard in index.shards]
    wanted: dict[str, Any] = {"shards": locations, "json_label": config.label_key, "decode": config.decode}
    wanted |= {"classes": config.classes or len(index.meta["classes"])}
    found: dict[str, Any] = {"shards": found_locations, "json_label": index.meta.get("json_label")}
    found |= {"decode": index.meta.get("decoded"), "classes": len(index.meta["classes"])}
    for name, value in wanted.items():
        if found[name] != value:
            what = "other tars" if name == "shards" else f"{name} {found[name]}, now it is {value}"
            raise ValueError(f"{out}: already indexed with {what}; delete it or choose another output folder")
    Storage(out).check_sizes(index.shards)


def main() -> None:
    """Run the launcher."""
    run_launcher(IndexConfig, launch, __doc__)


if __name__ == "__main__":
    main()
