"""4-bit integers of GPTQ and AWQ checkpoints, in the layers of gptqmodel that keep the checkpoint's layout."""

from __future__ import annotations

from typing import Any, cast

import torch

from hf_async_batching.linear.quantized.form import LIBRARY, Form, Setting
from hf_async_batching.linear.quantized.weight import QuantizedWeight

# The place of each column in a word of AWQ.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Int4Words(Form):
    """Integers of 0 to 15, less a zero point, times a scale; both belong to a group of inputs.

    Args:
        along_inputs: Whether a word holds eight inputs (GPTQ), or eight outputs, even ones first (AWQ).
    """

    def __init__(self, *, along_inputs: bool) -> None:
        self.along_inputs = along_inputs

    def own(self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """As the layers compute it: by weights in the dtype of `x`, made for this product."""
        return torch.nn.functional.linear(x, self._values(weight, weight.scales[0].dtype).to(x.dtype), bias)

    def values(self, weight: QuantizedWeight) -> torch.Tensor:
        """The weight in float32."""
        return self._values(weight, torch.float32)

    def _values(self, weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
        scale, zeros = weight.scales
        natural = tuple(range(8))
        if self.along_inputs:
            numbers, zero = _unpack(weight.packed, 0, natural), _unpack(zeros, 1, natural)
        else:
            numbers, zero = _unpack(weight.packed, 1, _AWQ_PLACES), _unpack(zeros, 1, _AWQ_PLACES)
        groups = numbers.view(-1, weight.group, weight.outputs)
        return ((groups - zero[:, None]).to(dtype) * scale[:, None].to(dtype)).view(numbers.shape).t()

    def serves(self, x: torch.Tensor, weight: QuantizedWeight) -> bool:  # noqa: ARG002
        """16-bit activations in rows."""
        return x.dtype in (torch.float16, torch.bfloat16) and x.stride(-1) == 1

    def few(
        self,
        x: torch.Tensor,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        counters: torch.Tensor,
        setting: Setting,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `words.word_linear`."""
        from hf_async_batching.linear.quantized.words import WordSetting, word_linear

        chosen = cast(WordSetting, setting)
        return word_linear(x, weight, bias, counters, chosen, residual, along_inputs=self.along_inputs)

    def choices(self, rows: int, weight: QuantizedWeight) -> tuple[Setting, list[Setting]]:  # noqa: ARG002
        """The setting by rule, and others."""
        from hf_async_batching.linear.quantized.words import WordSetting, candidates, default_setting

        size = weight.outputs, weight.inputs, weight.group
        return default_setting(*size), [*candidates(*size), WordSetting(LIBRARY, 0, 0, 0, 0, 0)]

    def sources(self) -> tuple[str, ...]:
        """The kernel and its door."""
        from hf_async_batching.linear.quantized import tail, word_kernel, words

        return word_kernel.__file__, words.__file__, tail.__file__

    def tuned_rows(self, rows: int) -> int:
        """Up to 16 rows take the same kernel."""
        return max(16, 1 << (rows - 1).bit_length())


def _unpack(words: torch.Tensor, dim: int, places: tuple[int, ...]) -> torch.Tensor:
    """The eight numbers of each word, next to each other in a dimension: int8."""
    shifts = torch.tensor([4 * place for place in places], dtype=torch.int32, device=words.device)
    shape = [1, 1, 1]
    shape[dim + 1] = 8
    numbers = (words.unsqueeze(dim + 1) >> shifts.view(shape)) & 15
    return numbers.to(torch.int8).flatten(dim, dim + 1)


def gptq_weight_of(module: Any) -> QuantizedWeight | None:
    """The weight of a gptqmodel layer in GPTQ's layout; None if its inputs are permuted, or it is of another kind."""
    index = getattr(module, "g_idx", None)
    weight = _weight_of(module, "gptq int4", module.in_features // 8, module.out_features)
    if weight is None or index is None or index.numel() != weight.inputs:
        return None
    trivial = torch.arange(weight.inputs, device=index.device, dtype=index.dtype) // weight.group
    return weight if torch.equal(index, trivial) else None


def awq_weight_of(module: Any) -> QuantizedWeight | None:
    """The weight of a gptqmodel layer in AWQ's layout; None if it is of another kind."""
    return _weight_of(module, "awq int4", module.in_features, module.out_features // 8)


def _weight_of(module: Any, form: str, rows: int, columns: int) -> QuantizedWeight | None:
    tensors = [getattr(module, name, None) for name in ("qweight", "scales", "qzeros")]
    if any(not isinstance(one, torch.Tensor) or not one.is_contiguous() for one in tensors):
        return None
    packed, scale, zeros = (cast(torch.Tensor, one) for one in tensors)
    n, k = module.out_features, module.in_features
    special = getattr(module, "adapter", None) is not None or getattr(module, "planar", False)
    group = k if module.group_size in (-1, None) else module.group_size
    if special or module.bits != 4 or group % 32 or k % group or n % 64:
        return None
    if (packed.dtype, zeros.dtype) != (torch.int32, torch.int32) or not scale.dtype.is_floating_point:
        return None
    shapes = [(rows, columns), (k // group, n), (k // group, n // 8)]
    if [tuple(one.shape) for one in (packed, scale, zeros)] != shapes:
        return None
    return QuantizedWeight(form, packed.detach(), (scale.detach(), zeros.detach()), n, k, group)
