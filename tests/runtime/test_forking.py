"""A forked process: engines of its own on a CPU, and an error at once for what is its parent's alone; never a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.forked_python import run_python

from hf_async_batching import ForkedProcessError
from hf_async_batching.runtime import forking

PREAMBLE = """
import os, signal, sys, threading, time, warnings
import torch
from support.tiny_models import tiny_model
import hf_async_batching
from hf_async_batching import ForkedProcessError, GenerationManager, BatchingConfig
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
model = tiny_model("Llama")
ids = torch.tensor([[5, 6, 7]])
call = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
expected = model.generate(ids, **call)

def in_child(job, seconds=90):
    "How a forked process ends that runs `job`; a hang ends with the alarm."
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        code = 1
        try:
            job()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(code: str, threads: int = 1) -> None:
    """Run in a process of its own: what forks has few threads then."""
    code = PREAMBLE + textwrap.dedent(code)
    if threads == 1:
        done = run_python(code)
    else:  # torch reads the number when it is imported
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]),
                "PATH": "/usr/bin:/bin",
                "OMP_NUM_THREADS": str(threads),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_has_an_engine_of_its_own(threads: int) -> None:
    """Also where the parent's threads have computed with several OpenMP threads, which a child must not wait for."""
    run(
        """
        big = torch.randn(400, 400)
        (big @ big).exp().sum()
        assert torch.equal(hf_async_batching.generate(model, ids, **call), expected)
        manager = GenerationManager(model, BatchingConfig(page_size=16))
        timed = manager.submit([5, 6, 7], max_time=1000.0, **call)
        assert timed.result(60).token_ids == expected[0, 3:].tolist()
        live = manager.submit([8, 9], max_new_tokens=400, do_sample=False, eos_token_id=None)
        judged = manager.submit([8, 9], max_new_tokens=400, do_sample=False, eos_token_id=None, max_time=1000.0)

        def job():
            assert torch.equal(hf_async_batching.generate(model, ids, **call), expected)
            assert torch.equal(model.generate(ids, **call, custom_generate=manager.bind()), expected)
            again = manager.submit([5, 6, 7], max_time=1000.0, **call)
            assert again.result(60).token_ids == expected[0, 3:].tolist()
            assert timed.result().token_ids == again.result().token_ids, "what had ended before is there"
            for handle in (live, judged):
                for wait in (handle.result, lambda: list(handle), lambda: handle.add_done_callback(print)):
                    try:
                        wait()
                    except ForkedProcessError as error:
                        assert "submitted before this process was forked" in str(error)
                    else:
                        raise AssertionError("a request of the parent's")
                handle.cancel()
            assert manager.stats().running == 0
            manager.close()

        assert in_child(job) == 0
        assert in_child(lambda: in_child(job) and 1 / 0) == 0, "nor in a child's child"
        assert len(live.result(120).token_ids) == len(judged.result(120).token_ids) == 400
        assert torch.equal(hf_async_batching.generate(model, ids, **call), expected)
        """,
        threads,
    )


def test_locks_that_others_hold_at_the_fork_are_free_in_the_child() -> None:
    run(
        """
        manager = hf_async_batching.get_manager(model)
        hf_async_batching.generate(model, ids, **call)
        from hf_async_batching import registry
        from hf_async_batching.runtime import reentrancy
        from hf_async_batching.linear import packing
        held, go_on = threading.Event(), threading.Event()
        waiting = manager.submit([8, 9], max_new_tokens=400, do_sample=False, eos_token_id=None)
        worker = manager._engines.thread

        def hold():
            with manager._engines._lock, manager._criteria_thread._lock, manager._embeddings._lock:
              with registry._lock, packing._packing, reentrancy._lock:
                with waiting._changed, waiting._done._cond, worker._changed:
                    held.set()
                    go_on.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()

        def job():
            assert torch.equal(hf_async_batching.generate(model, ids, **call), expected)
            manager.submit([5, 6, 7], max_time=1000.0, **call).result(60)
            waiting.cancel()
            try:
                waiting.result(1)
            except ForkedProcessError:
                manager.close()
                return
            raise AssertionError

        code = in_child(job)
        go_on.set()
        thread.join()
        assert code == 0
        """
    )


def test_waits_of_every_kind_say_that_the_request_is_the_parents() -> None:
    """A batch with processors, a request with some, an iteration over tokens, a run over rows."""
    run(
        """
        import asyncio
        from transformers import LogitsProcessor
        from hf_async_batching import generate_dataset

        class Nothing(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return scores

        manager = GenerationManager(model, BatchingConfig(page_size=16))
        group = manager.make_request([8, 9], max_new_tokens=400, do_sample=False, eos_token_id=None)
        import dataclasses
        from hf_async_batching.host_decoding.token_chooser import TokenChooser
        ids = torch.tensor([[8, 9]])
        chooser = TokenChooser([Nothing()], ids, do_sample=False, seeds=[0], lengths=[2], logits=False)
        inner, = manager.submit_group([dataclasses.replace(group, chooser=chooser, group="g")])
        first = inner.next_logits()
        outer = manager.submit(
            [8, 9], max_new_tokens=400, do_sample=False, eos_token_id=None, logits_processor=[Nothing()]
        )
        tokens, later = iter(outer), aiter(outer)
        next(tokens)
        rows = generate_dataset(
            manager, ({"prompt": [5, 6 + i]} for i in range(8)), prompt="prompt", max_new_tokens=5, eos_token_id=None,
        )
        next(rows)

        async def anext_of():
            await anext(later)
            while True:
                await anext(later)

        def job():
            waits = {
                "logits": inner.next_logits,
                "result": outer.result,
                "iteration": lambda: list(tokens),
                "asynchronous iteration": lambda: asyncio.run(anext_of()),
                "rows": lambda: list(rows),
            }
            for what, wait in waits.items():
                try:
                    wait()
                except ForkedProcessError as error:
                    assert "before this process was forked" in str(error), what
                else:
                    raise AssertionError(what)

        assert in_child(job, 60) == 0
        inner.choose([(inner, 5)])
        assert inner.next_logits().shape == first.shape, "the parent goes on"
        assert len(list(rows)) == 7
        """
    )


def test_map_with_several_processes(tmp_path: Path) -> None:
    run(
        f"""
        from datasets import Dataset
        assert torch.equal(hf_async_batching.generate(model, ids, **call), expected)
        rows = Dataset.from_dict({{"prompt": [[5 + i, 6, 7] for i in range(6)]}})

        def ask(row):
            out = model.generate(torch.tensor([row["prompt"]]), **call, custom_generate=hf_async_batching.generate)
            return {{"out": out[0].tolist()}}

        signal.alarm(200)
        done = rows.map(ask, num_proc=2, new_fingerprint="iso", cache_file_name={str(tmp_path / "cache.arrow")!r})
        want = [model.generate(torch.tensor([row["prompt"]]), **call)[0].tolist() for row in rows]
        assert done["out"] == want
        """
    )


def test_a_gpu_in_a_child_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    forking.check_device(cuda)
    monkeypatch.setattr(forking, "_forks", 1)
    forking.check_device(cuda)  # the parent has not used one
    monkeypatch.setattr(forking, "_cuda_in_parent", True)
    forking.check_device(cpu)
    with pytest.raises(ForkedProcessError, match='"spawn"'):
        forking.check_device(cuda)


def test_jobs_of_a_child_run_in_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    here = threading.current_thread()
    assert forking.in_fresh_thread(threading.current_thread) is here
    monkeypatch.setattr(forking, "_forks", 1)
    assert forking.in_fresh_thread(threading.current_thread) is not here
    with pytest.raises(ZeroDivisionError):
        forking.in_fresh_thread(lambda: 1 / 0)
