"""The commands `switokd export` and `switokd predict`.

Torch is imported only where it is needed; predicting with ONNX works without torch.

Not covered: exporting itself (`export/exporter.py`); predicting itself (`export/predict.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from switokd.cli.arguments import Settings, Verbose, fail, number_option
from switokd.errors import SwitokdError, UsageError
from switokd.runtime.lifecycle import print_error

if TYPE_CHECKING:
    from switokd.export.artefact import Guess
    from switokd.export.manifest import Format, Manifest, WeightsChoice

RUN_HELP = "Folder of a finished run."
NETWORK_HELP = "Network to export. Default: the student, if the run has only one."
FORMATS_HELP = "Any of state-dict, onnx and torch-export, separated by commas."
WEIGHTS_HELP = (
    "Weights to export: last, best (epoch with the best top-1), ema or initial. The run must have "
    "saved them."
)
OUT_HELP = "Folder to create. Default: RUN_FOLDER/export/NETWORK."
MEAN_HELP = (
    "Only for a data set of your own that returns floats: the mean that it subtracts from values "
    "in [0, 1], as one number or one per channel, separated by commas; 0 if it subtracts none. "
    "With --mean and --std the artefact can read picture files."
)
STD_HELP = "As --mean: the standard deviation by which the data set divides; 1 if it does not."
ARTEFACT_HELP = "Folder that 'switokd export' created."
IMAGES_HELP = "Picture files of any size, or folders of pictures."
TOP_HELP = "Number of classes to print per picture."
FORMAT_HELP = "onnx, torch-export or state-dict. Default: the first of these that is available."
JSON_HELP = "Print one line of JSON per picture."


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help=RUN_HELP)],
    settings: Settings = None,
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
    verbose: Verbose = False,
) -> None:
    """Export a trained network to a folder, called an artefact.

    For example:

    switokd export runs/digits-2t1s-001 --network student

    switokd predict runs/digits-2t1s-001/export/student picture.png

    The artefact holds the network as a state dict, an ONNX program and a
    torch.export program, and artefact.json with labels, normalisation and
    checksums. Both programs take float images with values from 0 to 1 and normalise
    them. Each file is compared with the trained network on images of the test set;
    the command prints the differences. If the data set has moved, give
    data.root=FOLDER.
    """
    try:
        if (mean is None) != (std is None):
            raise UsageError("--mean and --std are only used together; give both")
        scaling = None if mean is None or std is None else (_numbers(mean), _numbers(std))
        from switokd.export.exporter import export as export_run
        from switokd.export.manifest import Manifest

        names = [name.strip() for name in formats.split(",")]
        choice = cast("WeightsChoice", weights)
        folder = export_run(run, network, names, choice, out, settings or [], scaling)
        manifest = Manifest.load(folder)
    except SwitokdError as error:
        fail(error)
    _print_export(folder, manifest)


def predict(
    artefact: Annotated[Path, typer.Argument(metavar="ARTEFACT", help=ARTEFACT_HELP)],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER", help=IMAGES_HELP)],
    top: Annotated[int, number_option(1, help=TOP_HELP)] = 5,
    format: Annotated[Optional[str], typer.Option(metavar="FORMAT", help=FORMAT_HELP)] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    verbose: Verbose = False,
) -> None:
    """Print the most likely classes of pictures, predicted by an exported network.

    For example:

    switokd predict runs/digits-2t1s-001/export/student picture.png folder/ --top 3

    Reads PNG, JPEG and every other format of Pillow, of any size, in greyscale or
    colour; pictures are scaled and cropped as in the evaluation of the run. Folders
    are searched with their subfolders. A file that is no picture gives a line on
    standard error and exit code 2; the other pictures are still predicted.
    """
    from switokd.export.artefact import load_artefact
    from switokd.export.predict import predict_files

    bad: list[UsageError] = []

    def on_bad(error: UsageError) -> None:
        bad.append(error)
        print_error(str(error))

    try:
        network = load_artefact(artefact, cast("Format | None", format))
        predictions = predict_files(network, images, top, on_bad)
        if as_json:
            for path, guesses in predictions:
                line = {"image": str(path), "top": [asdict(guess) for guess in guesses]}
                print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            _print_guesses(network.manifest, network.format, list(predictions))
    except SwitokdError as error:
        fail(error)
    if bad:
        raise typer.Exit(UsageError.exit_code)


def _numbers(text: str) -> tuple[float, ...]:
    """Parse numbers as in a run file; UsageError for anything else."""
    from switokd.config.yaml_loader import parse_number

    numbers = [parse_number(part) for part in text.split(",")]
    if None in numbers:
        raise UsageError(
            f"--mean, --std: got {text!r}; allowed: one number, or one per channel, separated by "
            "commas"
        )
    return tuple(number for number in numbers if number is not None)


def _print_export(folder: Path, manifest: Manifest) -> None:
    console = Console(highlight=False, soft_wrap=True)
    top1 = "" if manifest.top1 is None else f", top-1 {manifest.top1:.2f} %"
    title = f"{manifest.network} of {manifest.run} ({manifest.model}, {manifest.weights} weights)"
    table = Table(title=escape(title + top1))
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
    manifest: Manifest, format: Format, predictions: list[tuple[Path, list[Guess]]]
) -> None:
    if not predictions:
        return
    table = Table(title=escape(f"{manifest.network} of {manifest.run}, {format}"))
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for path, guesses in predictions:
        for i, guess in enumerate(guesses):
            name = "" if i else escape(str(path))
            is_last = guess is guesses[-1]
            table.add_row(
                name, escape(guess.label), f"{guess.probability:.1%}", end_section=is_last
            )
    Console(highlight=False).print(table)
