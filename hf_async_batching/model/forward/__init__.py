"""Run a view over a step's tokens, by the route that serves its family."""
