"""Fetch the photos that the last stages of vit_nano's training learn regions from (train_on_scenes.py).

    python -m examples.vit_nano.fetch_photos --out scenes/photos

They are public domain or CC0, and not in this repository. Each is named by its repository on GitHub, its path there
and the git id of its content. They are written with a longer side of 1,024 pixels. Needs git.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIDE = 1024

LICENCES = {
    "BuddiesOfBudgie/budgie-backgrounds": 'README.md: "licensed under the CC0-1.0 license [...] All images contained '
    'within this repository have been manually reviewed and confirmed to be compliant with this license"',
    "elementary/wallpapers": 'debian/copyright in the branch deb-packaging: "Unsplash photos published before June '
    '8, 2017 are CC0 (public domain)", followed by these',
    "pop-os/wallpapers": 'README.md: "Unsplash photos are in the public domain"; those below have numbers under '
    "250,200, which elementary/wallpapers lists as published before June 8, 2017; NASA's are public domain anyway",
}

# Git id of the content, and path, by repository.
PHOTOS = {
    "BuddiesOfBudgie/budgie-backgrounds": """
003d7af779fdb13230041918e809463f203e449f backgrounds/abstract-spiral.jpg
b7d43f7834c50b872a4fd942eb316f3bde64817c backgrounds/apollo-11-earth.jpg
2a36d04122a0ae7cb1a88a87a27d2269feb2bb9b backgrounds/beacon-street-sunset.jpg
624e5e0db80d7966059fe63cd5dbbebc11a801d4 backgrounds/blue-periwinkle.jpg
9af68c1b51782f9d9a259b8c1d98b312d27e8869 backgrounds/budgie-branch.jpg
3d0750914f4721acda634d3b3fa26945fe73e87c backgrounds/canyon-wren.jpg
3742d8754db9f6c3cdb42feeb174f0a2e4001969 backgrounds/casa-mila.jpg
964ede4fcd62e724884eb56e4800396b2bd28cec backgrounds/colorful-wall.jpg
65c6e90e19c4a31fe21f5c25e47b002a8d7b339e backgrounds/dragonfly-on-lavender.jpg
cac80070ba65bc87a0c33233dfd95122b2d5d14b backgrounds/extreme-desert-hike.jpg
2d1c3ddb3cac78716fd413bbede3d34b74297cc3 backgrounds/high-trestle-trail.jpg
c6a34678106408c97b07420c95ef491501978be9 backgrounds/kitten-on-lawn.jpg
19f02ee50a0dd8cc9c6632567f7eab9eaa5696bf backgrounds/lake-sherburne.jpg
629a1a45cb0e61852d5059ccb3847e6e72347da1 backgrounds/motherboard-circuits.jpg
0a8f1dc4d60b302473a2817cb26f1a8661891d86 backgrounds/oakland-zoo-otters.jpg
198525885c553cd50d29ea3fa9e791a7e21f9329 backgrounds/ocean-waves.jpg
830e8ff827ff9726f825158f5db936119fc49b1c backgrounds/ocean-waves.jpg
964846ae1c37bcb9da35aaa6703876174a10b3a1 backgrounds/orange-hallway.jpg
cfa488eaa4155b45561b077089a43b902f7db823 backgrounds/perched-osprey.jpg
06516c6eb65240d4d429cc6606a34544699efc76 backgrounds/piazza-gae-aulenti.jpg
50903c0ec5fb2bc4ccc9f6fb2e24c81174a7514a backgrounds/roman-colosseum.jpg
db6db408f7aeec85cd29d1f8b9c93f836595c43d backgrounds/san-francisco-skyline.jpg
9254f43fe17d521ef66c4c2e546497e765bcf5ec backgrounds/saturnian-profile.jpg
53af59b9f75daee1900c324895d2a41846068b77 backgrounds/serene.jpg
13f305727ea3d261cd29891fad8ec4b58ebe9ad2 backgrounds/singaporean-cityscape.jpg
be91d01f8018a0569cdc0504184fa2ec1a9ec6ea backgrounds/solaris-grapes.jpg
001817b0ec17a64a923f6bba9b9725ad3de1b8a7 backgrounds/spiral-firework.jpg
87b551ddbdd873f5ffebc519d36750d863041ed8 backgrounds/tea-gardens.jpg
04d2a93d218408e3ead9b048a583e121162bdab3 backgrounds/the-spices-of-life.jpg
43a1e137cfffc67924bc86c4026a51e712992f3f backgrounds/ufo-galaxy.jpg
""",
    "elementary/wallpapers": """
2f0b0aee0973eaa3dcb92141696e12dcb760fd1d backgrounds/Ashim DSilva.jpg
a79a1f4c998dfe6369def2880cd70f81e499ed54 backgrounds/Mr. Lee.jpg
b32f2776e1e9e86c5149a4987eb3485e3c69b422 backgrounds/Photo by SpaceX.jpg
c04159676e76262cd1e91252567a3df8c052447e backgrounds/Sunset by the Pier.jpg
""",
    "pop-os/wallpapers": """
4f7de2c2a6667a8821dafeaf17001257e1133c12 original/ahmadreza-sajadi-10140-edit.jpg
04cdf1a9cdc8cebb2c3e09427e44e5f667b7ab50 original/galen-crout-175291.jpg
c1e72b39a123c560c5be83035f86114622ba42f7 original/jad-limcaco-183877.jpg
cff64f342fa4f303eea7cb486e967f6ff93af9b0 original/jake-hills-36605.jpg
6de6c8304fd820c69f889b936674fb1f376012ac original/jared-evans-119758.jpg
f1946f13ce0a0dbecde70658523446a141d18371 original/kait-herzog-8242.jpg
5477bb3a800ae682dc5046705531c09c18903f68 original/nasa-45068.jpg
15df944b2bc47ec9cf795ebdd6a369da50071592 original/nasa-53884.jpg
b58c9eea29d55dbb92aaa2de627e798a280976bc original/nasa-89127.jpg
6454149724b4d5f4ae290030598b34b1f2ce9062 original/ng-32703.jpg
7d2c39d261b43ddbdb7c3049f9ee8c29cdb188df original/sean-afnan-244576.jpg
""",
}


@dataclass(frozen=True)
class Photo:
    """Photo in a repository: git id of its content, and its path."""

    content: str
    path: str


def listed(repository: str) -> list[Photo]:
    """Return the photos taken from a repository, one of PHOTOS."""
    return [Photo(*line.split(" ", 1)) for line in PHOTOS[repository].strip().splitlines()]


def fetch(out: Path) -> int:
    """Write the photos that are missing in a folder, and return the number of all."""
    out.mkdir(parents=True, exist_ok=True)
    for repository in PHOTOS:
        missing = [photo for photo in listed(repository) if not _file(out, photo).exists()]
        if missing:
            with tempfile.TemporaryDirectory() as folder:
                url = f"https://github.com/{repository}"
                subprocess.run(
                    ["git", "clone", "-q", "--bare", "--filter=blob:none", url, folder], check=True
                )
                for photo in missing:
                    _write(out, photo, folder)
    return sum(len(listed(repository)) for repository in PHOTOS)


def _file(out: Path, photo: Photo) -> Path:
    return out / f"{Path(photo.path).stem.replace(' ', '-')}-{photo.content[:8]}.jpg"


def _write(out: Path, photo: Photo, folder: str) -> None:
    command = ["git", "--git-dir", folder, "cat-file", "blob", photo.content]
    content = subprocess.run(command, check=True, capture_output=True).stdout
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    draft = _file(out, photo).with_suffix(".draft")
    image.save(draft, format="JPEG", quality=95)
    draft.replace(_file(out, photo))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    print(f"{fetch(options.out)} photos in {options.out}")


if __name__ == "__main__":
    main()
