"""`scaling_study.py run --slurm`: a study as job arrays, and a job behind them that fits and reports.

Sizes with the same options of sbatch share an array. Each element trains one run by `launchers/slurm/common.sh`: it is
warned before its time limit, saves, is requeued and goes on. The scripts name every path and every run, so what waits
in the queue does not change if the study's config changes.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from launchers.setup.command_line import say
from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.strict_json import read_json
from launchers.study.config import StudyConfig, study_name
from launchers.study.state import PlannedRun

FIT = "fit"  # the name, among those of the sizes, of the job that fits and reports
JOBS = "jobs.json"  # in FOLDER/slurm: the ids of the jobs submitted last
HOME = Path(__file__).resolve().parents[2]
HEAD = """#!/bin/bash
# Written by `scaling_study.py run --slurm`.
#SBATCH --job-name={name} --output={output}
#SBATCH --open-mode=append
{options}set -euo pipefail

cd {here}
home={home}
. "$home/launchers/slurm/common.sh"
"""
ARRAY = """
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
train "$home/launchers/train.py" "${{arguments[@]}}"
"""
FIT_AND_REPORT = """
prepare_environment
python3 "$home/launchers/scaling_study.py" fit {folder}
python3 "$home/launchers/scaling_study.py" report {folder}
"""


def submit(config: StudyConfig, runs: Sequence[PlannedRun]) -> None:
    """Write the job scripts of these runs to FOLDER/slurm, and submit all or none of them.

    Raises:
        ValueError: the options cannot be meant, or Slurm refuses the jobs.
    """
    if not runs:
        say(f"done: nothing is left to train; next: scaling_study.py fit {config.folder}")
        return
    folder = Path(config.folder) / "slurm"
    groups = group_by_options(config, runs)
    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []

    def add(name: str, script: str, what: str, *options: str) -> None:
        path = folder / f"{name}.sbatch"
        with atomic_file(path) as file:
            file.write(script.encode())
        jobs.append(sbatch(path, *options))
        say(f"job {jobs[-1]}: {what}; {path}")

    try:
        for number, (options, members) in enumerate(groups, start=1):
            names = ", ".join(run.name for run in members)
            own = [f"--array=0-{len(members) - 1} --signal=USR1@120 --requeue", *options]
            cases = "\n".join(f"    {i}) arguments=({shlex.join(run.arguments)}) ;;" for i, run in enumerate(members))
            add(f"train-{number}", _head(config, "%x-%A_%a.log", own) + ARRAY.format(cases=cases), names)
        after = (f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes")
        script = FIT_AND_REPORT.format(folder=shlex.quote(config.folder))
        script = _head(config, f"%x-{FIT}-%j.log", options_of(config, FIT)) + script
        add(FIT, script, "fit and report when all of them are done", *after)
    except BaseException:
        if jobs:
            subprocess.run(["scancel", *jobs])
        raise
    with atomic_file(folder / JOBS) as file:
        file.write(json.dumps(jobs).encode())


def refuse_queued(folder: Path) -> None:
    """Raise ValueError if jobs of the study in this folder are in the queue: a run is trained by one at a time."""
    path = folder / "slurm" / JOBS
    if not path.is_file():
        return
    jobs = read_json(path)
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--format=%F", f"--jobs={','.join(jobs)}"], capture_output=True, text=True
        )
    except FileNotFoundError:  # no Slurm on this machine
        return
    queued = sorted(set(asked.stdout.split()))
    if queued:
        raise ValueError(
            f"{folder}: jobs of this study are in the queue: {', '.join(queued)}; wait for them, or scancel "
            f"{' '.join(queued)}"
        )


def group_by_options(config: StudyConfig, runs: Sequence[PlannedRun]) -> list[tuple[tuple[str, ...], list[PlannedRun]]]:
    """Group the runs that share their options of sbatch, in the order of their first runs."""
    for entry in config.sbatch:
        _refuse_unknown_names(entry, [*config.names(), FIT])
    groups: dict[tuple[str, ...], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault(options_of(config, run.size), []).append(run)
    return list(groups.items())


def options_of(config: StudyConfig, name: str) -> tuple[str, ...]:
    """Return the options of sbatch for a size, first those of all sizes; for FIT only its own."""
    entries = [_names_and_options(entry) for entry in config.sbatch]
    common = [options for names, options in entries if not names and name != FIT]
    return (*common, *(options for names, options in entries if name in names))


def _names_and_options(entry: str) -> tuple[list[str], str]:
    if entry.startswith("-"):
        return [], entry
    names, _, options = entry.partition(":")
    return [name.strip() for name in names.split(",")], options.strip()


def _refuse_unknown_names(entry: str, known: Iterable[str]) -> None:
    names, options = _names_and_options(entry)
    unknown = [name for name in names if name not in known]
    if unknown or not options.startswith("-") or "\n" in entry:
        raise ValueError(
            f"sbatch has '{entry}'; write options of sbatch, as --nodes=8, or sizes before them, as d6,d8: --nodes=8; "
            f"known here: {', '.join(known)}"
        )


def _head(config: StudyConfig, log: str, options: Sequence[str]) -> str:
    """Write the first lines of every script, which set the folder in which the study was typed."""
    output = (Path(config.folder) / "slurm").absolute() / log
    return HEAD.format(
        name=re.sub(r"[^\w.-]", "-", study_name(config)),
        output=shlex.quote(str(output)),
        options="".join(f"#SBATCH {option}\n" for option in options),
        here=shlex.quote(str(Path.cwd())),
        home=shlex.quote(str(HOME)),
    )


def sbatch(script: Path, *options: str) -> str:
    """Submit a script and return the id of its job.

    Raises:
        ValueError: there is no Slurm here, or it refuses the job.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(
            f"slurm is on, but there is no sbatch here; run `sbatch {script}` where there is one, or leave slurm out"
        ) from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise ValueError(f"{script}: sbatch refuses it ({said}); correct the study's sbatch options")
    return done.stdout.strip().partition(";")[0]
