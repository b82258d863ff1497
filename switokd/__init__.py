"""Train networks that teach each other, by switchable online knowledge distillation.

    run = switokd.train("digits-2t1s", {"schedule.epochs": 5})
    run = switokd.distil(teachers={...}, students={...}, train=dataset, test=dataset)
    run = switokd.load_run("runs/digits-2t1s-001")

Source: Qian, Wang, Yin, Hong, Wang, "Switchable Online Knowledge Distillation", ECCV 2022,
arXiv:2209.04996.

Not covered: the command line (`cli/`), the coordinator (`services.coordinator`).
"""

from switokd.runtime.interpreter import leave_current_folder

leave_current_folder()  # before other imports

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from switokd.api import distil, train
    from switokd.runs.run import Run, load_run
    from switokd.runs.trackers.tracker import Tracker
    from switokd.training.observer import ObservedRun, Observer

__version__ = "0.1.0"
__all__ = [
    "ObservedRun",
    "Observer",
    "Run",
    "Tracker",
    "__version__",
    "distil",
    "load_run",
    "train",
]

_MODULES = {
    **dict.fromkeys(("train", "distil"), "api"),
    **dict.fromkeys(("Run", "load_run"), "runs.run"),
    **dict.fromkeys(("Observer", "ObservedRun"), "training.observer"),
    "Tracker": "runs.trackers.tracker",
}


def __getattr__(name: str) -> Any:
    """Import a name of the API when a program first uses the name.

    The API needs PyTorch; the coordinator and `switokd --help` do not.
    """
    if name not in _MODULES:
        raise AttributeError(f"module 'switokd' has no attribute {name!r}")
    value = getattr(import_module(f"switokd.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
