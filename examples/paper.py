"""The paper's comparisons (MobileSAM, arXiv 2306.14289) in miniature: vit_nano, generated pictures, hours on a CPU.

    python examples/paper.py                    # like `make paper`: folder paper/, one to two hours on 2 cores
    python examples/paper.py --part recipe      # like `make paper PART=recipe`: two to three hours
    python examples/paper.py --scale small      # the same steps in a minute or two, as a test
    python examples/paper.py --write-docs       # writes the results into docs/PAPER.md
    python examples/paper.py --pictures 800 --seeds 0 1 2 3 4 --out paper-larger

Pictures are generated, and embedded by vit_nano. `comparisons`: students are distilled from them for several batch
sizes and epochs, with each objective that the paper compares, and from embeddings of other pictures than their own,
as a control. `recipe`: one student is distilled from many more pictures with the defaults of `mobilesam distill`. All
are evaluated by the IoU of their masks with vit_nano's, on pictures of another seed. A rerun resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from generate_pictures import write as write_pictures
from paper_tables import PARTS, document
from shuffled_store import shuffle_store

from mobilesam.common.errors import PrecomputeInterrupted
from mobilesam.distill import DistillConfig, DistillInterrupted, Progress
from mobilesam.distill.config import BATCH_SIZE
from mobilesam.precompute import PrecomputeConfig, precompute
from mobilesam.verify import EvaluateConfig, SweepConfig, evaluate_masks, sweep
from mobilesam.verify.sweep.grid import RUNS

DOCUMENT = Path(__file__).parents[1] / "docs" / "PAPER.md"
TRAIN_SEED, TEST_SEED, MANY_SEED = 101, 102, 103
SHUFFLE_SEED = 0
WAYS = ("decoupled", "semi_coupled", "coupled", "decoder")
BATCH, EPOCHS = BATCH_SIZE, int(DistillConfig().epochs)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of the experiment."""

    pictures: int
    """Training pictures of the comparisons."""
    test_pictures: int
    side: int
    """Longer side of a picture, pixels."""
    image_size: int
    """Side of the teacher's square, pixels."""
    lengths: tuple[tuple[int, int], ...]
    """(batch, epochs) of the paper's Table 4, the first two of equal iterations."""
    way: tuple[int, int]
    """(batch, epochs) at which the objectives are compared."""
    many: int
    """Training pictures of the default recipe's student (first seed) and of its control (one epoch)."""
    distances: tuple[int, ...]
    """Distances of the pairs of points in the evaluation of those two, pixels."""
    seeds: tuple[int, ...]


SCALES: Mapping[str, Scale] = {
    "full": Scale(
        pictures=300,
        test_pictures=60,
        side=256,
        image_size=256,
        lengths=((4, 2), (8, 4), (8, 8)),
        way=(4, 2),
        many=14000,
        distances=(11, 23, 34, 46, 57),
        seeds=(0, 1, 2),
    ),
    "small": Scale(
        pictures=14,
        test_pictures=4,
        side=128,
        image_size=128,
        lengths=((4, 1), (8, 2), (8, 4)),
        way=(8, 2),
        many=16,
        distances=(6, 11, 17, 23, 28),
        seeds=(0, 1),
    ),
}


class Paper:
    """Stages of the experiment in the folder `out`; finished ones are not repeated."""

    def __init__(self, scale: Scale, out: Path) -> None:
        self.scale, self.out = scale, out

    def run(self, part: str) -> dict[str, Any]:
        """Run the stages of one of PARTS; write PART.json and return its content."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._refuse_another_scale()
        test = self.store("test", self.scale.test_pictures, TEST_SEED)
        found = self.comparisons(test) if part == "comparisons" else self.recipe(test)
        results = {"scale": asdict(self.scale), "cores": len(os.sched_getaffinity(0)), **found}
        write_json(self.out / f"{part}.json", results)
        return results

    def comparisons(self, test: Path) -> dict[str, Any]:
        """Train the students by batch and epochs, by objective, and the control, for each seed."""
        train, seeds = self.store("train", self.scale.pictures, TRAIN_SEED), self.scale.seeds
        shuffled = self.shuffled(train)
        lengths = [
            outcome
            for length in self.scale.lengths
            for outcome in self.sweep("students", train, test, length, seeds, WAYS[:1])
        ]
        ways = self.sweep("students", train, test, self.scale.way, seeds, WAYS)
        control = self.sweep("control", shuffled, test, self.scale.way, seeds, WAYS[:1])
        return {"lengths": lengths, "ways": ways, "control": control}

    def recipe(self, test: Path) -> dict[str, Any]:
        """Train the default recipe's student and its control, and evaluate them with vit_nano."""
        many, seeds = self.store("many", self.scale.many, MANY_SEED), self.scale.seeds[:1]
        student = self.sweep("many", many, test, (BATCH, EPOCHS), seeds, WAYS[:1])
        control = self.sweep("many-control", self.shuffled(many), test, (BATCH, 1), seeds, WAYS[:1])
        evaluation = self.evaluate(
            test,
            student=self.out / "many" / RUNS / student[0]["run"],
            control=self.out / "many-control" / RUNS / control[0]["run"],
        )
        return {"student": student, "control": control, "evaluation": evaluation}

    def _refuse_another_scale(self) -> None:
        """Exit if `out` was begun with another scale, whose results are not comparable."""
        file, asked = self.out / "scale.json", json.loads(json.dumps(asdict(self.scale)))
        if file.exists() and (found := json.loads(file.read_text())) != asked:
            changes = [
                f"{name}: {found.get(name)} then, {asked[name]} now"
                for name in asked
                if found.get(name) != asked[name]
            ]
            sys.exit(
                f"{self.out} was begun differently ({'; '.join(changes)}); ask for the same, or give another --out"
            )
        file.write_text(json.dumps(asked) + "\n")

    def store(self, name: str, count: int, seed: int) -> Path:
        """Generate pictures of a seed and precompute vit_nano's embeddings; return the store."""
        pictures, store = self.out / f"pictures-{name}", self.out / f"{name}.zarr"
        say(f"making {count} pictures")
        write_pictures(pictures, seed, count, self.scale.side, workers=len(os.sched_getaffinity(0)))
        say(f"embedding {count} pictures")
        result = precompute(
            PrecomputeConfig(
                images=(pictures,), out=store, teacher="vit_nano", image_size=self.scale.image_size
            )
        )
        if result["failed"]:
            sys.exit(f"{result['failed']} of {count} pictures in {pictures} could not be embedded")
        return store

    def shuffled(self, store: Path) -> Path:
        """Return the control's store: the same pictures, each with the embedding of another one."""
        shuffled = store.with_name(f"shuffled-{store.name}")
        if not shuffled.exists():
            say("giving each picture the embedding of another one, for the control")
            shuffle_store(store, shuffled, SHUFFLE_SEED)
        return shuffled

    def sweep(
        self,
        name: str,
        store: Path,
        test: Path,
        length: tuple[int, int],
        seeds: Sequence[int],
        ways: Sequence[str],
    ) -> list[Mapping[str, Any]]:
        """Train students with these objectives, batch and epochs; return their results.

        The folder `name` may already hold other runs.
        """
        batch, epochs = length
        config = SweepConfig(
            out=self.out / name,
            base=DistillConfig(store=store, micro_batch=batch),
            axes={
                "seed": tuple(seeds),
                "objective": tuple(ways),
                "batch_size": (batch,),
                "epochs": (epochs,),
            },
            test_store=test,
        )
        result = sweep(config, message=say, progress=Ticker())
        if result["failed"]:
            sys.exit(f"{result['failed']} runs failed; fix the errors above and run the same command again")
        return list(result["runs"])

    def evaluate(self, test: Path, **students: Path) -> dict[str, Any]:
        """Evaluate the students and vit_nano: pairs of points, labels, cost."""
        kept = self.out / "evaluation.json"
        if kept.exists():
            return json.loads(kept.read_text())
        say("evaluating the student of many pictures, its control and vit_nano")
        found = evaluate_masks(
            EvaluateConfig(
                store=test,
                models=(*((name, str(run)) for name, run in students.items()), ("vit_nano", "vit_nano")),
                distances=self.scale.distances,
                report=self.out / "masks.html",
            )
        )
        write_json(kept, found)
        return found


class Ticker:
    """Progress of a run: one line after each epoch."""

    def __init__(self) -> None:
        self._last = (0, 0)

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "validate" and (progress.epoch, progress.steps) != self._last:
            self._last = (progress.epoch, progress.steps)
            loss = "" if progress.loss is None else f", loss {progress.loss:.4g}"
            say(
                f"  epoch {progress.epoch} of {progress.epochs}{loss}, {progress.images_per_second:.3g} images/s"
            )


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    draft = file.with_name(f"{file.name}.partial")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.rename(file)


def say(text: str) -> None:
    """Print to standard error; standard output is for the tables."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=tuple(PARTS), default="comparisons")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--pictures", type=int, metavar="N", help="training pictures, instead of the scale's")
    parser.add_argument("--test-pictures", type=int, metavar="N")
    parser.add_argument("--many", type=int, metavar="N", help="training pictures of the default recipe")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S")
    parser.add_argument("--out", type=Path, metavar="DIR", help="[default: paper, or paper-small]")
    parser.add_argument(
        "--write-docs", action="store_true", help="only write the results of the parts into docs/PAPER.md"
    )
    parser.add_argument("--document", type=Path, default=DOCUMENT, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out or Path("paper" if options.scale == "full" else f"paper-{options.scale}")
    if options.write_docs:
        found = {part: out / f"{part}.json" for part in PARTS if (out / f"{part}.json").exists()}
        if not found:
            sys.exit(f"{out} has no results: run this without --write-docs first")
        text = options.document.read_text()
        for part, file in found.items():
            text = document(text, part, json.loads(file.read_text()))
        options.document.write_text(text)
        say(f"wrote {' and '.join(found)} into {options.document}")
        return
    names = ("pictures", "test_pictures", "many", "seeds")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "seeds" in given:
        given["seeds"] = tuple(given["seeds"])
    try:
        results = Paper(replace(SCALES[options.scale], **given), out).run(options.part)
    except (DistillInterrupted, PrecomputeInterrupted) as error:
        say(str(error))
        sys.exit(128 + error.signum)
    print("\n".join(PARTS[options.part](results)))


if __name__ == "__main__":  # precompute starts processes, which import this file
    main()
