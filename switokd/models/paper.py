"""The networks of Qian et al. (ECCV 2022), by the data of their tables 4 and 7 and of ImageNet.

Their sizes are those that table 4 prints, rounded, but for ResNet-34: 21.38M, of which it prints
21.3M. The network of the authors' released code has the same 21,379,592 values.

Not covered: their accuracies and recipes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperNetwork:
    """A network on one of the paper's data sets."""

    network: str
    """Name of the model, as in run files."""
    data: str
    size: int
    """Of the images, which are square and have three channels, in pixels."""
    classes: int
    uses: str
    """Tables with its role, T for teacher and S for student: "4T 7S"; of ImageNet the role."""


CIFAR10 = ("CIFAR-10", 32, 10)
CIFAR100 = ("CIFAR-100", 32, 100)
TINY_IMAGENET = ("Tiny-ImageNet", 64, 200)
IMAGENET = ("ImageNet", 224, 1000)

PAPER_NETWORKS = (
    PaperNetwork("wrn-16-1", *CIFAR10, "4S"),
    PaperNetwork("wrn-16-8", *CIFAR10, "4T"),
    PaperNetwork("mobilenetv2-0.5", *CIFAR100, "4S"),
    PaperNetwork("wrn-16-2", *CIFAR100, "4T 7T 7S"),
    PaperNetwork("mobilenet", *CIFAR100, "7S"),
    PaperNetwork("wrn-16-10", *CIFAR100, "7T"),
    PaperNetwork("resnet-20", *TINY_IMAGENET, "4S"),
    PaperNetwork("wrn-16-2", *TINY_IMAGENET, "4T"),
    PaperNetwork("mobilenetv2-1.4", *TINY_IMAGENET, "4S"),
    PaperNetwork("resnet-34", *TINY_IMAGENET, "4T"),
    PaperNetwork("resnet18", *IMAGENET, "S"),
    PaperNetwork("resnet34", *IMAGENET, "T"),
)
