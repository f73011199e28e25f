"""Tiles of matrix products in vector registers, as LLVM code that numba functions call: the floor of the votes.

A similarity of two rows is eight chains of fused multiply-adds, over e = c, c + 8, c + 16, ..., joined by one
tree of additions, whatever computes it: `similarities` for single pairs of rows, `tile_full` for a block of them.
`screen_tile` multiplies 7-bit integers, nearly three times as fast. Fused multiply-add is an instruction of x86 since
2013 and of every 64-bit ARM; elsewhere the result is the same and slow.

Numba's cache of machine code looks at the file of the calling function only: whoever changes something here also
touches kernel.py and patches.py.
"""

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES = 8  # float32 numbers in one AVX2 register; narrower units split it, with the same result
WIDTH = 2 * LANES  # query patches of a tile
ROWS = 6  # candidate patches of a tile: 6 x 2 sums, loads and a splat fill the 16 AVX2 registers
STEP = 16  # E is padded to a multiple: integers are multiplied four at a time, and four such products fit 16 bits
LEVEL = 45  # largest integer: 4 steps x 2 products x (2 * 45) x 45 = 32,400 is below 2**15

_features = numba.config.CPU_FEATURES
# Whether `screen_tile` and rows of float16 work here; numba can be told to make code for another processor.
_host = llvmlite.binding.get_host_cpu_features() if _features is None else {}
SCREENS = all(_host.get(name, False) or f"+{name}" in (_features or "").split(",") for name in ("avx2", "f16c"))

_FLOAT, _INT, _SHORT, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_SHORTS, _BYTES = ir.VectorType(_SHORT, 2 * LANES), ir.VectorType(_BYTE, 4 * LANES)
_ZEROS = ir.Constant(_FLOATS, [0.0] * LANES)
_COLUMNS = range(WIDTH // LANES)


def _splat(builder, scalar, lanes=LANES):
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes))


def _load(builder, pointer, vector, align=4):
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = align
    return value


def _floats(builder, pointer, dtype):
    """LANES numbers as float32, from a row of float32, or of float16 that numba knows as uint16."""
    if dtype == types.float32:
        return _load(builder, pointer, _FLOATS)
    return builder.fpext(_load(builder, pointer, ir.VectorType(ir.HalfType(), LANES), 2), _FLOATS)


def _store(builder, value, pointer, align=4):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = align


def _data(context, builder, signature, arguments, *numbers):
    """Data pointers and shapes of array arguments, which must be C-contiguous: they are read through the pointers."""
    for i in numbers:
        if signature.args[i].layout != "C":
            raise TypingError(f"the kernel was given {signature.args[i]}, expected a C-contiguous array")
    arrays = [context.make_array(signature.args[i])(context, builder, arguments[i]) for i in numbers]
    return [array.data for array in arrays], [cgutils.unpack_tuple(builder, array.shape) for array in arrays]


def _loop(builder, first, end, step, start, body):
    """`for e in range(first, end, step)`, at least once, carrying values; `body(e, values)` gives the next ones."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    e = builder.phi(first.type)
    carried = [builder.phi(value.type) for value in start]
    results = body(e, carried)
    following = builder.add(e, step)
    e.add_incoming(first, before)
    e.add_incoming(following, builder.block)
    for phi, initial, value in zip(carried, start, results, strict=True):
        phi.add_incoming(initial, before)
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
    builder.position_at_end(after)
    return results


def _halved(builder, vector):
    """Sum of the lanes: ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))."""
    for half in (4, 2, 1):
        lower = ir.Constant(ir.VectorType(_INT, half), list(range(half)))
        upper = ir.Constant(ir.VectorType(_INT, half), list(range(half, 2 * half)))
        vector = builder.fadd(
            builder.shuffle_vector(vector, vector, lower), builder.shuffle_vector(vector, vector, upper)
        )
    return builder.extract_element(vector, _INT(0))


def _fma(builder):
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32"
    )


@intrinsic
def similarities(typing_context, x, p, y, s, out, i):
    """Similarities of four pairs of rows, x[p[k]] and y[s[k]] for k = i .. i + 3, to out[i : i + 4].

    Rows are float32, or, where SCREENS says so, float16 given as uint16: products of either have the same bits.
    """

    def generate(context, builder, signature, arguments):
        (x, p, y, s, out), shapes = _data(context, builder, signature, arguments, 0, 1, 2, 3, 4)
        i, E, kinds = arguments[5], shapes[0][1], (signature.args[0].dtype, signature.args[2].dtype)
        index, fma = E.type, _fma(builder)
        places = [builder.add(i, index(k)) for k in range(4)]

        def rows(base, numbers):
            chosen = [builder.zext(builder.load(builder.gep(numbers, [k])), index) for k in places]
            return [builder.gep(base, [builder.mul(row, E)]) for row in chosen]

        left, right = rows(x, p), rows(y, s)

        def body(e, dots):
            a = [_floats(builder, builder.gep(row, [e]), kinds[0]) for row in left]
            b = [_floats(builder, builder.gep(row, [e]), kinds[1]) for row in right]
            return [builder.call(fma, [u, v, dot]) for u, v, dot in zip(a, b, dots, strict=True)]

        dots = _loop(builder, index(0), E, index(LANES), [_ZEROS] * 4, body)
        for k, dot in zip(places, dots, strict=True):
            builder.store(_halved(builder, dot), builder.gep(out, [k]))
        return context.get_dummy_value()

    return types.void(x, p, y, s, out, types.intp), generate


def _tile(rows):
    """Make the intrinsic `tile(panels, b, y, s, threshold, sums, counts)` for candidate patches s .. s + rows - 1."""

    @intrinsic
    def tile(typing_context, panels, b, y, s, threshold, sums, counts):
        def generate(context, builder, signature, arguments):
            (panels, y, sums, counts), shapes = _data(context, builder, signature, arguments, 0, 2, 5, 6)
            _, b, _, s, threshold, _, _ = arguments
            E, fma = shapes[1][1], _fma(builder)
            index = E.type
            panel = builder.gep(panels, [builder.mul(b, builder.mul(E, index(WIDTH)))])
            lines = [builder.gep(y, [builder.mul(builder.add(s, index(i)), E)]) for i in range(rows)]

            def body(e, dots):
                offset, following = builder.mul(e, index(WIDTH)), []
                x = [
                    _load(builder, builder.gep(panel, [builder.add(offset, index(LANES * c))]), _FLOATS)
                    for c in _COLUMNS
                ]
                for i in range(rows):
                    value = _splat(builder, builder.load(builder.gep(lines[i], [e])))
                    following += [builder.call(fma, [x[c], value, dots[i * len(x) + c]]) for c in _COLUMNS]
                return following

            def chains(first, step):  # ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)), as halving a register adds them
                if step == LANES:
                    return _loop(builder, index(first), E, index(LANES), [_ZEROS] * (rows * len(_COLUMNS)), body)
                one, other = chains(first, 2 * step), chains(first + step, 2 * step)
                return [builder.fadd(u, v) for u, v in zip(one, other, strict=True)]

            dots = chains(0, 1)
            bound = _splat(builder, threshold)
            for c in _COLUMNS:
                place = builder.add(builder.mul(b, index(WIDTH)), index(LANES * c))
                sum_at, count_at = builder.gep(sums, [place]), builder.gep(counts, [place])
                total, number = _load(builder, sum_at, _FLOATS), _load(builder, count_at, _INTS)
                for i in range(rows):
                    dot = dots[i * len(_COLUMNS) + c]
                    hit = builder.fcmp_ordered(">", dot, bound)
                    total = builder.fadd(total, builder.select(hit, dot, _ZEROS))
                    number = builder.sub(number, builder.sext(hit, _INTS))
                _store(builder, total, sum_at)
                _store(builder, number, count_at)
            return context.get_dummy_value()

        return types.void(panels, types.intp, y, types.intp, types.float32, sums, counts), generate

    return tile


tile_full, tile_single = _tile(ROWS), _tile(1)


@intrinsic
def screen_tile(typing_context, panels, b, offset, scale, error, y, s, slope, bound, marks):
    """Mark, in marks[2 * b + c, s + i] (one bit a lane), where dot * scale + error * slope > bound.

    dot is offset plus the product of panel b (E / 4, WIDTH) of four int8 each and row s + i of y (., E) uint8.
    """

    def generate(context, builder, signature, arguments):
        numbers = (0, 2, 3, 4, 5, 7, 8, 9)
        (panels, offset, scale, error, y, slope, bound, marks), shapes = _data(
            context, builder, signature, arguments, *numbers
        )
        b, s = arguments[1], arguments[6]
        E, S = shapes[4][1], shapes[7][1]
        index = E.type
        pairs = ir.FunctionType(_SHORTS, [_BYTES, _BYTES])
        multiply = cgutils.get_or_insert_function(builder.module, pairs, "llvm.x86.avx2.pmadd.ub.sw")
        shorts = ir.FunctionType(_INTS, [_SHORTS, _SHORTS])
        widen = cgutils.get_or_insert_function(builder.module, shorts, "llvm.x86.avx2.pmadd.wd")
        ones = ir.Constant(_SHORTS, [1] * 2 * LANES)
        panel = builder.bitcast(panels, _BYTE.as_pointer())
        panel = builder.gep(panel, [builder.mul(b, builder.mul(E, index(WIDTH)))])
        lines = [builder.gep(y, [builder.mul(builder.add(s, index(i)), E)]) for i in range(ROWS)]
        first = builder.mul(b, index(WIDTH))
        places = [builder.add(first, index(LANES * c)) for c in _COLUMNS]
        start = [_load(builder, builder.gep(offset, [place]), _INTS) for place in places]

        def body(e, dots):
            following = []
            for i in range(ROWS):
                partial = [None for _ in _COLUMNS]
                for k in range(0, STEP, 4):
                    four = _load(builder, builder.gep(lines[i], [builder.add(e, index(k))]), _INT, 1)
                    four = builder.bitcast(_splat(builder, four), _BYTES)
                    here = builder.mul(builder.add(e, index(k)), index(WIDTH))
                    for c in _COLUMNS:
                        at = builder.gep(panel, [builder.add(here, index(4 * LANES * c))])
                        product = builder.call(multiply, [four, _load(builder, at, _BYTES, 1)])
                        partial[c] = product if partial[c] is None else builder.add(partial[c], product)
                for c in _COLUMNS:
                    wide = builder.call(widen, [partial[c], ones])
                    following.append(builder.add(dots[i * len(_COLUMNS) + c], wide))
            return following

        dots = _loop(builder, index(0), E, index(STEP), start * ROWS, body)
        scales = [_load(builder, builder.gep(scale, [place]), _FLOATS) for place in places]
        errors = [_load(builder, builder.gep(error, [place]), _FLOATS) for place in places]
        fma = _fma(builder)
        for i in range(ROWS):
            row = builder.add(s, index(i))
            slopes = _splat(builder, builder.load(builder.gep(slope, [row])))
            bounds = _splat(builder, builder.load(builder.gep(bound, [row])))
            for c in _COLUMNS:
                value = builder.sitofp(dots[i * len(_COLUMNS) + c], _FLOATS)
                value = builder.call(fma, [value, scales[c], builder.fmul(errors[c], slopes)])
                marked = builder.bitcast(builder.fcmp_ordered(">", value, bounds), _BYTE)
                group = builder.add(builder.mul(b, index(len(_COLUMNS))), index(c))
                builder.store(marked, builder.gep(marks, [builder.add(builder.mul(group, S), row)]))
        return context.get_dummy_value()

    return types.void(panels, types.intp, offset, scale, error, y, types.intp, slope, bound, marks), generate


@intrinsic
def round_row(typing_context, x, out):
    """Write q + LEVEL to out (E,) uint8, q = round(x / scale); returns scale, sum of x^2, sum of (x - scale q)^2."""

    def generate(context, builder, signature, arguments):
        (x, out), shapes = _data(context, builder, signature, arguments, 0, 1)
        E, kind = shapes[0][0], signature.args[0].dtype
        index, fma = E.type, _fma(builder)
        unary = ir.FunctionType(_FLOATS, [_FLOATS])
        absolute = cgutils.get_or_insert_function(builder.module, unary, f"llvm.fabs.v{LANES}f32")

        def larger(e, so_far):
            value = builder.call(absolute, [_floats(builder, builder.gep(x, [e]), kind)])
            return [builder.select(builder.fcmp_ordered(">", value, so_far[0]), value, so_far[0])]

        (largest,) = _loop(builder, index(0), E, index(LANES), [_ZEROS], larger)
        lanes = [builder.extract_element(largest, _INT(lane)) for lane in range(LANES)]
        for lane in lanes[1:]:
            lanes[0] = builder.select(builder.fcmp_ordered(">", lane, lanes[0]), lane, lanes[0])
        scale = builder.fdiv(lanes[0], _FLOAT(LEVEL))
        scale = builder.select(builder.fcmp_ordered(">", scale, _FLOAT(2.0**-64)), scale, _FLOAT(1))
        scales, inverse = _splat(builder, scale), _splat(builder, builder.fdiv(_FLOAT(1), scale))
        # Near 1.5 * 2**23 neighbouring floats differ by 1, and the last bits of one are the integer.
        shift = ir.Constant(_FLOATS, [12582912.0] * LANES)
        level = ir.Constant(_INTS, [LEVEL] * LANES)

        def body(e, sums):
            value = _floats(builder, builder.gep(x, [e]), kind)
            turned = builder.call(fma, [value, inverse, shift])
            shifted = builder.add(builder.bitcast(turned, _INTS), level)
            _store(builder, builder.trunc(shifted, ir.VectorType(_BYTE, LANES)), builder.gep(out, [e]), 1)
            rounded = builder.fneg(builder.fsub(turned, shift))
            rest = builder.call(fma, [scales, rounded, value])
            return [builder.call(fma, [value, value, sums[0]]), builder.call(fma, [rest, rest, sums[1]])]

        sums = _loop(builder, index(0), E, index(LANES), [_ZEROS] * 2, body)
        totals = [_halved(builder, total) for total in sums]
        return context.make_tuple(builder, signature.return_type, [scale, *totals])

    return types.UniTuple(types.float32, 3)(x, out), generate
