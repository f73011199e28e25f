"""Views: their names, the homographies that the names stand for, and the pixels that follow from them."""

import cv2
import numpy as np
import pytest

from vop.training import views
from vop.training.views import flipped, homography, image_of, relit, view_names, view_pixels

CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
WARPS = [f"scene/{number % 7}.jpg?warp={number}" for number in range(300)]


def mapped(H: np.ndarray, points: np.ndarray) -> np.ndarray:
    lifted = np.concatenate([points, np.ones((*points.shape[:-1], 1))], axis=-1) @ H.T
    return lifted[..., :2] / lifted[..., 2:]


def shown(view: str) -> np.ndarray:
    """Corners of what a view shows, in the image, from the view's top left on, clockwise."""
    return mapped(np.linalg.inv(homography(view)), CORNERS)


def smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A picture as a function of shares of width and height: waves of their own in each channel, float64 0..255."""
    waves = [np.sin(9 * x + 2 * y), np.cos(17 * y - 3 * x), np.sin(13 * x) * np.cos(7 * y)]
    return 127.5 + 100 * np.stack(waves, axis=-1)


def centers(width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return np.stack([x, y], axis=-1)


def picture(width: int, height: int) -> np.ndarray:
    return np.rint(smooth(*np.moveaxis(centers(width, height), -1, 0))).astype(np.uint8)


@pytest.fixture
def same_light(monkeypatch):
    monkeypatch.setattr(views, "relit", lambda rgb, rng: rgb)


@pytest.mark.parametrize("image", ["a.jpg", "a b/ł?.png", "what?warp=x.jpg", "two\nlines.jpg", "a.jpg?warp=1.jpg"])
def test_every_view_knows_its_image(image):
    names = view_names(image, True, 12)
    assert names[0] == image and len({*names}) == len(names) == 14
    assert [image_of(name) for name in names] == [image] * 14
    assert [flipped(name) for name in names] == [False, True] + [False] * 12


def test_only_the_views_asked_for_are_named():
    assert view_names("a.jpg", False, 0) == ["a.jpg"]
    assert view_names("a.jpg", True, 0) == ["a.jpg", "a.jpg?flip"]
    assert view_names("a.jpg", False, 2) == ["a.jpg", "a.jpg?warp=0", "a.jpg?warp=1"]


def test_an_image_and_its_mirror_image():
    np.testing.assert_array_equal(homography("a.jpg"), np.eye(3))
    np.testing.assert_array_equal(mapped(homography("a.jpg?flip"), CORNERS), CORNERS[[1, 0, 3, 2]])


def test_a_warped_copy_shows_a_part_of_the_image_from_aside():
    quadrangles = np.stack([shown(view) for view in WARPS])
    assert quadrangles.min() >= -1e-6 and quadrangles.max() <= 1 + 1e-6
    x, y = np.moveaxis(quadrangles, -1, 0)
    area = (x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1) / 2
    assert area.min() > 0.05 and area.max() < 1  # positive: never mirrored
    assert np.ptp(area) > 0.3
    sides = np.roll(quadrangles, -1, 1) - quadrangles
    following = np.roll(sides, -1, 1)
    turns = sides[..., 0] * following[..., 1] - sides[..., 1] * following[..., 0]
    assert (turns > 0).all()  # convex: nothing is folded over
    assert np.abs(quadrangles.mean(1) - 0.5).max() > 0.15  # shifted
    top = sides[:, 0]
    assert np.ptp(np.degrees(np.arctan2(top[:, 1], top[:, 0]))) > 30  # turned
    slant = np.abs(sides[:, 0] + sides[:, 2]).max(1)  # of a parallelogram it would be 0
    assert np.median(slant) > 0.05


def test_the_name_alone_decides():
    for view in WARPS[:20]:
        np.testing.assert_array_equal(homography(view), homography(view))
    assert len({homography(view).tobytes() for view in WARPS}) == len(WARPS)
    rgb = picture(90, 60)
    first, again, other = (view_pixels(view, rgb, 56) for view in ("a?warp=1", "a?warp=1", "a?warp=2"))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


@pytest.mark.parametrize(("width", "height"), [(200, 150), (111, 160), (128, 128)])
def test_pixels_lie_where_the_homography_says(same_light, width, height):
    """Half a pixel beside, the picture would differ by 4 grey levels."""
    rgb = picture(width, height)
    for view in WARPS[:12]:
        found = view_pixels(view, rgb, 112)
        assert found.shape == rgb.shape and found.dtype == np.uint8
        sources = mapped(np.linalg.inv(homography(view)), centers(width, height))
        expected = smooth(*np.moveaxis(sources, -1, 0))
        inside = ((sources > 1 / width) & (sources < 1 - 1 / width)).all(-1)  # beyond the last centres it is level
        assert inside.mean() > 0.9
        assert np.abs(found - expected)[inside].max() < 2


def test_a_large_image_is_warped_at_twice_the_letterbox(same_light):
    found = view_pixels("a?warp=3", picture(600, 400), 56)
    assert found.shape == (75, 112, 3)
    sources = mapped(np.linalg.inv(homography("a?warp=3")), centers(112, 75))
    assert np.abs(found - smooth(*np.moveaxis(sources, -1, 0))).mean() < 2


def test_an_image_is_itself_and_its_mirror_image_is_mirrored():
    rgb = picture(70, 40)
    np.testing.assert_array_equal(view_pixels("a.jpg", rgb, 56), rgb)
    mirrored = view_pixels("a.jpg?flip", rgb, 56)
    np.testing.assert_array_equal(mirrored, cv2.flip(rgb, 1))
    assert mirrored.flags.c_contiguous


def test_other_light_keeps_the_kind_of_image():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(1, 60, 2)
        rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
        before = rgb.copy()
        lit = relit(rgb, np.random.default_rng(seed))
        assert lit.shape == rgb.shape and lit.dtype == np.uint8
        np.testing.assert_array_equal(rgb, before)
        np.testing.assert_array_equal(lit, relit(rgb, np.random.default_rng(seed)))


def test_other_light_changes_brightness_but_not_the_picture():
    rgb = picture(80, 60)
    lit = [relit(rgb, np.random.default_rng(seed)).astype(float) for seed in range(20)]
    assert np.ptp([each.mean() for each in lit]) > 40
    for each in lit:
        likeness = [np.corrcoef(each[..., channel].ravel(), rgb[..., channel].ravel())[0, 1] for channel in range(3)]
        assert min(likeness) > 0.8
    for value in (0, 255):  # neither black nor white wraps around
        flat = [relit(np.full((9, 9, 3), value, np.uint8), np.random.default_rng(seed)).mean() for seed in range(20)]
        assert (np.array(flat) < 127).all() if value == 0 else (np.array(flat) > 100).all()
