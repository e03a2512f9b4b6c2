"""Matrix products of decode steps: few rows, large weights."""
