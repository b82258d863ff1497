"""Patterns for the names of switokd's own networks.

Their forward passes run the same kernels in every step and never wait for the GPU, so that they
are safe to capture as CUDA graphs.

Torch-free. Not covered: building networks (`registry.py`); names of other libraries' networks.
"""

from __future__ import annotations

import re

WIDE_RESNET = re.compile(r"wrn-(\d+)-(\d+)")
RESNET = re.compile(r"resnet-(\d+)")
MOBILENET = re.compile(r"mobilenet(?:-(\d+(?:\.\d+)?))?")
MOBILENET_V2 = re.compile(r"mobilenetv2(?:-(\d+(?:\.\d+)?))?")


def is_own(name: str) -> bool:
    """Whether a name is that of a network of switokd's own."""
    own = WIDE_RESNET, RESNET, MOBILENET, MOBILENET_V2
    return any(pattern.fullmatch(name) for pattern in own)
