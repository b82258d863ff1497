"""The command `switokd plan`: predicts which placement of the networks trains fastest.

Not covered: how the prediction is made (`planning/cost_model.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from switokd.cli.arguments import RunFile, Settings, Verbose, fail, number_option
from switokd.errors import SwitokdError, UsageError

DEVICES_HELP = "Number of ranks, each on a device like the profiled one."
PROFILE_HELP = "Read the measurements from this file instead of measuring."
SAVE_HELP = "Write the measurements to this file."
PAUSED_HELP = (
    "Share of the steps in which a teacher is paused, 0 to 1: 0.5 for all teachers, or "
    "teacher1=0.5 for one; may be given several times. Default: the setting 'auto' of the run "
    "file, else 0.3. Always 0 if the strategy never pauses, and 1 for frozen teachers."
)
RUN_HELP = "Folder of an earlier run whose pauses are used."
JSON_HELP = "Print all placements as JSON, times in seconds, sizes in bytes."
TOP_HELP = "Number of placements in the table."


def plan(
    recipe: RunFile,
    devices: Annotated[int, number_option(1, help=DEVICES_HELP)],
    settings: Settings = None,
    profile: Annotated[Optional[Path], typer.Option(metavar="FILE", help=PROFILE_HELP)] = None,  # noqa: UP045
    save_profile: Annotated[Optional[Path], typer.Option(metavar="FILE", help=SAVE_HELP)] = None,  # noqa: UP045
    paused: Annotated[Optional[list[str]], typer.Option(metavar="SHARE", help=PAUSED_HELP)] = None,  # noqa: UP045
    run: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help=RUN_HELP)] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    top: Annotated[int, number_option(1, help=TOP_HELP)] = 10,
    verbose: Verbose = False,
) -> None:
    """Predict which placement of the networks trains fastest on a number of devices.

    For example:

    switokd plan cifar100-2t1s --devices 8 --save-profile h100.json

    switokd plan cifar100-2t1s --devices 16 --profile h100.json --paused 0.5

    Measures each network on the device of this machine. Prints the placements,
    fastest first, with the time of a step, images per second and memory per
    rank, and the command that trains with the placement it recommends. Trains
    nothing.
    """
    from switokd.cli import plan_report
    from switokd.cli.plan_inputs import data_facts, make_profile, pauses_for
    from switokd.config.run_file import load_importable
    from switokd.planning.cost_model import check_devices, rank_placements

    try:
        if profile and save_profile:
            raise UsageError(
                "--save-profile writes measurements, and with --profile nothing is measured; "
                "give one of them"
            )
        config = load_importable(recipe, settings or [])
        pauses = pauses_for(config, paused or [], run)
        data = data_facts(config)
        check_devices(config.topology, data.batch, devices)
        measured = make_profile(config, data, profile, save_profile, devices)
        ranked = rank_placements(
            measured,
            config.topology,
            data.batch,
            devices,
            pauses,
            config.compute.micro_batches,
        )
    except SwitokdError as error:
        fail(error)
    report = plan_report.PlacementReport(config, data.batch, measured, pauses, ranked)
    if as_json:
        print(json.dumps(plan_report.as_json(report), indent=2))
    else:
        plan_report.print_table(report, [recipe, *(settings or [])], top)
