"""The model, looked at once: labels, integers, ties and grids."""
