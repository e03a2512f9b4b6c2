"""A router's choice in one launch, in Triton's interpreter where there is no GPU, against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_async_batching.experts import topk
from hf_async_batching.experts.topk import packed_topk, topk_by_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def unpacked(packed: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    assert packed.dtype == torch.int32 and packed.shape[-1] == 2 * k and packed.is_contiguous()
    return packed[..., :k].contiguous().view(torch.float32), packed[..., k:].long()


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scores", "k"), [(128, 8), (60, 4), (8, 8), (1, 1), (257, 22)])
def test_as_torch(scores: int, k: int, dtype: torch.dtype, softmax: bool) -> None:
    # Neighbours differ by more than rounding; no two scores are equal.
    rows = torch.stack([torch.randperm(scores) for _ in range(3)]).to(DEVICE)
    x = (rows * 0.5 - scores / 4).to(dtype) if not softmax or scores < 100 else (rows * 0.01).float().to(dtype)
    plain = x.float().softmax(-1) if softmax else x.float()
    want, places = plain.topk(k, dim=-1)
    values, index = unpacked(topk_by_kernel(x, k, softmax), k)
    torch.testing.assert_close(values, want, rtol=2e-6 if softmax else 0, atol=0)
    if len(x.unique()) == scores:
        assert torch.equal(index, places)


def test_the_first_of_equal_scores_comes_first() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], device=DEVICE)
    _, index = unpacked(topk_by_kernel(x, 4, softmax=False), 4)
    assert index.tolist() == [[1, 3, 2, 4], [0, 1, 2, 3]]


def test_numbers_of_both_signs_infinities_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[-1.0, -inf, nan, 0.5, -0.0, inf], [-3.0, -2.0, -inf, -1.0, -5.0, -4.0]], device=DEVICE)
    values, index = unpacked(topk_by_kernel(x, 6, softmax=False), 6)
    assert index.tolist() == [[2, 5, 3, 4, 0, 1], [3, 1, 0, 5, 4, 2]]
    torch.testing.assert_close(values, x.gather(1, index), rtol=0, atol=0, equal_nan=True)


def test_rows_may_have_gaps_and_further_dimensions() -> None:
    x = torch.randn(2, 3, 40, device=DEVICE)[..., :33]
    values, index = unpacked(topk_by_kernel(x, 5, softmax=False), 5)
    want = x.topk(5, dim=-1)
    assert torch.equal(values, want.values) and torch.equal(index, want.indices)
    columns = torch.randn(16, 7, device=DEVICE).t()
    assert torch.equal(unpacked(topk_by_kernel(columns, 2, softmax=False), 2)[0], columns.topk(2).values)
    assert topk_by_kernel(x[:0], 5, softmax=False).shape == (0, 3, 10)


@pytest.mark.parametrize("softmax", [False, True])
def test_elsewhere_torch_chooses(softmax: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "runs_triton", lambda device: False)
    x = torch.randn(4, 16).bfloat16()
    values, index = unpacked(packed_topk(x, 3, softmax), 3)
    want = (x.float().softmax(-1) if softmax else x.float()).topk(3)
    assert torch.equal(values, want.values) and torch.equal(index, want.indices)


def test_long_rows_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "runs_triton", lambda device: True)
    monkeypatch.setattr(topk, "topk_by_kernel", lambda *_: "kernel")
    x = torch.randn(1, topk.MOST_SCORES + 1, device=DEVICE)
    assert torch.equal(unpacked(packed_topk(x, 2, False), 2)[1], x.topk(2).indices)
    assert packed_topk(x[:, 1:], 2, False) == "kernel"
