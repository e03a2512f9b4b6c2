"""Hooks and forwards on a model's modules: served as plain `generate` runs them, or refused by name, whenever set."""

from __future__ import annotations

import ast
import functools
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import greedy_alone, ragged_prompts, tiny_model
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedModelError, get_manager, per_token
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.model.view.module_calls import NEUTRAL_HOOKS, is_neutral
from hf_async_batching.model.view.snapshot import ModelSnapshot

PROMPTS = ragged_prompts(4, 30, seed=5)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
CONFIG = BatchingConfig(page_size=16, max_batch_tokens=16, debug=True)
STEER = torch.randn(64, generator=torch.Generator().manual_seed(7)) * 4


def steer(module: Any, args: Any, out: Any) -> Any:
    return (out[0] + STEER, *out[1:]) if isinstance(out, tuple) else out + STEER


def steer_input(module: Any, args: Any) -> Any:
    return (args[0] + STEER, *args[1:])


def steer_keywords(module: Any, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + STEER}


def steer_with_keywords(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return steer(module, args, out)


class Steering:
    """What interpretability libraries register: an object with a strength."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def __call__(self, module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + self.strength * STEER

    def method(self, module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return self(module, args, out)


class Handles:
    """Removes what was set on a module in place of hooks."""

    def __init__(self, remove: Callable[[], Any]) -> None:
        self.remove = remove


def set_forward(module: nn.Module, wrap: Callable[[Any], Any]) -> Handles:
    before = module.forward
    module.forward = wrap(lambda x: before(x) + STEER)  # type: ignore[method-assign]
    return Handles(lambda: module.__dict__.pop("forward"))


def everywhere(model: Any, wrap: Callable[[Any], Any]) -> Any:
    layer = model.model.layers[0]
    hook = wrap(lambda module, args, out: out + STEER if module is layer or isinstance(module, nn.ReLU) else None)
    return torch_module.register_module_forward_hook(hook)


Wrap = Callable[[Any], Any]
WAYS: dict[str, Callable[[Any, Wrap], Any]] = {
    "hook": lambda m, w: m.model.layers[0].register_forward_hook(w(steer)),
    "hook on attention": lambda m, w: m.model.layers[1].self_attn.register_forward_hook(w(steer)),
    "hook on a projection": lambda m, w: m.model.layers[0].self_attn.o_proj.register_forward_hook(w(steer)),
    "object": lambda m, w: m.model.layers[0].register_forward_hook(w(Steering(1.5))),
    "method": lambda m, w: m.model.layers[0].mlp.register_forward_hook(w(Steering().method)),
    "partial": lambda m, w: m.model.layers[0].register_forward_hook(w(functools.partial(steer))),
    "hook with keywords": lambda m, w: m.model.layers[0].register_forward_hook(
        w(steer_with_keywords), with_kwargs=True
    ),
    "pre-hook": lambda m, w: m.model.layers[1].register_forward_pre_hook(w(steer_input)),
    "pre-hook with keywords": lambda m, w: m.model.layers[1].self_attn.register_forward_pre_hook(
        w(steer_keywords), with_kwargs=True
    ),
    "forward": lambda m, w: set_forward(m.model.layers[0].mlp, w),
    "hook on all modules": everywhere,
}


def served(manager: GenerationManager) -> list[list[int]]:
    handles = [manager.submit(prompt, **GREEDY) for prompt in PROMPTS]
    return [handle.result(60).token_ids for handle in handles]


def expected(model: Any) -> list[list[int]]:
    return [greedy_alone(model, prompt, 8, eos_token_id=None) for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def no_hooks_everywhere() -> Iterator[None]:
    yield
    torch_module._global_forward_hooks.clear()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "hook on all modules"])
def test_marked_code_is_served_whenever_it_is_set(way: str, fused: bool) -> None:
    model = tiny_model("Llama")
    config = BatchingConfig(page_size=16, max_batch_tokens=16, fuse_weights=fused, compile=False, debug=True)
    with GenerationManager(model, config) as manager:
        plain = served(manager)
        assert plain == expected(model)
        handle = WAYS[way](model, per_token)
        steered = served(manager)
        assert steered == expected(model)
        assert steered != plain, "the hook changes nothing: this test would prove nothing"
        assert manager.assembly is not None
        assert manager.assembly.forward.route == "packed"
        running = manager.assembly
        assert served(manager) == steered
        assert manager.assembly is running, "the same hooks need no other engine"
        handle.remove()
        assert served(manager) == plain


@pytest.mark.parametrize("way", WAYS)
def test_other_code_is_refused_by_name_and_hurts_no_engine(way: str) -> None:
    """Also when set after the start; the engine goes on as soon as it is removed."""
    model = tiny_model("Llama")
    ids = torch.tensor([PROMPTS[3]])
    arguments: dict[str, Any] = {**GREEDY, "custom_generate": hf_async_batching.generate}
    plain = model.generate(ids, **GREEDY)
    assert model.generate(ids, **arguments).equal(plain)
    manager = get_manager(model)
    engine = manager.assembly
    live = manager.submit(PROMPTS[3], **{**GREEDY, "max_new_tokens": 100})
    handle = WAYS[way](model, lambda code: code)
    with pytest.raises(UnsupportedModelError, match=r"hook|forward") as raised:
        model.generate(ids, **arguments)
    assert "per_token" in str(raised.value)
    assert "on_unsupported" in str(raised.value)
    if way != "hook on all modules":
        assert "model.layers." in str(raised.value)
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
            make_view(model, None)
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
            GenerationManager(model)
        steered = model.generate(ids, **GREEDY)
        assert not steered.equal(plain)
        for _ in range(2):
            assert model.generate(ids, on_unsupported="generate", **arguments).equal(steered)
            assert hf_async_batching.generate(model, ids, on_unsupported="generate", **GREEDY).equal(steered)
    handle.remove()
    assert live.result(60).finish_reason == "length"
    assert model.generate(ids, **arguments).equal(plain)
    assert model.generate(ids, on_unsupported="generate", **arguments).equal(plain)
    assert manager.assembly is engine
    manager.close()


@pytest.mark.parametrize("why", ["hook", "check"])
def test_a_model_is_served_once_what_refused_it_is_gone(why: str) -> None:
    """A refusal is remembered for a model as it was, not for ever."""
    model = tiny_model("Llama")
    ids = torch.tensor([PROMPTS[3]])
    layer = model.model.layers[0]
    if why == "hook":
        handle: Any = layer.register_forward_hook(steer)
    else:  # found out by an engine that starts
        mixed = lambda self, x: first_row(None, None, type(self).forward(self, x))  # noqa: E731
        layer.mlp.forward = types.MethodType(mixed, layer.mlp)
        handle = Handles(lambda: layer.mlp.__dict__.pop("forward"))
    call = functools.partial(hf_async_batching.generate, model, ids, on_unsupported="generate", **GREEDY)
    assert call().equal(model.generate(ids, **GREEDY))
    assert call().equal(model.generate(ids, **GREEDY))
    with pytest.raises(UnsupportedModelError):
        get_manager(model).submit(PROMPTS[3], **GREEDY)
    handle.remove()
    assert call().equal(model.generate(ids, **GREEDY))
    assert get_manager(model).assembly is not None
    get_manager(model).close()


def test_a_batch_of_generate_is_steered_row_by_row() -> None:
    model = tiny_model("Llama")
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    arguments = {"attention_mask": (ids != 0).long(), **GREEDY}
    model.model.layers[1].register_forward_hook(per_token(steer))
    want = model.generate(ids, **arguments)
    assert model.generate(ids, custom_generate=hf_async_batching.generate, **arguments).equal(want)
    get_manager(model).close()


def test_values_that_a_hook_reads_may_change() -> None:
    """Nothing that was computed before is found again: no prefix, no captured step, no compiled code."""
    model = tiny_model("Llama")
    steering = Steering()
    model.model.layers[0].register_forward_hook(per_token(steering))
    config = BatchingConfig(page_size=16, max_batch_tokens=64, compile=True, cuda_graphs=True, prefix_cache=True)
    seen = []
    with GenerationManager(model, config) as manager:
        for strength in (1.0, 0.0, 3.0):
            steering.strength = strength
            seen.append(served(manager))
            assert seen[-1] == expected(model)
        assert manager.assembly is not None
        settings = manager.assembly.config.settings
        assert (settings.compile, settings.cuda_graphs, settings.prefix_cache) == (False, False, False)
    assert seen[0] != seen[1] != seen[2]


def last_position(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    out[:, -1] += 5 * STEER
    return out


def first_row(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    out[0] += 5 * STEER
    return out


@pytest.mark.parametrize("family", ["Llama", "Bloom"])
@pytest.mark.parametrize("hook", [last_position, first_row])
def test_a_mark_that_is_not_true_is_not_believed(hook: Any, family: str) -> None:
    """The check of a start sees it: what is served at all is served as `generate` computes it."""
    if family == "Bloom":
        config = transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4, eos_token_id=None)
        torch.manual_seed(0)
        model: Any = transformers.BloomForCausalLM(config).eval()
        layer = model.transformer.h[0].mlp
    else:
        model = tiny_model("Llama")
        layer = model.model.layers[0]
    layer.register_forward_hook(per_token(hook))
    with GenerationManager(model, CONFIG) as manager:
        try:
            got = served(manager)
        except UnsupportedModelError as error:
            assert hook is not first_row or "rows of a batch" in str(error)  # noqa: PT017
        else:
            assert hook is not first_row
            assert got == expected(model)


def test_methods_that_replace_a_forward_are_the_models_own_and_noticed() -> None:
    model = tiny_model("Llama")
    mlp = model.model.layers[1].mlp

    def scaled(factor: float) -> Any:
        return types.MethodType(lambda self, x: factor * type(self).forward(self, x), mlp)

    seen = []
    with GenerationManager(model, CONFIG) as manager:
        for factor in (1.0, 0.2, 2.0, 0.3, 1.0):
            mlp.forward = scaled(factor)
            seen.append(served(manager))
            assert seen[-1] == expected(model)
            del mlp.forward
            gc.collect()
        assert served(manager) == expected(model) == seen[0] == seen[-1]
    assert len({str(tokens) for tokens in seen}) == 4


def test_a_marked_forward_that_follows_another_is_noticed() -> None:
    model = tiny_model("Llama")
    mlp = model.model.layers[1].mlp
    before = mlp.forward
    seen = []
    with GenerationManager(model, CONFIG) as manager:
        for factor in (1.0, -2.0, 3.0):
            mlp.forward = per_token(functools.partial(lambda scale, x: scale * before(x), factor))
            seen.append(served(manager))
            assert seen[-1] == expected(model)
    assert seen[0] != seen[1] != seen[2]


def test_a_forward_in_the_memory_of_another_is_noticed() -> None:
    model = tiny_model("Llama")
    mlp = model.model.layers[1].mlp
    states = []
    for _ in range(2):
        mlp.forward = types.MethodType(lambda self, x: x, mlp)
        states.append((id(mlp.forward), ModelSnapshot.of(model)))
        del mlp.forward
    assert states[0][1] != states[1][1]


def test_a_forward_of_another_module_is_refused() -> None:
    """It would compute with the other's state in place of the copy's."""
    model = tiny_model("Llama")
    layers = model.model.layers
    layers[0].mlp.forward = layers[1].mlp.forward
    with pytest.raises(UnsupportedModelError, match=r"LlamaMLP.forward` that is set on `model.layers.0.mlp`"):
        GenerationManager(model)


def test_hooks_that_transformers_leaves_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("Llama")
    with GenerationManager(model, CONFIG) as manager:
        want = served(manager)
        engine = manager.assembly
        model(torch.tensor([PROMPTS[3]]), output_hidden_states=True)
        model.generate(torch.tensor([PROMPTS[3]]), output_attentions=False, **GREEDY)
        model.enable_input_require_grads()
        assert any(module._forward_hooks for module in model.modules())
        assert served(manager) == want
        assert manager.assembly is engine
        with FlopCounterMode(display=False):
            assert served(manager) == want
        assert manager.assembly is engine
        view: Any = manager.assembly.forward.view  # type: ignore[union-attr]
    assert not any(module._forward_hooks for module in make_view(model, None).modules())
    assert not any(module._forward_hooks for module in view.modules())
    assert caplog.text == ""


# Where transformers 5.24 registers forward hooks. Those of `debug_utils` are for looking at a model, on request.
REGISTERED = {
    ("debug_utils.py", "forward_hook"),
    ("integrations/neftune.py", "neftune_post_forward_hook"),
    ("modeling_utils.py", "make_inputs_require_grads"),
    ("utils/output_capturing.py", "output_capturing_hook"),
}


@pytest.mark.skipif(not transformers.__version__.startswith("5.24."), reason="the list is that of transformers 5.24")
def test_the_list_of_transformers_hooks() -> None:
    root = Path(transformers.__file__).parent
    found: set[tuple[str, str]] = set()
    for path in root.rglob("*.py"):
        text = path.read_text()
        if "register_forward_" not in text and "register_module_forward_" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if node.func.attr.startswith("register_") and node.func.attr.endswith(
                ("_forward_hook", "forward_pre_hook")
            ):
                hook = node.args[0]
                found.add((str(path.relative_to(root)), getattr(hook, "attr", getattr(hook, "id", "?"))))
    assert found == REGISTERED
    assert {name for _, name in REGISTERED} - {"forward_hook"} <= NEUTRAL_HOOKS.keys()


def test_a_users_hook_with_a_librarys_name_is_a_users() -> None:
    def output_capturing_hook(*_: Any) -> None:
        pass

    assert not is_neutral(output_capturing_hook)


def test_hooks_inside_of_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("Llama"), lora).eval()
    projection = model.base_model.model.model.layers[0].mlp.up_proj
    wide = torch.randn(96, generator=torch.Generator().manual_seed(7)) * 4
    with GenerationManager(model, CONFIG) as manager:
        before = served(manager)
        for module in (projection, projection.base_layer, projection.lora_A["default"]):
            vector = wide if module is not projection.lora_A["default"] else wide[:4]
            hook = functools.partial(lambda v, module, args, out: out + v, vector)
            handle = module.register_forward_hook(per_token(hook))
            steered = served(manager)
            assert steered == expected(model)
            assert steered != before
            handle.remove()
            handle = module.register_forward_hook(hook)
            with pytest.raises(UnsupportedModelError, match=r"up_proj"):
                manager.submit(PROMPTS[0], **GREEDY)
            handle.remove()
        assert served(manager) == before


def test_a_state_keeps_no_hook_and_no_model() -> None:
    model = tiny_model("Llama")

    class Holder:
        pass

    holder: Any = Holder()
    holder.model = model
    keep = functools.partial(lambda held, *_: None, holder)
    model.model.layers[0].mlp.forward = types.MethodType(keep, model.model.layers[0].mlp)
    model.model.layers[1].register_forward_hook(per_token(keep))
    model.note = types.MethodType(keep, model)
    state = ModelSnapshot.of(model)
    assert state == ModelSnapshot.of(model)
    gone = weakref.ref(holder)
    del holder, model, keep
    gc.collect()
    assert gone() is None
