"""Measurements: workloads, our engine and its peers on them, accuracy, tables and pictures."""
