import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bad_images import encoded, picture, png_header, rotated, write_zoo
from PIL import Image

from vop.image import (
    ImageError,
    decode,
    letterbox,
    patch_box,
    patch_centers,
    patch_grid,
    patch_mask,
    thumbnail,
    to_jpeg,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def difference(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("name", ["landscape", "portrait", "square", "small", "odd"])
def test_golden_images_are_bit_equal(name):
    if not GOLDEN.exists():
        pytest.skip(f"golden files are absent: {GOLDEN}")
    golden = np.load(GOLDEN / "golden_e2e.npz")
    square, size = letterbox(decode((GOLDEN / "images" / f"{name}.png").read_bytes()))
    expected = golden[f"{name}_image"]
    np.testing.assert_array_equal(square.astype(np.float32).transpose(2, 0, 1) / 255, expected)
    assert size == tuple(golden[f"{name}_size_wh"])


def test_zoo_is_decoded_or_refused_with_its_reason(tmp_path, capfd):
    for name, outcome in write_zoo(tmp_path).items():
        data = (tmp_path / name).read_bytes()
        if outcome == "ok":
            rgb = decode(data)
            assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3, name
            assert rgb.flags.c_contiguous and rgb.flags.writeable, name
        else:
            with pytest.raises(ImageError, match=outcome):
                decode(data)
    assert capfd.readouterr() == ("", ""), "decoding prints to the terminal"


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        *[(f"{name}.png", 0) for name in ("rgba", "animated", "deep")],
        *[("rgba.tif", 0), ("lzw.tif", 0), ("deep.tiff", 0), ("lossless.webp", 0), ("animated.webp", 0)],
        *[("plain.bmp", 0), ("plain.ppm", 0), ("plain.jp2", 0), ("jpeg_named.png", 12), ("plain.jpg", 12)],
        *[("cmyk.jpg", 14), ("progressive.jpeg", 12), ("animated.gif", 40), ("palette.png", 80)],
    ],
)
def test_every_format_gives_the_picture(tmp_path, name, tolerance):
    write_zoo(tmp_path)
    assert difference(decode((tmp_path / name).read_bytes()), picture()) <= tolerance


@pytest.mark.parametrize("name", ["grey.png", "grey_alpha.png"])
def test_grey_becomes_three_equal_channels(tmp_path, name):
    write_zoo(tmp_path)
    grey = np.asarray(Image.fromarray(picture()).convert("L"))
    np.testing.assert_array_equal(decode((tmp_path / name).read_bytes()), np.repeat(grey[..., None], 3, axis=2))


def test_sixteen_bit_grey_keeps_the_high_byte(tmp_path):
    write_zoo(tmp_path)
    blue = picture()[..., 2]
    np.testing.assert_array_equal(decode((tmp_path / "deep_grey.png").read_bytes()), np.dstack([blue] * 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("TIFF", {}, 0),
        ("AVIF", {"quality": 95}, 16),
    ],
)
def test_exif_orientation_gives_the_upright_picture(orientation, kind, options, tolerance):
    upright = decode(rotated(picture(), orientation, kind, **options))
    assert upright.shape == (64, 96, 3)
    assert difference(upright, picture()) <= tolerance


def test_unreadable_exif_does_not_cost_the_image():
    rgb = decode(encoded(picture(), "PNG", exif=b"Exif\0\0garbage that is no TIFF"))
    np.testing.assert_array_equal(rgb, picture())


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest lifts the filter of vop.image
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"])
def test_truncated_files_are_refused_or_whole(kind):
    data = encoded(picture(), kind)
    whole = decode(data)
    refused = 0
    for length in np.linspace(0, len(data) - 1, 60).astype(int):
        try:
            np.testing.assert_array_equal(decode(data[:length]), whole, err_msg=f"{kind} cut at {length}")
        except ImageError:
            refused += 1
    assert refused >= 55  # a cut through trailing metadata may leave all pixels


def decode_damaged(kind):
    rng = np.random.default_rng(0)
    data = np.frombuffer(encoded(picture(), kind), np.uint8)
    refused = 0
    for trial in range(150):
        damaged = data.copy()
        damaged[rng.integers(len(data) if trial % 2 else 100, size=rng.integers(1, 6))] = rng.integers(256)
        try:
            assert decode(damaged.tobytes(), max_pixels=1_000_000).dtype == np.uint8
        except ImageError as error:
            assert str(error)
            refused += 1
    return refused


def test_flipped_bytes_give_an_image_or_an_image_error():
    """In a child process, so that a crash of a native decoder would fail this test and not end the whole run."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        for refused in child.map(decode_damaged, ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000", "AVIF"]):
            assert 5 < refused <= 150


def test_bombs_are_refused_by_their_header():
    with pytest.raises(ImageError, match=r"60000x60000 is 3,600,000,000 pixels, the limit is 200,000,000"):
        decode(png_header(60_000, 60_000))
    with pytest.raises(ImageError, match="limit is 6,143"):
        decode(encoded(picture(), "JPEG"), max_pixels=96 * 64 - 1)
    assert decode(encoded(picture(), "JPEG"), max_pixels=96 * 64).shape == (64, 96, 3)


def test_pixels_of_32_bits_are_refused():
    with pytest.raises(ImageError, match="more than 16 bits"):
        decode(encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"))


@pytest.mark.parametrize("width, height", [(1, 1), (20_000, 20), (20, 20_000), (224, 224), (100, 37), (640, 480)])
@pytest.mark.parametrize("image_size", [112, 224])
def test_letterbox_size_and_padding(width, height, image_size):
    square, (w, h) = letterbox(np.full((height, width, 3), 200, np.uint8), image_size)
    assert square.shape == (image_size, image_size, 3) and square.dtype == np.uint8
    assert max(w, h) == image_size and min(w, h) == max(1, round(min(width, height) * image_size / max(width, height)))
    assert (square[:h, :w] == 200).all()
    assert square.sum() == 200 * 3 * w * h


def test_patch_centers_are_row_major_xy():
    centers = patch_centers()
    assert centers.shape == (256, 2) and centers.dtype == np.float32
    np.testing.assert_array_equal(centers[[0, 1, 16, 255]], [[7.5, 7.5], [21.5, 7.5], [7.5, 21.5], [217.5, 217.5]])
    assert patch_centers(448).shape == (1024, 2)
    with pytest.raises(ValueError, match="225 is not a multiple of the patch size 14"):
        patch_centers(225)


@pytest.mark.parametrize("height", [1, 7, 8, 21, 22, 149, 160, 217, 218, 224])
def test_patch_mask_is_the_patches_whose_centre_pixel_is_image(height):
    """Oracle: read each patch's centre pixel from a letterboxed white image."""
    square = np.zeros((224, 224), np.uint8)
    square[:height] = 255
    inside = np.array([square[14 * row + 7, 14 * col + 7] > 0 for row in range(16) for col in range(16)])
    inside[:16] = True
    np.testing.assert_array_equal(patch_mask(224, height), inside)
    np.testing.assert_array_equal(patch_mask(height, 224).reshape(16, 16), inside.reshape(16, 16).T)
    assert patch_grid(224, height) == (inside.reshape(16, 16)[:, 0].sum(), 16)


def test_patch_grid_refuses_the_original_size():
    with pytest.raises(ValueError, match=r"640x480 .* pass the \(width, height\) that letterbox"):
        patch_grid(640, 480)


def test_patch_boxes_tile_the_original():
    original, (_, scaled) = (683, 1024), letterbox(np.zeros((1024, 683, 3), np.uint8))
    boxes = [patch_box(p, scaled, original) for p in np.flatnonzero(patch_mask(*scaled))]
    assert boxes[0] == pytest.approx((0, 0, 14 * 683 / scaled[0], 64))
    area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
    columns = min(math.ceil((scaled[0] - 7) / 14) * 14 * 683 / scaled[0], 683)
    assert area == pytest.approx(columns * 1024)
    assert all(0 <= x0 < x1 <= 683 and 0 <= y0 < y1 <= 1024 for x0, y0, x1, y1 in boxes)


def test_thumbnail_and_jpeg():
    small = thumbnail(picture(96, 64), 48)
    assert small.shape == (32, 48, 3)
    assert thumbnail(picture(96, 64), 100).shape == (64, 96, 3)
    assert difference(decode(to_jpeg(picture(), 95)), picture()) <= 20
    assert len(to_jpeg(picture(), 20)) < len(to_jpeg(picture(), 95))
