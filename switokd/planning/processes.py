"""How many processes `switokd train` starts where the placement allows any number.

Imported without torch.

Not covered: choosing among several numbers (`auto.py`); torchrun, where the user chooses.
"""

from __future__ import annotations

import os

from switokd.config.config import Config
from switokd.runtime.environment import ProcessLayout, cores
from switokd.runtime.threads import stay_within_limits


def processes_for(config: Config) -> tuple[int, list[ProcessLayout]]:
    """Return the number of processes for a placement that allows any number, and the layouts.

    A run without coordinator gets one process; a run on GPUs gets one process per GPU. On CPUs,
    `placement: replicated` gets one process with all cores. `placement: auto` gets layouts: one
    process per core, half as many, and so on, down to one process with all cores. Every process
    must have at least two samples of a batch.
    """
    if config.coordinator.address == "off":
        return 1, []
    gpus = _gpus(config)
    if gpus or config.placement != "auto":
        return gpus or 1, []
    layouts = _layouts(config)
    return layouts[0].processes, layouts


def _layouts(config: Config) -> list[ProcessLayout]:
    """Return layouts, largest first, with the threads that `launch` and PyTorch will set."""
    import torch

    stay_within_limits()
    most, own_threads = cores(), torch.get_num_threads()
    are_given = "OMP_NUM_THREADS" in os.environ  # threads of each process
    processes = max(most // own_threads, 1) if are_given else most
    processes = min(processes, config.data.batch_size // 2)
    layouts = []
    while processes:
        is_free = processes > 1 and not are_given
        layouts.append(ProcessLayout(processes, most // processes if is_free else own_threads))
        processes //= 2
    return layouts


def _gpus(config: Config) -> int:
    from switokd.runtime.device import gpu_count

    return 0 if config.device == "cpu" else gpu_count()
