"""Pictures of a report. matplotlib is imported when one is drawn, never with the package."""
