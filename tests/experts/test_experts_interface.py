"""Families that dispatch their experts call ours, with `generate`'s tokens; in Triton's interpreter without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.checks.parity_check import compile_checked
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.experts import hf_interface
from hf_async_batching.experts.hf_interface import NAME, use_kernels
from hf_async_batching.experts.recognise import dispatches
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view.model_view import make_view

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FAMILIES = [
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "OlmoeForCausalLM",
    "Lfm2MoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "NemotronHForCausalLM",
]


# The interpreter is slow, and a captured step would call nothing.
CONFIG = BatchingConfig(max_rows=4, attach_check=False, compile=False, cuda_graphs=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kernels run on the CPU, in the interpreter; the numbers of tokens of all calls."""
    from hf_async_batching.experts import triton_experts

    original = triton_experts.experts_by_kernel
    seen: list[int] = []

    def counted(hidden: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(hidden.shape[0])
        return original(hidden, *rest, **options)

    monkeypatch.setattr(triton_experts, "experts_by_kernel", counted)
    monkeypatch.setattr(hf_interface, "runs_triton", lambda device: device.type == DEVICE.type)
    # Every kind of layer is compared anew.
    monkeypatch.setattr(hf_interface, "_compared", {})
    monkeypatch.setattr(hf_interface, "_COMPARED_TOKENS", (1, 6))
    return seen


@pytest.mark.parametrize("class_name", FAMILIES)
def test_layers_of_each_family_are_computed_by_kernels(class_name: str, calls: list[int]) -> None:
    view = view_of(class_name)
    layers = experts_of(view)
    assert use_kernels(view) == len(layers) > 0
    assert calls[:2] == [1, 6], "compared with the family's own function"
    given = inputs_of(layers[0])
    calls.clear()
    got = layers[0](*given)
    assert calls == [3]
    layers[0].config._experts_implementation = "eager"
    torch.testing.assert_close(got, layers[0](*given), atol=1e-5, rtol=1e-5)


# One of each form of a layer. The others differ in their routers, which are their own code.
QUICK = ["Qwen3MoeForCausalLM", "GptOssForCausalLM", "NemotronHForCausalLM"]


@pytest.mark.parametrize(
    "class_name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_tokens_equal_those_of_generate(class_name: str, calls: list[int]) -> None:
    model = tiny_model(class_name).to(DEVICE)
    experts = [module for module in model.modules() if dispatches(module)]
    assert experts
    prompts = [
        torch.tensor([[5, 6, 7, 8, 9]]),
        torch.tensor([[11]]),
        torch.tensor([[3, 1, 4, 1, 5, 9, 2]]),
    ]
    prompts = [one.to(DEVICE) for one in prompts]
    want = [model.generate(one, max_new_tokens=3, do_sample=False)[0, one.shape[1] :].tolist() for one in prompts]
    with GenerationManager(model, CONFIG) as manager:
        assert calls[:2] == [1, 6], "compared when the model was attached"
        handles = [
            manager.submit(one[0].tolist(), max_new_tokens=3, generation_config=model.generation_config)
            for one in prompts
        ]
        assert [handle.result().token_ids for handle in handles] == want
        assert len(calls) >= 2 + 3 * len(experts)
    assert not any(hasattr(module, "_engine_form") for module in experts), "the user's model stays as it is"
    assert {module.config._experts_implementation for module in experts} == {"grouped_mm"}


def test_compiled_code_calls_the_operator(calls: list[int]) -> None:
    forward = PackedForward(tiny_model("Qwen3MoeForCausalLM").to(DEVICE))
    calls.clear()
    compile_checked(forward, TorchBackend(), "eager")
    assert forward.regions
    assert len(calls) >= 4 * len(experts_of(forward.view))


def view_of(class_name: str) -> Any:
    return make_view(tiny_model(class_name).to(DEVICE), None)


def experts_of(view: Any) -> list[Any]:
    return [module for module in view.modules() if dispatches(module)]


def inputs_of(module: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.tensor([[0, 1], [1, 2], [3, 0]], device=DEVICE)
    size = module.hidden_size if hasattr(module, "hidden_size") else module.hidden_dim
    return torch.randn(3, size, device=DEVICE), index, torch.rand(3, 2, device=DEVICE)


def test_a_view_without_triton_stays_as_it_is() -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    view = view_of("Qwen3MoeForCausalLM")
    assert use_kernels(view) == 0
    assert view.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("name", ["deepgemm", "sonicmoe"])
def test_another_implementation_that_a_user_named_stays(name: str, calls: list[int]) -> None:
    view = view_of("Qwen3MoeForCausalLM")
    view.config._experts_implementation = name
    assert use_kernels(view) == 0
    assert view.config._experts_implementation == name
    assert not calls


def test_an_unknown_activation_keeps_its_own_function(calls: list[int]) -> None:
    view = view_of("Qwen3MoeForCausalLM")
    first, *others = experts_of(view)
    first.act_fn = torch.nn.Softsign()
    assert use_kernels(view) == len(others)
    assert first._engine_form is None
    assert all(module._engine_form is not None for module in others)
    assert view.config._experts_implementation == NAME
    calls.clear()
    given = inputs_of(first)
    out = first(*given)
    assert not calls
    first.config._experts_implementation = "eager"
    torch.testing.assert_close(out, first(*given))


def test_kernels_whose_results_differ_are_not_used(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hf_interface, "_experts", lambda hidden, *_: torch.zeros_like(hidden))
    view = view_of("Qwen3MoeForCausalLM")
    assert use_kernels(view) == 0
    assert view.config._experts_implementation == "grouped_mm"
    assert "results differ" in caplog.text
    assert not calls


def test_a_kernel_that_fails_is_not_used(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of shared memory")

    right = hf_interface._experts
    monkeypatch.setattr(hf_interface, "_experts", fail)
    assert use_kernels(view_of("Qwen3MoeForCausalLM")) == 0
    # Once for all layers and views: a mixture would round differently.
    monkeypatch.setattr(hf_interface, "_experts", right)
    assert use_kernels(view_of("Qwen3MoeForCausalLM")) == 0
    assert not calls


def test_inputs_of_another_dtype_go_to_the_family(calls: list[int]) -> None:
    """Under autocast, for one, inputs and weights have two dtypes."""
    view = view_of("Qwen3MoeForCausalLM")
    use_kernels(view)
    calls.clear()
    module = experts_of(view)[0]
    given = inputs_of(module)
    want = module(*given)
    assert calls == [3]
    got = module(given[0].double(), *given[1:])
    assert calls == [3]
    torch.testing.assert_close(got.float(), want, atol=1e-5, rtol=1e-5)


def test_under_autocast_the_family_decides_what_is_cast(calls: list[int]) -> None:
    view = view_of("Qwen3MoeForCausalLM")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert use_kernels(view) > 0
        calls.clear()
        module = experts_of(view)[0]
        module(*inputs_of(module))
        assert not calls
    module(*inputs_of(module))
    assert calls == [3]


def test_outside_of_an_engine_the_name_says_so() -> None:
    model = tiny_model("Qwen3MoeForCausalLM")
    model.config._experts_implementation = NAME
    with pytest.raises(RuntimeError, match="works only inside the engine"):
        model(torch.tensor([[1, 2]]))
