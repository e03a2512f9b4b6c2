"""Every kernel compiles for cards that are not here, and fits their shared memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

# Bytes of shared memory that one program may use, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SAMPLING = {
    "group_maxima_kernel",
    "bounds_kernel",
    "perturbed_kernel",
    "accept_kernel",
    "draw_bounded_kernel",
    "mark_seen_kernel",
}
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def compile_kernels(capabilities: list[int], dtypes: list[str], launches: list[str]) -> list[dict[str, object]]:
    """In a process of its own: in this one Triton may interpret."""
    command = [sys.executable, "-W", "ignore", "-m", "support.ahead_of_time", *map(str, capabilities)]
    command += ["--dtypes", *dtypes]
    if launches:
        command += ["--launches", *launches]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # A compiler that fails prints its whole input there, too.
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"launch"')]


def check(compiled: list[dict[str, object]], kernels: set[str]) -> None:
    assert {kernel["kernel"] for kernel in compiled} == kernels
    failed = [kernel for kernel in compiled if "failed" in kernel]
    assert not failed, failed[:3]
    too_large = [kernel for kernel in compiled if kernel["shared"] > SHARED_MEMORY[kernel["capability"]]]  # type: ignore[index, operator]
    assert not too_large, too_large[:3]


def test_representative_kernels() -> None:
    launches = ["decode split llama", "prefill llama", "write llama"]
    kernels = {"decode_kernel", "prefill_kernel", "write_kv_kernel"}
    compiled = compile_kernels([80, 89, 90, 100], ["bfloat16"], launches)
    assert len(compiled) == 12
    check(compiled, kernels)


def test_kernels_of_other_modules() -> None:
    compiled = compile_kernels([80, 89, 90, 100], ["bfloat16"], ["skinny", "tables", "largest"])
    kernels = {"skinny_linear_kernel", "begin_decode_kernel", "commit_decode_kernel", "parts_kernel", "compare_kernel"}
    check(compiled, kernels)


def test_sampling_kernels() -> None:
    check(compile_kernels([90], ["bfloat16"], ["sampling"]), SAMPLING)


def test_programmatic_dependent_launch() -> None:
    compiled = compile_kernels([90, 100], ["float16"], ["decode pdl", "prefill early", "skinny early"])
    check(compiled, {"decode_kernel", "prefill_kernel", "skinny_linear_kernel"})
    assert all(kernel["lets"] == 1 and kernel["waits first"] for kernel in compiled)
    # At its start, or beside prompts before it stores. Prompts are launched the ordinary way.
    waits = {"decode_kernel": 2, "prefill_kernel": 0, "skinny_linear_kernel": 1}
    assert all(kernel["waits"] == waits[str(kernel["kernel"])] for kernel in compiled)
    # Whose programs without work store, too, where another kernel combines.
    apart = compile_kernels([90], ["float16"], ["decode apart pdl"])
    assert [kernel["waits"] for kernel in apart if kernel["kernel"] == "decode_kernel"] == [3]


def test_beside_prompts_the_same_code_runs() -> None:
    """Nothing is compiled while requests are served."""
    code = """
import functools, torch
from support.ahead_of_time import SHAPES, decode, recording
with recording("x") as launches:
    for beside in (False, True):
        decode(SHAPES["llama"], torch.float16, splits=3, pdl=True, beside_prefill=beside)
one, other = launches
assert (one.signature, one.constants, one.attributes) == (other.signature, other.constants, other.attributes)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment())


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("capability", list(SHARED_MEMORY))
def test_every_kernel(capability: int) -> None:
    compiled = compile_kernels([capability], ["float16", "bfloat16"], [])
    attention = {"decode_kernel", "combine_kernel", "prefill_kernel", "write_kv_kernel"}
    others = {"skinny_linear_kernel", "begin_decode_kernel", "commit_decode_kernel", "parts_kernel", "compare_kernel"}
    check(compiled, attention | others | SAMPLING)
