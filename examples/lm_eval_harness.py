"""lm-evaluation-harness, with completions from the engine: one more argument in the only call of `generate`.

Run: python examples/lm_eval_harness.py [--model NAME_OR_FOLDER] [--tasks gsm8k] [--limit 100] [--batch-size 64]
Needs: pip install "lm_eval>=0.4.9"
"""

import argparse

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from hf_async_batching import generate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--tasks", nargs="+", default=["gsm8k"])
parser.add_argument("--include-path", help="a folder with your own tasks")
parser.add_argument("--limit", type=int, help="questions per task (all)")
parser.add_argument("--batch-size", type=int, default=64, help="choose a large one: a batch ends with its longest row")
arguments = parser.parse_args()


class AsyncHFLM(HFLM):
    """HFLM with completions from the engine."""

    def _model_generate(self, context, max_length, stop, **others):
        return super()._model_generate(context, max_length, stop, custom_generate=generate, **others)


device = "cuda" if torch.cuda.is_available() else "cpu"
harness = AsyncHFLM(pretrained=arguments.model, device=device, batch_size=arguments.batch_size)
tasks = TaskManager(include_path=arguments.include_path)
results = simple_evaluate(model=harness, tasks=arguments.tasks, limit=arguments.limit, task_manager=tasks)
print(make_table(results))
