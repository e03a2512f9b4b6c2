"""Stopping criteria and streamers, which run beside the engine."""
