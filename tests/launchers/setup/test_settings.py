"""Every YAML file in configs/ is a config: it loads, fits its tokenizer, and its header tells the truth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from repository import CONFIGS

from launchers.compare_sizes import CompareSizesConfig
from launchers.edit import EditConfig
from launchers.encode_codes import EncodeConfig
from launchers.export_weights import ExportConfig
from launchers.import_weights import ImportConfig
from launchers.index_shards import IndexConfig
from launchers.pack_images import PackConfig
from launchers.plot_dependencies import DependencyConfig
from launchers.sample import SampleConfig
from launchers.setup.config_files import build_config, load_config, to_yaml
from launchers.setup.settings import DataConfig, TrainConfig
from launchers.sync_mlflow import SyncConfig
from launchers.train_tokenizer import TokenizerConfig, refuse_unfit_engine
from launchers.verify_shards import VerifyConfig
from models.generation import check_configs_agree
from models.var import VARConfig
from models.vqvae import VQVAE

FILES = {str(path.relative_to(CONFIGS)): path for path in sorted(CONFIGS.rglob("*.yaml"))}
EXTENDED = {path: yaml.safe_load(path.read_text()).get("extends") for path in FILES.values()}
BASES = {(path.parent / base).resolve() for path, base in EXTENDED.items() if base}
TOKENIZERS = [name for name, path in FILES.items() if path.stem == "tokenizer"]
TRANSFORMERS = [name for name, path in FILES.items() if re.fullmatch(r"d\d+(_\d+)?", path.stem)]


def load_tokenizer_config(name: str) -> TokenizerConfig:
    return load_config(TokenizerConfig, str(FILES[name]))


def load_train_config(name: str) -> TrainConfig:
    return load_config(TrainConfig, str(FILES[name]))


def stated_parameters(name: str) -> int | None:
    """The number of parameters that the file's header gives."""
    header = re.search(r"^#.*?([\d,]{7,}) parameters", FILES[name].read_text(), re.MULTILINE | re.DOTALL)
    return int(header[1].replace(",", "")) if header else None


def test_there_are_configs_of_both_stages() -> None:
    assert TOKENIZERS and TRANSFORMERS


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_config_loads_and_can_be_trained(name: str) -> None:
    config = load_tokenizer_config(name)
    refuse_unfit_engine(config.engine)
    assert config.loop.global_batch % config.engine.micro_batch == 0


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_config_loads_and_its_name_is_its_depth(name: str) -> None:
    config = load_train_config(name)
    assert FILES[name].stem.split("_")[0] == f"d{config.model.depth}"
    assert Path(config.run).name == FILES[name].stem
    assert config.loop.global_batch % config.engine.micro_batch == 0


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if path in BASES])
def test_what_transformers_share_lacks_only_run_and_depth(name: str) -> None:
    assert load_config(TrainConfig, str(FILES[name]), ["run=r", "model.depth=2"]).model.depth == 2


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_fits_the_tokenizer_beside_it(name: str) -> None:
    transformer = load_train_config(name)
    for tokenizer in (load_tokenizer_config(other) for other in TOKENIZERS):
        if tokenizer.run == transformer.tokenizer:
            check_configs_agree(transformer.model, tokenizer.model)


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if stated_parameters(name)])
def test_the_header_of_a_transformer_states_its_parameters(name: str) -> None:
    assert stated_parameters(name) == load_train_config(name).model.num_parameters


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if stated_parameters(name)])
def test_the_header_of_a_tokenizer_states_its_parameters(name: str) -> None:
    with torch.device("meta"):
        model = VQVAE(load_tokenizer_config(name).model)
    assert stated_parameters(name) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", TOKENIZERS + TRANSFORMERS)
def test_the_header_gives_the_command_that_uses_the_file(name: str) -> None:
    path = FILES[name]
    assert f"--config configs/{name}" in path.read_text()


@pytest.mark.parametrize(
    "name, peak, epochs",
    [("d16.yaml", 3.0e-4, 200), ("d20.yaml", 3.0e-4, 250), ("d24.yaml", 2.4e-4, 350), ("d30.yaml", 3.2e-4, 350)],
)
def test_the_released_sizes_follow_the_public_recipe(name: str, peak: float, epochs: int) -> None:
    if name not in FILES:
        pytest.skip(f"configs/{name} does not exist")
    config = load_train_config(name)
    assert config.optimizer.peak_lr(config.loop.global_batch) == pytest.approx(peak)
    assert config.loop.epochs == epochs


@pytest.mark.parametrize("name", TOKENIZERS + TRANSFORMERS)
def test_the_resolved_config_reads_back_as_the_same(name: str, tmp_path: Path) -> None:
    schema = TokenizerConfig if name in TOKENIZERS else TrainConfig
    config = load_config(schema, str(FILES[name]))
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(schema, str(resolved)) == config


MINIMAL: list[tuple[type, dict[str, Any]]] = [
    (PackConfig, {"source": "digits", "out": "o"}),
    (IndexConfig, {"shards": ("a.tar",), "out": "o"}),
    (VerifyConfig, {"folder": "f"}),
    (TokenizerConfig, {"run": "r"}),
    (EncodeConfig, {"tokenizer": "t", "images": "i", "out": "o"}),
    (SampleConfig, {"run": "r"}),
    (EditConfig, {"run": "r", "image": "i", "task": "inpaint", "mask": "m"}),
    (ImportConfig, {"var": "v", "out": "o"}),
    (ExportConfig, {"run": "r", "out": "o"}),
    (CompareSizesConfig, {"runs": ("r",), "out": "o.png"}),
    (DependencyConfig, {"tokenizer": "t", "images": "i", "out": "o.png"}),
    (SyncConfig, {"run": "r"}),
]


@pytest.mark.parametrize(("schema", "required"), MINIMAL)
def test_defaults_read_back_as_the_same(schema: type, required: dict[str, Any], tmp_path: Path) -> None:
    config = build_config(schema, [required], source="tests")
    assert config == schema(**required)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(schema, str(resolved)) == config


RUN = {"run": "r", "tokenizer": "t", "model": VARConfig(depth=1)}
UNCONDITIONAL = RUN | {"model": VARConfig(depth=1, num_classes=0)}
EDIT = {"run": "r", "image": "i", "task": "inpaint", "box": (0, 0, 1, 1)}
SIZES = {"runs": ("r",), "out": "o.png"}
PLOT = {"tokenizer": "t", "images": "i", "out": "o.png"}
# A command's or section's settings, and words of the error.
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (DataConfig, {"workers": -1}, "data.workers is -1; it must be 0 or more"),
    (DataConfig, {"window": 0}, "data.window is 0; it must be 1 sample or more"),
    (DataConfig, {"bad_samples": "quarantine"}, "accepted: strict, or quarantine:MAX"),
    (TrainConfig, RUN | {"seed": -1}, "seed is -1; it must be 0 or more"),
    (TrainConfig, RUN | {"label_drop": -0.1}, "label_drop is -0.1; it is a probability, in [0, 1)"),
    (TrainConfig, RUN | {"label_drop": 1.0}, "label_drop is 1.0"),
    (
        TrainConfig,
        UNCONDITIONAL | {"label_drop": 0.2},
        "label_drop is 0.2; without labels (model.num_classes 0) it has",
    ),
    (IndexConfig, {"shards": (), "out": "o"}, "shards is empty; give paths or URLs"),
    (IndexConfig, {"shards": ("a.tar",), "out": "o", "classes": 70_000}, "classes is 70000; it must be 1 to 65536"),
    (ImportConfig, {"out": "o"}, "nothing to import; give --var FILE, --tokenizer FILE, or both"),
    (ExportConfig, {"run": "r", "out": "o", "format": "onnx"}, "format is onnx; accepted: safetensors, reference"),
    (SampleConfig, {"run": "r", "format": "jpg"}, "format is jpg; accepted: png, npz"),
    (SampleConfig, {"run": "r", "precision": "fp8"}, "precision is fp8; accepted: fp32, bf16, fp16"),
    (SampleConfig, {"run": "r", "smooth": True, "format": "npz"}, "smoothed images are never to be measured"),
    (EditConfig, EDIT | {"task": "draw"}, "task is draw; accepted: inpaint, outpaint, edit"),
    (EditConfig, EDIT | {"precision": "fp8"}, "precision is fp8; accepted: fp32, bf16, fp16"),
    (EditConfig, EDIT | {"box": ()}, "neither box nor mask given; give one of them"),
    (EditConfig, EDIT | {"mask": "m.png"}, "both box and mask given; give one of them"),
    (EditConfig, EDIT | {"box": (0, 1)}, "box has 2 numbers; it is Y0 X0 Y1 X1"),
    (EditConfig, EDIT | {"variants": 0}, "variants is 0; it must be 1 or more"),
    (EditConfig, EDIT | {"batch": 0}, "batch is 0; it must be 1 or more"),
    (EditConfig, EDIT | {"feather": -1}, "feather is -1; it must be 0 or more"),
    (EditConfig, EDIT | {"seed": -1}, "seed is -1; it must be 0 or more"),
    (CompareSizesConfig, SIZES | {"runs": ()}, "runs is empty; it needs at least one"),
    (CompareSizesConfig, SIZES | {"stages": ()}, "stages is empty; it needs at least one"),
    (CompareSizesConfig, SIZES | {"stages": (0.5, 1.5)}, "stages has 1.5; it holds shares of the training"),
    (CompareSizesConfig, SIZES | {"tolerance": 1.0}, "tolerance is 1.0; it is a share of the training"),
    (CompareSizesConfig, SIZES | {"forced_scales": -1}, "forced_scales is -1; it must be 0 or more"),
    (CompareSizesConfig, SIZES | {"out": "o.pdf"}, "out is 'o.pdf'; it must be the name of a .png file"),
    (DependencyConfig, PLOT | {"num_images": 0}, "num_images is 0; accepted: 1 to 16"),
    (DependencyConfig, PLOT | {"num_images": 17}, "num_images is 17; accepted: 1 to 16"),
    (DependencyConfig, PLOT | {"seed": -1}, "seed is -1; it must be 0 or more"),
    (DependencyConfig, PLOT | {"out": "o"}, "out is 'o'; it must be the name of a .png file"),
]


@pytest.mark.parametrize(("schema", "settings", "words"), REFUSED)
def test_impossible_settings_are_refused_where_they_are_written(
    schema: type, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        schema(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize("label_drop", [0.0, 0.1])
def test_an_unconditional_model_needs_no_word_about_label_drop(label_drop: float) -> None:
    assert not TrainConfig(**UNCONDITIONAL, label_drop=label_drop).model.is_conditional


def test_the_policy_for_bad_samples_is_strict_unless_asked_otherwise() -> None:
    assert DataConfig().max_bad == 0 and DataConfig(bad_samples="quarantine:7").max_bad == 7
