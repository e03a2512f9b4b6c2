"""`--sampling`: what it accepts, and that it reaches every request."""

from __future__ import annotations

import pytest

from hf_async_batching.bench.sampling_option import SamplingOption
from hf_async_batching.bench.workloads import make_workload
from hf_async_batching.cli.main import main


def test_all_fields_reach_every_request() -> None:
    option = SamplingOption.parse("temperature=0.8, top_k=50,top_p=0.95,repetition_penalty=1.1,seed=40")
    workload = option.of(make_workload("small", 100, rows=3, prompt=4, new=5))
    for index, request in enumerate(workload.first):
        sampling = request.sampling
        assert (sampling.do_sample, sampling.temperature, sampling.top_k, sampling.top_p) == (True, 0.8, 50, 0.95)
        assert sampling.seed == 40 + index
        assert request.logits.repetition_penalty == 1.1


def test_later_turns_are_sampled_too() -> None:
    workload = SamplingOption.parse("top_k=5").of(make_workload("chat", 100, rows=2, prompt=4, new=5, turns=2))
    following = workload.after(workload.first[1], [7, 8])
    assert following is not None
    assert following.sampling == workload.first[1].sampling
    assert following.request_id == "1.1"


def test_a_penalty_alone_stays_greedy() -> None:
    option = SamplingOption.parse("repetition_penalty=1.2")
    assert not option.sampling.do_sample
    assert option.logits.repetition_penalty == 1.2


@pytest.mark.parametrize("text", ["", "top_k", "top_j=4", "top_p=1.5", "temperature=cold", "repetition_penalty=0"])
def test_what_makes_no_sense_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"."):
        SamplingOption.parse(text)
    with pytest.raises(SystemExit):
        main(["bench", "small", "--shape", "tiny", "--device", "cpu", "--sampling", text])
    assert "--sampling" in capsys.readouterr().err


def test_peers_are_greedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "small", "--shape", "tiny", "--sampling", "top_k=5", "--peer", "generate"])
    assert "peers are greedy" in capsys.readouterr().err


def test_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "small", "--shape", "tiny", "--rows", "3", "--prompt", "6", "--new", "5", "--device", "cpu"]
    assert main([*arguments, "--sampling", "temperature=0.8,top_k=5,top_p=0.9,repetition_penalty=1.1"]) == 0
    printed = capsys.readouterr().out
    assert "15 new tokens, temperature=0.8,top_k=5,top_p=0.9,repetition_penalty=1.1" in printed
    assert "accuracy: not checked" in printed
    assert "100 % equal" in printed, "depths 1 and 2 draw the same tokens"
