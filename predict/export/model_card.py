"""Model card of an export: the model, its metrics, the use of each file, licences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...common.errors import shown
from ..model import size_words

UNKNOWN = "not recorded"

_DEFINITIONS = {
    "skill": "1 - mse / mse of always predicting the training images' mean embedding; 0 is a constant, 1 the teacher",
    "cosine": "over the 256 channels at each cell of the embedding, mean over an image's cells",
    "mse": "squared difference from the teacher's embedding, mean over all elements",
    "relative_mse": "sum of squared differences / the teacher's sum of squared deviations from its mean per channel",
}

_TORCH = """\
`model.pt` is in mobile_sam.pt's format, for MobileSAM's own code:

    from mobile_sam import SamPredictor, sam_model_registry
    predictor = SamPredictor(sam_model_registry["vit_t"](checkpoint="model.pt").eval())
"""

_SAFETENSORS = """\
`model.safetensors` rebuilds the model with mobilesam, for segment_anything's predictor:

    from mobilesam.predict import StudentPredictor, load_model
    predictor = StudentPredictor(load_model("THIS_FOLDER").sam)

or on the command line: `mobilesam segment photo.jpg --student THIS_FOLDER --point 300 200`.
"""

_ONNX = """\
`encoder.onnx` and `decoder.onnx` need onnxruntime alone; mobilesam's `examples/segment_onnx.py` is a whole client
without torch. All inputs and outputs are float32; S is {image_size}, g is S/16, s is {student_size}.

| file | input | shape | what |
|---|---|---|---|
| encoder | `pixels` | (batch, 3, s, s) | RGB, prepared as below |
| decoder | `image_embeddings` | (1, 256, g, g) | the encoder's output of the same name |
| | `point_coords` | (prompts, points, 2) | x and y in pixels of the image resized to S |
| | `point_labels` | (prompts, points) | 1 object, 0 not, 2 and 3 a box's top left and bottom right, -1 padding |
| | `mask_input` | (1 or prompts, 1, 4g, 4g) | logits, such as the `low_res_masks` of an earlier answer |
| | `has_mask_input` | (1,) | 0 to ignore `mask_input` |
| | `orig_im_size` | (2,) | height and width of the photo |

Prompts without a box end with one point (0, 0) of label -1. The decoder gives `masks`, (prompts, 4, height, width),
logits at the photo's own size (object above 0); `iou_predictions`, (prompts, 4), its estimate of each mask's quality;
and `low_res_masks`, (prompts, 4, 4g, 4g). Mask 0 is the single mask, for boxes and several points; 1 to 3 are for
ambiguous prompts such as one point: take the one with the highest prediction.

Both files are ONNX opset {opset}, IR version {ir_version}: onnxruntime {oldest_onnxruntime} or later reads them.
Each holds its weights, no values in double precision, and no operators but ONNX's own, unless it says so below.

`orig_im_size` is float32, as in SAM's own export. Its values become the shape of `masks`, and of nothing else. For
runtimes without shapes that are computed from an input (TensorRT, some browsers'), cut `masks` off:

    import onnx.utils
    inputs = ["image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input"]
    onnx.utils.extract_model("decoder.onnx", "low.onnx", inputs, ["iou_predictions", "low_res_masks"])

and upscale `low_res_masks` yourself: bilinearly to S x S, cropped to the size of the photo resized to S, bilinearly
to the photo's own size.
"""

_SMALLER = """\
Smaller files, by onnxruntime's own tools, which were tried on both files when they were made:

    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process
    quant_pre_process("encoder.onnx", "prepared.onnx")
    quantize_dynamic("prepared.onnx", "encoder-8bit.onnx", weight_type=QuantType.QUInt8)

    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    onnx.save(convert_float_to_float16(onnx.load("encoder.onnx"), keep_io_types=True), "encoder-half.onnx")
"""

_LICENCES = """\
The mask decoder and prompt encoder come from Segment Anything (Apache-2.0), TinyViT's architecture from MobileSAM
(Apache-2.0) and TinyViT (MIT), mobilesam itself is Apache-2.0. Weights depend on the teacher's licence and on that of
the images: SA-1B's, for one, allows research only. Whoever passes this model on has to say which images it learned
from.
"""


def model_card(description: Mapping[str, Any], warnings: Sequence[str]) -> str:
    """Return the content of README.md in an export's folder.

    Args:
        description: object of model.json without `files`; None in it is shown as "not recorded".
        warnings: warnings for users of the model, one sentence each.

    Returns:
        Markdown.
    """
    parts = [
        f"# {_text(description['student'])}, a student of Segment Anything",
        "\n".join(f"- Note: {_text(warning)}" for warning in warnings),
        _facts(description),
        "## Similarity to the teacher",
        _metrics(description["metrics"]),
        "## Files",
        _files(description),
        "## Images",
        _images(description["preprocessing"]),
        "## Licences",
        _LICENCES.strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(value: object) -> str:
    """Return at most 200 characters on one line, with Markdown and HTML escaped: student files aren't trusted."""
    if value is None:
        return UNKNOWN
    return shown(str(value))[:200].replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _facts(description: Mapping[str, Any]) -> str:
    teacher, data = description["teacher"] or {}, description["data"] or {}
    sizes = description["parameters"]
    held_out = data.get("images_held_out")
    rows = {
        "student": description["student"],
        "parameters": f"{sizes['encoder']:,} in the encoder, {sizes['head']:,} in the head",
        "image size": f"{size_words(description)} pixels",
        "teacher": teacher["name"] if teacher else None,
        "teacher's checkpoint, SHA-256": teacher.get("checkpoint_sha256"),
        "head": description["head"],
        "images trained on": data.get("images_trained"),
        "images held out": held_out,
        "store": data.get("store_id"),
        "trained for": None
        if description["epoch"] is None
        else f"{_counted(description['epoch'], 'epoch')}, {_counted(description['step'], 'step')}",
        "initial weights": _initial_weights(description),
        "run": description["run"],
        "trained with": _versions(description["trained_with"]),
        "exported with": _versions(description["versions"]),
    }
    lines = [f"| {name} | {_text(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _initial_weights(description: Mapping[str, Any]) -> str | None:
    init = description["init"]
    if init is None:
        return "random weights" if description["run"] is not None else None
    return f"{init.get('file')}, SHA-256 {init.get('sha256')}"


def _versions(versions: Any) -> str | None:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else None


def _metrics(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return f"The metrics were {UNKNOWN}."
    lines = [
        f"Over {_counted(metrics.get('rows'), 'image')} held out, student against teacher. *Image part* counts only "
        "those cells of the embedding whose centre is image, not padding.",
        "",
        "| metric | image part | whole square | definition |",
        "|---|---|---|---|",
    ]
    for name, definition in _DEFINITIONS.items():
        parts = ("mean", "p5", "min") if name == "cosine" else (None,)
        for part in parts:
            valid, everywhere = (_number(metrics.get(key), part) for key in (f"{name}_valid", name))
            label = name if part is None else f"{name}, {part}"
            lines.append(f"| {label} | {valid} | {everywhere} | {definition} |")
    return "\n".join(lines)


def _number(value: Any, part: str | None) -> str:
    if part is not None and isinstance(value, Mapping):
        value = value.get(part)
    return f"{value:.4g}" if isinstance(value, int | float) else "undefined"


def _files(description: Mapping[str, Any]) -> str:
    left_out = [f"There is no `{name}`: {_text(why)}." for name, why in description["left_out"].items()]
    checks = [
        f"`{name}` was compared with torch before it was written: the greatest difference was "
        f"{check['max_relative_difference']:.1e} of the greatest value (limit {check['limit']:.1e})."
        for name, check in description["checks"].items()
    ]
    uses = [
        *([] if left_out else [_TORCH.strip()]),
        *left_out,
        _SAFETENSORS.strip(),
        _onnx(description),
        "\n".join(checks),
        "`model.json` has all of this for programs, with the SHA-256 of each file.",
    ]
    return "\n\n".join(uses)


def _onnx(description: Mapping[str, Any]) -> str:
    files = description["onnx"]
    any_file = next(iter(files.values()))
    sizes = {name: description[name] for name in ("image_size", "student_size")}
    parts = [_ONNX.format(**sizes, **any_file).strip(), _SMALLER.strip()]
    limits = [f"- `{name}`: {_text(note)}" for name, one in files.items() for note in one["notes"]]
    parts.append("\n".join(["Not with:", "", *limits]) if limits else "All of this works with both files.")
    return "\n\n".join(parts)


def _images(recipe: Mapping[str, Any]) -> str:
    normalize, resize = recipe["normalize"], recipe["resize"]
    return (
        f"1. Turn the photo upright by its EXIF orientation; RGB, 8 bits.\n"
        f"2. Resize so that the longer side has {resize['image_size']} pixels: each side is `{resize['rule']}`, "
        f"{resize['filter']}.\n"
        f"3. On the scale of 0 to 255, subtract the mean {normalize['mean']} and divide by {normalize['std']}.\n"
        f"4. Pad right and below with zeros to {resize['image_size']} x {resize['image_size']}."
    )


def _counted(number: Any, noun: str) -> str:
    """Return a number with its noun; a student's file may have anything in its place."""
    return f"{number} {noun if number == 1 else noun + 's'}"
