"""Features and matches as hloc reads them (github.com/cvg/Hierarchical-Localization).

    features.h5     attribute `orientation` of the file: "upright" (hloc has none)
                    <name of the image>/             nested groups where the name has slashes
                        keypoints        (N, 2) float32, x and y in pixels of the original image, pixel centres at 0,
                                         with the attribute `uncertainty`, pixels
                        descriptors      (D, N) float16
                        scores           (N,) float32
                        image_size       (2,) width and height of the original image
    matches.h5      <name of image 0>/<name of image 1>/     in the names `-` for `/`; a pair stands once
                        matches0         (N0,) int16, the keypoint of image 1 for each one of image 0; -1: none
                        matching_scores0 (N0,) float16
    pairs.txt       query database

Most of hloc looks for a pair in both orders, `localize_inloc` for query/database alone: pairs stand as they are listed.

hloc adds 0.5 to keypoints when it hands them to COLMAP, where pixel centres lie at +0.5 as they do here. It writes
keypoints as float16, which rounds them to whole pixels beyond 1024; it reads what precision the file has. Images are
upright here: hloc's own extractors leave EXIF orientation out. What is read of others' files: `vop.foreign_hloc`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import h5py
import numpy as np
import pyarrow as pa

from vop import files
from vop.features import LocalFeatures
from vop.matches import matches_of
from vop.pairs import PairsError, check_hloc_names

FEATURES, MATCHES, PAIRS = "features.h5", "matches.h5", "pairs.txt"
ORIENTATION, UPRIGHT = "orientation", "upright"  # attribute of features.h5: keypoints of images as EXIF turns them
INT16_KEYPOINTS = 1 << 15  # more than hloc's type can number: such a pair gets int32, which hloc reads as well


def key(name: str) -> str:
    """The name of an image as it stands in a pair's group."""
    return name.replace("/", "-")


def check_names(names: Collection[str]) -> None:
    """Raise `PairsError` for names that the files cannot hold: with white space, or alike once `/` becomes `-`."""
    check_hloc_names(names)
    seen: dict[str, str] = {}
    for name in names:
        if seen.setdefault(key(name), name) != name:
            raise PairsError(
                f"the images {seen[key(name)]!r} and {name!r} are one to hloc, whose {MATCHES} writes {key(name)!r} "
                "for both: rename one, or a folder"
            )


def write_features(path: str, parts: Iterable[Iterable[tuple[str, LocalFeatures]]]) -> Iterator[dict[str, int]]:
    """Write the features of named images, a part in memory at a time; yields the numbers of keypoints of each part.

    The file appears when the iterator is exhausted, whole.
    """
    with files.atomic(path) as (_, inner), h5py.File(inner, "w", libver="latest") as h5:
        h5.attrs[ORIENTATION] = UPRIGHT
        for part in parts:
            written = {}
            for name, found in part:
                group = h5.create_group(name)
                keypoints = group.create_dataset("keypoints", data=found.keypoints - np.float32(0.5))
                # What a pixel that the extractor saw measures in the original: hloc weighs residuals by it.
                keypoints.attrs["uncertainty"] = np.mean(np.divide(found.size, found.scaled))
                group.create_dataset("descriptors", data=found.descriptors.T)
                group.create_dataset("scores", data=found.scores)
                group.create_dataset("image_size", data=np.array(found.size))
                written[name] = len(found)
            yield written


def write_matches(path: str, tables: Iterable[pa.Table], keypoints: Mapping[str, int]) -> Iterator[int]:
    """Write the matches of pairs (image0, image1, matches, scores; a table in memory at a time); yields their numbers.

    `keypoints` says how many an image has. A pair stands in the file once, as image1/image0 where the column `flipped`
    says so. Of several matches of one keypoint the best by score is kept, since matches0 has place for one. The file
    appears when the iterator is exhausted, whole.
    """
    with files.atomic(path) as (_, inner), h5py.File(inner, "w", libver="latest") as h5:
        for table in tables:
            names = zip(*(table[side].to_pylist() for side in ("image0", "image1", "flipped")), strict=True)
            scores = table["scores"].combine_chunks()
            for (image0, image1, flipped), indices, score in zip(names, matches_of(table), scores, strict=True):
                score = score.values.to_numpy()
                if flipped:
                    image0, image1, indices = image1, image0, indices[:, ::-1]
                order = np.argsort(score, kind="stable")  # what is written last stays
                wide = keypoints[image1] > INT16_KEYPOINTS
                matches0 = np.full(keypoints[image0], -1, np.int32 if wide else np.int16)
                scores0 = np.zeros(keypoints[image0], np.float16)
                matches0[indices[order, 0]], scores0[indices[order, 0]] = indices[order, 1], score[order]
                group = h5.create_group(f"{key(image0)}/{key(image1)}")
                group.create_dataset("matches0", data=matches0)
                group.create_dataset("matching_scores0", data=scores0)
            yield table.num_rows
