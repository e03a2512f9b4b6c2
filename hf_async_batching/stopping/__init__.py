"""Run stopping criteria and streamers outside the engine."""
