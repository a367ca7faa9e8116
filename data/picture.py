"""Pictures in files: which they are, and what is in them."""

import os
import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.errors import VideoError

MOST_PIXELS = 1 << 26  # a picture that says it is larger is not decoded: a few bytes may promise gigabytes
IMAGE_FPS = 25.0  # rate of what has no times of its own, such as images, unless another is given
# Read as what they hold, whatever their name says; of other formats some would start programs, as PostScript does.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
IMAGE_NAMES = "avif bmp jfif jp2 jpe jpeg jpg pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in IMAGE_NAMES.split())
warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's own limit is higher
PHOTOMETRIC = 262  # the tag of TIFF that is 0 where white is; of 8 bits Pillow knows


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def read_image(path: Path) -> np.ndarray:
    """The picture in a file, upright, uint8 (height, width, 3).

    Raises `OSError` with a number, of the machine; without one, as errors of other kinds, it is a fault of the picture.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > 16 * MOST_PIXELS:
        raise ValueError(f"it is no file, or has more than {16 * MOST_PIXELS:,} bytes")  # a pipe would be waited for
    content = path.read_bytes()  # all of it before it is decoded: so a fault of the disk is none of the picture
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}: make it smaller")
        if (pictures := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # a phone's second is no other
            raise ValueError(f"it holds {pictures:,} pictures: unpack them")
        is_wide = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
        if image.mode in ("I", "F") and not is_wide:
            raise ValueError(f"its pixels are of kind {image.mode}, whose range is not known")
        ImageOps.exif_transpose(image, in_place=True)
        if is_wide:  # Pillow would clip, not scale
            pixels = (np.asarray(image) >> 8).astype(np.uint8)
            is_negative = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0  # type: ignore[attr-defined]
            return np.asarray(Image.fromarray(~pixels if is_negative else pixels).convert("RGB"))
        image.info.pop("transparency", None)  # alpha is ignored; Pillow would warn of some
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_picture(path: Path, option: str) -> np.ndarray:
    """The picture that an option names, uint8 (height, width, 3). Raises `VideoError` where it cannot be read."""
    try:
        return read_image(path)
    except UnidentifiedImageError as error:
        raise VideoError(f"{option} {path}: not a readable picture: give one of {', '.join(FORMATS)}") from error
    except Exception as error:  # damaged bytes make Pillow raise errors of many kinds
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{option} {path}: not a readable picture ({reason})") from error
