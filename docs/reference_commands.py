"""The page reference/commands.md: every command with its arguments and options, from the code.

mkdocs calls `on_page_markdown` for every page. Typer describes the commands, as `--help` does.

Not covered: the exit codes, which the page itself has (`tests/docs/test_reference.py` checks them).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from typer.cli import get_docs_for_click

from switokd.cli.main import app

PLACE = "<!-- commands -->"
"""Where the commands go in the page."""
EXAMPLE = re.compile(r"^(?:switokd|torchrun|SWITOKD_\w+=) ?.*$")
"""A line of a help text that shows a command."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page, with all commands in their place."""
    return markdown.replace(PLACE, "\n".join(commands())) if PLACE in markdown else markdown


def commands() -> Iterator[str]:
    """One section per command, as lines of Markdown."""
    group = typer.main.get_command(app)
    context = group.make_context("switokd", [], resilient_parsing=True)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        text = get_docs_for_click(obj=command, ctx=context, name=name, indent=2)
        yield from section(name, text)


def section(name: str, text: str) -> Iterator[str]:
    """Typer's text on a command as it suits the page: examples as code, without exit codes."""
    _, _, body = text.partition("\n")  # without its heading
    yield from ("", f"### switokd {name}")
    for line in body.splitlines():
        if EXAMPLE.match(line):
            yield from ("```console", line, "```")
        elif line.startswith(f"$ {name}"):
            yield line.replace("$ ", "$ switokd ", 1)
        elif not line.startswith("Exit codes:"):
            yield line
