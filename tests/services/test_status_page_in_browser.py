"""The status page in a real Chromium, with a real training: it lives, and stays when all has gone.

Not covered: how it looks; it was looked at, light and dark, on 360 and 1200 pixels.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from switokd.v1 import coordinator_pb2 as pb
from tests.services.browser import Browser, browser
from tests.services.live import coordinator
from tests.services.page import LEARNS, PAUSES, TOKEN, Run
from tests.support import process, switokd_train, wait_until

MARKS = "[...document.querySelectorAll('#pairs svg')].map(s => s.querySelectorAll('.grid').length)"
"""How many values each chart of a gap names on its axis."""
RANKS = "[...document.querySelectorAll('#ranks tbody tr')].length"
SHOWN = "document.querySelector('#summary')?.innerText.includes({!r})"
LINES = "[...document.querySelectorAll('#pairs path.gap')].map(p => p.getAttribute('d').length)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def tab(chromium: Browser) -> Browser:
    chromium.call("Page.navigate", url="about:blank")
    chromium.wait("location.href === 'about:blank'")
    chromium.events.clear()
    chromium.prefer()
    return chromium


def steps(tab: Browser) -> int:
    found = re.search(r"step ([\d,]+)[, ]", tab.text("#summary"))
    return int(re.sub(r"\D", "", found[1])) if found else 0


@pytest.mark.timeout(280)
def test_a_real_training_from_its_first_steps_until_its_coordinator_is_gone(
    tab: Browser, tmp_path: Path
) -> None:
    """What a person sees who opens the address that the training prints."""
    settings = ["digits-2t1s", "schedule.max_steps=80", "run_dir=here"]
    with process(switokd_train(3, *settings), tmp_path, tmp_path / "out") as training:
        found = wait_until(
            lambda: re.search(r"status page (http://\S+/)", (tmp_path / "out").read_text()),
            150,
            "the address of the status page",
        )
        tab.open(found[1])
        run = tab.wait("document.querySelector('#runs a')?.href")
        tab.open(run)
        tab.wait(SHOWN.format("training"))
        tab.wait(f"{LINES}.length === 2 && {LINES}.every(n => n > 20)")
        assert tab.text("#connection") == "live"
        tab.wait(f"{RANKS} === 3")  # a rank's first heartbeat comes after a second
        tab.wait("/ of 80 .*, about \\d+ (s|min) left$/.test(summary.innerText)")
        seen = {(steps(tab), *tab.value(LINES))}
        while training.poll() is None:
            seen.add((steps(tab), *tab.value(LINES)))
            time.sleep(0.1)
        assert training.poll() == 0, (tmp_path / "out").read_text()
        assert len(seen) > 2, "charts and numbers stand still"
    tab.wait("document.querySelector('#connection').classList.contains('gone')")
    assert "You see what it sent last" in tab.text("#notice")
    assert tab.text("#summary").startswith("finished step")
    assert "left" not in tab.text("#summary")
    assert "–" not in tab.text("#facts"), "a fact that nobody knows is not shown"
    assert steps(tab) == 80
    assert "step 80 of 80 (100 %), epoch 4 of 4, ended" in tab.text("#summary")
    assert tab.value("document.querySelector('#progress').value") == 1
    assert tab.value(RANKS) == 3
    assert len(tab.value(LINES)) == 2
    assert min(tab.value(MARKS)) >= 3
    assert tab.text("#pairs").count("step\n") == 2
    assert tab.value("document.querySelectorAll('#teachers svg[role=img]').length") == 2
    assert "learning" in tab.text("#teachers") or "paused" in tab.text("#teachers")
    assert "the run has finished" in tab.text("#events")
    assert tab.value("document.querySelectorAll('#accuracy path.line').length") >= 3
    assert all("%" in cell for cell in tab.text("#networks tbody tr").split("\t")[2:4])
    origin = found[1]
    assert {url.startswith(origin) for url in tab.requests() if url != "about:blank"} == {True}
    # The browser itself logs that nobody answers any more.
    assert [p for p in tab.problems() if "ERR_" not in p] == []


def test_both_modes_words_of_ranks_as_text_keyboard_and_narrow_screen(
    tab: Browser, tmp_path: Path
) -> None:
    nasty = "<img src=x onerror=alert(1)></script>"
    with coordinator(tmp_path) as under_test:
        made = Run(under_test, f"run {nasty}")
        made.train(*[LEARNS] * 20, *[PAUSES] * 20, *[LEARNS] * 5)
        made.measure(0.5)
        tab.open(f"http://{under_test.http}/")
        tab.wait("document.querySelector('#runs a')")
        tab.value("document.querySelector('#runs a').click()")
        tab.wait(SHOWN.format("step 45"))
        tab.wait("document.querySelectorAll('#teachers path.r-gap_too_large').length")
        assert tab.text("h1") == f"run {nasty}"
        legend = tab.text("#reason-legend")
        assert "paused: the gap is too large" in legend
        assert "learning: the gap is within the threshold" in legend
        label = tab.value("document.querySelector('#teachers svg').getAttribute('aria-label')")
        assert "Timeline of t: learning: gap within threshold · paused in 44.4 %" in label
        assert "2 switches" in tab.text("#pairs .now")
        made.train(PAUSES)
        tab.wait(SHOWN.format("step 46"))
        assert "paused: gap too large" in tab.text("#teachers .now")

        linear = tab.value("document.querySelector('#pairs path.gap').getAttribute('d')")
        tab.value("document.querySelector('#logarithmic').click()")
        drawn = "document.querySelector('#pairs path.gap').getAttribute('d')"
        tab.wait(f"{drawn} !== {linear!r} && !{drawn}.includes('NaN')")

        tab.value("document.querySelector('#numbers summary').focus()")
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", code="Enter")
        tab.wait("document.querySelectorAll('#steps tbody tr').length === 46")
        assert tab.text("#steps tbody tr").split("\t")[:2] == ["46", "2.0000"]
        for wanted in ("header", "main", "nav[aria-label]", "h1", "section[aria-labelledby] h2"):
            assert tab.value(f"document.querySelectorAll('{wanted}').length"), wanted

        tab.open(tab.value("location.href"), 360, 700)
        tab.wait("document.querySelectorAll('#pairs path.gap').length")
        assert tab.value("document.documentElement.scrollWidth") == 360
        light = tab.value("getComputedStyle(document.body).backgroundColor")
        tab.prefer(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
        assert tab.value("getComputedStyle(document.body).backgroundColor") != light
        animations = "document.getAnimations().filter(a => a.playState === 'running').length"
        assert tab.value(animations) == 0

        made.end(f"out of memory {nasty}\u2028")
        tab.wait("!document.querySelector('#failure').hidden")
        assert "<img src=x onerror=alert(1)>" in tab.text("#failure")
        assert tab.value("document.querySelectorAll('img').length") == 0
        assert tab.problems() == []


def test_a_run_that_was_stopped_early_does_not_say_that_it_has_finished(
    tab: Browser, tmp_path: Path
) -> None:
    with coordinator(tmp_path) as under_test:
        made = Run(under_test)
        made.train(*[LEARNS] * 10)
        plan = pb.RunProgress(planned_steps=100)
        made.streams[0].send(progress=pb.Progress(step=10, network="t", run=plan))
        tab.open(f"http://{under_test.http}/runs/{made.run_id}")
        tab.wait(SHOWN.format("step 10 of 100 (10 %)"))
        made.end(stopped=True)
        tab.open(f"http://{under_test.http}/runs/{made.run_id}")
        tab.wait(SHOWN.format("step 10 of 100 (10 %), ended"))
        assert tab.text("#summary").startswith("stopped step")
        tab.wait("events.innerText.includes('the run was stopped before its last step')")
        assert tab.text("#ranks caption") == "What the ranks did last is not known"
        height = "document.querySelector('#ranks caption').getBoundingClientRect().height"
        assert tab.value(height) < 40, "one line, although the table is empty"


def test_ranks_that_leave_one_by_one_all_stay_on_the_page(tab: Browser, tmp_path: Path) -> None:
    with coordinator(tmp_path) as under_test:
        made = Run(under_test)
        made.train(*[LEARNS] * 3)
        for stream in made.streams:
            stream.send(heartbeat=pb.Heartbeat(phase=pb.PHASE_FORWARD, step=3))
        tab.open(f"http://{under_test.http}/runs/{made.run_id}")
        tab.wait(f"{RANKS} === 2")
        made.streams[0].send(leave=pb.Leave())
        made.streams[0].end()
        tab.wait(f"{RANKS} === 1")
        made.streams[1].send(leave=pb.Leave())
        made.streams[1].end()
        tab.wait(SHOWN.format("finished"))
        tab.wait(f"{RANKS} === 2")
        made.close()


def test_a_token_is_asked_for_and_is_never_in_an_address(tab: Browser, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    with coordinator(tmp_path, "--metrics-token-file", "token") as under_test:
        made = Run(under_test)
        made.train(LEARNS)
        tab.open(f"http://{under_test.http}/runs/{made.run_id}")
        tab.wait("!document.querySelector('#token-form').hidden")
        assert tab.value("document.activeElement.id") == "token"
        for wrong in (True, False):
            tab.call("Input.insertText", text="wrong" if wrong else TOKEN)
            for kind in ("keyDown", "keyUp"):
                tab.call("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", code="Enter")
            if wrong:
                tab.wait("document.querySelector('#token-wrong').innerText.includes('not one')")
        tab.wait(SHOWN.format("step 1"))
        assert tab.value("document.querySelector('#token').value") == ""
        tab.open(f"http://{under_test.http}/")  # the tab keeps it
        tab.wait("document.querySelector('#runs a')")
        assert not [url for url in tab.requests() if TOKEN in url or "wrong" in url]
        assert tab.value("document.cookie") == ""
        made.close()


def test_the_page_waits_for_a_coordinator_that_comes_back(tab: Browser, tmp_path: Path) -> None:
    with coordinator(tmp_path, journal=True, may_end=True) as under_test:
        made = Run(under_test)
        made.train(LEARNS, PAUSES)
        port = under_test.http.rpartition(":")[2]
        tab.open(f"http://{under_test.http}/runs/{made.run_id}")
        tab.wait(SHOWN.format("step 2"))
        os.kill(under_test.pid, signal.SIGTERM)
        tab.wait("document.querySelector('#connection').innerText === 'coordinator gone'")
        assert steps(tab) == 2
        made.close()
    with coordinator(tmp_path, "--http-port", port, journal=True):
        tab.wait("document.querySelector('#connection').innerText === 'live'")
        tab.wait("document.querySelector('#events').innerText.includes('new coordinator')")
        assert tab.text("#notice") == ""
