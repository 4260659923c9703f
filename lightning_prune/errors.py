"""The exception tree.

PruneError
├── OptionError (ValueError)       an option has a wrong type, value or name
│   ├── EmptyGroupError            a name or tuple that holds no prunable unit
│   └── BudgetError                a budget that cannot be met
├── TraceError                     the model could not be run or followed
│   └── UnsupportedOpError         an operation without a rule, where one is needed
├── StaleGraphError                the model changed behind the pruner's back
├── PlanError (ValueError)         a plan that does not fit the model, nothing was cut
├── CertificateError               the pruned model is not a restriction of the original, rolled back
├── CheckpointMismatchError (RuntimeError)  a checkpoint that does not fit the model, nothing was loaded
└── StrategyError                  a Lightning strategy or set-up that cannot be pruned

Every message says what was asked, what was found and what to do.
"""

__all__ = [
    "BudgetError",
    "CertificateError",
    "CheckpointMismatchError",
    "EmptyGroupError",
    "OptionError",
    "PlanError",
    "PruneError",
    "StaleGraphError",
    "StrategyError",
    "TraceError",
    "UnsupportedOpError",
]


class PruneError(Exception):
    """Base of every error that this package raises on purpose."""


class OptionError(PruneError, ValueError):
    """An option has a wrong type, a wrong value, or names something that is not there."""


class EmptyGroupError(OptionError):
    """A name or a tuple of names holds no prunable unit."""


class BudgetError(OptionError):
    """A budget that the structure of the model cannot meet."""


class TraceError(PruneError):
    """The model could not be run on the example inputs, or could not be followed."""


class UnsupportedOpError(TraceError):
    """An operation has no rule where the request needs one."""


class StaleGraphError(PruneError):
    """The model's shapes are no longer those the graph was traced with."""


class PlanError(PruneError, ValueError):
    """A plan does not fit the model. Nothing was cut."""


class CertificateError(PruneError):
    """The pruned model is not a restriction of the original. The cut was rolled back."""


class CheckpointMismatchError(PruneError, RuntimeError):
    """A checkpoint does not fit the model. Nothing was loaded."""


class StrategyError(PruneError):
    """A Lightning strategy or set-up under which the model cannot be pruned."""
