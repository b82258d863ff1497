"""The networks of Qian et al. (ECCV 2022), by data set of tables 4 and 7, and for ImageNet.

Their numbers of parameters, rounded, equal those in table 4 except for ResNet-34: the table prints
21.3M for 21.38M. The network in the authors' released code has the same 21,379,592 parameters.

Not covered: their accuracies and recipes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperNetwork:
    """A network of the paper on one data set."""

    network: str
    """Name of the model in run files."""
    data: str
    """Name of the data set."""
    size: int
    """Height and width of the images, in pixels; they have three channels."""
    classes: int
    uses: str
    """Table and role, T for teacher and S for student, such as "4T 7S"; for ImageNet, the role."""


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
