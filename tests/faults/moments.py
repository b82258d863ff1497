"""Lets planned faults happen inside the ranks: functions of the package are wrapped from outside.

The process that forks the ranks wraps them, so the package itself has no hook. A phase is the time
just before the wrapped function runs. Each rank also writes down its process id and, late in the
run, its memory and its open descriptors.

Not covered: faults in the middle of a kernel or of a system call.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import psutil
import torch

from switokd import worker
from switokd.coordination.client import Client
from switokd.coordination.protocol import RankProtocol
from switokd.coordination.stream import CoordinatorStream
from switokd.runs import checkpoints, weights_files
from switokd.runs.run_folder import RunFolder
from switokd.training import trainer
from switokd.training.evaluate import Evaluator
from switokd.training.exchange import Exchange
from switokd.training.learner import Learner
from tests.faults.actions import Flags, act
from tests.faults.plan import read_plan, take
from tests.preloaded import train_ranks

PLAN, START = "SWITOKD_TEST_PLAN", "SWITOKD_TEST_START"
"""Environment variables: folder of the plan; which start of the run this is, from 1."""

RESOURCES_STEP = 40
"""In this step each rank writes down its memory and its open descriptors."""

PHASES: dict[str, tuple[Any, str]] = {
    "starting": (worker, "train"),
    "loading": (trainer, "set_learning_rate"),
    "forward": (Learner, "forward_parts"),
    "exchange": (Exchange, "__call__"),
    "deciding": (Client, "decision"),
    "backward": (Learner, "backward_parts"),
    "update": (Learner, "update"),
    "saving": (trainer, "capture"),
    "settling": (Client, "settle"),
    "evaluating": (Evaluator, "test"),
    "leaving": (Client, "close"),
}
"""By phase: the function that is about to run, on every rank."""

PHASES_OF_RANK_0: dict[str, tuple[Any, str]] = {
    "recording": (RunFolder, "add_decision"),
    "writing": (checkpoints, "write_with_sum"),
    "removing": (checkpoints, "remove"),
    "weights": (weights_files, "write_with_sum"),
    "finishing": (RunFolder, "finish"),
}
"""Likewise, on rank 0 alone; `recording`, `writing` and `removing` on threads of their own."""


class Moments:
    """The faults of one process, and the step that it is in."""

    def __init__(self, plan: Path, start: int) -> None:
        self._folder, self._start = plan, start
        self._planned = read_plan(plan)
        self._step = 0
        self.flags = Flags()

    def moment(self, phase: str, arguments: tuple[Any, ...]) -> None:
        """Let a fault happen whose time has come."""
        rank = int(os.environ["RANK"])
        if phase == "starting":
            (self._folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
        if phase == "loading":  # (config, learner, step, steps per epoch)
            self._step = arguments[2]
            if self._step == RESOURCES_STEP:
                self._write_resources(rank)
        for path, fault in list(self._planned.items()):
            if (fault.phase, fault.rank) != (phase, rank) or fault.start > self._start:
                continue
            if fault.step <= self._step:
                del self._planned[path]
                if take(path):
                    act(fault, self.flags)

    def _write_resources(self, rank: int) -> None:
        me = psutil.Process()
        line = {"rank": rank, "rss": me.memory_info().rss, "descriptors": me.num_fds()}
        with (self._folder / "resources.jsonl").open("a") as file:
            file.write(json.dumps({**line, "start": self._start}) + "\n")


def faulty_ranks(world_size: int, arguments: tuple[str, ...]) -> None:
    """Fork the ranks of `switokd train ARGUMENTS`, in which the planned faults happen."""
    install()
    train_ranks(world_size, arguments)


def install() -> None:
    """Wrap the functions of all phases in this process and in those that it forks."""
    moments = Moments(Path(os.environ[PLAN]), int(os.environ[START]))
    for phase, (owner, name) in {**PHASES, **PHASES_OF_RANK_0}.items():
        replace(owner, name, _before(getattr(owner, name), phase, moments))
    _spoil(moments.flags)
    _double(moments.flags)


def _before(function: Callable[..., Any], phase: str, moments: Moments) -> Callable[..., Any]:
    @wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        moments.moment(phase, arguments)
        return function(*arguments, **named)

    return wrapped


def replace(owner: Any, name: str, new: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a function of a module or class; return the old one."""
    old: Callable[..., Any] = getattr(owner, name)
    setattr(owner, name, new)
    return old


def _spoil(flags: Flags) -> None:
    """Let images and gradients be NaN where the flags say so."""

    def spoiled_images(*arguments: Any, **named: Any) -> Iterator[Any]:
        for x, y in prefetch(*arguments, **named):
            is_spoilt, flags.spoil_images = flags.spoil_images, False
            yield (x * float("nan") if is_spoilt else x), y

    def spoiled_gradients(self: Learner, losses: Any, step: int, begins: Any) -> None:
        backward(self, losses, step, begins)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if flags.spoil_gradient and gradients:
            flags.spoil_gradient = False
            with torch.no_grad():
                gradients[0].fill_(float("nan"))

    prefetch = replace(worker, "prefetch", spoiled_images)
    backward = replace(Learner, "backward_parts", spoiled_gradients)


def _double(flags: Flags) -> None:
    """Let reports and decisions arrive twice while the flags say so."""

    def reported(self: RankProtocol, message: Any) -> Any:
        messages = report(self, message)
        return messages * 2 if time.monotonic() < flags.doubled_until else messages

    def handled(self: CoordinatorStream, response: Any, attempt: int) -> Any:
        if time.monotonic() < flags.doubled_until:
            handle(self, response, attempt)
        return handle(self, response, attempt)

    report = replace(RankProtocol, "report", reported)
    handle = replace(CoordinatorStream, "_handle", handled)
