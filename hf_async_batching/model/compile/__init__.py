"""Compile a view's layers."""
