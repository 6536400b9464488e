"""Every YAML file in configs/ is a config: it loads, fits its tokenizer, and its header tells the truth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from repository import CONFIGS

from launchers.encode_codes import EncodeConfig
from launchers.export_weights import ExportConfig
from launchers.import_weights import ImportConfig
from launchers.pack_images import PackConfig
from launchers.sample import SampleConfig
from launchers.setup.config_files import load_config, to_yaml
from launchers.setup.settings import TrainConfig
from launchers.train_tokenizer import TokenizerConfig, refuse_unfit_engine
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


@pytest.mark.parametrize(
    "schema, required",
    [
        (PackConfig, {"source": "digits", "out": "o"}),
        (TokenizerConfig, {"run": "r"}),
        (EncodeConfig, {"tokenizer": "t", "images": "i", "out": "o"}),
        (SampleConfig, {"run": "r"}),
        (ImportConfig, {"var": "v", "out": "o"}),
        (ExportConfig, {"run": "r", "out": "o"}),
    ],
)
def test_defaults_read_back_as_the_same(schema: type, required: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(schema, None, [f"{name}={value}" for name, value in required.items()])
    assert config == schema(**required)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(schema, str(resolved)) == config


@pytest.mark.parametrize("label_drop", [-0.1, 1.0])
def test_a_drop_rate_that_is_no_probability_is_refused(label_drop: float) -> None:
    with pytest.raises(ValueError, match=f"label_drop is {label_drop}"):
        TrainConfig(run="r", tokenizer="t", model=VARConfig(depth=1), label_drop=label_drop)


@pytest.mark.parametrize("label_drop", [0.0, 0.1])
def test_an_unconditional_model_needs_no_word_about_label_drop(label_drop: float) -> None:
    model = VARConfig(depth=1, num_classes=0)
    assert not TrainConfig(run="r", tokenizer="t", model=model, label_drop=label_drop).model.is_conditional


def test_a_label_drop_asked_for_where_there_are_no_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="label_drop is 0.2; without labels .* it has no effect"):
        TrainConfig(run="r", tokenizer="t", model=VARConfig(depth=1, num_classes=0), label_drop=0.2)


def test_an_import_of_nothing_and_an_export_to_an_unknown_format_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to import; give --var FILE, --tokenizer FILE, or both"):
        ImportConfig(out="o")
    with pytest.raises(ValueError, match="format is onnx; accepted: safetensors, reference"):
        ExportConfig(run="r", out="o", format="onnx")
