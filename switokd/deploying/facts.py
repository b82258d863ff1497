"""What follows from a run file and the options: ranks and GPUs of each pod, names, folders.

Not covered: the objects themselves; memory (`estimate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from switokd.config.config import Config
from switokd.data.catalog import DOWNLOADABLE, known
from switokd.deploying.options import PodOptions, RenderOptions, label_of
from switokd.errors import UsageError

RUNS, DATA, TMP, JOURNAL = "/runs", "/data", "/tmp", "/journal"
TLS, RUN_FILE = "/etc/switokd/tls", "/etc/switokd/run"
"""Folders of the pods."""

HEARTBEATS = "/tmp/heartbeats"
"""Folder of the files that say that a rank is alive."""

GRPC_PORT, HTTP_PORT, MASTER_PORT = 50051, 9464, 29500
USER = 10001
"""User and group of the images (deploy/Containerfile)."""

_NEED_FILES = ("image-folder", "huggingface", "webdataset")
"""Data sets that are not in the catalog and read data.root."""


@dataclass(frozen=True)
class PodShape:
    """How the ranks of a run are spread over its pods, which are all alike."""

    pods: int
    ranks_per_pod: int
    gpus_per_pod: int

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.pods * self.ranks_per_pod


@dataclass(frozen=True)
class RunFacts:
    """Everything that the objects of a run are made from."""

    options: RenderOptions
    name: str
    """Of the deployment; part of every object's name."""
    run_name: str
    shape: PodShape
    placement: str
    """Which rank trains which network, as text."""
    coordinator: str
    """Address of a coordinator that runs already; auto: one is made; off: none."""
    timeout: float
    """coordinator.timeout, in seconds."""
    loader_processes: int
    downloads: bool
    """Whether the ranks download the data set."""
    has_data: bool
    """Whether the data set is on a volume."""
    has_mlflow_files: bool = False
    """Whether MLflow writes files: they belong on the volume of results."""
    traces_every: int = 0
    """Steps per OpenTelemetry trace, in ranks and coordinator; 0: none."""
    memory: tuple[str, str] = ("0", "0")
    """Requested and largest memory of a pod, such as 512Mi."""
    shm: int = 1
    """Size of /dev/shm, in GiB."""
    arguments: tuple[str, ...] = ()
    """Run file and settings of every rank."""
    run_files: tuple[tuple[str, str], ...] = ()
    """Name and content of the files that the pods find in `RUN_FILE`."""

    @property
    def labels(self) -> dict[str, str]:
        """Labels of all objects of this deployment."""
        return {"app.kubernetes.io/name": "switokd", "app.kubernetes.io/instance": self.name}

    def labels_of(self, component: str) -> dict[str, str]:
        """Labels of the pods of a component: coordinator or worker."""
        return {**self.labels, "app.kubernetes.io/component": component}

    @property
    def coordinator_name(self) -> str:
        """Name of the coordinator's objects, and its host."""
        return f"{self.name}-coordinator"

    @property
    def workers_name(self) -> str:
        """Name of the Job, and of the headless Service that names its pods."""
        return f"{self.name}-workers"

    @property
    def worker_container(self) -> str:
        """Name of the container; a TrainJob looks for 'node'."""
        return "node" if self.options.flavor == "trainjob" else "worker"

    def host_of_pod(self, index: int) -> str:
        """Return the host name of a pod, as Job or JobSet gives it."""
        job = self.workers_name
        if self.options.flavor != "job":
            job = f"{self.name}-{'node' if self.options.flavor == 'trainjob' else 'workers'}-0"
        return f"{job}-{index}.{self.workers_name}"

    @property
    def has_coordinator(self) -> bool:
        """Whether the deployment has a coordinator of its own."""
        return self.coordinator == "auto"

    @property
    def run_dir(self) -> str:
        """Folder of the run in the pods."""
        return f"{RUNS}/{self.run_name}"

    def metadata(self, name: str, component: str | None = None) -> dict[str, object]:
        """Return the metadata of an object."""
        labels = self.labels_of(component) if component else self.labels
        metadata: dict[str, object] = {"name": name}
        if self.options.namespace:
            metadata["namespace"] = self.options.namespace
        return {**metadata, "labels": labels}


def facts_of(config: Config, options: RenderOptions) -> RunFacts:
    """Return the facts of a run, without memory and arguments.

    UsageError if options and run do not fit together.
    """
    shape = shape_of(config, options.pods)
    config.check_batch(shape.world_size)
    address = config.coordinator.address
    if address == "off" and shape.world_size > 1:
        raise UsageError(
            f"coordinator: off is for a run of one rank, and this one has {shape.world_size}; "
            "leave it on auto"
        )
    text = f"any network on any rank ({config.placement})"
    if config.placement != "auto":
        text = str(config.placement_on(shape.world_size))
    return RunFacts(
        options=options,
        name=options.name or label_of(config.name),
        run_name=config.name,
        shape=shape,
        placement=text,
        coordinator=address,
        timeout=config.coordinator.timeout,
        loader_processes=config.data.workers,
        downloads=_downloads(config),
        has_data=_has_data(config, options),
        has_mlflow_files="mlflow" in config.observers
        and "mlflow" not in trackers_with_server(config),
        traces_every=config.tracking.traces_every,
    )


def trackers_with_server(config: Config) -> dict[str, str]:
    """Return the settings that let ranks send to a server of the user's, by who sends."""
    kwargs, found = config.tracking.kwargs, {}
    uri = str(kwargs.get("mlflow", {}).get("tracking_uri") or "")
    if "mlflow" in config.observers and "://" in uri and not uri.startswith(("file:", "sqlite:")):
        found["mlflow"] = f"tracking.kwargs.mlflow.tracking_uri={uri}"
    if "wandb" in config.observers and kwargs.get("wandb", {}).get("mode") == "online":
        found["wandb"] = "tracking.kwargs.wandb.mode=online"
    if config.tracking.traces_every:
        found["traces"] = f"tracking.traces_every={config.tracking.traces_every}"
    return found


def shape_of(config: Config, options: PodOptions) -> PodShape:
    """Return how the ranks are spread over pods; UsageError if they do not fit."""
    ranks = config.world_size
    if ranks is None and options.ranks is None:
        raise UsageError(
            f"placement: {config.placement} fits any number of ranks; say how many with --ranks"
        )
    if ranks is not None and options.ranks not in (None, ranks):
        raise UsageError(
            f"--ranks: found {options.ranks}; the placement of {config.name} has {ranks} ranks: "
            "leave --ranks out, or change the placement"
        )
    world_size = ranks or options.ranks or 1
    gpus = options.gpus_per_pod
    if gpus is None:
        gpus = (options.ranks_per_pod or 1) if config.device == "cuda" else 0
    here = options.ranks_per_pod or gpus or 1
    what = f"{world_size} rank{'s' * (world_size > 1)} of {config.name}"
    if world_size % here:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        named = "--ranks-per-pod" if options.ranks_per_pod else "--gpus-per-pod"
        raise UsageError(
            f"{named}: found {here}, and the {what} cannot fill pods of {here} ranks; "
            f"allowed: {fitting}, or another placement (networks.NAME.ranks)"
        )
    if gpus and here % gpus:
        fitting = ", ".join(str(n) for n in range(1, here + 1) if here % n == 0)
        raise UsageError(
            f"--gpus-per-pod: found {gpus}, and a pod has {here} ranks, each of which uses one GPU "
            f"or a part of one; allowed: {fitting}"
        )
    if config.device == "cpu" and gpus:
        raise UsageError(f"--gpus-per-pod: found {gpus}, and the run has device: cpu; allowed: 0")
    if config.device == "cuda" and not gpus:
        raise UsageError(
            "--gpus-per-pod: found 0, and the run has device: cuda; allowed: 1 or more"
        )
    return PodShape(world_size // here, here, gpus)


def _downloads(config: Config) -> bool:
    return config.data.download and config.data.dataset in DOWNLOADABLE


def _has_data(config: Config, options: RenderOptions) -> bool:
    """Whether a volume holds the data set; UsageError if it needs one and there is none."""
    catalogued, dataset = known(config.data), config.data.dataset
    needs_files = bool(catalogued.folders) if catalogued else dataset in _NEED_FILES
    if options.volumes.data_claim or _downloads(config):
        return True
    if needs_files:
        remedy = ", or use data.download=true" if dataset in DOWNLOADABLE else ""
        raise UsageError(
            f"--data-claim is missing: {dataset} is read from files; name the claim of the volume "
            f"that holds these files{remedy}"
        )
    return False
