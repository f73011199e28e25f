"""Weight files: where they come from, how they are read without running code, and the hash that names their content."""

import hashlib
import io
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from vop import files

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CACHE = Path("~/.cache/vop/weights")


class WeightsError(ValueError):
    """Weights that cannot be had, read or fitted to a model; the message says what to give instead."""


def fetch(weights: str) -> str:
    """Bring weights onto this machine: the absolute path of a file or a folder.

    Args:
        weights: a local file or folder, a URI of a file (`s3://...`), or a Hugging Face id (`owner/name`). A download
            is kept, so call this once per node before the workers start; later calls return the copy.

    Raises `WeightsError` if there is no such thing.
    """
    if files.is_uri(weights):
        return _copy(weights)
    if files.exists(weights):
        return files.absolute(weights)
    if HUB_ID.fullmatch(weights):
        return _snapshot(weights)
    raise WeightsError(
        f"no weights at {files.absolute(weights)}: give a file, a folder in Hugging Face layout "
        "(config.json + model.safetensors), a URI or a Hugging Face id (owner/name)"
    )


def _copy(uri: str) -> str:
    filesystem, inner = files.resolve(uri)
    there = filesystem.get_file_info(inner)
    if not there.is_file:
        raise WeightsError(f"no weights file at {uri}: name a single file that this machine may read")
    # a replaced object has another time and becomes another copy
    version = hashlib.sha256(f"{uri} {there.size} {there.mtime_ns}".encode()).hexdigest()[:16]
    target = CACHE.expanduser() / version / there.base_name
    if not target.exists():
        files.write_bytes(target, files.read_bytes(uri))
    return str(target)


def _snapshot(hub_id: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(hub_id, allow_patterns=["config.json", "*.safetensors"])
    except Exception as error:
        raise WeightsError(
            f"cannot fetch {hub_id!r} from the Hugging Face hub ({type(error).__name__}). Where the hub cannot be "
            "reached, download the weights elsewhere and set `weights` to a local folder in Hugging Face layout "
            "(config.json + model.safetensors), or to a single file: the original .pth, or .safetensors"
        ) from error


def weight_files(path: str) -> list[str]:
    """The weight files behind a local path, sorted: the file itself, or the .safetensors files of a folder."""
    if not Path(path).is_dir():
        return [path]
    found = sorted(str(file) for file in Path(path).glob("*.safetensors"))
    if not found:
        raise WeightsError(f"no *.safetensors file in {path}: convert other formats to safetensors first")
    return found


def content_hash(path: str) -> str:
    """SHA-256 that names the weights at a local path; for a folder with several weight files, of their hashes."""
    hashes = [files.sha256(file) for file in weight_files(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """All tensors of a local file or folder by name, on the CPU.

    A training checkpoint gives the tensors of its `model` entry. Raises `WeightsError` for anything that is not a flat
    collection of tensors.
    """
    tensors = {}
    for file in weight_files(path):
        content = _read_safetensors(file) if file.endswith(".safetensors") else read_checkpoint(file)
        tensors.update(content["model"] if isinstance(content.get("model"), dict) else content)
    wrong = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if wrong or not tensors:
        raise WeightsError(
            f"{path} is not a collection of tensors (found {', '.join(map(repr, wrong[:3])) or 'nothing'}): give a "
            "state dict (.pth, .safetensors) or a checkpoint with one under 'model'"
        )
    return tensors


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    try:
        return load_safetensors(files.read_bytes(path))
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error


def read_checkpoint(path: str) -> dict:
    """Read a file of `torch.save` without running code from it: tensors, plain containers and NumPy scalars only.

    Raises `WeightsError` if the file is damaged or asks for anything else to be built.
    """
    data = io.BytesIO(files.read_bytes(path))
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # on arbitrary bytes the unpickler raises nearly anything
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise WeightsError(
            f"{path} is refused: it asks for {asked[1]}, which is neither a tensor nor a plain value, and loading such "
            "a pickle can run any code. If you trust it, load it once yourself and save its tensors with safetensors"
            if asked
            else f"{path} is no file of torch.save, or a damaged one ({type(error).__name__}): fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict or a checkpoint")
    return content


def _numpy_scalars() -> list:
    """What a pickled NumPy number is built from, under the names of NumPy 1 and 2; glue-factory logs such numbers."""
    scalar = np._core.multiarray.scalar
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "bool")]
    return [np.dtype, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), *kinds]
