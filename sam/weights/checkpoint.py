"""Checkpoints of SAM by anybody: read safely and without a copy, identified and checked, with clear errors.

`read_weights` is the one reader for all commands and options that take weights. `weight_files.py` reads the files,
`state_dict.py` finds SAM's weights in them and gives them the names of SAM's own checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...common.errors import CheckpointError, counted, shown
from ..modeling.head_shapes import HEAD_PREFIXES, HQ_PREFIXES
from ..photos.preprocess import PATCH
from ..registry import TEACHERS, TeacherInfo
from .state_dict import ENCODER_PREFIX as ENCODER_PREFIX
from .state_dict import Fits, StateDict, count_by_prefix, dictionary_of, find_state_dicts
from .unpickler import Foreign
from .weight_files import FOLDER_FILES, PLAIN, load_weights

MAX_GRID = 256
"""Largest side of a table of positions: four times SAM's. A file may claim any size."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """Weights read from a file or a folder, by SAM's names, and a description of what was taken."""

    path: Path
    """File or folder, as the user named it."""
    state: dict[str, Tensor] = field(repr=False)
    """Tensors by key on the CPU, in the file's dtypes; those that SAM doesn't have keep their names."""
    found: StateDict = field(repr=False)
    """Where they were found in the file, and by which names."""
    left: tuple[str, ...]
    """Parts of the file that hold no weights or were not taken: names of its dictionaries' keys."""
    pickled: str | None = None
    """Class of a pickled object in the file's own dictionary, and its key; None if it has none."""

    def note(self, used: Collection[str] | None = None, unmentioned: tuple[str, ...] = ()) -> str | None:
        """Describe in one sentence what was taken of the file and what was left out.

        Args:
            used: keys of `state` that are used; None: all.
            unmentioned: prefixes of keys that every file of its kind has and nobody uses; nothing is said of them.

        Returns:
            The sentence; None if the file is a plain checkpoint that is used as a whole.
        """
        unused = set() if used is None else self.state.keys() - set(used)
        counts = count_by_prefix([key for key in unused if not key.startswith(unmentioned)], 2)
        left = [*(f"{name} ({counted(n, 'tensor')})" for name, n in counts.items()), *self.left]
        how = []
        if self.found.place:
            how.append(f"under {'.'.join(self.found.place)!r}")
        if self.found.prefix or self.found.containers:
            words = [self.found.prefix] * bool(self.found.prefix)
            words += ["module. or _orig_mod."] * self.found.containers
            how.append(f"whose names have {' and '.join(words)} before SAM's")
        if self.found.huggingface:
            how.append("by Hugging Face's names")
        if self.found.known and not any(key.startswith(HEAD_PREFIXES) for key in self.state):
            how.append("of an image encoder alone")
        if not how and not left:
            return None
        more = f", and {len(left) - 8} more" if len(left) > 8 else ""
        taken = f"took {counted(len(self.state) - len(unused), 'tensor')} {', '.join(how)}".rstrip()
        name = (
            f"{self.path.parent.name}/{self.path.name}" if self.path.name in FOLDER_FILES else self.path.name
        )
        rest = f"; left out: {', '.join(left[:8])}{more}" if left else ", all that it holds"
        return shown(f"{name}: {taken}{rest}")


def read_weights(path: Path, fits: Fits | None = None) -> Weights:
    """Read SAM's weights from a file of anybody.

    Args:
        path: a file of `torch.save` or of safetensors, the index of a sharded model, or a folder of Hugging Face.
        fits: test of a state dict, which decides if a file holds several (see `find_state_dicts`).

    Returns:
        The weights by the names of SAM's checkpoints. They may be of another network: `check_weights` and
        `identify_teacher` look at them.

    Raises:
        CheckpointError: the file is absent, empty, truncated, damaged or no checkpoint, or holds no tensors by name.
    """
    path = Path(path)
    content = load_weights(path)
    dicts = find_state_dicts(content, fits)
    if not dicts:
        raise CheckpointError(f"{path} holds {_other_content(content)}")
    return Weights(
        path=path,
        state=dicts[0].state,
        found=dicts[0],
        left=_left(content, dicts[0]),
        pickled=_first_pickled(content),
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by SAM's names; see `read_weights`."""
    return read_weights(path).state


def _other_content(content: object) -> str:
    """Describe a file's content that has no tensors by name, and how to save one that has."""
    if isinstance(content, Foreign) and content.items is None:
        return (
            f"a whole pickled object ({content.name}), not its weights; it was refused, since loading it can run "
            f"code.\nSave its weights: {PLAIN}."
        )
    members = None if isinstance(content, list | tuple) else dictionary_of(content)
    if members is None:
        return f"a {type(content).__name__}, not a state dict of tensors.\nSave the weights: {PLAIN}."
    pickled = _first_pickled(content)
    if pickled is not None:
        return (
            f"Python objects other than tensors ({pickled}), and no weights; it was refused, since loading them can "
            f"run code.\nSave the weights: {PLAIN}."
        )
    keys = ", ".join(repr(str(key)[:80]) for key in list(members)[:4]) or "nothing"
    return f"no tensors by name: it holds {keys}.\nSave the weights: {PLAIN}."


def _first_pickled(content: object) -> str | None:
    """Return class and key of the first object in a file's own dictionary that isn't known here; None without one."""
    for key, value in (dictionary_of(content) or {}).items():
        if isinstance(value, Foreign) and value.items is None:
            return shown(f"{value.name}, under {str(key)[:80]!r}")
    return None


def _left(content: object, found: StateDict) -> tuple[str, ...]:
    """List what of a file is outside a state dict: its other keys, by the dictionaries that lead to it."""
    left = [
        f"{key} ({kind})" if "." in kind else key for key, kind in found.foreign.items() if kind != "NoneType"
    ]
    inner: object = content
    for depth, key in enumerate(found.place):
        members = {str(other): value for other, value in (dictionary_of(inner) or {}).items()}
        outer = ".".join((*found.place[:depth], ""))
        left += [outer + other for other in members if other != key]
        inner = members[key]
    return tuple(name[:60] for name in left)


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors of the image encoder, without the prefix `image_encoder.`."""
    prefix = ENCODER_PREFIX
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def identify_teacher(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the teacher whose encoder has a checkpoint's sizes; None if there is none.

    Of several teachers with the same encoder, it is the first whose head (SAM's or SAM-HQ's) and trained image size
    fit, too.
    """
    encoder = encoder_state(state)
    found = [info for info in TEACHERS.values() if info.encoder.matches(encoder)]
    if len(found) > 1:
        hq = any(key.startswith(HQ_PREFIXES) for key in state)
        found = [info for info in found if info.hq == hq] or found
    if len(found) > 1:
        found = [info for info in found if _has_trained_shapes(info, encoder)] or found
    return found[0].name if found else None


def _has_trained_shapes(info: TeacherInfo, encoder: Mapping[str, Tensor]) -> bool:
    """Return True if an encoder's tensors have the shapes of a teacher's trained image size."""
    with torch.device("meta"):
        built = info.encoder.build(info.trained_image_size).state_dict()
    return all(encoder[key].shape == value.shape for key, value in built.items() if key in encoder)


def trained_image_size(info: TeacherInfo, state: Mapping[str, Tensor]) -> int:
    """Return the image size that a checkpoint's absolute position table is for, in pixels: fine-tuned files may have
    another than the official one. The teacher's own for an encoder without such a table, or one that isn't square.

    Args:
        info: entry of the teacher.
        state: tensors of the checkpoint by key.
    """
    table = state.get(ENCODER_PREFIX + "pos_embed")
    if not info.encoder.has_positions or table is None or table.ndim != 4:
        return info.trained_image_size
    rows, columns = table.shape[1:3]
    return PATCH * rows if rows == columns and 0 < rows <= MAX_GRID else info.trained_image_size


def check_weights(
    weights: Weights, info: TeacherInfo, expected: Mapping[str, torch.Size], *, encoder_alone: bool = False
) -> dict[str, Tensor]:
    """Check every key, shape and dtype of a teacher's checkpoint.

    Args:
        weights: content of the file.
        info: entry of the teacher that it should belong to.
        expected: shapes by key, as `state_shapes` returns them.
        encoder_alone: True to take a file that has none of the head's keys.

    Returns:
        The tensors that the teacher uses; others are left out, such as mobile_sam's classifier, or SAM-HQ's layers
        for a teacher with SAM's own head.

    Raises:
        CheckpointError: the file doesn't fit; the message names the network that it belongs to, or the first
            differences.
    """
    name, path, state = info.name, weights.path, weights.state
    # The same encoder may belong to several teachers, whose files don't differ in their shapes.
    teacher = None if info.encoder.matches(encoder_state(state)) else identify_teacher(state)
    if teacher is not None:
        raise CheckpointError(f"{path} is a {teacher} checkpoint, not {name}; use --teacher {teacher}")
    encoder = encoder_state(state)
    if not any(key in state for key in expected) or (not encoder and _other_network(state) is not None):
        raise CheckpointError(f"{path} is not a {name} checkpoint: {describe_other(weights)}")
    if not encoder:
        raise CheckpointError(
            f"{path} is not a {name} checkpoint: it holds SAM's head (prompt encoder and mask decoder) alone, no "
            "image encoder"
        )
    has_head = any(key.startswith(HEAD_PREFIXES) for key in state)
    if not has_head:
        if not encoder_alone:
            raise CheckpointError(
                f"{path} holds an image encoder alone: SAM's prompt encoder and mask decoder, which masks need, are "
                f"not in it.\nSave the whole model's weights: {PLAIN}."
            )
        expected = {key: shape for key, shape in expected.items() if key.startswith(ENCODER_PREFIX)}
    elif info.hq and (sam := identify_teacher(state)) != name:
        raise CheckpointError(
            f"{path} is a {sam} checkpoint, not {name}: its mask decoder lacks SAM-HQ's layers; use --teacher {sam}"
        )
    _check_keys(weights, info, expected)
    for key, shape in expected.items():
        if state[key].shape != shape:
            if not state[key].numel():
                raise CheckpointError(
                    f"{path} holds {key} without values, as each process of DeepSpeed's ZeRO or FSDP saves a part.\n"
                    "Make one file of all parts: python zero_to_fp32.py FOLDER FILE (DeepSpeed), or save the whole "
                    "state dict"
                )
            wrong, right = tuple(state[key].shape), tuple(shape)
            raise CheckpointError(f"{path} is not a {name} checkpoint: {key} has shape {wrong}, not {right}")
        if not state[key].is_floating_point() and not key.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"{path} is not a {name} checkpoint: {key} holds {state[key].dtype} numbers"
            )
    return {key: state[key] for key in expected}


def _check_keys(weights: Weights, info: TeacherInfo, expected: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError for a missing weight, or one of the encoder's that the teacher doesn't have.

    One more in the encoder (an adapter's) may change what it computes, one more elsewhere doesn't.
    """
    unused = tuple(ENCODER_PREFIX + prefix for prefix in info.encoder.unused_prefixes)
    missing = [key for key in expected if key not in weights.state]
    unknown = [
        key
        for key in weights.state
        if key.startswith(ENCODER_PREFIX) and key not in expected and not key.startswith(unused)
    ]
    if not missing and not unknown:
        return
    examples = [
        f"{key} is a {weights.found.foreign[key]}, no tensor"
        if key in weights.found.foreign
        else f"{key} is missing"
        for key in missing[:1]
    ]
    examples += [f"{shown(key[:80])} is unknown" for key in unknown[:1]]
    if unknown and not missing:
        examples.append("an adapter, such as LoRA's, has to be merged into the weights first")
    names = "by Hugging Face's names, " if weights.found.huggingface else ""
    raise CheckpointError(
        f"{weights.path} is not a {info.name} checkpoint: {names}of {len(expected)} weights {len(missing)} are "
        f"missing, {len(unknown)} are unknown.\n({'; '.join(examples)})"
    )


# Networks whose files people give for SAM's, by a part of a name that only they have.
_OTHER_NETWORKS = (
    ("image_encoder.trunk.", "SAM 2's"),
    ("sam_mask_decoder.", "SAM 2's"),
    ("memory_attention.", "SAM 2's"),
    ("backbone.vision_backbone.", "SAM 3's"),
    ("lora_", "an adapter's (LoRA), not a model's: merge it into its model first"),
    ("linear_a_q.", "an adapter's (LoRA), not a model's: merge it into its model first"),
    ("w_a_0", "an adapter's (LoRA), not a model's: merge it into its model first"),
    ("model.0.conv.weight", "YOLO's or FastSAM's"),
    ("register_tokens", "DINOv2's"),
    ("cls_token", "a vision transformer's"),
    ("visual.conv1", "CLIP's"),
    ("layer1.0.conv1.", "a ResNet's"),
)


def _other_network(state: Mapping[str, Tensor]) -> str | None:
    """Return the network that has the names of a state dict, by _OTHER_NETWORKS; None for SAM's and unknown ones."""
    return next((kind for part, kind in _OTHER_NETWORKS if any(part in key for key in state)), None)


def describe_other(weights: Weights) -> str:
    """Describe the content of a file that is no teacher's, as a whole.

    Args:
        weights: content of the file.
    """
    state = weights.state
    if weights.found.known == 0 and weights.pickled is not None:
        return f"its weights are inside of a pickled object ({weights.pickled}).\nSave them alone: {PLAIN}."
    kind = _other_network(state)
    first = shown(next(iter(state))[:80])
    count = f"{counted(len(state), 'tensor')}, {'' if len(state) == 1 else 'the first '}{first}"
    named = f"; the names are {kind}" if kind else ""
    if any(key.startswith((ENCODER_PREFIX, *HEAD_PREFIXES)) for key in state):
        sizes = state.get(ENCODER_PREFIX + "patch_embed.proj.weight")
        blocks = {key.split(".")[2] for key in state if key.startswith(ENCODER_PREFIX + "blocks.")}
        if named or sizes is None or not blocks:
            return f"it holds {count}{named}"
        return (
            f"its encoder has {len(blocks)} blocks of width {sizes.shape[0]}, which is no teacher's: that of a "
            "pruned or distilled SAM (SlimSAM, EfficientSAM, ...)"
        )
    return f"it holds none of SAM's names, but {count}{named}"
