"""The teachers by name: which file each one's weights are in, and how to know the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SAM_BASE = "https://dl.fbaipublicfiles.com/segment_anything"
MOBILE_SAM_BASE = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights"
EMBEDDED_TEACHER = "vit_nano"


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """One teacher. ``file``, ``url``, ``bytes`` and ``sha256`` are None for the embedded one.

    Attributes:
        name: what ``--teacher`` takes.
        parameters: of the image encoder alone.
        file: the official file's name.
        url: where it is downloaded from.
        bytes: its length.
        sha256: hex digest of the whole file.
    """

    name: str
    parameters: int
    file: str | None = None
    url: str | None = None
    bytes: int | None = None
    sha256: str | None = None

    @property
    def embedded(self) -> bool:
        return self.file is None


def _official(name: str, parameters: int, base: str, file: str, size: int, sha256: str) -> TeacherInfo:
    url = f"{base}/{file}"
    return TeacherInfo(name=name, parameters=parameters, file=file, url=url, bytes=size, sha256=sha256)


_ALL = (
    _official(
        "vit_h",
        637_026_048,
        SAM_BASE,
        "sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    _official(
        "vit_l",
        308_278_272,
        SAM_BASE,
        "sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    _official(
        "vit_b",
        89_670_912,
        SAM_BASE,
        "sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    _official(
        "mobile_sam",
        5_743_892,
        MOBILE_SAM_BASE,
        "mobile_sam.pt",
        40_728_226,
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    TeacherInfo(name=EMBEDDED_TEACHER, parameters=1_657_728),
)
TEACHERS: Mapping[str, TeacherInfo] = MappingProxyType({info.name: info for info in _ALL})
