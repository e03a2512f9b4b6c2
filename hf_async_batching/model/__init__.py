"""A view of the user's model that shares every weight, and how a step runs it."""
