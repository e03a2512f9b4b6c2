"""A view of the user's model that shares every weight, and the forwards that run it."""
