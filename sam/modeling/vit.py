"""SAM's ViT image encoder: the same function as segment_anything's, computed faster, at any image size.

Module names follow the released checkpoints, so that their `image_encoder.*` loads unchanged. Only the computation
differs from segment_anything/modeling/image_encoder.py: tokens stay in one layout (B, Y, X, C) from the patches to
the neck, only cells of the grid go through the linear layers (not the padding of border windows), and attention is
one call that never holds its table of positions (`attention.attend`).

In bfloat16 on a CPU a matrix product is so fast that reading and writing its result again, for a bias, a GELU or a
residual, takes a quarter of its time. So oneDNN fuses linear layers with the operation that follows: one pass over
memory instead of two or three (`linear_gelu`, `linear_plus`). The fused operation is computed before the result is
rounded, which is also closer to float32. If oneDNN can't fuse, the operations are computed separately.

Shape suffixes: B images, J windows, Y and X rows and columns of the grid or of a window, N tokens, C channels, K
heads, D channels of one head, H and W rows and columns of an image or table, L positions of a table; g is the side
of the embedding's grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import cpu_accelerates_bfloat16
from ..photos.preprocess import PATCH
from .attention import attend
from .neck import EMBEDDING_CHANNELS, neck_convolution, neck_projection

WINDOW = 14
"""Side of a window in cells of the grid."""

MLP_RATIO = 4
"""Width of the MLPs' hidden layer, in multiples of a token's width."""

EPSILON = 1e-6
"""Epsilon of the layer norms."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of one of SAM's ViT encoders: an `Architecture` of the registry of teachers."""

    width: int
    """Channels of a token."""
    depth: int
    """Number of transformer blocks."""
    heads: int
    """Attention heads of each block."""
    global_blocks: tuple[int, ...]
    """Indices of the blocks that attend over the whole grid; the others attend in windows of 14 x 14 cells."""

    has_positions: ClassVar[bool] = True
    # Autocast would convert the weights in each call, which costs as much as reading them.
    uses_autocast: ClassVar[bool] = False
    unused_prefixes: ClassVar[tuple[str, ...]] = ()

    def build(self, image_size: int) -> ViTEncoder:
        """Build the encoder; under `torch.device("meta")` without memory or initialisation."""
        return ViTEncoder(image_size, self.width, self.depth, self.heads, self.global_blocks)

    def load(
        self, state: dict[str, Tensor], image_size: int, precision: str = "float32"
    ) -> tuple[ViTEncoder, bool]:
        """See `Architecture.load`."""
        fitted, resampled = fit_positions(state, self, image_size)
        with torch.device("meta"):
            encoder = self.build(image_size)
        encoder.load_state_dict(fitted, assign=True)
        if precision == "bfloat16":
            encoder.hold_in_bfloat16()
        return encoder, resampled

    def outline(self, image_size: int) -> nn.Module:
        """Build SAM's own class on the meta device, for which counts are published: `ViTEncoder` computes the same
        with other multiplications. Source: segment_anything/build_sam.py."""
        # Not at the top: it imports torchvision, which a teacher doesn't need.
        from segment_anything.modeling import ImageEncoderViT

        with torch.device("meta"):
            return ImageEncoderViT(
                img_size=image_size,
                embed_dim=self.width,
                depth=self.depth,
                num_heads=self.heads,
                out_chans=EMBEDDING_CHANNELS,
                qkv_bias=True,
                use_rel_pos=True,
                window_size=WINDOW,
                global_attn_indexes=self.global_blocks,
            )

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Return True if a state has this encoder's width, number of blocks, heads and global blocks."""
        patches = state.get("patch_embed.proj.weight")
        if patches is None or not patches.ndim:
            return False
        blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
        if (patches.shape[0], len(blocks)) != (self.width, self.depth):
            return False
        tables = {
            f"blocks.{block}.attn.rel_pos_h": block in self.global_blocks for block in range(self.depth)
        }
        found = {key: state[key].shape for key in tables if key in state and state[key].ndim == 2}
        if any(shape[1] != self.width // self.heads for shape in found.values()):
            return False
        # Trained on a grid of one window, global and windowed blocks have equal tables.
        one_window = "pos_embed" in state and state["pos_embed"].shape[1:2] == (WINDOW,)
        return one_window or all((shape[0] != 2 * WINDOW - 1) == tables[key] for key, shape in found.items())


class ViTEncoder(nn.Module):
    """Image encoder: (B, 3, S, S) normalised pixels to a (B, 256, S/16, S/16) embedding in the pixels' dtype.

    Args:
        image_size: S in pixels, a multiple of 16.
        width, depth, heads, global_blocks: as in `ViTConfig`.
    """

    def __init__(
        self, image_size: int, width: int, depth: int, heads: int, global_blocks: tuple[int, ...]
    ) -> None:
        super().__init__()
        grid = image_size // PATCH
        self.img_size = image_size
        self.patch_embed = PatchEmbed(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        self.blocks = nn.ModuleList(
            Block(
                width, heads, grid if index in global_blocks else WINDOW, windowed=index not in global_blocks
            )
            for index in range(depth)
        )
        self.neck = Neck(width)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Compute the embeddings of normalised pixels."""
        x_BYXC = self._embed_patches(pixels_BCHW)
        for block in self.blocks:
            x_BYXC = block(x_BYXC)
        return self.neck(x_BYXC).to(pixels_BCHW.dtype)

    def embed_with_features(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute embeddings (B, 256, g, g), and the tokens (B, g, g, width) after the first block that attends to
        the whole grid, which SAM-HQ's head takes."""
        x_BYXC = self._embed_patches(pixels_BCHW)
        features_BYXC = None
        for block in self.blocks:
            x_BYXC = block(x_BYXC)
            assert isinstance(block, Block)
            if features_BYXC is None and not block.attn.windowed:
                features_BYXC = x_BYXC
        assert features_BYXC is not None, "SAM's ViTs have global blocks"
        return self.neck(x_BYXC).to(pixels_BCHW.dtype), features_BYXC

    def _embed_patches(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the tokens (B, Y, X, width) that the first block takes."""
        x_BYXC: Tensor = self.patch_embed(pixels_BCHW)
        x_BYXC += self.pos_embed.to(x_BYXC.dtype)
        return x_BYXC

    def hold_in_bfloat16(self) -> ViTEncoder:
        """Convert weights of linear and convolution layers to bfloat16, in place; norms and positions stay float32.

        Activations are then bfloat16, too, except inside norms and softmax.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)
        return self


def fit_positions(
    state: dict[str, Tensor], config: ViTConfig, image_size: int
) -> tuple[dict[str, Tensor], bool]:
    """Resample an encoder's positions to the grid of an image size.

    The absolute table (1, g, g, width) is resampled bicubically; the relative tables of the global blocks
    (2g - 1, channels of a head) linearly, as segment_anything does at run time. Windowed blocks keep their tables,
    since a window has 14 x 14 cells at any size.

    Args:
        state: a checkpoint's `image_encoder.*` with the prefix removed.
        config: sizes of the encoder.
        image_size: S in pixels, a multiple of 16.

    Returns:
        The state with resampled tables, and True if any was resampled (none is for the trained grid).
    """
    grid = image_size // PATCH
    fitted = dict(state)
    if state["pos_embed"].shape[1:3] != (grid, grid):
        fitted["pos_embed"] = _resample_table(state["pos_embed"], grid)
    length = 2 * grid - 1
    for block in config.global_blocks:
        for axis in ("h", "w"):
            key = f"blocks.{block}.attn.rel_pos_{axis}"
            if state[key].shape[0] != length:
                fitted[key] = _resample_relative(state[key], length)
    return fitted, any(fitted[key] is not state[key] for key in state)


class PatchEmbed(nn.Module):
    """Patch embedding, 16 x 16 pixels to one token: a convolution of stride 16, computed as one matrix product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        patches = pixels_BCHW.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH))  # B, 3, Y, 16, X, 16
        patches_BYXC = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches_BYXC.to(weight.dtype), weight, self.proj.bias)


class Norm(nn.LayerNorm):
    """Layer norm over the last axis, with float32 weights and arithmetic; the result has the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype or x.device.type == "cpu":
            # The CPU's kernel accepts mixed dtypes.
            return super().forward(x)
        return super().forward(x.float()).to(x.dtype)


class Block(nn.Module):
    """Transformer block: attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, width: int, heads: int, side: int, *, windowed: bool) -> None:
        super().__init__()
        self.norm1 = Norm(width)
        self.attn = Attention(width, heads, side, windowed=windowed)
        self.norm2 = Norm(width)
        self.mlp = Mlp(width)

    def forward(self, x_BYXC: Tensor) -> Tensor:
        attended = self.attn(self.norm1(x_BYXC), x_BYXC)
        return self.mlp(self.norm2(attended), attended)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them, and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, width * MLP_RATIO)
        self.lin2 = nn.Linear(width * MLP_RATIO, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return `lin2(gelu(lin1(x))) + residual`; both are (..., width)."""
        return linear_plus(linear_gelu(x, self.lin1), self.lin2, residual)


class Attention(nn.Module):
    """Multi-head attention with relative positions and a residual, over windows or grids of `side` x `side` cells."""

    def __init__(self, width: int, heads: int, side: int, *, windowed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.side = side
        self.windowed = windowed
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x_BYXC: Tensor, residual_BYXC: Tensor) -> Tensor:
        """Return the attention of the normalised tokens plus `residual_BYXC`, both (B, Y, X, width)."""
        qkv_BYXC = linear(x_BYXC, self.qkv)
        if not self.windowed:
            return linear_plus(self._attend(qkv_BYXC), self.proj, residual_BYXC)
        # Cells of border windows outside the grid are zero before the linear layer, so they equal its bias after it;
        # they take part in the attention as keys.
        windows_JYXC = into_windows(qkv_BYXC, self.side, self.qkv.bias)
        attended_BYXC = out_of_windows(self._attend(windows_JYXC), x_BYXC.shape[:3])
        return linear_plus(attended_BYXC, self.proj, residual_BYXC)

    def _attend(self, qkv_BYXC: Tensor) -> Tensor:
        q, k, v = (
            part.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in qkv_BYXC.chunk(3, dim=-1)
        )
        out_BKND = attend(q, k, v, self.rel_pos_h, self.rel_pos_w, rows=self.side)
        return out_BKND.transpose(1, 2).flatten(2).view(*qkv_BYXC.shape[:3], -1)


def into_windows(x_BYXC: Tensor, side: int, beyond_C: Tensor) -> Tensor:
    """Split grids into windows, row by row.

    Args:
        x_BYXC: grids (B, Y, X, C).
        side: side of a window, in cells.
        beyond_C: value (C,) of cells outside the grid, in border windows.

    Returns:
        (J, side, side, C), J being the number of windows of all images.
    """
    batch, rows, columns, channels = x_BYXC.shape
    down, right = -(-rows // side), -(-columns // side)
    shape = (batch, down, right, side, side, channels)
    cut_off = (rows, columns) != (down * side, right * side)
    windows = beyond_C.expand(shape).contiguous() if cut_off else x_BYXC.new_empty(shape)
    for grid_part, window_part in _regions(x_BYXC, windows):
        window_part.copy_(grid_part)
    return windows.flatten(0, 2)


def out_of_windows(windows_JYXC: Tensor, shape: torch.Size) -> Tensor:
    """Join windows into grids of `shape` (B, Y, X), without the cells outside them: the inverse of `into_windows`."""
    batch, rows, columns = shape
    side, channels = windows_JYXC.shape[1], windows_JYXC.shape[3]
    x_BYXC = windows_JYXC.new_empty(batch, rows, columns, channels)
    windows = windows_JYXC.view(batch, -(-rows // side), -(-columns // side), side, side, channels)
    for grid_part, window_part in _regions(x_BYXC, windows):
        grid_part.copy_(window_part)
    return x_BYXC


def _regions(x_BYXC: Tensor, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of views of the same cells, in a grid and in its windows (B, down, right, side, side, C): for whole
    windows, and for those cut off at the right, at the bottom, and at both."""
    side = windows.shape[3]
    for (ys, height), (xs, width) in product(*(_spans(length, side) for length in x_BYXC.shape[1:3])):
        rows, columns = (
            slice(span.start * side, span.start * side + (span.stop - span.start) * cells)
            for span, cells in ((ys, height), (xs, width))
        )
        region = x_BYXC[:, rows, columns].unflatten(1, (-1, height)).unflatten(3, (-1, width))
        yield region.transpose(2, 3), windows[:, ys, xs, :height, :width]


def _spans(length: int, side: int) -> list[tuple[slice, int]]:
    """Return the slice of the whole windows along one axis, and that of the window cut off, if there is one, each
    with the cells of a window."""
    whole, rest = divmod(length, side)
    spans = [(slice(0, whole), side)] if whole else []
    return [*spans, (slice(whole, whole + 1), rest)] if rest else spans


class Neck(nn.Sequential):
    """SAM's neck: 256-channel projection, 3 x 3 convolution, a norm after each; (B, Y, X, C) to (B, 256, Y, X)."""

    def __init__(self, width: int) -> None:
        super().__init__(
            neck_projection(width),
            Norm(EMBEDDING_CHANNELS),
            neck_convolution(),
            Norm(EMBEDDING_CHANNELS),
        )

    def forward(self, x_BYXC: Tensor) -> Tensor:
        _, norm, convolution, last_norm = self
        x_BYXC = norm(F.linear(x_BYXC, self.get_parameter("0.weight").flatten(1)))
        x_BCYX = convolution(x_BYXC.permute(0, 3, 1, 2))  # channels last, without a copy
        return last_norm(x_BCYX.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _resample_table(table_1HWC: Tensor, grid: int) -> Tensor:
    table_1CHW = table_1HWC.float().permute(0, 3, 1, 2)
    resampled = F.interpolate(table_1CHW, size=(grid, grid), mode="bicubic", antialias=True)
    return resampled.permute(0, 2, 3, 1).contiguous()


def _resample_relative(table_LD: Tensor, length: int) -> Tensor:
    table_1DL = table_LD.float().T[None]
    return F.interpolate(table_1DL, size=length, mode="linear")[0].T.contiguous()


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return `layer(x)`, fused with the bias if oneDNN can; x is (..., inputs of the layer)."""
    if _fuses(x, layer):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return layer(x)


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return `gelu(layer(x))` with the exact GELU, fused if oneDNN can."""
    if _fuses(x, layer):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "none")
    return F.gelu(layer(x))


def linear_plus(x: Tensor, layer: nn.Linear, residual: Tensor) -> Tensor:
    """Return `layer(x) + residual`, fused if oneDNN can."""
    if _fuses(x, layer):
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, layer.weight, layer.bias, "add")
    # In-place addition saves a pass over memory; nothing else uses the layer's result.
    out = layer(x)
    out += residual
    return out


def _fuses(x: Tensor, layer: nn.Linear) -> bool:
    """Return True if oneDNN's fused operators can be used: on a CPU, in bfloat16, without gradients."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad)
    return (
        x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.bfloat16
        and not gradient
        and not torch.compiler.is_compiling()  # torch's compiler fuses by itself
        and _fusing_available()
    )


@cache
def _fusing_available() -> bool:
    # The operators (those of torch's own compiler) are private, and refuse CPUs that only emulate bfloat16.
    return cpu_accelerates_bfloat16() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
