"""Structured pruning that makes networks really smaller and faster while they train."""

__version__ = "0.1.0.dev0"
