"""What happened during a run, how far it is, and where its time went, in words.

Not covered: the numbers themselves (`runs/recorder.py`, `runs/attempts.py`, `runs/savings.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from switokd.coordination.command_file import parse_command
from switokd.runs.attempts import restarts_in
from switokd.runs.folder_status import planned_steps
from switokd.runs.report.record import PairRecord, RunRecord

WHO = {"operator": ", by an operator", "run": ", by somebody with the run's secret"}
"""Who has given a command, by `asked_by`."""
MOST_WARNINGS = 100
"""Different warnings of a run that a report shows."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    step: int | None
    """The step after which it happened, or whose it was; None if it is not known."""
    text: str


@dataclass(frozen=True)
class Part:
    """A part of the time since a run was started first."""

    name: str
    seconds: float


def progress(run: RunRecord) -> str:
    """Say how far a run is."""
    if run.state == "finished":
        return f"finished, {run.last_step:,} steps"
    schedule = run.config.schedule
    last = planned_steps(run.metrics, schedule.epochs, schedule.max_steps)
    of = f" of {last:,}" if last else ""
    if run.state == "training":
        return f"training, step {run.last_step:,}{of}"
    return f"not finished, stopped after step {run.last_step:,}{of}"


def events(run: RunRecord) -> list[Event]:
    """Return the events of a run, in the order of their steps."""
    found = [*_starts(run), *_exceptions(run.summary or {}), *_commands(run), *_warnings(run)]
    if run.set_aside:
        text = f"the record of {run.set_aside} start{'s' * (run.set_aside > 1)} was set aside: it "
        found.append(Event(0, text + "had no checkpoint that could be used"))
    return sorted(found, key=lambda event: -1 if event.step is None else event.step)


def _starts(run: RunRecord) -> Iterator[Event]:
    starts = 0
    for line in run.starts:
        if "finished" in line:
            yield Event(line.get("step"), f"finished at {moment(line['finished'])}")
        elif "started" in line:
            starts += 1
            lost = line.get("steps_lost", 0)
            again = f", {lost} step{'s' * (lost != 1)} lost and done again" if starts > 1 else ""
            word = "started again" if starts > 1 else "started"
            yield Event(line.get("after_step"), f"{word} at {moment(line['started'])}{again}")


def _exceptions(summary: Mapping[str, Any]) -> Iterator[Event]:
    """Steps that were skipped, or decided without the coordinator."""
    for skipped in summary.get("skipped_steps", ()):
        yield Event(skipped["step"], f"skipped by all networks: {skipped['reason']}")
    for first, last in summary.get("decided_alone", ()):
        steps = f"steps {first} to {last} were" if last > first else f"step {first} was"
        yield Event(first, f"{steps} decided without the coordinator, as it would have decided")


def _commands(run: RunRecord) -> Iterator[Event]:
    """Commands that the run has taken; those of another version are shown as they are."""
    known = ("id", "action", "first_step")
    for line in run.commands:
        step = line.get("first_step")
        try:
            stamped = parse_command(line, 0)
        except (ValueError, TypeError):
            details = ", ".join(f"{key} {value}" for key, value in line.items() if key not in known)
            text = f"{line.get('action', 'unknown')}{f' ({details})' if details else ''}"
        else:
            who = WHO.get(stamped.command.asked_by, "")
            at = f" at {moment(stamped.at)}" if stamped.at else ""
            text = f"{stamped.command.describe()}{who}{at}"
        yield Event(step if isinstance(step, int) else None, f"command: {text}")


def _warnings(run: RunRecord) -> Iterator[Event]:
    """Warnings, each text once, with how often it came and from which ranks but rank 0."""
    by_text: dict[str, list[Mapping[str, Any]]] = {}
    for line in run.warnings:
        by_text.setdefault(str(line.get("text", "")), []).append(line)
    for number, (text, lines) in enumerate(by_text.items()):
        if number == MOST_WARNINGS:
            yield Event(None, f"{len(by_text) - number} other warnings, see warnings.jsonl")
            return
        ranks = sorted({line["rank"] for line in lines if isinstance(line.get("rank"), int)})
        who = f" of rank {', '.join(map(str, ranks))}" if any(ranks) else ""
        often = f" ({len(lines)} times)" if len(lines) > 1 else ""
        step = lines[0].get("step")
        yield Event(step if isinstance(step, int) else None, f"warning{who}{often}: {text}")


def switching(pair: PairRecord) -> str:
    """Say how often a pair switched, and how often its teacher was too far ahead."""
    count = pair.switches
    return (
        f"{pair.name}: {count:,} switch{'es' * (count != 1)}; expert mode in "
        f"{share(pair.expert.mean())} of the steps; gap too large, but teacher not better, in "
        f"{share(pair.not_better.mean())}"
    )


def time_parts(run: RunRecord) -> list[Part]:
    """Return where the time since the first start went; empty until the run has finished."""
    summary = run.summary or {}
    whole = summary.get("seconds_since_first_start")
    if whole is None:
        return []
    training = summary["training_seconds"]
    waits = summary["waiting"]["decision_mean_seconds"] * run.last_step
    lost = summary["seconds_lost"]
    rest = max(whole - training - lost, 0.0)
    parts = [
        Part("training steps", max(training - waits, 0.0)),
        Part("waiting for decisions", waits),
        Part("start, tests, checkpoints", rest),
        Part("lost by interruptions", lost),
    ]
    return [part for part in parts if part.seconds > 0]


def costs(run: RunRecord) -> dict[str, str]:
    """Return what a run cost and what its pauses saved, by name; unknown values are left out."""
    summary = run.summary
    if summary is None:
        return dict(_costs_so_far(run))
    saved, waiting = summary["saved_by_pauses"], summary["waiting"]
    count = summary["world_size"]
    found = {
        "placement": f"{summary['placement']} ({count} process{'es' * (count > 1)})",
        "since the first start": seconds(summary.get("seconds_since_first_start")),
        "training": seconds(summary["training_seconds"]),
        "steps that count, share of the time": share(summary.get("effective_training_ratio")),
        "restarts": str(summary.get("restarts", 0)),
        "steps lost and done again": str(summary.get("steps_lost", 0)),
        "images per second": f"{summary['samples_per_second']:,.0f}",
        "wait for a decision, mean": f"{1000 * waiting['decision_mean_seconds']:.2f} ms",
        "wait for a decision, 99th percentile": f"{1000 * waiting['decision_p99_seconds']:.2f} ms",
        "waiting for other ranks, by rank": " · ".join(
            seconds(each) or "not measured" for each in waiting["exchange_seconds_by_rank"]
        ),
        "saved by pauses, device time": seconds(saved["device_seconds"]),
        "of the teachers' backward passes and updates": share(_saved_share(saved)),
        "saved by pauses, time": seconds(saved["wall_seconds"]),
        "PyTorch, Python": f"{summary['torch']}, {summary['python']}",
    }
    return {name: text for name, text in found.items() if text}


def _costs_so_far(run: RunRecord) -> Iterator[tuple[str, str]]:
    starts = [line for line in run.starts if "started" in line]
    if run.state == "training" and starts:
        yield "since the first start", seconds(max(time.time() - starts[0]["started"], 0))
    if starts:
        yield "restarts", str(restarts_in(run.starts))
        lost = sum(line.get("steps_lost", 0) for line in starts)
        yield "steps lost and done again", str(lost)
    student = run.config.topology.students[0]
    if rates := [m["samples_per_second"] for m in run.metrics if m["network"] == student]:
        yield "images per second", f"{sum(rates) / len(rates):,.0f}"


def _saved_share(saved: Mapping[str, Any]) -> float | None:
    done, spared = saved.get("teachers_device_seconds"), saved["device_seconds"]
    return spared / (spared + done) if done is not None and spared else None


def seconds(value: float | None) -> str:
    """Return a duration in words; empty for None."""
    if value is None:
        return ""
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def share(value: float | None) -> str:
    """Return a share as a percentage; empty for None."""
    return "" if value is None else f"{100 * value:.0f} %"


def moment(value: float) -> str:
    """Return a moment of `time.time` in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
