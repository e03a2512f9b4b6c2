"""Layers that keep a state per row (convolutions, gated delta rules, state-space scans), over packed tokens."""
