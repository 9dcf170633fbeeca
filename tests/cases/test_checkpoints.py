"""Weights as people bring them: wrapped, renamed, extended, in other formats, through all commands that take them."""

from __future__ import annotations

import argparse
import json
import struct
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gradient_photo import gradient_photo
from one_process import one_process_cluster
from PIL import ImageOps
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.serialization import config as torch_files

from mobilesam.cli import main
from mobilesam.distill.students import cost
from mobilesam.sam.modeling.head_shapes import head_shapes
from mobilesam.sam.modeling.tiny_vit import TinyViT
from mobilesam.sam.registry import TEACHERS, CheckpointFile, TeacherInfo
from mobilesam.sam.teacher import load_head, load_teacher, state_shapes
from mobilesam.store import EmbeddingStore

POINT = ("--point", 40, 40)
SMALL = ("--image-size", 64)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*arguments: object) -> str:
    """The error of a command: exit code 3, two lines at most, no traceback and no bug."""
    result = run(*arguments)
    assert result.exit_code == 3, result.output
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith(("note", "Warning"))]
    assert "This is a bug" not in result.stderr
    assert "Traceback" not in result.stderr
    message = "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :])
    assert len(message.splitlines()) <= 2, message
    return message


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    """A mobile_sam checkpoint of random weights."""
    torch.manual_seed(2)
    encoder = {f"image_encoder.{key}": value for key, value in TinyViT(1024).state_dict().items()}
    return encoder | {key: 0.05 * torch.randn(shape) for key, shape in head_shapes().items()}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with two photos, photos/p0.jpg and p1.jpg."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "FORWARDS", 1)
    torch.set_num_threads(1)
    (tmp_path / "photos").mkdir()
    photo = gradient_photo(0, (96, 128))
    photo.save(tmp_path / "photos" / "p0.jpg")
    ImageOps.flip(photo).save(tmp_path / "photos" / "p1.jpg")
    return tmp_path


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    torch.set_num_threads(1)
    with one_process_cluster() as cluster:
        yield cluster.scheduler_address


def segment(file: object, *options: object) -> tuple[list[Any], str]:
    """The masks that `segment` finds with a student's file, and its notes."""
    result = run_json(
        "segment", "photos/p0.jpg", "--student", file, *SMALL, *POINT, "--out", "o.png", *options
    )
    return result["masks"], "\n".join(result["notes"])


def embedding(scheduler: str, file: object, teacher: str = "mobile_sam", out: str = "c.zarr") -> Tensor:
    """The embedding that `precompute` stores."""
    result = run(
        "precompute", "--images", "photos", "--out", out, "--teacher", teacher, "--checkpoint", file, *SMALL,
        "--audit", 0, "--dtype", "float32", "--precision", "float32", "--scheduler", scheduler, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    with EmbeddingStore.open(Path(out)) as store:
        return torch.from_numpy(store.reader.read([0]).to_float32())


def wrapped(state: dict[str, Tensor]) -> dict[str, object]:
    """Contents of files as training scripts save them, by the name of the file."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
    history = [{"step": step, "loss": step * 0.1} for step in range(20_000)]
    return {
        "medsam": {"model": state, "optimizer": optimizer, "epoch": 3},
        "lightning": {
            "state_dict": {"sam." + key: value for key, value in state.items()},
            "pytorch-lightning_version": "2.1",
            "callbacks": {"ModelCheckpoint": {"best": np.float64(0.1), "path": Path("x")}},
        },
        "nested": {
            "epoch": 1,
            "args": argparse.Namespace(lr=1e-4, device=torch.device("cpu")),
            "history": history,
            "seen": {1, 2},
            "curve": np.arange(5.0),
            "counts": defaultdict(list, {"a": [1]}),
            "net": {"module": OrderedDict(state)},
        },
    }


@pytest.mark.parametrize("name", ["medsam", "lightning", "nested"])
def test_wrapped_weights_are_taken_as_the_plain_ones_with_a_note_of_the_rest(
    state: dict[str, Tensor], name: str
) -> None:
    """C1: weights under a key, beside an optimizer, an epoch, arguments, a long history."""
    torch.save(state, "flat.pt")
    torch.save(wrapped(state)[name], "wrapped.pt")
    found, note = segment("wrapped.pt")
    assert found == segment("flat.pt")[0]
    assert (
        note
        == {
            "medsam": "wrapped.pt: took 435 tensors under 'model'; left out: optimizer, epoch",
            "lightning": "wrapped.pt: took 435 tensors under 'state_dict', whose names have sam. before SAM's; "
            "left out: pytorch-lightning_version, callbacks",
            "nested": "wrapped.pt: took 435 tensors under 'net.module'; left out: epoch, args, history, seen, curve, "
            "counts",
        }[name]
    )


def test_of_two_sets_of_weights_the_averaged_one_is_taken_and_both_are_named(
    state: dict[str, Tensor],
) -> None:
    """C1: `model` beside `ema`."""
    torch.save(state, "flat.pt")
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"model": other, "ema": state, "epoch": 3}, "both.pt")
    found, note = segment("both.pt")
    assert found == segment("flat.pt")[0]
    assert note == "both.pt: took 435 tensors under 'ema'; left out: model, epoch"


def test_of_student_and_teacher_the_one_of_the_wanted_size_is_taken(state: dict[str, Tensor]) -> None:
    """C1: two networks in one flat dictionary."""
    shapes = state_shapes(TEACHERS["vit_b"])
    big = {"teacher." + key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    torch.save(state, "flat.pt")
    torch.save({"state_dict": big | {"student." + key: value for key, value in state.items()}}, "both.pt")
    found, note = segment("both.pt")
    assert found == segment("flat.pt")[0]
    assert "whose names have student. before SAM's; left out: teacher" in note


@pytest.mark.parametrize("command", ["segment", "precompute", "evaluate", "init"])
def test_a_pickled_module_is_refused_with_the_way_to_save_its_weights(
    state: dict[str, Tensor], command: str
) -> None:
    """C1: ultralytics' save pickles the module itself; every command says the same."""
    torch.save({"model": torch.nn.Linear(2, 2), "date": "2025"}, "module.pt")
    message = refusal(*command_with(command, "module.pt"))
    assert (
        "module.pt holds Python objects other than tensors (torch.nn.modules.linear.Linear, under 'model')"
        in (message)
    )
    assert message.endswith("Save the weights: torch.save(model.state_dict(), FILE).")


def test_only_a_module_of_ultralytics_is_sent_on_to_fastsam(monkeypatch: pytest.MonkeyPatch) -> None:
    """C1: evaluate names FastSAM for a file with ultralytics' classes, and for no other."""
    for name in ("ultralytics", "other"):
        module = types.ModuleType(name)
        module.Model = type("Model", (), {"__module__": name})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        torch.save({"model": module.Model()}, f"{name}.pt")
        monkeypatch.delitem(sys.modules, name)
    assert refusal(*command_with("evaluate", "ultralytics.pt")).endswith("write a=fastsam:ultralytics.pt")
    assert "fastsam" not in refusal(*command_with("evaluate", "other.pt"))


def command_with(command: str, file: str) -> tuple[object, ...]:
    """A command that takes weights, with a file."""
    if command == "init":
        from mobilesam.precompute import PrecomputeConfig, precompute

        with one_process_cluster() as cluster:
            precompute(
                PrecomputeConfig(
                    images=(Path("photos"),), out=Path("s.zarr"), teacher="vit_nano", image_size=64, audit=0,
                    scheduler=cluster.scheduler_address,
                )
            )  # fmt: skip
    return {
        "segment": ("segment", "photos/p0.jpg", "--student", file, *SMALL, *POINT, "--out", "o.png"),
        "precompute": (
            "precompute", "--images", "photos", "--out", "c.zarr", "--teacher", "mobile_sam",
            "--checkpoint", file, *SMALL,
        ),
        "evaluate": ("evaluate", "--images", "photos", "--teacher", "vit_nano", *SMALL, "--model", f"a={file}"),
        "init": ("distill", "--store", "s.zarr", "--init", file, "--epochs", 1),
    }[command]  # fmt: skip


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "sam.", "net.model."]
)
def test_words_before_sams_names_are_left_out(state: dict[str, Tensor], prefix: str) -> None:
    """C2: DataParallel, torch.compile, both, a Lightning module."""
    torch.save(state, "flat.pt")
    torch.save({prefix + key: value for key, value in state.items()}, "prefixed.pt")
    found, note = segment("prefixed.pt")
    assert found == segment("flat.pt")[0]
    assert note.startswith("prefixed.pt: took 435 tensors whose names have ")


@pytest.mark.long
@pytest.mark.parametrize("name", ["flat", "wrapped", "prefixed", "extended", "protocol"])
def test_precompute_evaluate_and_segment_take_the_same_of_a_file(
    scheduler: str, state: dict[str, Tensor], name: str
) -> None:
    """C1, C2, C4, C5: one answer by all commands."""
    content: dict[str, object] = {
        "wrapped": {"model": state, "epoch": 3},
        "prefixed": {"module." + key: value for key, value in state.items()},
        "extended": {**state, "decoder_state": {"base.0.weight": torch.zeros(3)}},
    }.get(name, state)
    torch.save(content, "file.pt", pickle_protocol=5 if name == "protocol" else 2)
    torch.save(state, "flat.pt")
    x = torch.equal(embedding(scheduler, "file.pt"), embedding(scheduler, "flat.pt", out="d.zarr"))
    assert x
    assert segment("file.pt")[0] == segment("flat.pt")[0]
    models = run_json(
        "evaluate", "--images", "photos", "--teacher", "vit_nano", *SMALL, "--model", "a=file.pt", "--model",
        "b=flat.pt",
    )["models"]  # fmt: skip
    assert models[0]["kind"] == "tiny_vit"
    assert models[0]["teacher"] == models[1]["teacher"]
    assert models[0]["notes"] == ([] if name in ("flat", "protocol") else [segment("file.pt")[1]])


def test_an_encoder_alone_is_enough_for_embeddings_and_refused_where_masks_are_asked_for(
    scheduler: str, state: dict[str, Tensor]
) -> None:
    """C2: an encoder alone, without its part's name; precompute takes it, segment says what is missing."""
    torch.save(state, "flat.pt")
    start = "image_encoder."
    torch.save({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}, "encoder.pt")
    found = embedding(scheduler, "encoder.pt")
    assert torch.equal(found, embedding(scheduler, "flat.pt", out="d.zarr"))
    message = refusal("segment", "photos/p0.jpg", "--student", "encoder.pt", *SMALL, *POINT, "--out", "o.png")
    assert "encoder.pt holds no mask decoder" in message
    assert segment("encoder.pt", "--head", "flat.pt")[0] == segment("flat.pt")[0]


HUGGINGFACE = {
    "shared_image_embedding.positional_embedding": (2, 128),
    "vision_encoder.pos_embed": (1, 64, 64, 768),
    "vision_encoder.patch_embed.projection.weight": (768, 3, 16, 16),
    "prompt_encoder.shared_embedding.positional_embedding": (2, 128),
    "mask_decoder.iou_token.weight": (1, 256),
    **{f"vision_encoder.layers.{i}.attn.qkv.weight": (2304, 768) for i in range(12)},
}


def test_a_part_of_hugging_faces_weights_is_called_that() -> None:
    """C3: the names are understood, the missing weights are counted."""
    torch.save({key: torch.zeros(1).expand(shape) for key, shape in HUGGINGFACE.items()}, "pytorch_model.bin")
    message = refusal(
        "precompute", "--images", "photos", "--out", "c.zarr", "--teacher", "vit_b", "--checkpoint",
        "pytorch_model.bin", *SMALL,
    )  # fmt: skip
    assert (
        "not a vit_b checkpoint: by Hugging Face's names, of 314 weights 298 are missing, 0 are unknown"
        in message
    )


@pytest.mark.parametrize("command", ["segment", "precompute", "evaluate"])
@pytest.mark.parametrize("name", ["x80", "lfs", "html", "jpeg", "text", "cut", "cut_safetensors"])
def test_a_file_that_is_something_else_is_called_what_it_is(
    state: dict[str, Tensor], name: str, command: str
) -> None:
    """C3: a header whose length begins as a pickle, a Git LFS pointer, a page, a photo, a text, a cut download."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x180)
    torch.save({"a": torch.zeros(1000)}, "whole.pt")
    save_file({"a": torch.zeros(1000)}, "whole.safetensors")
    content, said = {
        "x80": (
            struct.pack("<Q", len(header)) + header + bytes(4),
            "it holds none of SAM's names, but 1 tensor, a",
        ),
        "lfs": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 375042383\n",
            "it is a Git LFS pointer to a file of 375042383 bytes; fetch it with: git lfs pull",
        ),
        "html": (b"\n<!DOCTYPE html><title>Sign in</title>", "it is an HTML page"),
        "jpeg": (Path("photos/p0.jpg").read_bytes(), "it is a JPEG image"),
        "text": (b"x\n", "it is a text that begins with 'x\\n'"),
        "cut": (Path("whole.pt").read_bytes()[:-400], "is truncated or damaged"),
        "cut_safetensors": (Path("whole.safetensors").read_bytes()[:-9], "is truncated or damaged"),
    }[name]
    Path("file.pt").write_bytes(content)
    message = refusal(*command_with(command, "file.pt"))
    assert said in message
    assert "can run code" not in message
    assert "distill again" not in message


@pytest.mark.parametrize("name", ["samhq", "microsam"])
def test_more_weights_than_sam_has_are_left_out_and_named(state: dict[str, Tensor], name: str) -> None:
    """C4: SAM-HQ's layers, micro-sam's decoder."""
    torch.save(state, "flat.pt")
    hq = {
        "mask_decoder.hf_token.weight": torch.zeros(1, 256),
        "mask_decoder.hf_mlp.layers.0.bias": torch.zeros(2),
    }
    torch.save(
        {**state, **hq} if name == "samhq" else {**state, "decoder_state": {"base.0.weight": torch.zeros(3)}},
        "more.pt",
    )
    found, note = segment("more.pt")
    assert found == segment("flat.pt")[0]
    assert (
        note
        == {
            "samhq": "more.pt: took 435 tensors; left out: mask_decoder.hf_mlp (1 tensor), mask_decoder.hf_token "
            "(1 tensor)",
            "microsam": "more.pt: took 435 tensors; left out: decoder_state",
        }[name]
    )


def test_an_adapter_in_the_encoder_is_never_dropped_in_silence(state: dict[str, Tensor]) -> None:
    """C4: one more layer in the encoder changes what it computes."""
    torch.save({**state, "image_encoder.layers.1.lora_a.weight": torch.zeros(2)}, "lora.pt")
    message = refusal("segment", "photos/p0.jpg", "--student", "lora.pt", *SMALL, *POINT)
    assert (
        "image_encoder.layers.1.lora_a.weight is unknown; an adapter, such as LoRA's, has to be merged"
        in message
    )


@pytest.mark.parametrize(
    "name",
    ["protocol4", "protocol5", "unchecked", "half", "bfloat16", "double", "tagged", "history", "safetensors"],
)
def test_plain_state_dicts_are_taken_however_they_were_saved(state: dict[str, Tensor], name: str) -> None:
    """C5: pickle protocols, no checksums, other floats, parameters with attributes, a history beside the weights."""
    content: dict[str, Any] = dict(state)
    protocol = int(name[-1]) if name.startswith("protocol") else 2
    if name in ("half", "bfloat16", "double"):
        kind = getattr(torch, {"half": "float16", "double": "float64"}.get(name, name))
        content = {
            key: value.to(kind) if value.is_floating_point() else value for key, value in state.items()
        }
        state = {key: value.float() for key, value in content.items()}
    if name == "tagged":
        content = {key: torch.nn.Parameter(value, requires_grad=False) for key, value in state.items()}
        for value in content.values():
            value.tag = "x"
    if name == "history":
        content = {"model": state, "history": [(step, 0.1 * step) for step in range(100_000)]}
    torch_files.save.compute_crc32 = name != "unchecked"
    try:
        torch.save(content, "other.pt", pickle_protocol=protocol)
    finally:
        torch_files.save.compute_crc32 = True
    if name == "safetensors":
        save_file(state, "other.pt")
    torch.save({key: value if value.ndim else value.long() for key, value in state.items()}, "flat.pt")
    found, note = segment("other.pt")
    assert found == segment("flat.pt")[0]
    assert note == (
        "other.pt: took 435 tensors under 'model'; left out: history" if name == "history" else ""
    )


def huggingface_model() -> Any:
    """Hugging Face's SamModel of ViT-B with random weights, all of which have an effect."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.SamModel(transformers.SamConfig()).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            norm = "norm" in key and key.endswith("weight")
            value.normal_(1.0 if norm else 0.0, 0.2 if "pos" in key else 0.1 if value.ndim == 1 else 0.05)
        embedding = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(embedding)
    return model


@pytest.mark.long
def test_hugging_faces_folder_gives_its_own_embeddings_and_masks_through_every_command(
    scheduler: str,
) -> None:
    """C3: SamModel's folder, its sharded one and its state dict, against transformers' own computation."""
    model = huggingface_model()
    model.save_pretrained("hf")
    model.save_pretrained("sharded", max_shard_size="100MB")
    torch.save(model.state_dict(), "hf.bin")
    pixels = torch.randn(1, 3, 1024, 1024)
    with torch.no_grad():
        wanted = model.get_image_embeddings(pixels)
    assert wanted.std() > 0.5
    for path in ("hf", "sharded"):
        teacher = load_teacher("vit_b", Path(path))
        torch.testing.assert_close(teacher.embed(pixels), wanted, rtol=0, atol=1e-4)
        assert teacher.note == f"{path}: took 314 tensors by Hugging Face's names, all that it holds"
    head = load_head("vit_b", Path("sharded"))
    masks = head_masks(head, wanted)
    with torch.no_grad():
        points = torch.tensor([[[[300.0, 400.0]]]])
        theirs = model(
            image_embeddings=wanted, input_points=points, input_labels=torch.ones(1, 1, 1, dtype=torch.int)
        )
    torch.testing.assert_close(masks, theirs.pred_masks[0], rtol=1e-3, atol=1e-3)
    stored = [embedding(scheduler, path, "vit_b", f"{path}.zarr") for path in ("hf", "sharded", "hf.bin")]
    assert torch.equal(stored[0], stored[1])
    assert torch.equal(stored[0], stored[2])
    found = [
        run_json(
            "segment", "photos/p0.jpg", "--teacher", "vit_b", "--checkpoint", path, *SMALL, *POINT, "--out", "o.png"
        )["masks"]
        for path in ("hf", "sharded", "hf.bin")
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]
    models = run_json(
        "evaluate", "--images", "photos", "--teacher", "vit_b", "--checkpoint", "hf", *SMALL, "--model", "a=sharded"
    )["models"]  # fmt: skip
    assert models[0]["kind"] == "vit_b"
    assert models[0]["teacher"]["point"]["miou"] == 1
    message = refusal("segment", "photos/p0.jpg", "--student", "hf", *SMALL, *POINT)
    assert "is a vit_b checkpoint, not mobile_sam; use --teacher vit_b" in message


def head_masks(head: dict[str, Tensor], emb_BCHW: Tensor) -> Tensor:
    """Low-resolution mask logits of our head at the point (300, 400) of a square of 1024 pixels."""
    from mobilesam.sam.modeling.head import build_head

    built = build_head(head, 1024)
    points = (torch.tensor([[[300.0, 400.0]]]), torch.ones(1, 1, dtype=torch.int))
    with torch.no_grad():
        sparse, dense = built.prompt_encoder(points=points, boxes=None, masks=None)
        masks, _ = built.mask_decoder(
            image_embeddings=emb_BCHW,
            image_pe=built.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
    return masks


@pytest.fixture
def small_vit(monkeypatch: pytest.MonkeyPatch) -> TeacherInfo:
    """A teacher with a small ViT, trained at 128 pixels."""
    info = TeacherInfo(
        name="small", parameters=1, macs_at_1024=1e9, architecture="vit.ViTConfig", trained_image_size=128,
        settings={"width": 64, "depth": 2, "heads": 2, "global_blocks": (1,)},
        checkpoint=CheckpointFile(name="small.pth", url="https://example.org/small.pth"),
    )  # fmt: skip
    monkeypatch.setitem(TEACHERS, "small", info)  # type: ignore[arg-type]  # a dict, which its users only read
    return info


@pytest.mark.parametrize("side", [64, 128])
def test_a_vit_trained_at_another_image_size_keeps_its_positions(
    scheduler: str, small_vit: TeacherInfo, side: int
) -> None:
    """C3: positions of 64 pixels in place of 128; the store says if they were resampled, a note says their size."""
    from segment_anything.modeling import ImageEncoderViT

    theirs = ImageEncoderViT(
        img_size=side, embed_dim=64, depth=2, num_heads=2, out_chans=256, qkv_bias=True, use_rel_pos=True,
        window_size=14, global_attn_indexes=(1,), norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    for value in theirs.parameters():
        torch.nn.init.normal_(value, std=0.1)
    weights = {f"image_encoder.{key}": value for key, value in theirs.state_dict().items()}
    torch.save(weights | {key: torch.zeros(shape) for key, shape in head_shapes().items()}, "small.pth")
    teacher = load_teacher("small", Path("small.pth"), image_size=side)
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(teacher.embed(pixels), theirs(pixels), rtol=0, atol=1e-4)
    note = "small.pth: trained at 64 pixels: --image-size 64 uses its positions unchanged, other sizes resample them"
    assert teacher.note == (note if side == 64 else None)
    embedding(scheduler, "small.pth", "small")
    with EmbeddingStore.open(Path("c.zarr")) as store:
        assert store.spec.positions_interpolated == (side == 128)


def test_an_adapters_file_with_sams_decoder_is_called_an_adapters(state: dict[str, Tensor]) -> None:
    """C4: SAMed's file has LoRA's layers and the mask decoder, no encoder."""
    lora = {f"w_a_{i:03d}": torch.zeros(4, 8) for i in range(4)}
    decoder = {key: value for key, value in state.items() if key.startswith("mask_decoder.")}
    torch.save(lora | decoder, "samed.pth")
    assert "the names are an adapter's (LoRA)" in refusal(*command_with("precompute", "samed.pth"))


def test_a_part_of_a_sharded_training_is_called_that(state: dict[str, Tensor]) -> None:
    """C4: DeepSpeed's ZeRO stage 3 saves tensors without values beside the model."""
    torch.save({"module": {key: torch.empty(0) for key in state}}, "mp_rank_00_model_states.pt")
    message = refusal(*command_with("segment", "mp_rank_00_model_states.pt"))
    assert "without values, as each process of DeepSpeed's ZeRO or FSDP saves a part" in message


@pytest.mark.parametrize("command", ["segment", "precompute", "evaluate", "head"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("https://example.org/sam.pth", "download it first (curl -LO https://example.org/sam.pth)"),
        ("facebook/sam-vit-base", "hf download facebook/sam-vit-base --local-dir FOLDER"),
        ("~/nowhere.pth", "home/nowhere.pth"),
    ],
)
def test_what_is_no_path_is_told_with_the_way_to_a_file(
    state: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    command: str,
    given: str,
    said: str,
) -> None:
    """C3: an address, a model's name at Hugging Face, a home folder that the shell left as it was."""
    monkeypatch.setenv("HOME", str(place / "home"))
    if command == "head":
        torch.save(state, "flat.pt")
        options = ("segment", "photos/p0.jpg", "--student", "flat.pt", f"--head={given}", *SMALL, *POINT)
    else:
        options = command_with(command, given)
    assert said in refusal(*options)


def test_a_home_folder_that_the_shell_left_is_found(
    state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    """C3: --student=~/sam.pt, which shells hand on as it is."""
    monkeypatch.setenv("HOME", str(place / "home"))
    (place / "home").mkdir()
    torch.save(state, "home/sam.pt")
    assert segment("~/sam.pt")[0] == segment("home/sam.pt")[0]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "checkpoint-500/model.safetensors",
            "is a folder of checkpoints: name one of them (out/checkpoint-500)",
        ),
        ("snapshots/abc/model.safetensors", "name one of them (out/snapshots/abc)"),
        ("__0_0.distcp", "is a distributed checkpoint of PyTorch; make one file of it:"),
        ("zero_to_fp32.py", "is a checkpoint of DeepSpeed, in parts; make one file of it:"),
        ("data.pkl", "is an unpacked file of torch.save; pack it again, uncompressed:"),
        ("tf_model.h5", "is a model of TensorFlow or JAX"),
    ],
)
@pytest.mark.parametrize("command", ["segment", "precompute"])
def test_a_folder_that_holds_weights_otherwise_is_called_what_it_is(
    place: Path, file: str, said: str, command: str
) -> None:
    """C3: the Trainer's output folder, the hub's cache, parts of a distributed checkpoint, an unpacked file."""
    (place / "out" / file).parent.mkdir(parents=True)
    (place / "out" / file).write_bytes(b"x")
    assert said in refusal(*command_with(command, "out"))
