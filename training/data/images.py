"""From a picture file to a tensor of the size that is trained on: decoding, aspect buckets, cropping."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..pictures import to_tensor

# What this Pillow cannot open of them is skipped by name.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jxl", ".jp2"),
)
MAX_ASPECT = 2.0
_ORIENTATION = 0x0112  # EXIF; 5 to 8 lie on their side
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags; a sample format of 2 is signed.
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 256, 257, 258, 262, 339
# What Pillow raises for damaged files, or for their EXIF.
_DAMAGED = (
    *(ArithmeticError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(struct.error, Image.DecompressionBombError),
)
LARGEST = 2 * Image.MAX_IMAGE_PIXELS  # what Pillow opens at most; a strip of a few px scaled to cover would be more
Picture = Path | io.IOBase | np.ndarray | Image.Image


def picture_size(picture: Picture) -> tuple[int, int]:
    """(height, width) in px as it is shown, from the file's header alone. Raises ValueError for what is no picture."""
    if isinstance(picture, np.ndarray):
        return picture.shape[0], picture.shape[1]
    with _open(picture) as image:
        # Of a PNG without it in front, Pillow would read all to look for it at the end.
        orientation = _orientation(image) if image.format != "PNG" or "exif" in image.info else 1
        tags = getattr(image, "tag_v2", {})  # of a TIFF newer Pillows turn the size themselves
        stored = tags.get(_WIDTH, image.width), tags.get(_HEIGHT, image.height)
        turned = orientation >= 5 and image.size == stored
        return (image.width, image.height) if turned else (image.height, image.width)


def load_picture(picture: Picture) -> Image.Image:
    """The whole picture as 8-bit RGB, upright, transparency on white; of a moving one the first frame.

    Raises ValueError for a damaged file.
    """
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    with _open(picture) as image:
        try:
            image.load()
            orientation = _orientation(image)
            if image.mode.startswith(("I", "F")):
                image = _eight_bits(image)
            # Not Pillow's exif_transpose, which writes the rest of the EXIF anew, and stops where that is damaged.
            if orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[orientation])
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
        except _DAMAGED as error:
            raise ValueError(f"damaged picture: {error}") from error


def _orientation(image: Image.Image) -> int:
    """1 to 8, by EXIF; 1, as programs that show it have it, where that is damaged: the picture need not be."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGED:
        return 1
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits, which Pillow itself would clip to 255, scaled to 8.

    By the range of its type; 32 bits hold more than a picture needs, so that it is the narrowest range of 0..1 (of
    floats), 0..255, 0..65535 and the type's own that the values fit in. Raises ValueError where that is not clear.
    """
    tags = getattr(image, "tag_v2", None) or {}  # of TIFF
    signed = 2 in tags.get(_SAMPLE_FORMAT, ())
    bits = max(tags.get(_BITS, (16,)))  # PNG and PGM have at most 16
    values = np.asarray(image)
    if image.mode == "I" and bits == 32 and not signed:
        values = values.astype(np.int32).view(np.uint32)  # Pillow has no other type for them
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    most, whole = values.max(), 2.0 ** (bits - signed) - 1
    if image.mode == "F":
        top = next((top for top in (1, 255, 65535) if most <= 1.25 * top and (top == 1 or most > top / 16)), None)
        if top is None:
            raise ValueError(f"float values up to {most:g}: expected 0 to 1, to 255 or to 65535")
    else:
        top = whole if bits <= 16 else next(top for top in (255, 65535, whole) if most <= top)
    levels = (values.clip(0, top) * (255 / top)).round().astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        levels = 255 - levels
    if isinstance(key := image.info.get("transparency"), int):
        levels[values == key] = 255
    return Image.fromarray(levels)


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit itself, at twice that, stays
            return Image.open(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"no picture: {error}") from error


def aspect_buckets(resolution: int) -> list[tuple[int, int]]:
    """(height, width) of about resolution^2 px or fewer, from 1:2 to 2:1, in steps of 64 px (16 below 256 px)."""
    step = 64 if resolution >= 256 else 16
    sides = range(step, int(resolution * math.sqrt(MAX_ASPECT)) + step, step)
    found = {(resolution, resolution)}
    for width in sides:
        height = resolution**2 // width // step * step
        if height and max(height, width) <= MAX_ASPECT * min(height, width):
            found |= {(height, width), (width, height)}
    # Of the sizes of one width, the largest.
    return sorted(size for size in found if not any(o != size and o[0] >= size[0] and o[1] >= size[1] for o in found))


def nearest_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect is nearest to that of a picture of `size` (both height, width)."""
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - aspect), bucket))


def crop(image: Image.Image, size: tuple[int, int], how: str, name: str) -> Tensor:
    """[3, H, W] in [-1, 1]: the picture scaled to cover size = (H, W), and cut to it.

    how: "center", or "random", where the place is a function of `name`: cached latents hold one crop of a picture.
    Raises ValueError for a picture so long and narrow that memory may not hold it at that scale.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if scaled[0] * scaled[1] > LARGEST:
        raise ValueError(
            f"{image.width} x {image.height} px: as wide as {width} and as high as {height} px it would have "
            f"{scaled[0]} x {scaled[1]}"
        )
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    across, down = 0.5, 0.5
    if how == "random":
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        across, down = (int.from_bytes(part, "big") / 2**64 for part in (digest[:8], digest[8:16]))
    left, top = round((image.width - width) * across), round((image.height - height) * down)
    return to_tensor(np.asarray(image.crop((left, top, left + width, top + height))))
