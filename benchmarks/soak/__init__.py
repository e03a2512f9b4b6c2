"""Runs a random load of all kinds of requests for minutes; checks every result, and that nothing is left behind."""
