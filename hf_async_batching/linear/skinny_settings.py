"""Choose the setting of a skinny product: by rule, or as measured on this card."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hf_async_batching.devices.shared_memory import shared_memory_limit
from hf_async_batching.linear import library, skinny, skinny_kernel
from hf_async_batching.linear.library import library_linear
from hf_async_batching.linear.skinny import (
    LIBRARY,
    MAX_ROWS,
    SkinnySetting,
    block_m,
    candidates,
    default_setting,
    skinny_linear,
)
from hf_async_batching.runtime.autotune import Tuning, source_version
from hf_async_batching.runtime.forking import ForkSafeLock

KERNEL = f"skinny product {source_version(skinny_kernel.__file__, skinny.__file__, library.__file__)}"

# More than any L2 cache holds: a step reads each weight once, from memory.
_ROTATED_BYTES = 256 << 20


class SkinnySettings:
    """Chooses the setting of each launch, and measures settings on request. Any thread may call it.

    Args:
        device: Device of the products.
        tuning: Stored measurements.
    """

    def __init__(self, device: torch.device, tuning: Tuning) -> None:
        self._memory = shared_memory_limit(device)
        self._tuning = tuning
        self._known: dict[tuple[int, int, int, torch.dtype], SkinnySetting] = {}

    def choose(self, rows: int, weight: torch.Tensor) -> SkinnySetting:
        """The setting for `rows` rows of activations and a weight [n, k]; `LIBRARY` for the vendor's library."""
        n, k = weight.shape
        key = (block_m(rows), n, k, weight.dtype)
        setting = self._known.get(key)
        if setting is None:
            default, others = self._choices(key[0], n, k)
            setting = self._known[key] = self._tuning.choose(KERNEL, _key(*key), others, default)
        return setting

    def tune(self, weights: Iterable[torch.Tensor], rows: Iterable[int], counters: torch.Tensor) -> None:
        """Measure every shape of `weights` for every number of rows, unless it is stored already.

        Args:
            weights: [n, k] each, float16 or bfloat16; weights of one shape are read in turn.
            rows: Numbers of rows of activations.
            counters: As in `skinny_linear`. Nothing else may run on the device.
        """
        shapes: dict[tuple[int, int, torch.dtype], list[torch.Tensor]] = {}
        for weight in weights:
            shapes.setdefault((*weight.shape, weight.dtype), []).append(weight)
        for (n, k, dtype), alike in shapes.items():
            for size in sorted({block_m(count) for count in rows if count <= MAX_ROWS}):
                default, others = self._choices(size, n, k)
                run = _products(alike, size, counters)
                self._tuning.tune(KERNEL, _key(size, n, k, dtype), others, run, default)
        self._known.clear()

    def _choices(self, rows: int, n: int, k: int) -> tuple[SkinnySetting, list[SkinnySetting]]:
        default = default_setting(rows, n, k, self._memory)
        return default, [LIBRARY, *[c for c in candidates(rows, n, k, self._memory) if c != default]]


def _key(rows: int, n: int, k: int, dtype: torch.dtype) -> str:
    return f"rows={rows} n={n} k={k} dtype={dtype}"


def _products(
    weights: list[torch.Tensor], rows: int, counters: torch.Tensor
) -> Callable[[SkinnySetting], Callable[[], None]]:
    x = torch.randn(rows, weights[0].shape[1], dtype=weights[0].dtype, device=weights[0].device)
    turn = weights[: max(1, _ROTATED_BYTES // weights[0].nbytes)]

    def run(setting: SkinnySetting) -> Callable[[], None]:
        def launch() -> None:
            for weight in turn:
                if setting == LIBRARY:
                    library_linear(x, weight, None)
                else:
                    skinny_linear(x, weight, None, counters, setting)

        return launch

    return run


_settings: dict[torch.device, SkinnySettings] = {}
_making = ForkSafeLock()


def settings_for(device: torch.device) -> SkinnySettings:
    """The settings of a device; all engines of the process share them."""
    found = _settings.get(device)
    if found is None:
        with _making:
            found = _settings.setdefault(device, SkinnySettings(device, Tuning(device)))
    return found
