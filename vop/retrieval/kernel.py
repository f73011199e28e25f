"""The inner loop of the votes: a matrix product whose entries are thresholded, summed and counted in registers.

The similarity matrix of two images is never written to memory. A tile of it, ``ROWS`` candidate patches by ``WIDTH``
query patches, is held in vector registers while the kernel runs along E; then each entry above the threshold is added
to its query patch's sum and count. The layout is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix
Multiplication" (ACM TOMS 34, 2008), with one packed operand.

Every similarity is one chain of fused multiply-adds from e = 0 to E - 1, and every sum runs over the candidate's
patches in order. So the bits do not depend on the tiling, the batch, the number of shards or threads, or a BLAS
library. That is the reason for an own kernel: OpenBLAS gives other bits for other shapes and thread counts. It needs
a CPU with fused multiply-add (x86 since 2013, every 64-bit ARM); elsewhere the result is the same and slow.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES = 8  # float32 numbers in one AVX2 register; narrower units split it, with the same result
WIDTH = 3 * LANES  # query patches of a tile
ROWS = 4  # candidate patches of a tile: 4 x 3 sums + 3 loads + 1 splat fill the 16 AVX2 registers
UNROLL = 2  # steps along E per turn; the caller pads E to a multiple of it

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_ZEROS = ir.Constant(_FLOATS, [0.0] * LANES)


def panels(patches: np.ndarray) -> np.ndarray:
    """Pack query patches (P, E) float32 for `count_hits`: (ceil(P / WIDTH), E', WIDTH), zeros where P or E ends.

    E' is E rounded up to a multiple of UNROLL. A zero patch at the end takes part in the loop; its result is dropped.
    """
    P, E = patches.shape
    padded = np.zeros((-(-P // WIDTH) * WIDTH, even(E)), np.float32)
    padded[:P, :E] = patches
    return np.ascontiguousarray(padded.reshape(-1, WIDTH, padded.shape[1]).transpose(0, 2, 1))


def even(E: int) -> int:
    """E rounded up to a multiple of UNROLL: the row length that `count_hits` takes."""
    return -(-E // UNROLL) * UNROLL


def _splat(builder, scalar):
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))


def _load(builder, pointer, vector):
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = 4
    return value


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def _tile(rows):
    """Make the intrinsic `tile(panels, b, y, s, threshold, sums, counts)` for candidate patches s .. s + rows - 1."""

    @intrinsic
    def tile(typing_context, panels, b, y, s, threshold, sums, counts):
        for array, dtype in ((panels, types.float32), (y, types.float32), (sums, types.float32), (counts, types.int32)):
            if array.layout != "C" or array.dtype != dtype:  # read through bare pointers below
                raise TypingError(f"count_hits was given {array}, expected C-contiguous {dtype}")

        def generate(context, builder, signature, arguments):
            arrays = [
                context.make_array(signature.args[i])(context, builder, arguments[i]) if i in (0, 2, 5, 6) else None
                for i in range(7)
            ]
            _, b, _, s, threshold, _, _ = arguments
            E = builder.extract_value(arrays[2].shape, 1)
            index = E.type
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32"
            )
            columns = range(WIDTH // LANES)
            panel = builder.gep(arrays[0].data, [builder.mul(b, builder.mul(E, index(WIDTH)))])
            lines = [builder.gep(arrays[2].data, [builder.mul(builder.add(s, index(i)), E)]) for i in range(rows)]

            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            e = builder.phi(index)
            start = [[builder.phi(_FLOATS) for _ in columns] for _ in range(rows)]
            dots = [list(line) for line in start]
            for step in range(UNROLL):
                here = builder.add(e, index(step))
                offset = builder.mul(here, index(WIDTH))
                x = [
                    _load(builder, builder.gep(panel, [builder.add(offset, index(LANES * c))]), _FLOATS)
                    for c in columns
                ]
                for i in range(rows):
                    value = _splat(builder, builder.load(builder.gep(lines[i], [here])))
                    for c in columns:
                        dots[i][c] = builder.call(fma, [x[c], value, dots[i][c]])
            following = builder.add(e, index(UNROLL))
            e.add_incoming(index(0), before)
            e.add_incoming(following, loop)
            for i in range(rows):
                for c in columns:
                    start[i][c].add_incoming(_ZEROS, before)
                    start[i][c].add_incoming(dots[i][c], loop)
            builder.cbranch(builder.icmp_signed("<", following, E), loop, after)

            builder.position_at_end(after)
            bound = _splat(builder, threshold)
            for c in columns:
                place = builder.add(builder.mul(b, index(WIDTH)), index(LANES * c))
                sum_at, count_at = (builder.gep(arrays[i].data, [place]) for i in (5, 6))
                total, number = _load(builder, sum_at, _FLOATS), _load(builder, count_at, _INTS)
                for i in range(rows):
                    hit = builder.fcmp_ordered(">", dots[i][c], bound)
                    total = builder.fadd(total, builder.select(hit, dots[i][c], _ZEROS))
                    number = builder.sub(number, builder.sext(hit, _INTS))
                _store(builder, total, sum_at)
                _store(builder, number, count_at)
            return context.get_dummy_value()

        return types.void(panels, types.intp, y, types.intp, types.float32, sums, counts), generate

    return tile


_tile_full, _tile_single = _tile(ROWS), _tile(1)


@njit(nogil=True, cache=True)
def count_hits(panels, y, threshold, sums, counts):
    """Sum and count, for every query patch, its similarities above `threshold` to the candidate's patches.

    panels (B, E, WIDTH) float32 from `panels`; y (S, E) float32, C-contiguous, E a multiple of UNROLL; threshold
    float32, strict; sums (B * WIDTH,) float32 and counts (B * WIDTH,) int32 are overwritten. Releases the GIL.
    """
    blocks, E, width = panels.shape
    if width != WIDTH or y.shape[1] != E or E == 0 or E % UNROLL:
        raise ValueError("panels and candidate differ in width, or are not padded: pack both for this kernel")
    if sums.size != blocks * WIDTH or counts.size != blocks * WIDTH:
        raise ValueError("sums and counts must hold one number for each packed query patch")
    sums[:] = 0
    counts[:] = 0
    full = y.shape[0] - y.shape[0] % ROWS
    for b in range(blocks):
        for s in range(0, full, ROWS):
            _tile_full(panels, b, y, s, threshold, sums, counts)
        for s in range(full, y.shape[0]):
            _tile_single(panels, b, y, s, threshold, sums, counts)


@njit(nogil=True, cache=True)
def widen(bits, mask, out):
    """Convert the finite float16 patches where `mask` (S,) is True, given as their bits (S, E) uint16, to float32.

    They fill the first rows of `out` (S, E' >= E); returns how many. Exact. The exponent is moved to its place and
    re-biased by one product with 2**112, which is right for subnormals too; the compiler makes vector code of it, more
    than ten times as fast as NumPy's conversion.
    """
    words = out.view(np.uint32)
    n = 0
    for s in range(bits.shape[0]):
        if not mask[s]:
            continue
        for e in range(bits.shape[1]):
            word = np.uint32(bits[s, e])
            words[n, e] = ((word & np.uint32(0x7FFF)) << np.uint32(13)) | ((word & np.uint32(0x8000)) << np.uint32(16))
        for e in range(bits.shape[1]):
            out[n, e] *= np.float32(2.0**112)
        n += 1
    return n
