"""What a trace means: units, groups, grids, and the plan of what is kept."""
