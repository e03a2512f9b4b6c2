"""A web page that shows the engine at work: a chat and the engine's live figures."""
