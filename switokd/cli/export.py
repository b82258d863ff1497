"""The commands `switokd export` and `switokd predict`.

`main.py` registers both. Torch is imported only by what needs it: predicting with ONNX does not.

Not covered: what they do (`exporter.py`, `predict.py`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from switokd.errors import SwitokdError, UsageError

if TYPE_CHECKING:
    from switokd.export.artefact import Guess
    from switokd.export.manifest import Format, Manifest, WeightsChoice

RUN_HELP = "A finished run's folder."
SETTINGS_HELP = (
    "Settings on top of the run's, such as data.root=/elsewhere for data that has moved."
)
NETWORK_HELP = "Which network. Default: the run's only student."
FORMATS_HELP = "Of state-dict, onnx and torch-export, with commas between. Default: all three."
WEIGHTS_HELP = (
    "last, best (of the epoch with the best top-1), ema or initial, if the run kept those."
)
OUT_HELP = "Folder to make. Default: RUN_FOLDER/export/NETWORK."
MEAN_HELP = (
    "For a data set of your own that returns floats: the mean it takes from values in [0, 1], one "
    "number or one per channel with commas between; 0 if it takes none. Then the artefact can "
    "read pictures."
)
STD_HELP = "Likewise what it divides by; 1 if it does not."
ARTEFACT_HELP = "A folder that 'switokd export' made."
IMAGES_HELP = "Pictures of any size, or folders of them."
TOP_HELP = "How many classes to print of each picture."
FORMAT_HELP = "onnx, torch-export or state-dict. Default: the first of these that is there."
JSON_HELP = "Print a line of JSON per picture."


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help=RUN_HELP)],
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Argument(metavar="KEY.KEY=VALUE", help=SETTINGS_HELP),
    ] = None,
    network: Annotated[Optional[str], typer.Option(metavar="NAME", help=NETWORK_HELP)] = None,  # noqa: UP045
    formats: Annotated[str, typer.Option(metavar="LIST", help=FORMATS_HELP)] = (
        "state-dict,onnx,torch-export"
    ),
    weights: Annotated[
        str, typer.Option(metavar="last|best|ema|initial", help=WEIGHTS_HELP)
    ] = "last",
    out: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help=OUT_HELP)] = None,  # noqa: UP045
    mean: Annotated[Optional[str], typer.Option(metavar="NUMBERS", help=MEAN_HELP)] = None,  # noqa: UP045
    std: Annotated[Optional[str], typer.Option(metavar="NUMBERS", help=STD_HELP)] = None,  # noqa: UP045
) -> None:
    """Export a trained network, checked against the live one on images of the test set.

    The folder holds the network as a plain state dict, an ONNX program and a
    torch.export program, and artefact.json with labels, normalisation and what
    was checked. The two programs take float images from 0 to 1 and normalise
    them themselves. For example:

    switokd export runs/digits-2t1s-001 --network student

    switokd predict runs/digits-2t1s-001/export/student picture.png
    """
    try:
        if (mean is None) != (std is None):
            raise UsageError("--mean and --std belong together; give both")
        scaling = None if mean is None or std is None else (_numbers(mean), _numbers(std))
        from switokd.export.exporter import export as export_run
        from switokd.export.manifest import Manifest

        wanted = [name.strip() for name in formats.split(",")]
        chosen = cast("WeightsChoice", weights)
        folder = export_run(run, network, wanted, chosen, out, settings or [], scaling)
        manifest = Manifest.load(folder)
    except SwitokdError as error:
        _fail(error)
    _print_export(folder, manifest)


def predict(
    artefact: Annotated[Path, typer.Argument(metavar="ARTEFACT", help=ARTEFACT_HELP)],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER", help=IMAGES_HELP)],
    top: Annotated[int, typer.Option(min=1, help=TOP_HELP)] = 5,
    format: Annotated[Optional[str], typer.Option(metavar="FORMAT", help=FORMAT_HELP)] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Print the likeliest classes of pictures, by an exported network.

    PNG, JPEG and what else Pillow reads, of any size, greyscale or in colour:
    scaled and cropped as in the run's evaluation. A folder is searched, also
    below. What is no picture is one line on standard error, and the exit code 2.
    """
    from switokd.export.artefact import load_artefact
    from switokd.export.predict import predict_files

    bad: list[UsageError] = []

    def on_bad(error: UsageError) -> None:
        bad.append(error)
        print(f"switokd: {error}", file=sys.stderr)

    try:
        network = load_artefact(artefact, cast("Format | None", format))
        found = predict_files(network, images, top, on_bad)
        if as_json:
            for path, guesses in found:
                line = {"image": str(path), "top": [asdict(guess) for guess in guesses]}
                print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            _print_guesses(network.manifest, network.format, list(found))
    except SwitokdError as error:
        _fail(error)
    if bad:
        raise typer.Exit(UsageError.exit_code)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--mean, --std: found {text!r}; allowed: a number, or one per channel with commas "
            "between"
        ) from None


def _print_export(folder: Path, manifest: Manifest) -> None:
    console = Console(highlight=False, soft_wrap=True)
    top1 = "" if manifest.top1 is None else f", top-1 {manifest.top1:.2f} %"
    which = f"{manifest.network} of {manifest.run} ({manifest.model}, {manifest.weights} weights)"
    table = Table(title=escape(which + top1))
    table.add_column("format", no_wrap=True)
    table.add_column("file", no_wrap=True)
    for heading in ("size", "difference", "allowed", "same class"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, file in manifest.files.items():
        table.add_row(
            name,
            file.file,
            f"{(folder / file.file).stat().st_size / 1e6:.2f} MB",
            f"{file.max_difference:.1e}",
            f"{file.tolerance:.1e}",
            f"{file.same_class:.1%}",
        )
    console.print(table, soft_wrap=False)
    console.print(f"checked on  {manifest.checked_on}", markup=False)
    console.print(f"takes       {manifest.signature.takes}", markup=False)
    console.print(f"artefact    {folder}", markup=False)


def _print_guesses(
    manifest: Manifest, format: Format, found: list[tuple[Path, list[Guess]]]
) -> None:
    if not found:
        return
    table = Table(title=escape(f"{manifest.network} of {manifest.run}, {format}"))
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for path, guesses in found:
        for i, guess in enumerate(guesses):
            name = "" if i else escape(str(path))
            is_last = guess is guesses[-1]
            table.add_row(
                name, escape(guess.label), f"{guess.probability:.1%}", end_section=is_last
            )
    Console(highlight=False).print(table)


def _fail(error: SwitokdError) -> NoReturn:
    print(f"switokd: {error}", file=sys.stderr)
    raise typer.Exit(error.exit_code)
