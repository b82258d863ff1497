"""switokd in this process: networks, exchange and decisions of `switokd train`, step by step.

Figures of single steps use this, without the start, logs and evaluation of a run. All networks are
in one process.

Not covered: several ranks (`ranks.py`); learning rate schedules, which start after more steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.images import NoiseImages
from bench.runs import CLASSES
from switokd.config.config import Config
from switokd.coordination.local import LocalDecider
from switokd.data.images import Images, open_images
from switokd.data.loader import Batch
from switokd.data.prefetch import prefetch
from switokd.data.sources import ArraySource, Sources
from switokd.runtime.environment import Environment
from switokd.runtime.placement import LocalPlacement
from switokd.runtime.process_group import World
from switokd.training.build import make_graph_context, make_learners, make_models
from switokd.training.cuda_graphs import GraphedFunctions
from switokd.training.exchange import Exchange
from switokd.training.schedules import AccumulationWindow
from switokd.training.step import StepContext, StepResult, train_step
from switokd.training.trainer import total_steps

ONE_PROCESS: Mapping[str, Any] = {"placement": "replicated", "coordinator": "off"}
"""Settings of a run file for a single process."""


def in_memory(config: Config, samples: int) -> Images:
    """Images of noise in memory, loaded like CIFAR-100: arrays, cropped, flipped, normalised.

    A data set that a run file names by import string would be read image by image instead.
    """
    noise = [NoiseImages(train, samples, CLASSES) for train in (True, False)]
    parts = [ArraySource(part.images, part.labels) for part in noise]
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    sources = Sources(parts[0], parts[1], CLASSES, mean, std, crop_padding=4, flip=True)
    return Images(sources, config.data, config.seed)


def configured(raw: Mapping[str, Any]) -> Config:
    """Configuration of a run file that `runs.run_file` made."""
    return Config.model_validate_json(json.dumps(raw))


class InProcess:
    """A run in this process, ready to train.

    device: default is the CPU. images, decider: replace the configured data and decider.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device | None = None,
        images: Images | None = None,
        decider: LocalDecider | None = None,
    ) -> None:
        self.config = config
        self.device = device or torch.device("cpu")
        self.images = images or open_images(config.data, config.seed)
        self.placement = placement = LocalPlacement(config.placement_on(1), 0)
        models = make_models(config, placement.networks, self.images)
        world = World(Environment(), self.device)
        self.images = self.images.on(self.device, config.compute.data_on_device)
        window = AccumulationWindow(
            config.schedule.accumulate,
            self.images.steps_per_epoch,
            total_steps(config, self.images),
        )
        classes, soft = self.images.classes, config.data.has_soft_targets
        graph_context = make_graph_context(config.compute, self.device)
        self.learners = make_learners(
            config, placement, models, world, self.images, window, graph_context
        )
        functions = GraphedFunctions(graph_context)
        exchange = Exchange(
            placement, config.digest, classes, soft_targets=soft, functions=functions
        )
        self.decider = decider or LocalDecider(config, lambda decision: None)
        self._context = StepContext(self.learners, config.method, exchange, self.decider, functions)
        self._done = 0

    def batches(self, steps: int) -> Iterator[Batch]:
        """The first `steps` batches of the training, on the device."""
        return prefetch(self.images.stream(steps), self.device, self.config.compute.channels_last)

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Train one step on a batch: x `[B, C, H, W]`, y `[B]`."""
        self._done += 1
        return train_step(self._context, self._done, x, y, len(y))
