"""The inner loop of the votes: which patches of two images are similar, summed and counted exactly.

Two passes. `_screen` multiplies integers of 7 bits, nearly three times as fast as floats on a CPU with AVX2, and marks
the pairs of patches that may be hits: those whose product exceeds the threshold minus a proven bound on the rounding.
`_settle` computes the similarity of the marked pairs in float32, and that alone decides, so the first pass leaves no
trace in the result. Where it marks too many, or on other processors, `_count_all` computes every similarity, in tiles
held in registers (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34, 2008).

Every similarity is computed in one order (`vop.retrieval.tiles`) and every sum runs over the other image's patches in
order. So the bits do not depend on the pass, the batch, which image comes first, the number of shards or threads, or a
BLAS library. That is the reason for an own kernel: OpenBLAS gives other bits for other shapes and thread counts.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from vop.retrieval import tiles
from vop.retrieval.tiles import LANES, LEVEL, ROWS, STEP, WIDTH

DENSE = 0.2  # share of marked pairs above which all similarities are computed: settling one costs about five times more


@njit(cache=True)
def padded(size, multiple):
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def _convert(bits, out):
    """Convert one row of patches, float16 given as uint16, float32 or int8, to float32; or copy it as it is."""


@overload(_convert, inline="always")
def _convert_row(bits, out):
    if bits.dtype == out.dtype:

        def copy(bits, out):
            for e in range(bits.shape[0]):
                out[e] = bits[e]

        return copy

    if bits.dtype == types.int8:

        def normalise(bits, out):  # the same bits as `vop.quantised.widen`
            squares = 0
            for e in range(bits.shape[0]):
                squares += np.int64(bits[e]) * np.int64(bits[e])
            scale = np.float32(1 / np.sqrt(np.float64(squares))) if squares else np.float32(0)
            for e in range(bits.shape[0]):
                out[e] = np.float32(bits[e]) * scale

        return normalise

    def widen(bits, out):
        # The exponent moves to its place and is re-biased by one product with 2**112, right for subnormals too; the
        # compiler makes vector code of it, more than ten times as fast as NumPy's conversion.
        words = out.view(np.uint32)
        for e in range(bits.shape[0]):
            word = np.uint32(bits[e])
            words[e] = ((word & np.uint32(0x7FFF)) << np.uint32(13)) | ((word & np.uint32(0x8000)) << np.uint32(16))
        for e in range(bits.shape[0]):
            out[e] *= np.float32(2.0**112)

    return widen


def room(patches, rows, width):
    """Zeros (rows, width) for `gather`: in the type of the patches if `tiles.similarities` reads it, else float32."""


@overload(room)
def _room(patches, rows, width):
    if patches.dtype == types.uint16 and tiles.SCREENS:

        def halves(patches, rows, width):
            return np.zeros((rows, width), np.uint16)

        return halves

    def floats(patches, rows, width):
        return np.zeros((rows, width), np.float32)

    return floats


@njit(nogil=True, cache=True)
def gather(patches, mask, out):
    """Fill the first rows of `out` (from `room`) with the patches where `mask` is True; returns how many."""
    n = 0
    for s in range(patches.shape[0]):
        if mask[s]:
            _convert(patches[s], out[n])
            n += 1
    return n


@njit(nogil=True, cache=True)
def _quantise(x, out):
    """Round x (E,) to scale * q with whole q, |q| <= LEVEL, and write q + LEVEL to `out` (E,) uint8.

    Returns scale, |x| and |x - scale * q|, the norms rounded up, so that they bound the true ones.
    """
    scale, norm, rest = tiles.round_row(x, out)
    more = np.float32(1 + x.shape[0] * 2.0**-22)
    norm = np.sqrt(norm) * more
    return scale, norm, np.sqrt(rest) * more + norm * np.float32(2.0**-22)


@njit(nogil=True, cache=True)
def pack(patches, mask, x, panels, offset, scale, error, norms):
    """Prepare one query: patches (P, E) float16 as uint16, float32 or int8, mask (P,) bool; returns how many take part.

    x       (P, E') from `room`: the patches that take part, first; E' is E rounded up to a multiple of STEP
    panels  (P' / WIDTH, E' / 4, WIDTH) uint32, zeros; P' is P rounded up to a multiple of WIDTH. Four integers a word
    offset  (P',) int32; scale, error (P',) float32: what `screen_tile` takes
    norms   (2,) float32: the largest |x| and the largest |scale * q|
    """
    n = gather(patches, mask, x)
    shifted = np.empty(x.shape[1], np.uint8)
    norms[:] = 0
    for p in range(n):
        scale[p], norm, error[p] = _quantise(x[p], shifted)
        total = 0
        for e in range(shifted.shape[0]):
            total += np.int32(shifted[e])
            shifted[e] -= np.uint8(LEVEL)
        words = shifted.view(np.uint32)
        for e in range(words.shape[0]):
            panels[p // WIDTH, e, p % WIDTH] = words[e]
        offset[p] = -LEVEL * (total - LEVEL * shifted.shape[0])
        norms[0], norms[1] = max(norms[0], norm), max(norms[1], norm + error[p])
    for p in range(n, scale.shape[0]):
        offset[p], scale[p], error[p] = 0, 0, -np.inf  # never marked
    return n


@njit(nogil=True, cache=True)
def _screen(query, size, n, levels, steps, norms, rests, threshold, slope, bound, marks, p, s):
    """Write the pairs of patches that may be hits to p and s (4 entries longer than needed); returns how many.

    `query` packs `size` patches; the n of the candidate are quantised in `levels`, `steps`, `norms` and `rests`.

    <x, y> = scale scale' <q, q'> + <scale q, rest'> + <rest, y>, where a rest is what `_quantise` rounds off. So, by
    Cauchy and Schwarz, the products of integers miss a similarity by at most |scale q| |rest'| + |rest| |y|.
    """
    panels, offset, scale, error, largest = query
    rows = padded(n, ROWS)
    slack = (levels.shape[1] + 64) * 2.0**-24 * largest[0]  # roundings of the similarity and of this comparison
    for i in range(n):
        slope[i] = norms[i] / steps[i]
        bound[i] = (threshold - slack * norms[i] - largest[1] * rests[i]) / steps[i]
    bound[n:rows] = np.inf
    blocks = padded(size, WIDTH) // WIDTH
    for b in range(blocks):
        for i in range(0, rows, ROWS):
            tiles.screen_tile(panels, b, offset, scale, error, levels, i, slope, bound, marks)
    found = 0
    for group in range(blocks * (WIDTH // LANES)):
        for i in range(n):
            bits = marks[group, i]
            if bits:
                for lane in range(LANES):  # written whether marked or not: no branch to mispredict
                    p[found], s[found] = group * LANES + lane, i
                    found += (bits >> lane) & 1
    return found


if not tiles.SCREENS:  # no such instructions: every similarity is computed

    @njit(nogil=True, cache=True)
    def _screen(query, size, n, levels, steps, norms, rests, threshold, slope, bound, marks, p, s):
        return -1


@njit(nogil=True, cache=True)
def settle(x, y, p, s, found, threshold, out, sums, counts, other_sums, other_counts):
    """Count the hits among `found` pairs of patches, rows p of x and s of y, for the former and for the latter.

    Sums are in order if the pairs are, for each row. p, s and out have four entries more than are found.
    """
    p[found : found + 3], s[found : found + 3] = 0, 0
    for i in range(0, found, 4):
        tiles.similarities(x, p, y, s, out, i)
    for i in range(found):
        if out[i] > threshold:
            sums[p[i]] += out[i]
            counts[p[i]] += 1
            other_sums[s[i]] += out[i]
            other_counts[s[i]] += 1


@njit(nogil=True, cache=True)
def _widen(x, n, wide):
    """The first n rows of x as float32."""
    for p in range(n):
        _convert(x[p], wide[p])


@njit(nogil=True, cache=True)
def _spread(wide, n, panels):
    """Pack n rows (., E) float32 for `_count_all`: panels (P' / WIDTH, E, WIDTH), zeros where the rows end."""
    panels[:] = 0
    for p in range(n):
        for e in range(wide.shape[1]):
            panels[p // WIDTH, e, p % WIDTH] = wide[p, e]


@njit(nogil=True, cache=True)
def _count_all(panels, n, y, m, threshold, sums, counts):
    """Count all hits of n packed patches in the m patches of y (., E) float32."""
    full = m - m % ROWS
    for b in range(padded(n, WIDTH) // WIDTH):
        for s in range(0, full, ROWS):
            tiles.tile_full(panels, b, y, s, threshold, sums, counts)
        for s in range(full, m):
            tiles.tile_single(panels, b, y, s, threshold, sums, counts)


def stack(patches, masks):
    """Prepare queries, patches (Q, P, E) float16, float32 or int8 and masks (Q, P), for `count_hits`; see `pack`."""
    Q, P, E = patches.shape
    wide, E = padded(P, WIDTH), padded(E, STEP)
    half = patches.dtype == np.float16 and tiles.SCREENS  # as `room` says
    queries = (
        np.zeros((Q, P, E), np.uint16 if half else np.float32),
        np.zeros((Q, wide // WIDTH, E // 4, WIDTH), np.uint32),
        np.empty((Q, wide), np.int32),
        np.empty((Q, wide), np.float32),
        np.empty((Q, wide), np.float32),
        np.empty((Q, 2), np.float32),
    )
    sizes = np.empty(Q, np.int64)
    for q in range(Q):
        sizes[q] = pack(as_bits(patches[q]), masks[q], *(array[q] for array in queries))
    return *queries, sizes


def as_bits(patches):
    """Stored patches as the kernel reads them: float16 as uint16, since numba knows no float16."""
    patches = np.asarray(patches)
    if patches.dtype == np.float16:
        return patches.view(np.uint16)
    if patches.dtype in (np.float32, np.int8):
        return patches
    raise ValueError(f"patches are {patches.dtype}, expected float16, float32 or int8")


@njit(nogil=True, cache=True)
def count_hits(queries, patches, masks, place, query, mutual, threshold, screens):
    """Votes of pairs of images in both directions, sparse: only patches with a hit are named.

    queries    x (Q, P0, E'), panels, offset, scale, error, norms stacked over Q, and their sizes (Q,), from `pack`
    patches    (n, P1, E) float16 as uint16, float32 or int8; masks (n, P1) bool: True where a patch takes part
    place      (m,) int64 which of `patches`, equal ones side by side; query (m,) int64 which query
    mutual     (m,) bool: whether the candidate's patches are wanted too
    threshold  float32, strict; screens: whether to try integers first

    Returns, for the queries' patches and then for the candidates', (ends (m,) int64, patch uint16, count uint16,
    sum float32): pair i has the entries ends[i - 1] .. ends[i]. Releases the GIL.
    """
    x, panels, offset, scale, error, norms, sizes = queries
    if x.shape[2] != padded(patches.shape[2], STEP):
        raise ValueError("queries and candidates differ in width: pack both for this kernel")
    m, P0, P1, E = place.shape[0], x.shape[1], patches.shape[1], x.shape[2]
    ends, others_ends = np.empty(m, np.int64), np.empty(m, np.int64)
    patch, count, total = np.empty(m * P0, np.uint16), np.empty(m * P0, np.uint16), np.empty(m * P0, np.float32)
    others = np.empty(m * P1, np.uint16), np.empty(m * P1, np.uint16), np.empty(m * P1, np.float32)
    wide = scale.shape[1]
    sums, counts = np.empty(wide, np.float32), np.empty(wide, np.int32)
    other_sums, other_counts = np.empty(P1, np.float32), np.empty(P1, np.int32)
    y, wide_y, wide_x = room(patches, P1, E), np.empty((P1, E), np.float32), np.empty((P0, E), np.float32)
    rows = padded(P1, ROWS)
    levels = np.zeros((rows, E), np.uint8)
    steps, lengths, rests = np.empty(P1, np.float32), np.empty(P1, np.float32), np.empty(P1, np.float32)
    slope, bound = np.empty(rows, np.float32), np.empty(rows, np.float32)
    marks = np.empty((wide // LANES, rows), np.uint8)
    p, s = np.empty(P0 * P1 + 4, np.uint32), np.empty(P0 * P1 + 4, np.uint32)
    out = np.empty(P0 * P1 + 4, np.float32)
    screens &= tiles.SCREENS
    spread = np.empty((1 if screens else x.shape[0], wide // WIDTH, E, WIDTH), np.float32)
    if not screens:
        for k in range(x.shape[0]):
            _widen(x[k], sizes[k], wide_x)
            _spread(wide_x, sizes[k], spread[k])
    back = np.empty((padded(P1, WIDTH) // WIDTH, E, WIDTH), np.float32)
    back_sums, back_counts = np.empty(back.shape[0] * WIDTH, np.float32), np.empty(back.shape[0] * WIDTH, np.int32)
    at, other_at, size, is_wide = 0, 0, 0, False
    for i in range(m):
        if i == 0 or place[i] != place[i - 1]:
            size, is_wide = gather(patches[place[i]], masks[place[i]], y), False
            if screens:
                for j in range(size):
                    steps[j], lengths[j], rests[j] = _quantise(y[j], levels[j])
        k = query[i]
        n = sizes[k]
        sums[:], counts[:], other_sums[:], other_counts[:] = 0, 0, 0, 0
        found = -1
        if screens:
            packed = panels[k], offset[k], scale[k], error[k], norms[k]
            found = _screen(packed, n, size, levels, steps, lengths, rests, threshold, slope, bound, marks, p, s)
        if 0 <= found <= DENSE * n * size:
            settle(x[k], y, p, s, found, threshold, out, sums, counts, other_sums, other_counts)
        else:
            if not is_wide:
                _widen(y, size, wide_y)
                is_wide = True
            panel = spread[0 if screens else k]
            if screens or mutual[i]:
                _widen(x[k], n, wide_x)
            if screens:
                _spread(wide_x, n, panel)
            _count_all(panel, n, wide_y, size, threshold, sums, counts)
            if mutual[i]:
                back_sums[:], back_counts[:] = 0, 0
                _spread(wide_y, size, back)
                _count_all(back, size, wide_x, n, threshold, back_sums, back_counts)
                other_sums[:], other_counts[:] = back_sums[:P1], back_counts[:P1]
        for j in range(n):
            if counts[j]:
                patch[at], count[at], total[at] = j, counts[j], sums[j]
                at += 1
        for j in range(size if mutual[i] else 0):
            if other_counts[j]:
                others[0][other_at], others[1][other_at], others[2][other_at] = j, other_counts[j], other_sums[j]
                other_at += 1
        ends[i], others_ends[i] = at, other_at
    forward = ends, patch[:at].copy(), count[:at].copy(), total[:at].copy()
    return forward, (others_ends, others[0][:other_at].copy(), others[1][:other_at].copy(), others[2][:other_at].copy())
