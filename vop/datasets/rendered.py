"""Rendered photographs with exact depth, poses and overlap: rooms whose walls carry real photographs.

For tests, demonstrations, training and measurements of scale: any number of images, the same for the same seed on any
machine, each image independent of the others. A camera walks from room to room and looks around; the building grows
with the number of images, so that most pairs of a large set do not overlap.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vop import files
from vop.datasets.building import Building
from vop.datasets.posed import OVERLAP, OverlapTruth, depth_name, encode_depth, write_cameras, write_overlap
from vop.datasets.raster import Light, draw
from vop.geometry import Camera, overlap_matrix, pose_from_rt
from vop.image import to_jpeg

FRAMES_PER_ROOM = 20
QUALITY = 92  # of the JPEG files
EYE = 1.55  # metres above the floor


@dataclass(frozen=True, eq=False)
class Frame:
    """A rendered photograph: file name, image (H, W, 3) uint8 RGB, depth (H, W) float32 metres at the pixel centres
    (0 where the sky is seen), and its camera."""

    name: str
    image: np.ndarray
    depth: np.ndarray
    camera: Camera


Scene = Building


def scene_for(count: int, seed: int = 0) -> Scene:
    """Build the scene for `count` images: one room for every twenty."""
    if count < 1:
        raise ValueError(f"{count} images; at least 1 must be rendered")
    return Scene(seed, math.ceil(count / FRAMES_PER_ROOM))


def render(
    count: int, seed: int = 0, width: int = 320, height: int = 240, lighting: float = 1.0, mixed: bool = True
) -> Iterator[Frame]:
    """Render images 0..count-1 of the scene for `count` images; see `render_frame`."""
    scene = scene_for(count, seed)
    for index in range(count):
        yield render_frame(scene, index, width, height, lighting, mixed)


def render_frame(
    scene: Scene, index: int, width: int = 320, height: int = 240, lighting: float = 1.0, mixed: bool = True
) -> Frame:
    """Render one image of a scene. It depends on its arguments only, so workers may render in any order.

    lighting: 0 = constant light and a perfect sensor, 1 = exposure, colour temperature, a moving lamp, vignetting and
    noise change from image to image as in a casual collection. mixed: one image in eight is portrait, one in eight
    16:9; otherwise all are width x height pixels.
    """
    if index < 0 or lighting < 0:
        raise ValueError(f"image {index} at lighting {lighting}; neither may be negative")
    rng = np.random.default_rng((scene.seed, 7, index))
    shape = rng.random()
    if mixed and shape < 0.125:
        width, height = height, width
    elif mixed and shape < 0.25:
        height = max(1, round(width * 9 / 16))
    camera = _camera(scene, index, width, height, rng)
    light = light_of(lighting, camera, rng)
    image, depth = draw(scene.rectangles, camera, light, rng)
    return Frame(f"{index:04d}.jpg", image, depth, camera)


def write(
    directory, count: int, seed: int = 0, width: int = 320, height: int = 240, lighting: float = 1.0, mixed: bool = True
) -> OverlapTruth:
    """Write images, depth, `cameras.json` and `overlap.parquet` into a folder that `vop.datasets.posed` reads.

    Running it again writes the same bytes; every file appears whole or not at all, the overlaps last.
    """
    depths, cameras = [], {}
    for frame in render(count, seed, width, height, lighting, mixed):
        files.write_bytes(files.join(directory, frame.name), to_jpeg(frame.image, QUALITY))
        files.write_bytes(files.join(directory, depth_name(frame.name)), encode_depth(frame.depth))
        cameras[frame.name] = frame.camera
        depths.append(frame.depth)
    write_cameras(directory, cameras)
    truth = OverlapTruth(tuple(cameras), overlap_matrix(depths, list(cameras.values())))
    write_overlap(files.join(directory, OVERLAP), truth)
    return truth


@functools.lru_cache(maxsize=256)
def _walk(scene: Scene, room: int) -> tuple[np.ndarray, float, float]:
    """Points (4, 2) of the path through a room, and the directions (radians) of its first and last stretch."""
    path = scene.path(room)
    first, last = path[1] - path[0], path[3] - path[2]
    return path, math.atan2(first[1], first[0]), math.atan2(last[1], last[0])


def _camera(scene: Scene, index: int, width: int, height: int, rng: np.random.Generator) -> Camera:
    """Where image `index` is taken: along its room's path, turning a quarter to one and a quarter on the way."""
    lap, step = divmod(index, scene.rooms * FRAMES_PER_ROOM)
    room, step = divmod(step, FRAMES_PER_ROOM)
    path, yaw0, yaw1 = _walk(scene, room)
    along = (step + 0.5 + rng.uniform(-0.3, 0.3)) / FRAMES_PER_ROOM
    stretch, part = divmod(along * (len(path) - 1), 1)
    x, y = path[int(stretch)] * (1 - part) + path[int(stretch) + 1] * part + rng.uniform(-0.2, 0.2, 2)
    turns = (yaw1 - yaw0) % (2 * math.pi)
    turns += 2 * math.pi if turns < math.pi / 2 else 0
    sense = 1 if (room + lap) % 2 == 0 else -1
    yaw = (yaw0 + along * turns if sense > 0 else yaw1 - along * turns) + rng.normal(0, 0.12) + 0.7 * lap
    pitch, roll = rng.normal(-0.06, 0.1), rng.normal(0, 0.04)
    R = look(yaw, pitch, roll)
    focal = max(width, height) * rng.uniform(0.62, 0.85)
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    center = np.array([x, y, EYE + rng.normal(0, 0.12)])
    return Camera(K, pose_from_rt(R, -R @ center), width, height)


def look(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """World-to-camera rotation of a camera that looks along yaw (from east to north), up by pitch, rolled."""
    forward = np.array([math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch)])
    right = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
    down = np.cross(forward, right)
    c, s = math.cos(roll), math.sin(roll)
    return np.stack([c * right + s * down, -s * right + c * down, forward])


def light_of(strength: float, camera: Camera, rng: np.random.Generator) -> Light:
    """Draw the light of one image; the same numbers are drawn at any strength, so that cameras do not change."""
    exposure, warmth, share, vignette = rng.normal(-0.05, 0.15), rng.normal(0, 0.06), rng.random(), rng.random()
    lamp = camera.center + np.array([*rng.uniform(-2, 2, 2), 0.7])
    gains = np.exp(strength * np.array([exposure + warmth, exposure, exposure - warmth]))
    return Light(
        tuple(gains), tuple(lamp), min(0.9, 0.45 * strength * share), 0.4 * strength * vignette, 1.2 * strength
    )
