"""The launchers' own functions, and a tiny study from images to samples in one process, without DeepSpeed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VAR_CONFIG, VQVAE_CONFIG, PlainEngine, make_tokenizer

from launchers import encode_codes, pack_images, sample, train, train_tokenizer
from launchers.assembly import (
    load_tokenizer,
    load_var,
    open_checkpoints,
    open_codes_or_images,
    refuse_misfit,
    run_stage,
    validation_source,
)
from launchers.command_line import Command, load_config
from launchers.config import (
    DataConfig,
    EncodeConfig,
    PackConfig,
    SampleConfig,
    TokenizerConfig,
    TrainConfig,
    ViewConfig,
)
from launchers.demo import DemoConfig, plan_stages, run_command, within_class_variance
from models.var import VAR, VARConfig
from training.checkpoint import TrainState, describe, write_model
from training.distributed import World
from training.engine import EngineConfig
from training.loop import LoopConfig
from training.tracking import RunRecord, TrackingConfig
from training.var_loop import VARStage

ONE_TO_ONE = ViewConfig(resize_ratio=1.0)  # the pictures have the tokenizer's size already
TIMES = ("time", "images_per_second", "tokens_per_second", "data_wait_share")  # what no two runs share


@dataclass(frozen=True)
class Study:
    """A folder with packed pictures, a tokenizer, and their codes."""

    folder: Path

    def encode_config(self, **changes: Any) -> EncodeConfig:
        paths = {"tokenizer": "tokenizer", "images": "images", "out": "codes"}
        settings = {name: str(self.folder / path) for name, path in paths.items()} | {"views": 2, "view": ONE_TO_ONE}
        return EncodeConfig(**(settings | changes))

    def train_config(self, run: str = "run", *, kind: str = "codes", **loop: Any) -> TrainConfig:
        return TrainConfig(
            run=str(self.folder / run),
            tokenizer=str(self.folder / "tokenizer"),
            model=VAR_CONFIG,
            data=DataConfig(
                train=str(self.folder / kind / "train"),
                validation=str(self.folder / kind / "val"),
                workers=0,
                views=ONE_TO_ONE,
            ),
            engine=EngineConfig(zero_stage=0, precision="fp32", micro_batch=2),
            loop=LoopConfig(global_batch=4, epochs=2.0, validate_every=1.0, **loop),
            tracking=TrackingConfig(mlflow=False),
        )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    found = Study(tmp_path_factory.mktemp("study"))
    side, generator = VQVAE_CONFIG.image_size, np.random.default_rng(0)
    for label in ("a", "b", "c"):
        (found.folder / "pictures" / label).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(found.folder / "pictures" / label / f"{number}.png")
    images, pictures = str(found.folder / "images"), str(found.folder / "pictures")
    pack_images.launch(command(PackConfig(source=pictures, out=images, val_fraction=0.25)))
    write_model(found.folder / "tokenizer", make_tokenizer().state_dict(), describe(VQVAE_CONFIG))
    encode_codes.launch(command(found.encode_config()))
    return found


def command(config: Any, **options: Any) -> Command[Any]:
    return Command(config, **({"dry_run": False, "world_size": None} | options))


def train_var(config: TrainConfig) -> tuple[TrainState, VAR]:
    """`launchers/train.py` with a plain engine in the place of DeepSpeed's."""
    world = World()
    tokenizer, sha256 = load_tokenizer(config.tokenizer)
    dataset, validation = (
        open_codes_or_images(folder, config, tokenizer.config, sha256, random_views=random_views)
        for folder, random_views in ((config.data.train, True), (config.data.validation, False))
    )
    model = VAR(config.model, seed=config.seed)
    stage = VARStage(
        PlainEngine(model, accumulation=config.loop.global_batch // config.engine.micro_batch),
        config.model,
        tokenizer,
        label_drop=config.label_drop,
        global_batch=config.loop.global_batch,
        seed=config.seed,
        world=world,
        validation=validation_source(validation, config.engine, world),
    )
    return run_stage(config, stage, dataset, open_checkpoints(config, world), world), model


def losses(config: TrainConfig) -> list[dict[str, Any]]:
    records = RunRecord(Path(config.run)).read()
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(study: Study) -> None:
    whole, part = study.train_config("whole"), study.train_config("part", stop_after_steps=3)
    state, model = train_var(whole)
    train_var(part)
    resumed_state, resumed = train_var(replace(part, loop=whole.loop))
    assert state == resumed_state and state.step > 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert losses(whole) == losses(part)


def test_steps_that_a_crash_left_without_a_checkpoint_are_recorded_once(study: Study) -> None:
    config = study.train_config("crashed", stop_after_steps=2)
    train_var(config)
    lost = {"kind": "train", "step": 3, "loss_avg": 99.0}
    RunRecord(Path(config.run)).write([lost])
    train_var(study.train_config("crashed", stop_after_steps=4))
    taken = [record["step"] for record in losses(config) if record["kind"] == "train"]
    assert taken == [1, 2, 3, 4]
    assert 99.0 not in [record["loss_avg"] for record in losses(config)]


def test_a_run_folder_holds_the_config_that_made_it(study: Study) -> None:
    config = study.train_config("recorded", stop_after_steps=1)
    train_var(config)
    assert load_config(TrainConfig, str(Path(config.run) / "config.yaml")) == config
    assert sample.tokenizer_of(config.run) == config.tokenizer


def test_a_run_of_another_world_is_refused_before_anything_starts(study: Study) -> None:
    config = study.train_config("alone", stop_after_steps=1)
    train_var(config)
    with pytest.raises(ValueError, match="written by 1 ranks, this run has 2"):
        open_checkpoints(config, World(world_size=2))


def test_training_on_images_or_on_their_codes_are_both_possible(study: Study) -> None:
    state, _ = train_var(study.train_config("online", kind="images", stop_after_steps=1))
    assert state.step == 1


def test_codes_of_another_tokenizer_are_refused(study: Study, tmp_path: Path) -> None:
    write_model(tmp_path / "other", make_tokenizer(seed=1).state_dict(), describe(VQVAE_CONFIG))
    with pytest.raises(ValueError, match="tokenizer_sha256"):
        train_var(replace(study.train_config("misled"), tokenizer=str(tmp_path / "other")))


def test_encoding_again_does_nothing_and_another_number_of_views_is_not_taken_for_done(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_codes.launch(command(study.encode_config()))
    assert capsys.readouterr().out.count("nothing to do") == 2
    encode_codes.launch(command(study.encode_config(views=3), dry_run=True))
    assert "would encode" in capsys.readouterr().out


def test_packing_again_does_nothing(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    config = PackConfig(source=str(study.folder / "pictures"), out=str(study.folder / "images"), val_fraction=0.25)
    pack_images.launch(command(config))
    assert "nothing to do" in capsys.readouterr().out


def test_a_dry_run_of_training_says_what_it_needs_and_reads_one_batch(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    train.launch(command(study.train_config(), dry_run=True, world_size=2))
    said = capsys.readouterr().out
    assert f"parameters          {VAR_CONFIG.num_parameters:,}\n" in said
    assert "2 x 2 images x 1 accumulated" in said
    assert "one batch of codes (2, 5)" in said
    assert not Path(study.train_config().run).exists()


def test_a_dry_run_needs_neither_tokenizer_nor_data(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    train.launch(command(replace(study.train_config(), tokenizer="nowhere"), dry_run=True))
    assert "not there yet: nowhere" in capsys.readouterr().out


def test_a_dry_run_refuses_a_batch_that_cannot_be_split(study: Study) -> None:
    with pytest.raises(ValueError, match="global_batch 4 is not divisible by the world size 3"):
        train.launch(command(study.train_config(), dry_run=True, world_size=3))


def test_a_dry_run_of_the_tokenizer_reads_one_batch(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    config = study.train_config(kind="images")
    settings = TokenizerConfig(run="r", model=VQVAE_CONFIG, data=config.data, engine=config.engine, loop=config.loop)
    train_tokenizer.launch(command(settings, dry_run=True))
    said = capsys.readouterr().out
    assert f"parameters          {sum(p.numel() for p in make_tokenizer().parameters()):,}\n" in said
    assert "tokens per image    5" in said and "one batch (2, 3, 8, 8)" in said


@pytest.mark.parametrize(
    "change, message",
    [
        ({"precision": "bf16"}, "engine.precision is bf16"),
        ({"zero_stage": 3}, "engine.zero_stage is 3"),
        ({"activation_checkpointing": True}, "engine.activation_checkpointing is on"),
    ],
)
def test_an_engine_that_does_not_fit_the_tokenizer_is_refused(change: dict[str, Any], message: str) -> None:
    fitting = {"precision": "fp32", "zero_stage": 2}
    train_tokenizer.refuse_unfit_engine(EngineConfig(**fitting))
    with pytest.raises(ValueError, match=message):
        train_tokenizer.refuse_unfit_engine(EngineConfig(**(fitting | change)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_nums": (1, 3)}, r"model.patch_nums is \(1, 3\), its tokenizer has \(1, 2\)"),
        ({"vocab_size": 32}, "model.vocab_size is 32, its tokenizer has 16"),
        ({"code_width": 8}, "model.code_width is 8, its tokenizer has 4"),
    ],
)
def test_a_transformer_that_does_not_fit_its_tokenizer_is_refused(change: dict[str, Any], message: str) -> None:
    refuse_misfit(VAR_CONFIG, VQVAE_CONFIG)
    with pytest.raises(ValueError, match=message):
        refuse_misfit(replace(VAR_CONFIG, **change), VQVAE_CONFIG)


def test_models_come_back_from_disk_as_they_were(study: Study, tmp_path: Path) -> None:
    tokenizer, sha256 = load_tokenizer(str(study.folder / "tokenizer"))
    assert tokenizer.config == VQVAE_CONFIG and len(sha256) == 64
    write_model(tmp_path, VAR(VAR_CONFIG, seed=2).state_dict(), describe(VAR_CONFIG))
    var = load_var(str(tmp_path))
    assert var.config == VAR_CONFIG and torch.equal(var.head.weight, VAR(VAR_CONFIG, seed=2).head.weight)


def test_a_model_whose_config_was_edited_is_refused_by_key(tmp_path: Path) -> None:
    write_model(tmp_path, VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG) | {"dpeth": 2})
    with pytest.raises(ValueError, match="unknown key 'dpeth'"):
        load_var(str(tmp_path))


def test_labels_come_class_by_class() -> None:
    config = SampleConfig(run="r", per_class=2)
    assert sample.sample_labels(config, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert sample.sample_labels(replace(config, classes=(2, 0)), 3).tolist() == [2, 2, 0, 0]
    assert sample.sample_labels(config, 3).dtype == np.int64


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_that_the_model_does_not_know_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=f"classes has {label}; this model knows 0 to 2"):
        sample.sample_labels(SampleConfig(run="r", classes=(0, label)), 3)


def test_no_images_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="per_class is 0"):
        sample.sample_labels(SampleConfig(run="r", per_class=0), 3)


def sampled(classes: tuple[int, ...] = (), **settings: Any) -> np.ndarray:
    config = SampleConfig(run="r", classes=classes, **({"per_class": 3, "top_k": 0, "top_p": 1.0} | settings))
    labels = sample.sample_labels(config, VAR_CONFIG.num_classes)
    return np.concatenate(list(sample.sample_batches(VAR(VAR_CONFIG), make_tokenizer(), labels, config)))


def test_images_do_not_depend_on_the_batch_they_are_drawn_in() -> None:
    whole = sampled(batch=9)
    assert whole.shape == (9, 8, 8, 3) and whole.dtype == np.uint8
    # 1: batched convolutions may differ in the last bit, and a pixel may lie between two levels
    assert np.abs(whole.astype(int) - sampled(batch=2)).max() <= 1


def test_an_image_depends_on_its_class_and_number_alone() -> None:
    assert np.abs(sampled()[6:].astype(int) - sampled(classes=(2,))).max() <= 1
    fewer = sampled(per_class=2)
    assert np.abs(sampled()[[0, 1, 3, 4]].astype(int) - fewer[:4]).max() <= 1


def test_every_image_of_a_class_and_number_has_a_seed_of_its_own() -> None:
    labels, numbers = np.repeat(np.arange(1000), 50), np.tile(np.arange(50), 1000)
    seeds = np.concatenate([sample.image_seeds(seed, labels, numbers, 1000) for seed in (0, 1, 2)])
    assert len(np.unique(seeds)) == 150_000


def test_another_seed_gives_other_images_and_no_two_are_alike() -> None:
    images = sampled()
    assert not np.array_equal(images, sampled(seed=1))
    assert len({image.tobytes() for image in images}) == 9


def test_a_run_is_sampled_with_the_tokenizer_it_was_trained_on(study: Study) -> None:
    config = study.train_config("sampled", stop_after_steps=1)
    train_var(config)
    sample.launch(command(SampleConfig(run=config.run, per_class=2, batch=4)))
    with np.load(Path(config.run) / "samples" / "samples.npz") as found:
        assert found["arr_0"].shape == (6, 8, 8, 3) and found["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert (Path(config.run) / "samples" / "samples.png").is_file()


def test_a_model_without_a_run_needs_its_tokenizer_named(tmp_path: Path) -> None:
    write_model(tmp_path, VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    with pytest.raises(FileNotFoundError, match="add tokenizer=PATH"):
        sample.launch(command(SampleConfig(run=str(tmp_path))))


def test_variance_within_classes_has_its_closed_form() -> None:
    levels = np.array([0, 255, 0, 51], np.uint8)  # as grey values 0, 1, 0 and 0.2
    images = np.broadcast_to(levels[:, None, None, None], (4, 2, 3, 3))
    labels = np.array([7, 7, 9, 9])
    # variances 1/4 and 0.01, summed over the 2 x 3 pixels, averaged over the two classes
    assert within_class_variance(images, labels) == pytest.approx(6 * (0.25 + 0.01) / 2)


def test_copies_of_one_image_per_class_have_no_variance() -> None:
    images = np.broadcast_to(np.array([3, 3, 200], np.uint8)[:, None, None, None], (3, 4, 4, 3))
    assert within_class_variance(images, np.array([0, 0, 1])) == 0


def test_the_demo_consists_of_the_projects_own_commands_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    stages = plan_stages(DemoConfig())
    assert list(stages) == ["pack_images", "train_tokenizer", "encode_codes", "train", "sample"]
    for name, line in stages.items():
        script = next(word for word in line if word.endswith(".py"))
        assert Path(script).is_file() and Path(script).stem == name
    run = load_config(TrainConfig, DemoConfig().transformer).run
    assert f"run={run}" in stages["sample"] and DemoConfig().transformer in stages["train"]
    tokenizer = load_config(TokenizerConfig, DemoConfig().tokenizer).run
    assert f"tokenizer={tokenizer}" in stages["encode_codes"]


def test_a_stage_of_the_demo_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match="stage nap ended with exit code 1"):
        run_command("nap", [shutil.which("false")])


def test_configs_on_disk_are_plain_json(study: Study) -> None:
    config = json.loads((study.folder / "tokenizer" / "config.json").read_text())
    assert config["kind"] == "VQVAE" and config["patch_nums"] == [1, 2]
    assert VARConfig(**{key: value for key, value in describe(VAR_CONFIG).items() if key != "kind"}) == VAR_CONFIG
