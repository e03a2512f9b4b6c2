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
EXPERTS = {"group_kernel", "product_kernel", "combine_kernel", "topk_kernel"}
NIBBLES = {"nibble_dot_kernel", "nibble_vector_kernel"}
RECURRENT = {
    "delta_rule_kernel",
    "chunk_matrices_kernel",
    "delta_rule_chunks_kernel",
    "mamba2_kernel",
    "mamba2_chunks_kernel",
}
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


Job = tuple[list[int], list[str], list[str]]  # capabilities, dtypes, launches
JOBS: dict[str, Job] = {
    # The card with the least shared memory; the oldest card's code is the same. Newer ones: "pdl", and the slow test.
    "attention": ([89], ["bfloat16"], ["decode split llama", "prefill llama", "write llama"]),
    "oldest": ([80], ["bfloat16"], ["decode split llama", "skinny"]),
    "experts": ([89], ["bfloat16"], ["experts few", "routers"]),
    "mxfp4": ([90], ["bfloat16"], ["mxfp4"]),
    "nibbles": ([80], ["float16"], ["nibbles"]),
    "nibbles pdl": ([90], ["bfloat16"], ["nibbles early"]),
    "words": ([80], ["float16"], ["words early"]),
    "words pdl": ([90], ["bfloat16"], ["words early"]),
    "fp8": ([90], ["bfloat16"], ["fp8"]),
    "tables": ([90], ["bfloat16"], ["tables", "largest"]),
    "sampling": ([90], ["bfloat16"], ["sampling odd"]),
    "recurrent": ([89, 90], ["bfloat16"], ["delta rule wide", "mamba2 wide"]),
    "recurrent large": ([80, 90, 100], ["bfloat16"], ["delta rule large"]),
    "pdl": ([90, 100], ["float16"], ["decode pdl", "prefill early", "skinny early"]),
    "experts pdl": ([90, 100], ["bfloat16"], ["experts early"]),
    "pdl apart": ([90], ["float16"], ["decode apart pdl"]),
}


def run_jobs(jobs: list[Job]) -> tuple[bool, list[list[dict[str, object]]]]:
    """The kernels of each job, compiled in a process of its own: in this one Triton may interpret."""
    command = [sys.executable, "-W", "ignore", "-m", "support.ahead_of_time", json.dumps(jobs)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # A compiler that fails prints its whole input there, too.
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('{"job"', '{"same code'))]
    same = lines.pop(0)["same code beside prompts"]
    return same, [[line for line in lines if line["job"] == job] for job in range(len(jobs))]


@pytest.fixture(scope="module")
def ran() -> tuple[bool, dict[str, list[dict[str, object]]]]:
    same, compiled = run_jobs(list(JOBS.values()))
    return same, dict(zip(JOBS, compiled, strict=True))


@pytest.fixture(scope="module")
def compiled(ran: tuple[bool, dict[str, list[dict[str, object]]]]) -> dict[str, list[dict[str, object]]]:
    """The kernels of each job. One process compiles all of them: imports take seconds."""
    return ran[1]


def check(compiled: list[dict[str, object]], kernels: set[str]) -> None:
    assert {kernel["kernel"] for kernel in compiled} == kernels
    failed = [kernel for kernel in compiled if "failed" in kernel]
    assert not failed, failed[:3]
    too_large = [kernel for kernel in compiled if kernel["shared"] > SHARED_MEMORY[kernel["capability"]]]  # type: ignore[index, operator]
    assert not too_large, too_large[:3]


def test_representative_kernels(compiled: dict[str, list[dict[str, object]]]) -> None:
    assert len(compiled["attention"]) == 3
    check(compiled["attention"], {"decode_kernel", "prefill_kernel", "write_kv_kernel"})
    check(compiled["oldest"], {"decode_kernel", "skinny_linear_kernel"})


def test_kernels_of_other_modules(compiled: dict[str, list[dict[str, object]]]) -> None:
    check(compiled["nibbles"], NIBBLES)
    check(compiled["fp8"], {"fp8_block_kernel"})
    check([*compiled["words"], *compiled["words pdl"]], {"word_kernel"})
    check(compiled["experts"], EXPERTS)
    check(compiled["mxfp4"], {"group_kernel", "product_kernel", "combine_kernel", "expand_kernel"})
    check(compiled["tables"], {"begin_decode_kernel", "commit_decode_kernel", "parts_kernel", "compare_kernel"})


def test_sampling_kernels(compiled: dict[str, list[dict[str, object]]]) -> None:
    check(compiled["sampling"], SAMPLING)


def test_kernels_of_layers_with_states(compiled: dict[str, list[dict[str, object]]]) -> None:
    assert len(compiled["recurrent"]) == 10
    check(compiled["recurrent"], RECURRENT)
    check(compiled["recurrent large"], {name for name in RECURRENT if "mamba2" not in name})


def test_programmatic_dependent_launch(compiled: dict[str, list[dict[str, object]]]) -> None:
    early = compiled["pdl"]
    check(early, {"decode_kernel", "prefill_kernel", "skinny_linear_kernel"})
    assert all(kernel["lets"] == 1 and kernel["waits first"] for kernel in early)
    # At its start, or beside prompts before it stores. Prompts are launched the ordinary way.
    waits = {"decode_kernel": 2, "prefill_kernel": 0, "skinny_linear_kernel": 1}
    assert all(kernel["waits"] == waits[str(kernel["kernel"])] for kernel in early)
    nibbles = compiled["nibbles pdl"]
    check(nibbles, NIBBLES)
    assert all((kernel["waits"], kernel["lets"], kernel["waits first"]) == (1, 1, True) for kernel in nibbles)
    for name in ("fp8", "words pdl"):  # half of these launches are early
        early = [kernel for kernel in compiled[name] if kernel["lets"]]
        assert len(early) == len(compiled[name]) / 2
        assert all(kernel["waits"] == 1 and kernel["waits first"] for kernel in early)
    experts = compiled["experts pdl"]
    check(experts, EXPERTS | {"activate_kernel"})
    assert all((kernel["waits"], kernel["lets"], kernel["waits first"]) == (1, 1, True) for kernel in experts)
    # Programs without work store, too, where another kernel combines.
    assert [kernel["waits"] for kernel in compiled["pdl apart"] if kernel["kernel"] == "decode_kernel"] == [3]


def test_beside_prompts_the_same_code_runs(ran: tuple[bool, dict[str, list[dict[str, object]]]]) -> None:
    """Nothing is compiled while requests are served."""
    assert ran[0]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("capability", list(SHARED_MEMORY))
def test_every_kernel(capability: int) -> None:
    _, (compiled,) = run_jobs([([capability], ["float16", "bfloat16"], [])])
    attention = {"decode_kernel", "combine_kernel", "prefill_kernel", "write_kv_kernel"}
    others = {"skinny_linear_kernel", "begin_decode_kernel", "commit_decode_kernel", "parts_kernel", "compare_kernel"}
    check(compiled, attention | others | SAMPLING | EXPERTS | NIBBLES | RECURRENT | {"activate_kernel"})
