"""The command line `hf-async-batching`; each command has its own file."""
