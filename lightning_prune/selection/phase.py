"""One phase of a selection: rank each pool, wish a count per block, solve, keep the best of each block."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil

import numpy as np
import numpy.typing as npt

from lightning_prune.selection.counts import Component, Wish, candidates, components, partition, solve
from lightning_prune.selection.demand import Case, exact, removals
from lightning_prune.tracing.labels import unique

__all__ = ["DEAD", "KEPT", "OPEN", "Phase", "Progress", "StuckError"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

OPEN, DEAD, KEPT = -1, 0, 1


class StuckError(Exception):
    """Heads went that their grids cannot do without; ``hold`` [n_units] marks those that must stay."""

    def __init__(self, hold: Bools) -> None:
        super().__init__("heads must stay")
        self.hold = hold


class Progress:
    """What has been decided so far.

    Args:
        case: The input.
        locked: [n_units] units that must stay, heads held by an earlier attempt included.
    """

    def __init__(self, case: Case, locked: Bools) -> None:
        self.case, self.locked = case, locked
        self.state = np.where(case.group < 0, KEPT, OPEN)
        self.asked = np.array([g.n_units for g in case.groups], np.int64)
        self.notes: dict[str, list[str]] = {}

    def note(self, heading: str, detail: str) -> None:
        """Remember one fact under a heading that others may share."""
        self.notes.setdefault(heading, []).append(detail)

    def lives(self) -> Bools:
        """[n_rows] rows whose owner has not gone."""
        return np.asarray((self.case.owner < 0) | (self.state[self.case.owner] != DEAD))

    def bury(self) -> None:
        """Let the cells of dead heads go with them, unless they also belong to a live one."""
        case, owned = self.case, self.case.owner[self.case.row] >= 0
        alive = self.lives()[case.row]
        gone, saved = np.zeros((2, len(self.state)), bool)
        gone[case.unit[owned & ~alive]] = True
        saved[case.unit[owned & alive]] = True
        self.state[gone & ~saved & (self.state == OPEN)] = DEAD


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The units of one phase and their blocks.

    Args:
        unit: [n] global ids, ascending.
        block: [n] block of each.
        group: [n_blocks] group.
        size: [n_blocks] units.
        floor: [n_blocks] units that must stay.
        parts: Components, the longest first.
        listed: Per component, what ``candidates`` gave.
    """

    unit: Ints
    block: Ints
    group: Ints
    size: Ints
    floor: Ints
    parts: list[Component]
    listed: list[Ints | None]


class Phase:
    """The decision on the groups of one phase.

    Groups of later phases that share a grid with them are solved along, so that the counts fit together,
    but stay open.

    Args:
        run: What has been decided before; ``decide`` adds to it.
        now: [n_groups] groups that are due.
    """

    def __init__(self, run: Progress, now: Bools) -> None:
        self.run, self.case, self.now = run, run.case, now
        self.blocks = b = _blocks(run, _linked(run.case, now))
        n_groups, n_pools = len(now), len(self.case.demand.pools)
        self.live = self._by_group(b.size)
        self.lost = np.zeros(n_groups, np.int64)  # units of blocks that have their count
        self.spent = np.zeros(n_pools, np.int64)  # the same by pool
        self.open = np.ones(len(b.size), bool)  # blocks that have no count yet
        self.quota, self.todo = np.zeros(n_groups, np.int64), np.zeros(n_pools, np.int64)
        self.going = np.zeros(len(b.size), np.int64)  # the present wish
        self.part = np.full(len(b.size), -1, np.int64)  # component of each block, -1 for one without a row
        for number, part in enumerate(b.parts):
            self.part[part.blocks] = number
        self.loose = self.part < 0
        self.counts = b.size.copy()
        self.cause: dict[int, str] = {}
        self.short = np.zeros(n_pools, bool)  # pools that caps and locks keep from their ratio
        self.order = self._order()
        self.rounding = (self.case.pool[b.group] >= 0) & (b.floor < b.size) & (self.case.round_to > 1)
        self.rounding &= np.array([g.kind != "head" for g in self.case.groups], bool)[b.group]

    def decide(self) -> None:
        """Fix the state of every unit of the groups that are due.

        Raises:
            StuckError: If heads that went before must stay.
        """
        b = self.blocks
        for p in range(len(self.todo)):
            self._limit(p)
            self._wish(p)
        self._ask()
        for part, listed in zip(b.parts, b.listed, strict=True):
            self._solve(part, listed)
        for block in np.flatnonzero(self.open).tolist():
            if self.rounding[block]:
                part = _alone(block, int(b.size[block]), int(b.floor[block]))
                self._solve(part, candidates(part))
            else:
                self.counts[block] = b.size[block] - self.going[block]
        self._explain()
        self._keep_best()

    def _by_group(self, of_block: Ints) -> Ints:
        total = np.zeros(len(self.now), np.int64)
        np.add.at(total, self.blocks.group, of_block)
        return total

    def _order(self) -> list[Ints]:
        """Per pool, its units from the first to go to the last, locked ones left out."""
        case, unit = self.case, self.blocks.unit
        free = np.flatnonzero(~self.run.locked[unit])
        pool = case.pool[case.group[unit[free]]]
        order = np.lexsort((-case.place[unit[free]], case.score[unit[free]], pool))
        ends = np.searchsorted(pool[order], np.arange(len(self.todo) + 1))
        return [free[order[a:b]] for a, b in pairwise(ends)]

    def _limit(self, p: int) -> None:
        """Set how many units the pool shall lose and how many each of its groups may."""
        demand, members = self.case.demand, [g for g in self.case.demand.pools[p].groups if self.live[g]]
        if demand.pools[p].ratio <= 0 or not members:
            return
        initial = [_initial(self.run, g, int(self.live[g])) for g in members]
        for g, n in zip(members, initial, strict=True):
            least = max(1, ceil(n - exact(demand.max_pruning_ratio) * n))
            self.quota[g] = max(0, self.live[g] - least)
        rows = self._rows(members[0]) if len(members) == 1 else 1
        live, ever = Fraction(int(self.live[members].sum()), rows), sum(initial, Fraction(0)) / rows
        each = ceil(removals(demand.pools[p].ratio, ever) - (ever - live))
        self.todo[p] = rows * max(0, min(each, ceil(live) - 1))

    def _rows(self, g: int) -> int:
        """Count the rows that the grids make of a group: its blocks, where they share one count."""
        blocks = np.flatnonzero(self.blocks.group == g)
        number = int(self.part[blocks[0]]) if len(blocks) else -1
        if number < 0 or (self.part[blocks] != number).any():
            return 1
        part, listed = self.blocks.parts[number], self.blocks.listed[number]
        mine = self.blocks.group[part.blocks] == g
        if listed is not None and part.degree().max() <= 1 and np.ptp(part.size[mine]) == 0:
            return len(blocks) if (np.ptp(listed[:, mine], axis=1) == 0).all() else 1
        return 1

    def _wish(self, p: int) -> None:
        """Let the weakest open units of the pool go, as far as the caps of their groups allow."""
        block = self.blocks.block
        line = self.order[p][self.open[block[self.order[p]]]]
        group = self.blocks.group[block[line]]
        by_group = np.argsort(group, kind="stable")
        rank = np.empty_like(line)
        rank[by_group] = np.arange(len(line)) - np.searchsorted(group[by_group], group[by_group])
        line = line[rank < (self.quota - self.lost)[group]][: max(0, self.todo[p] - self.spent[p])]
        mine = self.open & (self.case.pool[self.blocks.group] == p)
        self.going[mine] = np.bincount(block[line], minlength=len(mine))[mine]

    def _ask(self) -> None:
        """Record what the ratios ask of each group, before grids and rounding."""
        going = self._by_group(self.going)
        for p, pool in enumerate(self.case.demand.pools):
            members = [g for g in pool.groups if self.live[g]]
            able = int(going[members].sum())
            self.short[p] = able < self.todo[p]
            if self.short[p]:
                names = ", ".join(self.case.groups[g].name for g in members[:3])
                text = f"{names}: {able} instead of {self.todo[p]} units go"
                self.run.note("max_pruning_ratio and units that must stay win over the ratio", text)
            if len(members) == 1:
                going[members] = self.todo[p]
        self.run.asked[self.now] = (self.live - going)[self.now]

    def _solve(self, part: Component, listed: Ints | None) -> None:
        """Give the blocks of a component their counts."""
        group = self.blocks.group[part.blocks]
        rounded = np.zeros(len(part.grid), bool)
        rounded[part.row[self.rounding[part.blocks[part.block]]]] = True
        inside = np.zeros(len(self.now), np.int64)
        np.add.at(inside, group, part.size)
        least = inside - self.quota + self.lost
        wish = Wish(
            counts=part.size - self.going[part.blocks],
            pool=self.case.pool[group],
            group=group,
            least={int(g): int(least[g]) for g in np.unique(group) if least[g] > 0},
            slack=self._slack(group) if self.case.round_to == 1 else {},
            round_to=self.case.round_to,
            rounded=rounded,
        )
        counts = solve(part, wish, listed)
        if counts is None:
            _release(self.run, part)
            counts = part.size
        self._settle(part, counts, group)
        self.cause.update(dict.fromkeys(group.tolist(), self._reason(part, counts, rounded)))

    def _slack(self, group: Ints) -> dict[int, tuple[int, int]]:
        """Per pool, count the units without a row that can stay, and those that can go, for a component."""
        b, pool = self.blocks, self.case.pool
        going = self._by_group(np.where(self.loose, self.going, 0))
        room = self._by_group(np.where(self.loose, b.size - b.floor - self.going, 0))
        quota = self.quota - self.lost - self._by_group(np.where(self.open, self.going, 0))
        room = np.minimum(room, np.maximum(0, quota))
        return {
            int(p): (int(going[pool == p].sum()), int(room[pool == p].sum())) for p in np.unique(pool[group])
        }

    def _settle(self, part: Component, counts: Ints, group: Ints) -> None:
        """Book what went, and let the rest of the pools make up for what deviates from the wish."""
        gone, pool = part.size - counts, self.case.pool[group]
        np.add.at(self.lost, group, gone)
        np.add.at(self.spent, pool[pool >= 0], gone[pool >= 0])
        self.counts[part.blocks], self.open[part.blocks] = counts, False
        off = np.zeros(len(self.now), np.int64)
        np.add.at(off, group, gone - self.going[part.blocks])
        if self.case.round_to == 1:
            for p in np.unique(pool[(off[group] != 0) & (pool >= 0)]):
                self._wish(p)

    def _reason(self, part: Component, counts: Ints, rounded: Bools) -> str:
        rule = f"round_to={self.case.round_to}"
        if (part.positions(part.size)[rounded] < self.case.round_to).any():
            return f"smaller than {rule}, stays whole"
        if rounded.any() and (part.positions(counts)[rounded] % self.case.round_to == 0).all():
            return rule
        alone = part.grid[0] < 0
        return f"no multiple fits, {rule} gives way" if alone else self.case.grids[part.grid[0]].reason

    def _explain(self) -> None:
        """Note every group whose count is not the asked one."""
        reached = self._by_group(self.counts)
        for g in np.flatnonzero(self.now & (reached != self.run.asked) & (self.live > 0)).tolist():
            if g in self.cause or not self.short[self.case.pool[g]]:
                counts = f"keeps {reached[g]} of {self.live[g]}, asked {self.run.asked[g]}"
                cause = self.cause.get(g, "makes up for the rest of its pool")
                self.run.note(cause, f"{self.case.groups[g].name} {counts}")

    def _keep_best(self) -> None:
        """Keep the best units of each block, locked ones before all."""
        case, b, unit = self.case, self.blocks, self.blocks.unit
        order = np.lexsort((case.place[unit], -case.score[unit], ~self.run.locked[unit], b.block))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(b.size) - b.size, b.size)
        due = self.now[case.group[unit]]
        self.run.state[unit[due]] = np.where(rank < self.counts[b.block], KEPT, DEAD)[due]


def _alone(block: int, size: int, floor: int) -> Component:
    """Make a block without a row a component, so that it can be rounded."""
    one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
    numbers = (one * block, one * size, one * floor)
    return Component(
        *numbers, row=none, block=none, times=one, grid=-one, fixed=none, scale=one.astype(float), offset=none
    )


def _linked(case: Case, now: Bools) -> Bools:
    """Add the groups that share a grid with those that are due, however indirectly."""
    scope, grid, group = now.copy(), case.grid[case.row], case.group[case.unit]
    while True:
        wider = np.isin(grid, grid[scope[group]])
        if scope[group[wider]].all():
            return scope
        scope[group[wider]] = True


def _blocks(run: Progress, scope: Bools) -> _Blocks:
    """Part the open units of the groups in scope into blocks, and the blocks into components."""
    case = run.case
    is_open, lives = (run.state == OPEN) & scope[case.group], run.lives()
    unit = np.flatnonzero(is_open)
    use = is_open[case.unit] & lives[case.row]
    at = np.searchsorted(unit, case.unit[use])
    block = partition(case.group[unit], at, case.row[use], case.times[use])
    n_blocks, base = int(block.max(initial=-1)) + 1, max(len(case.grid), 1)
    codes, first = np.unique(block[at] * base + case.row[use], return_index=True)
    group = np.zeros(n_blocks, np.int64)
    group[block] = case.group[unit]
    size, floor = (np.bincount(each, minlength=n_blocks) for each in (block, block[run.locked[unit]]))
    kept = run.state[case.unit] == KEPT
    fixed = case.fixed + np.bincount(case.row[kept], case.times[kept], len(case.grid)).astype(np.int64)
    rows, row_at = np.flatnonzero(lives), np.cumsum(lives) - 1
    whole = Component(
        blocks=np.arange(n_blocks),
        size=size,
        floor=floor,
        row=row_at[codes % base],
        block=codes // base,
        times=case.times[use][first],
        grid=case.grid[rows],
        fixed=fixed[rows],
        scale=case.scale[rows],
        offset=case.offset[rows],
    )
    parts = sorted(components(whole), key=lambda part: -int(part.size.sum()))
    return _Blocks(unit, block, group, size, floor, parts, [candidates(part) for part in parts])


def _initial(run: Progress, g: int, live: int) -> Fraction:
    """Count a group's units before the first step, without those of heads that have gone since."""
    case, units = run.case, run.case.groups[g].units
    initial, (unit, owner) = Fraction(int(case.demand.initial[g])), case.owned
    mine = case.group[unit] == g
    pairs = unique(unit[mine] * len(case.group) + owner[mine])
    if len(pairs) != len(units) or len(unique(pairs // len(case.group))) != len(units):
        return initial * Fraction(live, len(units))
    owners = unique(pairs % len(case.group))
    heads = unique(case.group[owners])
    here, ever = sum(case.groups[h].n_units for h in heads), int(case.demand.initial[heads].sum())
    return initial * Fraction(int((run.state[owners] != DEAD).sum()), len(owners)) * Fraction(here, ever)


def _release(run: Progress, part: Component) -> None:
    """Answer a component that cannot even stay whole: the heads that went before must stay.

    Raises:
        StuckError: If there are such heads.
    """
    case = run.case
    near = np.unique(case.unit[np.isin(case.grid[case.row], part.grid)])
    owners = case.owner[case.row[np.isin(case.unit, near)]]
    suspects = np.concatenate([near, owners[owners >= 0]])
    groups = np.unique(case.group[suspects[run.state[suspects] == DEAD]])
    hold = np.isin(case.group, groups) & (run.state != OPEN)
    if (hold & ~run.locked).any():
        raise StuckError(hold)
