"""Tables and lines of the commands `runs`, `status` and `watch`.

Not covered: the documents that they show (`services/coordinator/run_view.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from switokd.services.coordinator.run_view import View

MOST_RANKS = 20
"""Ranks that are shown; those that are waited for, or are behind, come first."""


def runs_table(runs: Sequence[View]) -> Table:
    """Return one row per run."""
    table = _table(("run", "state"), ("step", "ranks", "networks", "started", "for"))
    table.add_column("", overflow="fold")
    for run in runs:
        table.add_row(
            Text(run["run_id"]),
            _state(run["state"]),
            f"{run['last_step']:,}",
            f"{run['connected_ranks']}/{run['ranks']}",
            _topology(run["networks"]),
            _moment(run["started_at"]),
            _duration(run["started_at"], run["ended_at"]),
            Text(run["failure"] or ""),
        )
    return table


def status_group(view: View) -> Group:
    """Return what a terminal shows of one run."""
    parts: list[RenderableType] = [_heading(view)]
    if view["pairs"]:
        parts.append(_pairs_table(view["pairs"]))
    if view["networks"]:
        parts.append(_networks_table(view["networks"]))
    if view["ranks"]:
        parts.append(_ranks_table(view["ranks"]))
        if (hidden := len(view["ranks"]) - MOST_RANKS) > 0:
            parts.append(Text(f"and {hidden} ranks more"))
    if view["commands"]:
        parts.append(_commands_table(view["commands"]))
        if view["commands_truncated"]:
            parts.append(Text("and earlier commands (commands.jsonl in the run folder)"))
    parts += [Text(sentence, style="yellow") for sentence in view["waiting_for"]]
    if view["failure"]:
        parts.append(Text(f"failed: {view['failure']}", style="red"))
    return Group(*parts)


def status_line(view: View) -> str:
    """Return one line about a run, for an output that is no terminal."""
    parts = [
        f"{time.strftime('%H:%M:%S')} {view['run_id']} {view['state']} step {view['last_step']}"
    ]
    parts += [
        f"{pair['teacher']}-{pair['student']} gap {pair['gap']:.4f} threshold "
        f"{pair['threshold']:.4f} {pair['mode']}, expert {_percent(pair['expert_ratio'])}"
        for pair in view["pairs"]
    ]
    parts += view["waiting_for"]
    if view["failure"]:
        parts.append(view["failure"])
    return "; ".join(parts)


def console() -> Console:
    """Return the console of these commands: a pipe gets lines that are not broken."""
    made = Console(highlight=False)
    if not made.is_terminal:
        made = Console(highlight=False, width=200)
    return made


def _heading(view: View) -> Text:
    ranks = max(len(view["ranks"]), len(view["connected_ranks"]))
    parts = [f"step {view['last_step']:,}{_planned(view)}"]
    if view["training_epoch"]:
        planned = view["planned_epochs"]
        parts.append(f"epoch {view['training_epoch']}{f' of {planned}' if planned else ''}")
    if view["strategy"]:
        parts.append(view["strategy"])
    if ranks:
        parts.append(f"{len(view['connected_ranks'])} ranks connected")
    if view["epoch"] and view["epoch"] > 1:
        parts.append(f"start {view['epoch']}")
    if view["decided_alone_steps"]:
        parts.append(f"{view['decided_alone_steps']} steps decided alone")
    if view["started_at"]:
        parts.append(f"started {_moment(view['started_at'])}")
        if view["ended_at"] or view["state"] in ("joining", "training"):
            parts.append(f"for {_duration(view['started_at'], view['ended_at'])}")
    where = view["coordinator"] or view["folder"]
    return Text.assemble(
        (view["run_id"] or "run", "bold"),
        " ",
        _state(view["state"]),
        f"  {', '.join(parts)}  {where}",
    )


def _planned(view: View) -> str:
    """Return " of 600 (20 %)" after a step, if it is known how many there will be."""
    planned = view["planned_steps"]
    return f" of {planned:,} ({100 * view['last_step'] // planned} %)" if planned else ""


def _pairs_table(pairs: Sequence[View]) -> Table:
    numbers = ("gap", "threshold", "margin", "mode", "expert", "switches")
    table = _table(("teacher", "student"), numbers)
    for pair in pairs:
        mode = f"{pair['mode']} (held)" if pair["held"] else pair["mode"]
        scale = "" if pair["threshold_scale"] == 1.0 else f" (x{pair['threshold_scale']:g})"
        table.add_row(
            Text(pair["teacher"]),
            Text(pair["student"]),
            f"{pair['gap']:.4f}",
            f"{pair['threshold']:.4f}{scale}",
            f"{pair['margin']:+.4f}",
            Text(mode, style="yellow" if pair["mode"] == "expert" else ""),
            _percent(pair["expert_ratio"]),
            "-" if pair["switches"] is None else f"{pair['switches']:,}",
        )
    return table


def _networks_table(networks: Sequence[View]) -> Table:
    table = _table(("network", "role"), ("now", "paused", "loss", "top-1", "test top-1"))
    for network in networks:
        is_paused = network["is_paused"]
        now = "-" if is_paused is None else "paused" if is_paused else "learning"
        loss = network["loss"]
        table.add_row(
            Text(network["name"]),
            network["role"],
            Text(now, style="yellow" if is_paused else ""),
            _percent(network["paused_ratio"]),
            "-" if loss is None else f"{loss:.4f}",
            _percent(network["accuracy"], 2),
            _percent(network["test_accuracy"], 2),
        )
    return table


def _ranks_table(ranks: Sequence[View]) -> Table:
    headings = ("phase", "for", "step", "lag", "heard of")
    table = _table(("rank", "networks"), headings)
    shown = sorted(ranks, key=lambda r: (not r["is_waited_for"], -r["lag_steps"], r["rank"]))
    for rank in sorted(shown[:MOST_RANKS], key=lambda r: r["rank"]):
        table.add_row(
            str(rank["rank"]),
            Text(", ".join(rank["networks"])),
            rank["phase"],
            f"{rank['phase_seconds']:.1f} s",
            f"{rank['step']:,}",
            f"{rank['lag_steps']:,}",
            f"{rank['heartbeat_age_seconds']:.1f} s ago",
            style="yellow" if rank["is_waited_for"] else "",
        )
    return table


def _commands_table(commands: Sequence[View]) -> Table:
    table = _table(("command", "action", "arguments"), ("from step",))
    table.add_column("")
    for command in commands:
        arguments = ", ".join(
            f"{name}={'all' if value is None else value}"
            for name, value in command["arguments"].items()
        )
        table.add_row(
            Text(command["command_id"]),
            command["action"],
            Text(arguments),
            "-" if command["first_step"] is None else f"{command['first_step']:,}",
            Text(command["failure"] or ""),
        )
    return table


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for heading in words:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _state(state: str) -> Text:
    stopped = ("interrupted", "stopped")
    colours = {"training": "green", "failed": "red", **dict.fromkeys(stopped, "yellow")}
    return Text(state, style=colours.get(state, ""))


def _topology(networks: Sequence[View]) -> str:
    teachers = sum(network["role"] == "teacher" for network in networks)
    return f"{teachers}T{len(networks) - teachers}S"


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def _moment(seconds: float | None) -> str:
    if not seconds:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _duration(started: float | None, ended: float | None) -> str:
    if not started:
        return "-"
    seconds = max((ended or time.time()) - started, 0.0)
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
