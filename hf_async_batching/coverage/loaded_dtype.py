"""Cast a model's weights and buffers to the dtypes in which `from_pretrained(dtype=...)` loads them."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import torch
from transformers import PreTrainedModel


def as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast a float32 model in place, except for the tensors that loading keeps in float32.

    `model.to(dtype)` would also round rotary frequencies and gates.

    Args:
        model: A float32 model on the CPU.
        dtype: The dtype that `from_pretrained(dtype=...)` would get.

    Returns:
        The model.

    Raises:
        Exception: Any error of the class when it is made in this dtype.
    """
    if dtype == torch.float32:
        return model
    model_class: Any = type(model)
    with torch.device("meta"):
        twin = model_class._from_config(copy.deepcopy(model.config), dtype=dtype)
    made = {name: tensor.dtype for name, tensor in _tensors(twin)}
    kept = re.compile("|".join(re.escape(part).replace(r"\*", r"\w+") for part in twin._get_dtype_plan(dtype)) or "$^")
    for name, tensor in _tensors(model):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept.search(name) else made.get(name, dtype))
    model.config.dtype = dtype
    return model


def _tensors(model: PreTrainedModel) -> Any:
    return itertools.chain(model.named_parameters(), model.named_buffers())
