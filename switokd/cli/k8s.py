"""The command `switokd k8s render`: manifests with which a run trains on Kubernetes.

Torch is imported only to estimate the memory of a pod.

Not covered: the manifests themselves (`deploying/`).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from switokd.cli.arguments import EPILOG, RunFile, Settings, Verbose, fail, number_option
from switokd.cli.commands import CliCommand
from switokd.cli.option_groups import option_groups
from switokd.errors import SwitokdError, UsageError
from switokd.runtime.log import say

if TYPE_CHECKING:
    from switokd.deploying.options import (
        MonitoringOptions,
        PodOptions,
        TlsOptions,
        VolumeOptions,
    )
    from switokd.deploying.render import Rendered

k8s = typer.Typer(
    help="Train on Kubernetes: 'switokd k8s render' writes the manifests of a run.",
    no_args_is_help=True,
)


def _text(metavar: str, help: str, panel: str | None = None) -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel=panel, show_default=False)


def _number(name: str, help: str, least: int = 1) -> Any:
    info = number_option(least, 100_000, (name,), help=help)
    info.rich_help_panel = "Pods"
    return info


IMAGE_HELP = "Image of the ranks, REGISTRY/NAME:TAG; also of the coordinator by default."
COORDINATOR_IMAGE_HELP = "Image of the coordinator, which may be the small one without PyTorch."
FLAVOR_HELP = (
    "What runs the ranks: job (plain Kubernetes), jobset (needs JobSet: a lost pod starts all of "
    "them again), or trainjob (needs Kubeflow Trainer)."
)
NAME_HELP = "Name of the deployment, part of every object's name; default: that of the run."
NAMESPACE_HELP = "Namespace of all objects; default: that of kubectl."
OUTPUT_HELP = "Folder for the files, with a kustomization.yaml; default: print all objects."
RANKS_HELP = "Ranks of the run, for placement=replicated or placement=auto."
RANKS_PER_POD_HELP = "Ranks in each pod; default: one per GPU of a pod, else 1."
GPUS_HELP = "NVIDIA GPUs of each pod; default: 0, or one per rank with device=cuda."
CPUS_HELP = "CPU threads of each rank; a loader process needs one more."
MEMORY_HELP = "Memory that a pod requests, such as 8Gi; default: estimated by one training step."
DATA_CLAIM_HELP = "Existing volume claim with the data set; it is mounted at /data."
RUNS_CLAIM_HELP = "Existing volume claim for the results, mounted at /runs; default: a new one."
RUNS_SIZE_HELP = "Size of the new volume for results (5Gi)."
DATA_SIZE_HELP = "Size of the new volume for a data set that is downloaded (50Gi)."
JOURNAL_SIZE_HELP = "Size of the volume for the coordinator's journal (1Gi)."
CLASS_HELP = "Storage class of new volumes; it must offer ReadWriteMany for several pods."
TLS_HELP = "TLS and tokens, from the Secrets NAME-coordinator and NAME-worker."
SECRETS_HELP = (
    "Folder of 'switokd certificates', of which --output gets a secrets.yaml that only you may "
    "read; means --tls."
)
OPERATOR_HELP = "Make a PodMonitor and a PrometheusRule, for clusters with the Prometheus Operator."
LABEL_HELP = (
    "Label of PodMonitor and PrometheusRule by which your Prometheus selects them, such as "
    "release=prometheus. May be given several times."
)
PROMETHEUS_HELP = "Namespace of Prometheus, which may read the metrics (monitoring)."


def pod_options(
    ranks: Annotated[Optional[int], _number("--ranks", RANKS_HELP)] = None,  # noqa: UP045
    ranks_per_pod: Annotated[
        Optional[int],  # noqa: UP045
        _number("--ranks-per-pod", RANKS_PER_POD_HELP),
    ] = None,
    gpus_per_pod: Annotated[
        Optional[int],  # noqa: UP045
        _number("--gpus-per-pod", GPUS_HELP, 0),
    ] = None,
    cpus_per_rank: Annotated[int, _number("--cpus-per-rank", CPUS_HELP)] = 1,
    memory: Annotated[Optional[str], _text("SIZE", MEMORY_HELP, "Pods")] = None,  # noqa: UP045
) -> PodOptions:
    """Return how many pods there are, and what each has."""
    from switokd.deploying.options import PodOptions

    return PodOptions(ranks, ranks_per_pod, gpus_per_pod, cpus_per_rank, memory)


def volume_options(
    data_claim: Annotated[Optional[str], _text("NAME", DATA_CLAIM_HELP, "Volumes")] = None,  # noqa: UP045
    runs_claim: Annotated[Optional[str], _text("NAME", RUNS_CLAIM_HELP, "Volumes")] = None,  # noqa: UP045
    runs_size: Annotated[str, _text("SIZE", RUNS_SIZE_HELP, "Volumes")] = "5Gi",
    data_size: Annotated[str, _text("SIZE", DATA_SIZE_HELP, "Volumes")] = "50Gi",
    journal_size: Annotated[str, _text("SIZE", JOURNAL_SIZE_HELP, "Volumes")] = "1Gi",
    storage_class: Annotated[Optional[str], _text("NAME", CLASS_HELP, "Volumes")] = None,  # noqa: UP045
) -> VolumeOptions:
    """Return the volume claims."""
    from switokd.deploying.options import VolumeOptions

    sizes = (runs_size, data_size, journal_size)
    return VolumeOptions(data_claim, runs_claim, *sizes, storage_class)


def tls_options(
    tls: Annotated[
        bool, typer.Option("--tls", help=TLS_HELP, rich_help_panel="TLS and tokens")
    ] = False,
    secrets_from: Annotated[
        Optional[Path],  # noqa: UP045
        _text("FOLDER", SECRETS_HELP, "TLS and tokens"),
    ] = None,
) -> TlsOptions:
    """Return whether the coordinator has TLS, and from which files."""
    from switokd.deploying.options import TlsOptions

    return TlsOptions(tls or secrets_from is not None, secrets_from)


def monitoring_options(
    prometheus_operator: Annotated[
        bool,
        typer.Option(
            "--prometheus-operator/--no-prometheus-operator",
            help=OPERATOR_HELP,
            rich_help_panel="Monitoring",
        ),
    ] = True,
    prometheus_namespace: Annotated[
        str, _text("NAME", PROMETHEUS_HELP, "Monitoring")
    ] = "monitoring",
    prometheus_label: Annotated[
        Optional[list[str]],  # noqa: UP045
        _text("KEY=VALUE", LABEL_HELP, "Monitoring"),
    ] = None,
) -> MonitoringOptions:
    """Return how Prometheus finds the coordinator."""
    from switokd.deploying.options import MonitoringOptions

    labels = tuple(prometheus_label or [])
    return MonitoringOptions(prometheus_operator, prometheus_namespace, labels)


@k8s.callback()
def _group() -> None:
    pass


@k8s.command(epilog=EPILOG, cls=CliCommand)
@option_groups(
    pods=pod_options, volumes=volume_options, access=tls_options, monitoring=monitoring_options
)
def render(
    recipe: RunFile,
    settings: Settings = None,
    image: Annotated[str, _text("IMAGE", IMAGE_HELP)] = "",
    flavor: Annotated[str, _text("job|jobset|trainjob", FLAVOR_HELP)] = "job",
    name: Annotated[Optional[str], _text("NAME", NAME_HELP)] = None,  # noqa: UP045
    namespace: Annotated[Optional[str], _text("NAME", NAMESPACE_HELP)] = None,  # noqa: UP045
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FOLDER", help=OUTPUT_HELP, show_default=False),
    ] = None,
    coordinator_image: Annotated[
        Optional[str],  # noqa: UP045
        _text("IMAGE", COORDINATOR_IMAGE_HELP),
    ] = None,
    verbose: Verbose = False,
    *,
    pods: Callable[[], PodOptions],
    volumes: Callable[[], VolumeOptions],
    access: Callable[[], TlsOptions],
    monitoring: Callable[[], MonitoringOptions],
) -> None:
    """Write the Kubernetes manifests that fit a run.

    For example, in a folder for 'kubectl apply -k', and straight to the cluster:

    switokd k8s render digits-2t1s --image switokd:1 --output manifests

    switokd k8s render mine.yaml --image switokd:1 | kubectl apply -f -

    A GPU for each of three ranks:

    switokd k8s render cifar100-2t1s --image switokd:1 --data-claim cifar
    --gpus-per-pod 1

    The ranks are those of the placement, in order. All pods are alike, and a
    pod's completion index says which ranks it has. A lost pod is made anew,
    and the run continues from its last checkpoint. A run file and single-file
    modules beside it travel in a ConfigMap. Nothing is sent to a cluster.
    """
    from switokd.deploying.options import RenderOptions
    from switokd.deploying.render import as_one, write
    from switokd.deploying.render import render as render_objects

    whole = (pods(), volumes(), access(), monitoring())
    options = RenderOptions(image, flavor, name, namespace, coordinator_image, *whole)
    try:
        _check_folder(output)
        rendered = render_objects(recipe, settings or [], options)
        if output is None:
            text = as_one(rendered)
            _say_notes(rendered)
            sys.stdout.write(text)
            return
        write(rendered, output, _without_output(sys.argv[1:]))
    except SwitokdError as error:
        fail(error)
    _say_notes(rendered)
    print(output)


def _check_folder(output: Path | None) -> None:
    """UsageError if --output is a file, before the memory of a pod is estimated."""
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file; name a folder")


def _say_notes(rendered: Rendered) -> None:
    for note in rendered.notes:
        say(note, "info")


def _without_output(words: list[str]) -> str:
    """Return the command for the comment; the folder is where the comment is."""
    kept = list(words)
    for i, word in reversed(list(enumerate(words))):
        if word in ("--output", "-o"):
            del kept[i : i + 2]
        elif word.startswith(("--output=", "-o")):
            del kept[i]
    return shlex.join(["switokd", *kept])
