"""What `switokd compare` does: trains the runs of a comparison, then prints and saves the table.

Not covered: the options (`cli/compare.py`); starting a run (`runs/compare/runner.py`); the table
(`runs/compare/table.py`).
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

from switokd.errors import Mistakes
from switokd.runs.compare import files, table
from switokd.runs.compare.runner import (
    Failure,
    RunningTrial,
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
    find_finished,
    make_strategies,
    make_trials,
    parse_seeds,
    parse_strategies,
)
from switokd.runtime.lifecycle import print_error, unwind_on_sigterm


def compare_strategies(
    recipe: str,
    settings: Sequence[str],
    strategies: str | None,
    seeds: str | None,
    out: Path | None,
    jobs: int,
    trains: bool,
) -> int:
    """Make a comparison and return the exit code: 0, or that of the first run that failed.

    strategies, seeds: as the options of `switokd compare`; None: those of the finished runs.
    out: the comparison's folder. jobs: runs at the same time. trains: whether unfinished runs are
    trained before the report. Raises UsageError for a mistake in any of these, and Terminated
    if SIGTERM arrives while runs train.
    """
    console = Console(highlight=False, soft_wrap=True)
    config = base_config(recipe, settings)
    out = out or Path("runs") / f"compare-{config.name}"
    finished_variants, finished_seeds = ([], []) if trains else find_finished(out)
    variants, numbers = finished_variants, finished_seeds
    mistakes = Mistakes()
    with mistakes.noted():
        variants = variants if strategies is None else parse_strategies(strategies)
        make_strategies(variants)
    with mistakes.noted():
        numbers = numbers if seeds is None else parse_seeds(seeds)
    mistakes.tell()
    trials = make_trials(recipe, settings, variants, numbers, out)
    notes, failed = notes_on(trials), dict[Path, Failure]()
    if trains:
        for note in notes:
            console.print(note, markup=False)
        with sigterm_unwinds():
            failed.update(train_all(trials, jobs, out, console))
    options = ["--out", str(out), *(["--jobs", str(jobs)] if jobs > 1 else [])]
    notes.append(f"Made by `{command_for(recipe, settings, variants, numbers, options)}`.")
    report(config.name, trials, failed, out, notes, console)
    return next((failure.exit_code for failure in failed.values()), 0)


def command_for(
    recipe: str,
    settings: Sequence[str],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    options: Sequence[str] = (),
) -> str:
    """Return the command that repeats this comparison."""
    labels = ",".join(variant.label for variant in variants)
    numbers = ",".join(map(str, seeds)) + "," * (len(seeds) == 1)
    words = [recipe, *settings, "--strategies", labels, "--seeds", numbers, *options]
    return shlex.join(["switokd", "compare", *words])


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Make SIGTERM raise Terminated in the block."""
    before = signal.getsignal(signal.SIGTERM)
    unwind_on_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def notes_on(trials: Sequence[Trial]) -> list[str]:
    """Return notes for the reader of the table: which strategies use trained teachers."""
    labels = list(dict.fromkeys(t.variant.label for t in trials if t.teachers_from))
    if not labels:
        return []
    return [
        f"{', '.join(labels)}: the teachers come from the vanilla run of the same seed; the time "
        "of that run is not included"
    ]


def train_all(
    trials: Sequence[Trial], jobs: int, out: Path, console: Console
) -> Mapping[Path, Failure]:
    """Train the unfinished runs; return the failures by run folder."""
    with locked(out) as lock:
        # Read all states first: an error must leave every folder untouched.
        states = {trial.folder: trial.state() for trial in trials}
        for trial in trials:
            if states[trial.folder] is TrialState.UNFINISHED and trial.has_checkpoint:
                console.print(f"{trial.folder} continues from its checkpoint", markup=False)
        for trial in clear_unfinished(trials):
            console.print(f"{trial.folder} is unfinished: removed and trained again", markup=False)
        to_do = [trial for trial in trials if states[trial.folder] is not TrialState.FINISHED]
        kept = len(trials) - len(to_do)
        if kept:
            console.print(f"{kept} of {len(trials)} runs are finished already", markup=False)
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
    """Print the table, and save it with a CSV file and a picture in `out`."""
    results = []
    for trial in trials:
        failure = failed.get(trial.folder)
        done = failure is None and trial.state() is TrialState.FINISHED
        summary = read_summary(trial.folder) if done else {}
        results.append(
            TrialResult(trial.variant.label, trial.seed, summary, failure.reason if failure else "")
        )
    if failed and not any(result.summary for result in results):
        for result in results:
            print_error(f"{result.strategy}, seed {result.seed}: {result.failure}")
        return
    comparison = Comparison(name, tuple(results))
    console.print(table.rich_table(comparison, console.width), soft_wrap=False)
    for line in [table.caption(comparison), *table.failures(comparison)]:
        console.print(line, markup=False)
    paths = files.save(comparison, out, notes)
    for kind, path in zip(("table", "csv", "picture"), paths, strict=True):
        console.print(f"{kind:<11} {path}", markup=False)


class Lines:
    """A `Display` that prints a line when a run ends.

    In a terminal it also shows the runs that train now, each with the last line of its log.
    """

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

    def update(self, running: Sequence[RunningTrial]) -> None:
        """See `Display`."""
        if self.console.is_terminal:
            for run in running:
                last = (last_lines(run.log) or [""])[-1]
                self._live.update(self._tasks[run.trial.folder], last=last)

    def ended(self, trial: Trial, seconds: float, failure: Failure | None) -> None:
        """See `Display`."""
        self.count += 1
        if trial.folder in self._tasks:
            self._live.remove_task(self._tasks.pop(trial.folder))
        result = f"failed: {failure.reason}" if failure else _accuracies(trial)
        run = f"[{self.count}/{self.total}] {trial.name}"
        self.console.print(f"{run}: {result}, {table.duration(seconds)}", markup=False)


def _accuracies(trial: Trial) -> str:
    """Describe the students of a finished run with their top-1 accuracy in percent."""
    networks = read_summary(trial.folder).get("networks", {})
    students = trial.config.topology.students
    return ", ".join(f"{n} {networks[n]['top1_last']:.2f} %" for n in students if n in networks)
