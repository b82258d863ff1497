"""The observers of a run that are not the package's own part: trackers, and those of the user.

Each works behind a guard: an observer that raises ends, with one line that names it, and by
default the training goes on.

Not covered: what an observer may receive (`training/observer.py`); the trackers (`trackers/`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from switokd import plugins
from switokd.config.config import Config
from switokd.distillation.decision import Decision
from switokd.errors import (
    OwnCodeError,
    SwitokdError,
    UsageError,
    own_code_error,
    own_code_errors,
    summary,
)
from switokd.training.metrics import EpochMetrics
from switokd.training.observer import ObservedRun, Observer
from switokd.training.step import StepResult

TRACKERS: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "TensorBoard"),
    "mlflow": ("mlflow", "MLflow"),
    "wandb": ("wandb", "WandB"),
}
"""By name in a run file: module in `trackers/`, and class."""


def make_observers(
    config: Config, given: Sequence[Observer], on_warning: Callable[[str], None]
) -> list[GuardedObserver]:
    """Make the observers that the run file names, and guard these and the `given` objects.

    on_warning: receives a sentence about an observer that has raised. UsageError if an observer
    cannot be made, or is no Observer.
    """
    named = [(name, _make(name, config.tracking.kwargs.get(name, {}))) for name in config.observers]
    objects = [(type(observer).__name__, observer) for observer in given]
    for name, observer in (*named, *objects):
        if Observer not in type(observer).__mro__:
            raise UsageError(
                f"observers: {name} is a {type(observer).__name__}; allowed: an object of a class "
                "that inherits from switokd.Observer"
            )
    stops = config.tracking.on_error == "stop"
    return [GuardedObserver(name, each, stops, on_warning) for name, each in (*named, *objects)]


def _make(name: str, kwargs: Mapping[str, Any]) -> Any:
    """Make an observer by its name in the run file; UsageError if that is not possible."""
    what = f"observer {name} cannot be made with tracking.kwargs {dict(kwargs)}"
    if name in TRACKERS:
        module, kind = TRACKERS[name]
        factory: Any = getattr(import_module(f"switokd.runs.trackers.{module}"), kind)
    else:
        factory = plugins.import_callable(name, "observers")
    try:
        with own_code_errors(what, __file__):
            return factory(**kwargs)
    except TypeError as error:  # the arguments do not fit
        raise UsageError(f"{what}: {error}") from None


class GuardedObserver(Observer):
    """Hands events to an observer, one at a time, until it raises an error.

    stops: whether an error ends the run. on_warning: otherwise receives a sentence about it.
    OwnCodeError if an observer raises and the run is to stop.
    """

    def __init__(
        self, name: str, observer: Observer, stops: bool, on_warning: Callable[[str], None]
    ) -> None:
        self._name, self._observer = name, observer
        self._stops, self._on_warning = stops, on_warning
        self._lock = threading.Lock()
        self._has_ended = False

    def on_run(self, run: ObservedRun) -> None:
        """Hand the event on, as all methods below do."""
        self._call(self._observer.on_run, run)

    def on_begin(self) -> None:
        """Hand the event on."""
        self._call(self._observer.on_begin)

    def on_decision(self, decision: Decision) -> None:
        """Hand the event on; called on another thread than the others."""
        self._call(self._observer.on_decision, decision)

    def on_step(self, step: int, epoch: int, result: StepResult) -> None:
        """Hand the event on."""
        self._call(self._observer.on_step, step, epoch, result)

    def on_skipped(self, step: int, reason: str) -> None:
        """Hand the event on."""
        self._call(self._observer.on_skipped, step, reason)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Hand the event on."""
        self._call(self._observer.on_epoch, metrics)

    def on_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """Hand the event on."""
        self._call(self._observer.on_checkpoint, step, state)

    def settle(self) -> None:
        """Hand the event on."""
        self._call(self._observer.settle)

    def on_weights(self, folder: str, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Hand the event on."""
        self._call(self._observer.on_weights, folder, states)

    def on_end(self, error: BaseException | None) -> None:
        """Hand the event on; no other follows."""
        self._stops = self._stops and error is None  # that error matters more
        self._call(self._observer.on_end, error)
        self._has_ended = True

    def _call(self, method: Callable[..., None], *arguments: object) -> None:
        with self._lock:
            if self._has_ended:
                return
            try:
                method(*arguments)
            except (Exception, SystemExit) as error:
                self._has_ended = True
                told = _told(error, f"observer {self._name} in {method.__name__}")
                if self._stops:
                    raise told from error
                self._on_warning(
                    f"{told}; the training goes on without this observer (tracking.on_error)"
                )


def _told(error: BaseException, what: str) -> OwnCodeError:
    """Return the one-line error for what an observer, or a library that it uses, has raised."""
    if isinstance(error, SwitokdError):
        return OwnCodeError(f"{what}: {error}")
    return own_code_error(error, what) or OwnCodeError(f"{what}: {summary(error)}")
