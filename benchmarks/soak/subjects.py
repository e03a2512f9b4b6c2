"""The models of a soak, each served by a small engine with too few pages."""

from __future__ import annotations

import importlib.util
import threading
import time
from string import ascii_lowercase
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.soak.steady_lock import SteadyLock
from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.small.tiny_configs import VOCAB

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "gemma": "Gemma3ForCausalLM",
    "hybrid": "Qwen3_5ForCausalLM",
    "convolutions": "Lfm2ForCausalLM",
    "experts": "Qwen3MoeForCausalLM",
    "adapters": "LlamaForCausalLM",
}
"""Names for the command line; families that the installed transformers lacks are left out."""

LONGEST = 160
"""Largest number of tokens of a request."""
IDLE = 1.0
"""Seconds without work after which an engine stops."""
ADAPTERS = ("first", "second")


class Subject:
    """A model, and the manager that serves it now.

    Args:
        name: One of `FAMILIES`.
        device: Device of the model.
        dtype: Dtype of the weights.
        compiled: Whether engines compile their layers.

    Attributes:
        name: Name of the family.
        model: The model that callers use; for "adapters" a `PeftModel`.
        vocab_size: Size of the vocabulary; token ids are smaller.
        lock: Held while answers are compared with plain `generate`, and while weights, adapters or managers change.
        plain: Held around plain `generate`, because some families' modules do not allow two threads.
        rests_until: Nothing is submitted before this `time.perf_counter()`, so that the engine stops by itself.
        changes: Number of changes of each kind.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> None:
        self.name = name
        model: Any = tiny_model(FAMILIES[name]).to(device, dtype)
        self.vocab_size: int = VOCAB
        self.model: Any = _with_adapters(model) if name == "adapters" else model
        self.lock = SteadyLock()
        self.plain = threading.Lock()
        self.rests_until = 0.0
        self.changes = 0
        self._config = BatchingConfig(
            page_size=16,
            num_pages=16,
            max_rows=8,
            max_batch_tokens=48,
            max_sequence_length=LONGEST,
            max_waiting=64,
            idle_timeout=IDLE,
            compile=compiled,
        )
        self._parameters = [parameter for parameter in model.parameters() if parameter.dtype == dtype]
        self._base = [parameter.detach().clone() for parameter in self._parameters]
        self._manager = GenerationManager(self.model, self._config)

    @property
    def manager(self) -> GenerationManager:
        """The present manager; another thread may close it."""
        return self._manager

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def awake(self) -> bool:
        """Whether requests may be submitted."""
        return time.perf_counter() >= self.rests_until

    def rest(self, seconds: float) -> None:
        """Submit nothing for a while."""
        self.rests_until = time.perf_counter() + seconds

    def step_weights(self) -> None:
        """Change the weights in place as an optimizer step does, at random and close to their first values."""
        with self.lock.alone():
            generator = torch.Generator(device="cpu").manual_seed(self.changes)
            self.changes += 1
            for parameter, base in zip(self._parameters, self._base, strict=True):
                noise = torch.randn(base.shape, generator=generator, device="cpu").to(base)
                parameter.grad = parameter.detach() - base * (1 + 0.02 * noise)
            torch.optim.SGD(self._parameters, lr=1.0).step()
            for parameter in self._parameters:
                parameter.grad = None

    def switch_adapter(self) -> None:
        """Switch to the other adapter, or to none, for later requests."""
        with self.lock.alone():
            self.changes += 1
            self.model.set_adapter(ADAPTERS[self.changes % len(ADAPTERS)])

    def new_manager(self) -> None:
        """Close the manager with its live requests, and make another one."""
        with self.lock.alone():
            old, self._manager = self._manager, GenerationManager(self.model, self._config)
            old.close()


def _with_adapters(model: PreTrainedModel) -> Any:
    import peft

    def config() -> Any:
        return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)

    wrapped = peft.get_peft_model(model, config(), adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        wrapped.add_adapter(name, config())
    return wrapped.eval()


def missing(name: str) -> str | None:
    """Say why a family is left out here; None if it is not."""
    if not hasattr(transformers, FAMILIES[name]):
        return f"transformers {transformers.__version__} has no {FAMILIES[name]}"
    if name == "adapters" and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    return None


def make_tokenizer() -> Any:
    """Make a tokenizer for the tiny models. Each token is two letters, so that stop strings span tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    pairs = [one + other for one in ascii_lowercase for other in ascii_lowercase]
    tokens = [*special, *ascii_lowercase, *pairs][:VOCAB]
    merges = [(token[0], token[1]) for token in tokens[len(special) + 26 :]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[attr-defined]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[attr-defined]
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left")
