"""The real chat model of the tests, from the demo's cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from demo.serving.embedded_model import embedded_model_dir
from support.chat_prompts import chat_prompts


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct and its tokenizer."""
    path = embedded_model_dir()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval(), AutoTokenizer.from_pretrained(path)


def chat_token_ids(tokenizer: Any) -> list[list[int]]:
    """64 tokenized chat prompts; the first is a single token, the longest about 700."""
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in chat_prompts()
    ]
    ids[0] = ids[0][:1]
    return ids
