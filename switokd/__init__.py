"""switokd: networks that train each other by switchable online knowledge distillation.

    run = switokd.train("digits-2t1s", {"schedule.epochs": 5})
    run = switokd.distil(teachers={...}, students={...}, train=dataset, test=dataset)
    run = switokd.load_run("runs/digits-2t1s-001")

Paper: Qian, Wang, Yin, Hong, Wang, "Switchable Online Knowledge Distillation",
ECCV 2022, arXiv:2209.04996.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switokd.api import distil, train
    from switokd.runs.run import Run, load_run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "distil", "load_run", "train"]

_WHERE = {"train": "api", "distil": "api", "Run": "runs.run", "load_run": "runs.run"}


def __getattr__(name: str) -> Any:
    """Import the API when it is first asked for: it needs torch, which the coordinator does not."""
    if name not in _WHERE:
        raise AttributeError(f"module 'switokd' has no attribute {name!r}")
    found = getattr(import_module(f"switokd.{_WHERE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
