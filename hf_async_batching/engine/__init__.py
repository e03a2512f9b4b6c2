"""The engine, the thread that owns it, and how both are built for a model."""
