"""A zoo of odd and bad image files, for the tests of decoding and of the whole pipeline."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def picture(width: int = 96, height: int = 64) -> np.ndarray:
    """A smooth picture without any symmetry, (H, W, 3) uint8 RGB."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    return np.stack([255 * x, 255 * y, 120 * (1 + np.sin(9 * x + 5 * y**2))], axis=-1).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """The picture as a file, written by Pillow (not by the decoder under test)."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(image: np.ndarray, orientation: int, kind: str, **options) -> bytes:
    """A file whose pixels are stored turned or mirrored and whose EXIF orientation undoes that."""
    undo = {  # what a viewer does for each orientation, inverted
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(np.ascontiguousarray(undo(image)), kind, exif=exif, **options)


def png_header(width: int, height: int) -> bytes:
    """A valid PNG header that promises a size, followed by next to no data: a decompression bomb."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def write_zoo(directory: Path) -> dict[str, str]:
    """Write the zoo under `directory`; returns for each name "ok" or a part of the reason why it is refused."""
    image = picture()
    pillow = Image.fromarray(image)
    alpha = pillow.convert("RGBA")
    alpha.putalpha(pillow.convert("L"))
    inverse = Image.fromarray(255 - image)
    deep = image.astype(np.uint16)[..., ::-1] * 257  # OpenCV writes BGR
    jpeg = encoded(image, "JPEG", quality=95)
    zoo: dict[str, tuple[bytes, str]] = {
        "plain.jpg": (jpeg, "ok"),
        "UPPER.JPG": (jpeg, "ok"),
        "names/with space.jpg": (jpeg, "ok"),
        "names/Zürich_東京.jpg": (jpeg, "ok"),
        "progressive.jpeg": (encoded(image, "JPEG", quality=95, progressive=True), "ok"),
        "cmyk.jpg": (encoded(pillow.convert("CMYK"), "JPEG", quality=95), "ok"),
        "grey.jpg": (encoded(pillow.convert("L"), "JPEG", quality=95), "ok"),
        "grey.png": (encoded(pillow.convert("L"), "PNG"), "ok"),
        "grey_alpha.png": (encoded(alpha.convert("LA"), "PNG"), "ok"),
        "rgba.png": (encoded(alpha, "PNG"), "ok"),
        "rgba.tif": (encoded(alpha, "TIFF"), "ok"),
        "palette.png": (encoded(pillow.convert("P"), "PNG"), "ok"),
        "bilevel.png": (encoded(pillow.convert("1"), "PNG"), "ok"),
        "deep.png": (cv2.imencode(".png", deep)[1].tobytes(), "ok"),
        "deep_grey.png": (cv2.imencode(".png", deep[..., 0])[1].tobytes(), "ok"),
        "deep.tiff": (cv2.imencode(".tiff", deep)[1].tobytes(), "ok"),
        "lzw.tif": (encoded(image, "TIFF", compression="tiff_lzw"), "ok"),
        "lossless.webp": (encoded(image, "WEBP", lossless=True), "ok"),
        "plain.bmp": (encoded(image, "BMP"), "ok"),
        "plain.ppm": (encoded(image, "PPM"), "ok"),
        "plain.jp2": (encoded(image, "JPEG2000"), "ok"),
        "animated.gif": (encoded(pillow, "GIF", save_all=True, append_images=[inverse]), "ok"),
        "animated.webp": (encoded(pillow, "WEBP", lossless=True, save_all=True, append_images=[inverse]), "ok"),
        "animated.png": (encoded(pillow, "PNG", save_all=True, append_images=[inverse]), "ok"),
        "one_pixel.png": (encoded(image[:1, :1], "PNG"), "ok"),
        "panorama.jpg": (encoded(picture(20_000, 20), "JPEG"), "ok"),
        "tower.png": (encoded(picture(20, 20_000), "PNG"), "ok"),
        "folder.jpg/inside.jpg": (jpeg, "ok"),  # a folder named like an image
        "jpeg_named.png": (jpeg, "ok"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (encoded(image, "PNG")[:-200], "truncated"),
        "truncated.webp": (encoded(image, "WEBP")[:-200], "truncated"),
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"this is a text, not a photograph\n", "not an image"),
        "page.png": (b"<!DOCTYPE html><html>404 not found</html>", "not an image"),
        "zeros.jpg": (bytes(4096), "not an image"),
        "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC"),
        "bomb.png": (png_header(60_000, 60_000), "too large"),
    }
    zoo |= {f"exif/{n}.jpg": (rotated(image, n, "JPEG", quality=95, subsampling=0), "ok") for n in range(1, 9)}
    for name, (data, _) in zoo.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return {name: outcome for name, (_, outcome) in zoo.items()}
