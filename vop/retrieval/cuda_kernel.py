"""The votes of many image pairs in one launch: a Triton kernel that keeps the similarities on the chip.

A program holds a block of a query's patches and walks over some of that query's candidates, a tile of their patches at
a time. A tile of similarities lives in registers: while the tensor cores compute the next one, it is thresholded,
summed and counted, and only sums and counts are written. The walk over candidates keeps the tensor cores fed: the query
is read once, and each byte of a candidate then serves 2 P floating-point operations, 512, where an H100 computes about
300 while it reads one from its memory.

Every sum is taken in an order that the tile's shape fixes, without atomics. So a pair's bits depend on the tile and the
card, never on the batch, the other pairs or the shard.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """How a launch is cut up. p, s and e are powers of two, at least 16.

    p       query patches of a program
    s       candidate patches of a tile
    e       how much of E is multiplied at a time; if all of it, the query stays on the chip for the whole program
    warps   warps of a program
    stages  depth of the pipeline from memory to the tensor cores
    pairs   candidates of a program, at most
    """

    p: int
    s: int
    e: int
    warps: int = 8
    stages: int = 3
    pairs: int = 5


def default_tile(x: torch.Tensor, both: bool) -> Tile:
    """The tile for patches x (.., E).

    On Hopper and later, for 16-bit patches, what fits its 227 KB on the chip and its registers: a warp group's
    product reads 128 candidate patches at a time or waits for the chip's memory, but the sums of both directions need
    the registers of half of them. Elsewhere a small tile, which runs on any card.
    """
    if x.dtype == torch.float32 or not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0):
        return Tile(p=64, s=64, e=32)
    return Tile(p=128, s=64 if both else 128, e=256 if x.shape[-1] <= 256 else 64)


@dataclass(frozen=True)
class Plan:
    """What every program does, as int32 tensors on the device.

    programs  (w, 3): query, first tile, end of its tiles; a run of at most `Tile.pairs` pairs of one query. Those with
              near candidates lie side by side, so that queries which share one read it from the cache
    tiles     (t, 4): pair, place of the candidate, its first patch in the tile, its number of patches
    """

    programs: torch.Tensor
    tiles: torch.Tensor


def pair_votes(x, x_sizes, y, y_sizes, query, place, bound: float, both: bool, tile: Tile | None = None):
    """Sums and counts of the similarities above `bound`, for n pairs of a query and a candidate.

    x (Q, P, E), y (N, S, E)    unit vectors of one type, float16, bfloat16 or float32
    x_sizes (Q,), y_sizes (N,)  int32, how many patches of each image take part: its first ones
    query (n,), place (n,)      int64, `query` ascending: the pairs are x[query], y[place]
    tile                        None: `default_tile`

    Returns sums (n, P) float32 and counts (n, P) int32 of the query's patches and, if `both`, sums and counts (n, S) of
    the candidate's patches, from the same similarities. What takes no part has 0. All tensors lie on one device.
    """
    tile = tile or default_tile(x, both)
    return run(x, x_sizes, y, plan(query, place, y_sizes, y.shape[1], tile), len(query), bound, both, tile)


def plan(query, place, y_sizes, S: int, tile: Tile) -> Plan:
    """Which program scores which of the pairs; S is the most patches of a candidate. Arguments as for `pair_votes`."""
    width = _power_of_two(S, tile.s)
    index = torch.arange(len(query), device=query.device)
    sizes = y_sizes[place].long()
    needed = (sizes + width - 1) // width
    before = torch.nn.functional.pad(torch.cumsum(needed, 0), (1, 0))  # tiles before each pair, and all of them
    pair = torch.repeat_interleave(index, needed)
    first = (torch.arange(len(pair), device=query.device) - before[pair]) * width
    tiles = torch.stack([pair, place[pair], first, sizes[pair]], 1).int()
    starts = torch.nonzero((index - torch.searchsorted(query, query)) % tile.pairs == 0).squeeze(1)
    stops = torch.cat([starts, starts.new_tensor([len(query)])])[1:]
    programs = torch.stack([query[starts], before[starts], before[stops]], 1).int()
    return Plan(programs[torch.argsort(place[starts], stable=True)].contiguous(), tiles)


def run(x, x_sizes, y, plan: Plan, n: int, bound: float, both: bool, tile: Tile) -> tuple[torch.Tensor, ...]:
    """Launch a plan for n pairs, made with the same tile; otherwise as `pair_votes`."""
    P, S, E = x.shape[1], y.shape[1], x.shape[2]
    tile_p, tile_s, tile_e = _power_of_two(P, tile.p), _power_of_two(S, tile.s), _power_of_two(E, tile.e)
    blocks = triton.cdiv(P, tile_p)
    shapes = (n, P), (n, blocks, S) if both else (1,)  # the kernel takes reverse votes in any case
    types = torch.float32, torch.int32
    forward, reverse = ([torch.zeros(shape, dtype=t, device=x.device) for t in types] for shape in shapes)
    if len(plan.tiles):
        with torch.cuda.device_of(x):
            _votes[(blocks * len(plan.programs),)](
                x, x_sizes, y, plan.programs, plan.tiles, *forward, *reverse, bound, P, S, blocks,
                E=E, BOTH=both, ZERO_HITS=bound < 0, TILE_P=tile_p, TILE_S=tile_s, TILE_E=tile_e,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return (*forward, *(votes.sum(1, dtype=votes.dtype) for votes in reverse)) if both else tuple(forward)


def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs there: on a card, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
    return device.type == "cuda" or not isinstance(_votes, triton.JITFunction)


def _power_of_two(size: int, most: int) -> int:
    """The least power of two from `size` on, but 16 to `most`: what a tensor core takes."""
    return min(max(16, triton.next_power_of_2(size)), most)


@triton.jit
def _votes(
    x, x_sizes, y, programs, tiles, sums, counts, back_sums, back_counts, bound, P, S, blocks,
    E: tl.constexpr, BOTH: tl.constexpr, ZERO_HITS: tl.constexpr,
    TILE_P: tl.constexpr, TILE_S: tl.constexpr, TILE_E: tl.constexpr,
):  # fmt: skip
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    query = tl.load(programs + program * 3)
    size = tl.load(x_sizes + query)
    start = tl.load(programs + program * 3 + 1)
    end = tl.where(block * TILE_P < size, tl.load(programs + program * 3 + 2), start)
    p, e = block * TILE_P + tl.arange(0, TILE_P), tl.arange(0, TILE_E)
    own = p < size
    mine = x + (query.to(tl.int64) * P + p)[:, None] * E + e[None, :]
    if TILE_E >= E:
        mine = tl.load(mine, mask=own[:, None] & (e < E)[None, :], other=0.0)
    total, number = tl.zeros((TILE_P,), tl.float32), tl.zeros((TILE_P,), tl.int32)
    if start < end:
        dots = _similarities(mine, own, y, tiles + start * 4, S, E, TILE_P, TILE_S, TILE_E)
        for t in range(start, end - 1):
            # The tensor cores compute the next tile while this one is summed.
            upcoming = _similarities(mine, own, y, tiles + (t + 1) * 4, S, E, TILE_P, TILE_S, TILE_E)
            total, number = _settle(
                dots, bound, total, number, p, size, tiles + t * 4, sums, counts, P,
                back_sums, back_counts, block, blocks, S, BOTH, ZERO_HITS, TILE_S,
            )  # fmt: skip
            dots = upcoming
        _settle(
            dots, bound, total, number, p, size, tiles + (end - 1) * 4, sums, counts, P,
            back_sums, back_counts, block, blocks, S, BOTH, ZERO_HITS, TILE_S,
        )  # fmt: skip


@triton.jit
def _similarities(
    mine, own, y, tile, S, E: tl.constexpr, TILE_P: tl.constexpr, TILE_S: tl.constexpr, TILE_E: tl.constexpr
):
    """Inner products (TILE_P, TILE_S) of the query's patches with those of a tile; 0 past the end of either.

    `mine` is the query's patches if all of E fits into one step, else the pointers to the first step of them.
    """
    place, first, last = tl.load(tile + 1).to(tl.int64), tl.load(tile + 2), tl.load(tile + 3)
    s, e = tl.arange(0, TILE_S), tl.arange(0, TILE_E)
    theirs = (y + (place * S + first) * E) + (s[None, :] * E + e[:, None])
    inside = (first + s < last)[None, :]
    if TILE_E >= E:
        part = tl.load(theirs, mask=inside & (e < E)[:, None], other=0.0)
        dots = tl.dot(mine, part, input_precision="ieee")
    else:
        dots = tl.zeros((TILE_P, TILE_S), tl.float32)
        for at in range(0, E, TILE_E):
            step = at + e < E
            left = tl.load(mine + at, mask=own[:, None] & step[None, :], other=0.0)
            right = tl.load(theirs + at, mask=inside & step[:, None], other=0.0)
            dots = tl.dot(left, right, dots, input_precision="ieee")
    return dots


@triton.jit
def _settle(
    dots, bound, total, number, p, size, tile, sums, counts, P, back_sums, back_counts, block, blocks, S,
    BOTH: tl.constexpr, ZERO_HITS: tl.constexpr, TILE_S: tl.constexpr,
):  # fmt: skip
    """Add a tile's hits to the query's sums and counts; write them, and start anew, where the candidate ends.

    Without ZERO_HITS, what lies past an end needs no mask: it is 0 and does not exceed the bound.
    """
    pair, first, last = tl.load(tile).to(tl.int64), tl.load(tile + 2), tl.load(tile + 3)
    s = first + tl.arange(0, TILE_S)
    hit = dots > bound
    if ZERO_HITS:
        hit = hit & (p < size)[:, None] & (s < last)[None, :]
    kept = tl.where(hit, dots, 0.0)
    total += tl.sum(kept, 1)
    number += tl.sum(hit.to(tl.int32), 1)
    if BOTH:
        back = (pair * blocks + block) * S + s
        tl.store(back_sums + back, tl.sum(kept, 0), mask=s < last)
        tl.store(back_counts + back, tl.sum(hit.to(tl.int32), 0), mask=s < last)
    done = first + TILE_S >= last
    written = p < tl.where(done, size, 0)
    tl.store(sums + pair * P + p, total, mask=written)
    tl.store(counts + pair * P + p, number, mask=written)
    return tl.where(done, 0.0, total), tl.where(done, 0, number)
