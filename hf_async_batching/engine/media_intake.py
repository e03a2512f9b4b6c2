"""Prompts with pictures, videos or sounds: whether the engine serves them, and what the towers make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_async_batching.engine.limits import EmbeddingsIntake
from hf_async_batching.engine.supervisor import EngineSupervisor
from hf_async_batching.errors import UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.inputs.media_arguments import media_of, user_name
from hf_async_batching.inputs.prompts import Prompt, PromptIds, read_prompt
from hf_async_batching.model.forward.prompt_encoder import PromptEncoder, prompt_encoder
from hf_async_batching.runtime.default_device import cpu_by_default


class MediaIntake:
    """Reads prompts with pictures, videos or sounds, in the caller's thread.

    Args:
        engines: The engines of the model.
        embeddings: The intake of the prompts that it makes.
        spread: Whether the model is spread over ranks.
    """

    def __init__(self, engines: EngineSupervisor, embeddings: EmbeddingsIntake, *, spread: bool) -> None:
        self._engines = engines
        self._embeddings = embeddings
        self._spread = spread

    def check(self, input_ids: torch.Tensor, arguments: Mapping[str, Any], given: str) -> None:
        """Refuse prompts that the engine does not serve, before a tower runs.

        Args:
            input_ids: int64 [batch, length].
            arguments: Inputs of the model's forward.
            given: The caller's argument that a message names.

        Raises:
            UnsupportedArgumentError: They are not served; the message names `given` and the reason.
        """
        self._encoder(given).check(input_ids, arguments, given)

    def _encoder(self, given: str) -> PromptEncoder:
        """The encoder of the model, if the engine takes prompts of embeddings."""
        if self._spread:
            raise UnsupportedArgumentError(f"`{given}` is not served with tensor parallelism; pass token ids")
        parts = None
        while parts is None:  # an engine that has just stopped by itself has none
            parts = self._engines.current().parts
        model = self._engines.model()
        try:
            self._embeddings.check(parts, model)
        except UnsupportedModelError as error:
            why = str(error).removeprefix(f"`inputs_embeds` is not served for {parts.forward.name}: ")
            raise UnsupportedArgumentError(f"`{given}` is not served for {parts.forward.name}: {why}") from error
        return prompt_encoder(model)

    def encode(self, input_ids: torch.Tensor, arguments: Mapping[str, Any], given: str) -> list[Prompt]:
        """The prompts of a batch; see `PromptEncoder.encode`, and `check` for arguments and errors."""
        return self._encoder(given).encode(input_ids, arguments, given)

    @cpu_by_default
    def read(self, input_ids: PromptIds | None, inputs_embeds: torch.Tensor | None, media: dict[str, Any]) -> Prompt:
        """The prompt of one `submit` call.

        Args:
            input_ids: Token ids with placeholders, as a processor makes them; not a text.
            inputs_embeds: Must be None.
            media: The other tensors of the processor, for a batch of one prompt.

        Raises:
            ValueError: The ids are a text or missing, or the model does not take the tensors.
            UnsupportedArgumentError: The pictures are not served.
        """
        given = user_name(media_of(media))
        if input_ids is None or isinstance(input_ids, str) or inputs_embeds is not None:
            raise ValueError(
                f"`{given}` needs the `input_ids` that the processor returned with it, whose placeholders are as many "
                "as its features; a text or `inputs_embeds` does not tell them"
            )
        model = self._engines.model()
        ids = torch.tensor([read_prompt(input_ids, None).tokens], device=model.device)
        media = {name: value for name, value in media.items() if value is not None}
        encoder = self._encoder(given)
        encoder.check(ids, media, given)
        (prompt,) = encoder.encode(*encoder.prepare(ids, media), given)
        return prompt
