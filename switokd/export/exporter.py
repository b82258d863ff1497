"""Exporting a trained network: the formats wanted, each checked against the live network.

The check runs on images of the run's test set, in batches of different sizes; the network gets
them as training's own evaluation does, the exported file as a user gives them. What differs by
more than the tolerance is an error, and then nothing is left.

Not covered: the formats themselves (`formats.py`); using what was exported (`artefact.py`).
"""

from __future__ import annotations

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
from switokd.data.pictures import Floats
from switokd.data.signature import InputSignature
from switokd.errors import SwitokdError, UsageError, nearest
from switokd.export import formats
from switokd.export.manifest import (
    FILES,
    CheckedFile,
    Format,
    Manifest,
    Program,
    WeightsChoice,
    sha256,
)
from switokd.export.trained import Trained, load_trained
from switokd.models import registry

TOLERANCE = 1e-4
"""Of the largest logit, or of 1 where that is smaller: some roundings of float32."""

SAMPLES = 256
"""Images of the test set that are compared, at most."""

PACKAGES = ("switokd", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime")

Scaling = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, per channel or one for all."""


def export(
    run: str | Path,
    network: str | None = None,
    wanted: Sequence[str] = tuple(FILES),
    weights: WeightsChoice = "last",
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    scaling: Scaling | None = None,
) -> Path:
    """Export a network of the run in folder `run`; returns the artefact's folder.

    network: its name; by default the run's only student.
    wanted: formats, of onnx, torch-export, state-dict.
    weights: last, best, ema or initial, if the run kept those.
    out: a folder that is new or empty; by default RUN/export/NETWORK.
    settings: key.key=value on top of the run's, such as data.root, for data that has moved.
    scaling: how a data set of floats normalises values in [0, 1]; unknown to us.

    UsageError for a mistake, SwitokdError if an exported file differs from the network.
    """
    chosen = _formats(wanted)
    trained = load_trained(Path(run), network, weights, settings)
    if scaling:
        trained = replace(trained, signature=trained.signature.with_scaling(*scaling))
    target = Path(out) if out is not None else trained.run / "export" / trained.name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is there already and is never overwritten; remove it, or --out")
    samples = draw_samples(trained)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that what is not checked to the end is never in it.
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UsageError(f"{target} cannot be made: {error.strerror}") from None
    try:
        write_checked(partial, trained, samples, chosen)
        partial.chmod(target.parent.stat().st_mode)  # mkdtemp's is for its owner alone
        with suppress(FileNotFoundError):
            target.rmdir()  # empty, or this fails
        partial.rename(target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _formats(wanted: Sequence[str]) -> list[Format]:
    """The formats wanted; UsageError if one is unknown or its package is missing."""
    unknown = [name for name in wanted if name not in FILES]
    if unknown or not wanted:
        found = unknown[0] if unknown else ""
        raise UsageError(
            f"--formats: found {found!r}{nearest(found, FILES)}; allowed: {', '.join(FILES)}, "
            "with commas between"
        )
    chosen: list[Format] = [name for name in FILES if name in wanted]
    for name in chosen:
        formats.check_installed(name, to_write=True)
    return chosen


@dataclass(frozen=True)
class Samples:
    """Images to compare on, and what the trained network says to them."""

    given: Floats
    """`[N, C, H, W]` as an exported file takes them."""
    logits: Floats
    """`[N, classes]`, of the live network."""
    words: str
    """Which images these are."""


def draw_samples(trained: Trained) -> Samples:
    """Images from all over the run's test set; made-up ones if the data set is not there."""
    signature = trained.signature
    try:
        data = trained.config.data.model_copy(update={"workers": 0, "download": False})
        images = open_images(data, trained.config.seed)
    except UsageError as error:
        given, ready = _made_up(signature)
        words = f"{len(given)} made-up images, as the data set could not be opened ({error})"
        return Samples(given.numpy(), _logits(trained.network, ready), words)
    if images.shape != signature.shape or images.classes != signature.classes:
        raise UsageError(
            f"data.dataset {trained.config.data.dataset} has changed since the run: images of "
            f"{images.shape} in {images.classes} classes, and the run had {signature.shape} in "
            f"{signature.classes}"
        )
    n = len(images.sources.test)
    every = -(-n // SAMPLES)
    indices = list(range(0, n, every))
    raw, _ = images.sources.test.fetch(indices, np.zeros(len(indices), dtype=np.uint64))
    ready = torch.cat([x for x, _ in images.test(batch_size=1, index=0, of=every)])
    words = f"{len(indices)} of the test set's {n} images"
    return Samples(_as_given(raw, signature).numpy(), _logits(trained.network, ready), words)


def _as_given(raw: Tensor, signature: InputSignature) -> Tensor:
    """What a data set returns, as a user of the exported file would give it."""
    if not raw.is_floating_point():
        return raw.float() / 255
    if not signature.mean:
        return raw.float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (signature.mean, signature.std))
    given = raw.float() * std + mean
    low, high = float(given.min()), float(given.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise UsageError(
            f"--mean, --std: by these the data set's images had values from {low:.3g} to "
            f"{high:.3g} before it normalised them, and not from 0 to 1; give those that it uses"
        )
    return given


def _made_up(signature: InputSignature) -> tuple[Tensor, Tensor]:
    """Random images, as an exported file takes them and as the network does."""
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(SAMPLES // 4, *signature.shape, generator=generator)
    if not signature.mean:
        return given, given
    mean, std = (torch.tensor(v)[:, None, None] for v in (signature.mean, signature.std))
    return given, (given - mean) / std


@torch.no_grad()
def _logits(network: torch.nn.Module, ready: Tensor) -> Floats:
    logits: Floats = torch.cat([network(x) for x in torch.split(ready, 32)]).numpy()
    return logits


def write_checked(
    folder: Path, trained: Trained, samples: Samples, wanted: Sequence[Format]
) -> None:
    """Write the formats wanted into `folder`, check each, and write the manifest last."""
    model, config = trained.config.networks[trained.name], trained.config
    manifest = Manifest(
        network=trained.name,
        role=model.role,
        model=model.model,
        model_kwargs=model.model_kwargs,
        import_from=config.import_from,
        parameters=registry.parameter_count(trained.network),
        run=config.name,
        strategy=config.distillation.strategy,
        weights=trained.weights,
        top1=trained.top1,
        signature=trained.signature,
        checked_on=samples.words,
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
        except Exception as error:  # a tracer fails in as many ways as there are networks
            raise UsageError(
                f"network {trained.name} ({model.model}) cannot be written as {name}: "
                f"{formats.reason_of(error)}; leave that out with "
                "--formats (state-dict always works)"
            ) from error
        files[name] = check(path, name, manifest, samples)
    manifest.model_copy(update={"files": files}).save(folder)


def check(path: Path, name: Format, manifest: Manifest, samples: Samples) -> CheckedFile:
    """Compare one written file with the live network; SwitokdError if they differ."""
    with formats.quietly():
        logits = _in_batches(formats.open_program(name, path, manifest), samples.given)
    difference = float(np.abs(logits - samples.logits).max())
    tolerance = TOLERANCE * max(1.0, float(np.abs(samples.logits).max()))
    same = float((logits.argmax(axis=1) == samples.logits.argmax(axis=1)).mean())
    if not difference <= tolerance:  # NaN as well
        raise SwitokdError(
            f"network {manifest.network} as {name} differs from the trained one: logits by up to "
            f"{difference:.3g} (allowed {tolerance:.3g}), the same class for {same:.1%} of "
            f"{manifest.checked_on}; nothing was exported"
        )
    takes = manifest.signature.takes
    if name == "state-dict":
        takes = "the bare network's weights: (image - signature.mean) / signature.std is yours"
    return CheckedFile(
        file=path.name,
        sha256=sha256(path),
        takes=takes,
        max_difference=difference,
        tolerance=tolerance,
        same_class=same,
    )


def _in_batches(run: Program, images: Floats) -> Floats:
    """Logits of all images: one alone first, then the others, so that batch sizes differ."""
    cuts = [1, *range(33, len(images), 32)]
    return np.concatenate([run(part) for part in np.split(images, cuts) if len(part)])


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
