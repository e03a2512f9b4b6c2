"""Views compute with our own copy of flash-linear-attention, whose kernels have one setting each."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.forked_python import run_python

from hf_async_batching.model.foreign_kernels import private_kernels

# A package as flash-linear-attention is laid out: an `__init__` that imports more than a model needs, kernels that are
# tuned, and functions that call each other through the package's own modules.
FILES = {
    "fla/__init__.py": "__version__ = '0.6.0'\n",
    "fla/ops/__init__.py": "from fla.ops import gated_delta_rule, others\n",
    "fla/ops/others.py": "LOADED = ['all kernels']\n",
    "fla/ops/utils.py": """
from types import SimpleNamespace
from triton.runtime.autotuner import Autotuner
def config(warps, stages, **blocks):
    return SimpleNamespace(num_warps=warps, num_stages=stages, kwargs=blocks)
kernel = Autotuner.__new__(Autotuner)
kernel.configs = [config(8, 4, BK=128), config(4, 2, BK=16), config(4, 2, BK=64), config(1, 1, BK=64)]
kernel.fn = None
heuristics = SimpleNamespace(fn=kernel)
""",
    "fla/ops/gated_delta_rule/__init__.py": """
from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
""",
    "fla/ops/gated_delta_rule/chunk.py": """
from fla import __version__
from fla.ops.utils import heuristics, kernel
calls = []
def chunk_gated_delta_rule(query, key, value, g, beta, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False):
    calls.append(len(kernel.configs))
    from transformers.models.qwen3_next import modeling_qwen3_next as m
    return m.torch_chunk_gated_delta_rule.__wrapped__(
        query, key, value, g, beta, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
fused_recurrent_gated_delta_rule = chunk_gated_delta_rule
""",
}
SCRIPT = """
import sys
import torch
from hf_async_batching.model.view import model_view
from hf_async_batching.model.foreign_kernels import private_kernels
from hf_async_batching.coverage.families import tiny_model
model = tiny_model("Qwen3NextForCausalLM")
theirs = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "fla"}
chunk = sys.modules["fla.ops.gated_delta_rule.chunk"]
tokens = torch.arange(3, 12)[None]
expected = model(tokens).logits
print("theirs:", set(chunk.calls))
del chunk.calls[:]
view = model_view.make_view(model, None)
private_kernels.use_private_kernels(view)
out = view(tokens).logits
own = private_kernels._own["fla.ops.gated_delta_rule.chunk"]
print("view:", set(own.calls), "theirs meanwhile:", chunk.calls, "equal:", torch.equal(out, expected))
print("setting:", vars(own.kernel.configs[0]))
print("others loaded again:", "fla.ops.others" in private_kernels._own)
now = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "fla"}
print("modules untouched:", theirs == now and all(theirs[name] is now[name] for name in now))
model(tokens)
print("model still calls theirs:", bool(chunk.calls))
again = model_view.make_view(view, None)
private_kernels.use_private_kernels(again)
del own.calls[:]
print("a view of a view:", torch.equal(again(tokens).logits, expected) and bool(own.calls))
"""


def run(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    done = run_python(f"import sys\nsys.path.insert(0, {str(folder)!r})\n{SCRIPT}")
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_view_calls_a_copy_and_the_model_does_not(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = run(tmp_path, FILES)
    assert "theirs: {4}" in out
    assert "view: {1} theirs meanwhile: [] equal: True" in out
    assert "setting: {'num_warps': 4, 'num_stages': 2, 'kwargs': {'BK': 64}}" in out
    assert "others loaded again: False" in out
    assert "modules untouched: True" in out
    assert "model still calls theirs: True" in out
    assert "a view of a view: True" in out


def test_what_needs_all_of_the_package_gets_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    chunk = "fla/ops/gated_delta_rule/chunk.py"
    out = run(tmp_path, FILES | {chunk: "from fla.ops import others\n" + FILES[chunk]})
    assert "view: {1} theirs meanwhile: [] equal: True" in out
    out = run(tmp_path, FILES | {chunk: "from fla.ops import LOADED\n" + FILES[chunk], "fla/ops/__init__.py": (
        "LOADED = ['all kernels']\n" + FILES["fla/ops/__init__.py"])})  # fmt: skip
    assert "view: {1} theirs meanwhile: [] equal: True" in out
    assert "others loaded again: True" in out
    assert "modules untouched: True" in out


def test_a_package_that_is_not_in_use_is_not_looked_for() -> None:
    assert "fla" not in sys.modules
    private_kernels.use_private_kernels(SimpleNamespace())  # type: ignore[arg-type]
