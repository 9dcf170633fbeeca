"""Conversion of a network to one ONNX file, and comparison of its outputs in onnxruntime with torch's."""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
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


OPSET = 18
"""Version of ONNX's operators. 18 is the lowest that torch's exporter translates to by itself; TensorRT, browsers and
phones know a version years after it came out. It has no Gelu, which is written with Erf."""

IR_VERSION = 8
"""Version of the file format, of the same age as OPSET; the files use nothing newer."""

OLDEST_RUNTIME = "1.14"
"""Oldest onnxruntime that reads files of OPSET and IR_VERSION, by its table of versions; 1.15.0 was tried."""

FOLDED_BYTES = 1 << 28
"""Largest size of a constant that is computed at export."""

STEPS = ("conversion to ONNX", "comparison with torch", "trial of quantisation and half precision")
"""Steps of an ONNX export."""

Begin = Callable[[str], None]
"""Function called with the name of a step that begins."""


def silent(_: str) -> None:
    """Show no progress."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OnnxFile:
    """Content of an ONNX file, and result of its comparison with torch."""

    data: bytes
    max_relative_difference: float
    """Largest difference of an output from torch's, relative to the output's largest magnitude."""
    limit: float
    """Largest relative difference allowed."""
    notes: Sequence[str] = ()
    """Limits, one sentence each: operators that other runtimes may lack, tools of onnxruntime that fail on it."""

    def check(self) -> dict[str, float]:
        """Return the comparison as JSON values."""
        return {"max_relative_difference": self.max_relative_difference, "limit": self.limit}

    def format(self) -> dict[str, Any]:
        """Return the file's format and its limits as JSON values."""
        return {
            "opset": OPSET,
            "ir_version": IR_VERSION,
            "oldest_onnxruntime": OLDEST_RUNTIME,
            "notes": list(self.notes),
        }


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
        with quiet(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            program = torch.onnx.export(
                network,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                custom_translation_table={
                    torch.ops.aten.scaled_dot_product_attention.default: _attention,
                    torch.ops.aten.div.Tensor_mode: _divide,
                },
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
    return _simplify(program.model)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate `F.scaled_dot_product_attention` to ONNX.

    The exporter's own translation takes the key apart by its shape, which onnxruntime's symbolic shape inference, the
    first step of its quantisation, can't follow.
    """
    from onnxscript import ir
    from onnxscript import opset18 as op

    if is_causal or enable_gqa:
        raise PredictError("causal and grouped attention, which no image encoder here has")
    axes = list(range(len(key.shape)))
    root = key.shape[-1] ** -0.5 if scale is None else scale
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=float(root)), query))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]]))
    if attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            shut = op.CastLike(op.Constant(value_float=float("-inf")), query)
            attn_mask = op.Where(attn_mask, op.CastLike(op.Constant(value_float=0.0), query), shut)
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _divide(self: Any, other: Any, rounding_mode: str | None = None) -> Any:
    """Translate `torch.div` to ONNX: of integers exactly, where the exporter's own translation goes by float32."""
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops.core import aten_div_mode

    if rounding_mode == "trunc" and self.dtype.is_integer() and other.dtype.is_integer():
        return op.Div(self, other)
    return aten_div_mode(self, other, rounding_mode)


def _simplify(model: Any) -> Any:
    """Compute constant parts, fuse and remove nodes, and set the format's version.

    Args:
        model: an onnxscript.ir.Model, as torch's exporter makes it; changed in place.

    Returns:
        An onnx.ModelProto.
    """
    from onnxscript import ir, optimizer

    with quiet():
        optimizer.inline(model)
        # First the constants: the rules for fusing then see half of the nodes.
        optimizer.fold_constants(
            model,
            input_size_limit=FOLDED_BYTES,
            output_size_limit=FOLDED_BYTES,
            should_fold=lambda node: True if node.op_type == "ConstantOfShape" else None,
        )
        optimizer.remove_unused_nodes(model)
        optimizer.optimize(model, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES)
    model.ir_version = IR_VERSION
    return ir.serde.serialize_model(model)


def unusual_parts(proto: Any) -> list[str]:
    """Return descriptions of what other runtimes may not have: types, operators and weights outside the file.

    Args:
        proto: an onnx.ModelProto.
    """
    from onnx import TensorProto, shape_inference

    inferred = shape_inference.infer_shapes(proto, data_prop=True).graph
    typed = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.type.tensor_type.elem_type for value in typed} | {
        t.data_type for t in inferred.initializer
    }
    found = ["values of type DOUBLE"] if TensorProto.DOUBLE in types else []
    domains = {node.domain for node in inferred.node if node.domain not in ("", "ai.onnx")}
    found += [f"operators of {domain}" for domain in sorted(domains)]
    if proto.functions:
        found.append(f"{len(proto.functions)} functions")
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in inferred.initializer):
        found.append("weights in another file")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, those given to the root logger, too, and the graphs that torch prints when it retries.

    Standard error is left alone: progress is shown there meanwhile.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.handlers[:] = handlers  # without any, the root logger makes itself one


def serialize(proto: Any, part: str, model: Model, description: str, side: int) -> bytes:
    """Return the file's content: `proto` with metadata, and without paths of this machine.

    Args:
        proto: an onnx.ModelProto; changed in place.
        part: name of the half of the model, for the metadata.
        model: model that the metadata describes.
        description: description of inputs and outputs; becomes the file's doc string.
        side: longest side in pixels of the resized photo that the file's inputs belong to.
    """
    from onnx import helper

    for noted in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        noted.ClearField("metadata_props")  # torch's own, with stack traces of this machine
    proto.doc_string = description
    helper.set_model_props(proto, {**_metadata(model, side), "part": part})
    data: bytes = proto.SerializeToString()
    return data


def _metadata(model: Model, side: int) -> dict[str, str]:
    """Return the file's metadata as strings: names unchanged, other values as JSON."""
    known = {key: model.info[key] for key in ("teacher", "checkpoint_sha256") if key in model.info}
    return {
        "format": FORMAT,
        "student": model.student,
        "image_size": str(model.image_size),
        "student_size": str(model.student_size),
        "preprocessing": json.dumps(preprocessing_recipe(side)),
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
        """Run the network on tensors by input name, and return its outputs in order.

        Raises:
            PredictError: onnxruntime refuses: the network was traced to one batch size, or uses what it doesn't have.
        """
        from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors

        arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
        try:
            outputs = self._session.run(None, arrays)
        except (
            onnxruntime_errors.Fail,
            onnxruntime_errors.InvalidArgument,
            onnxruntime_errors.NotImplemented,
            onnxruntime_errors.RuntimeException,
        ) as error:
            fact = " ".join(str(error).split())[:300]
            raise PredictError(f"onnxruntime can't run the exported network: {fact}") from error
        return [torch.from_numpy(array) for array in outputs]


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
