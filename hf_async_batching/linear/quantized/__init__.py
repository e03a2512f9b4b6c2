"""Products with quantized weights, which are read where they lie."""
