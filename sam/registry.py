"""Teachers by name: architecture, cost and checkpoint file of each, and the teachers of other packages.

To add a teacher, add one entry to TEACHERS; no other code has to change. An architecture that `sam/modeling` doesn't
have also needs its module there, with a class that has the members of `Architecture`. A teacher of another package is
an entry point of the group TEACHER_GROUP; `teacher_package.py` says what its function has to return.

Neither torch nor numpy is imported here, since the command line reads the names for `--help`; an architecture's
module in `sam/modeling` is imported only when its encoder is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, distributions
from typing import TYPE_CHECKING, Any, Protocol

from ..common.config import Listing, option
from ..common.errors import SamError, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

EMBEDDED_TEACHER = "vit_nano"
"""Teacher whose weights are part of the package, for trials and tests."""

TEACHER_GROUP = "mobilesam.teachers"
"""Group of entry points by which other packages add teachers."""

_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything"
_MOBILE_SAM_URL = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights"
_HQ_SAM_URL = "https://huggingface.co/lkeab/hq-sam/resolve/main"


class Architecture(Protocol):
    """Image encoder of given sizes; a state is a checkpoint's `image_encoder.*` with the prefix removed."""

    @property
    def has_positions(self) -> bool:
        """True if the encoder has position tables, which are resampled for image sizes other than the trained one."""

    @property
    def unused_prefixes(self) -> tuple[str, ...]:
        """Prefixes of keys in checkpoints that the encoder doesn't use."""

    @property
    def uses_autocast(self) -> bool:
        """True if bfloat16 is computed under torch's autocast, from float32 weights; False if the loaded encoder
        holds bfloat16 weights itself."""

    def build(self, image_size: int) -> nn.Module:
        """Build the encoder: (B, 3, S, S) normalised pixels to (B, 256, S/16, S/16), S being `image_size`."""

    def load(self, state: dict[str, Tensor], image_size: int, precision: str) -> tuple[nn.Module, bool]:
        """Build an encoder that uses the state's tensors without a copy.

        Args:
            state: the encoder's weights by key, float32, for the trained image size.
            image_size: S in pixels, a multiple of 16.
            precision: `float32` or `bfloat16`; bfloat16 weights are copies.

        Returns:
            The encoder, and True if its position tables were resampled for `image_size`.
        """

    def outline(self, image_size: int) -> nn.Module:
        """Build a network on torch's meta device whose parameters and operations are those published for the encoder;
        it may be another class than `build` returns."""

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Return True if the sizes in a state (widths, depths, heads) are this encoder's and no other variant's.

        Tensors that show no sizes are not looked at, and one that is missing contradicts nothing, so that the error
        about a damaged checkpoint can name its teacher.
        """


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """Official checkpoint: file name, URL, length and digest."""

    name: str
    url: str
    bytes: int | None = None
    """Length of the file; None if it isn't known."""
    sha256: str | None = None
    """Hex digest of the whole file; None if it isn't known, and the file then has to be downloaded by hand."""


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """Entry of one teacher."""

    name: str
    """Value of `--teacher`."""
    parameters: int
    """Number of parameters of the image encoder, without the head."""
    macs_at_1024: float
    """Multiply-accumulates of the encoder for one image of 1024 x 1024 pixels."""
    architecture: str
    """`MODULE.CLASS` in `sam/modeling`; the class is an `Architecture`."""
    settings: Mapping[str, Any] = field(hash=False)
    """Arguments of the architecture's class."""
    trained_image_size: int = 1024
    """Side in pixels of the square input that the checkpoint was trained with."""
    checkpoint: CheckpointFile | None
    """None for the embedded teacher."""
    hq: bool = False
    """True if its head is SAM-HQ's, which takes features of a ViT beside the embedding."""
    student_format: bool = False
    """True if students are exported in this checkpoint's format, so that a file in it is taken for a student."""

    @property
    def hq_features(self) -> int | None:
        """Channels of the encoder's features that SAM-HQ's head takes; None for SAM's own head."""
        return int(self.settings["width"]) if self.hq else None

    @property
    def embedded(self) -> bool:
        """True if the weights are part of the package."""
        return self.checkpoint is None

    @property
    def encoder(self) -> Architecture:
        """Architecture of the image encoder; imports torch."""
        module, name = self.architecture.split(".")
        architecture: Architecture = getattr(import_module(f".modeling.{module}", __package__), name)(
            **self.settings
        )
        return architecture


_VIT_H = {"width": 1280, "depth": 32, "heads": 16, "global_blocks": (7, 15, 23, 31)}
_VIT_L = {"width": 1024, "depth": 24, "heads": 16, "global_blocks": (5, 11, 17, 23)}
_VIT_B = {"width": 768, "depth": 12, "heads": 12, "global_blocks": (2, 5, 8, 11)}

# Multiply-accumulates are published for SAM's ViTs and TinyViT, and counted for vit_nano. The sizes of SAM's ViTs are
# from segment_anything/build_sam.py; vit_nano is this project's. SAM-HQ's encoders are SAM's.
TEACHERS: Mapping[str, TeacherInfo] = {
    info.name: info
    for info in (
        TeacherInfo(
            name="vit_h",
            parameters=637_026_048,
            macs_at_1024=2.98e12,
            architecture="vit.ViTConfig",
            settings=_VIT_H,
            checkpoint=CheckpointFile(
                name="sam_vit_h_4b8939.pth",
                url=f"{_SAM_URL}/sam_vit_h_4b8939.pth",
                bytes=2_564_550_879,
                sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            ),
        ),
        TeacherInfo(
            name="vit_l",
            parameters=308_278_272,
            macs_at_1024=1.49e12,
            architecture="vit.ViTConfig",
            settings=_VIT_L,
            checkpoint=CheckpointFile(
                name="sam_vit_l_0b3195.pth",
                url=f"{_SAM_URL}/sam_vit_l_0b3195.pth",
                bytes=1_249_524_607,
                sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            ),
        ),
        TeacherInfo(
            name="vit_b",
            parameters=89_670_912,
            macs_at_1024=0.49e12,
            architecture="vit.ViTConfig",
            settings=_VIT_B,
            checkpoint=CheckpointFile(
                name="sam_vit_b_01ec64.pth",
                url=f"{_SAM_URL}/sam_vit_b_01ec64.pth",
                bytes=375_042_383,
                sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            ),
        ),
        TeacherInfo(
            name="hq_vit_h",
            parameters=637_026_048,
            macs_at_1024=2.98e12,
            architecture="vit.ViTConfig",
            settings=_VIT_H,
            hq=True,
            checkpoint=CheckpointFile(
                name="sam_hq_vit_h.pth",
                url=f"{_HQ_SAM_URL}/sam_hq_vit_h.pth",
                bytes=2_570_940_653,
                sha256="a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35",
            ),
        ),
        TeacherInfo(
            name="hq_vit_l",
            parameters=308_278_272,
            macs_at_1024=1.49e12,
            architecture="vit.ViTConfig",
            settings=_VIT_L,
            hq=True,
            checkpoint=CheckpointFile(
                name="sam_hq_vit_l.pth",
                url=f"{_HQ_SAM_URL}/sam_hq_vit_l.pth",
            ),
        ),
        TeacherInfo(
            name="hq_vit_b",
            parameters=89_670_912,
            macs_at_1024=0.49e12,
            architecture="vit.ViTConfig",
            settings=_VIT_B,
            hq=True,
            checkpoint=CheckpointFile(
                name="sam_hq_vit_b.pth",
                url=f"{_HQ_SAM_URL}/sam_hq_vit_b.pth",
            ),
        ),
        TeacherInfo(
            name="mobile_sam",
            parameters=5_743_892,
            macs_at_1024=38.8e9,
            architecture="tiny_vit.TinyViTVariant",
            settings={"name": "5m"},
            student_format=True,
            checkpoint=CheckpointFile(
                name="mobile_sam.pt",
                url=f"{_MOBILE_SAM_URL}/mobile_sam.pt",
                bytes=40_728_226,
                sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            ),
        ),
        TeacherInfo(
            name=EMBEDDED_TEACHER,
            parameters=1_657_728,
            macs_at_1024=14e9,
            architecture="vit.ViTConfig",
            settings={"width": 128, "depth": 4, "heads": 4, "global_blocks": (1, 3)},
            # Between 256 and 1024 pixels, each of which needs only one halving or doubling of the grid.
            trained_image_size=512,
            checkpoint=None,
        ),
    )
}


def find_teacher_info(name: str) -> TeacherInfo:
    """Return the entry of a teacher of this package; SamError for any other name."""
    if name not in TEACHERS:
        raise SamError(f"unknown teacher {shown(name)!r}: {_choice()}")
    return TEACHERS[name]


def hq_note(name: str | None) -> str | None:
    """Return the note about masks decoded from an SAM-HQ teacher's stored embeddings or a student's.

    Args:
        name: name of the teacher that the embeddings are of, or were learned from; None if it isn't known.

    Returns:
        The note; None if the teacher isn't SAM-HQ's.
    """
    if name is None or name not in TEACHERS or not TEACHERS[name].hq:
        return None
    return (
        f"masks are of SAM's part of {name}'s head, which SAM-HQ left unchanged: its HQ token needs features that "
        f"only {name}'s own encoder gives"
    )


@dataclass(frozen=True, kw_only=True)
class TeacherPackage:
    """Another package's teacher: the function that makes it, and the version that is installed."""

    distribution: str
    """Name of the package as in `pip install`."""
    version: str
    entry_point: str
    """`package.module:function`."""

    def to_json(self) -> dict[str, str]:
        """Return the fields, as a store records them."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def installed_teachers() -> dict[str, list[tuple[TeacherPackage, EntryPoint]]]:
    """Return the teachers of other packages by name, with every package that claims the name."""
    found: dict[str, list[tuple[TeacherPackage, EntryPoint]]] = {}
    for point in readable_entry_points(TEACHER_GROUP):
        made_by = TeacherPackage(
            distribution=(point.dist and point.dist.name) or "a package without metadata",
            version=(point.dist and point.dist.version) or "",
            entry_point=point.value,
        )
        claims = found.setdefault(point.name, [])
        # A package may be found twice: in the checkout that is the working directory, and as installed.
        if made_by not in [package for package, _ in claims]:
            claims.append((made_by, point))
    return found


def readable_entry_points(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, without those of installed packages whose metadata is damaged.

    `importlib.metadata.entry_points` fails for all packages if the metadata of one can't be read.

    Args:
        group: name of the group.
    """
    found: list[EntryPoint] = []
    seen: set[str] = set()
    for package in distributions():
        try:
            points = list(package.entry_points.select(group=group))
            name = package.name if points else None
        except Exception as error:  # noqa: BLE001 - any parser's
            logger.warning(
                "the metadata of an installed package can't be read (%s): its teachers aren't known", error
            )
            continue
        # As Python does, the first of a name in the import path is the one that is imported.
        if points and (name is None or name not in seen):
            found += points
            seen |= set() if name is None else {name}
    return found


@cache
def _warn_once(reason: str) -> None:
    logger.warning("the metadata of an installed package can't be read, it is passed over: %s", reason)


def find_teacher_package(name: str) -> tuple[TeacherPackage, EntryPoint] | None:
    """Find the package that a teacher comes from.

    Args:
        name: name of a teacher.

    Returns:
        The package and its entry point; None for a teacher of this package.

    Raises:
        SamError: there is no such teacher, or two have this name.
    """
    claims = installed_teachers().get(name, [])
    others = " and ".join(str(package) for package, _ in claims)
    if name in TEACHERS and claims:
        raise SamError(
            f"{others} has an entry point {name} in {TEACHER_GROUP}, which is the name of a built-in teacher: rename "
            "the entry point, or uninstall the package"
        )
    if len(claims) > 1:
        raise SamError(
            f"the teacher {shown(name)} is in two packages, {others}: uninstall one of them, or rename its "
            "entry point"
        )
    if not claims:
        find_teacher_info(name)
        return None
    return claims[0]


def list_teachers() -> str:
    """Return the names of all teachers as text for people, a line each for those of other packages."""
    lines = [f"built-in: {', '.join(TEACHERS)}"]
    for name, claims in sorted(installed_teachers().items()):
        lines += [f"{name}: from {package} ({package.entry_point})" for package, _ in claims]
    if len(lines) == 1:
        lines.append(f"no installed package adds one (entry points of {TEACHER_GROUP})")
    return "\n".join(lines)


def teacher_option(help: str) -> Any:
    """Return a config field `teacher`: a teacher's name, or `help` for a list.

    Args:
        help: help text of the command's option.
    """
    return option(None, metavar=f"[{'|'.join(TEACHERS)}|NAME]", parse=_teacher_name, help=help)


def is_teacher(name: str) -> bool:
    """Return True if this or another package has a teacher of this name; others are only searched if needed."""
    return name in TEACHERS or name in installed_teachers()


def _teacher_name(text: str) -> str:
    if is_teacher(text):
        return text
    if text == "help":
        raise Listing(list_teachers())
    raise ValueError(f"there is no such teacher: {_choice()}")


def _choice() -> str:
    """Return a message's end with all teachers' names."""
    added = [f"{name} ({claims[0][0]})" for name, claims in sorted(installed_teachers().items())]
    others = f", or of other packages {', '.join(added)}" if added else ""
    none = "" if added else f"; no installed package adds one (entry points of {TEACHER_GROUP})"
    return f"use {', '.join(TEACHERS)}{others}{none}"
