"""Draw textured rectangles: perspective, visibility, filtering and light, in numba; knows nothing of rooms.

A rectangle is the set origin + a*u + b*v, 0 <= a, b <= 1, seen from one side: there u points
right and v down (both for an upright photograph), so u x v points away from the viewer. For a camera
the plane of a rectangle makes 1/z, a/z and b/z affine functions of the pixel, so visibility needs three of them per
pixel and depth is exact to rounding. Texture coordinates are s = s0 + a*ds, t = t0 + b*dt in units of one photograph,
mirrored beyond [0, 1], which makes any photograph tile without a seam. Colour = tint + gain * texture, then light.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numba
import numpy as np
import skimage.data

from vop.geometry import Camera

SIDE = 512  # photographs are stored square, with their true aspect kept beside
LEVELS = 10  # 512, 256, ..., 1
NEAR = 0.02  # metres
HORIZON = (0.80, 0.86, 0.95)  # colour of the sky
ZENITH = (0.35, 0.22, 0.08)  # what it loses straight up
PHOTOGRAPHS = (  # all shipped inside the scikit-image wheel: nothing is downloaded
    *("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina", "motorcycle"),
    *("camera", "coins", "page", "text", "clock", "moon", "colorwheel", "brick", "grass", "gravel"),
)


@dataclass(frozen=True, eq=False)
class Photographs:
    """The texture atlas.

    texels: (T, 512, 768, 3) uint8, each photograph with its reductions by 2, 4, ... at the right.
    aspect: (T,) width/height of the originals. mean: (T, 3) mean colours, 0..1.
    """

    texels: np.ndarray
    aspect: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True, eq=False)
class Rectangles:
    """M textured rectangles: origin, u, v (M, 3) in metres; texture (M,) index; uv (M, 4) = s0, ds, t0, dt; tint and
    gain (M, 3), colours in 0..1."""

    origin: np.ndarray
    u: np.ndarray
    v: np.ndarray
    texture: np.ndarray
    uv: np.ndarray
    tint: np.ndarray
    gain: np.ndarray

    def __len__(self) -> int:
        return len(self.origin)


@dataclass(frozen=True)
class Light:
    """How one image is lit.

    exposure: RGB gains. lamp: its place in the world, metres. lamp_share: 0..1, the part of the light that comes from
    the lamp and falls with angle and distance. vignette: darkening at the corners, 0..1. noise: standard deviation in
    grey levels.
    """

    exposure: tuple[float, float, float] = (1.0, 1.0, 1.0)
    lamp: tuple[float, float, float] = (0.0, 0.0, 0.0)
    lamp_share: float = 0.0
    vignette: float = 0.0
    noise: float = 0.0


@cache
def photographs() -> Photographs:
    """Load the photographs once per process."""
    texels = np.zeros((len(PHOTOGRAPHS), SIDE, SIDE * 3 // 2, 3), np.uint8)
    aspect = np.ones(len(PHOTOGRAPHS))
    for index, name in enumerate(PHOTOGRAPHS):
        image = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
        image = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image[..., :3]
        aspect[index] = image.shape[1] / image.shape[0]
        row = 0
        for level in range(LEVELS):
            side, column = SIDE >> level, SIDE if level else 0
            image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
            texels[index, row : row + side, column : column + side] = image
            row += side if level else 0
    return Photographs(texels, aspect, texels[:, :SIDE, :SIDE].mean((1, 2)) / 255)


def draw(
    rectangles: Rectangles, camera: Camera, light: Light, rng: np.random.Generator, supersample: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Render an image, (H, W, 3) uint8, and its depth, (H, W) float32 metres at pixel centres, 0 = nothing there.

    Each pixel averages supersample x supersample samples, each filtered from the texture's reductions, so distant
    textures and edges do not alias. `rng` draws the noise.
    """
    atlas = photographs()
    w, h, K, pose = camera.width, camera.height, camera.K, camera.cam_from_world
    planes, boxes = _planes(rectangles, K, pose, w, h)
    _, inverse_z = _visible(planes, boxes, w, h, 1)
    depth = np.divide(1.0, inverse_z, out=np.zeros((h, w)), where=inverse_z > 0).astype(np.float32)
    ids, inverse_z = _visible(planes, boxes, w, h, supersample)
    r = rectangles
    normals = np.cross(r.v, r.u)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    lamp = np.array([*light.lamp, light.lamp_share])
    color = _shade(
        *(ids, inverse_z, planes, r.texture, r.uv, r.tint, r.gain, r.origin, r.u, r.v, normals),
        *(atlas.texels, lamp, supersample, pose[:3, :3].T @ np.linalg.inv(K)),
    )
    noise = light.noise / 255 * rng.standard_normal((h, w, 3), dtype=np.float32)
    return _develop(color, np.array(light.exposure), light.vignette, noise), depth


@numba.njit(cache=True, nogil=True)
def _develop(color, exposure, vignette, noise):
    """Expose, darken the corners, bend the highlights as film does instead of clipping them, add noise; to uint8."""
    height, width, _ = color.shape
    image = np.empty(color.shape, np.uint8)
    for row in range(height):
        for column in range(width):
            x, y = (2 * column + 1) / width - 1, (2 * row + 1) / height - 1
            falloff = 1 - vignette * (x * x + y * y) / 2
            for c in range(3):
                value = color[row, column, c] * exposure[c] * falloff
                if value > 0.75:
                    value = 1 - 0.25 * np.exp(3 - 4 * value)
                image[row, column, c] = int(min(max(value + noise[row, column, c], 0.0), 1.0) * 255 + 0.5)
    return image


def _planes(r: Rectangles, K, pose, width, height):
    """For each rectangle that may be seen: the affine functions 1/z, a/z, b/z of the pixel, (V, 10) with its index
    last; and its box in pixels (V, 4) = x0, x1, y0, y1; nearest rectangle first, so that later ones fail early."""
    origin = r.origin @ pose[:3, :3].T + pose[:3, 3]
    u, v = r.u @ pose[:3, :3].T, r.v @ pose[:3, :3].T
    normal = np.cross(u, v)
    facing = (origin * normal).sum(1) > 0
    corners = np.stack([origin, origin + u, origin + u + v, origin + v], axis=1)
    boxes = _boxes(corners, K, NEAR, width, height)
    seen = facing & (boxes[:, 0] < boxes[:, 1]) & (boxes[:, 2] < boxes[:, 3])
    index = np.flatnonzero(seen)
    index = index[np.argsort(corners[index, :, 2].min(1), kind="stable")]
    # (a, b, 1) / z is linear in the ray: the point z*ray = origin + a*u + b*v, solved by the inverse of [u v origin]
    inverse = np.linalg.inv(np.stack([u[index], v[index], origin[index]], axis=2)) @ np.linalg.inv(K)
    planes = np.concatenate([inverse[:, 2], inverse[:, 0], inverse[:, 1], index[:, None]], axis=1)
    return planes, boxes[index]


@numba.njit(cache=True, nogil=True)
def _boxes(corners, K, near, width, height):
    """Bounding box in pixels, cut to the image, of each quadrilateral cut by the near plane; empty if behind."""
    boxes = np.zeros((len(corners), 4))
    for m in range(len(corners)):
        x0, x1, y0, y1 = 1e9, -1e9, 1e9, -1e9
        for k in range(4):
            p, q = corners[m, k], corners[m, (k + 1) % 4]
            for end in range(2):
                if end == 0:
                    if p[2] < near:
                        continue
                    x, y, z = p[0], p[1], p[2]
                else:
                    if (p[2] < near) == (q[2] < near):
                        continue
                    f = (near - p[2]) / (q[2] - p[2])
                    x, y, z = p[0] + f * (q[0] - p[0]), p[1] + f * (q[1] - p[1]), near
                column, row = (K[0, 0] * x + K[0, 1] * y) / z + K[0, 2], K[1, 1] * y / z + K[1, 2]
                x0, x1, y0, y1 = min(x0, column), max(x1, column), min(y0, row), max(y1, row)
        boxes[m] = max(x0, 0.0), min(x1, float(width)), max(y0, 0.0), min(y1, float(height))
    return boxes


@numba.njit(cache=True, nogil=True)
def _visible(planes, boxes, width, height, supersample):
    """Row of `planes` seen by each sample (-1: none) and its 1/z, both (H*supersample, W*supersample)."""
    ids = np.full((height * supersample, width * supersample), -1, np.int32)
    best = np.zeros((height * supersample, width * supersample))
    for m in range(len(planes)):
        p = planes[m]
        for row in range(int(boxes[m, 2] * supersample), min(int(boxes[m, 3] * supersample) + 1, len(ids))):
            y = (row + 0.5) / supersample
            iz0, a0, b0 = p[1] * y + p[2], p[4] * y + p[5], p[7] * y + p[8]
            for column in range(
                int(boxes[m, 0] * supersample), min(int(boxes[m, 1] * supersample) + 1, width * supersample)
            ):
                x = (column + 0.5) / supersample
                iz = p[0] * x + iz0
                if iz <= best[row, column] or iz > 50.0:
                    continue
                a, b = p[3] * x + a0, p[6] * x + b0
                if 0 <= a <= iz and 0 <= b <= iz:
                    best[row, column] = iz
                    ids[row, column] = m
    return ids, best


@numba.njit(cache=True, nogil=True, inline="always")
def _mirror(s):
    """Fold a coordinate into [0, 1], mirrored beyond it."""
    s -= 2 * np.floor(s / 2)
    return 2 - s if s > 1 else s


@numba.njit(cache=True, nogil=True)
def _texel(texels, texture, level, s, t, out, weight):
    """Add weight * the bilinear value of one reduction at (s, t) in [0, 1]."""
    side = SIDE >> level
    column0 = SIDE if level else 0
    row0 = SIDE - (SIDE >> (level - 1)) if level else 0
    x, y = min(max(s * side - 0.5, 0.0), side - 1.0), min(max(t * side - 0.5, 0.0), side - 1.0)
    i, j = int(y), int(x)
    fy, fx = y - i, x - j
    i1, j1 = min(i + 1, side - 1), min(j + 1, side - 1)
    w00, w01, w10, w11 = (1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx
    i, i1, j, j1 = row0 + i, row0 + i1, column0 + j, column0 + j1
    for c in range(3):
        out[c] += weight * (
            w00 * texels[texture, i, j, c]
            + w01 * texels[texture, i, j1, c]
            + w10 * texels[texture, i1, j, c]
            + w11 * texels[texture, i1, j1, c]
        )


@numba.njit(cache=True, nogil=True)
def _shade(
    ids, inverse_z, planes, textures, uv, tint, gain, origin, u, v, normals, texels, lamp, supersample, world_from_pixel
):
    """Colour of every pixel, (H, W, 3) float64 in 0..1 before exposure; the sky where nothing is seen."""
    height, width = ids.shape[0] // supersample, ids.shape[1] // supersample
    color = np.zeros((height, width, 3))
    texel = np.zeros(3)
    share = 1.0 / supersample**2
    for row in range(ids.shape[0]):
        y = (row + 0.5) / supersample
        for column in range(ids.shape[1]):
            x = (column + 0.5) / supersample
            if ids[row, column] < 0:
                ray = world_from_pixel @ np.array([x, y, 1.0])
                up = max(0.0, ray[2] / np.sqrt((ray**2).sum()))
                for c in range(3):
                    color[row // supersample, column // supersample, c] += share * (HORIZON[c] - ZENITH[c] * up)
                continue
            p = planes[ids[row, column]]
            m = int(p[9])
            iz = inverse_z[row, column]
            a, b = (p[3] * x + p[4] * y + p[5]) / iz, (p[6] * x + p[7] * y + p[8]) / iz
            # how far one sample step moves in the photograph, in texels of its full size
            step = SIDE / (iz * supersample)
            sx, sy = (p[3] - a * p[0]) * uv[m, 1] * step, (p[4] - a * p[1]) * uv[m, 1] * step
            tx, ty = (p[6] - b * p[0]) * uv[m, 3] * step, (p[7] - b * p[1]) * uv[m, 3] * step
            long = max(sx * sx + tx * tx, sy * sy + ty * ty)
            area = abs(sx * ty - sy * tx)
            # a compromise between blur (the long axis) and aliasing (the short one), in samples squared
            lod = min(max(0.25 * np.log2(max(long * max(area, long / 16), 1e-12)), 0.0), LEVELS - 1.0)
            level = int(lod)
            s, t = _mirror(uv[m, 0] + a * uv[m, 1]), _mirror(uv[m, 2] + b * uv[m, 3])
            texel[:] = 0
            _texel(texels, textures[m], level, s, t, texel, (1 - (lod - level)) / 255)
            if lod > level:
                _texel(texels, textures[m], level + 1, s, t, texel, (lod - level) / 255)
            light = 1.0
            if lamp[3] > 0:
                dot, square = 0.0, 0.0
                for c in range(3):
                    towards = lamp[c] - (origin[m, c] + a * u[m, c] + b * v[m, c])
                    dot += towards * normals[m, c]
                    square += towards * towards
                light = 1 - lamp[3] + lamp[3] * 3.2 * max(dot, 0.0) / np.sqrt(square + 1e-9) / (1 + square / 6)
            for c in range(3):
                color[row // supersample, column // supersample, c] += (
                    share * light * (tint[m, c] + gain[m, c] * texel[c])
                )
    return color
