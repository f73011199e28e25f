"""Rates: what one image, pair or message costs on a machine. Plain numbers, that a plan multiplies and a file keeps."""

import dataclasses
import json
from dataclasses import dataclass

from vop import files
from vop.schema import Config, ConfigError

SECONDS = ("start", "models", "embed", "search", "pairs", "report")  # steps with a price that no image changes


@dataclass(frozen=True)
class Rates:
    """What was measured on one machine, seconds of one core unless said otherwise.

    made_with: the settings that the rates depend on (`settings`); another config is refused with them.
    """

    made_with: dict
    """Backbone, encoder, image size ... that they were measured with."""
    device: str
    """What described the images: cpu or cuda."""
    cores: int
    """Cores of the machine that was measured."""
    measured_images: int
    """Images they were measured on."""
    patches: int
    """Patches of an image, P."""
    token_width: int
    """Numbers of a token, D."""
    width: int
    """Numbers of a descriptor that is not whitened: the encoder's, or D."""
    global_width: int
    """Numbers of a global descriptor, G."""
    image_bytes: float
    """Size of an image file."""
    decode_s: float
    """Read, decode and letterbox an image, all cores at it."""
    forward_s: float
    """Describe an image, all cores at it, or on one card."""
    sampled_s: float
    """Add an image to the sample that the models are adapted to."""
    write_s: float
    """Write a megabyte of a shard: Parquet, sync, hash."""
    file_s: float
    """Wait until the disk has a small file, on the clock."""
    read_s: float
    """Read a megabyte of a store."""
    catalog_s: float
    """The driver's work for an image: plan it, say where it lies, note what became of it."""
    receipt_s: float
    """Read the receipt of a shard."""
    facts_s: float
    """Read from a shard what the catalog takes of it."""
    prepare_s: float
    """The driver's work for an image before a search: names, fingerprints."""
    shortlist_row_s: float
    """Compare a query's global descriptor with that of a database image."""
    shortlist_query_s: float
    """The rest of a shortlist: a query at a shard."""
    pair_s: float
    """Votes of a pair of images, for both sides."""
    votes_query_s: float
    """The rest of the votes: a query at a shard."""
    driver_query_s: float
    """The driver's work for a query: read, merge, rank, write."""
    driver_pair_s: float
    """The driver's work for a candidate of a query."""
    message_s: float
    """The driver's work to ask a search actor and take its answer."""
    listed_s: float
    """Write a ranked pair to the lists and to the graph."""
    mutual: float
    """Share of candidates that list the query too, beyond chance."""
    vote_bytes: float
    """Memory of the votes of a pair."""
    kept_bytes: float
    """Disk of the votes of a pair (`retrieval.keep_votes`)."""
    ranked_bytes: float
    """Disk of a ranked pair."""
    catalog_bytes: float
    """Disk of an image in the catalog."""
    driver_bytes: float
    """Memory of the driver for an image."""
    process_bytes: float
    """Memory of a process with the models in it."""
    fixed_s: dict[str, float]
    """Seconds of the steps `SECONDS` that no image changes: Ray, processes and models that start."""

    def to_json(self) -> dict:
        """As a plan's file holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, path: str, config: Config) -> "Rates":
        """The rates in the file of an earlier plan.

        Raises `ConfigError` if the file is none, or the rates were measured with other settings than these.
        """
        try:
            content = files.read_json(path)["rates"]
            rates = cls(**content)
        except FileNotFoundError as error:
            raise ConfigError(f"plan.rates={path} does not exist: it is what `vop plan plan.file=...` wrote") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"plan.rates={path} holds no rates ({error}): give what `vop plan plan.file=...` of this version wrote"
            ) from error
        asked = settings(config)
        other = [f"{key}: measured with {rates.made_with.get(key)!r}, asked for {value!r}"
                 for key, value in asked.items() if rates.made_with.get(key) != value]  # fmt: skip
        if other:
            raise ConfigError(f"plan.rates={path} does not fit these settings ({'; '.join(other)}): measure again")
        return rates


def settings(config: Config) -> dict:
    """The settings that rates cannot be carried over from; all others the arithmetic takes into account."""
    return {
        "backbone": config.backbone,
        "block": config.block,
        "encoder": config.encoder,
        "image_size": config.embedding.image_size,
    }


def device() -> str:
    """What describes images on this machine, cpu or cuda."""
    import torch  # seconds to import, which a plan from a file need not wait for

    return "cuda" if torch.cuda.is_available() else "cpu"
