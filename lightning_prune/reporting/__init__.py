"""Before and after, for people: words, tables and pictures."""
