"""The folder of a run: what is finished, whole and on disk."""
