"""Rows on their way into a run and out of it."""
