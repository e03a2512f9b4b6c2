"""The command line `hf-async-batching`, one file for each command."""
