"""Compute what a model's decoder reads of prompts with pictures, videos or sounds: the towers and the merge, once.

`generate` gives a model the ids of a batch and the tensors of a processor. The model runs its towers, writes their
features over the embeddings of placeholder tokens, and calls its decoder. `PromptEncoder` calls the model's own code
on a view, and stops it where it calls the decoder: the arguments of this call are all that the decoder knows of the
pictures. They are served as a prompt of embeddings if they are embeddings, positions and additions to the outputs of
the first layers, and if the attention of the prompt is that of a text.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_async_batching.core.prefix_keys import content_key, shifted_key
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.inputs.media_arguments import CACHES, TOKEN_TYPES, is_media
from hf_async_batching.inputs.prompts import MediaInputs, Prompt
from hf_async_batching.model.forward.generate_loop import prepare_view
from hf_async_batching.model.forward.media_inputs import position_dims
from hf_async_batching.model.view.model_view import embedding_shape, make_view
from hf_async_batching.model.view.snapshot import ModelSnapshot
from hf_async_batching.model.view.unwrap import transformers_generate
from hf_async_batching.runtime.forking import ForkSafeLock

_PLAIN = "use plain `model.generate` for this call"

# Arguments of a decoder that say nothing about the prompt.
_ABOUT_THE_CALL = {
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("logits_to_keep", "cache_position", "labels", "num_items_in_batch"),
    *CACHES,
}

_SERVED = {"inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "deepstack_visual_embeds"}


class PromptEncoder:
    """Runs a model's own code before its decoder.

    Args:
        model: The user's model; the encoder makes a view of it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.name = type(model).__name__
        view: Any = make_view(model, None)
        prepare_view(view)
        for module in view.modules():
            # A view has no hooks, by which towers return the outputs of their layers. transformers installs them again
            # where this mark is missing.
            vars(module).pop("_output_capturing_hooks_installed", None)
        self._view = view
        self._decoder: Any = view.get_decoder()
        self._dims = position_dims(self._view)
        self._vocab = embedding_shape(self._view)[0]
        # The hook is on a module that all callers share.
        self._lock = ForkSafeLock()
        # These classes compute their logits from the decoder's outputs alone; other code could use the pictures again.
        self._known = getattr(type(model).forward, "__module__", "").startswith("transformers.models.")

    @torch.no_grad()
    def check(self, input_ids: torch.Tensor, arguments: Mapping[str, Any], given: str) -> None:
        """Refuse prompts whose attention is not that of a text, before a tower runs.

        Args:
            input_ids: int64 [batch, length].
            arguments: Inputs of the model's forward.
            given: The argument that a message names.

        Raises:
            UnsupportedArgumentError: The model sees parts of the prompt in both directions, or has no decoder that
                could be called alone.
        """
        without = {name: value for name, value in arguments.items() if not is_media(name)}
        with self._lock:
            self._decoder_masks(input_ids, without, given)

    @torch.no_grad()
    def encode(self, input_ids: torch.Tensor, arguments: Mapping[str, Any], given: str) -> list[Prompt]:
        """Run the towers and merge their features.

        Args:
            input_ids: int64 [batch, length], padded on the left.
            arguments: Inputs of the model's forward, as `generate` has prepared them.
            given: The argument that a message names.

        Returns:
            One prompt per row, without its padding. A row without a picture is a prompt of token ids.

        Raises:
            UnsupportedArgumentError: The decoder reads more of the prompt than can be served.
        """
        without = {name: value for name, value in arguments.items() if not is_media(name)}
        with self._lock:
            text_mask = self._decoder_masks(input_ids, without, given)
            call = self._call(input_ids, arguments, given)
        self._compare_masks(call.pop("attention_mask", None), text_mask, arguments.get("attention_mask"), given)
        embeddings = call.pop("inputs_embeds", None)
        if embeddings is None or embeddings.shape[:2] != input_ids.shape:
            raise self._refusal(given, "its decoder gets no embeddings of the prompt")
        positions = self._positions(call.pop("position_ids", None), arguments.get("position_ids"), given)
        layers = _dense_layers(call.pop("visual_pos_masks", None), call.pop("deepstack_visual_embeds", None))
        self._refuse_others(call, given)
        mask = arguments.get("attention_mask")
        ids = input_ids.to(embeddings.device)
        # Some families have placeholder tokens beyond their vocabulary.
        beyond = ids >= self._vocab
        looked_up = self._view.get_input_embeddings()(ids.masked_fill(beyond, 0))
        replaced = (looked_up != embeddings).any(-1) | beyond
        shown: list[list[int]] = input_ids.tolist()
        kept: list[list[int]] = ids.masked_fill(beyond, 0).tolist()
        prompts: list[Prompt] = []
        for row, tokens in enumerate(shown):
            real = slice(None) if mask is None else mask[row].bool()
            ids_of_row = kept[row]
            if mask is not None:
                ids_of_row = [token for token, keep in zip(ids_of_row, mask[row].tolist(), strict=True) if keep]
            prompts.append(
                _prompt(
                    ids_of_row,
                    tokens,
                    embeddings[row][real],
                    None if positions is None else positions[:, row][:, real],
                    tuple(layer[row][real] for layer in layers),
                    replaced[row][real],
                )
            )
        return prompts

    def prepare(self, input_ids: torch.Tensor, arguments: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Let `generate` prepare a call on the view; it runs the towers of some families.

        Args:
            input_ids: int64 [batch, length], without padding.
            arguments: Inputs of the model's forward.

        Returns:
            The ids and the arguments for `encode`.
        """
        taken: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def take(_model: Any, ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
            for name in ("logits_processor", "stopping_criteria", "generation_config"):
                prepared.pop(name, None)
            taken.append((ids, prepared))
            return ids

        generate: Any = transformers_generate(self._view)
        with self._lock:
            generate(input_ids, attention_mask=torch.ones_like(input_ids), custom_generate=take, **arguments)
        (prepared,) = taken
        return prepared

    def _decoder_masks(self, input_ids: torch.Tensor, arguments: dict[str, Any], given: str) -> Any:
        """The decoder's mask for the prompt as a text; refuses a model that makes another one for its token types."""
        # Without types, since zeros are types too: PaliGemma sees the whole prompt in both directions by them.
        plain = {name: value for name, value in arguments.items() if name not in TOKEN_TYPES}
        if not self._known:
            raise self._refusal(given, "its forward is not transformers' own")
        text_mask = self._call(input_ids, plain, given).get("attention_mask")
        typed = [name for name in TOKEN_TYPES if isinstance(arguments.get(name), torch.Tensor)]
        if typed:
            call = self._call(input_ids, arguments, given)
            self._compare_masks(call.get("attention_mask"), text_mask, arguments.get("attention_mask"), given)
            self._refuse_others(call, given)
        return text_mask

    def _refuse_others(self, call: dict[str, Any], given: str) -> None:
        """Refuse arguments of the decoder that are not served."""
        unknown = sorted(set(call) - _SERVED - _ABOUT_THE_CALL)
        if unknown:
            raise self._refusal(given, f"its decoder also reads `{'`, `'.join(unknown)}`")

    def _compare_masks(self, mask: Any, text_mask: Any, padding: torch.Tensor | None, given: str) -> None:
        if not _is_plain_mask(mask, padding) and not _equal(mask, text_mask):
            raise self._refusal(given, "its layers see a part of the prompt in both directions")

    def _positions(self, read: Any, prepared: Any, given: str) -> torch.Tensor | None:
        """The positions [dims, batch, length] of the prompts; None if they are numbers of tokens."""
        if self._dims and isinstance(prepared, torch.Tensor) and prepared.dim() == 3:
            if read is not None and not _equal(read, prepared):
                raise self._refusal(given, "it computes other positions than `generate` prepares")
            if prepared.shape[0] != self._dims:
                raise self._refusal(given, f"its positions have {prepared.shape[0]} dimensions")
            whole = prepared.long()
            if not bool((whole == prepared).all()):
                raise self._refusal(given, "its positions are no whole numbers")
            return whole
        if isinstance(read, torch.Tensor) and read.dim() != 2:
            raise self._refusal(given, "it computes positions of its own")
        if isinstance(read, torch.Tensor) and isinstance(prepared, torch.Tensor) and not _equal(read, prepared):
            # Some families count the padding too, which no rotary embedding can tell.
            counted = torch.arange(read.shape[1], device=read.device)
            if not bool((read == counted).all()):
                raise self._refusal(given, "it computes other positions than `generate` prepares")
        return None

    def _call(self, input_ids: torch.Tensor, arguments: Mapping[str, Any], given: str) -> dict[str, Any]:
        """The arguments with which the model calls its decoder, by name."""
        passed = {name: value for name, value in arguments.items() if name not in CACHES}
        outputs = passed.get("mm_encoder_outputs")
        if outputs is not None:
            passed["mm_encoder_outputs"] = dict(outputs)  # some forwards write to it
        device = next(self._view.parameters()).device
        inputs = self._view.prepare_inputs_for_generation(
            input_ids.to(device), is_first_iteration=True, cache=None, **passed
        )
        inputs = {name: value for name, value in inputs.items() if name not in CACHES}
        hook = self._decoder.register_forward_pre_hook(_reached, with_kwargs=True)
        try:
            self._view(**{**inputs, "use_cache": False})
        except _ReachedDecoder as reached:
            if not reached.args_ and isinstance(reached.kwargs_.get("inputs_embeds"), torch.Tensor):
                return {name: value for name, value in reached.kwargs_.items() if value is not None}
        finally:
            hook.remove()
        raise self._refusal(given, "no decoder was found that it calls with embeddings")

    def _refusal(self, given: str, why: str) -> UnsupportedArgumentError:
        return UnsupportedArgumentError(f"`{given}` is not served for {self.name}: {why}; {_PLAIN}")


# A view holds the weights, so an encoder lives no longer than its model.
_encoders: weakref.WeakKeyDictionary[PreTrainedModel, tuple[ModelSnapshot, PromptEncoder]] = (
    weakref.WeakKeyDictionary()
)


def prompt_encoder(model: PreTrainedModel) -> PromptEncoder:
    """The encoder for a model in its present state; kept until the state changes."""
    state = ModelSnapshot.of(model)
    known = _encoders.get(model)
    if known is not None and known[0] == state:
        return known[1]
    encoder = PromptEncoder(model)
    _encoders[model] = state, encoder
    return encoder


class _ReachedDecoder(Exception):
    """Carries the arguments of the decoder's call out of the forward."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_, self.kwargs_ = args, kwargs


def _reached(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _ReachedDecoder(args, kwargs)


def _is_plain_mask(mask: Any, padding: torch.Tensor | None) -> bool:
    """Whether a mask is the one that `generate` was given: its tokens, and none beyond."""
    if mask is None:
        return True
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and padding is not None and _equal(mask, padding)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool((one.to(other.device) == other).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    return one is None and other is None


def _dense_layers(mask: torch.Tensor | None, added: Sequence[torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
    """Additions to the first layers as [batch, length, hidden] each, with zeros where there are none."""
    if mask is None or added is None:
        return ()
    dense: list[torch.Tensor] = []
    for features in added:
        layer = features.new_zeros((*mask.shape, features.shape[-1]))
        layer[mask.to(features.device)] = features
        dense.append(layer)
    return tuple(dense)


def _prompt(
    tokens: list[int],
    shown: list[int],
    embeddings: torch.Tensor,
    positions: torch.Tensor | None,
    layers: tuple[torch.Tensor, ...],
    replaced: torch.Tensor,
) -> Prompt:
    """The prompt of one row.

    Args:
        tokens: Token ids.
        shown: The same with padding.
        embeddings: [length, hidden].
        positions: int64 [dims, length] or None.
        layers: [length, hidden] each.
        replaced: bool [length], where the embedding is not that of the token.
    """
    length = len(tokens)
    shifts = [()] * length if positions is None else _shifts(positions, length)
    is_media = replaced.tolist()
    if not any(is_media) and not any(any(shift) for shift in shifts):
        return Prompt(tokens, shown)
    keys: list[int] = []
    for start, end in _spans(is_media):
        if is_media[start]:
            parts = [embeddings[start:end], *(layer[start:end] for layer in layers)]
            if positions is not None:
                parts.append(positions[:, start:end] - start)
            # Not the placeholder's id: the tower's features alone are what the layers see.
            keys += [content_key(*map(_bytes, parts))] * (end - start)
        else:
            keys += [shifted_key(tokens[i], shifts[i]) for i in range(start, end)]
    media = MediaInputs(embeddings, positions, layers, merged=True)
    return Prompt(tokens, shown, media, shifts[-1] if positions is not None else (), tuple(keys))


def _shifts(positions: torch.Tensor, length: int) -> list[tuple[int, ...]]:
    """How far each token's position lies from the number of tokens before it, in each dimension."""
    counted = torch.arange(length, device=positions.device)
    return [tuple(one) for one in (positions - counted).t().tolist()]


def _spans(flags: list[bool]) -> Iterable[tuple[int, int]]:
    """Ranges of equal flags, in order."""
    start = 0
    for i in range(1, len(flags) + 1):
        if i == len(flags) or flags[i] != flags[start]:
            yield start, i
            start = i


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
