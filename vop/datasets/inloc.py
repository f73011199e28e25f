"""InLoc: photographs of a phone to be found among cutouts of panoramic scans, as hloc and the benchmark lay them out.

    ROOT/query/iphone7/IMG_0731.JPG                                    queries
    ROOT/database/cutouts/DUC1/000/DUC_cutout_000_0_0.jpg              database, 36 views per scan
    ROOT/database/scans/, ROOT/database/alignments/                    only for localization

From https://www.visuallocalization.net/datasets (InLoc): cutouts.tar.gz into database/, iphone7.tar.gz into query/.

The poses of the queries are not published: poses are judged by https://www.visuallocalization.net from a list of query
poses, not here, and no true overlap is known. The layout holds no intrinsics either; for relative poses give
`cameras=` with K per image. hloc takes a focal length of 28/36 of the long side of a query and its middle as centre.
"""

from vop.datasets import layout
from vop.datasets.folder import list_images
from vop.datasets.layout import Benchmark
from vop.schema import DatasetConfig

QUERIES, DATABASE = "query/iphone7", "database/cutouts"
WITHHELD = (
    "the poses of InLoc's queries are not published: localize them and submit the poses to visuallocalization.net; "
    "relative poses have no truth to be compared with"
)


def missing(dataset: DatasetConfig) -> list[str]:
    """What the layout lacks."""
    return [
        *layout.lacking(layout.place(dataset, QUERIES), "the photographs to be found (IMG_*.JPG, iphone7.tar.gz)"),
        *layout.lacking(layout.place(dataset, DATABASE), "folders DUC1 and DUC2 of cutouts (*.jpg, cutouts.tar.gz)"),
    ]


def read(dataset: DatasetConfig) -> Benchmark:
    """Queries and database; nothing is known of their cameras."""
    queries, database = (list_images(layout.place(dataset, part), dataset.root).images for part in (QUERIES, DATABASE))
    return Benchmark(layout.two_sets(dataset, queries, database), withheld=WITHHELD)
