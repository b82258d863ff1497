"""What the user of `switokd k8s render` asks for, checked as far as one option tells.

Not covered: whether the options fit the run (`facts.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from switokd.errors import UsageError, nearest

FLAVORS = ("job", "jobset", "trainjob")
MOST_LETTERS = 40
"""In the name of a deployment: 'NAME-workers-0-1234' is a host name, of at most 63 letters."""

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
_NAME = r"[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?"
_KEY_AND_VALUE = re.compile(rf"([a-z0-9][-.a-z0-9]*/)?{_NAME}=({_NAME})?", re.ASCII)
_QUANTITY = re.compile(r"[1-9][0-9]{0,8}(Mi|Gi|Ti)")


@dataclass(frozen=True)
class PodOptions:
    """How many pods, and what each of them has."""

    ranks: int | None = None
    """Ranks of the run, for a placement that fits any number."""
    ranks_per_pod: int | None = None
    gpus_per_pod: int | None = None
    cpus_per_rank: int = 1
    memory: str | None = None
    """Memory that a pod requests; None: estimated."""


@dataclass(frozen=True)
class VolumeOptions:
    """Volume claims: names of claims that exist, sizes of those that are made."""

    data_claim: str | None = None
    runs_claim: str | None = None
    runs_size: str = "5Gi"
    data_size: str = "50Gi"
    journal_size: str = "1Gi"
    storage_class: str | None = None


@dataclass(frozen=True)
class TlsOptions:
    """Whether the coordinator has TLS and tokens, and from which files Secrets are made."""

    tls: bool = False
    secrets_from: Path | None = None
    """Folder of `switokd certificates`."""


@dataclass(frozen=True)
class MonitoringOptions:
    """How Prometheus finds the coordinator."""

    operator: bool = True
    """Whether to make objects of the Prometheus Operator."""
    namespace: str = "monitoring"
    """Namespace of Prometheus, which may read the metrics."""
    labels: tuple[str, ...] = ()
    """KEY=VALUE by which the operator's Prometheus selects objects, such as release=prometheus."""


@dataclass(frozen=True)
class RenderOptions:
    """Everything that `switokd k8s render` is told beside run file and settings."""

    image: str
    flavor: str = "job"
    name: str | None = None
    namespace: str | None = None
    coordinator_image: str | None = None
    pods: PodOptions = field(default_factory=PodOptions)
    volumes: VolumeOptions = field(default_factory=VolumeOptions)
    tls: TlsOptions = field(default_factory=TlsOptions)
    monitoring: MonitoringOptions = field(default_factory=MonitoringOptions)

    def problems(self) -> list[str]:
        """Describe each option that has no allowed value, in one sentence each."""
        volumes, found = self.volumes, []
        if not self.image:
            found.append("--image is missing: name the image of the ranks, REGISTRY/NAME:TAG")
        for option, value in (("image", self.image), ("coordinator-image", self.coordinator_image)):
            if value and not re.fullmatch(r"[\w.:/@-]+", value):
                found.append(
                    f"--{option}: found {value!r}; allowed: REGISTRY/NAME:TAG, such as a:1"
                )
        if self.flavor not in FLAVORS:
            hint = nearest(self.flavor, FLAVORS)
            found.append(f"--flavor: found {self.flavor}; allowed: {', '.join(FLAVORS)}{hint}")
        for option, name, most in (
            ("name", self.name, MOST_LETTERS),
            ("namespace", self.namespace, 63),
            ("prometheus-namespace", self.monitoring.namespace, 63),
        ):
            if name is not None and not is_label(name, most):
                found.append(
                    f"--{option}: found {name!r}; allowed: a DNS label of at most {most} letters: "
                    "a-z, 0-9 and -, which begins with a letter and ends with no -"
                )
        for option, claim in (
            ("data-claim", volumes.data_claim),
            ("runs-claim", volumes.runs_claim),
            ("storage-class", volumes.storage_class),
        ):
            if claim is not None and not (_SUBDOMAIN.fullmatch(claim) and len(claim) <= 253):
                found.append(
                    f"--{option}: found {claim!r}; allowed: a name of Kubernetes: a-z, 0-9, - ."
                )
        for option, size in (
            ("memory", self.pods.memory),
            ("runs-size", volumes.runs_size),
            ("data-size", volumes.data_size),
            ("journal-size", volumes.journal_size),
        ):
            if size is not None and not _QUANTITY.fullmatch(size):
                found.append(
                    f"--{option}: found {size!r}; allowed: a whole number of Mi, Gi or Ti, as 4Gi"
                )
        wrong = [each for each in self.monitoring.labels if not _KEY_AND_VALUE.fullmatch(each)]
        found += [f"--prometheus-label: found {w!r}; allowed: KEY=VALUE, as a=b" for w in wrong]
        return found


def is_label(name: str, most: int = 63) -> bool:
    """Whether a name is a DNS label that begins with a letter, as a Service needs it."""
    return bool(_LABEL.fullmatch(name)) and len(name) <= most


def label_of(name: str) -> str:
    """Return the DNS label that is most like the name of a run; UsageError if there is none."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"run-{label}"
    if not is_label(label, MOST_LETTERS):
        raise UsageError(
            f"--name: {name}, the name of the run, is no DNS label of at most {MOST_LETTERS} "
            "letters; give another one with --name"
        )
    return label


def in_gibibytes(quantity: str) -> float:
    """Return a quantity such as 512Mi in GiB."""
    return int(quantity[:-2]) * {"Mi": 1 / 1024, "Gi": 1.0, "Ti": 1024.0}[quantity[-2:]]
