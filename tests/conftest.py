"""Settings that must be made before anything else is imported."""

import os

import torch

# Triton decides when it is imported whether its kernels run on the GPU or in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Nothing in the tests needs the Hub; without this each look for it waits for a time-out where there is none.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
