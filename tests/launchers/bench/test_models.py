"""The benchmarks' models have the sizes asked for, and their batches fit them."""

from __future__ import annotations

from launchers.bench.config import BenchmarkConfig
from launchers.bench.models import code_batch, image_batch, make_tokenizer, public_code, var_config
from models.generation import check_configs_agree
from models.var import VAR

CONFIG = BenchmarkConfig(what="train", depth=1, patch_nums=(1, 2), tokenizer_width=32, batch=2)


def test_models_and_batches_fit_together() -> None:
    model_config, tokenizer = var_config(CONFIG), make_tokenizer(CONFIG)
    check_configs_agree(model_config, tokenizer.config)
    assert tokenizer.config.autoencoder.width == 32 and model_config.depth == 1
    codes, images = code_batch(model_config, 2), image_batch(model_config, tokenizer.config, 2)
    assert tokenizer.encode(images.data).shape == codes.data.shape == (2, 5)
    assert codes.labels.tolist() == images.labels.tolist() == [0, 1]


def test_the_public_code_is_there_only_where_it_is_asked_for() -> None:
    with public_code(CONFIG, VAR(var_config(CONFIG)), make_tokenizer(CONFIG)) as public:
        assert public is None
