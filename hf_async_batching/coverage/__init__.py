"""Find out which models are served exactly: a check for any model, and a table of every family."""
