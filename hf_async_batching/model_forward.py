"""The forward of a model's view over packed tokens, with attention over pages."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_async_batching.attention import interface
from hf_async_batching.attention import probe as attention_probe
from hf_async_batching.attention.backend import AttentionBackend
from hf_async_batching.attention.cache import LayerShape, PagedCache
from hf_async_batching.attention.interface import PagedCall
from hf_async_batching.device_state import StepInputs
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.model_view import make_view, set_attention


class ModelForward:
    """Calls the view for one step.

    Args:
        model: The user's model; a shared-weight view of it is made.

    Attributes:
        name: Class of the model, for messages.
        layers: Keys and values of each attention layer, as the probe saw them.
        vocab_size: Rows of the input embedding: token ids must be below.
        device: Where the weights lie.

    Raises:
        UnsupportedModelError: The model's attention cannot be routed to the pages.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.name = type(model).__name__
        if model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{self.name} is not served: it has an encoder and a decoder. Use plain `model.generate`."
            )
        self.view = make_view(model, attention_probe.NAME)
        self.device: torch.device = next(self.view.parameters()).device
        parameters = inspect.signature(self.view.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        embedding: Any = self.view.get_input_embeddings()
        self.vocab_size: int = embedding.weight.shape[0]
        findings = self._probe()
        self.layers: list[LayerShape] = findings.shapes
        self._paged_layers = findings.layers
        self._passes_context = findings.passes_context
        set_attention(self.view, interface.NAME)
        self._cache: PagedCache | None = None
        self._backend: AttentionBackend | None = None

    def _probe(self) -> attention_probe.Findings:
        tokens = torch.arange(1, attention_probe.PROBE_TOKENS + 1, device=self.device) % self.vocab_size

        def forward(**context: Any) -> None:
            self._call(tokens, torch.arange(len(tokens), device=self.device), None, context)

        with torch.inference_mode():
            return attention_probe.probe(self.name, forward)

    def bind(self, cache: PagedCache, backend: AttentionBackend) -> None:
        """Set the pages and kernels that steps use from now on."""
        self._cache, self._backend = cache, backend

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [sampled, vocab] in the model's dtype, one row per entry of `sample_index` (all where None)."""
        context = inputs.context
        context.cache, context.backend = self._cache, self._backend
        call = PagedCall(context, self._paged_layers)
        kwargs = {"paged": call} if self._passes_context else {}
        with nullcontext() if self._passes_context else interface.active(call):
            logits = self._call(inputs.token_ids, inputs.position_ids, inputs.sample_index, kwargs)
        if inputs.sample_index is not None and not self._takes_logits_to_keep:
            logits = logits[inputs.sample_index]
        return logits

    def _call(
        self, tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if self._takes_positions:
            kwargs = {**kwargs, "position_ids": positions[None]}
        if keep is not None and self._takes_logits_to_keep:
            kwargs = {**kwargs, "logits_to_keep": keep}
        out = self.view(input_ids=tokens[None], use_cache=False, return_dict=True, **kwargs)
        logits: torch.Tensor = out.logits
        return logits[0]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all parameters but an embedding that is only looked up."""
        seen: dict[int, int] = {id(p): p.nbytes for p in self.view.parameters()}
        view: Any = self.view
        embedding, output = view.get_input_embeddings(), view.get_output_embeddings()
        if output is not None and getattr(output, "weight", None) is not embedding.weight:
            seen.pop(id(embedding.weight), None)
        return sum(seen.values())
