"""The command line, run on the CPU with the tiny shape."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import re
import socket
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from setuptools import find_packages
from support.mxfp4_checkpoint import write_checkpoint

from hf_async_batching import BatchingConfig, __version__
from hf_async_batching.bench.choices import SWITCHES
from hf_async_batching.bench.measure import BenchRun, Measured, Pace, measure
from hf_async_batching.bench.peer_run import PeerRun
from hf_async_batching.bench.workloads import WORKLOADS
from hf_async_batching.cli import bench as command
from hf_async_batching.cli.main import main

ROOT = Path(__file__).parents[2]
SMALL = ["--shape", "tiny", "--device", "cpu", "--rows", "3", "--prompt", "8", "--new", "6"]


def test_help_teaches_by_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["bench", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "hf-async-batching bench seed --shape llama-3.1-8b --depth 1 2" in text
    assert all(word in text for word in (*WORKLOADS, "qwen3-0.6b", "--no-prefix-cache", "MBU"))


def test_help_lists_what_developers_need_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    users, rest = capsys.readouterr().out.split("commands for developers:\n")
    developers, _ = rest.split("examples:\n")
    assert [line.split()[0] for line in developers.splitlines() if line] == ["bench", "coverage", "compatibility"]
    listed = users.partition("COMMAND\n")[2]
    assert [name for name in ("dataset", "check", "demo", "bench") if f"\n    {name} " in f"\n{listed}"] == [
        "dataset",
        "check",
        "demo",
    ]


COMMANDS = ("dataset", "check", "demo", "bench", "coverage", "compatibility")
HEAVY = {"torch", "transformers", "datasets", "gradio", "pyarrow", "triton", "tokenizers", "safetensors"}


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_comes_at_once(arguments: list[str]) -> None:
    """It imports nothing that takes seconds."""
    program = (
        "import sys\nfrom hf_async_batching.cli.main import main\n"
        f"try: main({arguments})\nfinally: print('IMPORTED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text, _, imported = done.stdout.partition("IMPORTED ")
    assert not HEAVY & set(imported.split())
    assert "hf-async-batching" in text
    if arguments != ["--version"]:
        assert text.startswith(f"usage: {' '.join(['hf-async-batching', *arguments[:-1]])}")


def test_the_package_itself_imports_nothing_heavy() -> None:
    program = (
        "import sys, hf_async_batching as h\n"
        f"assert not {HEAVY!r} & set(sys.modules)\n"
        "h.BatchingConfig()\n"
        f"assert not {HEAVY!r} & set(sys.modules)\n"
        "assert set(h.__all__) <= set(dir(h))\n"
        "from hf_async_batching import *\n"
        "assert all(name in globals() for name in h.__all__)\n"
        "assert h.manager.GenerationManager is GenerationManager\n"
        "try: h.no_such_name\nexcept AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'hf_async_batching' has no attribute 'no_such_name'\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    version = importlib.metadata.version
    assert capsys.readouterr().out == (
        f"hf-async-batching {__version__} (Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')})\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what"], "the following arguments are required"),
        (["datset"], "invalid choice: 'datset'"),
        (["check", "/no/such/folder"], "check: --model /no/such/folder: there is no such folder"),
        (["check", "no-such-owner/no-such-model"], "check: --model no-such-owner/no-such-model: "),
        (["check", "x", "--new-tokens", "many"], "invalid int value: 'many'"),
        (["compatibility", "--what"], "compatibility: unrecognized arguments: --what"),
        (["demo", "--depth", "deep"], "demo: argument --depth: invalid int value: 'deep'"),
    ],
)
def test_mistakes_are_answered_in_a_line_or_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error and "usage:" not in error
    assert len(error.splitlines()) <= 2


def test_an_interrupted_coverage_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_async_batching.coverage.processes.check_families", interrupted)
    out = tmp_path / "table.md"
    for hint in ("", "; the same command with --resume continues"):
        assert main(["coverage", "GPT2LMHeadModel", "--out", str(out)]) == 130
        assert capsys.readouterr().err == f"hf-async-batching coverage: interrupted{hint}\n"
        out.touch()


def test_a_taken_port_is_told_before_the_page_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    from demo.app import main as page

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            page(["--port", str(port)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"--port {port}: the page cannot listen on 127.0.0.1 (Address already in use)" in error
    assert len(error.splitlines()) == 1


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_async_batching", "bench", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "usage: hf-async-batching bench" in done.stdout


def test_installed() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["hf-async-batching"].partition(":")
    assert getattr(importlib.import_module(module), function) is main
    folders = {path.parent.relative_to(root) for path in (root / "hf_async_batching").rglob("__init__.py")}
    found = find_packages(root, include=project["tool"]["setuptools"]["packages"]["find"]["include"])
    assert {".".join(folder.parts) for folder in folders} == set(found)


def test_the_version_has_one_source() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hf_async_batching.__version__"}
    assert importlib.metadata.version("hf_async_batching") == __version__
    versions = re.findall(r"^## (\d\S*)", (root / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == __version__


def test_every_workload_with_peers_and_everything_in_the_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", *WORKLOADS, *SMALL, "--turns", "2", "--peer", "generate", "generate_batch"]
    assert main([*arguments, "--depth", "1", "2", "--repeats", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("CPU")
    assert "copy bandwidth" in out.splitlines()[0]
    assert out.count("| hf_async_batching, depth 1 |") == out.count("| hf_async_batching, depth 2 |") == 4
    assert out.count("2 of 2 completions equal plain generate alone") == 4
    for name in WORKLOADS:
        check_document(json.loads((tmp_path / f"{name}-tiny.json").read_text()), name)
        svg = (tmp_path / f"{name}-tiny.svg").read_text()
        ET.fromstring(svg)
        assert svg.count("device busy") == 4, "in the captions and the description of both runs"


def check_document(contents: dict[str, Any], name: str) -> None:
    assert contents["command"][:3] == ["hf-async-batching", "bench", "seed"]
    assert contents["workload"]["name"] == name
    assert contents["workload"]["rows"] == 3
    assert 1 <= contents["workload"]["new_lengths"]["least"] <= contents["workload"]["new_lengths"]["most"] <= 6
    assert contents["model"]["name"] == "tiny"
    assert contents["model"]["dtype"] == "float32"
    machine = contents["machine"]
    assert machine["copy_bandwidth"] > 0
    assert machine["versions"]["hf_async_batching"] == __version__
    assert {"torch", "triton", "transformers", "CUDA", "driver"} <= machine["versions"].keys()
    assert [run["depth"] for run in contents["runs"]] == [1, 2]
    for run in contents["runs"]:
        assert {field.name for field in fields(BenchRun)} | {"equal_to_first_run", "steps"} == run.keys()
        assert {field.name for field in fields(Pace)} == run["pace"].keys()
        assert {field.name for field in fields(BatchingConfig)} == run["settings"].keys()
        assert run["settings"]["num_pages"] >= 1
        assert run["driver"] == "manager"
        assert run["equal_to_first_run"] == 1
        assert run["output_tokens"] == contents["workload"]["new_tokens"]
        assert 0 < run["pace"]["mbu_run_percent"] < 100
        assert run["first_token_seconds"]["p95"] >= run["first_token_seconds"]["median"] > 0
        assert len(run["all_seconds"]) == 2
        assert len(run["steps"]) >= 2
    assert [peer["name"] for peer in contents["peers"]] == ["generate", "generate_batch"]
    for peer in contents["peers"]:
        assert {field.name for field in fields(PeerRun)} - {"tokens"} == peer.keys()
        assert peer["error"] is None
        assert peer["equal_to_first_run"] == 1
    assert contents["accuracy"]["holds"] is True
    assert contents["accuracy"]["argmax_percent"] == 100
    assert contents["accuracy"]["generate_equal"] == [2, 2]


def test_a_checkpoint_whose_experts_stay_in_mxfp4(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    sizes = ["--device", "cpu", "--rows", "2", "--prompt", "8", "--new", "3", "--depth", "1", "--accuracy", "0"]
    assert (
        main(["bench", "seed", "--model", str(tmp_path), "--quantize", "mxfp4", *sizes, "--out", str(tmp_path)]) == 0
    )
    (results,) = tmp_path.glob("seed-*-mxfp4.json")
    contents = json.loads(results.read_text())
    assert contents["model"]["quantization"] == "mxfp4"
    assert contents["runs"][0]["output_tokens"] == 6


def test_a_part_of_a_shape_with_quantized_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Plain forwards of so narrow a layer fail in bitsandbytes, for some CPUs.
    settings = ["--layers", "1", "--quantize", "nf4", "--depth", "1", "2", "--accuracy", "0", "--out", str(tmp_path)]
    assert main(["bench", "seed", *SMALL, *settings]) == 0
    contents = json.loads((tmp_path / "seed-tiny-1-layers-nf4.json").read_text())
    assert contents["model"]["quantization"] == "nf4"
    assert contents["model"]["parameters"] == 22_816, "of which two share a byte"
    assert [run["equal_to_first_run"] for run in contents["runs"]] == [1, 1]


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    settings = ["--page-size", "32", "--max-rows", "2", "--max-batch-tokens", "64", "--no-graphs", "--engine"]
    settings += ["--admission", "longest_first"]
    assert main(["bench", "seed", *SMALL, *settings, "--depth", "3", "--accuracy", "0", "--out", str(tmp_path)]) == 0
    contents = json.loads((tmp_path / "seed-tiny.json").read_text())
    (run,) = contents["runs"]
    assert run["driver"] == "engine"
    assert run["depth"] == 3
    expected = {"page_size": 32, "max_rows": 2, "max_batch_tokens": 64, "cuda_graphs": False}
    expected["admission"] = "longest_first"
    assert {name: run["settings"][name] for name in expected} == expected
    assert contents["accuracy"] is None


def test_a_switch_for_a_setting_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SWITCHES, "no_compile", "a_setting_of_another_version")
    with pytest.raises(SystemExit):
        main(["bench", "seed", *SMALL, "--no-compile"])
    assert "--no-compile: BatchingConfig has no `a_setting_of_another_version`" in capsys.readouterr().err


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_turn_a_setting_off_where_it_is(switch: str, tmp_path: Path) -> None:
    setting = SWITCHES[switch]
    if setting not in {field.name for field in fields(BatchingConfig)}:
        pytest.skip(f"no `{setting}` yet")
    arguments = ["bench", "small", *SMALL, f"--{switch.replace('_', '-')}", "--depth", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (run,) = json.loads((tmp_path / "small-tiny.json").read_text())["runs"]
    assert run["settings"][setting] is False


def test_a_wrong_token_fails_the_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*arguments: Any, **named: Any) -> Measured:
        measured = measure(*arguments, **named)
        measured.tokens[0]["0"][-1] ^= 1
        return measured

    monkeypatch.setattr(command, "measure", spoiled)
    assert main(["bench", "seed", *SMALL, "--depth", "1"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_peer_that_fails_is_a_line_of_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_peer", lambda name, *_, **__: PeerRun(name, error="RuntimeError: broken"))
    assert main(["bench", "seed", *SMALL, "--depth", "1", "--peer", "generate_batch"]) == 0
    assert "failed: RuntimeError: broken" in capsys.readouterr().out


def test_what_is_measured_is_kept_when_a_peer_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, *_: Any, **__: Any) -> PeerRun:
        if name == "generate_batch":
            raise KeyboardInterrupt
        return PeerRun(name, error="RuntimeError: broken")

    monkeypatch.setattr(command, "run_peer", interrupted)
    peers = ["--peer", "generate", "generate_batch"]
    assert main(["bench", "seed", *SMALL, "--accuracy", "0", *peers, "--out", str(tmp_path)]) == 130
    shown, said = capsys.readouterr()
    assert said.splitlines()[-1] == "hf-async-batching bench: interrupted"
    assert all(
        name in shown for name in ("| hf_async_batching, depth 1", "| hf_async_batching, depth 2", "| generate ")
    )
    contents = json.loads((tmp_path / "seed-tiny.json").read_text())
    assert [run["depth"] for run in contents["runs"]] == [1, 2]
    assert [peer["name"] for peer in contents["peers"]] == ["generate"]


def test_a_saved_measurement_is_drawn_again(tmp_path: Path) -> None:
    assert main(["bench", "seed", *SMALL, "--accuracy", "0", "--out", str(tmp_path)]) == 0
    first = (tmp_path / "seed-tiny.svg").read_text()
    assert main(["bench", "--timeline", str(tmp_path / "seed-tiny.json"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "seed-tiny.svg").read_text() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "tiny"], "name at least one WORKLOAD: seed, small, mix, chat"),
        (["nonsense", "--shape", "tiny"], "there is no workload 'nonsense'; choose from seed"),
        (["seed"], "name either a --shape or a --model"),
        (["seed", "--shape", "tiny", "--model", "x"], "name either a --shape or a --model"),
        (["seed", "--shape", "huge"], "there is no shape 'huge'; choose one of llama-3.1-8b"),
        (["seed", "--shape", "tiny", "--rows", "0"], "must be at least 1, got 0"),
        (["seed", "--shape", "tiny", "--depth", "0"], "must be at least 1, got 0"),
        (["seed", "--shape", "tiny", "--turns", "2"], "--turns belongs to the workload chat"),
        (["seed", "--shape", "tiny", "--layers", "3", "--device", "cpu"], "has 2 layers: choose 1 to 2, not 3"),
        (["seed", "--model", "x", "--layers", "1"], "--layers belongs to --shape"),
        (["seed", "--shape", "tiny", "--quantize", "q8"], "invalid choice: 'q8'"),
        (["seed", "--shape", "tiny", "--accuracy", "-1"], "--accuracy must not be negative"),
        (["seed", "--shape", "tiny", "--page-size", "48"], "`page_size` must be 16, 32, 64, 128 or 256"),
        (["seed", "--shape", "tiny", "--peer", "vllm"], "invalid choice: 'vllm'"),
        (["seed", "--model", "/no/such/folder", "--device", "cpu"], "--model /no/such/folder: "),
        (["seed", "--shape", "tiny", "--max-rows", "5", "--max-batch-tokens", "2"], "must be at least `max_rows` (5)"),
        (["--timeline", "/no/such/file.json"], "--timeline /no/such/file.json: "),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
    assert "usage:" not in error


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["bench", "seed", "--shape", "tiny", "--device", "cuda"])
    assert "use --device cpu" in capsys.readouterr().err


def test_a_file_that_is_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"runs": [{}]}')
    with pytest.raises(SystemExit):
        main(["bench", "--timeline", str(tmp_path / "other.json")])
    assert "no measurement of `hf-async-batching bench`" in capsys.readouterr().err
