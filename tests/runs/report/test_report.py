"""Reports on real runs: finished, going on, killed, of one process and of several.

Not covered: how the pictures look; `test_figures.py` checks what can be measured of that.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

import switokd
from switokd.errors import UsageError
from switokd.runs.folder_status import is_locked
from switokd.runs.report.files import write_report
from switokd.runs.report.record import read_runs
from tests.preloaded import call, forked, switokd_command, train_ranks
from tests.support import lines, wait_until

SHORT = {
    "data.train_samples": 640,
    "schedule.epochs": 2,
    "distillation.strategy": "threshold",
    "distillation.strategy_kwargs": {"delta": 0.25},
}
VOID = {"br", "meta", "wbr"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps in this process."""
    folder = tmp_path_factory.mktemp("finished") / "first"
    return switokd.train("digits-2t1s", {**SHORT, "run_dir": folder}).path


class Page(HTMLParser):
    """The elements of a page, and whether each that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def of(self, tag: str) -> Iterator[dict[str, str]]:
        return (attributes for name, attributes in self.elements if name == tag)


def page_of(*folders: Path, output: Path | None = None) -> Page:
    return Page(write_report(folders, output).read_text(encoding="utf-8"))


def test_the_page_has_the_numbers_of_the_run(finished: Path) -> None:
    page = page_of(finished)
    assert (finished / "report.html").exists()
    summary = json.loads((finished / "summary.json").read_text())
    for network in summary["networks"].values():
        assert f"{network['parameters']:,}" in page.text
        assert f"{network['top1_last']:.2f} %" in page.text
        assert f"{network['top1_best']:.2f} %" in page.text
    decisions = lines(finished / "decisions.jsonl")
    for teacher in ("teacher1", "teacher2"):
        modes = [d["mode"] == "expert" for d in decisions if d["teacher"] == teacher]
        switches = sum(a != b for a, b in pairwise(modes))
        share = sum(modes) / len(modes)
        assert share > 0
        sentence = f"{teacher} and student: {switches} switch"
        assert sentence in page.text
        assert f"expert mode in {100 * share:.0f} % of the steps" in page.text
        network = summary["networks"][teacher]
        assert network["steps_paused"] == sum(modes)
    assert "finished, 20 steps" in page.text
    saved = summary["saved_by_pauses"]["device_seconds"]
    assert f"{saved:.1f} s" in page.text
    assert "distillation.strategy_kwargs.delta" in page.text
    assert "finished at" in page.text


def test_the_page_needs_nothing_else_and_can_be_read_without_eyes(finished: Path) -> None:
    page = page_of(finished)
    kinds = {tag for tag, _ in page.elements}
    assert not kinds & {"script", "link", "img", "iframe", "object", "embed", "image"}
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            assert attributes.get(name, "#").startswith("#"), attributes
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"url\((?!#)|@import", text)
    (policy,) = (m["content"] for m in page.of("meta") if "content-security" in str(m).lower())
    assert policy.startswith("default-src 'none'")
    pictures = list(page.of("svg"))
    assert len(pictures) == 2
    for picture in pictures:
        assert picture["role"] == "img"
        assert "teacher1" in picture["aria-label"]
    assert {head["scope"] for head in page.of("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', text)
    assert {a or b for a, b in used} <= set(ids)
    assert "#111111" not in text.partition("</style>")[2], "a colour that a dark page cannot change"


def test_several_runs_stand_side_by_side(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "second"
    settings = {**SHORT, "run_dir": other, "seed": 7, "networks.student.optimizer.lr": 0.03}
    switokd.train("digits-1t1s", settings)
    page = page_of(finished, other, output=tmp_path / "both.html")
    assert len(list(page.of("svg"))) == 3  # one of each run, and the accuracies of both
    assert "first, second" in page.text
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    differing = text.partition("Settings that differ between the runs")[2].partition("</table>")[0]
    assert re.search(r"seed</code></th><td><code>0</code></td><td><code>7</code></td>", differing)
    assert "optimizer.<wbr>lr" in differing
    assert "strategy" not in differing
    (accuracy,) = (p["aria-label"] for p in page.of("svg") if "Test top-1" in p["aria-label"])
    assert {"first, teacher2", "second, teacher"} <= set(re.findall(r"\w+, \w+", accuracy))
    picture = write_report([finished, other], tmp_path / "both.svg")
    assert picture.read_bytes().startswith(b"<?xml")


def test_a_run_that_goes_on_is_killed_and_continues(tmp_path: Path) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in SHORT.items()]
    one = ["placement=replicated", "coordinator=off", "checkpoint.every_steps=4", "run_dir=out"]
    words = ("digits-1t1s", *settings, *one, "schedule.epochs=3")
    out = tmp_path / "out"
    decisions = out / "decisions.jsonl"
    with forked(train_ranks, 1, (*words, "schedule.epochs=200"), cwd=tmp_path, out=tmp_path / "o"):
        wait_until(
            lambda: decisions.exists() and decisions.read_bytes().count(b"\n") > 20, 60, "steps"
        )
        wait_until(lambda: list(out.glob("checkpoints/step-*[0-9]")), 60, "a checkpoint")
        page = page_of(out)
        assert re.search(r"training, step \d+ of 2,000", page.text)
        assert "More is known when a run has finished" in page.text
    wait_until(lambda: not is_locked(out), 20, "the end of the rank that was killed")
    page = page_of(out)
    assert re.search(r"not finished, stopped after step \d+ of 2,000", page.text)
    with decisions.open("a") as file:
        file.write('{"step": 99999, "teac')  # as a full disk leaves it
    assert read_runs([out])[0].last_step < 99999
    last = lines_but_torn(decisions)[-1]["step"]
    words = (*words, f"schedule.epochs={last // 10 + 1}", "resume=auto")
    code, said, errors = call(tmp_path, train_ranks, 1, words)
    assert code == 0, f"{said}\n{errors}"
    page = page_of(out)
    assert re.search(r"started again at .*, \d+ steps? lost and done again", page.text)
    assert re.search(r"restarts\s*1", page.text)


def lines_but_torn(path: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in path.read_text().splitlines()[:-1]]


def test_commands_of_operators_are_events_whatever_their_keys(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    commands: list[dict[str, object]] = [
        {"id": 1, "action": "delta_scale", "first_step": 7, "factor": 0.5, "new": [1, 2]},
        {"action": "hold <teacher1>"},
        {"action": "stop", "first_step": 8, "at": 1795000000.5, "asked_by": "run"},
        {},
    ]
    (folder / "commands.jsonl").write_text("".join(json.dumps(c) + "\n" for c in commands))
    page = page_of(folder)
    assert "7command: delta_scale (factor 0.5, new [1, 2])" in page.text
    assert "–command: hold <teacher1>" in page.text
    assert "8command: stop, by somebody with the run's secret at 2026-11-" in page.text
    assert "–command: unknown" in page.text


def test_the_command_writes_each_format(finished: Path, tmp_path: Path) -> None:
    for name, begin in (
        ("a.html", b"<!DOCTYPE html>"),
        ("a.PNG", b"\x89PNG"),
        ("a.svg", b"<?xml"),
        ("a.pdf", b"%PDF"),
    ):
        arguments = ("report", str(finished), "-o", name)
        code, out, err = call(tmp_path, switokd_command, *arguments)
        assert (code, out, err) == (0, f"{name}\n", "")
        assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("a.jpg", "allowed: FILE.html, FILE.png, FILE.svg, FILE.pdf"),
        ("none/a.html", "none/a.html: there is no folder none; make it"),
    ],
)
def test_a_file_that_cannot_be(finished: Path, output: str, problem: str) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)):
        write_report([finished], Path(output))


def test_all_mistakes_are_told(finished: Path, tmp_path: Path) -> None:
    words = [str(finished), "nowhere", "neither", "nowhere"]
    code, out, err = call(tmp_path, switokd_command, "report", *words)
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "switokd: nowhere: there is no such folder",
        "switokd: neither: there is no such folder",
        "switokd: --output: name the file of a report on several runs: --output FILE",
    ]


def test_mistakes_are_one_line_each(finished: Path, tmp_path: Path) -> None:
    for arguments, problem in (
        (["nothing"], "nothing: there is no such folder"),
        ([str(finished), str(finished), "-o", "a.html"], "is named twice"),
        ([str(tmp_path), "-o", "a.html"], "is no run folder"),
    ):
        code, out, err = call(tmp_path, switokd_command, "report", *arguments)
        assert code == 2
        assert not out
        assert err.startswith("switokd: ")
        assert problem in err
        assert err.count("\n") == 1
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("[]\n")
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 7 is damaged"):
        write_report([folder])


def test_runs_are_named_by_what_tells_their_folders_apart(finished: Path, tmp_path: Path) -> None:
    for folder in ("a/run", "b/run"):
        shutil.copytree(finished, tmp_path / folder)
    assert [run.label for run in read_runs([tmp_path / "a/run", tmp_path / "b/run"])] == [
        "a/run",
        "b/run",
    ]
