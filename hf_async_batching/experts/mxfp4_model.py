"""gpt-oss with its experts in MXFP4, as the checkpoint has them, without the package `kernels`.

transformers loads such a checkpoint in one of two ways: for kernels of the Hub, which keep the weights in a layout of
their own, or unpacked to 16 bits. Here is a third way, by transformers' registry of quantizers: a module of experts
whose parameters are the checkpoint's tensors. Its own forward unpacks each expert that was hit, so that plain
`generate` works, too; in an engine our kernels read the tensors.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_async_batching.experts.layer import GROUP
from hf_async_batching.experts.mxfp4 import dequantize

METHOD = "hf_async_batching_mxfp4"
"""Our name in transformers' registry of quantization methods."""

ExpertsFunction = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Mxfp4Experts(nn.Module):
    """All experts of a layer of gpt-oss, in MXFP4.

    Attributes:
        gate_up_proj_blocks: Uint8 [experts, 2 * intermediate, hidden / 32, 16]; gates and inputs take turns.
        gate_up_proj_scales: Uint8 [experts, 2 * intermediate, hidden / 32].
        gate_up_proj_bias: [experts, 2 * intermediate], the dtype of activations.
        down_proj_blocks: Uint8 [experts, hidden, intermediate / 32, 16].
        down_proj_scales: Uint8 [experts, hidden, intermediate / 32].
        down_proj_bias: [experts, hidden], the dtype of activations.
    """

    has_gate = True
    has_bias = True
    gate_up_proj_blocks: nn.Parameter
    gate_up_proj_scales: nn.Parameter
    gate_up_proj_bias: nn.Parameter
    down_proj_blocks: nn.Parameter
    down_proj_scales: nn.Parameter
    down_proj_bias: nn.Parameter

    def __init__(self, config: Any, dtype: torch.dtype | None = None) -> None:
        """Make the module without values.

        Args:
            config: The model's config.
            dtype: Dtype of activations; None for torch's default.

        Raises:
            ValueError: A size is no multiple of 32.
        """
        super().__init__()
        with torch.device("meta"):
            family: Any = GptOssExperts(config)
        self.config = config
        self.alpha, self.limit = family.alpha, family.limit
        self.num_experts, self.hidden_size = family.num_experts, family.hidden_size
        self.intermediate_size = family.intermediate_size
        for name, outputs, inner in (
            ("gate_up_proj", 2 * self.intermediate_size, self.hidden_size),
            ("down_proj", self.hidden_size, self.intermediate_size),
        ):
            if inner % GROUP:
                raise ValueError(f"MXFP4 needs {name} with a multiple of {GROUP} inputs, not {inner}")
            sizes = self.num_experts, outputs, inner // GROUP
            for suffix, tensor in (
                ("blocks", torch.empty(*sizes, GROUP // 2, dtype=torch.uint8)),
                ("scales", torch.empty(*sizes, dtype=torch.uint8)),
                ("bias", torch.empty(*sizes[:2], dtype=dtype)),
            ):
                self.register_parameter(f"{name}_{suffix}", nn.Parameter(tensor, requires_grad=False))
        self._engine_experts: ExpertsFunction | None = None
        """A view's function, which calls our kernels."""

    def _apply_gate(self, product: torch.Tensor) -> torch.Tensor:
        family: Any = GptOssExperts
        gated: torch.Tensor = family._apply_gate(self, product)
        return gated

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: [tokens, hidden].
            router_indices: Int [tokens, choices]; a number that is no expert adds nothing.
            routing_weights: [tokens, choices].

        Returns:
            [tokens, hidden].
        """
        function = self._engine_experts or plain_experts
        return function(self, hidden_states, router_indices, routing_weights)


def plain_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As `GptOssExperts` computes with unpacked weights one by one ('eager'), to the bit; it reads back who is hit."""
    out = torch.zeros_like(hidden_states)
    index = top_k_index.T
    hits: list[int] = torch.unique(index).tolist()
    for expert in (number for number in hits if 0 <= number < module.num_experts):
        choices, tokens = torch.where(index == expert)
        product = hidden_states[tokens] @ _transposed(module, "gate_up_proj", expert, hidden_states.dtype)
        product = module._apply_gate(product + module.gate_up_proj_bias[expert])
        product = product @ _transposed(module, "down_proj", expert, hidden_states.dtype)
        product = (product + module.down_proj_bias[expert]) * top_k_weights[tokens, choices, None]
        out.index_add_(0, tokens, product.to(out.dtype))
    return out


def _transposed(module: Any, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's weights [inner, outputs]."""
    blocks, scales = getattr(module, f"{name}_blocks")[expert], getattr(module, f"{name}_scales")[expert]
    return dequantize(blocks, scales, dtype).T.contiguous()


@register_quantization_config(METHOD)  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
class Mxfp4InPlaceConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """Settings of `Mxfp4InPlaceQuantizer`, made from a checkpoint's `quantization_config`.

    Args:
        modules_to_not_convert: Names or patterns of modules whose experts stay in the model's dtype.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment, unused-ignore]
        self.modules_to_not_convert = modules_to_not_convert

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint says it: saved tensors are the checkpoint's own, so any MXFP4 loader can read them."""
        return {"quant_method": "mxfp4", "modules_to_not_convert": self.modules_to_not_convert}


@register_quantizer(METHOD)  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
class Mxfp4InPlaceQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Loads the experts of gpt-oss as `Mxfp4Experts`; all other layers are plain."""

    requires_calibration = True  # it quantizes nothing: a checkpoint must be in MXFP4

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        skipped: list[str] | None = getattr(self.quantization_config, "modules_to_not_convert", None)
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, GptOssExperts) and should_convert_module(name, skipped)
        ]
        if not names:
            raise ValueError(f"{type(model).__name__} has no experts of gpt-oss to load in MXFP4")
        for name in names:
            family: Any = model.get_submodule(name)
            with torch.device("meta"):
                model.set_submodule(name, Mxfp4Experts(family.config, family.down_proj_bias.dtype))
        return model

    def is_serializable(self) -> bool:
        """Parameters are saved as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False


def keep_mxfp4(model: str | os.PathLike[str] | PreTrainedConfig, **kwargs: Any) -> PreTrainedConfig:
    """Make a config with which `from_pretrained` keeps the MXFP4 experts of gpt-oss packed.

    >>> name = "openai/gpt-oss-20b"
    >>> model = AutoModelForCausalLM.from_pretrained(name, config=keep_mxfp4(name))  # doctest: +SKIP

    Args:
        model: Name or folder of a checkpoint, or its config, which stays as it is.
        kwargs: Arguments of `AutoConfig.from_pretrained` (`revision`, `token`, ...).

    Raises:
        ValueError: The checkpoint is not gpt-oss in MXFP4.
    """
    if isinstance(model, PreTrainedConfig):
        config = copy.deepcopy(model)
    else:
        config = AutoConfig.from_pretrained(model, **kwargs)
    settings: Any = getattr(config, "quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    method = (settings or {}).get("quant_method")
    if config.model_type != "gpt_oss" or getattr(method, "value", method) not in ("mxfp4", METHOD):
        raise ValueError(
            f"keep_mxfp4 is for gpt-oss checkpoints in MXFP4; this one is {config.model_type}, quantized: {method}"
        )
    config.quantization_config = {**settings, "quant_method": METHOD}
    return config
