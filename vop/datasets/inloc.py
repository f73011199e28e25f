"""InLoc: photographs of a phone to be found among cutouts of panoramic scans, as hloc and the benchmark lay them out.

    ROOT/query/iphone7/IMG_0731.JPG                                    queries
    ROOT/database/cutouts/DUC1/000/DUC_cutout_000_0_0.jpg              database, 36 views per scan
    ROOT/database/cutouts/DUC1/000/DUC_cutout_000_0_0.jpg.mat          what its pixels see; only for localization
    ROOT/database/alignments/DUC1/transformations/DUC_trans_000.txt    where the scan stands; only for localization

From https://www.visuallocalization.net/datasets (InLoc): cutouts.tar.gz into database/, iphone7.tar.gz into query/. The
alignments come from https://cvpr17.wijmans.xyz/data, as https://github.com/HajimeTaira/InLoc_dataset unpacks them.
database/scans, the whole panoramas, is not needed.

`vop localize` takes points of the world from the scans (`vop.datasets.scans`): no model and no cameras of the database
are needed. The poses of the queries are not published: https://www.visuallocalization.net judges them from a list in
which a query has its file name alone (`poses.txt`), and no true overlap is known. The layout holds no intrinsics
either; the recipe names the focal length that the benchmark takes for all queries, with the middle of the image as
centre. For relative poses give `cameras=` with K per image.
"""

from vop.datasets import layout
from vop.datasets.folder import list_images
from vop.datasets.layout import Benchmark
from vop.datasets.scans import CUTOUTS, Scans
from vop.schema import DatasetConfig

QUERIES = "query/iphone7"
WITHHELD = (
    "the poses of InLoc's queries are not published: localize them and submit the poses to visuallocalization.net; "
    "relative poses have no truth to be compared with"
)


def missing(dataset: DatasetConfig) -> list[str]:
    """What the layout lacks. Scans are not looked for: only localization needs them (`Scans.check`)."""
    return [
        *layout.lacking(layout.place(dataset, QUERIES), "the photographs to be found (IMG_*.JPG, iphone7.tar.gz)"),
        *layout.lacking(layout.place(dataset, CUTOUTS), "folders DUC1 and DUC2 of cutouts (*.jpg, cutouts.tar.gz)"),
    ]


def read(dataset: DatasetConfig) -> Benchmark:
    """Queries and database; the scans say where the database lies, and nothing is known of any camera."""
    queries, database = (list_images(layout.place(dataset, part), dataset.root).images for part in (QUERIES, CUTOUTS))
    return Benchmark(
        layout.two_sets(dataset, queries, database), withheld=WITHHELD, lift=Scans(dataset.root), written="basename"
    )
