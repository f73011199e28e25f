"""The labels of planned pairs: what the labelling stage does, as a plain callable that reads what it needs itself."""

import json
from collections import Counter

import pyarrow as pa
import torch

from vop.parts import Parts
from vop.schema import Config
from vop.training.batches import LABELS, label_row
from vop.training.supervision import LabelError, open_supervision

REASONS = b"reasons"  # in the metadata of a part
KEPT = 20000  # labels that a worker remembers, about 5 KB each


class Labelling:
    """Makes the labels of planned pairs, a part at a time; built once by each worker.

    places: files that the run prepared, as `open_supervision` takes them.
    """

    def __init__(self, config: Config, places: dict[str, str], parts: Parts):
        torch.set_num_threads(1)  # workers fill the cores
        self.negatives, self.parts = config.train.negatives, parts
        self.supervision = open_supervision(config, places)
        self.known: dict[tuple[str, str], dict | LabelError] = {}

    def __call__(self, planned: pa.Table) -> pa.Table:
        """Write part `part` of the labels: its pairs (a row each, as `Supervision` takes them), but those without.

        Returns part and pairs, their number. Why pairs were left out is noted in the part (`reasons_of`).
        """
        part, pairs = planned["part"][0].as_py(), planned.drop_columns(["part"]).to_pylist()
        pairs = [pair for pair in pairs if pair["view0"] is not None]  # a part of no pairs travels as one empty row
        self._label([pair for pair in pairs if (pair["view0"], pair["view1"]) not in self.known])
        found = [self.known[pair["view0"], pair["view1"]] for pair in pairs]
        rows = [row for row in found if not isinstance(row, LabelError)]
        reasons = Counter(str(row) for row in found if isinstance(row, LabelError))
        noted = LABELS.with_metadata({REASONS: json.dumps(dict(sorted(reasons.items())))})
        self.parts.write(part, pa.Table.from_pylist(rows, schema=noted))
        return pa.table({"part": [part], "pairs": [len(pairs)]})

    def _label(self, pairs: list[dict]) -> None:
        """Make the labels of pairs that were not met before: small collections draw the same pairs in many epochs."""
        while self.known and len(self.known) + len(pairs) > KEPT:
            self.known.pop(next(iter(self.known)))
        pairs = sorted(pairs, key=lambda pair: (pair["view0"], pair["view1"]))  # so that a depth map is read once
        for pair, labels in zip(pairs, self.supervision.labels(pairs), strict=True):
            row = labels if isinstance(labels, LabelError) else label_row(pair, labels, self.negatives)
            self.known[pair["view0"], pair["view1"]] = row


def reasons_of(schema: pa.Schema) -> dict[str, int]:
    """Why pairs of a part have no labels, and how many, from its schema."""
    return json.loads((schema.metadata or {})[REASONS])
