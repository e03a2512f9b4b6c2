"""Triton's interpreter with bfloat16 as GPUs have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def widen_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as the integers of its bits, and its tl.dot multiplies those: widen them."""

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    builder = interpreter.InterpreterBuilder
    original = builder.create_dot
    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: original(self, widen(a), widen(b), *rest))


def round_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts the bits that bfloat16 lacks off: round to the nearest value, as GPUs do."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_fp_trunc

    def truncate(self: Any, handle: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16 or handle.dtype.scalar != tl.float32:
            return original(self, handle, dtype)
        bits = handle.data.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
        nearest = np.where(np.isfinite(handle.data), rounded, bits).astype(np.uint32).view(np.float32)
        return original(self, interpreter.TensorHandle(nearest, handle.dtype), dtype)

    monkeypatch.setattr(builder, "create_fp_trunc", truncate)


def round_to_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter forgets the carry into the exponent when it rounds to float8_e4m3fn: round as torch does."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_fp_to_fp

    def convert(self: Any, handle: Any, dtype: Any, rounding: Any) -> Any:
        if dtype.scalar != tl.float8e4nv or handle.dtype.scalar != tl.float32:
            return original(self, handle, dtype, rounding)
        bits = torch.from_numpy(np.ascontiguousarray(handle.data)).to(torch.float8_e4m3fn).view(torch.uint8)
        return interpreter.TensorHandle(bits.numpy(), tl.float8e4nv)

    monkeypatch.setattr(builder, "create_fp_to_fp", convert)
