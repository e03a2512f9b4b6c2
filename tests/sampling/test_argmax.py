"""The arg-max in parts, against torch's."""

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if __import__("torch").cuda.is_available() else "1")

import math

import pytest
import torch

pytest.importorskip("triton")

from hf_async_batching.sampling.argmax import argmax, argmax_in_parts
from hf_async_batching.sampling.outcome_marks import tokens_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab", "parts"), [(3, 97, 1), (1, 5000, 4), (4, 9001, 2), (2, 2048, 1)])
def test_random_logits(rows: int, vocab: int, parts: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, vocab, device=DEVICE).to(dtype)
    first = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])
    assert argmax_in_parts(logits, parts).tolist() == first.tolist(), "of equals, which bfloat16 has many, the first"
    assert torch.equal(logits.float().gather(1, argmax(logits).long()[:, None])[:, 0], logits.float().amax(1))


def test_edges() -> None:
    logits = torch.randn(6, 6000, device=DEVICE)
    logits[0, 5999] = logits[0, 4096] = 100.0
    logits[1, 0] = 100.0
    logits[2] = -math.inf
    logits[3, 17], logits[3, 5000] = math.inf, math.nan
    logits[4] = -math.inf
    logits[4, 3000] = -1e30
    logits[5, 100] = math.nan
    got = argmax_in_parts(logits, 2)
    assert tokens_of(got).tolist() == [4096, 0, 0, 17, 3000, 100]
    assert (got < 0).tolist() == [False, False, True, True, False, True], "what is not finite is marked"
    logits[3, 17] = 0.0
    assert argmax_in_parts(logits, 2).tolist() == argmax(logits.cpu()).tolist()
    assert tokens_of(argmax(logits)).tolist() == logits.argmax(-1).tolist()


def test_rows_need_not_be_next_to_each_other() -> None:
    logits = torch.randn(3, 3000, device=DEVICE)
    assert argmax_in_parts(logits[:, 5:2900], 2).tolist() == logits[:, 5:2900].argmax(-1).tolist()
