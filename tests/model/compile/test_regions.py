"""Compiled layers: the same logits, one compilation for all layers and all sizes, and a change-over while serving."""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, ragged_prompts, tiny_model
from torch._dynamo.utils import counters

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks import parity_check
from hf_async_batching.core.request import Request
from hf_async_batching.engine import background_compile
from hf_async_batching.engine.background_compile import compile_for
from hf_async_batching.engine.builder import EngineParts, build_engine
from hf_async_batching.model.compile import regions as compiled_regions
from hf_async_batching.model.compile.regions import EXAMPLE_TOKENS, UnsafePdlError, region_modules
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.small.length_thresholds import makes_choices
from hf_async_batching.model.view.model_view import make_view

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


QUICK = ("Llama", "Gemma2", "StableLm", "Mixtral")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_every_family_compiles_to_the_same_logits(family: str) -> None:
    forward = PackedForward(tiny_model(family), fused=True)
    parity_check.compile_checked(forward, make_backend("auto", CPU), "eager")
    # Two kinds of layers at most (sliding and full attention), the final norm, and one or two sets of frequencies.
    # With a router all of them again, for a token alone.
    assert 2 <= graphs() <= 5 * (1 + makes_choices(forward.view.config))


def test_regions_are_the_layers_and_the_modules_beside_them() -> None:
    forward = PackedForward(tiny_model("Llama"))
    found = [
        [type(module).__name__ for module in group]
        for group in region_modules(forward.view, set(forward._paged_layers))
    ]
    assert found == [["LlamaDecoderLayer"] * 2, ["LlamaRMSNorm"], ["LlamaRotaryEmbedding"]]


def serve(running: EngineParts, prompts: list[list[int]], new: int) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        running.engine.add(Request(str(i), tuple(prompt), new))
    with torch.inference_mode():
        while running.engine.has_work:
            for emission in running.engine.step():
                if emission.token is not None:
                    tokens[emission.request_id].append(emission.token)
    return tokens


def test_no_recompilation_in_steady_state(quick_compiler: None) -> None:
    model = tiny_model("Qwen3", num_hidden_layers=4)
    running = build_engine(
        model, BatchingConfig(compile=True, fuse_weights=True, max_rows=6, max_batch_tokens=32, depth=2)
    )
    prompts = ragged_prompts(9, 60)
    want = serve(running, prompts, 10)
    with torch.inference_mode():
        assert compile_for(make_view(model, None), weakref.ref(running))
    compiled = graphs()
    assert compiled == 3, "four layers share one graph"
    # Steps of 1 to 32 tokens, prompts and decodes, one row and six.
    assert serve(running, prompts, 10) == want
    assert serve(running, prompts[:1], 5) == {"0": want["0"][:5]}
    assert running.runner._forward._compiled
    assert graphs() == compiled


@torch._dynamo.config.patch(recompile_limit=1)
def test_engines_do_not_share_a_limit_of_variants(quick_compiler: None) -> None:
    """Dynamo gives up beyond some variants of one code object: many models in one process must not reach it."""
    for i in range(3):
        model = tiny_model("Llama", num_hidden_layers=1, intermediate_size=32 + 16 * i)
        running = build_engine(model, BatchingConfig(compile=True, max_rows=2, max_batch_tokens=16))
        with torch.inference_mode():
            assert compile_for(make_view(model, None), weakref.ref(running)), f"model {i}"


def test_an_engine_that_is_gone_gets_nothing(quick_compiler: None) -> None:
    model = tiny_model("Llama")
    running = build_engine(model, BatchingConfig(compile=True, max_rows=2, max_batch_tokens=16))
    gone = weakref.ref(running)
    del running
    assert not compile_for(model, gone)


def test_wrong_logits_are_not_served(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def miscompile(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            return tuple(out * 1.01 if out.is_floating_point() else out for out in module(*args))

        return run

    compile_checked = background_compile.compile_checked
    monkeypatch.setattr(
        background_compile, "compile_checked", lambda f, b, **options: compile_checked(f, b, miscompile, **options)
    )
    model = tiny_model("Llama")
    running = build_engine(model, BatchingConfig(compile=True, max_rows=4, max_batch_tokens=32))
    plain = running.runner._forward
    with torch.inference_mode():
        assert not compile_for(make_view(model, None), weakref.ref(running))
    assert "runs uncompiled" in caplog.text
    serve(running, [[1, 2, 3]], 2)
    assert running.runner._forward is plain


def off_by(factor: float, rows: Any) -> Callable[..., Any]:
    """A compiler whose code is wrong for some tokens."""
    calls = itertools.count()

    def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            outs = [out.clone() for out in module(*args)]
            layer = len([node for node in module.graph.nodes if node.op == "call_function"]) > 20
            wrong = rows
            if isinstance(rows, str):
                wrong = slice(0, 0)
                if layer:
                    first = 7 * next(calls) % 30
                    wrong = slice(first, first + 3)
            for out in outs:
                if out.is_floating_point() and out.dim() == 3:
                    out[:, wrong] *= factor
            return tuple(outs)

        return run

    return compiler


@pytest.mark.parametrize(
    ("factor", "rows", "chooses", "right"),
    [
        (1.0, slice(None), True, True),
        (1.0, slice(None), False, False),  # nothing rounds to something else there
        (3.0, "another in each layer", True, True),
        (3.0, slice(32, None), True, False),  # the last tile
        (3.0, slice(20), True, False),
        (1.3, slice(None), True, False),
        (float("nan"), slice(None), True, False),
    ],
)
def test_choices_that_rounding_decides_are_no_miscompilation(
    factor: float, rows: Any, chooses: bool, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_check, "relative_error", lambda got, want: 0.49)
    monkeypatch.setattr(parity_check, "makes_choices", lambda config: chooses)
    forward = PackedForward(tiny_model("Llama", num_hidden_layers=4).to(torch.bfloat16))
    prompt = off_by(factor, rows)
    if right:
        compile_only_prompts(forward, prompt)
        assert all(region.compared is None for region in forward.regions)
        return
    with pytest.raises(RuntimeError, match=r"differ by 0.49 .* no router's choice"):
        compile_only_prompts(forward, prompt)


def compile_only_prompts(forward: PackedForward, compiler: Callable[..., Any]) -> None:
    """Compiled code is right for the two tokens of a decode step."""

    def of_prompts(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        wrong = compiler(module, inputs)
        return lambda *args: (
            wrong(*args)
            if any(isinstance(a, torch.Tensor) and EXAMPLE_TOKENS in a.shape for a in args)
            else module(*args)
        )

    parity_check.compile_checked(forward, make_backend("auto", CPU), of_prompts)


def single_steps(forward: PackedForward, compiler: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each run of compiled code in a prompt of one token, after compiling with `compiler`."""
    sizes: list[int] = []

    def noting(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made = compiler(module, inputs)

        def run(*args: Any) -> Any:
            sizes.append(compiled_regions._tokens(args))
            return made(*args)

        return run

    parity_check.compile_checked(forward, make_backend("auto", CPU), noting)
    sizes.clear()
    pages = parity_check.PagedCache(forward.layers, num_pages=2, page_size=16, device=CPU)
    forward.bind(pages, make_backend("auto", CPU))
    table, one = torch.zeros(2, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    context = parity_check.DecodeContext(table, one, 0 * one, one)
    with torch.inference_mode():
        forward(parity_check.StepInputs(one.long(), 0 * one.long(), None, context))
    return sizes


@pytest.mark.parametrize(("family", "regions"), [("Mixtral", 4), ("Llama", 0)])
def test_a_token_alone_has_compiled_code_where_no_other_row_decodes_beside_it(
    family: str, regions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PackedForward(tiny_model(family, num_hidden_layers=2))
    sizes = single_steps(forward, lambda module, _: module, monkeypatch)
    # The frequencies, two layers and the final norm.
    assert sizes == [1] * regions
    assert all(region.single == bool(regions) for region in forward.regions)


def test_wrong_code_for_a_token_alone_never_runs(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def wrong(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return lambda *args: tuple(
            out * 1.5 if out.is_floating_point() and out.dim() == 3 and out.shape[1] == 1 else out
            for out in module(*args)
        )

    caplog.set_level("INFO")
    forward = PackedForward(tiny_model("Mixtral", num_hidden_layers=2))
    assert single_steps(forward, wrong, monkeypatch) == []
    assert "a step of one token runs uncompiled: compiled logits" in caplog.text


@pytest.mark.parametrize("steady", [True, False])
def test_a_race_that_one_token_shows_ends_early_launches(steady: bool) -> None:
    """Code that is wrong each time is left out; if the results also change from run to run, nothing may be early."""
    numbers = itertools.count(1)

    def wrong(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            factor = 1.5 if steady else 1 + 0.1 * next(numbers)
            return tuple(
                out * factor if out.is_floating_point() and out.dim() == 3 and out.shape[1] == 1 else out
                for out in module(*args)
            )

        return run

    forward, backend = PackedForward(tiny_model("Mixtral", num_hidden_layers=2)), make_backend("auto", CPU)
    if steady:
        parity_check.compile_checked(forward, backend, wrong, pdl=True)
        assert not any(region.single for region in forward.regions)
        return
    with pytest.raises(UnsafePdlError, match="from run to run"):
        parity_check.compile_checked(forward, backend, wrong, pdl=True)


def test_a_token_alone_that_the_compiler_refuses_runs_uncompiled(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refuses(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if any(isinstance(a, torch.Tensor) and a.dim() == 3 and a.shape[1] == 1 for a in inputs):
            raise ValueError("not this one")
        return module

    caplog.set_level("INFO")
    forward = PackedForward(tiny_model("Mixtral", num_hidden_layers=2))
    assert single_steps(forward, refuses, monkeypatch) == []
    assert "not this one" in caplog.text


def test_code_that_must_not_be_launched_early_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its indices may not be written yet: one run of it can end the process's context."""
    ran: list[bool] = []

    def generates(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(True)
            return module(*args)

        return run

    monkeypatch.setattr(compiled_regions, "generated_code_waits", lambda: False)
    forward, backend = PackedForward(tiny_model("Llama")), make_backend("auto", CPU)
    with pytest.raises(UnsafePdlError):
        parity_check.compile_checked(forward, backend, generates, pdl=True)
    assert not ran
    forward.uncompile()
    assert not any("forward" in vars(module) for module in forward.view.modules())
    parity_check.compile_checked(forward, backend, generates, pdl=False)
    assert ran


def test_serving_goes_on_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_checked = background_compile.compile_checked
    may_compile, compiling = threading.Event(), threading.Event()

    def slowly(forward: PackedForward, backend: Any, **options: Any) -> None:
        compiling.set()
        assert may_compile.wait(300)
        compile_checked(forward, backend, "eager", **options)

    monkeypatch.setattr(background_compile, "compile_checked", slowly)
    model = tiny_model("Llama")
    prompt = list(range(1, 9))
    want = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 8:].tolist()
    config = BatchingConfig(compile=True, fuse_weights=True, max_rows=4, max_batch_tokens=32, depth=2)
    with GenerationManager(model, config) as manager:
        assert manager.submit(prompt, max_new_tokens=12, do_sample=False).result(60).token_ids == want
        assert compiling.wait(60)
        assert not manager.assembly.runner._forward._compiled
        handle = manager.submit(prompt, max_new_tokens=12, do_sample=False)
        may_compile.set()
        manager.warmup()
        assert manager.assembly.runner._forward._compiled
        assert handle.result(60).token_ids == want
        assert manager.submit(prompt, max_new_tokens=12, do_sample=False).result(60).token_ids == want


def test_compiling_can_be_switched_off() -> None:
    model = tiny_model("Llama")
    with GenerationManager(model, BatchingConfig(compile=False, max_rows=2, max_batch_tokens=16)) as manager:
        manager.warmup()
        assert manager._engines._compile is None
        assert not manager.assembly.runner._forward._compiled


def test_warming_up_can_measure_kernels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    tuned: list[list[int]] = []
    monkeypatch.setattr(PackedForward, "tune", lambda self, batches: tuned.append(list(batches)))
    prompt = list(range(1, 9))
    want = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, 8:].tolist()
    with GenerationManager(model, BatchingConfig(max_rows=2, max_batch_tokens=16)) as manager:
        manager.warmup()
        assert not tuned
        manager.warmup(tune=True)
        assert len(tuned) == 1
        assert manager.submit(prompt, max_new_tokens=4, do_sample=False).result(60).token_ids == want


def test_an_error_of_a_warm_up_reaches_its_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: PackedForward, batches: list[int]) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(PackedForward, "tune", fail)
    with GenerationManager(tiny_model("Llama"), BatchingConfig(max_rows=2, max_batch_tokens=16)) as manager:
        with pytest.raises(RuntimeError, match="no room"):
            manager.warmup(tune=True)
        assert len(manager.submit([1, 2, 3], max_new_tokens=2, do_sample=False).result(60).token_ids) == 2
