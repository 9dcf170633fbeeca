"""TinyViT as MobileSAM uses it: the student, and the encoder of the teacher `mobile_sam`.

Written from the published architecture (TinyViT, arXiv 2207.10666; MobileSAM, arXiv 2306.14289): two stride-2
convolutions, one stage of inverted bottlenecks, three stages of windowed attention, and SAM's neck. The last of the
three downsamplings has stride 1, so that the grid is image_size / 16. Module names follow the released weights, so
that `image_encoder.*` of `mobile_sam.pt` loads unchanged, without its unused classifier (`head.*`, `norm_head.*`).

Shape suffixes: B images, C channels, H and W rows and columns, J windows, N tokens of a window, K heads, D channels
of one head, L keys of a window (its tokens, and in border windows one more for all zero padding).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..photos.preprocess import PATCH
from .neck import finest_stride, fuse_maps, neck_projection, neck_rest

MLP_RATIO = 4
"""Width of the MLPs' hidden layer, in multiples of a stage's width."""

EXPANSION = 4
"""Width inside an inverted bottleneck, in multiples of the first stage's width."""

MOST_FILLED = 1.25
"""Ratio of the padded grid's cells to the grid's up to which border windows are padded with zeros: below it, fewer
and larger products take no longer."""

CLASSIFIER_PREFIXES = ("head.", "norm_head.")
"""Prefixes of the classifier's keys, which are in `mobile_sam.pt` but not used by SAM."""


@dataclass(frozen=True, kw_only=True)
class TinyViTConfig:
    """Sizes of one TinyViT: four entries each, one per stage; the first stage has no attention."""

    widths: tuple[int, int, int, int]
    """Channels."""
    heads: tuple[int, int, int, int]
    """Attention heads."""
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    """Number of blocks."""
    windows: tuple[int, int, int, int] = (7, 7, 14, 7)
    """Sides of the windows, in cells."""

    def __post_init__(self) -> None:
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"width {width} is not divisible by {heads} heads")


EARLIER_STRIDES = (4, 8)
"""Strides of the stages before those of stride 16."""

VARIANTS = {
    "5m": TinyViTConfig(widths=(64, 128, 160, 320), heads=(2, 4, 5, 10)),
    "11m": TinyViTConfig(widths=(64, 128, 256, 448), heads=(2, 4, 8, 14)),
    "21m": TinyViTConfig(widths=(96, 192, 384, 576), heads=(3, 6, 12, 18)),
}


@dataclass(frozen=True, kw_only=True)
class TinyViTVariant:
    """Variant of TinyViT as a teacher's encoder: an `Architecture` of the registry of teachers."""

    name: str
    """A key of VARIANTS."""

    has_positions: ClassVar[bool] = False
    uses_autocast: ClassVar[bool] = True
    unused_prefixes: ClassVar[tuple[str, ...]] = CLASSIFIER_PREFIXES

    def build(self, image_size: int) -> TinyViT:
        """Build the encoder with weights from torch's global generator."""
        return TinyViT(image_size, self.name)

    def load(
        self, state: dict[str, Tensor], image_size: int, precision: str = "float32"
    ) -> tuple[TinyViT, bool]:
        """See `Architecture.load`. TinyViT has no position tables, so none are resampled; its weights are float32 in
        any precision."""
        # Not on the meta device, since TinyViT has index buffers that are in no checkpoint. The fork keeps its
        # initialisation from advancing the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            encoder = self.build(image_size)
        encoder.load_state_dict(state, assign=True)
        return encoder, False

    def outline(self, image_size: int) -> TinyViT:
        """Build the encoder on the meta device."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return self.build(image_size)

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Return True if a state has TinyViT's first convolution, and this variant's widths, depths, heads and
        windows."""
        if "patch_embed.seq.0.c.weight" not in state:
            return False
        config = VARIANTS[self.name]
        blocks = [
            {key.split(".")[3] for key in state if key.startswith(f"layers.{i}.blocks.")} for i in range(4)
        ]
        if tuple(map(len, blocks)) != config.depths:
            return False
        sizes: dict[str, tuple[int, ...]] = {"patch_embed.seq.2.c.weight": (config.widths[0],)}
        for stage in range(1, 4):
            sizes[f"layers.{stage - 1}.downsample.conv3.c.weight"] = (config.widths[stage],)
            biases = (config.heads[stage], config.windows[stage] ** 2)
            sizes[f"layers.{stage}.blocks.0.attn.attention_biases"] = biases
        return all(state[key].shape[: len(size)] == size for key, size in sizes.items() if key in state)


class ConvNorm(nn.Sequential):
    """Convolution without bias (`c`) and its batch norm (`bn`)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)


class PatchEmbed(nn.Module):
    """Two stride-2 convolutions: pixels (B, 3, S, S) to (B, width, S/4, S/4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            ConvNorm(3, width // 2, 3, stride=2),
            nn.GELU(),
            ConvNorm(width // 2, width, 3, stride=2),
        )

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.seq(pixels_BCHW)


class MBConv(nn.Module):
    """Inverted bottleneck: expand, depthwise 3 x 3, project, add, GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width * EXPANSION
        self.conv1 = ConvNorm(width, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, width)
        # With zero weights the block starts as GELU of its input, so that depth does not disturb the first steps.
        nn.init.zeros_(self.conv3.bn.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden_BCHW = F.gelu(self.conv1(x_BCHW))
        hidden_BCHW = F.gelu(self.conv2(hidden_BCHW))
        return F.gelu(x_BCHW + self.conv3(hidden_BCHW))


class PatchMerging(nn.Module):
    """Transition between two stages: changes the width and, with stride 2, halves the resolution."""

    def __init__(self, width: int, next_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, next_width)
        self.conv2 = ConvNorm(next_width, next_width, 3, stride=stride, groups=next_width)
        self.conv3 = ConvNorm(next_width, next_width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.gelu(self.conv1(x_BCHW))
        x_BCHW = F.gelu(self.conv2(x_BCHW))
        return self.conv3(x_BCHW)


class Attention(nn.Module):
    """Attention inside windows, with one learned bias per head and distance (|dy|, |dx|).

    Windows at the right and lower border are padded with zeros, which take part as keys, since the released weights
    were trained so. If there are many zeros, they are not computed one by one: all their keys are equal, the result
    of `norm` and `qkv` for zeros, and so are their values. One key represents all of them, with the log-sum-exp of
    their biases as its bias. The result is the same, for a third of the work if the grid is a little larger than a
    window."""

    attention_bias_idxs: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        self.register_buffer("attention_bias_idxs", bias_indices(window), persistent=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        _, height, width, channels = x_BHWC.shape
        below, beside = -height % self.window, -width % self.window
        if (height + below) * (width + beside) <= MOST_FILLED * height * width:
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, beside, 0, below))
            below = beside = 0
        qkv_BHWC = self.qkv(self.norm(x_BHWC))
        filling_1C = self.qkv(self.norm(x_BHWC.new_zeros(1, channels))) if below or beside else None
        rows = []
        for top, h, down in _bands(x_BHWC.shape[1], self.window):
            row = [
                self._attend(qkv_BHWC[:, top : top + h * down, left : left + w * along], h, w, filling_1C)
                for left, w, along in _bands(x_BHWC.shape[2], self.window)
            ]
            rows.append(torch.cat(row, dim=2) if len(row) > 1 else row[0])
        attended_BHWC = torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
        return self.proj(attended_BHWC)[:, :height, :width]

    def _attend(self, qkv_BHWC: Tensor, h: int, w: int, filling_1C: Tensor | None) -> Tensor:
        """Attend within adjacent windows, each of which has h x w cells of the grid.

        No tensor has more than four dimensions: compilers for phones take no more.
        """
        batch, height, width, channels = qkv_BHWC.shape
        down, along = height // h, width // w
        rows = batch * down
        if down * along > 1:
            qkv_BHWC = qkv_BHWC.reshape(rows, h, along, w * channels).transpose(1, 2)
        # The heads are the outer division of qkv's output: each head's q, k and v are adjacent.
        parts_JNKC = qkv_BHWC.reshape(rows * along, h * w, self.heads, channels // self.heads)
        q_JKND, k_JKND, v_JKND = parts_JNKC.transpose(1, 2).chunk(3, dim=3)
        bias_KNL = self._bias(h, w).to(q_JKND.dtype)
        if h * w < self.window**2:
            assert filling_1C is not None, "a window lacks cells only if the grid isn't made of whole windows"
            filling = filling_1C.view(self.heads, 3, -1)
            k_JKND, v_JKND = (
                torch.cat((own, filling[:, part : part + 1].expand(own.shape[0], -1, -1, -1)), dim=2)
                for part, own in ((1, k_JKND), (2, v_JKND))
            )
        out_JKND = F.scaled_dot_product_attention(q_JKND, k_JKND, v_JKND, attn_mask=bias_KNL[None])
        out_JNKD = out_JKND.transpose(1, 2)
        if down * along > 1:
            out_JNKD = out_JNKD.reshape(rows, along, h, w * channels // 3).transpose(1, 2)
        return out_JNKD.reshape(batch, height, width, channels // 3)

    def _bias(self, h: int, w: int) -> Tensor:
        """Return the biases (K, N, L) of a window with h x w cells of the grid: one for each of these and, in border
        windows, one for all padding cells together."""
        side, heads, cells = self.window, self.heads, h * w
        # Gathered in every forward pass: a stored copy would be out of date once weights are loaded.
        places = self.attention_bias_idxs.view(side, side, side, side)[:h, :w]
        own_KNN = self.attention_biases[:, places[:, :, :h, :w].reshape(cells, cells)]
        if cells == side * side:
            return own_KNN
        filling = torch.cat(
            (places[:, :, h:].reshape(cells, -1), places[:, :, :h, w:].reshape(cells, -1)), dim=1
        )
        filling_KN = self.attention_biases[:, filling].logsumexp(dim=2)
        return torch.cat((own_KNN, filling_KN.view(heads, cells, 1)), dim=2)


def _bands(length: int, window: int) -> list[tuple[int, int, int]]:
    """Return (start, cells, number) of the whole windows along an axis, then of the one cut off, if any."""
    whole, rest = divmod(length, window)
    bands = [(0, window, whole)] if whole else []
    return [*bands, (whole * window, rest, 1)] if rest else bands


def bias_indices(window: int) -> Tensor:
    """Return the bias index of each pair of tokens: int64 (N, N), |dy| * window + |dx|, for N = window^2 tokens."""
    cells = torch.arange(window * window, device="cpu")
    rows, columns = cells // window, cells % window
    dy = (rows[:, None] - rows[None, :]).abs()
    dx = (columns[:, None] - columns[None, :]).abs()
    return dy * window + dx


class Mlp(nn.Module):
    """Layer norm, then two linear layers with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width * MLP_RATIO)
        self.fc2 = nn.Linear(width * MLP_RATIO, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Windowed attention, depthwise 3 x 3 convolution, MLP; attention and MLP have a residual connection."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads, window)
        self.mlp = Mlp(width)
        self.local_conv = ConvNorm(width, width, 3, groups=width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        x_BHWC = x_BHWC + self.attn(x_BHWC)
        x_BHWC = self.local_conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x_BHWC = x_BHWC + self.mlp(x_BHWC)
        return x_BHWC.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one resolution, then the downsampling to the next stage (none after the last)."""

    def __init__(self, blocks: list[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map of this stage's resolution, and the input of the next stage."""
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return x_BCHW, x_BCHW if self.downsample is None else self.downsample(x_BCHW)


class TinyViT(nn.Module):
    """TinyViT with SAM's neck: (B, 3, S, S) normalised pixels to a (B, 256, S/16, S/16) embedding.

    With a smaller input than SAM's square, the neck also takes the maps of earlier stages, which have the resolution
    that the last one lacks, each by a projection of its own (`laterals`).

    Args:
        image_size: side of SAM's square in pixels, S, a multiple of 16. No weight depends on it.
        variant: `5m` (MobileSAM's; 5,743,892 parameters), `11m` or `21m`.
        student_size: side of the input in pixels, a multiple of 16; None: S.

    Raises:
        ValueError: an unknown variant, a size that is no multiple of 16, or (in `forward`) pixels of another size.
    """

    def __init__(self, image_size: int = 1024, variant: str = "5m", student_size: int | None = None) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown TinyViT variant {variant!r}: use {', '.join(VARIANTS)}")
        self.image_size, self.student_size = image_size, student_size or image_size
        for size in (self.image_size, self.student_size):
            if size < PATCH or size % PATCH:
                raise ValueError(f"image_size {size} is not a positive multiple of {PATCH}")
        self.variant = variant
        config = VARIANTS[variant]
        self.patch_embed = PatchEmbed(config.widths[0])
        self.layers = nn.ModuleList(_stage(config, index) for index in range(4))
        self.apply(_init_weights)
        self.neck = nn.Sequential(neck_projection(config.widths[-1]), *neck_rest())
        finest = finest_stride(self.image_size, self.student_size)
        earlier = zip(EARLIER_STRIDES, config.widths, strict=False)
        self.laterals = nn.ModuleDict(
            {str(stride): neck_projection(width) for stride, width in earlier if stride >= finest}
        )

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        side = self.student_size
        if pixels_BCHW.shape[1:] != (3, side, side):
            wanted = f"(B, 3, {side}, {side})"
            raise ValueError(f"pixels have shape {tuple(pixels_BCHW.shape)}, this TinyViT takes {wanted}")
        x_BCHW, maps = self.patch_embed(pixels_BCHW), []
        for stage in self.layers:
            map_BCHW, x_BCHW = stage(x_BCHW)
            maps.append(map_BCHW)
        projected = [self.neck[0](x_BCHW)]
        for map_BCHW, stride in zip(maps, EARLIER_STRIDES, strict=False):
            if str(stride) in self.laterals:
                projected.append(self.laterals[str(stride)](map_BCHW))
        return self.neck[1:](fuse_maps(projected, self.image_size // PATCH))


def _stage(config: TinyViTConfig, index: int) -> Stage:
    width, heads, window = config.widths[index], config.heads[index], config.windows[index]
    blocks: list[nn.Module] = [
        MBConv(width) if index == 0 else TinyViTBlock(width, heads, window)
        for _ in range(config.depths[index])
    ]
    if index == 3:
        return Stage(blocks, None)
    return Stage(blocks, PatchMerging(width, config.widths[index + 1], stride=1 if index == 2 else 2))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
