"""The formats of an artefact: writing a network in each, and opening what was written.

Both programs are made of one trace, with the normalisation inside and the batch size free.

Not covered: checking them (`exporter.py`); GPUs (programs are written and opened on the CPU).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switokd.data.pictures import Floats
from switokd.data.signature import InputSignature
from switokd.errors import UsageError, first_line
from switokd.export.manifest import Format, Manifest, Program
from switokd.plugins import add_import_folders

if TYPE_CHECKING:
    import torch

NEEDS: dict[Format, tuple[str, ...]] = {"onnx": ("onnxruntime",)}
FIRST_WITH_ONNX_FROM_TRACE = "2.9"
"""Of PyTorch: where its newer exporter became the default. 2.6's fails with today's onnxscript."""
NEEDS_TO_WRITE: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


def missing(format: Format, to_write: bool = False) -> str:
    """The package that a format needs and that is not installed; empty if there is none."""
    needs = (NEEDS_TO_WRITE if to_write else NEEDS).get(format, ())
    return next((package for package in needs if find_spec(package) is None), "")


def check_installed(format: Format, to_write: bool = False) -> None:
    """UsageError, saying how to install it, if a package that a format needs is missing."""
    if package := missing(format, to_write):
        others = "state-dict,torch-export" if to_write else "torch-export"
        option = "--formats" if to_write else "--format"
        raise UsageError(
            f"{format} needs the package {package}: pip install 'switokd[export]', or use "
            f"{option} {others}"
        )


def open_program(format: Format, path: Path, manifest: Manifest) -> Program:
    """Make a written file ready to use; UsageError if that cannot be."""
    check_installed(format)
    if format == "onnx":
        return _open_onnx(path)
    if format == "torch-export":
        return _open_torch_export(path)
    return _open_state_dict(path, manifest)


def trace(network: torch.nn.Module, signature: InputSignature) -> torch.export.ExportedProgram:
    """The network in evaluation mode as a program, from images in [0, 1] to logits."""
    import torch

    example = torch.zeros(2, *signature.shape)  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch", min=1)
    whole = normalised(network, signature).eval()
    # strict=False: fewer networks fail, and it is the default of later versions of torch.
    return torch.export.export(whole, (example,), dynamic_shapes=({0: batch},), strict=False)


def write(
    format: Format, path: Path, network: torch.nn.Module, program: Any, signature: InputSignature
) -> None:
    """Write a network in one format. program: of `trace`; not used by state-dict."""
    import torch

    if format == "state-dict":
        torch.save({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    elif format == "torch-export":
        torch.export.save(program, path)
    elif torch.__version__ >= FIRST_WITH_ONNX_FROM_TRACE:
        _write_onnx(path, program)
    else:
        _write_onnx_by_torchscript(path, normalised(network, signature).eval(), signature)


def _write_onnx(path: Path, program: torch.export.ExportedProgram) -> None:
    import onnx
    import torch

    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),  # of a traced program, the axis's name alone
        verbose=False,
    )
    assert written is not None, "dynamo=True gives a program"
    written.save(str(path))  # one file, unless it is beyond the 2 GB of an ONNX file
    onnx.checker.check_model(str(path))


def _write_onnx_by_torchscript(
    path: Path, whole: torch.nn.Module, signature: InputSignature
) -> None:
    """For older PyTorch. That the network can be traced at all, `trace` has shown before."""
    import onnx
    import torch

    torch.onnx.export(
        whole,
        (torch.zeros(2, *signature.shape),),
        str(path),
        dynamo=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )
    onnx.checker.check_model(str(path))


def normalised(network: torch.nn.Module, signature: InputSignature) -> torch.nn.Module:
    """The network behind its normalisation, where that is known."""
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
    """Without the exporters' own warnings and log lines, which are not the user's to mend."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _open_onnx(path: Path) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are about processors, not the network
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions share no base
        raise _unusable(path, error, "onnxruntime", onnxruntime.__version__) from None
    (name,) = (each.name for each in session.get_inputs())

    def run(images: Floats) -> Floats:
        logits: Floats = session.run(None, {name: images})[0]
        return logits

    return run


def _open_torch_export(path: Path) -> Program:
    import torch

    try:
        with quietly():
            module = torch.export.load(path).module()
    except Exception as error:  # reading an archive fails in many ways
        raise _unusable(path, error, "torch", torch.__version__) from None
    return _runner(module)


def _open_state_dict(path: Path, manifest: Manifest) -> Program:
    from switokd.export.trained import build
    from switokd.models import registry

    add_import_folders([*manifest.import_from, os.getcwd()])
    signature = manifest.signature
    network = build(manifest.model, manifest.model_kwargs, signature)
    registry.load_weights(network, path, f"the artefact's {manifest.network}")
    return _runner(normalised(network, signature).eval())


def _runner(module: torch.nn.Module) -> Program:
    import torch

    def run(images: Floats) -> Floats:
        with torch.no_grad():
            logits: Floats = module(torch.from_numpy(images)).numpy()
        return logits

    return run


def _unusable(path: Path, error: Exception, package: str, version: str) -> UsageError:
    return UsageError(
        f"{path} cannot be opened with {package} {version}: {reason_of(error)}; artefact.json "
        "says which version wrote it"
    )


def reason_of(error: BaseException) -> str:
    """The first line of what an exporter says, of the error that was the first one."""
    while error.__cause__:
        error = error.__cause__
    return first_line(error)
