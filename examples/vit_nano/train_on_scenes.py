"""Train vit_nano further, on scenes, photos and plain pictures whose masks have three levels.

    python -m examples.vit_nano.fetch_photos --out scenes/photos
    python -m examples.vit_nano.train_on_scenes --work scenes --start nano.safetensors --until 11000 --sizes 256 512
    python -m examples.vit_nano.train_on_scenes --work scenes --until 14500 --sizes 256 512 1024 --final-lr 0
    python -m examples.vit_nano.train_on_scenes --work scenes --save sam/vit_nano.safetensors

It starts from weights of train.py. Each command makes the pictures that are missing, goes on where the last
one ended or was stopped, and trains --until a step, counted on from those of the weights; the learning rate changes
linearly to --final-lr. A point lies in a part, in a whole and in a group: SAM's three masks learn all of them, and
their predicted IoU that with the one that was drawn. Needs scikit-image and scipy.

Shape suffixes: B images, C channels, H and W rows and columns, L levels, M side of the masks compared, P prompts,
T mask tokens, S side of the square, p some of the prompts.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.vit_nano.layered_pictures import CHANCES, KINDS, SIDE, draw_prompts, make, square
from examples.vit_nano.train import (
    FOCAL,
    SEED,
    TWO_ROUNDS,
    Run,
    Sam,
    call,
    contrastive_loss,
    save,
    validate,
)
from mobilesam.distill.loss.coupled import valid_pixels
from mobilesam.distill.loss.mask_prompts import box_prompts, pixels_to_square
from mobilesam.distill.loss.masks import MaskLoss, MaskLossWeights, PromptedObjects, prompt_losses
from mobilesam.sam.allocator import keep_freed_memory
from mobilesam.sam.device import cpu_accelerates_bfloat16
from mobilesam.sam.modeling.decode_prompts import Prompts, decode_prompts
from mobilesam.sam.photos.preprocess import normalize_and_pad

# (pictures, prompts for each) in one step by image size in pixels, and the relative frequency of the sizes.
PROMPTED = {256: (5, 5), 512: (2, 6), 1024: (1, 6)}
SHARES = {256: 0.45, 512: 0.35, 1024: 0.2}
BOXES = 0.2
"""Share of the prompts that are boxes."""
OTHER_LEVELS = 0.5
"""Weight of the masks of other levels at a point."""
CONTRASTIVE = 0.3
LR = 4e-4
WEIGHTS = MaskLossWeights(focal=FOCAL)


@dataclass(frozen=True)
class Batch:
    """Samples of one image size: normalised pixels, sizes, numbers of the objects, and prompts."""

    pixels_BCSS: Tensor
    sizes_B2: Tensor
    levels_BLMM: Tensor
    image_P: Tensor
    """int64, index of each prompt's image."""
    level_P: Tensor
    """int64, level of the object that was drawn."""
    points_P2: Tensor
    """int64, x and y in pixels of the masks."""


def batch_of(pictures: dict[str, list[Path]], side: int, rng: np.random.Generator) -> Batch:
    """Draw the samples and prompts of one step.

    Args:
        pictures: paths by kind.
        side: image size in pixels.
        rng: random generator.
    """
    number, count = PROMPTED[side]
    samples, prompts = [], []
    while len(samples) < number:
        kind = str(rng.choice(list(CHANCES), p=list(CHANCES.values())))
        paths = pictures["large" if kind == "plain" and side > SIDE else kind]
        sample = square(paths[rng.integers(len(paths))], side, rng)
        drawn = draw_prompts(sample, count, rng)
        if drawn:
            prompts += [(len(samples), prompt) for prompt in drawn]
            samples.append(sample)
    sizes_B2 = torch.tensor([sample.size for sample in samples])
    pixels = torch.from_numpy(np.stack([sample.canvas_SSC for sample in samples]))
    return Batch(
        pixels_BCSS=normalize_and_pad(pixels, sizes_B2),
        sizes_B2=sizes_B2,
        levels_BLMM=torch.from_numpy(np.stack([sample.levels_LMM for sample in samples])).long(),
        image_P=torch.tensor([image for image, _ in prompts]),
        level_P=torch.tensor([prompt.level for _, prompt in prompts]),
        points_P2=torch.tensor([(prompt.x, prompt.y) for _, prompt in prompts]),
    )


class LayeredSam(Sam):
    """Encoder and head of one image size; `forward` returns the mean loss and the mean IoU of picked masks."""

    def forward(self, batch: Batch, rng: np.random.Generator) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_accelerates_bfloat16()):
            emb_BCHW = self.image_encoder(batch.pixels_BCSS)
            loss, picked = self._mask_loss(emb_BCHW, batch, rng)
        emb_BCHW, prompts = emb_BCHW.float(), len(batch.image_P)
        if emb_BCHW.shape[-1] <= SIDE // 16:
            level_BMM = batch.levels_BLMM[:, int(rng.integers(3))]
            valid_BMM = valid_pixels(batch.sizes_B2, self.head.image_size, level_BMM.shape[-1])
            loss = loss + CONTRASTIVE * contrastive_loss(emb_BCHW, level_BMM, valid_BMM) * prompts
        return loss / prompts, picked

    def _mask_loss(self, emb_BCHW: Tensor, batch: Batch, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the summed loss of the prompts, and the mean IoU of the masks picked for points."""
        side, masks = self.head.image_size, batch.levels_BLMM.shape[-1]
        rows_P, (x_P, y_P) = torch.arange(len(batch.image_P)), batch.points_P2.unbind(1)
        levels_PLMM = batch.levels_BLMM[batch.image_P]
        numbers_PL = levels_PLMM[rows_P, :, y_P, x_P]
        objects_PLMM = (levels_PLMM == numbers_PL[:, :, None, None]) & (numbers_PL > 0)[:, :, None, None]
        drawn_PMM = objects_PLMM[rows_P, batch.level_P]
        valid_BMM = valid_pixels(batch.sizes_B2, side, masks)
        loss, picked = emb_BCHW.new_zeros((), dtype=torch.float32), torch.zeros(())
        kind_P = torch.from_numpy(rng.choice(3, len(rows_P), p=(1 - BOXES - TWO_ROUNDS, BOXES, TWO_ROUNDS)))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        two_p = (kind_P == 2).nonzero()[:, 0]
        if len(two_p):
            some = PromptedObjects(
                masks_PMM=drawn_PMM[two_p],
                image_P=batch.image_P[two_p],
                valid_BMM=valid_BMM,
                weight_P=torch.ones(len(two_p)),
            )
            loss = loss + MaskLoss(rounds=2, weights=WEIGHTS)(self.head, emb_BCHW, some, generator)[0]
        for by_box in (False, True):
            some_p = (kind_P == int(by_box)).nonzero()[:, 0]
            if not len(some_p):
                continue
            if by_box:
                prompts = box_prompts(drawn_PMM[some_p], side, generator)
            else:
                prompts = Prompts.of_points(pixels_to_square(batch.points_P2[some_p], side, masks))
            emb_pCHW = emb_BCHW.index_select(0, batch.image_P[some_p])
            logits_pTMM, iou_pT = decode_prompts(self.head, emb_pCHW, prompts)
            logits_pTMM, iou_pT = logits_pTMM.float(), iou_pT.float()
            if logits_pTMM.shape[-1] != masks:
                logits_pTMM = F.interpolate(logits_pTMM, (masks, masks), mode="bilinear", align_corners=False)
            valid_pMM = valid_BMM[batch.image_P[some_p]]
            single_p, _ = prompt_losses(
                logits_pTMM[:, :1], iou_pT[:, :1], drawn_PMM[some_p], valid_pMM, WEIGHTS
            )
            if by_box:
                loss = loss + single_p.sum()
                continue
            three = logits_pTMM[:, 1:], iou_pT[:, 1:]
            three_p, true_pT = prompt_losses(*three, drawn_PMM[some_p], valid_pMM, WEIGHTS)
            picked = true_pT.gather(1, three[1].argmax(1, keepdim=True)).mean()
            other_p = _other_levels(three, objects_PLMM[some_p], drawn_PMM[some_p], valid_pMM)
            loss = loss + ((single_p + three_p + OTHER_LEVELS * other_p) / 2).sum()
        return loss, picked


def _other_levels(
    three: tuple[Tensor, Tensor], objects_PLMM: Tensor, drawn_PMM: Tensor, valid_PMM: Tensor
) -> Tensor:
    """Return the summed losses (P,) of the masks of other levels at each point, each of its best token.

    Args:
        three: logits (P, 3, M, M) and predicted IoUs (P, 3) of SAM's three masks.
        objects_PLMM: bool, the masks at each point.
        drawn_PMM: bool, those drawn, which don't count again.
        valid_PMM: bool, pixels that count.
    """
    weights = MaskLossWeights(focal=FOCAL, iou=0.0)
    total_P = torch.zeros(len(drawn_PMM))
    for level in range(objects_PLMM.shape[1]):
        object_PMM = objects_PLMM[:, level]
        counts_P = (object_PMM != drawn_PMM).flatten(1).any(1) & object_PMM.flatten(1).any(1)
        if counts_P.any():
            total_P = total_P + prompt_losses(*three, object_PMM, valid_PMM, weights)[0] * counts_P
    return total_P


def train(run: Run, pictures: dict[str, list[Path]], until: int, sizes: list[int], final_lr: float) -> None:
    """Train until a step, with a line in log.jsonl for every 50.

    Args:
        run: training state; it is saved every 50 steps.
        pictures: paths by kind.
        until: step to stop at.
        sizes: image sizes.
        final_lr: learning rate at that step.
    """
    at_sizes, plain = {side: LayeredSam(side) for side in sizes}, {256: Sam(256)}
    chances = np.array([SHARES[side] for side in sizes]) / sum(SHARES[side] for side in sizes)
    log = (run.folder / "log.jsonl").open("a")
    start, window = time.monotonic(), []
    while run.step < until:
        rng = np.random.default_rng([SEED, run.step])
        side = int(rng.choice(sizes, p=chances))
        run.lr += (final_lr - run.lr) / (until - run.step)
        run.set_rate()
        loss, picked = call(at_sizes, run.weights(), side, batch_of(pictures, side, rng), rng)
        loss.backward()
        run.update()
        window.append((float(loss.detach()), float(picked)))
        if run.step % 50 == 0 or run.step == until:
            means = np.mean(window, 0).round(4).tolist()
            line = {"step": run.step, "lr": run.lr, "loss": means[0], "picked_iou": means[1]}
            line["seconds"] = round(time.monotonic() - start)
            if run.step % 1000 == 0 or run.step == until:
                line |= validate(run, plain, [256])
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
            window = []
            run.save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the training")
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="train until this step, counted from --start's"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], choices=sorted(PROMPTED), metavar="PX")
    parser.add_argument("--final-lr", type=float, default=LR, metavar="X")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the averaged weights")
    parser.add_argument("--start", type=Path, metavar="FILE", help="initial weights, as written by --save")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that make pictures")
    options = parser.parse_args()
    keep_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    run = Run(options.work, options.start, LR)
    if options.until is not None and options.until > run.step:
        pictures = {kind: make(options.work, kind, options.workers) for kind in KINDS}
        train(run, pictures, options.until, options.sizes, options.final_lr)
    if options.save is not None:
        save(run, options.save)
        print(f"weights as of step {run.step} in {options.save}")


if __name__ == "__main__":
    main()
