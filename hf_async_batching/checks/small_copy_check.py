"""Check a route with a small model of the same class on the CPU.

A route can be wrong in two ways that the parity check misses or finds too late:

- The parity check's prompts are shorter than a real model's windows. The small model's thresholds lie within a few
  tokens (`scaled_down`). It goes through the same check with prompts and decodes on both sides of each threshold, and
  with long rows next to short ones.
- A forward that a family does not support may end in an assertion on the device, after which the process cannot use
  its GPU. On the CPU it is an exception.

A route that is wrong here is not used, and not tried on the device.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.checks.parity_check import check_parity
from hf_async_batching.checks.reference_logits import prompts_of_lengths
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.model.foreign_kernels.reference_kernels import use_reference_kernels
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.generate_loop import GenerateLoop, prepare_view
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.small.length_thresholds import length_thresholds, scaled_down
from hf_async_batching.model.view.model_view import context_length, make_view
from hf_async_batching.runtime.start_progress import stage

logger = logging.getLogger(__name__)

Forward = PackedForward | CacheForward

# Length of the prompt that comes in chunks, and of the prompts that join late. A prompt, a chunk and a decode cross
# the thresholds of 8 and 16 tokens, which also lie between a long row and a short one.
_LENGTHS = ((69, 17), (46, 6))
_MOST_PARAMETERS = 8_000_000
# A small random model can be close to a tie of experts or keys, which rounding then decides.
_SEEDS = (0, 1)
# Factor on the matrices. With the usual initialization they are so small that attention hardly matters.
_SCALE = 4.0

_verdicts: dict[tuple[type, str, str], str | None] = {}
_lock = threading.Lock()


class _NotChecked(Exception):
    """No small model can be made, or it does not generate."""


class SmallCopyCheck:
    """Checks the routes of one model.

    Args:
        model: The user's model; only its class and its config are read.
        longest: Longest sequence of a request, in tokens; None for the model's context.

    Attributes:
        thresholds: Lengths up to `longest` beyond which the model computes differently, by field name.
    """

    def __init__(self, model: PreTrainedModel, longest: int | None = None) -> None:
        self._class = type(model)
        self._config = model.config
        self._attention = getattr(model.config, "_attn_implementation", None)
        self._reach = reach = min(filter(None, (longest, context_length(model))), default=None)
        found = length_thresholds(model.config)
        self.thresholds = {name: value for name, value in found.items() if reach is None or value < reach}
        self._models: dict[int, PreTrainedModel] = {}

    def refuse(
        self,
        route: str,
        make_forward: Callable[[PreTrainedModel], Forward],
        *,
        always: bool = False,
        known: bool = False,
    ) -> None:
        """Refuse a route that is wrong. If the check cannot decide, it logs the reason.

        Args:
            route: Name of the route; each class and config is checked once per route and process.
            make_forward: Makes a forward of that route for a model.
            always: Check it even if the model has no thresholds.
            known: Refuse it even if the check cannot decide.

        Raises:
            UnsupportedModelError: The logits differ from those of plain `generate`.
        """
        if not self.thresholds and not always:
            return
        try:
            key = self._class, self._signature, route
            with _lock:
                if key not in _verdicts:
                    stage(f"a small copy of it is tried as {route} on the CPU")
                    _verdicts[key] = self._verdict(make_forward)
        except Exception as error:  # a family's own code may raise any error at sizes that it does not expect
            beyond = ", ".join(self.thresholds)
            what = f"is not checked beyond {beyond}" if beyond else f"is not tried on the CPU ({route})"
            logger.info("%s %s: %s", self._class.__name__, what, _line(error))
            if known:
                raise UnsupportedModelError(
                    f"{self._class.__name__} is not served: trying it as {route} could break the device, and a check "
                    f"on the CPU gave no result ({_line(error)}). Use plain `model.generate`."
                ) from error
            return
        wrong = _verdicts[key]
        if wrong is not None:
            names = ", ".join(f"{name}={value}" for name, value in self.thresholds.items())
            what = f"it cannot be served as {route}"
            if names:
                what += f", or it is wrong beyond its thresholds ({names})"
            raise UnsupportedModelError(
                f"{self._class.__name__} is not served: {what}, as a small model of its class shows ({wrong}). Use "
                "plain `model.generate`."
            )

    @contextmanager
    def beside(self, route: str, make_forward: Callable[[PreTrainedModel], Forward], wanted: bool) -> Iterator[None]:
        """Run `refuse` in a thread while the caller does other work; the error is raised at the end.

        Args:
            route: See `refuse`.
            make_forward: See `refuse`.
            wanted: Whether to check at all.
        """
        if not (wanted and self.thresholds):
            yield
            return

        def find_out() -> None:
            with suppress(UnsupportedModelError):
                self.refuse(route, make_forward)

        thread = threading.Thread(target=find_out, name="hf_async_batching small copy check", daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    @cached_property
    def _small_config(self) -> Any:
        makers = [base for base in self._class.__mro__ if "__init__" in vars(base)]
        if not makers[0].__module__.startswith("transformers."):
            raise _NotChecked(f"no rule makes a small {makers[0].__name__}")
        small: Any = scaled_down(self._config, self._reach)
        fast = self._attention != "eager" and getattr(self._class, "_supports_sdpa", False)
        small._attn_implementation = "sdpa" if fast else "eager"
        return small

    @cached_property
    def _signature(self) -> str:
        fields = self._small_config.to_dict()
        return json.dumps([fields, self._small_config._attn_implementation], default=str, sort_keys=True)

    def _verdict(self, make_forward: Callable[[PreTrainedModel], Forward]) -> str | None:
        wrong = ""
        # The caller's autocast and default device do not apply to the small copy.
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            for seed in _SEEDS:
                if seed not in self._models:
                    with torch.inference_mode(False), torch.no_grad():
                        self._models[seed] = _make(self._class, self._small_config, seed)
                try:
                    forward = make_forward(self._models[seed])
                    for long, short in _LENGTHS:
                        prompts = prompts_of_lengths(long, short, forward.vocab_size)
                        check_parity(self._models[seed], forward, TorchBackend(), prompts=prompts)
                except UnsupportedModelError as error:
                    wrong = _line(error).removeprefix(f"{self._class.__name__} is not served: ")
                else:
                    return None
        return wrong


def _make(model_class: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    """Make a small random model that generates.

    Raises:
        _NotChecked: The model does not generate, or would not be small.
        Exception: Any error of the model's classes.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > _MOST_PARAMETERS:
        raise _NotChecked(f"a small copy would have {size} parameters")
    with _OwnRandomness(seed):
        made: Any = model_class(config)
        model: PreTrainedModel = made.float().eval()
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                parameter.normal_(0, 0.02)
            elif parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(_SCALE)
    plain: Any = GenerationConfig
    model.generation_config = plain(pad_token_id=0)
    use_reference_kernels(model)
    view = make_view(model, None)
    prepare_view(view)
    loop = GenerateLoop(view)
    tokens = torch.arange(3, 23)[None] % config.get_text_config(decoder=True).vocab_size
    logits = torch.stack([loop.start(tokens), loop.step(tokens[:, :1])])
    if not torch.isfinite(logits).all():
        raise _NotChecked("the logits of a small copy are not finite")
    return model


class _OwnRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes random numbers from a separate generator: torch's global generator belongs to the user."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            if not any(argument.name == "generator" for argument in func._schema.arguments):
                packet, name = func.overloadpacket, func._overloadname
                func = getattr(packet, "generator" if name == "default" else f"{name}_generator", func)
            if any(argument.name == "generator" for argument in func._schema.arguments):
                kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def _line(error: Exception) -> str:
    """Return the first sentence of an error."""
    text = " ".join(str(error).split()).split(". ")[0]
    return text if isinstance(error, (UnsupportedModelError, _NotChecked)) else f"{type(error).__name__}: {text}"
