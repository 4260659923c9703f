"""Loops in Numba's part of Python: what ``kernels`` computes on a GPU, on the cores of a CPU.

They walk the same tables and take the same arguments, though a core needs no word on how many numbers it
reads at a time. Each tile leaves sums of its own, which are added up in a fixed order, so that any
number of cores gives the same bits. Numba is imported, and a loop compiled, at the first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["alive", "compiled"]

Array: TypeAlias = npt.NDArray[Any]
# Sums may be made in another order and with fused multiplications; NaN and infinity stay what they are.
FAST = {"reassoc", "contract", "nsz"}
# What walks all elements; the others have less to do than it takes to compile them for several cores.
PARALLEL = {"square_sums", "collect", "add_products", "find_non_finite"}
SHARES = 64  # of the tiles, which the cores divide among them

# What the loops call, put here when Numba is imported.
prange: Any = range
matrix: Any = None
share_out: Any = None
tile_at: Any = None
add_up: Any = None
lay_columns: Any = None
multiply: Any = None
_ONE_AT_A_TIME = Lock()  # not every pool of threads that Numba may use takes two callers


@cache
def compiled() -> tuple[Callable[..., None], ...]:
    """Give the loops, in the order of ``Kernels``.

    Raises:
        ImportError: If there is no Numba, or it is told to compile nothing.
    """
    numba = import_module("numba")
    if numba.config.DISABLE_JIT:  # Python itself sees no memory at an address
        raise ImportError("NUMBA_DISABLE_JIT is set")
    parts = (_share_out, _tile_at, _add_up, _lay_columns, _multiply)
    globals().update({part.__name__[1:]: numba.njit(fastmath=FAST, inline="always")(part) for part in parts})
    globals().update(prange=numba.prange, matrix=_matrix(numba))
    _first_process()
    loops = (square_sums, collect, unit_sums, press, spread, add_products, find_non_finite)
    return tuple(_launched(numba, loop) for loop in loops)


def alive() -> bool:
    """Whether the loops run in this process: OpenMP ends a fork of the process that ran them."""
    return not _first_process.cache_info().currsize or _first_process() == os.getpid()


@cache
def _first_process() -> int:
    return os.getpid()


def _launched(numba: Any, loop: Callable[..., None]) -> Callable[..., None]:
    """Let a loop run on as many cores as PyTorch may use, which is what it may use afterwards too."""
    how: dict[str, Any] = {"parallel": loop.__name__ in PARALLEL, "fastmath": FAST, "nogil": True}
    try:
        native = numba.njit(cache=True, **how)(loop)
    except RuntimeError:  # nowhere to keep what was compiled
        native = numba.njit(**how)(loop)

    def launch(programs: int, *arguments: Tensor | int) -> None:
        arrays = [np.atleast_1d(a.numpy()) if isinstance(a, Tensor) else a for a in arguments]
        threads = torch.get_num_threads()
        with _ONE_AT_A_TIME:
            numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))
            native(programs, *arrays)
        if torch.get_num_threads() != threads:  # Numba's OpenMP pool sets its size for the whole process
            torch.set_num_threads(threads)

    return launch


def _matrix(numba: Any) -> Any:
    """Make a function that sees the memory at an address as a matrix of ``like``'s type."""
    types = numba.types

    def pointer(typing: Any, address: Any, like: Any) -> Any:
        kind = types.CPointer(like.dtype)

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(kind))

        return kind(address, like), generate

    to_pointer, carray = numba.extending.intrinsic(pointer), numba.carray

    def at(address: int, like: Array, height: int, width: int) -> Any:
        return carray(to_pointer(address, like), (height, width))

    return numba.njit(at, inline="always")


def _share_out(facts: Array, tiles: Array, tile_height: int, tile_width: int) -> Array:
    """Cut the list of tiles where each share has about as many elements."""
    count, seen = len(tiles), np.empty(len(tiles) + 1, np.int64)
    seen[0] = 0
    for i in range(count):
        sheet, down, across = tiles[i]
        height = min(tile_height, facts[sheet, 0] - down * tile_height)
        seen[i + 1] = seen[i] + height * min(tile_width, facts[sheet, 1] - across * tile_width)
    bounds: Array = np.searchsorted(seen, seen[count] * np.arange(SHARES + 1) // SHARES)
    return bounds


def _tile_at(
    facts: Array, tiles: Array, tile: int, tile_height: int, tile_width: int
) -> tuple[int, slice, slice]:
    """Say which sheet a tile is of, and which rows and columns it has."""
    sheet, down, across = tiles[tile]
    top, left = down * tile_height, across * tile_width
    rows = slice(top, min(top + tile_height, facts[sheet, 0]))
    return sheet, rows, slice(left, min(left + tile_width, facts[sheet, 1]))


def square_sums(
    programs: int,
    weights: Array,
    facts: Array,
    tiles: Array,
    partial: Array,
    like: Array,
    clean: int,
    tile_height: int,
    tile_width: int,
) -> None:
    """Leave the sums of squares of each tile's rows and columns."""
    bounds = share_out(facts, tiles, tile_height, tile_width)
    scratch = np.empty((SHARES, tile_height + tile_width), partial.dtype)
    for share in prange(SHARES):
        for tile in range(bounds[share], bounds[share + 1]):
            sheet, r, c = tile_at(facts, tiles, tile, tile_height, tile_width)
            height, width, rows, columns = facts[sheet, 0], facts[sheet, 1], facts[sheet, 4], facts[sheet, 5]
            of_rows = scratch[share, : r.stop - r.start]
            of_columns = scratch[share, tile_height : tile_height + c.stop - c.start]
            add_up(matrix(weights[sheet], like, height, width)[r, c], clean, of_rows, of_columns)
            if rows >= 0:
                at = rows + tiles[tile, 2] * height
                partial[at + r.start : at + r.stop] = of_rows
            if columns >= 0:
                at = columns + tiles[tile, 1] * width
                partial[at + c.start : at + c.stop] = of_columns


def _add_up(values: Array, clean: int, of_rows: Array, of_columns: Array) -> None:
    """Sum the squares of each row and column, without what is not finite if ``clean``.

    Four rows at a time: a column's sum is then read and written once for four of its elements.
    """
    height, width = values.shape
    zero, limit = of_rows.dtype.type(0), values.dtype.type(np.inf)
    of_columns[:] = 0
    r = 0
    while r + 4 <= height:
        first, second, third, fourth = zero, zero, zero, zero
        for c in range(width):
            a, b = zero + values[r, c], zero + values[r + 1, c]  # in the precision of the sums
            d, e = zero + values[r + 2, c], zero + values[r + 3, c]
            if clean:
                a, b = a if abs(a) < limit else zero, b if abs(b) < limit else zero
                d, e = d if abs(d) < limit else zero, e if abs(e) < limit else zero
            of_columns[c] += (a * a + b * b) + (d * d + e * e)
            first += a * a
            second += b * b
            third += d * d
            fourth += e * e
        of_rows[r], of_rows[r + 1], of_rows[r + 2], of_rows[r + 3] = first, second, third, fourth
        r += 4
    while r < height:
        first = zero
        for c in range(width):
            a = zero if clean and not abs(values[r, c]) < limit else zero + values[r, c]
            of_columns[c] += a * a
            first += a * a
        of_rows[r] = first
        r += 1


def collect(
    programs: int,
    partial: Array,
    jobs: Array,
    chunks: Array,
    flat: Array,
    positions_at_once: int,
    tiles_at_once: int,
) -> None:
    """Add up what the tiles left for each position, in a fixed order."""
    for program in prange(programs):
        start, positions, begin, count, stride, times, step, apart = jobs[chunks[program, 0]]
        first = chunks[program, 1] * positions_at_once
        last = min(first + positions_at_once, positions)
        total = flat[start + first : start + last]
        total[:] = 0
        for k in range(count * times):
            at = begin + k // times * stride + k % times * apart
            for p in range(first, last):
                total[p - first] += partial[at + p * step]


def unit_sums(
    programs: int,
    sums: Array,
    take: Array,
    ends: Array,
    scores: Array,
    n_units: int,
    units_at_once: int,
    pairs_at_once: int,
) -> None:
    """Add up the sums of the positions that each unit owns, in a fixed order."""
    for program in prange(programs):
        for unit in range(program * units_at_once, min((program + 1) * units_at_once, n_units)):
            total = sums.dtype.type(0)
            for pair in range(ends[unit], ends[unit + 1]):
                total += sums[take[pair]]
            scores[unit] = total


def press(
    programs: int,
    scores: Array,
    spans: Array,
    gamma: Array,
    resting: Array,
    rested: Array,
    constants: Array,
    keep: int,
    units_at_once: int,
) -> None:
    """Find whether a group rests and, unless they are kept, its gammas; make scores 0 that are not finite."""
    infinity = scores.dtype.type(np.inf)
    for group in prange(programs):
        begin, end = spans[group], spans[group + 1]
        lowest, highest, broken = infinity, -infinity, 0
        for unit in range(begin, end):
            if not abs(scores[unit]) < infinity:
                broken = 1
                scores[unit] = 0
            lowest, highest = min(lowest, scores[unit]), max(highest, scores[unit])
        resting[group] = broken
        rested[group] |= broken
        if not keep:
            span = highest - lowest if highest > lowest else scores.dtype.type(1)  # equal units: 0 / 1
            for unit in range(begin, end):
                weakness = (highest - scores[unit]) / span
                gamma[unit] = 0 if broken else 2 ** (constants[1] * weakness)


def spread(
    programs: int,
    gamma: Array,
    owners: Array,
    ends: Array,
    group_of: Array,
    resting: Array,
    factors: Array,
    constants: Array,
    raw: Array,
    seen: Array,
    n_positions: int,
    at_once: int,
) -> None:
    """Add up the gammas of the units that own each position, those left out that rest.

    On the way, note whether a raw sum is not finite.
    """
    infinity = raw.dtype.type(np.inf)
    for program in prange(programs):
        for position in range(program * at_once, min((program + 1) * at_once, n_positions)):
            total = gamma.dtype.type(0)
            for pair in range(ends[position], ends[position + 1]):
                if not resting[group_of[owners[pair]]]:
                    total += gamma[owners[pair]]
            factors[position] = total * constants[0]
            if not abs(raw[position]) < infinity:
                seen[0] = 1


def add_products(
    programs: int,
    weights: Array,
    grads: Array,
    facts: Array,
    tiles: Array,
    flat: Array,
    like: Array,
    tile_height: int,
    tile_width: int,
) -> None:
    """Add to each gradient its weight, if that is finite, times the factors of its row and its column."""
    bounds = share_out(facts, tiles, tile_height, tile_width)
    scratch = np.empty((SHARES, tile_height + tile_width), flat.dtype)
    for share in prange(SHARES):
        for tile in range(bounds[share], bounds[share + 1]):
            sheet, r, c = tile_at(facts, tiles, tile, tile_height, tile_width)
            if grads[sheet] == 0:
                continue
            height, width, repeat, period = facts[sheet, 0], facts[sheet, 1], facts[sheet, 2], facts[sheet, 3]
            row, column = facts[sheet, 6], facts[sheet, 7]
            of_rows = scratch[share, : r.stop - r.start]
            of_columns = scratch[share, tile_height : tile_height + c.stop - c.start]
            of_rows[:] = 0
            of_columns[:] = 0
            if row >= 0:
                of_rows[:] = flat[row + r.start : row + r.stop]
            if column >= 0:
                lay_columns(flat[column : column + period], c.start, repeat, of_columns)
            values = matrix(weights[sheet], like, height, width)[r, c]
            multiply(matrix(grads[sheet], like, height, width)[r, c], values, of_rows, of_columns)


def _lay_columns(factors: Array, first: int, repeat: int, of_columns: Array) -> None:
    """Give ``of_columns[c]`` the factor ``(first + c) // repeat % len(factors)``, without a division each."""
    tap, place = first % repeat, first // repeat % len(factors)
    for c in range(len(of_columns)):
        of_columns[c] = factors[place]
        tap += 1
        if tap == repeat:
            tap, place = 0, place + 1
        if place == len(factors):
            place = 0


def _multiply(target: Array, values: Array, of_rows: Array, of_columns: Array) -> None:
    """Add ``values * (of_rows + of_columns)``; two rows at a time keep more reads on their way."""
    height, width = values.shape
    zero, limit = values.dtype.type(0), values.dtype.type(np.inf)
    for r in range(0, height - 1, 2):
        for c in range(width):
            a = values[r, c] if abs(values[r, c]) < limit else zero
            b = values[r + 1, c] if abs(values[r + 1, c]) < limit else zero
            a = target[r, c] + a * (of_rows[r] + of_columns[c])
            b = target[r + 1, c] + b * (of_rows[r + 1] + of_columns[c])
            target[r, c], target[r + 1, c] = a, b
    if height % 2:
        for c in range(width):
            a = values[height - 1, c] if abs(values[height - 1, c]) < limit else zero
            target[height - 1, c] += a * (of_rows[height - 1] + of_columns[c])


def find_non_finite(
    programs: int,
    where: Array,
    sizes: Array,
    numbers: Array,
    tiles: Array,
    flags: Array,
    of_all: int,
    like: Array,
    at_once: int,
) -> None:
    """Flag each tensor that holds a NaN or an infinity, under its number, and that there is one."""
    zero = like.dtype.type(0)
    for program in prange(programs):
        tensor, begin = tiles[program, 0], tiles[program, 1] * at_once
        end = min(begin + at_once, sizes[tensor])
        values = matrix(where[tensor], like, 1, sizes[tensor])[0, begin:end]
        nothing = zero
        for i in range(len(values)):
            nothing += zero * values[i]  # NaN if that is not finite
        if nothing != 0:
            flags[numbers[tensor]] = 1
            flags[of_all] = 1
