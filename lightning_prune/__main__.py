"""``lightning-prune``, also as ``python -m lightning_prune``. Loads nothing before Ctrl-C has an answer."""

from lightning_prune.leaving import leaving_at_once

__all__ = ["main"]


def main() -> None:
    """Run ``lightning-prune`` with the words of the command line; ends the process with an exit code."""
    with leaving_at_once():
        from lightning_prune.commands import entry
    entry.main()


if __name__ == "__main__":
    main()
