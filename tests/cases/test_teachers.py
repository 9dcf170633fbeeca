"""Teachers of others: entry points of other packages, and SAM-HQ, through the commands."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from one_process import one_process_cluster
from PIL import Image
from safetensors.torch import load
from segment_anything import SamPredictor
from small_student import registered_small_student
from teacher_packages import AVERAGE, install_package
from upstream_hq import PROMPTS, write_upstream

from mobilesam.cli import main
from mobilesam.predict.model import load_teacher_model
from mobilesam.sam.modeling.head_shapes import HQ_PREFIXES
from mobilesam.sam.registry import TEACHERS, CheckpointFile, TeacherInfo
from mobilesam.sam.teacher import load_head, load_teacher
from mobilesam.store import EmbeddingStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "teacher_package"
HQ_SIZES = {"width": 64, "depth": 3, "heads": 2, "global_blocks": (1, 2)}
SIDE = 64


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _json(*arguments: object) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    torch.set_num_threads(1)
    with one_process_cluster() as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOBILESAM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def photos(place: Path) -> Path:
    """Four pictures of coarse noise, 64 x 48 pixels."""
    (place / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((64, 48)).save(place / "photos" / f"{number}.png")
    return place / "photos"


Install = Callable[..., None]


@pytest.fixture
def install(place: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(source, teacher=..., version=..., module=...): a package in the import path."""
    site = place / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install_now(source: str, **named: str) -> None:
        install_package(site, source, **named)
        monkeypatch.delitem(sys.modules, named.get("module", "their_teacher"), raising=False)
        importlib.invalidate_caches()

    return install_now


@pytest.fixture
def precompute(photos: Path, scheduler: str) -> Callable[..., Result]:
    """precompute(*more): the command on the pictures with the teacher `theirs`, at 64 pixels."""

    def run(*more: object, teacher: str = "theirs", out: str = "store.zarr") -> Result:
        return _run(
            "precompute", "--images", photos, "--out", out, "--teacher", teacher, "--image-size", SIDE,
            "--scheduler", scheduler, "--audit", 1, "--shard-size", 2, *more,
        )  # fmt: skip

    return run


# ---- teachers of other packages


def test_another_packages_teacher_is_embedded_audited_and_recorded(
    precompute: Callable[..., Result], install: Install, photos: Path
) -> None:
    """Section 1: an entry point works like a built-in teacher, and the store records where it came from."""
    install(AVERAGE)
    planned = precompute("--dry-run", "--json")
    assert json.loads(planned.stdout)["pending"] == 4, planned.output
    made = precompute("--json")
    result = json.loads(made.stdout)
    assert (result["done"], result["failed"], result["out_of_tolerance"]) == (4, 0, False)
    assert result["audit"]["rows"] == 1
    assert "theirs of their_teacher 1.0 has no mask head" in made.stderr
    with EmbeddingStore.open("store.zarr") as store:
        spec = store.spec
        assert spec.teacher_package == {
            "distribution": "their_teacher", "version": "1.0", "entry_point": "their_teacher:load",
        }  # fmt: skip
        assert (spec.teacher, spec.checkpoint, spec.head_sha256) == ("theirs", None, None)
        lines = "theirs\ntheir_teacher\n1.0\ntheir_teacher:load"
        assert spec.checkpoint_sha256 == hashlib.sha256(lines.encode()).hexdigest()
        stored = store.read([0]).to_float32()
    pixels = torch.from_numpy(np.asarray(Image.open(photos / "0.png"))[None] / 255.0).float()
    assert pixels.shape == (1, 48, 64, 3)
    assert stored.shape == (1, 256, 4, 4)
    # The module's own formula: channels that differ by the factors' differences times the patch's mean.
    assert np.allclose(np.diff(stored[0, :, 0, 0], 2), 0, atol=0.01)
    assert np.abs(np.diff(stored[0, :, 0, 0])).max() > 0.001
    described = _json("inspect", "store.zarr", "--check")
    assert described["problems"] == []
    assert (described["teacher"], described["head"]) == ("theirs", False)
    assert "theirs of their_teacher 1.0 (their_teacher:load)" in _run("inspect", "store.zarr").stdout


def test_another_packages_teacher_is_resumed_and_extended_by_the_same_version_only(
    precompute: Callable[..., Result], install: Install, photos: Path
) -> None:
    """Section 1: --extend goes on with the same package, and refuses another version or none."""
    install(AVERAGE)
    assert precompute("--limit", 2).exit_code == 0
    assert precompute("--extend").exit_code == 0
    assert _json("inspect", "store.zarr")["rows"]["done"] == 4
    Image.new("RGB", (64, 48), "red").save(photos / "9.png")
    install(AVERAGE, version="1.1")
    refused = precompute("--extend")
    assert refused.exit_code == 3
    assert (
        "made with the teacher theirs of their_teacher 1.0, and here it is of their_teacher 1.1"
        in refused.stderr
    )
    install(AVERAGE, version="1.0")
    refused = precompute("--extend", "--checkpoint", photos / "9.png")
    assert refused.exit_code == 3
    assert "without a file: leave out --checkpoint" in refused.stderr
    assert precompute("--extend").exit_code == 0
    assert _json("inspect", "store.zarr")["rows"]["done"] == 5
    install(AVERAGE, teacher="renamed")
    gone = _run("precompute", "--images", photos, "--out", "store.zarr")
    assert gone.exit_code == 3
    assert "made with the teacher theirs of their_teacher 1.0, which is not installed here" in gone.stderr


def test_a_changed_checkpoint_of_another_package_is_refused(
    precompute: Callable[..., Result], install: Install, place: Path, photos: Path
) -> None:
    """Section 1: the checkpoint, a file or a folder, is known by the SHA-256 of its content."""
    reads = "\ndef load(checkpoint, device, image_size):\n    assert image_size == 64 and device == 'cpu'\n"
    install(AVERAGE + reads + "    assert checkpoint.exists()\n    return Average()\n")
    folder = place / "weights"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"a")
    (folder / "sub" / "b.bin").write_bytes(b"b")
    missing = precompute("--checkpoint", place / "nowhere")
    assert (missing.exit_code, "nowhere does not exist" in missing.stderr) == (3, True)
    assert precompute("--checkpoint", folder, "--limit", 2).exit_code == 0
    with EmbeddingStore.open("store.zarr") as store:
        assert store.spec.checkpoint == "weights"
        first = store.spec.checkpoint_sha256
    listing = subprocess.run(
        ["sha256sum", "a.bin", "sub/b.bin"], cwd=folder, capture_output=True, check=True
    ).stdout
    assert first == hashlib.sha256(listing).hexdigest()
    unnamed = precompute("--extend")
    assert unnamed.exit_code == 3
    assert f"made with weights (SHA-256 {first[:16]}): name it with --checkpoint" in unnamed.stderr
    (folder / "sub" / "b.bin").write_bytes(b"c")
    changed = precompute("--extend", "--checkpoint", folder)
    assert (changed.exit_code, "checkpoint_sha256: store" in changed.stderr) == (3, True)
    (folder / "sub" / "b.bin").write_bytes(b"b")
    assert precompute("--extend", "--checkpoint", folder).exit_code == 0


WRONG = {
    "shape": ("return means", r"gives \(1, 3, 4, 4\) for pixels \(1, 3, 64, 64\), not \(1, 256, 4, 4\)"),
    "type": (
        "return (means * 0).int().expand(-1, -1, 4, 4)[:, :1].repeat(1, 256, 1, 1)",
        "gives int32 numbers, not floating-point ones",
    ),
    "tuple": ("return (means, means)", "gives a tuple, not a tensor"),
    "NaN": (
        "return means[:, :1].repeat(1, 256, 1, 1) / 0 * float('nan')",
        "gives NaN or infinite values: 4,096 of 4,096 for an image of noise",
    ),
    "dropout": (
        "return nn.functional.dropout(means[:, :1].repeat(1, 256, 1, 1))",
        "gives one image two embeddings, alone and in a batch: their relative MSE ",
    ),
    "batch": (
        "return (means - means.mean(0))[:, :1].repeat(1, 256, 1, 1) + 0.01",
        "gives one image two embeddings, alone and in a batch",
    ),
    "raises": ("return self.nothing", "failed for pixels .* with AttributeError"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_teacher_that_gives_no_embeddings_is_refused_by_name(
    precompute: Callable[..., Result], install: Install, kind: str, place: Path
) -> None:
    """Section 1: a wrong result of another package's module is an error that names the package."""
    returned, told = WRONG[kind]
    source = AVERAGE.replace("return means.mean", f"{returned}\n        return means.mean")
    install(source)
    result = precompute()
    assert result.exit_code == 3
    assert "the teacher theirs of their_teacher 1.0" in result.stderr
    assert re.search(told, result.stderr), result.stderr
    assert "Traceback" not in result.output
    assert not (place / "store.zarr").exists()
    install(AVERAGE)
    assert precompute("--limit", 2).exit_code == 0
    # Later the workers find it, for a package whose version wasn't raised.
    install(source)
    again = precompute("--extend")
    assert again.exit_code == 3
    assert re.search(told, again.stderr), again.stderr
    rows = _json("inspect", "store.zarr")["rows"]
    assert (rows["done"], rows["failed"]) == (2, 0)


BROKEN = {
    "import nothing_there": "failed to import their_teacher:load with ModuleNotFoundError",
    "raise RuntimeError('at import')": "failed to import their_teacher:load with RuntimeError: at import",
    "": "failed to import their_teacher:load with AttributeError",
    "load = 3": "their_teacher:load is a int, not a function",
    "def load(checkpoint, device):\n    raise OSError('no weights here')": "with OSError: no weights here",
    "def load(checkpoint, device):\n    return lambda x: x": "returns a function, not a torch.nn.Module",
    "def load():\n    pass": "in their_teacher:load(checkpoint, device) with TypeError",
    "def load(checkpoint, device):\n    raise SystemExit(0)": "with SystemExit: 0",
}


def test_a_package_changes_no_settings_of_the_process(
    precompute: Callable[..., Result], install: Install
) -> None:
    """Section 1: a package that sets a default type, a seed and threads, and whose train() returns nothing."""
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.random.initial_seed()
    install(
        AVERAGE.replace(
            "def load(checkpoint, device):\n    return Average()",
            "torch.set_default_dtype(torch.float64)\n"
            "class Own(Average):\n"
            "    def train(self, mode=True):\n"
            "        super().train(mode)\n"
            "def load(checkpoint, device):\n"
            "    torch.set_num_threads(3); torch.manual_seed(7)\n"
            "    return Own()",
        )
    )
    assert precompute().exit_code == 0
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.random.initial_seed()) == before


def test_a_damaged_package_beside_the_teachers_is_passed_over(
    precompute: Callable[..., Result], install: Install, place: Path
) -> None:
    """Section 1: metadata of any installed package that can't be read costs no other package's teacher."""
    install(AVERAGE)
    (broken := place / "site" / "broken-1.0.dist-info").mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_bytes(b"[mobilesam.teachers]\n\xff\xfe\n")
    assert precompute().exit_code == 0


@pytest.mark.parametrize("source", BROKEN)
def test_a_package_that_fails_is_named_before_anything_is_written(
    precompute: Callable[..., Result], install: Install, source: str, place: Path
) -> None:
    """Section 1: an import error, a raising function, and what is no module are errors that name the package."""
    install(source)
    result = precompute()
    assert result.exit_code == 3
    assert "their_teacher 1.0" in result.stderr
    assert BROKEN[source] in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3
    assert not (place / "store.zarr").exists()


def test_what_a_package_prints_is_no_result(
    precompute: Callable[..., Result], install: Install, photos: Path, place: Path
) -> None:
    """Section 1: --json stays one object, whatever another package's code prints."""
    torch.save(load_head("vit_nano", None), place / "head.pt")
    install(
        "print('imported')\n"
        + AVERAGE.replace("        means", "        print('embedding')\n        means", 1)
    )
    assert json.loads(precompute("--json").stdout)["done"] == 4
    segmented = _json(
        "segment",
        photos / "0.png",
        "--teacher",
        "theirs",
        "--image-size",
        SIDE,
        "--point",
        30,
        20,
        "--head",
        "head.pt",
    )
    assert segmented["head"] == "head.pt"


def test_names_of_teachers_that_are_taken_twice_are_refused(
    precompute: Callable[..., Result], install: Install
) -> None:
    """Section 1: an entry point named as a built-in teacher or as another package's is an error that names both."""
    install(AVERAGE, teacher="vit_nano")
    result = precompute(teacher="vit_nano")
    assert result.exit_code == 3
    assert "their_teacher 1.0 has an entry point vit_nano" in result.stderr
    install(AVERAGE)
    install(AVERAGE, module="other_teacher")
    result = precompute()
    assert result.exit_code == 3
    assert "is in two packages" in result.stderr
    assert "their_teacher 1.0" in result.stderr
    assert "other_teacher 1.0" in result.stderr


def test_all_teachers_are_listed_beside_the_built_in_ones(
    precompute: Callable[..., Result], install: Install
) -> None:
    """Section 1: --teacher help and the error about an unknown name list the teachers of other packages."""
    none = _run("precompute", "--images", "photos", "--teacher", "nobody")
    assert none.exit_code == 2
    assert "no installed package adds one" in none.stderr
    install(AVERAGE)
    listed = _run("precompute", "--teacher", "help", "--images", "photos")
    assert listed.exit_code == 0
    assert listed.stdout == (
        f"built-in: {', '.join(TEACHERS)}\ntheirs: from their_teacher 1.0 (their_teacher:load)\n"
    )
    for command in (("precompute", "--images", "photos"), ("segment", "photos/0.png")):
        unknown = _run(*command, "--teacher", "nobody")
        assert unknown.exit_code == 2
        assert "or of other packages theirs (their_teacher 1.0)" in unknown.stderr


def test_a_store_without_a_head_trains_and_is_verified_without_masks(
    precompute: Callable[..., Result], install: Install, place: Path, scheduler: str
) -> None:
    """Section 1: a teacher without a mask head: embeddings are learned and compared; masks say what to give."""
    install(AVERAGE)
    assert precompute().exit_code == 0
    torch.save(load_head("vit_nano", None), place / "head.pt")
    with registered_small_student() as student:
        train = ("distill", "--store", "store.zarr", "--student", student, "--epochs", 1, "--batch-size", 2)
        more = ("--device", "cpu", "--val-fraction", 0.4)
        refused = _run(*train, *more, "--objective", "coupled", "--out", "c")
        assert refused.exit_code == 3
        assert "its teacher theirs gave none; use --objective decoupled" in refused.stderr
        _json(*train, *more, "--out", "run")
        verify = ("verify", "--student", "run", "--split", "all")
        plain = _json(*verify)
        assert "miou" not in plain
        assert plain["cosine_valid"]["mean"] <= 1
        (note,) = [note for note in plain["subject"]["notes"] if "no masks" in note]
        assert "its teacher theirs gave none: give --head" in note
        strict = _run(*verify, "--min-miou", 0.1)
        assert strict.exit_code == 3
        assert "--min-miou 0.1 asks for masks, but store.zarr has no mask head" in strict.stderr.replace(
            f"{place}/", ""
        )
        assert 0 <= _json(*verify, "--head", "head.pt")["miou"] <= 1
        segment = ("segment", "photos/0.png", "--student", "run", "--point", 30, 20)
        headless = _run(*segment)
        assert headless.exit_code == 3
        assert "learned from theirs, which has no mask head; give --head" in headless.stderr
        assert len(_json(*segment, "--head", "head.pt")["masks"]) == 1
        evaluate = (
            "evaluate",
            "--store",
            "store.zarr",
            "--model",
            "mine=run",
            "--points",
            1,
            "--distances",
            "none",
        )
        compared = _json(*evaluate, "--head", "head.pt", "--split", "all")
        assert compared["models"][0]["teacher"]["point"]["images"] == 4


def test_another_packages_teacher_shows_masks_with_a_head(
    photos: Path, install: Install, place: Path
) -> None:
    """Section 1: segment and evaluate take another package's teacher with --head, or with its own head_state()."""
    install(AVERAGE)
    segment = ("segment", photos / "0.png", "--teacher", "theirs", "--image-size", SIDE, "--point", 30, 20)
    refused = _run(*segment)
    assert refused.exit_code == 3
    assert "the teacher theirs of their_teacher 1.0 has no mask head" in refused.stderr
    torch.save(load_head("vit_nano", None), place / "head.pt")
    given = _json(*segment, "--head", "head.pt")
    assert (given["teacher"], given["head"]) == ("theirs", "head.pt")
    own = "\nAverage.head_state = lambda self: torch.load('head.pt', weights_only=True)\n"
    install(AVERAGE + own)
    alone = _json(*segment)
    assert (alone["head"], alone["masks"][0]["area"]) == ("theirs's own", given["masks"][0]["area"])
    compared = _json(
        "evaluate", "--images", photos, "--teacher", "theirs", "--model", "nano=vit_nano", "--image-size", SIDE,
        "--points", 1, "--distances", "none", "--limit", 1,
    )  # fmt: skip
    assert compared["reference"]["teacher"] == "theirs"
    assert 0 <= compared["models"][0]["teacher"]["point"]["miou"] <= 1
    install(
        AVERAGE + own.replace("weights_only=True)", "weights_only=True) | {'mask_decoder.x': torch.ones(1)}")
    )
    wrong = _run(*segment)
    assert wrong.exit_code == 3
    assert "head_state() isn't SAM's head" in wrong.stderr
    assert "1 are unknown; the first: mask_decoder.x" in wrong.stderr


def test_a_teachers_own_head_is_kept_in_the_store(
    precompute: Callable[..., Result], install: Install, place: Path
) -> None:
    """Section 1: the head that head_state() gives is the store's, and is restored from the package when damaged."""
    torch.save(load_head("vit_nano", None), place / "head.pt")
    install(AVERAGE + "\nAverage.head_state = lambda self: torch.load('head.pt', weights_only=True)\n")
    assert precompute().exit_code == 0
    with EmbeddingStore.open("store.zarr") as store:
        data = store.read_head()
        store.head_path.write_bytes(b"damaged")
    inspected = _run("inspect", "store.zarr", "--json")
    assert inspected.exit_code == 1
    assert [each["kind"] for each in json.loads(inspected.stdout)["problems"]] == ["head"]
    assert "rewrote" in precompute().stderr
    with EmbeddingStore.open("store.zarr") as store:
        assert store.read_head() == data


@pytest.mark.long
def test_the_example_package_installs_and_its_workers_find_it(tmp_path: Path, photos: Path) -> None:
    """Section 1: examples/teacher_package, installed by pip, works in worker processes, with provenance and head."""
    site, source = tmp_path / "installed", tmp_path / "teacher_package"
    shutil.copytree(EXAMPLE, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target",
         str(site), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    write = (
        "import torch; from pathlib import Path; import backbone_teacher as b\n"
        "from mobilesam.sam.teacher import load_head\n"
        "torch.manual_seed(0); t = b.BackboneTeacher('resnet18', load_head('vit_nano', None)).eval()\n"
        "b.save(t, 'resnet18', Path('weights.safetensors')); torch.manual_seed(1)\n"
        "x = torch.randn(1, 3, 64, 64); again = b.load(Path('weights.safetensors'), 'cpu').eval()\n"
        "assert torch.equal(t(x), again(x)) and t(x).shape == (1, 256, 4, 4)\n"
    )
    subprocess.run([sys.executable, "-c", write], check=True, env=env, cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mobilesam", "precompute", "--images", "photos", "--out", "store.zarr", "--teacher",
         "backbone", "--checkpoint", "weights.safetensors", "--image-size", "64", "--workers", "2", "--json"],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["done"], result["out_of_tolerance"], result["audit"]["rows"]) == (4, False, 2)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        assert store.spec.teacher_package == {
            "distribution": "backbone-teacher", "version": "1.0", "entry_point": "backbone_teacher:load",
        }  # fmt: skip
        weights = (tmp_path / "weights.safetensors").read_bytes()
        assert store.spec.checkpoint_sha256 == hashlib.sha256(weights).hexdigest()
        assert store.read_head()


# ---- SAM-HQ


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    """Weights and answers of a small SAM-HQ by its authors' package at 128 pixels, and the picture."""
    folder = tmp_path_factory.mktemp("hq")
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(folder / "picture.png")
    weights, answers = write_upstream(folder, {**HQ_SIZES, "image_size": 128}, folder / "picture.png")
    return weights, answers, folder / "picture.png"


@pytest.fixture
def _small_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register hq_small, and sam_small with the same encoder."""
    for name, hq in (("sam_small", False), ("hq_small", True)):
        info = TeacherInfo(
            name=name, parameters=1, macs_at_1024=1e9, architecture="vit.ViTConfig", settings=HQ_SIZES,
            trained_image_size=128, hq=hq,
            checkpoint=CheckpointFile(name=f"{name}.pth", url=f"https://example.org/{name}.pth"),
        )  # fmt: skip
        monkeypatch.setitem(TEACHERS, name, info)  # type: ignore[arg-type]  # a dict, which its users only read


def _relative(found: np.ndarray, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted.numpy()).max() / np.abs(wanted.numpy()).max())


def _differences(
    name: str, weights: Path, answers: Mapping[str, Any], picture: Path, size: int
) -> Iterator[float]:
    """Relative differences of our embedding, masks, scores and logits from upstream's."""
    model = load_teacher_model(name, weights, image_size=size)
    predictor = SamPredictor(model.sam)
    predictor.set_image(np.asarray(Image.open(picture).convert("RGB")))
    yield _relative(predictor.get_image_embedding()[:, :256].numpy(), answers["embedding"])
    for prompt, given in PROMPTS.items():
        arrays = {key: np.array(value) for key, value in given.items()}
        for multimask in (False, True):
            for alone in (False, True):
                model.sam.mask_decoder.hq_token_only = alone
                found = predictor.predict(**arrays, multimask_output=multimask, return_logits=True)
                for part, wanted in zip(found, answers[f"{prompt} {multimask} {alone}"], strict=True):
                    yield _relative(part, wanted)


@pytest.mark.usefixtures("_small_teachers")
def test_sam_hqs_embeddings_and_masks_are_its_authors(upstream: tuple[Path, dict[str, Any], Path]) -> None:
    """C4: encoder and HQ head give what segment_anything_hq gives, for every kind of prompt and output."""
    weights, answers, picture = upstream
    differences = list(_differences("hq_small", weights, answers, picture, 128))
    assert len(differences) == 1 + 3 * 3 * 4
    assert max(differences) < 1e-4


@pytest.mark.usefixtures("_small_teachers")
def test_segment_draws_sam_hqs_own_masks(upstream: tuple[Path, dict[str, Any], Path], place: Path) -> None:
    """C4: `segment --teacher` of SAM-HQ decodes with its HQ head, one mask a prompt."""
    weights, answers, picture = upstream
    common = ("segment", picture, "--image-size", 128, "--checkpoint", weights, "--masks", "masks")
    for name, prompt in (("point True", ("--point", 30, 40)), ("box False", ("--box", 10, 12, 50, 44))):
        result = _json(*common, "--teacher", "hq_small", *prompt)
        mask = np.asarray(Image.open(place / result["masks"][0]["file"])) > 0
        logits = answers[f"{name} False"][0][0].numpy()
        assert 0 < mask.mean() < 1
        # A logit within rounding of 0 may fall on either side.
        assert (mask != (logits > 0))[np.abs(logits) > 1e-4 * np.abs(logits).max()].sum() == 0
        assert result["head"] == "hq_small's own"
        plain = _json(*common, "--teacher", "sam_small", *prompt)
        other = np.asarray(Image.open(place / plain["masks"][0]["file"])) > 0
        assert (other != mask).any()


@pytest.mark.usefixtures("_small_teachers")
def test_sams_and_sam_hqs_files_are_told_apart(
    upstream: tuple[Path, dict[str, Any], Path], photos: Path, place: Path
) -> None:
    """C4: SAM-HQ's file as a SAM teacher is taken with a note that names the other; SAM's as SAM-HQ is refused."""
    weights, _, _ = upstream
    segment = ("segment", photos / "0.png", "--image-size", 128, "--point", 30, 20)
    (note,) = _json(*segment, "--teacher", "sam_small", "--checkpoint", weights)["notes"]
    assert "mask_decoder.hf_token (1 tensor)" in note
    assert note.endswith("--teacher hq_small decodes masks with SAM-HQ's layers")
    assert _json(*segment, "--teacher", "hq_small", "--checkpoint", weights)["notes"] == []
    state = torch.load(weights, weights_only=True)
    torch.save(
        {key: value for key, value in state.items() if not key.startswith(HQ_PREFIXES)}, place / "sam.pth"
    )
    refused = _run(*segment, "--teacher", "hq_small", "--checkpoint", "sam.pth")
    assert refused.exit_code == 3
    assert (
        "sam.pth is a sam_small checkpoint, not hq_small: its mask decoder lacks SAM-HQ's layers"
        in refused.stderr
    )
    assert "use --teacher sam_small" in refused.stderr


@pytest.mark.usefixtures("_small_teachers")
def test_evaluate_knows_sam_hqs_file_by_its_content(
    upstream: tuple[Path, dict[str, Any], Path], photos: Path
) -> None:
    """C4: `evaluate --model` of a file of SAM-HQ is SAM-HQ, not SAM; as --teacher it is compared with itself."""
    weights, _, _ = upstream
    result = _json(
        "evaluate", "--images", photos, "--teacher", "hq_small", "--checkpoint", weights, "--model", f"a={weights}",
        "--image-size", 128, "--points", 1, "--distances", "none", "--limit", 2,
    )  # fmt: skip
    (model,) = result["models"]
    assert (model["kind"], model["teacher"]["point"]["miou"]) == ("hq_small", 1)
    encoder = TEACHERS["hq_small"].encoder.build(128)
    assert model["encoder_parameters"] == sum(each.numel() for each in encoder.parameters())
    state = torch.load(weights, weights_only=True)
    assert model["parameters"] == sum(
        value.numel() for key, value in state.items() if "pixel_" not in key and "gaussian" not in key
    )


@pytest.mark.usefixtures("_small_teachers")
def test_a_student_of_sam_hq_gets_sams_part_of_its_head(
    upstream: tuple[Path, dict[str, Any], Path], photos: Path, scheduler: str, place: Path
) -> None:
    """C4: store, run, verify and export of an SAM-HQ teacher use SAM's part of the head, and say so."""
    weights, _, _ = upstream
    made = _run(
        "precompute", "--images", photos, "--out", "store.zarr", "--teacher", "hq_small", "--checkpoint", weights,
        "--image-size", SIDE, "--scheduler", scheduler, "--audit", 1, "--precision", "float32",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    note = "masks are of SAM's part of hq_small's head"
    sam = load_head("hq_small", weights)
    with EmbeddingStore.open("store.zarr") as store:
        head = load(store.read_head())
        stored = torch.from_numpy(store.read([0]).to_float32())
    assert head.keys() == sam.keys() == load_head("vit_nano", None).keys()
    assert all(torch.equal(head[key], sam[key]) for key in sam)
    assert stored.shape == (1, 256, 4, 4)
    with registered_small_student() as student:
        _json(
            "distill", "--store", "store.zarr", "--student", student, "--epochs", 1, "--batch-size", 2, "--objective",
            "coupled", "--device", "cpu", "--val-fraction", 0.4, "--out", "run",
        )  # fmt: skip
        verified = _json("verify", "--student", "run", "--split", "all", "--points", 1)
        assert 0 <= verified["miou"] <= 1
        assert any(note in each for each in verified["subject"]["notes"])
        segmented = _json("segment", "photos/0.png", "--student", "run", "--point", 30, 20)
        assert any(note in each for each in segmented["notes"])
        evaluated = _json(
            "evaluate", "--store", "store.zarr", "--model", "mine=run", "--points", 1, "--distances", "none",
            "--split", "all",
        )  # fmt: skip
        assert any(note in each for each in evaluated["notes"])


@pytest.mark.usefixtures("_small_teachers")
def test_sam_hqs_folder_of_hugging_face_is_a_teacher(photos: Path, place: Path) -> None:
    """C4: transformers' SamHQModel, saved in a folder: its embeddings within 1e-4, and its head.

    Masks aren't compared: SamHQMaskDecoder of transformers 5 upscales the image embedding as it was before the
    transformer, unlike SAM-HQ's authors. Predicted IoUs are computed alike.
    """
    from transformers import (
        SamHQConfig,
        SamHQMaskDecoderConfig,
        SamHQModel,
        SamHQPromptEncoderConfig,
        SamHQVisionConfig,
    )

    vision = SamHQVisionConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, mlp_dim=256, image_size=128, patch_size=16,
        global_attn_indexes=[1, 2], output_channels=256,
    )  # fmt: skip
    prompts = SamHQPromptEncoderConfig(image_size=128, patch_size=16, image_embedding_size=8)
    torch.manual_seed(2)
    theirs = SamHQModel(
        SamHQConfig(
            vision_config=vision,
            prompt_encoder_config=prompts,
            mask_decoder_config=SamHQMaskDecoderConfig(vit_dim=64),
        )
    ).eval()
    for key, value in theirs.state_dict().items():
        if "pos" in key:  # zeros until trained
            value.normal_(0, 0.2)
    theirs.save_pretrained(place / "hq")
    result = _json(
        "segment",
        photos / "0.png",
        "--teacher",
        "hq_small",
        "--checkpoint",
        "hq",
        "--image-size",
        128,
        "--point",
        30,
        20,
    )
    assert "by Hugging Face's names" in result["notes"][0]
    ours = load_teacher_model("hq_small", place / "hq", image_size=128).sam
    pixels = torch.randn(1, 3, 128, 128)
    points = torch.tensor([[[30.0, 40.0], [60.0, 60.0]]]), torch.tensor([[1, 0]])
    with torch.no_grad():
        both = ours.image_encoder(pixels)
        embedding, features = theirs.get_image_embeddings(pixels)
        wanted = theirs(pixel_values=pixels, input_points=points[0][None], input_labels=points[1][None])
        sparse, dense = ours.prompt_encoder(points=points, boxes=None, masks=None)
        _, scores = ours.mask_decoder(both, ours.prompt_encoder.get_dense_pe(), sparse, dense, True)
    assert _relative(both[:, :256].numpy(), embedding) < 1e-4
    assert _relative(both[:, 256:].numpy(), features[0].permute(0, 3, 1, 2)) < 1e-4
    assert float(scores) == pytest.approx(float(wanted.iou_scores.max()), abs=1e-5)


def test_where_sam_hqs_files_come_from_is_said(photos: Path) -> None:
    """C4: without a file, the message names the address; a file whose SHA-256 isn't known isn't downloaded."""
    result = _run("segment", photos / "0.png", "--teacher", "hq_vit_b", "--point", 30, 20)
    assert result.exit_code == 3
    assert (
        "Download it from https://huggingface.co/lkeab/hq-sam/resolve/main/sam_hq_vit_b.pth" in result.stderr
    )
    assert "or give --checkpoint FILE" in result.stderr


@pytest.mark.long
def test_sam_hqs_vit_b_at_1024_is_its_authors(tmp_path: Path) -> None:
    """C4: ViT-B with random weights at 1024 pixels gives segment_anything_hq's embeddings and masks."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (683, 1024, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    sizes = {**TEACHERS["hq_vit_b"].settings, "image_size": 1024}
    weights, answers = write_upstream(tmp_path, sizes, tmp_path / "picture.png")
    assert max(_differences("hq_vit_b", weights, answers, tmp_path / "picture.png", 1024)) < 1e-4
    teacher = load_teacher("hq_vit_b", weights, image_size=64)
    assert teacher.embed(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 4, 4)
