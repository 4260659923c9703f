"""The regulariser of DepGraph (CVPR 2023, section 3.3): gradients that press weak units towards zero.

For unit k of a group, ``I_k`` is the sum of squares of all that it owns, and

    gamma_k = 2 ** (alpha * (I_max - I_k) / (I_max - I_min))    from 1 (strongest) to 2 ** alpha (weakest)
    penalty = reg / 2 * sum_k gamma_k * I_k                     gamma held constant
    grad   += reg * gamma_k * w                                 for every element w of unit k

which is what Torch-Pruning 1.6.1 computes, constants included. An element of two groups gets both. Weight
decay in the optimizer shrinks the same weights again; switch it off while this runs, or count it in.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import CheckpointMismatchError, OptionError, PruneError, StaleGraphError
from lightning_prune.graph.groups import Group
from lightning_prune.scores.backends import Backend, backend_for
from lightning_prune.scores.gammas import Gammas
from lightning_prune.scores.inspecting import Inspector
from lightning_prune.scores.launching import KernelGammas, KernelWalk
from lightning_prune.scores.layout import plan_blocks
from lightning_prune.scores.members import (
    answers_at_once,
    check_nan_policy,
    check_number,
    facts_of,
    listed,
    non_finite,
    real,
    scored_members,
)
from lightning_prune.scores.positions import Positions
from lightning_prune.scores.walks import Walk

__all__ = ["Regularizer"]

MAX_ALPHA = 64.0
_DTYPE = attrgetter("dtype")


class Regularizer:
    """Adds the gradient of the group penalty, at about the memory traffic of one optimizer step.

    All indices are made here, once, and live on the parameters' device; a step neither copies them nor waits
    for an accelerator. Build a new one after a cut.

    Args:
        groups: The groups to press; leave out those that are ignored or have ratio 0.
        tensors: All named parameters. Frozen ones, and those whose ``grad`` is None or sparse, count in
            ``I_k`` but are never written to.
        reg: Strength, >= 0.
        alpha: Shape, in [0, 64]; the weakest unit is pressed ``2 ** alpha`` times as hard as the strongest.
        include_bias: Whether biases count, in ``I_k`` and in the gradient.
        nan_policy: What a non-finite weight does. ``skip``: its groups rest for that step; ``skipped``
            counts. ``zero``: the element counts as 0 and gets no gradient. ``raise``: PruneError. On a CPU
            at once, before anything is written; an accelerator is not waited for, there the groups rest
            until ``check`` warns or raises. Nothing non-finite is written under any policy.
        update_every: Scores and gammas are computed anew every so many calls of ``apply``.
        fused: Whether kernels that Triton compiles (on a GPU) or loops that Numba compiles (on a CPU) do in
            one pass what PyTorch does in several; the last digits differ. None: where they are installed
            and compile.

    Raises:
        OptionError: If an option is out of range.

    Example:
        >>> import numpy as np
        >>> from lightning_prune.graph.groups import Group, Member
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0], [2.0]]))
        >>> weight.grad = torch.zeros_like(weight)
        >>> rows = Member("weight", 0, 1, 2, np.arange(2), np.arange(2))
        >>> group = Group("weight:0", "channel", np.arange(2), (rows,), "")
        >>> Regularizer([group], {"weight": weight}, reg=0.1, alpha=1.0).apply()
        >>> weight.grad.flatten()
        tensor([0.2000, 0.2000])
    """

    def __init__(
        self,
        groups: Sequence[Group],
        tensors: Mapping[str, Tensor],
        *,
        reg: float = 1e-4,
        alpha: float = 4.0,
        include_bias: bool = False,
        nan_policy: str = "skip",
        update_every: int = 1,
        fused: bool | None = None,
    ) -> None:
        self._reg = check_number("reg", reg, math.inf)
        self._alpha = check_number("alpha", alpha, MAX_ALPHA)
        self.nan_policy = check_nan_policy(nan_policy)
        if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
            raise OptionError(f"update_every must be a whole number of at least 1, got {update_every!r}")
        self.update_every = update_every
        self._fused = fused if fused is None else bool(fused)
        self._groups = [g for g in groups if g.n_units]
        self._parameters = dict(tensors)
        self._members = [scored_members(g, tensors, include_bias=include_bias) for g in self._groups]
        self._warned = False
        self._inspector = Inspector(fused=self._fused)
        # Calls of apply since the last refresh; None before the first one.
        self._age: int | None = None
        self._build()
        self._skips = torch.zeros(len(self._groups), dtype=torch.int64, device=self._device)
        self._skipped_before = 0

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """All named parameters, those included that belong to no group."""
        return self._parameters

    @property
    def reg(self) -> float:
        """Strength."""
        return self._reg

    @property
    def alpha(self) -> float:
        """Shape."""
        return self._alpha

    @property
    def skipped(self) -> Tensor:
        """How often a group rested in a call of ``apply``, all told; a scalar on the device."""
        return self._skips.sum() + self._skipped_before

    @property
    def low_precision(self) -> tuple[str, ...]:
        """Names of the parameters whose gradients keep under 24 bits.

        There an addition far below the gradient's own size rounds to nothing, and so may the penalty. Mixed
        precision with float32 weights (``bf16-mixed``, ``16-mixed``) has none of these.
        """
        narrow = {kind for kind in set(map(_DTYPE, self._tensors)) if torch.finfo(kind).eps > 2**-23}
        names = (b.tensor for b, t in zip(self._blocks, self._tensors, strict=True) if t.dtype in narrow)
        return tuple(dict.fromkeys(names)) if narrow else ()

    @property
    def coefficients(self) -> list[Tensor]:
        """Per group, the gammas of the last refresh, [n_units]; 0 where the group rests."""
        if self._age is None:
            self.refresh()
        return self._gammas.per_group()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute scores and gammas from the weights as they are now.

        Raises:
            StaleGraphError: If a parameter has another shape than when this was built.
            PruneError: If ``nan_policy`` is ``raise``, a weight is not finite, and the device is a CPU.
        """
        self._follow()
        self._age = 0
        if self._blocks:
            raw = self._walk.sums(clean=False)
            self._gammas.refresh(self._cleaned(raw), raw)
            self._notice()

    @torch.no_grad()
    def apply(self, grad_scale: float | Tensor = 1.0) -> None:
        """Add the penalty's gradient to every ``grad``, in place.

        Args:
            grad_scale: The loss scale that the gradients carry (AMP); a tensor stays on its device.

        Raises:
            OptionError: If ``grad_scale`` is a number that is not finite.
            StaleGraphError: If a parameter has another shape than when this was built.
            PruneError: If ``nan_policy`` is ``raise``, a weight is not finite, and the device is a CPU.
        """
        if not isinstance(grad_scale, Tensor) and not math.isfinite(float(grad_scale)):
            raise OptionError(f"grad_scale must be a finite number, got {grad_scale!r}")
        if self._age is None or self._age >= self.update_every:
            self.refresh()
        else:
            self._follow()
            self._watch()
        self._age = (self._age or 0) + 1
        if self._blocks and self.reg:
            self._skips += self._gammas.resting
            self._write(grad_scale)

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Give ``reg / 2 * sum gamma * I`` of the last refresh, a scalar; groups that rest add nothing."""
        if self._age is None:
            self.refresh()
        return self.reg / 2 * (self._gammas.gamma * self._gammas.scores).sum()

    def check(self) -> None:
        """Look at what was found not finite since the last look. Waits for the device: call it when logging.

        Raises:
            PruneError: If ``nan_policy`` is ``raise`` and something was found.

        Warns:
            UserWarning: Once, with the tensors' names, under the other policies.
        """
        if not self._blocks or (self._warned and self.nan_policy != "raise"):
            return
        if not bool(self._gammas.seen):
            return
        self._gammas.seen.zero_()
        names = non_finite((block.tensor for block in self._blocks), self._parameters)
        rested = [g.name for g, r in zip(self._groups, self._gammas.rested.tolist(), strict=True) if r]
        where = f"NaN or infinity in {listed(names)}"
        if not names:
            where = f"sums of squares of {listed(rested)} that were not finite, though the weights are now"
        if self.nan_policy == "raise":
            raise PruneError(
                f"the regulariser found {where} (nan_policy='raise'); no gradient was touched there"
            )
        fate = (
            "such values count as 0" if self.nan_policy == "zero" else "the groups concerned rest meanwhile"
        )
        warnings.warn(f"the regulariser found {where}; {fate} (nan_policy={self.nan_policy!r})", stacklevel=2)
        self._warned = True

    def _build(self) -> None:
        """Make every index, for the layout, type and device that the parameters have now."""
        seen = {name: real(t.detach()) for name, t in self._parameters.items()}
        members = [m for group in self._members for m in group]
        self._blocks = plan_blocks(seen, ((m.tensor, m.dim, m.rows) for m in members))
        self._tensors = [self._parameters[b.tensor] for b in self._blocks]
        first = seen[self._blocks[0].tensor] if self._blocks else torch.empty(0)
        wide = any(seen[b.tensor].dtype == torch.float64 for b in self._blocks)
        devices = dict.fromkeys(t.device for t in self._tensors)
        if len(devices) > 1:
            raise PruneError(
                f"the weights of the groups lie on {', '.join(map(str, devices))}; the penalty needs them on "
                "one device, so leave the layers of the others out by ignored_layers"
            )
        self._device, self._dtype = first.device, torch.float64 if wide else torch.float32
        # A CPU answers at once; asking an accelerator would stall it.
        self._immediate = answers_at_once(self._device)
        self._age = None
        positions = Positions.of(self._blocks, self._groups, self._members, self._device)
        self._backend = backend_for(self._device, fused=self._fused) if self._blocks else None
        self._gammas, self._walk = self._tools(positions, self._backend)
        self._signature = facts_of(self._tensors), self._is_alive()

    def _tools(self, positions: Positions, backend: Backend | None) -> tuple[Gammas, Walk | KernelWalk]:
        """Make what computes gammas and what walks the weights."""
        how: dict[str, Any] = {"reg": self.reg, "alpha": self.alpha, "dtype": self._dtype}
        if backend is None:
            walk = Walk(self._blocks, self._parameters, self._dtype)
            return Gammas(positions, self._groups, **how), walk
        gammas = KernelGammas(positions, self._groups, backend=backend, **how)
        return gammas, KernelWalk(self._blocks, self._parameters, self._dtype, backend)

    def _is_alive(self) -> bool:
        """Whether what walks the weights runs in this process, which may be a fork of the one it began in."""
        return self._backend is None or self._backend.alive()

    def _follow(self) -> None:
        """Rebuild after a change of device, type or memory format, or in a fork.

        Raises:
            StaleGraphError: If a shape changed: the groups then describe another model.
        """
        now = facts_of(self._tensors), self._is_alive()
        if now == self._signature:
            return
        for block, shape, before in zip(self._blocks, now[0][0], self._signature[0][0], strict=True):
            if shape != before:
                raise StaleGraphError(
                    f"the regulariser was built for {block.tensor!r} of shape {list(before)}, it has "
                    f"{list(shape)} now; call update_regularizer() after a cut"
                )
        age, before = self._age, self._gammas
        self._build()
        self._skips = self._skips.to(self._device)
        if age is not None:  # numbers per unit do not hang on where the weights lie
            self._age = age
            self._gammas.restore(before.gamma, before.scores)
            self._gammas.rest(before.resting.to(self._device))

    def _cleaned(self, raw: Tensor) -> Tensor:
        """Give the sums again without what is not finite, where the policy says so and there may be such."""
        if self.nan_policy != "zero" or (self._immediate and bool(raw.isfinite().all())):
            return raw
        return self._walk.sums(clean=True)

    def _is_dirty(self) -> bool:
        """Whether something may not be finite; an accelerator is not asked, the answer there is yes."""
        return not self._immediate or bool(self._gammas.dirty)

    def _watch(self) -> None:
        """Look for weights that stopped being finite since the gammas were computed."""
        if not self._blocks:
            return
        if (
            self._backend is not None and not self._immediate
        ):  # sums take no more than any other look at all weights
            raw = self._walk.sums(clean=False)
            self._gammas.refresh(self._cleaned(raw), raw, keep=True)
            return
        sick = self._inspector.look([t.detach() for t in self._tensors])[0].bool()
        self._gammas.dirty = sick.any()
        if self.nan_policy == "zero":
            self._gammas.note()
            self._notice()
        elif not self._immediate:
            self._gammas.rest(self._gammas.positions.any_tensor(sick))
            self._gammas.note()
        elif bool(self._gammas.dirty | self._gammas.resting.any()):
            self.refresh()

    def _notice(self) -> None:
        """Ask a CPU at once what was found; an accelerator remembers it."""
        if self._immediate:
            self.check()

    def _write(self, grad_scale: float | Tensor) -> None:
        flat, clean = self._gammas.factors, self._is_dirty()
        if isinstance(grad_scale, Tensor) or grad_scale != 1:
            flat = flat * grad_scale
        self._walk.add(flat, clean=clean)

    @staticmethod
    def first_state(groups: Sequence[Group]) -> dict[str, Any]:
        """Give the state of a regulariser that these groups were just made into."""
        units = sum(group.n_units for group in groups)
        return {"age": None, "skipped": 0, "gamma": [1.0] * units, "scores": [0.0] * units}

    def state_dict(self) -> dict[str, Any]:
        """Give what the coming steps depend on besides the weights, as numbers and lists."""
        held = {"gamma": self._gammas.gamma.tolist(), "scores": self._gammas.scores.tolist()}
        return {"age": self._age, "skipped": int(self.skipped), **held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the gammas of another regulariser of the same groups, until they are due.

        Raises:
            CheckpointMismatchError: If the state is of other groups.
        """
        if not len(state["gamma"]) == len(state["scores"]) == len(self._gammas.gamma):
            raise CheckpointMismatchError(
                f"a state of {len(state['gamma'])} units, these groups have {len(self._gammas.gamma)}"
            )
        self._age, self._skipped_before = state["age"], state["skipped"]
        self._skips.zero_()
        self._gammas.restore(*(self._gammas.gamma.new_tensor(state[name]) for name in ("gamma", "scores")))
