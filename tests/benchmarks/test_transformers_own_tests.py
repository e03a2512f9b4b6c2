"""The script that runs transformers' own tests, on a checkout made here with one test of each outcome."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks import transformers_own_tests

ROOT = Path(__file__).parents[2]

MIXIN = """
    import torch

    class GenerationTesterMixin:
        def models(self):
            for model_class in self.all_generative_model_classes:
                torch.manual_seed(0)
                yield model_class(self.config()).eval(), torch.arange(3, 9)[None]

        def test_greedy_generate(self):
            for model, ids in self.models():
                out = model.generate(ids, do_sample=False, max_new_tokens=4, min_new_tokens=4)
                self.assertEqual(out.shape, (1, 10))
                self.assertEqual(type(model).generate.__name__, "generate")
                self.__class__.names = getattr(self.__class__, "names", []) + [type(model).__name__]

        def test_greedy_generate_dict_outputs(self):
            for model, ids in self.models():
                model.generate(ids, max_new_tokens=4, output_attentions=True, return_dict_in_generate=True)

        def test_sample_generate(self):
            for model, ids in self.models():
                # Holds for the plug only.
                self.assertNotIn("custom", str(model.generate.__qualname__))
                self.assertIn("GenerationMixin", model.generate.__qualname__)

        def test_sample_generate_broken(self):
            self.fail("fails with and without the plug")

        def test_sample_generate_elsewhere(self):
            self.skipTest("not for this family")

        def test_beam_search_generate(self):
            self.fail("is not asked for")
"""
LLAMA = """
    import unittest
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
    from ...generation.test_utils import GenerationTesterMixin

    class LlamaModelTest(GenerationTesterMixin, unittest.TestCase):
        all_model_classes = (LlamaModel, LlamaForCausalLM)

        @property
        def all_generative_model_classes(self):
            return tuple(c for c in self.all_model_classes if c.can_generate())

        def config(self):
            return LlamaConfig(
                vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
            )
"""


def test_every_outcome_is_reported(tmp_path: Path) -> None:
    for name, text in {
        "__init__.py": "",
        "generation/__init__.py": "",
        "generation/test_utils.py": MIXIN,
        "models/__init__.py": "",
        "models/llama/__init__.py": "",
        "models/llama/test_modeling_llama.py": LLAMA,
    }.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.transformers_own_tests", str(tmp_path), "--families", "llama"]
    run = subprocess.run(
        [*command, "--out", str(page)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    rows = {line.split("|")[2].strip(): line for line in page.read_text().splitlines() if line.startswith("| llama")}
    assert run.returncode == 1, run.stderr
    assert "| passed |" in rows["`test_greedy_generate`"]
    assert "| not applicable |" in rows["`test_greedy_generate_dict_outputs`"]
    assert "output_attentions" in rows["`test_greedy_generate_dict_outputs`"]
    assert "| failed |" in rows["`test_sample_generate`"], "passes without the plug, and not with it"
    assert "does not pass without the plug" in rows["`test_sample_generate_broken`"]
    assert "not for this family" in rows["`test_sample_generate_elsewhere`"]
    assert len(rows) == 5
    assert "1 failed, 3 not applicable, 1 passed" in page.read_text()


def test_a_folder_without_tests_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["transformers_own_tests", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        transformers_own_tests.main()
    assert ended.value.code == 2
    assert "pass a clone of transformers" in capsys.readouterr().err
