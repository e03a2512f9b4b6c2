"""Loads the model that a command names, or says in one line why loading failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_async_batching.cli.arguments import CommandError

_MOST_CHARACTERS = 300


def load_model(name: str, *, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """Load the causal language model with this name.

    Args:
        name: A folder, or a name on the Hub.
        trust_remote_code: Whether code that comes with the model may run.
        arguments: Arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CommandError: The model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    return _loaded(AutoModelForCausalLM, name, trust_remote_code=trust_remote_code, **arguments)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of the model with this name; see `load_model`.

    Raises:
        CommandError: The tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, name, trust_remote_code=trust_remote_code)


def _loaded(loader: Any, name: str, **arguments: Any) -> Any:
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise CommandError(f"--model {name}: there is no such folder")
    try:
        return loader.from_pretrained(name, **arguments)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CommandError(f"--model {name}: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """Return the first sentence of an error; transformers' errors have many lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return "the model comes with its own code; read it, then allow it to run with --trust-remote-code"
    sentence, dot, _ = text.partition(". ")
    return (sentence + dot.strip())[:_MOST_CHARACTERS]
