"""What a share may be asked of: one function per budget, in a table."""
