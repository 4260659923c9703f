"""The only stage that changes a model: check everything, then cut."""
