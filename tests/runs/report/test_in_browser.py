"""The page in a real Chromium: it asks for nothing, and fits a narrow screen.

Not covered: how it looks; it was looked at, light and dark, on 400 and 1200 pixels.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from switokd.runs.report.files import write_report
from tests.runs.report.test_report import finished
from tests.support import require, run

__all__ = ["finished"]

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage"),
)


def shot(page: Path, width: int, height: int) -> tuple[Any, set[str]]:
    """A page as grey values `[height, width]`, and what the browser asked the network for."""
    chromium = require("chromium", "chromium")
    picture, log = page.with_suffix(".png"), page.with_suffix(".net.json")
    options = [f"--user-data-dir={page.with_suffix('.profile')}", f"--log-net-log={log}"]
    options += [f"--screenshot={picture}", f"--window-size={width},{height}"]
    code, _, err = run([chromium, *QUIET, *options, page.as_uri()], page.parent, 60)
    assert code == 0, err
    text = log.read_text(encoding="utf-8", errors="replace")
    assert page.name in text
    pixels = np.asarray(Image.open(picture).convert("L")).astype(int)
    # The browser's own requests have no page as their origin.
    requests = (line for line in text.splitlines() if '"initiator":"not an origin"' not in line)
    asked = (re.search(r'"initiator":.*"url":"([^"]*)"', line) for line in requests)
    return pixels, {found[1] for found in asked if found} - {page.as_uri()}


def test_the_page_loads_nothing_and_fits_a_narrow_screen(finished: Path, tmp_path: Path) -> None:
    pixels, urls = shot(write_report([finished], tmp_path / "page.html"), 400, 3000)
    assert pixels.shape == (3000, 400)
    assert (pixels[:, :10] == 255).all()
    assert (pixels[:, -10:] == 255).all(), "something is wider than the screen"
    assert (pixels < 100).mean() > 0.01, "an empty page"
    assert not urls


def test_a_page_that_loads_something_or_is_too_wide_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    wide = '<p style="width: 900px; background: black">.</p>'
    page.write_text(f'<img src="http://127.0.0.1:1/a.png">{wide}')
    pixels, urls = shot(page, 400, 300)
    assert urls == {"http://127.0.0.1:1/a.png"}
    assert not (pixels[:, -10:] == 255).all()
