"""Networks of the library timm (PyTorch Image Models), `timm:NAME`, where it is installed.

Not covered: weights from timm's hub, unless asked for by `model_kwargs: {pretrained: true}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from switokd.errors import UsageError, nearest

PREFIX = "timm:"


def timm_builder(name: str) -> Callable[..., Any]:
    """What makes timm's network for `timm:NAME`, called with `in_channels` and `num_classes`.

    UsageError if timm is not installed or has no network of this name.
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
    own_name = name.removeprefix(PREFIX)
    if not timm.is_model(own_name):
        close = nearest(own_name, timm.list_models())
        raise UsageError(
            f"model {name}: timm {timm.__version__} has no network {own_name!r}{close} "
            "(timm.list_models() gives all)"
        )

    def make(in_channels: int, num_classes: int, **kwargs: Any) -> Any:
        return timm.create_model(own_name, in_chans=in_channels, num_classes=num_classes, **kwargs)

    return make
