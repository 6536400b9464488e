"""Public .pth files to a folder that every launcher takes: weights, sizes and a model card.

`python launchers/import_weights.py --tokenizer vae_ch160v4096z32.pth --var var_d16.pth --out imports/d16`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launchers.setup.command_line import Command, refuse_several_ranks, run_launcher, say
from data_pipeline.files.atomic import atomic_folder, refuse_occupied
from launchers.figures.model_cards import describe_sizes, how_to_use_here, model_card
from launchers.setup.loading import public_tokenizer, public_var
from models.generation import check_configs_agree
from models.scales import PATCH_NUMS_256
from training.checkpoints.model_on_disk import describe, write_model


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """The settings of an import of public .pth files into a folder that every launcher takes; one file will do."""

    tokenizer: str = ""
    var: str = ""
    out: str
    entry: str = ""  # the state dict to take, such as ema, where a file holds several
    patch_nums: tuple[int, ...] = ()  # empty: known by the transformer's length; of a tokenizer alone, that of 256 px

    def __post_init__(self) -> None:
        if not (self.tokenizer or self.var):
            raise ValueError("nothing to import; give --var FILE, --tokenizer FILE, or both")


def launch(command: Command[ImportConfig]) -> None:
    """Write the folder, or say what would be written."""
    config, out = command.config, Path(command.config.out)
    refuse_several_ranks("import_weights.py")
    refuse_occupied(out)
    var = public_var(config.var, config.patch_nums, config.entry) if config.var else None
    patch_nums = var.config.patch_nums if var else config.patch_nums or PATCH_NUMS_256
    tokenizer = public_tokenizer(config.tokenizer, patch_nums, config.entry) if config.tokenizer else None
    if var and tokenizer:
        check_configs_agree(var.config, tokenizer.config)
    for name, size in describe_sizes(var, tokenizer).items():
        say(f"{name:<20}{size}")
    if not (var or config.patch_nums):
        say("the schedule is that of 256 px, which a tokenizer's file does not tell; --patch-nums gives another")
    if command.dry_run:
        say(f"would write {out}")
        return
    files = [f"`{Path(path).name}`" for path in (config.var, config.tokenizer) if path]
    with atomic_folder(out) as folder:
        if var:
            write_model(folder, var.state_dict(), describe(var.config))
        if tokenizer:
            write_model(folder / "tokenizer", tokenizer.state_dict(), describe(tokenizer.config))
        card = model_card(out.name, var, tokenizer, origin=origin(files), usage=how_to_use_here(out, var, tokenizer))
        (folder / "README.md").write_text(card)
    say(f"wrote {out}")


def origin(files: list[str]) -> list[str]:
    """Return what is known of where imported weights come from, as sentences."""
    return [
        f"Imported from {' and '.join(files)}, in the format of the public VAR code.",
        "How the weights were trained is not in the files.",
    ]


def main() -> None:
    """Run the command line."""
    run_launcher(ImportConfig, launch, __doc__)


if __name__ == "__main__":
    main()
