"""The command `switokd compare`: trains a recipe with several strategies and seeds.

Not covered: what the command does (`cli/compare_runs.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from switokd.cli.arguments import RunFile, Settings, Verbose, fail, number_option
from switokd.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, SwitokdError
from switokd.runtime.lifecycle import Terminated, print_error

DEFAULT_STRATEGIES, DEFAULT_SEEDS = "vanilla,dml,switokd", "3"

STRATEGIES_HELP = (
    "Strategies, separated by commas; arguments as NAME:KEY=VALUE[:KEY=VALUE]. They replace "
    f"distillation.strategy and strategy_kwargs of the run file. Default: {DEFAULT_STRATEGIES}."
)
SEEDS_HELP = (
    f"A number of seeds (3: seeds 0, 1 and 2), or the seeds, like 0,1,5. Default: {DEFAULT_SEEDS}."
)
OUT_HELP = "Folder for all runs and the table. Default: runs/compare-NAME."
JOBS_HELP = "Runs that train at the same time. They share cores and GPUs, so times are longer."
REPORT_HELP = "Train nothing; make table, CSV and picture from the runs that are finished."


def compare(
    recipe: RunFile,
    settings: Settings = None,
    strategies: Annotated[Optional[str], typer.Option(metavar="LIST", help=STRATEGIES_HELP)] = None,  # noqa: UP045
    seeds: Annotated[Optional[str], typer.Option(metavar="N", help=SEEDS_HELP)] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help=OUT_HELP)] = None,  # noqa: UP045
    jobs: Annotated[int, number_option(1, help=JOBS_HELP)] = 1,
    report_only: Annotated[bool, typer.Option("--report-only", help=REPORT_HELP)] = False,
    verbose: Verbose = False,
) -> None:
    """Train a recipe with several strategies and seeds, and compare the results.

    For example:

    switokd compare digits-2t1s --strategies vanilla,dml,switokd --seeds 3

    switokd compare digits-2t1s schedule.epochs=5 --seeds 0,1,5
    --strategies kd,threshold:delta=0.5,kdcl-general:held_out=256,mine:Own:rate=2

    Prints a table of accuracies and times, and writes it with a CSV file and a
    picture into FOLDER. Each run has the folder FOLDER/STRATEGY-SEED. The same
    command resumes a comparison that was stopped: finished runs are kept,
    unfinished ones are trained again from the start.

    mine:Own is the strategy Own of your module mine, called with rate=2. Values
    are YAML; put brackets or braces around a value with commas or colons. The
    strategy kd takes its teachers from the vanilla run of the same seed, which is
    then trained as well, unless networks.TEACHER.weights names trained weights.
    """
    from switokd.cli.compare_runs import compare_strategies

    if not report_only:  # an empty list is a mistake, not a wish for the default
        strategies = DEFAULT_STRATEGIES if strategies is None else strategies
        seeds = DEFAULT_SEEDS if seeds is None else seeds
    try:
        exit_code = compare_strategies(
            recipe,
            settings or [],
            strategies=strategies,
            seeds=seeds,
            out=out,
            jobs=jobs,
            trains=not report_only,
        )
    except SwitokdError as error:
        fail(error)
    except (KeyboardInterrupt, Terminated) as stopped:
        print_error("stopped; run the same command again to resume with the unfinished runs")
        is_ctrl_c = isinstance(stopped, KeyboardInterrupt)
        raise typer.Exit(EXIT_INTERRUPTED if is_ctrl_c else EXIT_TERMINATED) from None
    raise typer.Exit(exit_code)
