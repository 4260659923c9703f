"""The command line: one file per command. Importing it teaches OmegaConf what the shipped files ask of it."""

from lightning_prune.commands.resolvers import share

__all__ = ["share"]
