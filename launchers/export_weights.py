"""A run's newest weights, with its tokenizer and a model card, to a folder to hand on.

`python launchers/export_weights.py --run runs/d16 --out exports/d16 --format safetensors` for this project, or
`--format reference` for the public VAR code.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from launchers.setup.command_line import Command, refuse_several_ranks, run_launcher, say
from data_pipeline.files.atomic import atomic_folder, refuse_occupied
from launchers.figures.model_cards import (
    describe_sizes,
    how_to_use_here,
    how_to_use_in_public_code,
    model_card,
)
from launchers.setup.assembly import load_models
from launchers.setup.loading import (
    checkpoint_of,
    find_whole,
    load_tokenizer,
    run_of,
    tokenizer_of,
    write_public,
)
from launchers.setup.settings import refuse_unknown
from models.reference import check_public
from models.var import VAR
from models.vqvae import VQVAE
from training.checkpoints.commit import read_manifest
from training.checkpoints.model_on_disk import CONFIG, WEIGHTS, ModelOnDisk, describe, write_model
from training.tracking.record import RunRecord

POSITION = ("step", "time", "epoch", "samples_seen", "pflop")  # of a validation record; the rest is what was measured
EXPORT_FORMATS = ("safetensors", "reference")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The settings of an export of a run's weights, with its tokenizer, to a folder to hand on."""

    run: str
    out: str
    format: str = "safetensors"  # or "reference": files that the public code loads
    tokenizer: str = ""  # empty: the one the run was trained with

    def __post_init__(self) -> None:
        refuse_unknown(EXPORT_FORMATS, format=self.format)


def launch(command: Command[ExportConfig]) -> None:
    """Write the folder, or say what would be written."""
    config, out = command.config, Path(command.config.out)
    refuse_several_ranks("export_weights.py")
    refuse_occupied(out)
    var, tokenizer = load(config)
    if config.format == "reference" and var:
        check_public(var.config)
    for name, size in describe_sizes(var, tokenizer).items():
        say(f"{name:<20}{size}")
    models: list[VAR | VQVAE] = [var, tokenizer] if var else [tokenizer]
    files = {kind_of(model): public_name(model) for model in models}
    if command.dry_run:
        say(f"would write {', '.join(files.values()) if config.format == 'reference' else WEIGHTS} to {out}")
        return
    with atomic_folder(out) as folder:
        if config.format == "reference":
            for model in models:
                write_public(folder / files[kind_of(model)], model)
            usage = how_to_use_in_public_code(var, tokenizer, {kind: str(out / file) for kind, file in files.items()})
        else:
            write_ours(folder, var, tokenizer, config)
            usage = how_to_use_here(out, var, tokenizer)
        origin = provenance(config.run, "VAR" if var else "VQVAE")
        (folder / "README.md").write_text(model_card(out.name, var, tokenizer, origin=origin, usage=usage))
    say(f"wrote {out}")


def load(config: ExportConfig) -> tuple[VAR | None, VQVAE]:
    """Load the models of a transformer's run, or of a tokenizer's, which has no transformer."""
    kinds = [model.kind for model in ModelOnDisk.all_at(Path(config.run))]
    if "VAR" in kinds or not kinds:
        ModelOnDisk.find(config.run, "VAR")  # refuses a public file, and names what is not there
        models = load_models(config.run, config.tokenizer)
        return models.var, models.tokenizer
    if config.tokenizer:
        raise ValueError(f"tokenizer is {config.tokenizer}; {config.run} is a tokenizer itself: leave it out")
    return None, load_tokenizer(config.run)[0]


def kind_of(model: VAR | VQVAE) -> str:
    """Return "VAR" or "VQVAE"."""
    return describe(model.config)["kind"]


def public_name(model: VAR | VQVAE) -> str:
    """Return the name that the public code gives to a file of such a model, the tokenizer's in a folder of its own."""
    if isinstance(model, VAR):
        return f"var_d{model.config.depth}.pth"
    size = model.config.quantizer
    return f"tokenizer/vae_ch{model.config.autoencoder.width}v{size.vocab_size}z{size.code_width}.pth"


def write_ours(folder: Path, var: VAR | None, tokenizer: VQVAE, config: ExportConfig) -> None:
    """Copy what training wrote byte for byte: the identity of a tokenizer, which codes carry, is its bytes."""
    if var:
        copy_model(find_whole(config.run, "VAR"), folder)
    source = config.tokenizer or (tokenizer_of(config.run) if var else config.run)
    if Path(source).is_file():
        write_model(folder / "tokenizer", tokenizer.state_dict(), describe(tokenizer.config))
    else:
        copy_model(find_whole(source, "VQVAE"), folder / "tokenizer")


def copy_model(model: ModelOnDisk, folder: Path) -> None:
    """Copy the two files of a model."""
    folder.mkdir(exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(model.folder / name, folder / name)


def provenance(run: str, kind: str) -> list[str]:
    """Return what the run's own files say about its weights, as sentences."""
    checkpoint = checkpoint_of(ModelOnDisk.find(run, kind))
    if checkpoint is None:
        return [f"Exported from `{Path(run).name}`, a folder of weights without the record of a training run."]
    state = read_manifest(checkpoint)
    seen = f"{state['step']:,} steps, {state['samples_seen']:,} samples seen"
    sentences = [f"Trained in the run `{run_of(checkpoint).name}`: {seen}."]
    if started_from := state["identity"].get("init_from"):
        sentences.append(f"Training started from the weights of `{started_from}`.")
    record = last_validation(run_of(checkpoint), state["step"])
    if record is None:
        return [*sentences, "The run recorded no validation up to these weights."]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if is_measurement(name, value))
    return [*sentences, f"Last validation, at step {record['step']:,}: {numbers}."]


def last_validation(run: Path, step: int) -> dict[str, object] | None:
    """Return the newest validation record up to `step`, or None."""
    records = RunRecord(run).read()
    found = [record for record in records if record["kind"] == "validation" and record["step"] <= step]
    return found[-1] if found else None


def is_measurement(name: str, value: object) -> bool:
    """Return whether an entry of a validation record is a number that was measured."""
    return name not in POSITION and isinstance(value, (int, float))


def main() -> None:
    """Run the command line."""
    run_launcher(ExportConfig, launch, __doc__)


if __name__ == "__main__":
    main()
