"""Make a view: a copy of the module tree that shares the user's weights."""
