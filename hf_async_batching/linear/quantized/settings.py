"""Choose the setting of a product with a quantized weight: by rule, or as measured on this card."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hf_async_batching.linear.quantized.form import LIBRARY, Setting
from hf_async_batching.linear.quantized.forms import FORMS
from hf_async_batching.linear.quantized.weight import QuantizedWeight
from hf_async_batching.runtime.autotune import Tuning, source_version
from hf_async_batching.runtime.forking import ForkSafeLock

# More than any L2 cache holds: a step reads each weight once, from memory.
_ROTATED_BYTES = 256 << 20


class QuantizedSettings:
    """Chooses the setting of each launch, and measures settings on request. Any thread may call it.

    Args:
        tuning: Stored measurements.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._known: dict[tuple[object, ...], Setting] = {}

    def choose(self, rows: int, weight: QuantizedWeight) -> Setting:
        """The setting for `rows` rows of activations."""
        form = FORMS[weight.form]
        key = (form.tuned_rows(rows), *_kind(weight))
        setting = self._known.get(key)
        if setting is None:
            default, others = form.choices(form.tuned_rows(rows), weight)
            setting = self._known[key] = self._tuning.choose(_kernel(weight), _key(key), others, default)
        return setting

    def tune(self, weights: Iterable[QuantizedWeight], dtype: torch.dtype, rows: Iterable[int]) -> None:
        """Measure every shape of `weights` for every number of rows, unless it is stored already.

        Args:
            weights: Weights on one CUDA device; those of one shape are read in turn. Nothing else may run there.
            dtype: Dtype of the activations.
            rows: Numbers of rows of activations.
        """
        kinds: dict[tuple[object, ...], list[QuantizedWeight]] = {}
        for weight in weights:
            kinds.setdefault(_kind(weight), []).append(weight)
        for kind, alike in kinds.items():
            form = FORMS[alike[0].form]
            counters = torch.zeros(alike[0].outputs, dtype=torch.int32, device=alike[0].packed.device)
            for size in sorted({form.tuned_rows(count) for count in rows if count <= form.most_rows}):
                default, others = form.choices(size, alike[0])
                run = _products(alike, size, dtype, counters)
                self._tuning.tune(_kernel(alike[0]), _key((size, *kind)), others, run, default)
        self._known.clear()


def _kind(weight: QuantizedWeight) -> tuple[object, ...]:
    return weight.form, weight.outputs, weight.inputs, weight.group, len(weight.scales)


def _kernel(weight: QuantizedWeight) -> str:
    return f"quantized product {source_version(*FORMS[weight.form].sources())}"


def _key(key: tuple[object, ...]) -> str:
    return "rows={} form={} n={} k={} group={} scales={}".format(*key)


def _products(
    weights: list[QuantizedWeight], rows: int, dtype: torch.dtype, counters: torch.Tensor
) -> Callable[[Setting], Callable[[], None]]:
    form = FORMS[weights[0].form]
    x = torch.randn(rows, weights[0].inputs, dtype=dtype, device=counters.device)
    turn = weights[: max(1, _ROTATED_BYTES // weights[0].nbytes)]

    def run(setting: Setting) -> Callable[[], None]:
        def launch() -> None:
            for weight in turn:
                if setting[0] == LIBRARY:
                    form.own(x, weight, None)
                else:
                    form.few(x, weight, None, counters, setting, None)

        return launch

    return run


_settings: dict[torch.device, QuantizedSettings] = {}
_making = ForkSafeLock()


def settings_for(device: torch.device) -> QuantizedSettings:
    """The settings of a device; all engines of the process share them."""
    found = _settings.get(device)
    if found is None:
        with _making:
            found = _settings.setdefault(device, QuantizedSettings(Tuning(device)))
    return found
