"""One search shard on a graphics card: its patches stay there, and both searches run there.

The method of `vop.retrieval.voting`, with plain arrays in and out, NumPy on the host and PyTorch on the device. Two
kernels compute the votes, and the choice is the caller's:

    "triton"  similarities never leave the chip (`vop.retrieval.cuda_kernel`); the bits of a pair do not depend on the
              batch, the shard or the other pairs
    "torch"   a batched matrix product, written to memory and reduced from there; runs on any device, a CPU too; the
              library chooses its order by the shape of the batch, so `tolerance` is all that is promised

Tolerance against the CPU path. Products of 16-bit inputs are exact in float32 and all sums are float32; float32 stores
use no TF32. What differs is the order of the additions, and that tensor cores cut off where a CPU rounds. So a
similarity of two unit vectors differs by at most `tolerance(E)` = E * 2**-23, half of it without tensor cores (Higham,
Accuracy and Stability, section 3.1; Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021). Two
patches whose similarity lies that near the threshold may hit here and not there. Apart from those the counts are equal,
and a sum over h hits differs by at most h * (tolerance(E) + h * 2**-23).
"""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch

from vop.retrieval.cuda_shortlist import GlobalSearch, ieee_products
from vop.retrieval.pair_votes import PairVotes, merge, threshold

KERNEL = "triton"  # on a CUDA device, where the caller names none
WORKSPACE = 2**30  # bytes on the device for what one launch reads and writes besides the shard
UPLOAD = 2**26  # bytes of the shard sent at a time

log = logging.getLogger(__name__)


def tolerance(E: int) -> float:
    """How far a similarity of unit vectors of width E may differ from the CPU's; see the module."""
    return E * 2.0**-23


def memory_bytes(rows: int, P: int, E: int, dtype: str, G: int, workspace: int = WORKSPACE) -> int:
    """Device memory of a shard: patches in `dtype`, globals in float32, three numbers a row, and the workspace."""
    return rows * (P * E * getattr(torch, dtype).itemsize + 4 * G + 20) + workspace


def check_memory(needed: int, free: int) -> None:
    """MemoryError where a shard of `needed` bytes does not fit into the `free` bytes of a card."""
    if needed > free:
        raise MemoryError(
            f"the shard needs {needed / 1e9:.2f} GB of device memory, but {free / 1e9:.2f} GB are free: use more "
            "shards (retrieval.shards), a card with more memory, embedding.dtype=float16 or a narrower encoder"
        )


class CudaShard:
    """The rows of one shard, resident on a device.

    patches    (n, P, E) unit vectors: a NumPy array, float16 or float32 (a memory map will do), or a tensor, then
               bfloat16 too
    globals    (n, G) float16 or float32
    rows       (n,) int64 database rows, no two equal
    masks      (n, P) bool, True where a patch is image; None: padding votes too
    scenes     (n,) int scene codes, or None
    fresh      (n,) bool, or None: the rows among which settled queries are searched
    device     such as "cuda" or "cuda:1"; "cpu" runs the torch kernel
    kernel     "triton" or "torch", see the module; None: `KERNEL` on a CUDA device, "torch" elsewhere. The attribute
               `kernel` and the log say which one is used; none replaces another
    workspace  bytes that a batch may use besides the shard; a larger one is cut up

    MemoryError if the card cannot hold it. ValueError for arrays that do not fit together or a kernel that is not
    installed.
    """

    def __init__(
        self,
        patches,
        globals,
        rows,
        masks=None,
        scenes=None,
        fresh=None,
        *,
        device="cuda",
        kernel=None,
        workspace=WORKSPACE,
    ):
        rows = np.asarray(rows, np.int64)
        _check_arrays(patches, globals, rows, masks, scenes, fresh)
        self.device, self.workspace = torch.device(device), workspace
        self.kernel = kernel or (KERNEL if self.device.type == "cuda" else "torch")
        self._pair_votes = _kernel(self.kernel, self.device)
        if self.device.type == "cuda":
            needed = memory_bytes(*patches.shape, _type_name(patches), globals.shape[1], workspace)
            check_memory(needed, torch.cuda.mem_get_info(self.device)[0])
        order = np.argsort(rows)  # the shard lies in database order
        self._rows = rows[order]
        self._places = to_device(self._rows, self.device)
        self._patches, self._sizes = self._resident(patches, masks, order)
        globals_ = to_device(np.asarray(globals)[order].astype(np.float32), self.device)
        codes, fresh = (
            None if array is None else to_device(np.asarray(array, np.int64)[order], self.device)
            for array in (scenes, fresh)
        )
        self._globals = GlobalSearch(globals_, self._places, codes, fresh, workspace)
        log.info("%d images on %s; votes by the %s kernel", len(rows), self.device, self.kernel)

    def __len__(self) -> int:
        return len(self._rows)

    def shortlist(
        self, query_globals, k: int, exclude=None, scenes=None, settled=None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k best rows of this shard for each of query_globals (Q, G); see `GlobalSearch`.

        exclude (Q,): each query's own database row, which is left out; -1 for none. scenes (Q,): each query sees only
        the rows with its code. settled (Q,) bool: queries that see only the fresh rows. Returns offsets (Q + 1,) int64,
        rows int64, scores float32: the fields of a `Shortlist`.
        """
        count = len(query_globals)
        for name, array in (("exclude", exclude), ("scenes", scenes), ("settled", settled)):
            if array is not None and len(array) != count:
                raise ValueError(f"{len(array)} {name} for {count} queries")
        columns = np.full(count, -1) if exclude is None else exclude, scenes, settled
        exclude, scenes, settled = (
            None if array is None else to_device(np.asarray(array, np.int64), self.device) for array in columns
        )
        queries = to_device(np.asarray(query_globals, np.float32), self.device)
        return self._globals.search(queries, k, exclude, scenes, settled)

    def votes(self, patches, masks: np.ndarray | None, wanted, radius: float) -> tuple[PairVotes, PairVotes]:
        """Votes of Q queries for those of the wanted rows that lie in this shard; rows of other shards are ignored.

        patches  (Q, P, E) in the shard's type: a NumPy array, or a tensor, which need not travel if it is on the device
        masks    (Q, P) bool, or None: all patches vote
        wanted   an `index.Wanted`, or anything with its arrays: queries (m,) positions in the batch, rows (m,) database
                 rows, mutual (m,) bool; no pair twice

        Returns the votes of the queries for the rows, and where `mutual` those of the rows for the queries, from the
        same similarities; the latter's queries are database rows and its rows positions in the batch. Entries count
        patches among those that take part. ValueError if E or the type differs, a radius is out of range, or a pair
        comes twice.
        """
        bound = float(threshold(radius))
        x, x_sizes = _packed(patches, masks, self.device)
        if x.shape[2] != self._patches.shape[2] or x.dtype != self._patches.dtype:
            raise ValueError(
                f"query patches are {x.dtype} of width {x.shape[2]}, those of the shard {self._patches.dtype} of width "
                f"{self._patches.shape[2]}: make both by the same encoder and store them in one type"
            )
        queries = np.asarray(wanted.queries)
        if len(queries) and not 0 <= queries.min() <= queries.max() < len(x):  # the kernel would read anything
            raise ValueError(f"the wanted pairs name queries outside the batch of {len(x)}")
        found, back = [], []
        for both, query, place in self._pairs(wanted, x.shape[1]):
            votes = self._pair_votes(x, x_sizes, self._patches, self._sizes, query, place, bound, both)
            rows = self._places[place]
            found.append(_with_hits(query, rows, *votes[:2]))
            if both:
                back.append(_with_hits(rows, query, *votes[2:]))
        return merge(found), merge(back)

    def _pairs(self, wanted, P: int) -> Iterator[tuple[bool, torch.Tensor, torch.Tensor]]:
        """The wanted pairs that lie here, in parts that keep within the workspace: whether they are mutual, query and
        place in this shard, in the order of (query, row)."""
        arrays = (np.asarray(array, np.int64) for array in (wanted.queries, wanted.rows, wanted.mutual))
        query, rows, mutual = (to_device(array, self.device) for array in arrays)
        place = torch.searchsorted(self._places, rows).clamp_(max=len(self) - 1)
        here = self._places[place] == rows
        for both in (False, True):
            pair = (query * len(self) + place)[here & (mutual == both)].sort().values
            for part in pair.split(max(1, self.workspace // self._pair_bytes(P, both))):
                if len(part):
                    yield both, part // len(self), part % len(self)

    def _pair_bytes(self, P: int, both: bool) -> int:
        """Device memory that a pair needs during a launch.

        For the results and the entries made of them; the Triton kernel returns reverse votes by blocks of at least 16
        query patches and lists its tiles; the torch kernel gathers the patches, widens them on a CPU, and writes the
        similarities and the hits.
        """
        _, S, E = self._patches.shape
        results = 48 * (P + S * both)
        if self.kernel == "triton":
            return results + 8 * S * both * -(-P // 16) + 64 * -(-S // 16)
        return results + 8 * (P + S) * E + 10 * P * S

    def _resident(self, patches, masks, order):
        """The patches on the device, in the order given, those that take part first, and how many take part."""
        n, P, E = patches.shape
        step = max(1, UPLOAD // (P * E * getattr(torch, _type_name(patches)).itemsize))
        resident = torch.empty((n, P, E), dtype=getattr(torch, _type_name(patches)), device=self.device)
        sizes = torch.empty(n, dtype=torch.int32, device=self.device)
        for start in range(0, n, step):
            part = order[start : start + step]
            mask = None if masks is None else np.asarray(masks)[part]
            resident[start : start + step], sizes[start : start + step] = _packed(patches[part], mask, self.device)
        return resident, sizes


def pair_votes(x, x_sizes, y, y_sizes, query, place, bound: float, both: bool) -> tuple[torch.Tensor, ...]:
    """The torch kernel: what `cuda_kernel.pair_votes` returns, from similarities that are written to memory."""
    a, b = x[query], y[place].mT
    if a.is_cuda and a.dtype != torch.float32:
        dots = torch.bmm(a, b, out_dtype=torch.float32)
    else:
        with ieee_products():
            dots = torch.bmm(a.float(), b.float())
    hit = dots > bound
    if bound < 0:  # patches that take no part are zeros, and then 0 is a hit
        hit &= (torch.arange(x.shape[1], device=x.device) < x_sizes[query, None])[:, :, None]
        hit &= (torch.arange(y.shape[1], device=x.device) < y_sizes[place, None])[:, None, :]
    dots.masked_fill_(~hit, 0)
    return tuple(
        votes for axis in ((2, 1) if both else (2,)) for votes in (dots.sum(axis), hit.sum(axis, dtype=torch.int32))
    )


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device, by way of page-locked memory if it is a card."""
    staged = torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)), pin_memory=device.type == "cuda")
    staged.numpy()[...] = array
    return staged.to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to the host, by way of page-locked memory if it comes from a card."""
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return staged.copy_(tensor).numpy()


def _with_hits(queries, rows, sums, counts) -> PairVotes:
    """The pairs (n,) that have a hit, on the host, from their sums and counts (n, P)."""
    entries = counts > 0
    sizes = entries.sum(1)
    hit = sizes > 0
    starts = torch.nn.functional.pad(sizes[hit].cumsum(0), (1, 0))
    patches = entries.nonzero()[:, 1].short()  # 16 bits, which the host reads as unsigned
    columns = [to_host(t) for t in (queries[hit], rows[hit], starts, patches, counts[entries].short(), sums[entries])]
    return PairVotes(*columns[:3], columns[3].view(np.uint16), columns[4].view(np.uint16), columns[5])


def _packed(patches, masks: np.ndarray | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches (n, P, E) on the device, those where `masks` (n, P) is True first and zeros behind; their number (n,)."""
    if masks is not None and np.shape(masks) != tuple(patches.shape[:2]):
        raise ValueError(f"masks of shape {np.shape(masks)} for patches {tuple(patches.shape)}: one bool a patch")
    packed = patches.to(device) if isinstance(patches, torch.Tensor) else to_device(patches, device)
    n, P, _ = packed.shape
    if masks is None:
        return packed.contiguous(), torch.full((n,), P, dtype=torch.int32, device=device)
    mask = to_device(np.asarray(masks, bool), device)
    image, order = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True)
    packed = packed.gather(1, order[:, :, None].expand_as(packed))
    return packed.masked_fill_(image[:, :, None] == 0, 0), mask.sum(1, dtype=torch.int32)


def _kernel(name: str, device: torch.device) -> Callable:
    if name == "torch":
        return pair_votes
    if name != "triton":
        raise ValueError(f'kernel is {name!r}, but must be "triton" or "torch"')
    try:
        from vop.retrieval import cuda_kernel
    except ImportError as error:
        raise ValueError(f'kernel="triton" needs the package triton ({error}): install it or use "torch"') from error
    if not cuda_kernel.runs_on(device):
        raise ValueError(f'kernel="triton" needs a CUDA device, not {device}: use "torch" there')
    return cuda_kernel.pair_votes


def _type_name(patches) -> str:
    return str(patches.dtype).removeprefix("torch.")


def _check_arrays(patches, globals, rows, masks, scenes, fresh) -> None:
    if _type_name(patches) not in ("float16", "float32", "bfloat16"):
        raise ValueError(
            f"patches are {_type_name(patches)}, but a card takes float16, bfloat16 or float32: search on the CPU, or "
            "embed with embedding.dtype=float16"
        )
    named = (("patches", patches), ("globals", globals), ("masks", masks), ("scenes", scenes), ("fresh", fresh))
    for name, array in named:
        if array is not None and len(array) != len(rows):
            raise ValueError(
                f"{len(array)} {name} for {len(rows)} rows: all arrays of a shard describe the same images"
            )
    if not len(rows):
        raise ValueError("a shard without rows: give the database to fewer shards")
    if len(np.unique(rows)) != len(rows):
        raise ValueError("two rows of a shard have the same number: each database image must appear once")
