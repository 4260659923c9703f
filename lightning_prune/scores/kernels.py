"""Kernels in Triton's language: sums of squares out of all tensors, and products of them into all gradients.

They walk a table of tiles. Each tile leaves sums of its own, which are added up in a fixed order: every run
and every rank gets the same bits. Triton comes with PyTorch's CUDA builds; it is imported at the first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["compiled", "jitted"]


@cache
def jitted() -> tuple[Any, ...]:
    """Give the kernels as Triton takes them, in the order of ``Kernels``.

    Raises:
        ImportError: If there is no Triton.
    """
    jit = import_module("triton").jit
    globals()["tl"] = import_module("triton.language")  # where the kernels look for it
    return tuple(map(jit, (square_sums, collect, unit_sums, press, spread, add_products, find_non_finite)))


@cache
def compiled() -> tuple[Callable[..., None], ...]:
    """Give the same to be called with the number of programs before the arguments.

    Raises:
        ImportError: If there is no Triton.
    """
    return tuple(map(_launched, jitted()))


def _launched(kernel: Any) -> Callable[..., None]:
    def launch(programs: int, *arguments: Any) -> None:
        kernel[(programs,)](*arguments)

    return launch


def square_sums(
    weights: tl.tensor,
    facts: tl.tensor,
    tiles: tl.tensor,
    partial: tl.tensor,
    like: tl.tensor,
    clean: tl.tensor,
    tile_height: tl.constexpr,
    tile_width: tl.constexpr,
) -> None:
    """Leave the sums of squares of each tile's rows and columns."""
    tile = tl.program_id(0)
    sheet = tl.load(tiles + 3 * tile)
    down, across = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    height, width = tl.load(facts + 8 * sheet), tl.load(facts + 8 * sheet + 1)
    rows, columns = tl.load(facts + 8 * sheet + 4), tl.load(facts + 8 * sheet + 5)
    precision = partial.dtype.element_ty
    weight = tl.load(weights + sheet).to(tl.pointer_type(like.dtype.element_ty))
    r = down * tile_height + tl.arange(0, tile_height)
    c = across * tile_width + tl.arange(0, tile_width)
    inside = (r < height)[:, None] & (c < width)[None, :]
    value = tl.load(weight + r[:, None] * width + c[None, :], mask=inside, other=0.0).to(precision)
    value = tl.where((clean == 0) | (tl.abs(value) < float("inf")), value, 0.0)
    square = value * value
    of_rows = r < tl.where(rows >= 0, height, 0)
    of_columns = c < tl.where(columns >= 0, width, 0)
    tl.store(partial + rows + across * height + r, tl.sum(square, 1), mask=of_rows)
    tl.store(partial + columns + down * width + c, tl.sum(square, 0), mask=of_columns)


def collect(
    partial: tl.tensor,
    jobs: tl.tensor,
    chunks: tl.tensor,
    flat: tl.tensor,
    positions_at_once: tl.constexpr,
    tiles_at_once: tl.constexpr,
) -> None:
    """Add up what the tiles left for each position, in a fixed order."""
    chunk = tl.program_id(0)
    job = tl.load(chunks + 2 * chunk)
    start, positions = tl.load(jobs + 8 * job), tl.load(jobs + 8 * job + 1)
    begin, count = tl.load(jobs + 8 * job + 2), tl.load(jobs + 8 * job + 3)
    stride, times = tl.load(jobs + 8 * job + 4), tl.load(jobs + 8 * job + 5)
    step, apart = tl.load(jobs + 8 * job + 6), tl.load(jobs + 8 * job + 7)
    p = tl.load(chunks + 2 * chunk + 1) * positions_at_once + tl.arange(0, positions_at_once)
    total = tl.zeros([positions_at_once], dtype=partial.dtype.element_ty)
    first = 0
    while first < count * times:
        k = first + tl.arange(0, tiles_at_once)
        at = (k // times * stride + k % times * apart)[:, None] + (p * step)[None, :]
        inside = (k < count * times)[:, None] & (p < positions)[None, :]
        total += tl.sum(tl.load(partial + begin + at, mask=inside, other=0.0), 0)
        first += tiles_at_once
    tl.store(flat + start + p, total, mask=p < positions)


def unit_sums(
    sums: tl.tensor,
    take: tl.tensor,
    ends: tl.tensor,
    scores: tl.tensor,
    n_units: tl.tensor,
    units_at_once: tl.constexpr,
    pairs_at_once: tl.constexpr,
) -> None:
    """Add up the sums of the positions that each unit owns, in a fixed order."""
    unit = tl.program_id(0) * units_at_once + tl.arange(0, units_at_once)
    begin = tl.load(ends + unit, mask=unit < n_units, other=0)
    end = tl.load(ends + unit + 1, mask=unit < n_units, other=0)
    longest = tl.max(end - begin, 0)
    total = tl.zeros([units_at_once], dtype=sums.dtype.element_ty)
    first = 0
    while first < longest:
        pair = begin[:, None] + first + tl.arange(0, pairs_at_once)[None, :]
        inside = pair < end[:, None]
        position = tl.load(take + pair, mask=inside, other=0)
        total += tl.sum(tl.load(sums + position, mask=inside, other=0.0), 1)
        first += pairs_at_once
    tl.store(scores + unit, total, mask=unit < n_units)


def press(
    scores: tl.tensor,
    spans: tl.tensor,
    gamma: tl.tensor,
    resting: tl.tensor,
    rested: tl.tensor,
    constants: tl.tensor,
    keep: tl.tensor,
    units_at_once: tl.constexpr,
) -> None:
    """Find whether a group rests and, unless they are kept, its gammas; make scores 0 that are not finite."""
    group, alpha = tl.program_id(0), tl.load(constants + 1)
    begin, end = tl.load(spans + group), tl.load(spans + group + 1)
    lowest = tl.full([units_at_once], float("inf"), dtype=scores.dtype.element_ty)
    highest = tl.full([units_at_once], float("-inf"), dtype=scores.dtype.element_ty)
    broken = tl.zeros([units_at_once], dtype=tl.int32)
    first = begin
    while first < end:
        unit = first + tl.arange(0, units_at_once)
        score = tl.load(scores + unit, mask=unit < end, other=0.0)
        fine = tl.abs(score) < float("inf")
        broken = tl.where(fine, broken, 1)
        score = tl.where(fine, score, 0.0)
        lowest = tl.minimum(lowest, tl.where(unit < end, score, float("inf")))
        highest = tl.maximum(highest, tl.where(unit < end, score, float("-inf")))
        first += units_at_once
    rests = tl.max(broken, 0)
    tl.store(resting + group, rests.to(tl.uint8))
    tl.store(rested + group, tl.maximum(tl.load(rested + group), rests.to(tl.uint8)))
    high = tl.max(highest, 0)
    span = high - tl.min(lowest, 0)
    span = tl.where(span > 0, span, 1.0)  # equal units: 0 / 1, so gamma is 1
    first = begin
    while first < tl.where(keep != 0, begin, end):
        unit = first + tl.arange(0, units_at_once)
        score = tl.load(scores + unit, mask=unit < end, other=0.0)
        score = tl.where(tl.abs(score) < float("inf"), score, 0.0)
        weakness = tl.where(unit < end, (high - score) / span, 0.0)
        pressed = tl.where(rests > 0, 0.0, tl.exp2(alpha * weakness))
        tl.store(scores + unit, score, mask=unit < end)
        tl.store(gamma + unit, pressed, mask=unit < end)
        first += units_at_once


def spread(
    gamma: tl.tensor,
    owners: tl.tensor,
    ends: tl.tensor,
    group_of: tl.tensor,
    resting: tl.tensor,
    factors: tl.tensor,
    constants: tl.tensor,
    raw: tl.tensor,
    seen: tl.tensor,
    n_positions: tl.tensor,
    at_once: tl.constexpr,
) -> None:
    """Add up the gammas of the units that own each position, those left out that rest.

    On the way, note whether a raw sum is not finite.
    """
    position = tl.program_id(0) * at_once + tl.arange(0, at_once)
    pair = tl.load(ends + position, mask=position < n_positions, other=0)
    end = tl.load(ends + position + 1, mask=position < n_positions, other=0)
    total = tl.zeros([at_once], dtype=gamma.dtype.element_ty)
    while tl.max(end - pair, 0) > 0:
        unit = tl.load(owners + pair, mask=pair < end, other=0)
        rests = tl.load(
            resting + tl.load(group_of + unit, mask=pair < end, other=0), mask=pair < end, other=1
        )
        total += tl.load(gamma + unit, mask=(pair < end) & (rests == 0), other=0.0)
        pair += 1
    tl.store(factors + position, total * tl.load(constants), mask=position < n_positions)
    summed = tl.load(raw + position, mask=position < n_positions, other=0.0)
    if tl.max(tl.where(tl.abs(summed) < float("inf"), 0, 1), 0) > 0:
        tl.store(seen, 1)


def add_products(
    weights: tl.tensor,
    grads: tl.tensor,
    facts: tl.tensor,
    tiles: tl.tensor,
    flat: tl.tensor,
    like: tl.tensor,
    tile_height: tl.constexpr,
    tile_width: tl.constexpr,
) -> None:
    """Add to each gradient its weight, if that is finite, times the factors of its row and its column."""
    tile = tl.program_id(0)
    sheet = tl.load(tiles + 3 * tile)
    down, across = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    height, width = tl.load(facts + 8 * sheet), tl.load(facts + 8 * sheet + 1)
    repeat, period = tl.load(facts + 8 * sheet + 2), tl.load(facts + 8 * sheet + 3)
    row, column = tl.load(facts + 8 * sheet + 6), tl.load(facts + 8 * sheet + 7)
    precision = flat.dtype.element_ty
    address = tl.load(grads + sheet)
    weight = tl.load(weights + sheet).to(tl.pointer_type(like.dtype.element_ty))
    grad = address.to(tl.pointer_type(like.dtype.element_ty))
    r = down * tile_height + tl.arange(0, tile_height)
    c = across * tile_width + tl.arange(0, tile_width)
    of_row = tl.load(flat + row + r, mask=r < tl.where(row >= 0, height, 0), other=0.0)
    of_column = tl.load(
        flat + column + c // repeat % period, mask=c < tl.where(column >= 0, width, 0), other=0.0
    )
    inside = (r < tl.where(address != 0, height, 0))[:, None] & (c < width)[None, :]
    at = r[:, None] * width + c[None, :]
    value = tl.load(weight + at, mask=inside, other=0.0).to(precision)
    value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
    before = tl.load(grad + at, mask=inside, other=0.0).to(precision)
    after = before + value * (of_row[:, None] + of_column[None, :])
    tl.store(grad + at, after.to(like.dtype.element_ty), mask=inside)


def find_non_finite(
    where: tl.tensor,
    sizes: tl.tensor,
    numbers: tl.tensor,
    tiles: tl.tensor,
    flags: tl.tensor,
    of_all: tl.tensor,
    like: tl.tensor,
    at_once: tl.constexpr,
) -> None:
    """Flag each tensor that holds a NaN or an infinity, under its number, and that there is one."""
    tile = tl.program_id(0)
    tensor = tl.load(tiles + 2 * tile)
    values = tl.load(where + tensor).to(tl.pointer_type(like.dtype.element_ty))
    i = tl.load(tiles + 2 * tile + 1).to(tl.int64) * at_once + tl.arange(0, at_once)
    value = tl.load(values + i, mask=i < tl.load(sizes + tensor), other=0.0)
    broken = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), 0)
    if broken > 0:
        tl.store(flags + tl.load(numbers + tensor), 1)
        tl.store(flags + of_all, 1)
