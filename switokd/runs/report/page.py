"""The report as one HTML page without scripts, which asks for nothing from anywhere else.

Not covered: the pictures (`figures.py`), the sentences (`events.py`), the look (`style.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from switokd.runs.report import differences, events
from switokd.runs.report.figures import accuracy_of, switching_of
from switokd.runs.report.record import PairRecord, RunRecord
from switokd.runs.report.style import CSS
from switokd.runs.report.svg import inline

UNKNOWN = '<span title="known when the run has finished">–</span>'


def page_of(runs: Sequence[RunRecord]) -> str:
    """Return the page on one or several runs."""
    names = ", ".join(run.label for run in runs)
    title = f"{names} · switokd report"
    parts = [
        f"<header><h1>{escape(names)}</h1>",
        *(f"<p>{_lead(run, len(runs) > 1)}</p>" for run in runs),
        "</header>",
        *_section("Networks", [_networks(runs)]),
        *_section("Gap, threshold and modes", _switching(runs)),
        *_section("Accuracy", _accuracy(runs)),
        *_section("Time and compute", _time(runs)),
        *_section("Events", _events(runs)),
        *_section("Configuration", _configuration(runs)),
        f"<footer>Made by switokd at {events.moment(time.time())}. "
        "The page is complete: it loads nothing.</footer>",
    ]
    body = "\n".join(parts)
    # The policy forbids every request, whatever the content.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main{' class=several' * (len(runs) > 1)}>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _lead(run: RunRecord, with_label: bool) -> str:
    config = run.config
    label = f"<strong>{escape(run.label)}</strong>: " if with_label else ""
    description = f"<br>{escape(config.description)}" if config.description else ""
    return (
        f"{label}{config.topology.name}, {escape(config.distillation.strategy)}, "
        f"{escape(config.data.dataset)}, seed {config.seed}; "
        f"<strong>{escape(events.progress(run))}</strong>{description}"
    )


def _section(title: str, content: Iterable[str]) -> list[str]:
    return [f"<section><h2>{title}</h2>", *content, "</section>"]


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> str:
    """Return a table; cells are HTML.

    numbers: columns from this one on are numbers, at the right edge.
    """

    def cell(tag: str, place: int, text: str, scope: str = "") -> str:
        kind = ' class="number"' if place >= numbers else ""
        return f"<{tag}{scope}{kind}>{text}</{tag}>"

    head = "".join(cell("th", i, text, ' scope="col"') for i, text in enumerate(heads))
    body = "\n".join(
        "<tr>"
        + cell("th", 0, row[0], ' scope="row"')
        + "".join(cell("td", i, text) for i, text in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption>{caption}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _networks(runs: Sequence[RunRecord]) -> str:
    several = len(runs) > 1
    heads = ["network", *(["run"] if several else []), "role", "model"]
    words = len(heads)
    heads += ["parameters", "top-1 last", "top-1 best", "best epoch"]
    has_ema = any(line.get("test_top1_ema") is not None for run in runs for line in run.metrics)
    heads += ["average last"] if has_ema else []
    heads += ["paused"]
    rows = []
    for run in runs:
        for name, network in run.config.networks.items():
            cells = [escape(name), *([escape(run.label)] if several else [])]
            cells += [network.role, escape(network.model), *_results(run, name, has_ema)]
            rows.append(cells)
    return _table("Networks and their test accuracy", heads, rows, words)


def _results(run: RunRecord, name: str, has_ema: bool) -> Iterator[str]:
    """Yield the numbers of a network as cells."""
    summary = run.summary["networks"][name] if run.summary else {}
    yield f"{summary['parameters']:,}" if summary else UNKNOWN
    lines = [line for line in run.metrics if line["network"] == name]
    tested = [line for line in lines if line["test_top1"] is not None]
    best = max(tested, key=lambda line: line["test_top1"], default=None)
    yield f"{tested[-1]['test_top1']:.2f} %" if tested else "–"
    yield f"{best['test_top1']:.2f} %" if best else "–"
    yield str(best["epoch"]) if best else "–"
    if has_ema:
        averages = [line["test_top1_ema"] for line in lines if line["test_top1_ema"] is not None]
        yield f"{averages[-1]:.2f} %" if averages else "–"
    teacher = next((t for t in run.teachers if t.name == name), None)
    if run.config.networks[name].role == "student" or teacher is None:
        yield "–"
    elif summary:
        yield events.share(summary["steps_paused"] / max(summary["steps"], 1))
    else:
        yield events.share(teacher.paused.mean())


def _switching(runs: Sequence[RunRecord]) -> Iterator[str]:
    yield (
        "<p>A teacher is in expert mode for a student, and pauses if it is for all of them, when "
        "the gap of their predictions exceeds the threshold and the teacher is the better one. "
        "Lines are means of neighbouring steps; the band is the gap’s range. The height of an area "
        "is a share of the steps.</p>"
    )
    yield '<div class="columns">'
    for number, run in enumerate(runs):
        heading = f"<h3>{escape(run.label)}</h3>" if len(runs) > 1 else ""
        if not run.pairs:
            yield f"<div>{heading}<p>No decision is recorded yet.</p></div>"
            continue
        sentences = [events.switching(pair) for pair in run.pairs]
        alternative = f"{run.label}. " + ". ".join(map(_described, run.pairs))
        picture = inline(switching_of(run), f"s{number}", alternative)
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
        yield f"<div>{heading}<figure>{picture}</figure><ul>{items}</ul></div>"
    yield "</div>"


def _described(pair: PairRecord) -> str:
    """Describe the lines of a pair for a reader who does not see them."""
    tenth = max(len(pair.steps) // 10, 1)

    def course(values: Any) -> str:
        return f"{np.mean(values[:tenth]):.2g} at first to {np.mean(values[-tenth:]):.2g} at last"

    return (
        f"{events.switching(pair)}. Over {len(pair.steps)} steps the gap goes from "
        f"{course(pair.gap)}, the threshold from {course(pair.delta)}"
    )


def _accuracy(runs: Sequence[RunRecord]) -> Iterator[str]:
    figure = accuracy_of(runs)
    if figure is None:
        yield "<p>No epoch was tested yet.</p>"
        return
    lasts = []
    for run in runs:
        for name in run.config.networks:
            lines = [line for line in run.metrics if line["network"] == name]
            tops = [line["test_top1"] for line in lines if line["test_top1"] is not None]
            if tops:
                lasts.append(
                    f"{run.label}, {name}: {tops[0]:.1f} % at first, {tops[-1]:.1f} % last"
                )
    alternative = "Test top-1 accuracy by step. " + ". ".join(lasts)
    yield f'<figure class="wide">{inline(figure, "a", alternative)}</figure>'
    heads = ["epoch", "step"]
    columns = [(run, name) for run in runs for name in run.config.networks]
    heads += [
        f"{escape(run.label)} {escape(n)}" if len(runs) > 1 else escape(n) for run, n in columns
    ]
    steps = sorted({(m["epoch"], m["step"]) for run in runs for m in run.metrics})
    found = {
        (run.label, m["network"], m["epoch"], m["step"]): m["test_top1"]
        for run in runs
        for m in run.metrics
        if m["test_top1"] is not None
    }
    rows = [
        [str(epoch), str(step)]
        + [
            f"{top1:.2f}" if (top1 := found.get((run.label, name, epoch, step))) is not None else ""
            for run, name in columns
        ]
        for epoch, step in steps
    ]
    yield "<details><summary>Accuracy by epoch, as a table</summary>"
    yield _table("Test top-1 accuracy in percent", heads, rows, 0) + "</details>"


def _time(runs: Sequence[RunRecord]) -> Iterator[str]:
    bars = [(run, parts) for run in runs if (parts := events.time_parts(run))]
    if bars:
        names = dict.fromkeys(part.name for _, parts in bars for part in parts)
        classes = {name: f"part{number}" for number, name in enumerate(PARTS) if name in names}
        legend = "".join(f'<li><i class="{kind}"></i>{name}</li>' for name, kind in classes.items())
        yield f'<ul class="legend">{legend}</ul>'
    for run, parts in bars:
        whole = sum(part.seconds for part in parts)
        words = ", ".join(f"{p.name} {events.seconds(p.seconds)}" for p in parts)
        pieces = "".join(
            f'<i class="{classes[part.name]}" style="flex-grow: {part.seconds / whole:.4f}"></i>'
            for part in parts
        )
        yield (
            f'<p class="caption">{escape(run.label)}: {words}</p>'
            if len(bars) > 1
            else (f'<p class="caption">{words}</p>')
        )
        yield f'<div class="bar" role="img" aria-label="{escape(words, quote=True)}">{pieces}</div>'
    costs = [events.costs(run) for run in runs]
    keys = dict.fromkeys(key for each in costs for key in each)
    heads = ["", *(escape(run.label) for run in runs)]
    rows = [[key, *(escape(each.get(key, "–")) for each in costs)] for key in keys]
    if rows:
        yield _table("Where the time went, and what pauses saved", heads, rows, len(heads))
    if any(run.summary is None for run in runs):
        yield "<p>More is known when a run has finished.</p>"


PARTS = (
    *("training steps", "waiting for decisions", "start, tests, checkpoints"),
    "lost by interruptions",
)


def _events(runs: Sequence[RunRecord]) -> Iterator[str]:
    several = len(runs) > 1
    rows = []
    for run in runs:
        for event in events.events(run):
            step = "–" if event.step is None else str(event.step)
            rows.append([step, *([escape(run.label)] if several else []), escape(event.text)])
    heads = ["after step", *(["run"] if several else []), "event"]
    yield _table("Starts, commands and what was out of the ordinary", heads, rows, len(heads))


def _configuration(runs: Sequence[RunRecord]) -> Iterator[str]:
    every = [differences.effective(run.config) for run in runs]
    different = differences.between([run.config for run in runs])
    changed = dict.fromkeys(key for run in runs for key in differences.changed(run.config))
    heads = ["setting", *(escape(run.label) for run in runs)]

    def rows(keys: Iterable[str]) -> list[list[str]]:
        return [
            [
                f"<code>{escape(key).replace('.', '.<wbr>')}</code>",
                *(f"<code>{_value(each[key])}</code>" if key in each else "–" for each in every),
            ]
            for key in keys
        ]

    if len(runs) > 1:
        yield _table("Settings that differ between the runs", heads, rows(different), len(heads))
    rest = [key for key in changed if key not in different]
    yield _table("Settings that are not the defaults", heads, rows(rest), len(heads))
    yield "<details><summary>All settings</summary>"
    keys = dict.fromkeys(key for each in every for key in each)
    yield _table("All settings", heads, rows(keys), len(heads)) + "</details>"


def _value(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
