import threading

import pytest
import torch

from hf_async_batching.side_by_side import side_by_side

CPU = torch.device("cpu")


def test_every_job_runs_in_inference_mode() -> None:
    ran: list[tuple[int, bool]] = []
    side_by_side([lambda i=i: ran.append((i, torch.is_inference_mode_enabled())) for i in range(5)], CPU)  # type: ignore[misc]
    assert sorted(ran) == [(i, True) for i in range(5)]
    side_by_side([], CPU)


def test_a_failure_is_raised() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        side_by_side([lambda: None, fail], CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: jobs on the CPU run one after the other")
def test_jobs_run_at_the_same_time_on_cuda() -> None:
    barrier = threading.Barrier(3)
    side_by_side([lambda: barrier.wait(10) and None] * 3, torch.device("cuda"))  # type: ignore[func-returns-value]
