"""Trial of an ONNX file with onnxruntime's own tools for smaller files: 8-bit weights, and half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ...common.durable import explain_os_errors
from ...common.errors import PredictError
from .onnx_graph import Session, quiet, relative_difference

HALF_LIMIT = 1e-2
"""Largest difference of a halved file's outputs, relative to the largest magnitude, that isn't worth a word."""

MAX_HALF = 65504
"""Largest number in half precision."""

QUANTISED_COSINE = 0.9
"""Smallest cosine between an output and that of the file with 8-bit weights that isn't worth a word."""


def tool_limits(data: bytes, inputs: Mapping[str, Tensor]) -> list[str]:
    """Quantise and halve a file as its users may, and return a sentence for each thing that doesn't work.

    Args:
        data: content of the ONNX file.
        inputs: float32 tensors by input name, on which the results are compared.

    Raises:
        PredictError: there is no room for temporary files.
    """
    limits = []
    with (
        explain_os_errors(Path("temporary folder"), PredictError, "a temporary file"),
        TemporaryDirectory(prefix="mobilesam-") as folder,
        quiet(),
    ):
        path = Path(folder) / "x.onnx"
        path.write_bytes(data)
        wanted = Session(data).run(inputs)
        for name, trial in (
            ("onnxruntime's quant_pre_process", _prepare),
            ("onnxruntime's quantize_dynamic", _quantise),
            ("onnxruntime's convert_float_to_float16", _halve),
        ):
            if (limit := _reason(trial, path, inputs, wanted)) is not None:
                limits.append(f"{name}: {limit}")
    return limits


Trial = Callable[[Path, Mapping[str, Tensor], list[Tensor]], str | None]


def _reason(trial: Trial, path: Path, inputs: Mapping[str, Tensor], wanted: list[Tensor]) -> str | None:
    """Return the reason why a tool can't be used on the file at `path`; None if it can."""
    try:
        return trial(path, inputs, wanted)
    except OSError:
        raise
    # The tools may raise anything for operators that they don't know.
    except Exception as error:  # noqa: BLE001
        return f"it stops with {type(error).__name__}: {' '.join(str(error).split())[:150]}"


def _prepare(path: Path, inputs: Mapping[str, Tensor], wanted: list[Tensor]) -> str | None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    made = path.with_name("prepared.onnx")
    try:
        quant_pre_process(path, made)
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - as above
        quant_pre_process(path, made, skip_symbolic_shape=True)
        Session(made.read_bytes()).run(inputs)
        return "give it skip_symbolic_shape=True, since it can't follow this file's shapes"
    Session(made.read_bytes()).run(inputs)
    return None


def _quantise(path: Path, inputs: Mapping[str, Tensor], wanted: list[Tensor]) -> str | None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = path.with_name("quantised.onnx")
    quantize_dynamic(path, made, weight_type=QuantType.QUInt8)
    found = Session(made.read_bytes()).run(inputs)
    cosine = min(_cosine(one, other) for one, other in zip(found, wanted, strict=True))
    if cosine >= QUANTISED_COSINE:
        return None
    return f"the result loads, but its outputs differ much: the cosine with this file's is {cosine:.2f}"


def _cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.flatten().double(), other.flatten().double()
    return float(one @ other / (one.norm() * other.norm()).clamp(min=1e-30))


def _halve(path: Path, inputs: Mapping[str, Tensor], wanted: list[Tensor]) -> str | None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    greatest = _greatest_value(onnx.load(path), inputs)
    if not greatest <= MAX_HALF:
        return f"a value inside reaches {greatest:.2g}, beyond half precision's {MAX_HALF}"
    halved: Any = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    found = Session(halved.SerializeToString()).run(inputs)
    difference = max(relative_difference(one, other) for one, other in zip(found, wanted, strict=True))
    if difference <= HALF_LIMIT:
        return None
    if difference == float("inf"):
        return "the result gives values that aren't finite"
    return f"the result differs by {difference:.1%} of the greatest value"


def _greatest_value(proto: Any, inputs: Mapping[str, Tensor]) -> float:
    """Return the largest magnitude of any float32 value inside the network.

    onnxruntime computes much of a halved file in float32 on a CPU, and so doesn't show what overflows elsewhere.

    Args:
        proto: an onnx.ModelProto; changed in place.
        inputs: tensors by input name.
    """
    from onnx import TensorProto, helper

    graph = proto.graph
    floats = {one.name for one in graph.value_info if one.type.tensor_type.elem_type == TensorProto.FLOAT}
    names = [name for node in graph.node for name in node.output if name in floats]
    del graph.output[:]
    for index, name in enumerate(names):
        magnitude, greatest = f"magnitude {index}", f"greatest {index}"
        graph.node.append(helper.make_node("Abs", [name], [magnitude]))
        graph.node.append(helper.make_node("ReduceMax", [magnitude], [greatest], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(greatest, TensorProto.FLOAT, []))
    values = Session(proto.SerializeToString()).run(inputs)
    return max((float(value) for value in values), default=0.0)
