"""Matrix products of a decode step: few rows, large weights."""
