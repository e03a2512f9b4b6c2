import _thread
import threading
import time

import pytest
import torch

from hf_async_batching.devices.parallel import run_in_threads, run_parallel

CPU = torch.device("cpu")


def test_every_job_runs_in_inference_mode() -> None:
    ran: list[tuple[int, bool]] = []
    run_parallel([lambda i=i: ran.append((i, torch.is_inference_mode_enabled())) for i in range(5)], CPU)  # type: ignore[misc]
    assert sorted(ran) == [(i, True) for i in range(5)]
    run_parallel([], CPU)


def test_a_failure_is_raised() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_parallel([lambda: None, fail], CPU)


def test_three_threads_run_all_jobs() -> None:
    barrier, ran = threading.Barrier(3), []

    def job(number: int) -> None:
        if number < 3:
            barrier.wait(30)  # three at the same time
        ran.append((number, threading.current_thread()))

    run_in_threads([lambda i=i: job(i) for i in range(7)])  # type: ignore[misc]
    assert sorted(number for number, _ in ran) == list(range(7))
    assert len({thread for _, thread in ran}) == 3
    run_in_threads([])


def test_all_jobs_end_before_the_first_failure_is_raised() -> None:
    ended: list[str] = []

    def fail(after: float, error: Exception) -> None:
        time.sleep(after)
        ended.append(str(error))
        raise error

    jobs = [lambda: fail(0.1, ValueError("slow")), lambda: fail(0, KeyError("quick")), lambda: ended.append("fine")]
    with pytest.raises(ValueError, match="slow"):
        run_in_threads(jobs)
    assert sorted(ended) == ["'quick'", "fine", "slow"]


def test_its_threads_are_no_daemons_in_a_daemon_either() -> None:
    seen: list[bool] = []
    jobs = [lambda: seen.append(threading.current_thread().daemon)]
    daemon = threading.Thread(target=lambda: run_in_threads(list(jobs)), daemon=True)
    daemon.start()
    daemon.join(30)
    assert seen == [False]


def test_who_interrupts_it_leaves_nothing_running() -> None:
    ran: list[str] = []
    barrier = threading.Barrier(3)

    def slow(interrupt: bool) -> None:
        barrier.wait(30)
        if interrupt:
            _thread.interrupt_main()
        time.sleep(0.3)
        ran.append("begun")

    jobs = [lambda i=i: slow(i == 2) for i in range(3)] + [lambda: ran.append("later")] * 5  # type: ignore[misc]
    with pytest.raises(KeyboardInterrupt):
        run_in_threads(jobs)
    assert ran == ["begun"] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: jobs on the CPU run one after the other")
def test_jobs_run_at_the_same_time_on_cuda() -> None:
    barrier = threading.Barrier(3)
    run_parallel([lambda: barrier.wait(10) and None] * 3, torch.device("cuda"))  # type: ignore[func-returns-value]
