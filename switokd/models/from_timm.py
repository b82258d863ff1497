"""Networks of the library timm (PyTorch Image Models), as `timm:NAME`, if it is installed.

Not covered: pretrained weights, except by `model_kwargs: {pretrained: true}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from switokd.errors import UsageError, nearest
from switokd.plugins import TIMM


def timm_builder(name: str) -> Callable[..., Any]:
    """Return a callable that builds timm's network for `timm:NAME`.

    It takes `in_channels`, `num_classes` and the arguments of `timm.create_model`. UsageError if
    timm is not installed or has no network of this name.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UsageError(
            f"model {name}: timm is not installed; pip install timm, or switokd with its extra "
            "'timm' (switokd[timm])"
        ) from None
    timm_name = name.removeprefix(TIMM)
    if not timm.is_model(timm_name):
        hint = nearest(timm_name, timm.list_models())
        raise UsageError(
            f"model {name}: timm {timm.__version__} has no network {timm_name!r}{hint} "
            "(timm.list_models() lists all)"
        )

    def make(in_channels: int, num_classes: int, **kwargs: Any) -> Any:
        return timm.create_model(timm_name, in_chans=in_channels, num_classes=num_classes, **kwargs)

    return make
