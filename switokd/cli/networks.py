"""The command `switokd networks`: lists networks with their size and their use in the paper.

Torch is imported when the command runs, not before.

Not covered: how long a network takes (`switokd plan` measures that); how operations are counted
(`models/flops.py`).
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

from switokd.cli.arguments import fail, number_option
from switokd.errors import SwitokdError, UsageError
from switokd.runtime.lifecycle import print_error

DEFAULT_CLASSES = 100
DEFAULT_SIZE = 32
DEFAULT_CHANNELS = 3
"""Images for networks that the paper does not use: classes, side in pixels, channels."""

NAME_HELP = (
    "A network, as 'model' of a run file names it: wrn-16-2, resnet-20, mobilenetv2-0.5, "
    "resnet50 (of torchvision), timm:NAME, or package.module:callable. Default: all networks of "
    "the paper."
)
CLASSES_HELP = "Number of classes. Default: as in the paper, else 100."
SIZE_HELP = "Side of the images in pixels. Default: as in the paper, else 32."
CHANNELS_HELP = "Number of channels of the images."
KWARGS_HELP = "Arguments (model_kwargs) for every NAME, as YAML, such as '{hidden: 64}'."
JSON_HELP = "Print JSON: one object per network, with numbers that are not rounded."


@dataclass(frozen=True)
class NetworkCase:
    """A network, and the images for which it is measured."""

    name: str
    size: int
    classes: int
    uses: list[str] = field(default_factory=list, compare=False)
    """Data sets and roles for which the paper uses the network."""


def networks(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Argument(metavar="NAME", help=NAME_HELP),
    ] = None,
    classes: Annotated[Optional[int], number_option(1, help=CLASSES_HELP)] = None,  # noqa: UP045
    size: Annotated[Optional[int], number_option(1, help=SIZE_HELP)] = None,  # noqa: UP045
    channels: Annotated[int, number_option(1, help=CHANNELS_HELP)] = DEFAULT_CHANNELS,
    model_kwargs: Annotated[Optional[str], typer.Option(metavar="YAML", help=KWARGS_HELP)] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List networks with their number of parameters and multiply-adds.

    For example:

    switokd networks

    switokd networks --classes 10 --size 28 --channels 1

    switokd networks wrn-40-2 resnet50 mynets:build --size 64 --json

    Prints one row per network. Parameters are trainable values. Multiply-adds are
    those of convolutions and matrix products in the forward pass of one image; a
    training step takes about three times as many.
    """
    sys.path.append(os.getcwd())  # for the user's own networks, as in training
    try:
        kwargs = _kwargs(model_kwargs, names or [])
        cases = _cases(names or [], size, classes)
        rows = _measure(cases, channels, kwargs, all_must_fit=bool(names))
    except SwitokdError as error:
        fail(error)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)


def _kwargs(text: str | None, names: Sequence[str]) -> dict[str, Any]:
    """Parse the option --model-kwargs; UsageError if it is no mapping, or no NAME is given."""
    from switokd.config.yaml_loader import parse_yaml

    if text is None:
        return {}
    if not names:
        raise UsageError("--model-kwargs needs a NAME; name the network that it is for")
    try:
        kwargs = parse_yaml(text, "--model-kwargs")  # 1e-1 is a number, as in a run file
    except UsageError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise UsageError(
            f"--model-kwargs: {text!r} is no YAML mapping; write '{{key: value, ...}}'"
        )
    return kwargs


def _cases(names: Sequence[str], size: int | None, classes: int | None) -> list[NetworkCase]:
    """List the cases to measure, without repetition: networks of the paper, or `names`."""
    from switokd.models.paper import PAPER_NETWORKS

    cases: dict[NetworkCase, NetworkCase] = {}
    for used in PAPER_NETWORKS:
        case = NetworkCase(used.network, size or used.size, classes or used.classes)
        cases.setdefault(case, case).uses.append(f"{used.data} {used.uses}")
    if not names:
        return list(cases)
    named: list[NetworkCase] = []
    for name in dict.fromkeys(names):
        of_paper = [case for case in cases if case.name == name]
        named += of_paper or [NetworkCase(name, size or DEFAULT_SIZE, classes or DEFAULT_CLASSES)]
    return named


def _measure(
    cases: Sequence[NetworkCase], channels: int, kwargs: dict[str, Any], all_must_fit: bool
) -> list[dict[str, Any]]:
    """Return a JSON object per case.

    all_must_fit: raise UsageError for a network that cannot take the images; otherwise leave it
    out and say so on standard error.
    """
    from switokd.models.flops import size_of

    rows = []
    for case in cases:
        image = (channels, case.size, case.size)
        try:
            measured = size_of(case.name, image, case.classes, kwargs)
        except UsageError as error:
            if all_must_fit:
                raise
            print_error(f"left out: {error}")
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
    from switokd.models.families import KINDS

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
        console.print("paper: data set and table of Qian et al. (2022); T teacher, S student")
    console.print(f"names: {', '.join(KINDS)}", markup=False)
