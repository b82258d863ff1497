"""The formats of an artefact: writes a network in a format, and loads the file again.

The ONNX program and the torch.export program come from the same trace of the network. They include
the normalisation, and take any batch size. Torch is imported only for the formats that need it.

Not covered: comparing a file with the network (`exporter.py`); GPUs (all formats use the CPU).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switokd.data.network_input import Floats
from switokd.data.signature import InputSignature
from switokd.errors import UsageError, first_line
from switokd.export.manifest import Format, Manifest
from switokd.plugins import add_import_folders

if TYPE_CHECKING:
    import torch

LogitsFunction = Callable[[Floats], Floats]
"""Maps float32 images `[B, C, H, W]` in [0, 1] to logits `[B, classes]`."""

NEEDS_TO_LOAD: dict[Format, tuple[str, ...]] = {"onnx": ("onnxruntime",)}
NEEDS_TO_WRITE: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
FIRST_WITH_ONNX_FROM_TRACE = "2.9"
"""PyTorch version since which its ONNX exporter for traced programs is used. The exporter of older
versions fails with current versions of onnxscript."""


def missing(format: Format, to_write: bool = False) -> str:
    """Return a package that the format needs and that is not installed; "" if there is none."""
    needs = (NEEDS_TO_WRITE if to_write else NEEDS_TO_LOAD).get(format, ())
    return next((package for package in needs if find_spec(package) is None), "")


def check_installed(format: Format, to_write: bool = False) -> None:
    """Raise UsageError, with the command to install it, if a package of the format is missing."""
    if package := missing(format, to_write):
        others = "state-dict,torch-export" if to_write else "torch-export"
        option = "--formats" if to_write else "--format"
        raise UsageError(
            f"{format} needs the package {package}: pip install 'switokd[export]', or use "
            f"{option} {others}"
        )


def load(format: Format, path: Path, manifest: Manifest) -> LogitsFunction:
    """Load a file of an artefact; UsageError if a package is missing or the file is broken."""
    check_installed(format)
    if format == "onnx":
        return _load_onnx(path)
    if format == "torch-export":
        return _load_torch_export(path)
    return _load_state_dict(path, manifest)


def trace(network: torch.nn.Module, signature: InputSignature) -> torch.export.ExportedProgram:
    """Trace the network in evaluation mode; the program maps images in [0, 1] to logits."""
    import torch

    example = torch.zeros(2, *signature.shape)  # with a batch of 1 the batch size becomes constant
    batch = torch.export.Dim("batch", min=1)
    model = with_normalisation(network, signature).eval()
    # strict=False works for more networks, and is the default in later versions of torch.
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)


def write(
    format: Format, path: Path, network: torch.nn.Module, program: Any, signature: InputSignature
) -> None:
    """Write a network to `path` in one format.

    program: the result of `trace`; the format state-dict does not use it.
    """
    import torch

    if format == "state-dict":
        from switokd.models.own_state import state_to_save

        torch.save(state_to_save(network, "the network"), path)
    elif format == "torch-export":
        torch.export.save(program, path)
    elif torch.__version__ >= FIRST_WITH_ONNX_FROM_TRACE:
        _write_onnx(path, program)
    else:
        _write_onnx_by_torchscript(path, with_normalisation(network, signature).eval(), signature)


def _write_onnx(path: Path, program: torch.export.ExportedProgram) -> None:
    import onnx
    import torch

    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),  # a traced program needs only the name of the axis
        verbose=False,
    )
    assert written is not None, "dynamo=True gives a program"
    written.save(str(path))  # one file, unless it exceeds the 2 GB limit of an ONNX file
    onnx.checker.check_model(str(path))


def _write_onnx_by_torchscript(
    path: Path, model: torch.nn.Module, signature: InputSignature
) -> None:
    """Write ONNX with an older PyTorch; `trace` has shown that the network can be traced."""
    import onnx
    import torch

    torch.onnx.export(
        model,
        (torch.zeros(2, *signature.shape),),
        str(path),
        dynamo=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )
    onnx.checker.check_model(str(path))


def with_normalisation(network: torch.nn.Module, signature: InputSignature) -> torch.nn.Module:
    """Return a module that normalises images and calls `network`.

    If the normalisation is unknown, `network` itself is returned.
    """
    import torch

    class Normalised(torch.nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("mean", torch.tensor(signature.mean)[:, None, None])
            self.register_buffer("std", torch.tensor(signature.std)[:, None, None])

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            z: torch.Tensor = self.network((images - self.mean) / self.std)
            return z

    return Normalised() if signature.mean else network


@contextmanager
def quietly() -> Iterator[None]:
    """Silence warnings and logs of the exporters in the block: the user cannot act on them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _load_onnx(path: Path) -> LogitsFunction:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings are about processors, not the network
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # exceptions of onnxruntime have no common base
        raise _load_error(path, error, "onnxruntime", onnxruntime.__version__) from None
    (name,) = (node.name for node in session.get_inputs())

    def run(images: Floats) -> Floats:
        logits: Floats = session.run(None, {name: images})[0]
        return logits

    return run


def _load_torch_export(path: Path) -> LogitsFunction:
    import torch

    try:
        with quietly():
            module = torch.export.load(path).module()
    except Exception as error:  # reading an archive fails in many ways
        raise _load_error(path, error, "torch", torch.__version__) from None
    return _logits_function(module)


def _load_state_dict(path: Path, manifest: Manifest) -> LogitsFunction:
    from switokd.export.trained import build
    from switokd.models.given_weights import load_weights

    add_import_folders([*manifest.import_from, os.getcwd()])
    signature = manifest.signature
    network = build(manifest.model, manifest.model_kwargs, signature, manifest.output)
    load_weights(network, path, f"the artefact's {manifest.network}")
    return _logits_function(with_normalisation(network, signature).eval())


def _logits_function(module: torch.nn.Module) -> LogitsFunction:
    import torch

    def run(images: Floats) -> Floats:
        with torch.no_grad():
            logits: Floats = module(torch.from_numpy(images).clone()).numpy()
        return logits

    return run


def _load_error(path: Path, error: Exception, package: str, version: str) -> UsageError:
    return UsageError(
        f"{path} cannot be loaded with {package} {version}: {reason_of(error)}; artefact.json "
        "says which version wrote it"
    )


def reason_of(error: BaseException) -> str:
    """Return the first line of the error that caused `error`, following the chain of causes."""
    while error.__cause__:
        error = error.__cause__
    return first_line(error)
