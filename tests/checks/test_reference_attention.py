"""Which of torch's kernels the plain side of the parity check takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from hf_async_batching.checks import reference_attention as plain_attention
from hf_async_batching.checks.reference_attention import FlashFirst


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.overloadpacket.__name__, kwargs or {}, args))
        return func(*args, **(kwargs or {}))

    @property
    def attention(self) -> list[str]:
        return [name for name, *_ in self.calls if name.startswith("_scaled_dot_product")]


def _inputs(heads: int = 4, kv_heads: int = 4, size: int = 64, **options: Any) -> tuple[torch.Tensor, ...]:
    shapes = (1, heads, 8, size), (1, kv_heads, 8, size), (1, kv_heads, 8, size)
    return tuple(torch.randn(shape, **options) for shape in shapes)


@pytest.mark.parametrize(
    ("size", "serves", "masked", "lowers"),
    [(64, True, False, False), (64, False, False, False), (20, True, False, False), (64, True, True, False),
     (64, True, False, True)],
    ids=["it serves", "it does not", "it would pad", "it takes no mask", "autocast"],
)  # fmt: skip
def test_flash_kernels_take_what_they_serve(
    size: int, serves: bool, masked: bool, lowers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that say they are on a GPU."""
    asked: list[Any] = []
    monkeypatch.setattr(plain_attention, "can_use_flash_attention", lambda params: asked.append(params) or serves)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: lowers)
    with FakeTensorMode(), _Operators() as operators:
        query, key, value = _inputs(kv_heads=2, size=size, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones(8, 8, device="cuda", dtype=torch.bool) if masked else None
        with FlashFirst():
            scaled_dot_product_attention(query, key, value, mask, is_causal=not masked, scale=0.3, enable_gqa=True)
    eligible = size % 8 == 0 and not masked and not lowers
    assert len(asked) == eligible
    flash = serves and eligible
    # Where there is a GPU, torch may come to the same kernels by itself.
    if flash or not torch.cuda.is_available():
        assert ("_scaled_dot_product_flash_attention" in operators.attention) == flash
    if flash:
        assert (asked[0].is_causal, asked[0].enable_gqa, asked[0].attn_mask) == (True, True, None)
        (args,) = [args for name, _, args in operators.calls if name == "_scaled_dot_product_flash_attention"]
        assert args[3:] == (0.0, True)
        (named,) = [named for name, named, _ in operators.calls if name == "_scaled_dot_product_flash_attention"]
        assert named == {"scale": 0.3}


@pytest.mark.parametrize("masked", [True, False])
def test_elsewhere_attention_is_torchs(masked: bool) -> None:
    query, key, value = _inputs(kv_heads=2)
    mask = torch.randn(8, 8) if masked else None
    options: dict[str, Any] = {"scale": 0.3, "enable_gqa": True, "is_causal": not masked}
    want = scaled_dot_product_attention(query, key, value, mask, 0.0, **options)
    with FlashFirst():
        torch.testing.assert_close(
            scaled_dot_product_attention(query, key, value, mask, 0.0, **options), want, rtol=0, atol=0
        )
        assert torch.equal(query + 1, torch.add(query, 1)), "and all else is, too"


def test_other_threads_notice_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []
    monkeypatch.setattr(plain_attention, "_attention", lambda *args, **options: taken.append(args))
    inputs = _inputs()
    with FlashFirst():
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(scaled_dot_product_attention, *inputs).result() is not None
        assert not taken
        scaled_dot_product_attention(*inputs)
    assert len(taken) == 1
    scaled_dot_product_attention(*inputs)
    assert len(taken) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", ["prompt", "decode", "masked"])
@torch.inference_mode()
def test_on_a_gpu(case: str) -> None:
    query, key, value = _inputs(heads=8, kv_heads=2, size=128, device="cuda", dtype=torch.bfloat16)
    if case == "decode":
        query = query[:, :, :1]
    mask = torch.ones(8, 8, device="cuda", dtype=torch.bool).tril() if case == "masked" else None
    attention: list[list[str]] = []
    outputs = []
    for mode in (nullcontext(), FlashFirst()):
        with _Operators() as operators, mode:
            outputs.append(
                scaled_dot_product_attention(query, key, value, mask, is_causal=case == "prompt", enable_gqa=True)
            )
        attention.append(operators.attention)
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    if case != "masked":
        assert attention[1] == ["_scaled_dot_product_flash_attention"]
    else:
        assert attention[0] == attention[1]
