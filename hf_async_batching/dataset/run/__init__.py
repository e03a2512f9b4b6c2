"""The threads of a run, and the order of its rows."""
