"""Compiles a view's layers."""
