"""Conversion of a network to one ONNX file, and comparison of its outputs in onnxruntime with torch's."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...common.config import missing_packages
from ...common.errors import PredictError
from ...sam import preprocessing_recipe
from ...store.spec import package_versions
from ..model import Model

TOOLS = ("onnx", "onnxscript", "onnxruntime")
FORMAT = "mobilesam onnx 1"
_METADATA_BYTES = 1 << 14
"""Bytes at a file's end that hold its metadata."""

MAX_BYTES = 2**31 - 2**20
"""Largest size in bytes of an ONNX file's weights: a protobuf message is limited to 2 GiB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OnnxFile:
    """Content of an ONNX file, and result of its comparison with torch."""

    data: bytes
    max_relative_difference: float
    """Largest difference of an output from torch's, relative to the output's largest magnitude."""
    limit: float
    """Largest relative difference allowed."""

    def check(self) -> dict[str, float]:
        """Return the comparison as JSON values."""
        return {"max_relative_difference": self.max_relative_difference, "limit": self.limit}


def check_tools() -> None:
    """Raise PredictError if packages that an ONNX export and its check need aren't installed."""
    missing = missing_packages(TOOLS)
    if missing:
        raise PredictError(
            f"an ONNX export needs {' and '.join(missing)}, not installed here: pip install 'mobilesam[export]'"
        )


def to_onnx(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    what: str,
) -> Any:
    """Convert a network to ONNX by torch.export.

    Args:
        network: network in evaluation mode, on the CPU.
        inputs: example tensors by input name, in the order of the network's arguments; dynamic axes have length 2 or
            more.
        outputs: names of the outputs, in order.
        dynamic: names of the dynamic axes, by input and axis; axes of the same name have the same length.
        what: description of the network, for messages.

    Returns:
        An onnx.ModelProto.

    Raises:
        PredictError: torch can't export the network, or it is too large for one file.
    """
    size = sum(value.nbytes for value in network.state_dict().values())
    if size > MAX_BYTES:
        raise PredictError(
            f"{what} has {size:,} bytes of weights, an ONNX file holds at most {MAX_BYTES:,}: give a smaller student"
        )
    dims = {name: torch.export.Dim(name) for axes in dynamic.values() for name in axes.values()}
    shapes = [{axis: dims[name] for axis, name in dynamic.get(key, {}).items()} or None for key in inputs]
    try:
        # With other attention backends torch.export records strides that the decomposition for ONNX doesn't keep.
        with _quiet(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            program = torch.onnx.export(
                network,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple(shapes),
                verbose=False,
            )
    # A student may be any of timm's networks, for which the exporter may raise any exception.
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise PredictError(f"torch can't export {what} to ONNX: {reason[0][:200]}") from error
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warnings about its own deprecations, and the graphs that it prints when it retries."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def serialize(proto: Any, part: str, model: Model, description: str) -> bytes:
    """Return the file's content: `proto` with metadata, and without paths of this machine.

    Args:
        proto: an onnx.ModelProto; changed in place.
        part: name of the half of the model, for the metadata.
        model: model that the metadata describes.
        description: description of inputs and outputs; becomes the file's doc string.
    """
    from onnx import helper

    for noted in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        noted.ClearField("metadata_props")  # torch's own, with stack traces of this machine
    proto.doc_string = description
    helper.set_model_props(proto, {**_metadata(model), "part": part})
    data: bytes = proto.SerializeToString()
    return data


def _metadata(model: Model) -> dict[str, str]:
    """Return the file's metadata as strings: names unchanged, other values as JSON."""
    known = {key: model.info[key] for key in ("teacher", "checkpoint_sha256") if key in model.info}
    return {
        "format": FORMAT,
        "student": model.student,
        "image_size": str(model.image_size),
        "preprocessing": json.dumps(preprocessing_recipe(model.image_size)),
        **{key: str(value) for key, value in known.items()},
        "versions": json.dumps(versions()),
    }


def is_older_onnx(path: Path) -> bool:
    """Return True if the file is an ONNX file that a version of mobilesam without marks exported."""
    entry = b"\n\x06format\x12" + bytes([len(FORMAT)]) + FORMAT.encode()
    with open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _METADATA_BYTES, 0))
        return path.suffix.lower() == ".onnx" and entry in file.read()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that make the files."""
    return package_versions(("torch", *TOOLS))


def rename_axes(proto: Any, names: Mapping[str, str]) -> None:
    """Rename dynamic axes of all inputs, outputs and values.

    Args:
        proto: an onnx.ModelProto; changed in place.
        names: new names by the names that torch has given.
    """
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


class Session:
    """onnxruntime session of an ONNX file's content, on the CPU, with as many threads as torch."""

    def __init__(self, data: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the network on tensors by input name, and return its outputs in order."""
        arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
        return [torch.from_numpy(array) for array in self._session.run(None, arrays)]


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest magnitude in `wanted`.

    Args:
        found: tensor to check.
        wanted: reference of the same shape.

    Returns:
        The relative difference; infinite if shapes differ or a value isn't finite.
    """
    if found.shape != wanted.shape:
        return float("inf")
    scale = float(wanted.abs().max())
    difference = float((found.double() - wanted.double()).abs().max()) / max(scale, 1e-30)
    return difference if difference == difference else float("inf")


def check_difference(name: str, difference: float, limit: float) -> None:
    """Refuse an ONNX file that differs too much from torch.

    Args:
        name: the file's name, for the message.
        difference: relative difference of its outputs from torch's.
        limit: largest difference allowed.

    Raises:
        PredictError: the difference is above the limit.
    """
    if difference > limit:
        raise PredictError(
            f"{name} differs from torch: its relative difference is {difference:.2g}, the limit {limit:.2g}; "
            "it was not written. Another version of torch or onnxruntime may do better"
        )
