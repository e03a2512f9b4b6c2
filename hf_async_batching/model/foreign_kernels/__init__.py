"""Choose which kernels of other packages a view calls."""
