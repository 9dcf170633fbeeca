"""State dicts of SAM's weights in what a file holds, under the names of SAM's own checkpoints.

Training scripts wrap the weights in a larger dictionary (`model`, `state_dict`, `ema`, ...), and containers put words
before their names (`module.`, `_orig_mod.`, `sam.`, ...). Both are recognised by content: by the names of SAM's
parts. Hugging Face's SamModel has other names, which are translated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .unpickler import Foreign

ENCODER_PREFIX = "image_encoder."
"""Prefix of the image encoder's keys in a SAM checkpoint."""

PIXEL_STATISTICS = ("pixel_mean", "pixel_std")
"""Keys that some tools save with the weights; they are SAM's fixed preprocessing, not weights."""

MAX_DEPTH = 6
"""Most dictionaries in each other in which weights are looked for."""

MAX_DICTIONARIES = 10_000
"""Most dictionaries in which weights are looked for."""

MAX_PART = 10_000
"""Most tensors in a dictionary of one of SAM's parts."""

MAX_MEMBERS = 16
"""Most members of a list or tuple, such as (weights, optimizer), in which weights are looked for."""

# Words that torch's containers put into names: DataParallel, compile, FSDP and its activation checkpoints.
_CONTAINERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder", "vision_encoder", "shared_image_embedding")
_PART = re.compile(rf"^((?:[^.]+\.)*?)({'|'.join(_PARTS)})\.")
# Ends of two keys, for a bare encoder: those of SAM's ViT and TinyViT, and of Hugging Face's ViT.
_BARE = (("neck.0.weight", ENCODER_PREFIX), ("neck.conv1.weight", "vision_encoder."))
_AVERAGE = re.compile(r"(?:^|[^a-z])(?:ema|swa|avg|averaged?)(?:[^a-z]|$)", re.IGNORECASE)

Fits = Callable[[Mapping[str, Tensor]], bool]
"""Function of a state dict that returns True if it is the wanted one, of several in a file."""


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """Tensors by SAM's names, found in a file, and how they were found."""

    place: tuple[str, ...]
    """Keys of the dictionaries that lead to them; empty if the file holds nothing else."""
    prefix: str
    """Beginning that was removed from the names."""
    huggingface: bool
    """True if they were translated from the names of Hugging Face's SamModel."""
    known: int
    """Number of tensors in SAM's parts: encoder, prompt encoder, mask decoder."""
    state: dict[str, Tensor] = field(repr=False)
    """Tensors by key, those outside SAM's parts included, without PIXEL_STATISTICS."""
    containers: bool
    """True if words of torch's containers (`module`, `_orig_mod`) were removed from them."""
    encoder_alone: bool
    """True if they were a bare encoder's names, without a part's."""
    foreign: dict[str, str]
    """Names of the types of what isn't a tensor, by key, in the same dictionary; dictionaries are `dict`."""

    @property
    def average(self) -> bool:
        """True if the keys that lead to it call it an average of weights (EMA, SWA)."""
        return any(_AVERAGE.search(key) for key in self.place)


def find_state_dicts(loaded: object, fits: Fits | None = None) -> list[StateDict]:
    """Find the state dicts in a loaded file, the one to take first.

    The first is the one that `fits`; of several, the one with the most tensors in SAM's parts, or if none has any,
    with the most tensors; of equal ones an average of the weights (EMA), since that is the one people evaluate; then
    the first in the file.

    Args:
        loaded: content of the file, as `read_torch_file` returns it.
        fits: test of a state dict, for files that hold several.

    Returns:
        State dicts with at least one tensor.
    """
    found: list[StateDict] = []
    for place, content in _dictionaries(loaded):
        found += _state_dicts(place, content)

    def rank(each: StateDict) -> tuple[bool, int, int, bool]:
        size = 0 if each.known else len(each.state)
        return (fits is not None and fits(each.state), each.known, size, each.average)

    return sorted(found, key=rank, reverse=True)


def count_by_prefix(keys: Iterable[str], parts: int = 1) -> dict[str, int]:
    """Count keys by the first parts of their names: {"head": 2, "mask_decoder": 131}.

    Args:
        keys: keys of a state dict, parts of which are separated by dots.
        parts: number of parts to count by.
    """
    counts = Counter(".".join(key.split(".")[:parts])[:60] for key in sorted(keys))
    return dict(counts)


def _dictionaries(loaded: object) -> Iterator[tuple[tuple[str, ...], Mapping[object, object]]]:
    """Yield the dictionaries in a loaded file with the keys that lead to them, outer ones first."""
    level: list[tuple[tuple[str, ...], object]] = [((), loaded)]
    left = MAX_DICTIONARIES
    seen: set[int] = set()  # of values that the file holds in several places
    for _ in range(MAX_DEPTH):
        inner: list[tuple[tuple[str, ...], object]] = []
        for place, content in level:
            members = dictionary_of(content)
            if not members or id(content) in seen or left <= 0:
                continue
            left -= 1
            seen.add(id(content))
            if not isinstance(content, (list, tuple)):  # whose members have no names
                yield place, members
            inner += [
                ((*place, str(key)), value)
                for key, value in members.items()
                if isinstance(value, (dict, list, tuple, Foreign))
            ]
        level = inner


def dictionary_of(content: object) -> Mapping[object, object] | None:
    """Return a value in a loaded file as a dictionary: a list's or tuple's first members by their number; None for a
    value of another kind."""
    if isinstance(content, Foreign):
        return content.items
    if isinstance(content, (list, tuple)):
        return {str(index): value for index, value in enumerate(content[:MAX_MEMBERS])}
    return content if isinstance(content, Mapping) else None


def _joined_parts(content: Mapping[object, object]) -> Mapping[object, object]:
    """Put tensors of dictionaries that are named as SAM's parts ({"image_encoder": {...}, ...}) beside the others."""
    if sum(part in content for part in _PARTS) < 2:
        return content
    joined: dict[object, object] = {}
    for key, value in content.items():
        part = dictionary_of(value) if key in _PARTS else None
        if part is None or len(part) > MAX_PART:
            joined[key] = value
        else:
            joined |= {f"{key}.{name}": member for name, member in part.items()}
    return joined


def _state_dicts(place: tuple[str, ...], content: Mapping[object, object]) -> Iterator[StateDict]:
    """Yield the state dicts among one dictionary's own values: one for each prefix of SAM's parts."""
    content = _joined_parts(content)
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    short = _without_containers(tensors)
    containers, tensors = short.keys() != tensors.keys(), short
    foreign = {
        str(key): value.name if isinstance(value, Foreign) else type(value).__name__
        for key, value in content.items()
        if not isinstance(value, Tensor)
    }
    prefixes = _prefixes(tensors)
    for prefix, added in prefixes or [("", "")]:
        renamed = {_rename(key, prefix, added): value for key, value in tensors.items()}
        huggingface = any(key.startswith("vision_encoder.") for key in renamed)
        if huggingface:
            renamed = {huggingface_name(key): value for key, value in renamed.items()}
        state = {key: value for key, value in renamed.items() if key.split(".")[-1] not in PIXEL_STATISTICS}
        if state:
            yield StateDict(
                place=place,
                prefix=prefix,
                huggingface=huggingface,
                containers=containers,
                encoder_alone=bool(added),
                known=sum(key.startswith(SAM_PREFIXES) for key in state),
                state=state,
                foreign=foreign,
            )


SAM_PREFIXES = (ENCODER_PREFIX, "prompt_encoder.", "mask_decoder.")
"""Prefixes of the keys of SAM's three parts."""


def _without_containers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the words of torch's containers from names, unless two names would become one."""
    short = {
        ".".join(word for word in key.split(".") if word not in _CONTAINERS): value
        for key, value in tensors.items()
    }
    return short if len(short) == len(tensors) else tensors


def _prefixes(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return the beginnings to remove from names, those of most names first, and what to put in their place.

    Before the parts of a whole SAM nothing is put in their place, before the names of a bare encoder its part's name.
    """
    counts = Counter(match[1] for key in tensors if (match := _PART.match(key)))
    if counts:
        return [
            (prefix, "") for prefix, _ in sorted(counts.items(), key=lambda item: (-item[1], len(item[0])))
        ]
    bare = []
    for end, part in _BARE:
        for key in tensors:
            prefix = key.removesuffix(end)
            if key.endswith(end) and any(other.startswith(f"{prefix}patch_embed.") for other in tensors):
                bare.append((prefix, part))
    return bare


def _rename(key: str, prefix: str, added: str) -> str:
    return added + key.removeprefix(prefix) if key.startswith(prefix) else key


# Hugging Face's names, and SAM's, of transformers/models/sam/modeling_sam.py. Of a rule's pattern, the whole name or
# its beginning is replaced.
_MLP = r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head|hf_mlp))\."
_HUGGINGFACE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^vision_encoder\.", "image_encoder."),
        (r"^image_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
        (r"^image_encoder\.layers\.", "image_encoder.blocks."),
        (r"^(image_encoder\.blocks\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
        (r"^image_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
        (r"^image_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
        (r"^image_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
        (r"^image_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
        (
            r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        ),
        (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
        (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
        (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
        (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
        (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
        (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
        (r"^(mask_decoder\.transformer\.layers\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
        (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
        (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
        (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
        (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
        # SAM-HQ's layers, of transformers/models/sam_hq/modeling_sam_hq.py.
        (r"^mask_decoder\.hq_token\.", "mask_decoder.hf_token."),
        (r"^mask_decoder\.hq_mask_mlp\.", "mask_decoder.hf_mlp."),
        (r"^mask_decoder\.compress_vit_conv1\.", "mask_decoder.compress_vit_feat.0."),
        (r"^mask_decoder\.compress_vit_norm\.", "mask_decoder.compress_vit_feat.1."),
        (r"^mask_decoder\.compress_vit_conv2\.", "mask_decoder.compress_vit_feat.3."),
        (r"^mask_decoder\.encoder_conv1\.", "mask_decoder.embedding_encoder.0."),
        (r"^mask_decoder\.encoder_norm\.", "mask_decoder.embedding_encoder.1."),
        (r"^mask_decoder\.encoder_conv2\.", "mask_decoder.embedding_encoder.3."),
        (r"^mask_decoder\.mask_conv1\.", "mask_decoder.embedding_maskfeature.0."),
        (r"^mask_decoder\.mask_norm\.", "mask_decoder.embedding_maskfeature.1."),
        (r"^mask_decoder\.mask_conv2\.", "mask_decoder.embedding_maskfeature.3."),
        # Multilayer perceptrons of three layers: proj_in, layers.0, proj_out.
        (_MLP + r"layers\.0\.", r"\1.layers.1."),
        (_MLP + r"proj_in\.", r"\1.layers.0."),
        (_MLP + r"proj_out\.", r"\1.layers.2."),
    )
)  # fmt: skip


def huggingface_name(key: str) -> str:
    """Translate a key of Hugging Face's SamModel into SAM's; other keys stay as they are."""
    for pattern, replacement in _HUGGINGFACE:
        key = pattern.sub(replacement, key)
    return key
