"""Initial weights from files: taken, left and refused ones."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mobilesam.distill import DistillConfig, DistillError, Run, build_student, distill, save_student
from mobilesam.distill.data.rows import RecordsByRow
from mobilesam.distill.students.init_weights import (
    InitialWeights,
    count_by_prefix,
    read_initial,
    resize_table,
    start_neck,
)
from mobilesam.sam import CheckpointError
from mobilesam.store import EmbeddingStore

timm = pytest.importorskip("timm")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports timm by names that timm deprecates
    upstream = pytest.importorskip("mobile_sam.modeling.tiny_vit_sam")

Options = Callable[..., DistillConfig]


def random_state_dict(network: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """Return a state of small numbers, none of them an initial value."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(value.shape, generator=generator) * 0.1 + 0.05
        if value.is_floating_point()
        else torch.tensor(7)
        for key, value in network.state_dict().items()
    }


def parameters(network: nn.Module, *, neck: bool = True) -> int:
    return sum(
        p.numel()
        for key, p in network.named_parameters()
        if neck or not key.startswith(("neck.", "laterals."))
    )


def started(initial: InitialWeights, name: str, image_size: int) -> nn.Module:
    student = build_student(name, image_size, seed=0)
    initial.apply(student)
    return student.eval()


def upstream_tiny_vit(image_size: int = 224, windows: tuple[int, ...] = (7, 7, 14, 7)) -> nn.Module:
    return upstream.TinyViT(
        img_size=image_size,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=list(windows),
        drop_path_rate=0.0,
        num_classes=1000,
    )


@pytest.fixture(scope="module")
def tiny_vit_state() -> dict[str, Tensor]:
    """MobileSAM's encoder under upstream's own names, classifier included."""
    return random_state_dict(upstream_tiny_vit())


def test_mobile_sams_encoder_is_taken_whole(tmp_path: Path, tiny_vit_state: dict[str, Tensor]) -> None:
    state = {f"image_encoder.{key}": value for key, value in tiny_vit_state.items()}
    file = tmp_path / "mobile_sam.pt"
    torch.save({**state, "mask_decoder.w": torch.zeros(2), "prompt_encoder.w": torch.zeros(2)}, file)
    initial = read_initial(file, "tiny_vit", 64)
    student = started(initial, "tiny_vit", 64)
    for key, value in student.state_dict().items():
        assert torch.equal(value, tiny_vit_state[key]), key
    assert initial.report() == {
        "file": "mobile_sam.pt",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "note": None,
        "naming": "image_encoder.*",
        "taken": {
            "weights": len(student.state_dict()),
            "parameters": 5_743_892,
            "of_parameters": 5_743_892,
        },
        "resized": [],
        "left_new": {},
        "unused_in_file": {"image_encoder": 4, "mask_decoder": 1, "prompt_encoder": 1},
    }


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_tiny_vits_releases_are_taken_without_neck_and_classifier(
    tmp_path: Path, tiny_vit_state: dict[str, Tensor], wrapper: str | None
) -> None:
    state = {key: value for key, value in tiny_vit_state.items() if not key.startswith("neck.")}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "tiny_vit.pth")
    initial = read_initial(tmp_path / "tiny_vit.pth", "tiny_vit", 64)
    student = started(initial, "tiny_vit", 64)
    new = build_student("tiny_vit", 64, seed=0).state_dict()
    for key, value in student.state_dict().items():
        assert torch.equal(value, new[key] if key.startswith("neck.") else state[key]), key
    report = initial.report()
    assert report["naming"] == "plain"
    assert report["taken"]["parameters"] == parameters(student, neck=False)
    assert report["left_new"] == {"neck": 6}
    assert report["unused_in_file"] == {"head": 2, "norm_head": 2}


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "module._orig_mod.net.encoder."])
def test_words_before_all_names_are_left_out(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + key: value for key, value in deit_state().items()}, tmp_path / "deit.pth")
    torch.save(deit_state(), tmp_path / "plain.pth")
    plain = read_initial(tmp_path / "plain.pth", "deit_tiny", 64)
    assert read_initial(tmp_path / "deit.pth", "deit_tiny", 64).taken == plain.taken


def test_timms_tiny_vit_computes_in_ours_what_it_computes_in_timm(tmp_path: Path) -> None:
    # By timm's own function: upstream, imported above, registers its network under the same name.
    theirs = timm.models.tiny_vit_5m_224(num_classes=10)
    theirs.load_state_dict(random_state_dict(theirs))
    theirs.eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    initial = read_initial(tmp_path / "model.safetensors", "tiny_vit", 64)
    ours = started(initial, "tiny_vit", 64)
    report = initial.report()
    assert report["naming"] == "timm's tiny_vit"
    assert report["left_new"] == {"neck": 6}
    assert report["unused_in_file"] == {"head": 4}
    # Up to the last downsampling, whose stride is timm's own.
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs.stages[:3](theirs.patch_embed(x))
        found = ours.layers[0](ours.patch_embed(x))[1]
        found = ours.layers[1](found)[1]
        for block in ours.layers[2].blocks:
            found = block(found)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_attention_biases_of_another_window_are_resized_as_timm_does(tmp_path: Path) -> None:
    from timm.layers import resize_rel_pos_bias_table_levit

    state = random_state_dict(upstream_tiny_vit(384, (12, 12, 24, 12)))
    torch.save({"model": state}, tmp_path / "tiny_vit_384.pth")
    initial = read_initial(tmp_path / "tiny_vit_384.pth", "tiny_vit", 64)
    assert len(initial.resized) == 10
    assert all(key.endswith("attention_biases") for key in initial.resized)
    student = started(initial, "tiny_vit", 64)
    for key, value in student.state_dict().items():
        if key.endswith("attention_biases"):
            wanted = resize_rel_pos_bias_table_levit(state[key].T, value.T.shape).T
            torch.testing.assert_close(value, wanted)


def deit_state(seed: int = 5) -> dict[str, Tensor]:
    return random_state_dict(timm.create_model("deit_tiny_patch16_224", num_classes=7), seed)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("image_size", [64, 320])
def test_deits_positions_are_resized_as_timm_does_and_its_tokens_dropped(
    tmp_path: Path, distilled: bool, image_size: int
) -> None:
    from timm.layers import resample_abs_pos_embed

    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    state = random_state_dict(timm.create_model(name))
    torch.save({"model": state}, tmp_path / "deit.pth")
    initial = read_initial(tmp_path / "deit.pth", "deit_tiny", image_size)
    student = started(initial, "deit_tiny", image_size)
    grid = image_size // 16
    tokens = 2 if distilled else 1
    wanted = resample_abs_pos_embed(state["pos_embed"], [grid, grid], num_prefix_tokens=tokens)[:, tokens:]
    torch.testing.assert_close(student.state_dict()["backbone.pos_embed"], wanted)
    report = initial.report()
    assert report["naming"] == "timm"
    assert report["resized"] == ["backbone.pos_embed"]
    assert report["left_new"] == {"neck": 6}
    assert set(report["unused_in_file"]) == {"cls_token", "head"} | (
        {"dist_token", "head_dist"} if distilled else set()
    )


def test_deit_with_imagenets_weights_computes_the_patches_that_timm_computes(tmp_path: Path) -> None:
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=0, class_token=False, global_pool="")
    theirs.load_state_dict(random_state_dict(theirs))
    torch.save(theirs.state_dict(), tmp_path / "deit.pth")
    ours = started(read_initial(tmp_path / "deit.pth", "deit_tiny", 224), "deit_tiny", 224)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = theirs.eval().forward_features(x)
        wanted = ours.neck(tokens.transpose(1, 2).reshape(2, 192, 14, 14))
        torch.testing.assert_close(ours(x), wanted)


BACKBONES = ["resnet18", "mobilenetv3_small_100", "convnext_atto", "tiny_vit_5m_224", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_timms_weights_give_timms_feature_maps(tmp_path: Path, backbone: str) -> None:
    size = 224
    theirs = getattr(timm.models, backbone)()
    theirs.load_state_dict(random_state_dict(theirs))
    theirs.eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    initial = read_initial(tmp_path / "model.safetensors", f"timm:{backbone}", size)
    student = started(initial, f"timm:{backbone}", size)
    report = initial.report()
    assert report["naming"] == "timm"
    assert set(report["left_new"]) == {"laterals", "neck"}
    assert report["taken"]["parameters"] == parameters(student, neck=False)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, maps = theirs.forward_intermediates(x)
        found = student.backbone(x)
    strides = {size // one.shape[-1]: one for one in maps}
    for one in found:
        wanted = strides[size // one.shape[-1]]
        if one.shape == wanted.shape:  # mobilenetv3's last map lies beyond its last block
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)
    assert any(one.shape == strides[size // one.shape[-1]].shape for one in found)


def test_a_vits_class_token_stays_where_the_student_has_one(tmp_path: Path) -> None:
    state = random_state_dict(timm.create_model("vit_tiny_patch16_224"))
    torch.save(state, tmp_path / "vit.pth")
    initial = read_initial(tmp_path / "vit.pth", "timm:vit_tiny_patch16_224", 64)
    student = started(initial, "timm:vit_tiny_patch16_224", 64).state_dict()
    assert torch.equal(student["backbone.model.pos_embed"][:, 0], state["pos_embed"][:, 0])
    assert torch.equal(student["backbone.model.cls_token"], state["cls_token"])


@pytest.mark.parametrize("name", ["tiny_vit", "deit_tiny", "timm:resnet18"])
def test_an_earlier_students_file_is_taken_whole(tmp_path: Path, name: str) -> None:
    original = build_student(name, 64, seed=8)
    save_student(original, tmp_path / "student.safetensors", name, 64, {})
    initial = read_initial(tmp_path / "student.safetensors", name, 64)
    student = started(initial, name, 64)
    assert initial.left == initial.unused == initial.resized == []
    for key, value in original.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key


def test_half_precision_is_taken_as_float32(tmp_path: Path) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in deit_state().items()}
    save_file(state, tmp_path / "half.safetensors")
    initial = read_initial(tmp_path / "half.safetensors", "deit_tiny", 224)
    assert all(value.dtype == torch.float32 for value in initial.tensors.values())


# What is refused


def test_weights_of_another_network_are_refused_with_the_numbers(tmp_path: Path) -> None:
    save_file(random_state_dict(timm.create_model("resnet18")), tmp_path / "resnet.safetensors")
    with pytest.raises(DistillError, match=r"fit tiny_vit: it has 0 of .* 5,071,124 parameters") as caught:
        read_initial(tmp_path / "resnet.safetensors", "tiny_vit", 64)
    assert "patch_embed.seq.0.c.weight is missing" in str(caught.value)


def test_a_larger_variant_is_refused_with_its_shapes(tmp_path: Path) -> None:
    torch.save(build_student("tiny_vit_21m", 64, seed=0).state_dict(), tmp_path / "21m.pt")
    with pytest.raises(DistillError, match=r"patch_embed.* \(48, 3, 3, 3\), wanted \(32, 3, 3, 3\)"):
        read_initial(tmp_path / "21m.pt", "tiny_vit", 64)


def test_exactly_half_of_the_parameters_is_the_limit(tmp_path: Path) -> None:
    student = build_student("timm:resnet18", 64, seed=0)
    state = dict(student.state_dict())
    encoder = {key: p.numel() for key, p in student.named_parameters() if key.startswith("backbone.")}
    while 2 * sum(encoder.values()) >= parameters(student, neck=False):
        save_file({key: state[key].clone() for key in encoder}, tmp_path / "part.safetensors")
        assert len(read_initial(tmp_path / "part.safetensors", "timm:resnet18", 64).taken) == len(encoder)
        encoder.pop(max(encoder, key=lambda key: encoder[key]))
    save_file({key: state[key].clone() for key in encoder}, tmp_path / "part.safetensors")
    with pytest.raises(DistillError, match="half are needed"):
        read_initial(tmp_path / "part.safetensors", "timm:resnet18", 64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    state = deit_state()
    state["blocks.3.attn.qkv.bias"][5] = value
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(DistillError, match=r"aren't finite, in blocks\.3\.attn\.qkv\.bias"):
        read_initial(tmp_path / "nan.pth", "deit_tiny", 64)


@pytest.mark.parametrize("data", [b"", b"short", b"a page of text, no weights" * 100, bytes(100)])
def test_a_file_without_weights_is_one_clear_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    said = "safetensors" if data else "empty"
    with pytest.raises(CheckpointError, match=said):
        read_initial(tmp_path / "file", "tiny_vit", 64)


def test_a_missing_file_and_a_folder_without_a_student_are_named(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"none\.pt does not exist"):
        read_initial(tmp_path / "none.pt", "tiny_vit", 64)
    with pytest.raises(DistillError, match=r"no student at .*student\.safetensors"):
        read_initial(tmp_path, "tiny_vit", 64)


def test_a_truncated_file_is_one_clear_error(tmp_path: Path) -> None:
    torch.save(deit_state(), tmp_path / "deit.pth")
    save_file(deit_state(), tmp_path / "deit.safetensors")
    for name in ("deit.pth", "deit.safetensors"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            read_initial(tmp_path / name, "deit_tiny", 64)


def test_a_damaged_student_file_is_found_by_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "student.safetensors"
    save_student(build_student("deit_tiny", 64, seed=8), file, "deit_tiny", 64, {})
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(DistillError, match="SHA-256"):
        read_initial(file, "deit_tiny", 64)


class Foreign:
    """An object as training scripts pickle them beside the weights."""


def test_objects_beside_the_weights_are_left_out_and_named(tmp_path: Path) -> None:
    torch.save({"model": deit_state(), "args": Foreign()}, tmp_path / "deit.pth")
    initial = read_initial(tmp_path / "deit.pth", "deit_tiny", 64)
    assert initial.note == f"deit.pth: took {len(deit_state())} tensors under 'model'; left out: args"


def test_a_forged_table_of_terabytes_is_not_resized() -> None:
    forged = torch.zeros(1).as_strided((1, 2**40, 192), (0, 0, 0))
    assert resize_table("backbone.pos_embed", forged, (1, 16, 192)) is None
    forged = torch.zeros(1).as_strided((4, 2**40), (0, 0))
    assert resize_table("x.attention_biases", forged, (4, 49)) is None


@pytest.mark.parametrize(
    ("key", "shape", "wanted"),
    [
        ("pos_embed", (1, 197, 192), (1, 16, 384)),
        ("pos_embed", (1, 196, 192), (1, 17, 192)),
        ("pos_embed", (1, 195, 192), (1, 16, 192)),
        ("attention_biases", (4, 50), (4, 49)),
        ("attention_biases", (5, 196), (4, 49)),
        ("weight", (1, 197, 192), (1, 16, 192)),
    ],
)
def test_tensors_that_are_no_resizable_table_are_left(
    key: str, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    assert resize_table(key, torch.zeros(shape), wanted) is None


def test_keys_are_counted_by_their_first_part() -> None:
    assert count_by_prefix(["head.weight", "head.bias", "norm", "a.b.c"]) == {"a": 1, "head": 2, "norm": 1}


# Runs


def test_a_run_starts_from_the_file_and_remembers_it(
    store: Path, options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "deit.pth"
    torch.save(deit_state(), file)
    with caplog.at_level(logging.INFO, "mobilesam"):
        # So low a rate leaves the weights where they began.
        result = distill(options(store, student="deit_tiny", init=file, epochs=1, lr=1e-12))
    run = Run.open(result["run"])
    student, info = run.student()
    assert torch.allclose(student.state_dict()["backbone.norm.weight"], deit_state()["norm.weight"])
    init = run.description.init
    assert init["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert run.description.identity["init_sha256"] == init["sha256"]
    assert "init" not in run.description.identity
    assert info["init"] == init == json.loads(json.dumps(init))
    assert "starting from" in caplog.text
    assert "left new: neck (6); unused in the file: cls_token (1), head (2)" in caplog.text


def test_another_file_is_another_run_and_the_same_content_elsewhere_is_not(
    store: Path, options: Options, tmp_path: Path, small: str
) -> None:
    files = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    for seed, file in zip((5, 6), files, strict=False):
        torch.save(build_student(small, 64, seed).state_dict(), file)
    files[2].write_bytes(files[0].read_bytes())

    def run(**changes: Any) -> str:
        return distill(options(store, student=small, epochs=1, **changes))["run"]

    first, second, third, without = (*(run(init=file) for file in files), run())
    assert len({first, second, without}) == 3
    assert third == first
    with pytest.raises(DistillError, match="init_sha256"):
        run(init=files[1], out=first)
    with pytest.raises(DistillError, match="init_sha256"):
        run(out=first)


def test_a_resumed_run_does_not_start_from_the_file_again(
    store: Path, options: Options, tmp_path: Path, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesam.distill import DistillInterrupted, Progress, StopFlag

    torch.save(build_student(small, 64, seed=5).state_dict(), tmp_path / "small.pth")
    config = options(store, student=small, init=tmp_path / "small.pth", epochs=2)
    whole = distill(config)["val"]
    applied: list[InitialWeights] = []
    apply = InitialWeights.apply
    monkeypatch.setattr(
        InitialWeights, "apply", lambda self, student: (applied.append(self), apply(self, student))
    )
    stop = StopFlag()

    def after_two_steps(progress: Progress) -> None:
        if progress.step == 2:
            stop.signum = 15

    config = options(store, student=small, init=tmp_path / "small.pth", epochs=2, out=tmp_path / "again")
    with pytest.raises(DistillInterrupted):
        distill(config, progress=after_two_steps, stop=stop)
    assert distill(config)["val"] == whole
    assert len(applied) == 1


def test_a_file_that_does_not_fit_leaves_no_run_behind(store: Path, options: Options, tmp_path: Path) -> None:
    torch.save(deit_state(), tmp_path / "deit.pth")
    with pytest.raises(DistillError, match="fit tiny_vit"):
        distill(options(store, init=tmp_path / "deit.pth"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("region", ["all", "valid"])
def test_a_neck_starts_at_the_teachers_mean_and_deviation(
    tmp_path: Path, make_store: Callable[..., Path], region: str
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (64, 32), (32, 64)]):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
    embeddings = np.random.default_rng(0).normal(3.0, 0.1, (3, 256, 4, 4)).astype(np.float32)
    valid = np.ones((3, 4, 4), bool)
    valid[1, 2:] = valid[2, :, 2:] = region == "all"
    path = make_store(folder, image_size=64, embeddings=embeddings, dtype="float32")
    student = build_student("tiny_vit", 64, 0)
    with EmbeddingStore.open(path) as store:
        start_neck(student, 0.5, store, list(RecordsByRow(store)), region)
    cells = embeddings.transpose(0, 2, 3, 1)[valid].astype(np.float64)
    np.testing.assert_allclose(student.neck[-1].bias.detach(), cells.mean(0), rtol=1e-5)
    np.testing.assert_allclose(student.neck[-1].weight.detach(), 0.5 * cells.std(0), rtol=1e-4)
