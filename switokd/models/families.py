"""Names of this package's own networks, which do the same in every step and never read a GPU.

Torch-free. Not covered: building them (`models/`); names of others' networks.
"""

from __future__ import annotations

import re

WIDE_RESNET = re.compile(r"wrn-(\d+)-(\d+)")
RESNET = re.compile(r"resnet-(\d+)")
MOBILENET = re.compile(r"mobilenet(?:-(\d+(?:\.\d+)?))?")
MOBILENET_V2 = re.compile(r"mobilenetv2(?:-(\d+(?:\.\d+)?))?")


def is_own(name: str) -> bool:
    """Whether a network of this name comes with this package."""
    own = WIDE_RESNET, RESNET, MOBILENET, MOBILENET_V2
    return any(pattern.fullmatch(name) for pattern in own)
