"""What recovery costs: `python -m tests.faults.measure coordinator|checkpoints|killed`.

Networks sleep for 20 ms a step and have 690,000 parameters, as teacher1 of digits-2t1s has; so the
figures say what recovery adds, also on a busy machine.

coordinator   step time while the coordinator is away, over that with it; seconds from its return
              to the next decision that arrives
checkpoints   time of 600 steps with a checkpoint every 100 steps over the time without
killed        effective training time ratio with a rank killed once a minute

Not covered: disks slower than this machine's; networks that keep all cores busy.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from switokd.coordination.client import Client
from switokd.coordination.protocol import RankProtocol
from switokd.training import trainer
from tests.faults.moments import replace
from tests.faults.outside import Outside
from tests.preloaded import call, train_ranks
from tests.support import REPOSITORY, process, switokd_train

STEP_SECONDS = 0.02
STEPS = 600
AWAY = (200, 400)
"""In these steps the coordinator is killed, and started again."""

WORDS = ["digits-1t1s", "checkpoint.every_minutes=null", "coordinator.deadline=1.0"]
WORDS += [f"networks.{name}.model=tests.faults.measure:Slow" for name in ("teacher", "student")]
WORDS += ["schedule.epochs=1000", "schedule.evaluate_every=1000", "run_dir=out"]


class Slow(nn.Module):
    """Sleeps in its forward pass, and has a state of usual size."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 10)
        self.unused = nn.Parameter(torch.zeros(690_000))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, 10]` of images `[B, 1, 8, 8]`."""
        if self.training:
            time.sleep(STEP_SECONDS)
        z: Tensor = self.last(x.flatten(1))
        return z + 0 * self.unused[0]


def timed_ranks(world_size: int, arguments: tuple[str, ...]) -> None:
    """Fork the ranks, which write down when steps begin and when decisions arrive."""
    steps: list[tuple[int, float]] = []
    decisions: list[tuple[int, float]] = []

    def began(*of_step: Any) -> None:
        steps.append((of_step[2], time.monotonic()))
        if os.environ["RANK"] == "0":
            Path("step").write_text(str(of_step[2]))
        begin(*of_step)

    def received(self: RankProtocol, response: Any, attempt: int) -> Any:
        if response.WhichOneof("event") == "decision":
            decisions.append((response.decision.step, time.monotonic()))
        return receive(self, response, attempt)

    def closed(self: Client, failure: str = "") -> None:
        times = {"steps": steps, "decisions": decisions}
        Path(f"times-{os.environ['RANK']}.json").write_text(json.dumps(times))
        close(self, failure)

    begin = replace(trainer, "set_learning_rate", began)
    receive = replace(RankProtocol, "receive", received)
    close = replace(Client, "close", closed)
    train_ranks(world_size, arguments)


def coordinator(top: Path) -> None:
    """Measure the loss and the return of the coordinator."""
    outside = Outside(top / "outside")
    back: list[float] = []

    def disturb() -> None:
        _wait_for_step(top, AWAY[0])
        outside.kill()
        _wait_for_step(top, AWAY[1])
        outside.start_again()
        back.append(time.monotonic())

    threading.Thread(target=disturb, daemon=True).start()
    words = (*WORDS, f"schedule.max_steps={STEPS}", f"coordinator.address={outside.address}")
    code, _, err = call(top, timed_ranks, 2, words, seconds=300)
    assert code == 0, err
    times = json.loads((top / "times-0.json").read_text())
    with_it = _step_times(times, 50, AWAY[0]) + _step_times(times, AWAY[1] + 100, STEPS)
    away = _step_times(times, AWAY[0], AWAY[1])
    heard = [at for step, at in times["decisions"] if step >= AWAY[1]]
    outside.close()
    print(
        f"step with the coordinator: mean {1e3 * statistics.mean(with_it):.2f} ms, "
        f"median {1e3 * statistics.median(with_it):.2f} ms; while it is away: "
        f"mean {1e3 * statistics.mean(away):.2f} ms (with the wait for the deadline), "
        f"median {1e3 * statistics.median(away):.2f} ms; "
        f"median away over with: {statistics.median(away) / statistics.median(with_it):.3f}"
    )
    print(f"first decision after the return: {heard[0] - back[0]:.2f} s")


def _wait_for_step(top: Path, step: int) -> None:
    file = top / "step"
    while not file.exists() or int(file.read_text() or 0) < step:
        time.sleep(0.002)


def _step_times(times: Any, first: int, last: int) -> list[float]:
    began = dict(times["steps"])
    return [began[step + 1] - began[step] for step in range(first, last)]


def checkpoints(top: Path) -> None:
    """Measure the time of the steps with and without checkpoints, in turn."""
    seconds: dict[str, list[float]] = {"100": [], "null": []}
    for turn in range(3):
        for every in seconds:
            folder = top / f"{turn}-{every}"
            words = (*WORDS, f"schedule.max_steps={STEPS}", f"checkpoint.every_steps={every}")
            code, _, err = call(folder, timed_ranks, 2, words, seconds=300)
            assert code == 0, err
            times = json.loads((folder / "times-0.json").read_text())
            seconds[every].append(sum(_step_times(times, 10, STEPS)))
    ratio = statistics.median(seconds["100"]) / statistics.median(seconds["null"])
    print(f"seconds of {STEPS - 10} steps, by checkpoint.every_steps: {seconds}")
    print(f"checkpoints every 100 steps cost {100 * (ratio - 1):.2f} % (medians)")


def killed(top: Path, minutes: int = 4) -> None:
    """Measure the share of the time that counts if a rank is killed once a minute."""
    steps = int(60 * minutes / STEP_SECONDS * 0.9)
    words = (*WORDS, f"schedule.max_steps={steps}", "checkpoint.every_steps=100")
    log = top / "log"
    command = [*switokd_train(2, *words), "--max-restarts=100"]
    with process(command, top, log, PYTHONPATH=str(REPOSITORY)) as child:
        began, kills = time.monotonic(), 0
        while child.poll() is None:
            time.sleep(0.1)
            if time.monotonic() - began > 60 * (kills + 1):
                kills += 1
                for member in psutil.Process(child.pid).children(recursive=True):
                    if member.name() == "switokd rank 1":
                        member.kill()
        assert child.wait() == 0, log.read_text()
    summary = json.loads((top / "out" / "summary.json").read_text())
    keys = ("restarts", "steps_lost", "seconds_lost", "seconds_since_first_start")
    print({key: summary[key] for key in (*keys, "effective_training_ratio")})


def main() -> int:
    """Measure what the command line names."""
    measurements = {"coordinator": coordinator, "checkpoints": checkpoints, "killed": killed}
    for name in sys.argv[1:] or measurements:
        top = Path(tempfile.mkdtemp(prefix=f"measure-{name}-"))
        measurements[name](top)
    return 0


if __name__ == "__main__":  # a fork server imports this file again
    sys.exit(main())
