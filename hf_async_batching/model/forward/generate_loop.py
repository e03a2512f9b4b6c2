"""Compute one sequence as transformers' own generation loop does: with its inputs, its cache and its order.

The parity check uses this loop as its reference. It also serves families whose cache only their own code
understands.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.model.view.unwrap import transformers_generate

# Names by which families take and return their cache; transformers 5.24 uses `cache` for all.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


def prepare_view(view: PreTrainedModel) -> None:
    """Give a view a default generation config; the user's own config is not changed.

    Args:
        view: A view made by `make_view`.
    """
    plain: Any = GenerationConfig
    view.generation_config = plain(do_sample=False, max_new_tokens=1, pad_token_id=0, use_cache=True)


class GenerateLoop:
    """One sequence of a view.

    Some families keep state in their modules, outside the cache. The loop takes this state out after each step and
    puts it back before the next, so loops over one view can take turns, and each starts without state.

    Args:
        view: A view that `prepare_view` has prepared.

    Attributes:
        arguments: Arguments that `generate` passes from step to step besides the token ids.
    """

    def __init__(self, view: PreTrainedModel) -> None:
        self._view: Any = view
        self._ids: torch.Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self._module_state: dict[tuple[int, str], Any] = {}

    def prepare(self, tokens: torch.Tensor) -> None:
        """Let `generate` prepare the first step, but do not run it.

        Args:
            tokens: int64 [1, length].
        """

        def take(_model: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
            for name in ("logits_processor", "stopping_criteria", "generation_config"):
                prepared.pop(name, None)
            self._ids, self.arguments = input_ids, prepared
            return input_ids

        generate = transformers_generate(self._view)
        generate(tokens, attention_mask=torch.ones_like(tokens), custom_generate=take)

    def start(self, tokens: torch.Tensor, *, everywhere: bool = False) -> torch.Tensor:
        """Compute a prompt.

        Args:
            tokens: int64 [1, length].
            everywhere: Ask for the logits of all positions; some families return only the last.

        Returns:
            Logits [vocab] of the next token; with `everywhere`, logits [positions, vocab].
        """
        self.prepare(tokens)
        self._module_state = {}
        if everywhere:
            self.arguments.pop("logits_to_keep", None)
        inputs = self._view.prepare_inputs_for_generation(self._ids, is_first_iteration=True, **self.arguments)
        return self._run(inputs, everywhere)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Compute one more token.

        Args:
            token: int64 [1, 1].

        Returns:
            Logits [vocab] of the next token.
        """
        assert self._ids is not None
        self._ids = torch.cat([self._ids, token], 1)
        length = 1 if self.arguments["use_cache"] else None
        inputs = self._view.prepare_inputs_for_generation(self._ids, next_sequence_length=length, **self.arguments)
        return self._run(inputs)

    def _run(self, inputs: dict[str, Any], everywhere: bool = False) -> torch.Tensor:
        modules = list(self._view.modules())
        before = _module_state(modules)
        for (number, name), value in self._module_state.items():
            setattr(modules[number], name, value)
        outputs = self._view(**inputs, return_dict=True)
        for (number, name), value in _module_state(modules).items():
            if value is not None and value is not before.get((number, name)):
                self._module_state[number, name] = value
                if (number, name) in before:
                    setattr(modules[number], name, before[number, name])
                else:
                    delattr(modules[number], name)
        self.arguments = self._view._update_model_kwargs_for_generation(outputs, self.arguments)
        logits: torch.Tensor = outputs.logits
        if logits.dim() != 3 or logits.shape[0] != 1:
            raise UnsupportedModelError(f"its logits have the shape {tuple(logits.shape)}")
        return logits[0] if everywhere else logits[0, -1]


def _module_state(modules: list[Any]) -> dict[tuple[int, str], Any]:
    """Tensors (or None) that modules keep as plain attributes, by module number and attribute name."""
    return {
        (number, name): value
        for number, module in enumerate(modules)
        for name, value in vars(module).items()
        if value is None or isinstance(value, torch.Tensor)
    }
