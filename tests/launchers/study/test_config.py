"""The configs of studies: those of this repository, and how sizes get their names."""

from __future__ import annotations

import pytest
from repository import CONFIGS

from launchers.setup.config_files import load_config
from launchers.study.config import StudyConfig
from launchers.study.state import plan_runs


@pytest.mark.parametrize("file, num_sizes", [("scaling_study.yaml", 12), ("synthetic/scaling_study.yaml", 6)])
def test_studies_of_this_repository_name_configs_that_are_there(
    file: str, num_sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(StudyConfig, str(CONFIGS / file))
    runs = plan_runs(config)
    assert len(config.names()) == num_sizes
    assert {run.size: run.train.model.depth for run in runs} == {size: int(size[1:]) for size in config.names()}
    assert all(run.train.loop.validate_per_decade > 0 and run.train.run == str(run.folder) for run in runs)


def test_a_size_is_named_after_its_file() -> None:
    config = StudyConfig(folder="study", sizes=("configs/d6.yaml", "elsewhere/wide.yaml"))
    assert config.names() == {"d6": "configs/d6.yaml", "wide": "elsewhere/wide.yaml"}
