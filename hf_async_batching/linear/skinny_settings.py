"""Which setting a skinny product runs with: the rule's, or what was measured on this card."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch

from hf_async_batching.linear import skinny, skinny_kernel
from hf_async_batching.linear.skinny import (
    LIBRARY,
    MAX_ROWS,
    Following,
    SkinnySetting,
    beginning,
    block_m,
    candidates,
    default_setting,
    skinny_linear,
)
from hf_async_batching.tuning import Tuning, source_version

KERNEL = f"skinny product {source_version(skinny_kernel.__file__, skinny.__file__)}"

# More than any L2 cache holds: a step reads each weight once, from memory.
_ROTATED_BYTES = 256 << 20


class SkinnySettings:
    """Answers at each launch which setting it takes, and measures settings when asked to. From any thread.

    Args:
        device: Where the products run.
        tuning: What has been measured.
    """

    def __init__(self, device: torch.device, tuning: Tuning) -> None:
        self._memory = skinny.shared_memory_limit(device)
        self._tuning = tuning
        self._known: dict[tuple[int, int, int, torch.dtype], SkinnySetting] = {}
        self._programs, self._prefetched_bytes = _first_programs(device)

    def choose(self, rows: int, weight: torch.Tensor) -> SkinnySetting:
        """The setting for `rows` rows of activations and a weight [n, k]; `LIBRARY` for none."""
        n, k = weight.shape
        key = (block_m(rows), n, k, weight.dtype)
        setting = self._known.get(key)
        if setting is None:
            default, others = self._choices(key[0], n, k)
            setting = self._known[key] = self._tuning.choose(KERNEL, _key(*key), others, default)
        return setting

    def following(self, rows: int, weight: torch.Tensor) -> Following | None:
        """What the product of `rows` rows with a weight [n, k] reads first; None where asking is not worth it."""
        if not self._prefetched_bytes or weight.dtype.itemsize != 2 or not weight.is_contiguous():
            return None
        return beginning(weight, self.choose(rows, weight), self._prefetched_bytes, self._programs)

    def tune(self, weights: Iterable[torch.Tensor], rows: Iterable[int], counters: torch.Tensor) -> None:
        """Measure every shape of `weights` for every number of rows, unless this was done before.

        Args:
            weights: [n, k] each, float16 or bfloat16; those of one shape are read in turn.
            rows: Rows of activations.
            counters: As in `skinny_linear`. The device must have nothing else to do.
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


def _first_programs(device: torch.device) -> tuple[int, int]:
    """Programs of a product that run at once, and bytes that the small kernels between two products leave time for.

    A fifth of the L2 cache (10 MB on an H100): what the memory delivers in the 3 to 5 us of a norm and its gaps.
    """
    if not skinny.launches_early(device):
        return 1, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size // 5


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
                    torch.nn.functional.linear(x, weight)
                else:
                    skinny_linear(x, weight, None, counters, setting)

        return launch

    return run


_settings: dict[torch.device, SkinnySettings] = {}
_making = threading.Lock()


def settings_for(device: torch.device) -> SkinnySettings:
    """The settings of a device, which all engines of the process share."""
    found = _settings.get(device)
    if found is None:
        with _making:
            found = _settings.setdefault(device, SkinnySettings(device, Tuning(device)))
    return found
