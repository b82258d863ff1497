"""The closing table of a run, printed from its summary.

Not covered: the content of the summary (`recorder.py`), the picture (`curves.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from switokd.runtime.log import is_json


def print_table(console: Console, summary: dict[str, Any]) -> None:
    """Print the closing table, one row per network, and the costs of the run.

    summary: content of summary.json. Where messages are objects, a line per network replaces the
    table.
    """
    if is_json():
        for name, network in summary["networks"].items():
            last, best = network["top1_last"], network["top1_best"]
            console.print(f"{name}: top-1 last {last:.2f} %, best {best:.2f} %")
    else:
        console.print(_table(summary))
    for line in _describe(summary):
        console.print(line)


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['name']}: {summary['topology']}, {summary['strategy']}")
    table.add_column("network")
    table.add_column("role")
    has_ema = any(n.get("top1_ema_last") is not None for n in summary["networks"].values())
    ema_heading = ("EMA last",) if has_ema else ()
    for heading in ("parameters", "top-1 last", "top-1 best", *ema_heading, "paused"):
        table.add_column(heading, justify="right")
    for name, network in summary["networks"].items():
        emas = [network["top1_ema_last"]] if has_ema else []
        is_teacher = network["role"] == "teacher"
        table.add_row(
            name,
            network["role"],
            f"{network['parameters']:,}",
            f"{network['top1_last']:.2f} %",
            f"{network['top1_best']:.2f} %",
            *("-" if ema is None else f"{ema:.2f} %" for ema in emas),
            f"{network['steps_paused'] / network['steps']:.0%}" if is_teacher else "-",
        )
    return table


def describe_interruptions(summary: Mapping[str, Any]) -> str:
    """Return a sentence on restarts, what they cost, and the share of the time that counts."""
    restarts, steps = summary["restarts"], summary["steps_lost"]
    since, ratio = summary["seconds_since_first_start"], summary["effective_training_ratio"]
    if not restarts:
        return f"no restart; {ratio:.0%} of the {since:.1f} s since the start went into steps"
    return (
        f"{restarts} restart{'s' * (restarts > 1)}: {steps} step{'s' * (steps != 1)} lost and done "
        f"again, {summary['seconds_lost']:.1f} s lost; {ratio:.0%} of the {since:.1f} s since the "
        "first start went into steps that count"
    )


def _describe(summary: dict[str, Any]) -> Iterator[str]:
    """Sentences on what pauses saved, and on what waiting and interruptions cost."""
    saved, seconds = summary["saved_by_pauses"], summary["training_seconds"]
    if saved["device_seconds"]:
        line = (
            f"pauses saved {saved['device_seconds']:.1f} device-seconds of backward passes and "
            "optimizer steps"
        )
        if saved["wall_seconds"] is not None and saved["wall_seconds"] > 0:
            share = saved["wall_seconds"] / (seconds + saved["wall_seconds"])
            line += f", about {saved['wall_seconds']:.1f} s ({share:.0%}) of the training time"
        yield line
    steps = max(network["steps"] for network in summary["networks"].values())
    wait = summary["waiting"]["decision_mean_seconds"]
    if summary["waiting"]["decision_p99_seconds"]:
        yield (
            f"teachers waited for decisions {1000 * wait:.2f} ms per step on average, "
            f"{wait * steps / seconds:.1%} of the training time"
        )
    if alone := summary.get("steps_decided_alone"):
        yield (
            f"{alone} step{'s' * (alone > 1)} decided without the coordinator, as it would have "
            "decided"
        )
    if skipped := len(summary.get("skipped_steps", ())):
        yield f"{skipped} step{'s' * (skipped > 1)} skipped, for values that were not finite"
    yield describe_interruptions(summary)
