"""Names of switokd's own networks: their patterns, and which sizes there are.

Their forward passes run the same kernels in every step and never wait for the GPU, so that they
are safe to capture as CUDA graphs.

Torch-free, so that a run file with a wrong name is refused before anything is imported.
torchvision's names are read from its sources, for the same reason. Not covered: building networks
(`registry.py`); names of timm's networks.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from switokd.errors import nearest

WIDE_RESNET = re.compile(r"wrn-(\d+)-(\d+)")
RESNET = re.compile(r"resnet-(\d+)")
MOBILENET = re.compile(r"mobilenet(?:-(\d+(?:\.\d+)?))?")
MOBILENET_V2 = re.compile(r"mobilenetv2(?:-(\d+(?:\.\d+)?))?")
KINDS = (
    "wrn-DEPTH-WIDTH",
    "resnet-DEPTH",
    "mobilenet-WIDTH",
    "mobilenetv2-WIDTH",
    "a classification model of torchvision",
    "timm:NAME",
    "package.module:callable",
)
"""Kinds of names that a network may have, for messages and help texts."""
EXAMPLES = ("wrn-16-2", "resnet-20", "mobilenet", "mobilenetv2")
"""A name of each family."""
REGISTERED = re.compile(r"^@register_model\(\)\n.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)
"""How torchvision's sources name a network that can be built by its name."""
RESNET_DEPTHS = (18, 20, 32, 34, 44, 56, 110)


def is_own(name: str) -> bool:
    """Whether a name is that of a network of switokd's own."""
    own = WIDE_RESNET, RESNET, MOBILENET, MOBILENET_V2
    return any(pattern.fullmatch(name) for pattern in own)


def allowed_instead(name: str) -> str:
    """Say what is allowed if no network can have this name; empty if one may have it.

    Names of timm's networks and of the user's own are known only to who imports these.
    """
    if match := WIDE_RESNET.fullmatch(name):
        blocks, rest = divmod(int(match[1]) - 4, 6)
        is_wrong = rest or blocks < 1 or int(match[2]) < 1
        return "a depth of 10, 16, 22, 28, ... and a width of 1 or more" if is_wrong else ""
    if match := RESNET.fullmatch(name):
        depths = ", ".join(str(depth) for depth in RESNET_DEPTHS)
        return "" if int(match[1]) in RESNET_DEPTHS else f"a depth of {depths}"
    if match := MOBILENET.fullmatch(name) or MOBILENET_V2.fullmatch(name):
        return "" if float(match[1] or 1) > 0 else "a width above 0"
    known = torchvision_names()
    if ":" in name or name in known or not known:
        return ""
    return f"{', '.join(KINDS)}{nearest(name, [*EXAMPLES, *sorted(known)])}"


@cache
def torchvision_names() -> frozenset[str]:
    """Return the names of torchvision's classification networks; empty without torchvision.

    Its import takes seconds, so they are read from its sources.
    """
    spec = find_spec("torchvision")
    files = Path(spec.origin).parent.glob("models/*.py") if spec and spec.origin else ()
    return frozenset(name for file in files for name in REGISTERED.findall(file.read_text("utf-8")))
