"""PEFT, torch.compile, accelerate and data parallel wrappers: the same tokens as `generate` in the same state."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from support.tiny_models import greedy_alone, ragged_prompts, tiny_model
from torch import nn

import hf_async_batching
from hf_async_batching import (
    BatchingConfig,
    GenerationManager,
    UnsupportedArgumentError,
    UnsupportedModelError,
    get_manager,
)
from hf_async_batching.model.view.unwrap import unwrap

peft = pytest.importorskip("peft")

PROMPTS = ragged_prompts(4, 30, seed=5)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
SETTINGS = [{}, {"fuse_weights": True}]


def make(model: Any, **settings: Any) -> GenerationManager:
    return GenerationManager(model, BatchingConfig(page_size=16, max_batch_tokens=64, **settings))


def served(manager: GenerationManager) -> list[list[int]]:
    handles = [manager.submit(prompt, **GREEDY) for prompt in PROMPTS]
    return [handle.result(60).token_ids for handle in handles]


def expected(model: Any) -> list[list[int]]:
    return [greedy_alone(model, prompt, 8, eos_token_id=None) for prompt in PROMPTS]


def lora(**changes: Any) -> Any:
    """Two adapters, "default" and "other", whose weights are far from zero."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny_model("Llama"), peft.LoraConfig(**{**fields, **changes}))
    model.add_adapter("other", peft.LoraConfig(**{**fields, **changes}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model.eval()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "o_proj"]}], ids=str)
def test_adapters_are_served_as_they_are_switched(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    model = lora(**changes)
    seen = []
    with make(model, **settings) as manager:

        def check() -> None:
            seen.append(expected(model))
            assert served(manager) == seen[-1]

        check()
        model.set_adapter("other")
        check()
        with model.disable_adapter():
            check()
        check()
        model.merge_adapter()
        assert served(manager) == seen[1], "merged weights compute what the adapter did"
        model.unmerge_adapter()
        model.set_adapter("default")
        check()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B.default" in name or "lora_embedding_B.default" in name:
                    parameter.mul_(-1.0)
        check()
    assert seen[0] != seen[1] != seen[2] != seen[0]
    assert seen[3] == seen[1]
    assert seen[4] == seen[0]
    assert seen[5] != seen[0]


def test_scaling_is_part_of_the_state() -> None:
    model = lora()
    with make(model) as manager:
        before = served(manager)
        for module in model.modules():
            if hasattr(module, "merged_adapters"):
                module.scaling["default"] *= -2.0
        after = served(manager)
        assert after != before
        assert after == expected(model)


def test_managers_of_different_adapters_side_by_side() -> None:
    """Each call is answered by the adapters that are active when it is made, in whichever manager."""
    model = lora()
    want = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        want[name] = expected(model)
    with make(model) as first, make(model.get_base_model()) as second:
        for name, manager in (("default", first), ("other", second), ("default", second), ("other", first)):
            model.set_adapter(name)
            handles = [manager.submit(prompt, **GREEDY) for prompt in PROMPTS]
            model.set_adapter("default" if name == "other" else "other")  # while they run
            assert [handle.result(60).token_ids for handle in handles] == want[name]


def test_every_way_in() -> None:
    model = lora()
    ids = torch.tensor([PROMPTS[3]])
    want = model.generate(input_ids=ids, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, custom_generate=hf_async_batching.generate, **GREEDY), want)
    assert torch.equal(hf_async_batching.generate(model, input_ids=ids, **GREEDY), want)
    base = model.get_base_model()
    assert torch.equal(base.generate(ids, custom_generate=hf_async_batching.generate, **GREEDY), want)
    assert get_manager(model) is get_manager(base)
    with make(model) as manager:
        assert torch.equal(model.generate(input_ids=ids, custom_generate=manager.bind(), **GREEDY), want)
    get_manager(model).close()


def test_adapters_of_transformers_itself() -> None:
    model = tiny_model("Llama")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    try:
        tiny_model("Llama").add_adapter(adapter)
    except ValueError as error:  # a release of transformers can ask for one of peft that is still to come
        pytest.skip(str(error))
    before = expected(model)
    with make(model) as manager:
        assert served(manager) == before
        model.add_adapter(adapter)
        after = expected(model)
        assert after != before
        assert served(manager) == after
        model.disable_adapters()
        assert served(manager) == before


def test_adapters_for_one_call_are_refused() -> None:
    """PEFT takes `adapter_names` out of the call: nothing of it may be lost silently."""
    model = lora()
    ids = torch.tensor([PROMPTS[3], PROMPTS[3]])
    arguments = {**GREEDY, "custom_generate": hf_async_batching.generate}
    with pytest.raises(UnsupportedArgumentError, match="`adapter_names`"):
        model.generate(input_ids=ids, adapter_names=["default", "other"], **arguments)
    # PEFT leaves its hooks on the model.
    with pytest.raises(UnsupportedArgumentError, match="`adapter_names`"):
        get_manager(model)


def test_learned_prompts_are_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny_model("Llama"), config).eval()
    base = model.base_model
    ids = torch.tensor([PROMPTS[3]])
    for call in (
        lambda: GenerationManager(model),
        lambda: get_manager(model),
        lambda: model.generate(input_ids=ids, custom_generate=hf_async_batching.generate, **GREEDY),
        lambda: hf_async_batching.generate(model, input_ids=ids, **GREEDY),
    ):
        with pytest.raises(UnsupportedModelError, match="learned prompts"):
            call()
    # The model inside is none the worse for it.
    with make(base) as manager:
        assert served(manager) == expected(base)
    get_manager(base).close()


def test_compiled_models() -> None:
    """However torch.compile was applied, the model inside is served, and nothing is compiled by calling it."""
    want = expected(tiny_model("Llama"))
    calls: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        calls.append(1)
        return graph

    compile = functools.partial(torch.compile, backend=backend)
    wrapped = compile(tiny_model("Llama"))
    in_place = tiny_model("Llama")
    in_place.compile(backend=backend)
    by_forward = tiny_model("Llama")
    by_forward.forward = compile(by_forward.forward)
    inside = tiny_model("Llama")
    inside.model = compile(inside.model)
    inside.model.layers[1].mlp = compile(inside.model.layers[1].mlp)
    for model in (wrapped, in_place, by_forward, inside):
        with make(model) as manager:
            assert served(manager) == want
    ids = torch.tensor([PROMPTS[3]])
    got = hf_async_batching.generate(wrapped, input_ids=ids, **GREEDY)
    assert got[0, len(PROMPTS[3]) :].tolist() == want[3]
    assert get_manager(wrapped) is get_manager(wrapped._orig_mod)
    get_manager(wrapped).close()
    assert calls == []


def test_data_parallel_wrappers_and_what_is_no_model() -> None:
    model = tiny_model("Llama")
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(nn.DataParallel(model))) is model
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        unwrap(nn.Linear(2, 2))


def test_models_that_accelerate_dispatched_onto_one_device() -> None:
    from accelerate import dispatch_model

    model = tiny_model("Llama")
    want = expected(model)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    with make(model) as manager:
        assert served(manager) == want
        view: Any = manager.assembly.forward.view  # type: ignore[union-attr]
        assert not any(hasattr(module, "_hf_hook") for module in view.modules())
    assert hasattr(model, "_hf_hook")
    assert expected(model) == want


def test_offloaded_models_are_refused(tmp_path: Any) -> None:
    from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload

    for offload in (cpu_offload, functools.partial(disk_offload, offload_dir=tmp_path), cpu_offload_with_hook):
        model = tiny_model("Llama")
        offload(model, execution_device="cpu") if offload is not cpu_offload_with_hook else offload(model, "cpu")
        with pytest.raises(UnsupportedModelError, match=r"one device.*or use plain `model\.generate`"):
            GenerationManager(model)


def test_models_that_accelerate_prepared_for_mixed_precision() -> None:
    """Its forward runs under autocast by itself, and is a method that is set on the model."""
    from accelerate import Accelerator

    model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(tiny_model("Qwen3"), evaluation_mode=True)
    assert "forward" in vars(model)
    for settings in SETTINGS:
        with make(model, **settings) as manager:
            # One by one: some processors' sums of bfloat16 depend on the batch.
            got = [manager.submit(prompt, **GREEDY).result(60).token_ids for prompt in PROMPTS]
            assert got == expected(model)
            assert manager.assembly is not None
            assert {layer.dtype for layer in manager.assembly.forward.layers} == {torch.bfloat16}


def test_forwards_and_hooks_that_are_the_models_own() -> None:
    """Pruning and the norms of weights work by hooks; a method that replaces forward computes another model."""
    model = tiny_model("Llama")
    torch.manual_seed(3)
    nn.utils.prune.random_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    torch.nn.utils.weight_norm(model.model.layers[1].self_attn.o_proj)

    def halved(module: Any, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * type(module).forward(module, x)

    mlp = model.model.layers[1].mlp
    mlp.forward = halved.__get__(mlp)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight_orig.mul_(1.5)  # the hook computes the weight from it
    for settings in SETTINGS:
        with make(model, **settings) as manager:
            got = served(manager)
            assert got == expected(model)
    plain = tiny_model("Llama")
    assert got != expected(plain)
