"""A device that fails is named with the model, the route and the step; and whether the process can go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_async_batching import BatchingConfig
from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks.parity_check import check_parity
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.devices import failure as module
from hf_async_batching.devices.failure import device_failure, ends_the_search, is_device_failure, is_lost
from hf_async_batching.engine.route import choose_route
from hf_async_batching.errors import DeviceFailedError, EngineFailedError, UnsupportedModelError
from hf_async_batching.model.forward.packed_forward import PackedForward

ASSERT = "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in https://docs.nvidia.com\n"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def met_while_handling(error: Exception, first: Exception) -> Exception:
    error.__context__ = first
    return error


def circle() -> Exception:
    error = ValueError("no")
    error.__context__ = caused(ValueError("nor that"), error)
    return error


@pytest.mark.timeout(60)  # of the circle, which can be gone round for ever
@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (RuntimeError(ASSERT), True),
        (RuntimeError("Triton Error [CUDA]: device-side assert triggered"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (caused(UnsupportedModelError("its forward fails"), RuntimeError(ASSERT)), True),
        (met_while_handling(KeyError("states"), RuntimeError(ASSERT)), True),
        (getattr(torch, "AcceleratorError", DeviceFailedError)("without any sign"), True),
        (DeviceFailedError("it failed"), True),
        (circle(), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (IndexError("index 3 is out of bounds"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. CUDA error"), False),
        (caused(UnsupportedModelError("its forward fails"), ValueError("no")), False),
    ],
)
def test_which_errors_are_a_devices(error: Exception, failed: bool) -> None:
    assert is_device_failure(error) == failed


def test_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:1")
    for lost in (True, False):
        monkeypatch.setattr(module, "is_lost", lambda _, lost=lost: lost)
        error = device_failure(RuntimeError(ASSERT), "Falcon", "padded", "step 3", device)
        assert isinstance(error, EngineFailedError)
        text = str(error)
        assert text.startswith(
            "Falcon, served as padded, failed on cuda:1 in step 3: RuntimeError: CUDA error: device"
        )
        assert "Search for" not in text
        assert ("The CUDA context of this process is gone" in text) == lost


@pytest.mark.parametrize("text", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", ASSERT])
@pytest.mark.parametrize("lost", [True, False])
def test_only_a_lost_device_ends_the_search(text: str, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_lost", lambda _: lost)
    assert ends_the_search(RuntimeError(text), torch.device("cuda")) == lost
    assert not ends_the_search(ValueError("no"), torch.device("cuda"))
    assert ends_the_search(DeviceFailedError("it failed"), torch.device("cuda"))


@pytest.mark.parametrize(
    ("error", "lost"), [(torch.OutOfMemoryError("full"), False), (RuntimeError(ASSERT), True), (None, False)], ids=str
)
def test_a_full_device_is_not_lost(error: Exception | None, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: Any, **__: Any) -> Any:
        if error is not None:
            raise error
        return torch.tensor([0.0])

    monkeypatch.setattr(torch, "zeros", zeros)
    assert is_lost(torch.device("cuda")) == lost


def test_only_cuda_is_asked() -> None:
    assert not is_lost(torch.device("cpu"))


def test_the_attach_check_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("LlamaForCausalLM")
    forward = PackedForward(model)
    calls: list[int] = []
    call = PackedForward.__call__

    def fails(self: PackedForward, inputs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError(ASSERT)
        return call(self, inputs)

    monkeypatch.setattr(PackedForward, "__call__", fails)
    monkeypatch.setattr(module, "is_lost", lambda _: True)
    with pytest.raises(
        DeviceFailedError, match=r"LlamaForCausalLM, served as packed, failed on cpu in the parity check"
    ) as caught:
        check_parity(model, forward, make_backend("auto", torch.device("cpu")))
    assert "step 2: 0 chunks, 1 rows that decode" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("fused", [True, False])
def test_a_first_forward_that_ends_the_context_says_so(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []

    def fails(self: PackedForward, model: Any, **options: Any) -> None:
        tried.append(bool(options.get("fused")))
        raise RuntimeError(ASSERT)

    monkeypatch.setattr(PackedForward, "__init__", fails)
    monkeypatch.setattr(module, "is_lost", lambda _: True)
    with pytest.raises(DeviceFailedError, match="LlamaForCausalLM failed on cpu in a first forward"):
        choose_route(tiny_model("LlamaForCausalLM"), BatchingConfig(fuse_weights=fused))
    assert tried == [fused], "nothing else is tried in a context that may be gone"
