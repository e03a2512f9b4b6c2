"""Which kernels of other packages a view calls."""
