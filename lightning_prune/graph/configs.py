"""Configs that a model was built from: which of their integers follow a cut, proved by building it again.

What the model is made of says which expression of the config every size came from (``origins``). After a cut
the integers are solved from the new sizes; each gets the value that most of its sizes agree on. Then the
model is built from the new config: whatever differs from the pruned one is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.graph.origins import Origins, built, integers_of, origins_of, with_integers
from lightning_prune.plan import Cut, Rewrite
from lightning_prune.surgery.attributes import config_objects, get_path
from lightning_prune.tracing.integers import Expr, evaluate, invert, mentions

Relation = tuple[Expr, int]
Values = Mapping[tuple[str, str], int]
LOAD = "load the model by lightning_prune.from_pretrained or load_pruned_state, not from the config alone"


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Outermost modules that keep the config they were built from."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if not isinstance(config, (nn.Module, type, Mapping)):
            yield name, module, config


def config_rewrites(
    model: nn.Module,
    cuts: tuple[Cut, ...],
    rewrites: tuple[Rewrite, ...],
    used: frozenset[tuple[str, str]],
    patched: frozenset[str] = frozenset(),
) -> tuple[tuple[Rewrite, ...], tuple[str, ...]]:
    """Rewrites that keep configs, and attributes that were copied from them, true.

    Args:
        model: The model before the cut.
        cuts: What is cut.
        rewrites: New values of the modules' own attributes, as far as sizes decide them.
        used: (module, path) of attributes that the forward uses; these are decided by ``rewrites`` alone.
        patched: Modules that compute in another way from now on.

    Returns:
        The rewrites, and a note for each config that cannot tell everything.
    """
    found: dict[tuple[str, str], Rewrite] = {}
    notes: list[str] = []
    after = {(r.module, r.path): int(r.after) for r in rewrites if isinstance(r.after, int)}
    told: set[int] = set()
    for name, module, config in owners(model):
        prefix = f"{name}." if name else ""
        here = tuple(c for c in cuts if c.tensor.startswith(prefix))
        if not here or id(config) in told:
            continue
        solved = _Solved.of(module, config, prefix, here, after, used)
        if solved is None:
            notes.append(f"{prefix}config is left as it was: it allows no model of the kept sizes; {LOAD}")
            continue
        told |= {id(one) for _, one in config_objects(config)}
        if solved.differences:
            said = next(iter(solved.differences.values()))
            notes.append(f"{prefix}config cannot tell all sizes that are kept, it says {said}: {LOAD}")
        elif solved.computes_otherwise or any(m == name or m.startswith(prefix) for m in patched):
            notes.append(
                f"{prefix}config gives the sizes that are kept, but not the scales or frequencies: {LOAD}"
            )
        for r in solved.rewrites(name, config):
            if (r.module, r.path) not in used and (r.module, r.path) not in after:
                found[r.module, r.path] = r
    return tuple(found.values()), tuple(notes)


def config_doubts(model: nn.Module, patched: frozenset[str]) -> tuple[str, ...]:
    """Notes for configs from which modules would be built that compute with other numbers than are kept."""
    prefixes = [f"{name}." if name else "" for name, _, _ in owners(model)]
    return tuple(
        f"{prefix}config does not tell the numbers that are kept: {LOAD}"
        for prefix in prefixes
        if any(f"{m}.".startswith(prefix) for m in patched)
    )


@dataclass(frozen=True)
class _Solved:
    """New integers of a config, attributes that were copied from them, and what they do not tell.

    Args:
        changed: New values by path.
        copies: Rewrites of attributes.
        differences: Tensors that the new config would give another shape: name -> what it says and keeps.
        computes_otherwise: True where it gives the sizes, but would make other numbers than are kept, or read
            the same shapes in another way.
    """

    changed: dict[str, int]
    copies: tuple[Rewrite, ...]
    differences: Mapping[str, str]
    computes_otherwise: bool

    @staticmethod
    def of(
        module: nn.Module,
        config: Any,
        prefix: str,
        cuts: tuple[Cut, ...],
        after: Values,
        used: frozenset[tuple[str, str]],
    ) -> _Solved | None:
        """Solve; None if no model can be built from the config, the old or the new one."""
        before = integers_of(config)
        origins = origins_of(module, config, list(before))
        if origins is None:
            return None
        name = prefix.rstrip(".")
        fixed = [
            (("attr", i), after[name, f"config.{path}"])
            for i, path in enumerate(before)
            if (name, f"config.{path}") in after
        ]
        shapes = _shapes_after(module, prefix, cuts)
        equations = fixed + list(_equations(origins, shapes, prefix, after, used))
        # What is only computed with other integers is believed where everything comes out right, else not.
        for trusted in (equations, [e for e in equations if e[0][0] == "attr"]):
            values = dict(enumerate(before.values()))
            _solve(fixed, values)
            _solve(trusted, values, {expr[1] for expr, _ in fixed}, origins.blurred)
            changed = {path: values[i] for i, path in enumerate(before) if values[i] != before[path]}
            rebuilt = built(module, _valid(with_integers(config, changed)))
            differences = {} if rebuilt is None else _differences(_shapes(rebuilt), shapes)
            if rebuilt is not None and not differences:
                break
        if rebuilt is None:
            return None
        copies = tuple(
            Rewrite((prefix + where).rstrip("."), path, now, new)
            for (where, path), (expr, now) in origins.attributes.items()
            if (new := evaluate(expr, _no_axis, values)) != now
            if not any(tensor.startswith(f"{where}." if where else "") for tensor in differences)
        )
        stored = set(module.state_dict(keep_vars=True))
        otherwise = (
            any(c.tensor.removeprefix(prefix) not in stored for c in cuts)
            or _other_scales(module, rebuilt)
            or _other_sizes(module, rebuilt, prefix, after, used)
        )
        return _Solved(changed, copies, differences, otherwise)

    def rewrites(self, name: str, config: Any) -> Iterator[Rewrite]:
        """All of it, as rewrites."""
        before = integers_of(config)
        yield from (Rewrite(name, f"config.{p}", before[p], v) for p, v in self.changed.items())
        yield from self.copies


def _equations(
    origins: Origins,
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    after: Values,
    used: frozenset[tuple[str, str]],
) -> Iterator[Relation]:
    """What the lengths of tensors, and the attributes that the forward uses, say of the config's integers."""
    for (tensor, dim), expr in origins.sizes.items():
        if tensor in shapes:
            yield expr, shapes[tensor][dim]
    for (where, path), (expr, now) in origins.attributes.items():
        place = ((prefix + where).rstrip("."), path)
        if place in used:
            yield expr, after.get(place, now)


def _solve(
    equations: list[Relation],
    values: dict[int, int],
    known: set[int] | None = None,
    blurred: frozenset[int] = frozenset(),
) -> None:
    """Give every integer the value that most equations agree on, if most do; plain lengths are asked first.

    A blurred integer is solved by plain lengths alone: of its other equations a part may be hidden.
    """
    known = set() if known is None else known
    plain = [e for e in equations if e[0][0] == "attr"]
    while True:
        votes = _votes(plain, values, known) or _votes(equations, values, known | blurred)
        if not votes:
            return
        for one, counted in votes.items():
            value, agreeing = counted.most_common(1)[0]
            if 2 * agreeing > counted.total():
                values[one] = value
        known |= set(votes)


def _votes(equations: list[Relation], values: dict[int, int], known: set[int]) -> dict[int, Counter[int]]:
    """Per integer that some equation holds alone, how often each value would solve it."""
    votes: dict[int, Counter[int]] = {}
    for expr, target in equations:
        free = mentions(expr, "attr") - known
        if len(free) == 1:
            (one,) = free
            holds = evaluate(expr, _no_axis, values) == target
            value = values[one] if holds else invert(expr, target, _no_axis, values, one)
            if value is not None:
                votes.setdefault(one, Counter())[value] += 1
    return votes


def _other_scales(module: nn.Module, rebuilt: nn.Module) -> bool:
    """True if a number that followed a size, such as a scale, would be made anew."""
    mine = dict(module.named_modules())
    for name, other in rebuilt.named_modules():
        kept = vars(mine[name]) if name in mine else {}
        if any(isinstance(v, float) and kept.get(k) != v for k, v in vars(other).items()):
            return True
    return False


def _other_sizes(
    module: nn.Module, rebuilt: nn.Module, prefix: str, after: Values, used: frozenset[tuple[str, str]]
) -> bool:
    """True if the forward would use another size: the same shapes may be read as more, narrower heads."""
    mine, other = dict(module.named_modules()), dict(rebuilt.named_modules())
    for place, path in used:
        name = place.removeprefix(prefix) if place != prefix.rstrip(".") else ""
        if path.startswith("config.") or name not in mine or name not in other:
            continue
        with suppress(PlanError):
            now = after.get((place, path), get_path(mine[name], path))
            if get_path(other[name], path) != now:
                return True
    return False


def _valid(config: Any) -> Any:
    """A config that can check itself has to pass, or it could not be saved; None if it does not."""
    check = getattr(config, "validate", None)
    if callable(check):
        try:
            check()
        except Exception:  # of any kind: it is the config's own opinion
            return None
    return config


def _no_axis(axis: int) -> int:
    raise AssertionError(axis)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(int(n) for n in p.shape) for name, p in module.named_parameters()}


def _shapes_after(module: nn.Module, prefix: str, cuts: tuple[Cut, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {name: list(shape) for name, shape in _shapes(module).items()}
    for cut in cuts:
        name = cut.tensor.removeprefix(prefix)
        if name in shapes:
            shapes[name][cut.dim] = cut.kept
    return {name: tuple(shape) for name, shape in shapes.items()}


def _differences(told: Mapping[str, tuple[int, ...]], kept: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    return {
        name: f"{list(told[name]) if name in told else 'nothing'} for {name}, "
        f"{list(kept[name]) if name in kept else 'nothing'} is kept"
        for name in {**kept, **told}
        if told.get(name) != kept.get(name)
    }
