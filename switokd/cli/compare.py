"""The command `switokd compare`: a recipe with several strategies and seeds, and a table of it.

`main.py` registers `compare`.

Not covered: what is run (`trials.py`), how (`runner.py`), what comes out (`statistics.py`).
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

from switokd.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, SwitokdError
from switokd.runs.compare import table
from switokd.runs.compare.runner import (
    Failure,
    Running,
    clear_unfinished,
    last_lines,
    locked,
    run_trials,
)
from switokd.runs.compare.statistics import Comparison, TrialResult, read_summary
from switokd.runs.compare.trials import (
    Trial,
    TrialState,
    Variant,
    base_config,
    find,
    make_trials,
    parse_seeds,
    parse_strategies,
)
from switokd.runtime.lifecycle import Terminated, print_error, unwind_on_sigterm

USUAL_STRATEGIES, USUAL_SEEDS = "vanilla,dml,switokd", "3"

RECIPE_HELP = "A recipe's name (see 'switokd recipes') or a run file."
SETTINGS_HELP = "Settings on top of the file, the same for all; see 'switokd settings'."
STRATEGIES_HELP = (
    "Strategies, with commas; arguments as NAME:KEY=VALUE[:KEY=VALUE]. The run file's own "
    f"distillation.strategy and strategy_kwargs do not count. Default: {USUAL_STRATEGIES}."
)
SEEDS_HELP = f"3 for seeds 0, 1 and 2; or seeds, like 0,1,5. Default: {USUAL_SEEDS}."
OUT_HELP = "Folder of all runs and of the table. Default: runs/compare-NAME."
JOBS_HELP = "Runs at once. They share cores and GPUs, so their wall times say less."
REPORT_HELP = "Train nothing; table, csv and picture of the runs that are finished."


def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE_OR_FILE", help=RECIPE_HELP)],
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Argument(metavar="KEY.KEY=VALUE", help=SETTINGS_HELP),
    ] = None,
    strategies: Annotated[Optional[str], typer.Option(metavar="LIST", help=STRATEGIES_HELP)] = None,  # noqa: UP045
    seeds: Annotated[Optional[str], typer.Option(metavar="N", help=SEEDS_HELP)] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help=OUT_HELP)] = None,  # noqa: UP045
    jobs: Annotated[int, typer.Option(min=1, help=JOBS_HELP)] = 1,
    report_only: Annotated[bool, typer.Option("--report-only", help=REPORT_HELP)] = False,
) -> None:
    """Train a recipe with several strategies and seeds, and compare what comes out.

    Each run has a folder, FOLDER/STRATEGY-SEED. Finished ones are kept, so the
    same command goes on where an earlier one stopped; unfinished ones are
    trained again from the start. For example:

    switokd compare digits-2t1s --strategies vanilla,dml,switokd --seeds 3

    switokd compare digits-2t1s schedule.epochs=5 --seeds 0,1,5
    --strategies kd,threshold:delta=0.5,kdcl-general:held_out=256,mine:Own:rate=2

    Here mine:Own is the strategy Own of your module mine, called with rate=2;
    values are YAML, and commas and colons in a value need brackets or braces
    around them. kd takes trained teachers from the vanilla run of the same seed,
    which is then run as well, unless networks.TEACHER.weights names some.
    """
    settings = settings or []
    console = Console(highlight=False, soft_wrap=True)
    failed: Mapping[Path, Failure] = {}
    try:
        config = base_config(recipe, settings)
        out = out or Path("runs") / f"compare-{config.name}"
        found = find(out) if report_only else ([], [])
        wanted = parse_strategies(strategies or USUAL_STRATEGIES)
        numbers = parse_seeds(seeds or USUAL_SEEDS)
        if report_only:
            wanted = wanted if strategies else found[0]
            numbers = numbers if seeds else found[1]
        trials = make_trials(recipe, settings, wanted, numbers, out)
        notes = notes_on(trials)
        if not report_only:
            for note in notes:
                console.print(note, markup=False)
            with stoppable():
                failed = train_all(trials, jobs, out, console)
        options = ["--out", str(out), *(["--jobs", str(jobs)] if jobs > 1 else [])]
        notes.append(f"Made by `{command_for(recipe, settings, wanted, numbers, options)}`.")
        report(config.name, trials, failed, out, notes, console)
    except SwitokdError as error:
        print_error(str(error))
        raise typer.Exit(error.exit_code) from None
    except (KeyboardInterrupt, Terminated) as stopped:
        print_error("stopped; the same command goes on, with the runs that are not finished")
        is_ctrl_c = isinstance(stopped, KeyboardInterrupt)
        raise typer.Exit(EXIT_INTERRUPTED if is_ctrl_c else EXIT_TERMINATED) from None
    for failure in failed.values():
        raise typer.Exit(failure.exit_code)


def command_for(
    recipe: str,
    settings: Sequence[str],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    more: Sequence[str] = (),
) -> str:
    """The command that makes this comparison."""
    labels = ",".join(variant.label for variant in variants)
    numbers = ",".join(map(str, seeds)) + "," * (len(seeds) == 1)
    options = ["--strategies", labels, "--seeds", numbers, *more]
    return shlex.join(["switokd", "compare", recipe, *settings, *options])


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises Terminated inside."""
    before = signal.getsignal(signal.SIGTERM)
    unwind_on_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def notes_on(trials: Sequence[Trial]) -> list[str]:
    """What a reader of the table must know about teachers that come trained."""
    taught = list(dict.fromkeys(t.variant.label for t in trials if t.teachers_from))
    if not taught:
        return []
    names = ", ".join(taught)
    return [
        f"{names}: the teachers are those of the same seed's vanilla run, which is run for that; "
        "the time in which it trained them is not counted"
    ]


def train_all(
    trials: Sequence[Trial], jobs: int, out: Path, console: Console
) -> Mapping[Path, Failure]:
    """Run what is not finished; return those that failed, by folder."""
    with locked(out) as lock:
        states = {trial.folder: trial.state() for trial in trials}  # all, before any is touched
        for trial in clear_unfinished(trials):
            console.print(f"{trial.folder} was unfinished: removed, trained again", markup=False)
        to_do = [trial for trial in trials if states[trial.folder] is not TrialState.FINISHED]
        kept = len(trials) - len(to_do)
        if kept:
            console.print(f"{kept} of {len(trials)} runs finished before", markup=False)
        with Lines(len(to_do), console) as lines:
            return run_trials(to_do, jobs, out / "logs", lock, lines)


def report(
    name: str,
    trials: Sequence[Trial],
    failed: Mapping[Path, Failure],
    out: Path,
    notes: Sequence[str],
    console: Console,
) -> None:
    """Print and save what came out."""
    runs = []
    for trial in trials:
        failure = failed.get(trial.folder)
        done = failure is None and trial.state() is TrialState.FINISHED
        summary = read_summary(trial.folder) if done else None
        runs.append(
            TrialResult(trial.variant.label, trial.seed, summary, failure.reason if failure else "")
        )
    if failed and not any(run.summary for run in runs):
        for line in (f"{run.strategy}, seed {run.seed}: {run.failure}" for run in runs):
            print_error(line)
        return
    found = Comparison(name, tuple(runs))
    console.print(table.rich_table(found, console.width), soft_wrap=False)
    for line in [table.caption(found), *table.failures(found)]:
        console.print(line, markup=False)
    for what, path in zip(("table", "csv", "picture"), table.save(found, out, notes), strict=True):
        console.print(f"{what:<11} {path}", markup=False)


class Lines:
    """A line per run at its end; below them, in a terminal, those at work with their last words."""

    def __init__(self, total: int, console: Console) -> None:
        self.total, self.count, self.console = total, 0, console
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._tasks: dict[Path, TaskID] = {}

    def __enter__(self) -> Lines:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def started(self, trial: Trial) -> None:
        """See `Display`."""
        self._tasks[trial.folder] = self._live.add_task(trial.name, total=None, last="")
        if not self.console.is_terminal:
            self.console.print(f"{trial.name}: started", markup=False)

    def update(self, running: Sequence[Running]) -> None:
        """See `Display`."""
        if self.console.is_terminal:
            for each in running:
                last = (last_lines(each.log) or [""])[-1]
                self._live.update(self._tasks[each.trial.folder], last=last)

    def ended(self, trial: Trial, seconds: float, failure: Failure | None) -> None:
        """See `Display`."""
        self.count += 1
        if trial.folder in self._tasks:
            self._live.remove_task(self._tasks.pop(trial.folder))
        words = f"failed: {failure.reason}" if failure else _students(trial)
        where = f"[{self.count}/{self.total}] {trial.name}"
        self.console.print(f"{where}: {words}, {table.duration(seconds)}", markup=False)


def _students(trial: Trial) -> str:
    """A finished trial's students with their top-1."""
    networks = (read_summary(trial.folder) or {"networks": {}})["networks"]
    students = trial.config.topology.students
    return ", ".join(f"{n} {networks[n]['top1_last']:.2f} %" for n in students if n in networks)
