"""All that a training worker needs, where it lies: sent to the workers, which build their own learner and batches."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load

from vop import files
from vop.config import Config
from vop.models.descriptor import IMAGENET_MEAN, IMAGENET_STD
from vop.models.embedder import load_models
from vop.models.encoder import Encoder
from vop.parts import Parts
from vop.store import EmbeddingStore
from vop.training.batches import Batch, batch_of, share_of, steps_of
from vop.training.learner import Learner, token_maker
from vop.training.plan import Split, parts_of
from vop.training.reading import PixelReader, TokenReader
from vop.training.sampling import VALIDATION
from vop.training.validation import SearchSet, best_radius, validate

START = "start.safetensors"  # mean (D,) and projection (D, E) that training starts from
RADIUS = 0.2  # of the votes of a trained encoder, as everywhere


@dataclass(frozen=True, eq=False)
class Place:
    """A training whose tokens and labels are in place.

    parts: labels, `per_epoch` of them for the validation and then for each epoch. pairs: rows of each epoch's labels.
    chosen: which images train and which validate.
    search: names and overlaps (n, n) of the validation's images, by scene. paths: of the images, by name, where tokens
    are not cached; else empty.
    """

    config: Config
    store: EmbeddingStore
    parts: Parts
    per_epoch: int
    pairs: tuple[int, ...]
    validation_pairs: int
    chosen: Split
    search: tuple[tuple[tuple[str, ...], np.ndarray], ...]
    paths: dict[str, str]

    @property
    def folder(self) -> str:
        """Where checkpoints and the history go."""
        return self.config.output

    def steps(self, workers: int, epoch: int) -> int:
        """Batches of an epoch."""
        return len(steps_of(self.pairs[epoch], self.config.train.batch_size, workers))

    def shares(self, epoch: int, first: int, rank: int, workers: int) -> Iterator[pa.Table]:
        """Rows of labels for a worker: its share of every batch of an epoch, from batch number `first` on."""
        labels = self.labels(epoch)
        for start, stop in steps_of(labels.num_rows, self.config.train.batch_size, workers)[first:]:
            start, stop = share_of(start, stop, rank, workers)
            share = labels.slice(start, stop - start)
            yield share.append_column("epoch", pa.array(np.full(share.num_rows, epoch)))

    def labels(self, epoch: int) -> pa.Table:
        """The labels of an epoch, in the order they are learned from."""
        tables = [self.parts.read_one(number) for number in parts_of(epoch, self.per_epoch)]
        return pa.concat_tables(table.replace_schema_metadata(None) for table in tables)

    def reader(self) -> Callable[[pa.Table], pa.Table]:
        """What adds the inputs to rows of labels."""
        if self.config.train.cached:
            return self.tokens()
        embedding = self.config.embedding
        return PixelReader(self.paths, embedding.image_size, embedding.max_pixels, self.config.train.seed)

    def tokens(self) -> TokenReader:
        """What reads the tokens of views."""
        return TokenReader(self.store.path, self.config.train.cache or str(Path(tempfile.gettempdir()) / "vop-tokens"))

    def batch(self, rows: pa.Table) -> Batch:
        """A batch from rows that a reader completed."""
        return batch_of(rows, self.config.embedding.image_size, self.config.train.negatives)

    def learner(self, device: str = "cpu", wrap=None, rank: int = 0) -> Learner:
        """A learner before its first step: the same for every worker."""
        backbone = None
        if not self.config.train.cached:
            model, _ = load_models(self.config)
            statistics = [torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD)]
            normalised = self.config.embedding.imagenet_normalization
            backbone = token_maker(model, statistics if normalised else None)
        return Learner(new_encoder(self.config, self.store), self.config.train, device, wrap, rank, backbone)

    def validation(self):
        """A function from a learner to its scores on the validation; None without one."""
        if not self.validation_pairs:
            return None
        reader, size, labels = self.tokens(), self.config.train.batch_size, self.labels(VALIDATION)
        batches = [self.batch(reader(labels.slice(start, size))) for start in range(0, labels.num_rows, size)]
        sets = [SearchSet(names, *reader.read(names), overlap) for names, overlap in self.search]
        return partial(validate, pairs=batches, sets=sets, radius=RADIUS, **self._judged)

    def radius(self, encoder: Encoder) -> float | None:
        """The radius that suits an encoder best, by the images of the validation; None without any that overlap."""
        reader = self.tokens()
        sets = [SearchSet(names, *reader.read(names), overlap) for names, overlap in self.search]
        return best_radius(encoder, sets, **self._judged)

    @property
    def _judged(self) -> dict:
        return {"weights": self.config.retrieval.weights, "min_overlap": self.config.min_overlap}


def new_encoder(config: Config, store: EmbeddingStore) -> Encoder:
    """The encoder that training starts from; its random weights follow from the seed.

    With `start: matches` the projection is the one in `START`, and the place of a patch adds nothing at first.
    """
    torch.manual_seed(config.train.seed)
    encoder = Encoder(store.manifest["token_width"], config.train.descriptor_dim, config.train.dropout)
    if config.train.start == "matches":
        fitted = load(files.read_bytes(files.join(config.output, START)))
        projection = fitted["projection"].T
        with torch.no_grad():
            encoder.input_proj.weight.copy_(projection)
            encoder.input_proj.bias.copy_(-projection @ fitted["mean"])
            encoder.keypoint_encoder[-1].weight.zero_()
            encoder.keypoint_encoder[-1].bias.zero_()
    return encoder
