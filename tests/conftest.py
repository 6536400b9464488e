"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fork_world import ForkServer
from project import ENCODE, PACK, TOKENIZER, ForkedProject, train_arguments
from tiny import Study, make_study

FIGURES = pytest.StashKey[dict[str, str]]()


def pytest_configure() -> None:
    """One thread: these tensors are too small to share, and threads that wait for a busy core cost tenfold."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Tests that train in it choose a run folder of their own."""
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("worlds")) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def early_server(request: pytest.FixtureRequest) -> None:
    """Let the fork server import, and compile, beside the first tests: these need one core."""
    if any("fork_server" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("fork_server")


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> dict[str, str]:
    """Figure -> value, printed after the tests as rows for docs/reliability.md."""
    return pytestconfig.stash.setdefault(FIGURES, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for figure, value in config.stash.get(FIGURES, {}).items():
        terminalreporter.write_line(f"| {figure} | {value} |")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> ForkedProject:
    project = ForkedProject(tmp_path_factory.mktemp("project"), fork_server)
    project.succeed("pack_images", *PACK)
    project.forked("train_tokenizer", *TOKENIZER)
    project.forked("encode_codes", *ENCODE)
    return project


@pytest.fixture(scope="session")
def trained(project: ForkedProject) -> ForkedProject:
    project.forked("train", *train_arguments("runs/whole"), ranks=2)
    return project
