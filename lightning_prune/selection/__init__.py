"""Scores, ratios and grids -> the units that stay: counts first, then units."""
