"""Grammar matchers of the real packages: a matcher per row, made in the first call, and `generate`'s tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, tiny_model
from support.tiny_tokenizer import tiny_tokenizer
from transformers.generation import LogitsProcessor, LogitsProcessorList

from hf_async_batching import BatchingConfig, GenerationManager

REGEX = "(ab|cd|xy)[a-m]+"


def xgrammar_matcher(tokenizer: Any) -> Callable[[], LogitsProcessor]:
    xgrammar = pytest.importorskip("xgrammar")
    hf = pytest.importorskip("xgrammar.contrib.hf")
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=VOCAB)
    grammar = xgrammar.GrammarCompiler(info).compile_regex(REGEX)
    return lambda: hf.LogitsProcessor(grammar)


def outlines_matcher(tokenizer: Any) -> Callable[[], LogitsProcessor]:
    core = pytest.importorskip("outlines_core")
    backend = pytest.importorskip("outlines.backends.outlines_core")
    words = {token: [index] for token, index in tokenizer.get_vocab().items() if index > 2}
    index = core.Index(REGEX, core.Vocabulary(tokenizer.eos_token_id, words))
    return lambda: backend.OutlinesCoreLogitsProcessor(index, "torch")


def format_enforcer_matcher(tokenizer: Any) -> Callable[[], LogitsProcessor]:
    """By the package's core: its own module for transformers does not import beside transformers 5."""
    enforcer = pytest.importorskip("lmformatenforcer")
    words = [(index, token, False) for token, index in tokenizer.get_vocab().items() if index > 2]
    data = enforcer.TokenEnforcerTokenizerData(words, tokenizer.decode, tokenizer.eos_token_id, False, VOCAB)

    class Enforces(LogitsProcessor):
        def __init__(self) -> None:
            self.matcher = enforcer.TokenEnforcer(data, enforcer.RegexParser(REGEX))

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            out = torch.full_like(scores, float("-inf"))
            for row, tokens in enumerate(input_ids.tolist()):
                allowed = self.matcher.get_allowed_tokens(tokens).allowed_tokens
                out[row, allowed] = scores[row, allowed]
            return out

    return Enforces


@pytest.mark.parametrize("make", [xgrammar_matcher, outlines_matcher, format_enforcer_matcher])
def test_grammars_give_the_tokens_of_generate(make: Any) -> None:
    """Over four rows that end at different lengths, and one by one through `submit`."""
    model, tokenizer = tiny_model("Qwen2"), tiny_tokenizer()
    matcher = make(tokenizer)
    batch = tokenizer(
        ["hello", "the world", "abc", "so it is"], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    plain = model.generate(**batch, **arguments, logits_processor=LogitsProcessorList([matcher()]))
    texts = tokenizer.batch_decode(plain[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all(text[:2] in ("ab", "cd", "xy") and len(text) > 2 for text in texts)
    with GenerationManager(model, BatchingConfig(page_size=16)) as manager:
        ours = model.generate(
            **batch, **arguments, logits_processor=LogitsProcessorList([matcher()]), custom_generate=manager.bind()
        )
        assert torch.equal(ours, plain)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            prompt = ids[mask.bool()]
            alone = model.generate(prompt[None], **arguments, logits_processor=LogitsProcessorList([matcher()]))
            handle = manager.submit(prompt, **arguments, logits_processor=[matcher()])
            assert handle.result(60).token_ids == alone[0, len(prompt) :].tolist()
