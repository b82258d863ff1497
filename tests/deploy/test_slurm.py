"""deploy/slurm/switokd.sbatch: linted, and run with programs that stand for those of Slurm.

`srun` here starts the tasks with the variables that Slurm documents, on this machine. What was not
tried: Slurm itself, several nodes, GPUs, and time limits.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import BIN, REPOSITORY, lines, run

SCRIPT = REPOSITORY / "deploy/slurm/switokd.sbatch"
SRUN = """\
#!/bin/bash
# Starts SLURM_NTASKS tasks; ends with the highest exit code, as srun does.
test "$1" = --kill-on-bad-exit=1 && shift
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_TASKS_PER_NODE=$SLURM_NTASKS "$@" &
  pids+=($!)
done
highest=0
for pid in "${pids[@]}"; do
  code=0; wait "$pid" || code=$?
  ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = """\
#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$@" >> scontrol.log; fi
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job of two tasks, with the programs in a folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{BIN}:/usr/bin:/bin",
        "SLURM_JOB_ID": str(7_000_000 + tmp_path.stat().st_ino % 20_000),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }


def sbatch(folder: Path, slurm: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    """Run the script as Slurm would on the first node."""
    bash = shutil.which("bash") or "bash"
    return run([bash, str(SCRIPT), *arguments], folder, 400, **slurm)


def test_bash_and_shellcheck_have_nothing_to_say() -> None:
    linter = str(BIN / "shellcheck")
    for command in (["bash", "-n", str(SCRIPT)], [linter, "-s", "bash", str(SCRIPT)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    script = REPOSITORY / "k8s/render.sh"
    done = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_options_come_before_the_first_command() -> None:
    text = SCRIPT.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(text) if line and not line.startswith("#"))
    options = [i for i, line in enumerate(text) if line.startswith("#SBATCH ")]
    assert len(options) >= 6
    assert max(options) < first  # Slurm ignores later ones


@pytest.mark.timeout(800, method="signal")
def test_the_tasks_train_and_continue(slurm: dict[str, str], tmp_path: Path) -> None:
    words = ("digits-1t1s", "checkpoint.every_steps=3")
    for steps in (3, 6):
        code, out, err = sbatch(tmp_path, slurm, *words, f"schedule.max_steps={steps}")
        assert code == 0, out + err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == f"digits-1t1s-{slurm['SLURM_JOB_ID']}"
    assert len(lines(folder / "decisions.jsonl")) == 6
    (first, *_) = [line for line in lines(folder / "attempts.jsonl")[2:] if "started" in line]
    assert first["after_step"] == 3
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (4, True), (2, False), (6, False)])
def test_only_what_may_go_on_is_requeued(
    slurm: dict[str, str], tmp_path: Path, code: int, requeued: bool
) -> None:
    (tmp_path / "bin" / "python").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    assert sbatch(tmp_path, slurm, "digits-1t1s")[0] == code
    assert (tmp_path / "scontrol.log").exists() is requeued
    (tmp_path / "scontrol.log").unlink(missing_ok=True)
    again = {**slurm, "SLURM_RESTART_COUNT": "5"}
    assert sbatch(tmp_path, again, "digits-1t1s")[0] == code
    assert not (tmp_path / "scontrol.log").exists()


def test_without_a_run_file_it_says_so(slurm: dict[str, str], tmp_path: Path) -> None:
    code, _, err = sbatch(tmp_path, slurm)
    assert (code, err) == (2, "switokd.sbatch: name a recipe or a run file, then settings\n")
