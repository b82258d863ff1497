"""Exports a trained network: writes files in several formats, and compares each with the network.

The comparison uses images of the run's test set, in batches of different sizes. The network gets
the images as in the evaluation during training; the exported file gets them as a user gives them.
If the logits differ by more than the tolerance, the export fails and leaves no files.

Not covered: the formats themselves (`formats.py`); using an artefact (`artefact.py`).
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from switokd.data.images import open_images
from switokd.data.network_input import Floats
from switokd.data.signature import InputSignature
from switokd.errors import SwitokdError, UsageError, nearest
from switokd.export import formats
from switokd.export.formats import LogitsFunction
from switokd.export.manifest import (
    FILES,
    CheckedFile,
    Format,
    Manifest,
    WeightsChoice,
    sha256,
)
from switokd.export.trained import TrainedNetwork, load_trained
from switokd.models import registry

FULL_BYTES = 2**20
"""Free bytes of a disk that counts as full."""
TOLERANCE = 1e-4
"""Largest allowed difference, relative to the largest logit or to 1, whichever is larger.
It covers some rounding errors of float32."""

MAX_IMAGES = 256
"""Number of images of the test set that are compared, at most."""

PACKAGES = ("switokd", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime")

Scaling = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, each one number or one per channel."""


def export(
    run: str | Path,
    network: str | None = None,
    wanted: Sequence[str] = tuple(FILES),
    weights: WeightsChoice = "last",
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    scaling: Scaling | None = None,
) -> Path:
    """Export a network from the run folder `run`; return the folder of the artefact.

    network: name of the network; None: the student, if the run has only one.
    wanted: formats, any of onnx, torch-export, state-dict.
    weights: last, best, ema or initial; the run must have saved them.
    out: folder of the artefact, new or empty; None: RUN/export/NETWORK.
    settings: KEY.KEY=VALUE that replace settings of the run, such as data.root for moved data.
    scaling: mean and standard deviation by which a data set of floats normalises values in [0, 1].

    Raises UsageError for a mistake in the arguments, and SwitokdError if an exported file differs
    from the network.
    """
    chosen = _formats(wanted)
    trained = load_trained(Path(run), network, weights, settings)
    if scaling:
        trained = replace(trained, signature=trained.signature.with_scaling(*scaling))
    target = Path(out) if out is not None else trained.run_folder / "export" / trained.name
    if os.path.exists(target) and (not os.path.isdir(target) or any(target.iterdir())):
        raise UsageError(f"{target} exists and is never overwritten; remove it, or use --out")
    reference = make_reference(trained)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A temporary folder, so that an artefact that is not fully checked never appears.
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UsageError(
            f"{target} cannot be created: {error.strerror}; name another folder with --out"
        ) from None
    try:
        write_checked(partial, trained, reference, chosen)
        partial.chmod(target.parent.stat().st_mode)  # mkdtemp gives access to the owner only
        with suppress(FileNotFoundError):
            target.rmdir()  # fails if the folder is not empty
        partial.rename(target)
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written: {error.strerror or error}; name another folder with --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _formats(wanted: Sequence[str]) -> list[Format]:
    """Return the formats `wanted`; UsageError if one is unknown or its package is missing."""
    unknown = [name for name in wanted if name not in FILES]
    if unknown or not wanted:
        mistake = unknown[0] if unknown else ""
        raise UsageError(
            f"--formats: found {mistake!r}{nearest(mistake, FILES)}; allowed: {', '.join(FILES)}, "
            "separated by commas"
        )
    chosen: list[Format] = [name for name in FILES if name in wanted]
    for name in chosen:
        formats.check_installed(name, to_write=True)
    return chosen


@dataclass(frozen=True)
class Reference:
    """Images with the logits of the trained network, with which exported files are compared."""

    images: Floats
    """`[N, C, H, W]`, as an exported file takes them."""
    logits: Floats
    """`[N, classes]`, computed by the trained network."""
    description: str
    """Description of the images."""


def make_reference(trained: TrainedNetwork) -> Reference:
    """Compute logits for images from the whole test set, or random images if it is not present."""
    signature = trained.signature
    try:
        data = trained.config.data.model_copy(update={"workers": 0, "download": False})
        images = open_images(data, trained.config.seed)
    except UsageError as error:
        raw, normalised = _random_images(signature)
        description = f"{len(raw)} random images, as the data set could not be opened ({error})"
        return Reference(raw.numpy(), _logits(trained.network, normalised), description)
    if images.shape != signature.shape or images.classes != signature.classes:
        raise UsageError(
            f"data.dataset {trained.config.data.dataset} has changed since the run: images of "
            f"shape {images.shape} in {images.classes} classes, in the run {signature.shape} in "
            f"{signature.classes}"
        )
    n = len(images.sources.test)
    interval = -(-n // MAX_IMAGES)
    indices = list(range(0, n, interval))
    raw, _ = images.sources.test.fetch(indices, np.zeros(len(indices), dtype=np.uint64))
    normalised = torch.cat([x for x, _ in images.test(batch_size=1, index=0, of=interval)])
    return Reference(
        _from_zero_to_one(raw, signature).numpy(),
        _logits(trained.network, normalised),
        f"{len(indices)} of {n} images of the test set",
    )


def _from_zero_to_one(raw: Tensor, signature: InputSignature) -> Tensor:
    """Convert images of the data set to float images in [0, 1], as an exported file takes them."""
    if not raw.is_floating_point():
        return raw.float() / 255
    if not signature.mean:
        return raw.float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (signature.mean, signature.std))
    images = raw.float() * std + mean
    low, high = float(images.min()), float(images.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise UsageError(
            f"--mean, --std: with these, the images of the data set had values from {low:.3g} to "
            f"{high:.3g} before normalisation, and not from 0 to 1; give the values that the data "
            "set uses"
        )
    return images


def _random_images(signature: InputSignature) -> tuple[Tensor, Tensor]:
    """Make random images in [0, 1]; return them, and the same images normalised."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(MAX_IMAGES // 4, *signature.shape, generator=generator)
    if not signature.mean:
        return images, images
    mean, std = (torch.tensor(v)[:, None, None] for v in (signature.mean, signature.std))
    return images, (images - mean) / std


@torch.no_grad()
def _logits(network: torch.nn.Module, normalised: Tensor) -> Floats:
    # Clones, because a network may change its input in place.
    logits: Floats = torch.cat([network(x.clone()) for x in torch.split(normalised, 32)]).numpy()
    return logits


def write_checked(
    folder: Path, trained: TrainedNetwork, reference: Reference, wanted: Sequence[Format]
) -> None:
    """Write the formats `wanted` into `folder`, check each file, and write the manifest last."""
    model, config = trained.config.networks[trained.name], trained.config
    manifest = Manifest(
        network=trained.name,
        role=model.role,
        model=model.model,
        model_kwargs=model.model_kwargs,
        output=model.output,
        import_from=config.import_from,
        parameters=registry.parameter_count(trained.network),
        run=config.name,
        strategy=config.distillation.strategy,
        weights=trained.weights,
        top1=trained.top1,
        signature=trained.signature,
        checked_on=reference.description,
        files={},
        versions=_versions(),
    )
    program, files = None, {}
    for name in wanted:
        path = folder / FILES[name]
        try:
            with formats.quietly():
                if program is None and name != "state-dict":
                    program = formats.trace(trained.network, trained.signature)
                formats.write(name, path, trained.network, program, trained.signature)
        except OSError:
            raise
        except Exception as error:  # tracing a network can raise any exception
            if shutil.disk_usage(folder).free < FULL_BYTES:  # PyTorch's own error does not say so
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise UsageError(
                f"network {trained.name} ({model.model}) cannot be written as {name}: "
                f"{formats.reason_of(error)}; leave this format out with "
                "--formats (state-dict always works)"
            ) from error
        files[name] = check(path, name, manifest, reference)
    manifest.model_copy(update={"files": files}).save(folder)


def check(path: Path, name: Format, manifest: Manifest, reference: Reference) -> CheckedFile:
    """Compare an exported file with the trained network; SwitokdError if they differ."""
    with formats.quietly():
        logits = _in_batches(formats.load(name, path, manifest), reference.images)
    difference = float(np.abs(logits - reference.logits).max())
    tolerance = TOLERANCE * max(1.0, float(np.abs(reference.logits).max()))
    same = float((logits.argmax(axis=1) == reference.logits.argmax(axis=1)).mean())
    if not difference <= tolerance:  # NaN as well
        raise SwitokdError(
            f"network {manifest.network} as {name} differs from the trained network: logits by up "
            f"to {difference:.3g} (allowed {tolerance:.3g}), the same class for {same:.1%} of "
            f"{manifest.checked_on}; nothing was exported"
        )
    takes = manifest.signature.takes
    if name == "state-dict":
        takes = "the network without normalisation: give it (image - mean) / std"
    return CheckedFile(
        file=path.name,
        sha256=sha256(path),
        takes=takes,
        max_difference=difference,
        tolerance=tolerance,
        same_class=same,
    )


def _in_batches(compute: LogitsFunction, images: Floats) -> Floats:
    """Compute the logits of all images in batches of different sizes: 1, then 32, then the rest."""
    cuts = [1, *range(33, len(images), 32)]
    return np.concatenate([compute(part) for part in np.split(images, cuts) if len(part)])


def _versions() -> dict[str, str]:
    """Return the versions of those `PACKAGES` that are installed."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
