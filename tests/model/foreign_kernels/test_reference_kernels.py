"""A small copy computes on the CPU although packages with kernels for GPUs are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_python import run_python
from transformers import PreTrainedModel

from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.checks import parity_check
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.foreign_kernels import reference_kernels
from hf_async_batching.model.foreign_kernels.reference_kernels import use_reference_kernels
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view.model_view import make_view

KERNEL = "def {name}(*args, **kwargs):\n    raise ValueError('Pointer argument cannot be accessed from Triton')\n"
SCRIPT = """
import torch
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.checks.small_copy_check import SmallCopyCheck
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.foreign_kernels.reference_kernels import use_reference_kernels
model = tiny_model("Qwen3NextForCausalLM")
tokens = torch.arange(3, 12)[None]
try:
    model(tokens)
except ValueError as error:
    print("installed:", error)
SmallCopyCheck(model).refuse("padded", lambda small: CacheForward(small, "padded", False), always=True)
from hf_async_batching.checks import small_copy_check
print("verdicts:", list(small_copy_check._verdicts.values()))
"""


def test_kernels_of_other_packages_are_left_out(tmp_path: Path) -> None:
    names = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]
    package = tmp_path / "fla"
    for folder in (package, package / "ops", package / "ops" / "gated_delta_rule"):
        folder.mkdir()
        (folder / "__init__.py").write_text("".join(KERNEL.format(name=name) for name in names))
    done = run_python(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{SCRIPT}")
    assert "installed: Pointer argument" in done.stdout, done.stderr
    assert "verdicts: [None]" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "BambaForCausalLM", "Lfm2ForCausalLM", "JambaForCausalLM"])
def test_what_a_model_computes_stays_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    tokens = torch.arange(3, 12)[None]
    expected = model(tokens).logits
    before = {id(module): dict(vars(module)) for module in model.modules()}
    use_reference_kernels(model)
    assert before == {id(module): dict(vars(module)) for module in model.modules()}, "no such package is installed"
    monkeypatch.setattr(reference_kernels, "find_spec", lambda _: True)
    use_reference_kernels(model)
    rebound = [key for module in model.modules() for key in vars(module).keys() - before[id(module)].keys()]
    assert rebound
    assert torch.equal(model(tokens).logits, expected)


def test_a_view_computes_without_other_packages_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_kernels, "find_spec", lambda _: True)
    model = tiny_model("Qwen3NextForCausalLM")
    plain, reference = (make_view(model, None, reference_kernels=flag) for flag in (False, True))
    assert not any("forward" in vars(module) for module in plain.modules())
    assert any("forward" in vars(module) for module in reference.modules())


@pytest.mark.parametrize(("name", "wanted"), [("Qwen3NextForCausalLM", True), ("LlamaForCausalLM", False)])
def test_families_with_states_are_compared_with_torch_code(
    name: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recorded(*args: Any, reference_kernels: bool = False) -> PreTrainedModel:
        seen.append(reference_kernels)
        return make_view(*args, reference_kernels=reference_kernels)

    monkeypatch.setattr(parity_check, "make_view", recorded)
    model = tiny_model(name)
    parity_check.check_parity(model, PackedForward(model), TorchBackend())
    assert seen == [wanted]
