"""Images: bytes to RGB, letterboxing, and the grid of 14-pixel patches laid over the result.

A letterboxed image is a square canvas with the scaled image at its top left and zeros right of it and below. Patches
are numbered row by row; patch 0 is the top left one. Sizes are (width, height).
"""

import io
import math
import warnings
from dataclasses import dataclass
from typing import BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 200_000_000

# Damaged files end in an ImageError that names the reason; the libraries' own lines would only clutter the terminal.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
# OpenCV is the faster decoder and the original's; these it reads wrongly or noisily: damaged PNGs print to the
# terminal, GIF support is recent, and the rotation of an AVIF and the alpha of a TIFF are not handled.
_PILLOW_FORMATS = ("PNG", "GIF", "AVIF")
_ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa", "RGBX")


class ImageError(ValueError):
    """A file that cannot be used as an image; the message is a reason a person understands."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to RGB, (H, W, 3) uint8, upright: the EXIF orientation is applied.

    JPEG (CMYK too), PNG, WebP, TIFF, GIF, BMP, PPM, JPEG 2000 and AVIF. Grey becomes three channels, alpha is dropped,
    16-bit samples are scaled to 8 bits, of an animation the first frame counts. No colour profile is applied.

    Args:
        data: the bytes of the file.
        max_pixels: images of more pixels are refused by their header, before memory is spent on them.

    Raises:
        ImageError: empty, not an image, an unsupported format, too large, truncated or damaged. A JPEG damaged in its
            middle may decode to a picture with wrong areas; the format has no checksum.
    """
    try:
        image = _open_small(data, max_pixels)
        if image.mode.startswith("I;16") or not _needs_pillow(image):
            rgb = _decode_with_opencv(data)
            if rgb is not None:
                return rgb
        return _decode_with_pillow(image)  # also the second opinion: it accepts the image or names what is wrong
    except ImageError:
        raise
    except Exception as error:  # damaged files raise nearly any type, from OSError to struct.error
        raise ImageError(_reason(error)) from error


def check_size(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Raise `ImageError` for an image file of more pixels, by its header, and for what is no image."""
    try:
        _open_small(data, max_pixels)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_reason(error)) from error


@dataclass(frozen=True)
class Header:
    """What the header of an image file says: size (width, height) of the pixels as they are stored, and how the EXIF
    orientation (1 to 8) turns them.
    """

    stored: tuple[int, int]
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored


def read_header(file: BinaryIO) -> Header:
    """The header of an image file, a stream that can seek. Raises `ImageError` for what is no image."""
    try:
        image = _open(file)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_reason(error)) from error
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # unreadable metadata says nothing about the orientation
        orientation = 1
    return Header(image.size, orientation if orientation in range(1, 9) else 1)


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image file as it looks after EXIF rotation, from its header. Raises `ImageError`."""
    return read_header(io.BytesIO(data)).upright


def upright_points(points: np.ndarray, header: Header) -> np.ndarray:
    """Where points (n, 2) of the stored pixels lie in the upright image; pixel centres at +0.5 in both."""
    width, height = header.stored
    x, y = points[:, 0], points[:, 1]
    mirrored, below = width - x, height - y
    return np.stack(
        {
            1: (x, y),
            2: (mirrored, y),
            3: (mirrored, below),
            4: (x, below),
            5: (y, x),
            6: (below, x),
            7: (below, mirrored),
            8: (y, mirrored),
        }[header.orientation],
        axis=1,
    )


def _open_small(data: bytes, max_pixels: int) -> Image.Image:
    image = _open(io.BytesIO(data))
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise ImageError(
            f"too large: {image.width}x{image.height} is {pixels:,} pixels, the limit is {max_pixels:,}; "
            "reduce the image or raise max_pixels"
        )
    return image


def _open(file: BinaryIO) -> Image.Image:
    """Read the header only. `Image.open` would apply its own limit of pixels, which is one setting of the process."""
    start = file.read(16)
    file.seek(0)
    if not start:
        raise ImageError("empty file (0 bytes)")
    Image.init()
    prefix = start.ljust(16, b"\0")
    for name in _FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is not None and accept(prefix) is True:
            return factory(file, "")
    if prefix[4:8] == b"ftyp" and prefix[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        raise ImageError("HEIC images are not supported; convert them to JPEG")
    raise ImageError(f"not an image of a supported format ({', '.join(_FORMATS)}): it starts with {start!r}")


def _needs_pillow(image: Image.Image) -> bool:
    return image.format in _PILLOW_FORMATS or (image.format == "TIFF" and image.mode in _ALPHA_MODES)


def _decode_with_opencv(data: bytes) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        return None


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode[0] in "IF":
        raise ImageError(f"damaged, or pixels of more than 16 bits (mode {image.mode}), which are not supported")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:
        image.info.pop("exif", None)  # unreadable metadata says nothing about the orientation; the pixels are sound
    return np.array(image.convert("RGB"))


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {text}"
    if "truncated" in text.lower():
        return "truncated: the file ends before the image does"
    return f"truncated or damaged: {text}"


def letterbox(rgb: np.ndarray, image_size: int = 224) -> tuple[np.ndarray, tuple[int, int]]:
    """Scale the long side to `image_size` and paste at the top left of a black square.

    Args:
        rgb: (H, W, 3) uint8.
        image_size: side of the square in pixels.

    Returns:
        The square, (image_size, image_size, 3) uint8, and the size of the image in it as (width, height). Sides round
        half to even and are at least 1; the filter is OpenCV's INTER_AREA, also when enlarging.
    """
    height, width = rgb.shape[:2]
    scale = image_size / max(height, width)
    scaled = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = np.zeros((image_size, image_size, 3), np.uint8)
    canvas[: scaled[1], : scaled[0]] = cv2.resize(rgb, scaled, interpolation=cv2.INTER_AREA)
    return canvas, scaled


def patch_centers(image_size: int = 224, patch_size: int = 14) -> np.ndarray:
    """Centres (x, y) of the patches of a square image, (P, 2) float32, row by row.

    In pixels with pixel centres at +0.5: patch (row, col) has its centre in the middle of pixel `14 col + 7`, that is
    at `14 col + 7.5`, which is the convention the encoder was trained with.
    """
    if image_size % patch_size:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch_size}")
    along = np.arange(image_size // patch_size, dtype=np.float32) * patch_size + (patch_size // 2 + 0.5)
    x, y = np.meshgrid(along, along)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def patch_grid(scaled_width: int, scaled_height: int, image_size: int = 224, patch_size: int = 14) -> tuple[int, int]:
    """Rows and columns of patches that are image and not padding: (rows, cols).

    A patch is image if its centre pixel (`14 col + 7`, counted from 0) lies inside the scaled image; the first row and
    the first column always are.
    """
    if not (1 <= scaled_width <= image_size and 1 <= scaled_height <= image_size):
        raise ValueError(
            f"scaled size {scaled_width}x{scaled_height} does not fit a {image_size}-pixel letterbox; "
            "pass the (width, height) that letterbox() returned"
        )
    rows, cols = (max(1, math.ceil((side - patch_size // 2) / patch_size)) for side in (scaled_height, scaled_width))
    return rows, cols


def patch_mask(scaled_width: int, scaled_height: int, image_size: int = 224, patch_size: int = 14) -> np.ndarray:
    """Which patches are image (True) and which are padding, (P,) bool, row by row; see `patch_grid`."""
    rows, cols = patch_grid(scaled_width, scaled_height, image_size, patch_size)
    mask = np.zeros((image_size // patch_size, image_size // patch_size), bool)
    mask[:rows, :cols] = True
    return mask.ravel()


def patch_box(
    patch: int,
    scaled_size: tuple[int, int],
    original_size: tuple[int, int],
    image_size: int = 224,
    patch_size: int = 14,
) -> tuple[float, float, float, float]:
    """The rectangle of a patch in the upright original image, (x0, y0, x1, y1) in its pixels, cut at its border.

    Sizes are (width, height). Coordinates are edges: pixel (0, 0) covers 0 to 1, so x1 and y1 are exclusive.
    """
    row, col = divmod(patch, image_size // patch_size)
    x_scale, y_scale = (original / scaled for original, scaled in zip(original_size, scaled_size, strict=True))
    width, height = original_size
    x0, x1 = (min(x * patch_size * x_scale, width) for x in (col, col + 1))
    y0, y1 = (min(y * patch_size * y_scale, height) for y in (row, row + 1))
    return x0, y0, x1, y1


def thumbnail(rgb: np.ndarray, long_side: int) -> np.ndarray:
    """The image reduced so that its long side is at most `long_side` pixels, uint8; smaller images stay as they are."""
    height, width = rgb.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return rgb
    return cv2.resize(rgb, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)


def to_jpeg(rgb: np.ndarray, quality: int = 85) -> bytes:
    """Encode RGB, (H, W, 3) uint8, as JPEG; quality 1 to 100."""
    return cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
