"""A figure as SVG inside an HTML page, in the colours of the page.

Not covered: figures as files of their own (`files.py`).
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

from switokd.runs.report.figures import GAP, GREY, GRID, INK, NOT_BETTER, PAUSED, THRESHOLD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES = {
    INK: "--ink",
    GREY: "--hatch",
    GRID: "--grid",
    GAP: "--gap",
    THRESHOLD: "--threshold",
    PAUSED: "--paused",
    NOT_BETTER: "--not-better",
    "#2e7d4f": "--green",
    "#8e5ea2": "--violet",
    "#b8860b": "--ochre",
    "#4d4d4d": "--stone",
}
"""Colours of the figures, and the page's variables in their place: a dark page has others."""


def inline(figure: Figure, name: str, alternative: str) -> str:
    """Return a figure as an SVG element that scales with the page.

    name: makes its ids unique in the page. alternative: describes the picture for a reader who
    does not see it.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "switokd"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    for colour, variable in VARIABLES.items():
        # As attributes, colours of hatches do not take variables.
        text = re.sub(f'(fill|stroke)="{colour}"', rf'style="\1: {colour}"', text)
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", text)
    text = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", text)
    label = escape(alternative, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
