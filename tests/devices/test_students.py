"""Students on a device: forward pass, gradients, evaluation and memory, against the CPU in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mobilesam.distill.students.cost import default_micro_batch
from mobilesam.distill.students.registry import STUDENTS, build_student, student_info
from mobilesam.sam.device import resolve_device
from mobilesam.sam.modeling.tiny_vit import TinyViT

SIZE = 64
NAMES = [*STUDENTS, "timm:resnet18"]


def _pair(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The same student on the CPU and on the device, as distill lays it out."""
    resolve_device(device)  # switches TF32 off
    here = build_student(name, SIZE, seed=0).to(memory_format=torch.channels_last)
    return here, copy.deepcopy(here).to(device, memory_format=torch.channels_last)


def _pixels(images: int = 3) -> Tensor:
    pixels = torch.randn(images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return pixels.contiguous(memory_format=torch.channels_last)


def _close(found: Tensor, expected: Tensor, limit: float) -> None:
    scale = float(expected.abs().max())
    assert float((found.detach().cpu().float() - expected.detach()).abs().max()) <= limit * scale


@pytest.mark.parametrize("name", NAMES)
def test_a_student_computes_what_it_computes_on_the_cpu(name: str, device: torch.device) -> None:
    here, there = _pair(name, device)
    pixels = _pixels()
    with torch.no_grad():
        _close(there.eval()(pixels.to(device)), here.eval()(pixels), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_its_gradients_are_the_cpus(name: str, device: torch.device) -> None:
    here, there = _pair(name, device)
    pixels = _pixels()
    wanted = torch.randn(3, 256, SIZE // 16, SIZE // 16, generator=torch.Generator().manual_seed(1))
    for student, where in ((here, torch.device("cpu")), (there, device)):
        # Batch norms of a 4 x 4 grid amplify rounding a thousandfold: their running statistics are used.
        student.eval()
        (student(pixels.to(where)) - wanted.to(where)).square().mean().backward()
    gradients = dict(there.named_parameters())
    norm = torch.cat([one.grad.flatten() for one in here.parameters() if one.grad is not None]).norm()
    for key, parameter in here.named_parameters():
        if parameter.grad is None:
            assert gradients[key].grad is None
            continue
        found = gradients[key].grad
        assert found is not None
        assert float((found.cpu() - parameter.grad).norm()) <= 1e-3 * float(norm), key


@pytest.mark.parametrize("name", ["tiny_vit", "deit_tiny", "repvit_m1_1"])
def test_bfloat16_stays_close_to_float32(name: str, device: torch.device) -> None:
    _, there = _pair(name, device)
    pixels = _pixels().to(device)
    there.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        found = there(pixels)
    with torch.no_grad():
        expected = there(pixels)
    cosine = torch.cosine_similarity(found.float(), expected, dim=1).mean()
    assert float(cosine) > 0.999


@pytest.mark.parametrize("size", [64, 240, 256])
def test_evaluation_and_training_attend_alike(size: int, device: torch.device) -> None:
    """Without gradients torch may choose another kernel of attention."""
    resolve_device(device)
    torch.manual_seed(0)
    student = TinyViT(size).to(device).eval()
    for parameter in student.parameters():
        if parameter.shape[1:] in {(49,), (196,)}:
            nn.init.normal_(parameter)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        trained = student(pixels)
        with torch.no_grad():
            evaluated = student(pixels)
    _close(evaluated, trained.detach().cpu().float(), 0.05)
    cosine = torch.cosine_similarity(evaluated.float(), trained.float(), dim=1).mean()
    assert float(cosine) > 0.999


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_default_micro_batch_fits_and_is_not_much_too_small(precision: str) -> None:
    device, size, cap = torch.device("cuda", 0), 256, 4096
    free = torch.cuda.mem_get_info(device)[0]
    images = default_micro_batch(student_info("tiny_vit"), cap, size, precision, device)
    few = min(images, 64)
    student = build_student("tiny_vit", size, seed=0).to(device, memory_format=torch.channels_last)
    torch.cuda.reset_peak_memory_stats(device)
    pixels = torch.randn(few, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
        student(pixels).float().square().mean().backward()
    peak = torch.cuda.max_memory_allocated(device) / few
    assert peak * images < free, "it fits"
    assert images == cap or peak * images > 0.3 * free, "and isn't a third of what fits"
