"""Generated kernels that use programmatic dependent launch wait for their predecessor, or do not use it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_async_batching.devices.pdl import supports_pdl
from hf_async_batching.engine import background_compile
from hf_async_batching.model.compile.pdl_check import (
    foreign_operations,
    generated_code_waits,
    waits,
)
from hf_async_batching.model.compile.regions import UnsafePdlError, inductor_options

WAIT, LAUNCH = "    tl.extra.cuda.gdc_wait()\n", "    tl.extra.cuda.gdc_launch_dependents()\n"
LOAD, STORE = "    tmp0 = tl.load(in_ptr0 + x0)\n", "    tl.store(out_ptr0 + x0, tmp0)\n"


def module(*bodies: str, early: bool = True) -> str:
    """As Inductor writes it."""
    kernel = (
        "triton_poi_{i} = async_compile.triton('triton_poi_{i}', '''\nimport triton\n\n"
        "@triton_heuristics.pointwise(\n    triton_meta={{'device': 0, 'launch_pdl': {early}}},\n)\n"
        "@triton.jit\ndef triton_poi_{i}(in_ptr0, out_ptr0):\n{body}''', device_str='cuda')\n\n"
    )
    return "".join(kernel.format(i=i, body=body, early=early) for i, body in enumerate(bodies))


@pytest.mark.parametrize(
    ("body", "right"),
    [
        (WAIT + LOAD + LAUNCH + STORE, True),
        (LOAD + WAIT + LAUNCH + STORE, True),
        (LOAD + WAIT + STORE + LAUNCH, True),
        (LOAD + LAUNCH + WAIT + STORE, False),
        (LOAD + STORE + WAIT + LAUNCH, False),
        (LOAD + LAUNCH + STORE, False),
        (STORE, False),
    ],
)
def test_one_kernel(body: str, right: bool) -> None:
    assert waits(module(body)) == right
    good = LOAD + WAIT + LAUNCH + STORE
    assert waits(module(good, body)) == waits(module(body, good)) == right


def test_kernels_that_are_not_launched_early_need_no_wait() -> None:
    assert waits(module(LOAD + STORE, STORE, early=False))
    assert waits("def call(args):\n    return args\n")


CALL = (
    "\n\nclass Runner:\n    def call(self, args):\n"
    "        # buf0 = [call_function[target=torch.ops.aten.sort.stable](args)]\n"
)


@pytest.mark.parametrize(
    ("call", "right"),
    [
        ("buf1 = torch.ops.hf_async_batching.linear.default(buf0, arg3_1, None, arg4_1)", True),
        ("extern_kernels.mm(buf0, arg1_1, out=buf1)", True),
        ("extern_kernels.addmm(arg0_1, buf0, arg1_1, alpha=1, beta=1, out=buf1)", True),
        ("assert_size_stride(buf1, (1, s37), (s37, 1), 'torch.ops.aten.sort.stable')", True),
        # What a sort or a histogram writes reaches kernels behind nodes that launch nothing.
        ("buf1 = torch.ops.aten.sort.stable(buf0, stable=False, dim=0)", False),
        ("buf1 = torch.ops.aten._grouped_mm.default(buf0, arg1_1, buf2)", False),
        ("buf1 = torch.ops.aten.view_as_complex.default(buf0)", False),
        ("buf1 = torch.ops.some_library.kernel(buf0)", False),
        ("extern_kernels.convolution(buf0, arg1_1)", False),
    ],
)
def test_none_is_launched_early_behind_operations_of_others(call: str, right: bool) -> None:
    good = LOAD + WAIT + LAUNCH + STORE
    assert waits(module(good) + CALL + f"        {call}\n") == right
    assert bool(foreign_operations(CALL + f"        {call}\n")) != right
    elsewhere = "triton_poi = kernels.load(triton_meta={'launch_pdl': True})\n"
    assert waits(elsewhere + CALL + f"        {call}\n") == right, "also where kernels have files of their own"
    assert waits(module(LOAD + STORE, early=False) + CALL + f"        {call}\n"), "none is launched early"


def test_a_kernel_of_the_user_is_foreign() -> None:
    users = module(LOAD + STORE, early=False).replace("pointwise", "user_autotune")
    assert waits(users)
    assert not waits(users + module(LOAD + WAIT + LAUNCH + STORE))


def test_all_generated_modules_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codecache import PyCodeCache

    files = [tmp_path / "good.py", tmp_path / "bad.py"]
    for file, body in zip(files, (LOAD + WAIT + LAUNCH + STORE, STORE), strict=True):
        file.write_text(module(body))
    modules = [SimpleNamespace(__file__=str(files[0]))]
    monkeypatch.setattr(PyCodeCache, "modules", modules)
    assert generated_code_waits()
    modules.append(SimpleNamespace(__file__=str(files[1])))
    assert not generated_code_waits()
    modules[1] = SimpleNamespace(__file__=str(tmp_path / "gone.py"))
    assert not generated_code_waits(), "nothing can be said"
    monkeypatch.delattr(PyCodeCache, "modules")
    assert not generated_code_waits()


def test_unsafe_code_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []

    def compile_checked(forward: object, backend: object, *, page_size: int, pdl: bool) -> None:
        tried.append(pdl)
        if pdl:
            raise UnsafePdlError("no wait")

    undone: list[int] = []
    made: Any = SimpleNamespace(name="Model", device=torch.device("cpu"), uncompile=lambda: undone.append(len(tried)))
    monkeypatch.setattr(background_compile, "compile_checked", compile_checked)
    monkeypatch.setattr(background_compile, "supports_pdl", lambda device: True)
    config: Any = SimpleNamespace(page_size=16, settings=SimpleNamespace(attention_backend="torch"))
    background_compile._compile(made, config)
    assert tried == [True, False]
    assert undone == [1]


def test_the_setting_has_its_name() -> None:
    from torch._inductor import config

    assert not supports_pdl(torch.device("cpu"))
    assert inductor_options(True)["triton.enable_pdl"] and not inductor_options()["triton.enable_pdl"]
    for name in inductor_options():
        assert name in config.get_config_copy(), "Inductor would refuse it"
