"""The command `switokd networks`: networks by name, how large they are, and who used them.

`main.py` registers `networks`. Torch is imported when it runs, not before.

Not covered: how long a network takes (`switokd plan` measures that); how it is counted
(`models/arithmetic.py`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Optional

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from switokd.config.yaml_loader import parse_yaml
from switokd.errors import SwitokdError, UsageError

DEFAULT_CLASSES = 100
DEFAULT_SIZE = 32
DEFAULT_CHANNELS = 3
"""For networks that the paper does not use."""

NAME_HELP = (
    "A network as in a run file's 'model': wrn-16-2, resnet-20, mobilenetv2-0.5, torchvision's "
    "resnet50, timm:NAME, or package.module:callable. Default: all networks of the paper."
)
CLASSES_HELP = "Classes to tell apart. Default: the paper's for its networks, else 100."
SIZE_HELP = "Side of the images in pixels. Default: the paper's for its networks, else 32."
CHANNELS_HELP = "Channels of the images."
KWARGS_HELP = "The run file's model_kwargs in YAML, such as '{hidden: 64}', for each NAME."
JSON_HELP = "Print JSON: an object for each network, numbers not rounded."


@dataclass(frozen=True)
class Case:
    """A network and the images that it is for."""

    name: str
    size: int
    classes: int
    uses: list[str] = field(default_factory=list, compare=False)
    """Where the paper uses it."""


def networks(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Argument(metavar="NAME", help=NAME_HELP),
    ] = None,
    classes: Annotated[Optional[int], typer.Option(min=1, help=CLASSES_HELP)] = None,  # noqa: UP045
    size: Annotated[Optional[int], typer.Option(min=1, help=SIZE_HELP)] = None,  # noqa: UP045
    channels: Annotated[int, typer.Option(min=1, help=CHANNELS_HELP)] = DEFAULT_CHANNELS,
    model_kwargs: Annotated[Optional[str], typer.Option(metavar="YAML", help=KWARGS_HELP)] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List networks with their parameters and the arithmetic of a forward pass.

    Parameters are trainable values. Multiply-adds are those of one image's
    forward pass, convolutions and matrix products; a training step takes about
    three times as many. For example:

    switokd networks

    switokd networks --classes 10 --size 28 --channels 1

    switokd networks wrn-40-2 resnet50 mynets:build --size 64 --json
    """
    sys.path.append(os.getcwd())  # your own networks, as in training
    try:
        kwargs = _kwargs(model_kwargs, names or [])
        cases = _cases(names or [], size, classes)
        rows = _measure(cases, channels, kwargs, all_must_fit=bool(names))
    except SwitokdError as error:
        print(f"switokd: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)


def _kwargs(text: str | None, names: Sequence[str]) -> dict[str, Any]:
    """The option --model-kwargs; UsageError if it is no mapping, or for no NAME."""
    if text is None:
        return {}
    if not names:
        raise UsageError("--model-kwargs is for the networks that are named; name one")
    try:
        found = parse_yaml(text, "--model-kwargs")  # 1e-1 is a number, as in a run file
    except UsageError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f"--model-kwargs: {text!r} is no YAML mapping; write '{{key: value, ...}}'"
        )
    return found


def _cases(names: Sequence[str], size: int | None, classes: int | None) -> list[Case]:
    """What to measure, each once: the paper's networks, or those of `names`."""
    from switokd.models.paper import PAPER_NETWORKS

    cases: dict[Case, Case] = {}
    for used in PAPER_NETWORKS:
        case = Case(used.network, size or used.size, classes or used.classes)
        cases.setdefault(case, case).uses.append(f"{used.data} {used.uses}")
    if not names:
        return list(cases)
    found: list[Case] = []
    for name in dict.fromkeys(names):
        own = [case for case in cases if case.name == name]
        found += own or [Case(name, size or DEFAULT_SIZE, classes or DEFAULT_CLASSES)]
    return found


def _measure(
    cases: Sequence[Case], channels: int, kwargs: dict[str, Any], all_must_fit: bool
) -> list[dict[str, Any]]:
    """A JSON object for each case; a line about those that do not fit, unless that is an error."""
    from switokd.models.flops import size_of

    rows = []
    for case in cases:
        image = (channels, case.size, case.size)
        try:
            measured = size_of(case.name, image, case.classes, kwargs)
        except UsageError as error:
            if all_must_fit:
                raise
            print(f"switokd: left out: {error}", file=sys.stderr)
            continue
        rows.append(
            {
                "network": case.name,
                "channels": channels,
                "size": case.size,
                "classes": case.classes,
                "parameters": measured.parameters,
                "multiply_adds": measured.multiply_adds,
                "paper": case.uses,
            }
        )
    return rows


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from switokd.models.registry import FAMILIES

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("network", no_wrap=True)
    for heading in ("images, classes", "parameters", "multiply-adds"):
        table.add_column(heading, justify="right", no_wrap=True)
    has_uses = any(row["paper"] for row in rows)
    if has_uses:
        table.add_column("paper")
    for row in rows:
        cells = [
            row["network"],
            f"{row['channels']}x{row['size']}x{row['size']}, {row['classes']:4}",
            f"{row['parameters']:,}",
            f"{row['multiply_adds'] / 1e6:,.1f} M",
        ]
        table.add_row(*cells, *(["\n".join(row["paper"])] if has_uses else []))
    console.print(table, soft_wrap=False)
    if has_uses:
        console.print("paper: data and table of Qian et al. (2022), T teacher, S student")
    console.print(f"names: {', '.join(FAMILIES)}", markup=False)
