"""Run a model's view over packed tokens, with attention over pages."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_async_batching.attention import hf_interface as interface
from hf_async_batching.attention.base import AttentionBackend, AttentionContext, DecodeContext
from hf_async_batching.attention.hf_interface import PagedCall, attach_tags
from hf_async_batching.attention.latents import keep_latents
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.experts.hf_interface import use_kernels
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.kv_cache.state_tables import StateShape, StateTables
from hf_async_batching.linear.engine_linear import MAX_STRIPS, convert, is_plain, ready_products, tune_products
from hf_async_batching.linear.packing import LinearCalls, pack, parallel_projections, watch_linears
from hf_async_batching.linear.quantized.engine_quantized import (
    convert_quantized,
    keep_equal,
    quantized_layers,
    ready_quantized,
    tune_quantized,
)
from hf_async_batching.model.compile.regions import Region, compile_regions, remove_regions
from hf_async_batching.model.forward import attention_probe
from hf_async_batching.model.forward.latent_probe import FoundLatents, find_latents
from hf_async_batching.model.forward.media_inputs import merging_at_decoder, position_dims, rope_positions
from hf_async_batching.model.forward.recurrence_probe import refuse_mixing, refuse_states
from hf_async_batching.model.forward.state_mixers import Mixers
from hf_async_batching.model.forward.step_inputs import PromptPiece, StepInputs
from hf_async_batching.model.view.model_view import (
    context_length,
    embedding_shape,
    make_view,
    refuse_unservable,
    set_attention,
)
from hf_async_batching.model.view.parallel_modules import parallel_modules
from hf_async_batching.model.view.position_cache import PositionCache, cache_argument
from hf_async_batching.model.view.quantization import quantized_kinds
from hf_async_batching.recurrent import step as recurrent
from hf_async_batching.recurrent.calls import reads_back

logger = logging.getLogger(__name__)

_told: set[tuple[str, str]] = set()
"""Models and classes of quantized layers that the log has named."""

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class PackedForward:
    """Computes one step: calls the view over the packed tokens of many rows.

    Args:
        model: The user's model; the forward makes a shared-weight view of it and probes that view.
        fused: Whether projections of one input share a product; see `fuse`.
        skinny: Whether uncompiled code sends few rows to our own kernel; requires `fused`.
        latents: Whether layers that expand latents keep latents in pages; else they keep expanded keys and values.

    Attributes:
        name: Class of the model, for messages.
        route: How the model is served, for messages.
        layers: Shapes of what pages keep of each attention layer, as the probe saw it.
        vocab_size: Rows of the input embedding; token ids must be below.
        embedding_size: Columns of the input embedding.
        logit_size: Width of the logits; it can differ from `vocab_size`.
        device: Device of the weights.
        packed_groups: Groups of projections that share a product; None if weights are not fused.
        position_dims: Dimensions of the positions that `generate` passes to the model; 0 if they are one number.
        states: Shapes of the states that a row has besides its pages, by name.
        state_bytes: Memory of these states, in bytes per row.
        capturable: Whether its steps can be captured as graphs.
        compilable: Whether its layers can be compiled.
        route: How the model is served, for messages.
        regions: Compiled regions of the view.

    Raises:
        UnsupportedModelError: The model's attention cannot be routed to the pages.
    """

    # Constants that `CacheForward` has as attributes.
    whole_prompts = False
    recomputes = True
    prefix_cacheable = True  # in pages, and in snapshots of the states
    tile_size: int | None = None
    takes_embeddings = True

    def __init__(
        self, model: PreTrainedModel, *, fused: bool = False, skinny: bool = False, latents: bool = True
    ) -> None:
        self.name = type(model).__name__
        refuse_unservable(model)
        self.view = make_view(model, attention_probe.NAME)
        self.device: torch.device = next(self.view.parameters()).device
        parameters = _parameters(self.view)
        self._takes_positions = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        self.vocab_size, self.embedding_size = embedding_shape(self.view)
        self.logit_size = self.vocab_size
        self._cache_argument: str | None = None
        self._mixers = Mixers(self.view)
        self.states: dict[Hashable, StateShape] = {}
        self.dtype: torch.dtype = torch.float32
        self.position_dims = position_dims(self.view) if self._takes_positions else 0
        self._latents: list[FoundLatents] = []
        findings, seen = self._probe(latents)
        self.layers: list[LayerShape] = findings.shapes
        if self.layers:
            self.dtype = self.layers[0].dtype
        self.state_bytes = sum(state.num_bytes for state in self.states.values())
        self.route = "packed, row states" if self.states else "packed"
        self.capturable = self.compilable = not reads_back(self._mixers.names, self.device)
        self._paged_layers = findings.layers
        self._passes_context = findings.passes_context
        self._parallel = parallel_projections(self.view, seen)
        expansions = {id(one.expansion) for one in self._latents}
        self._parallel = [group for group in self._parallel if not expansions & set(map(id, group))]
        self._begin()
        if fused:
            self.fuse(skinny=skinny)

    def _begin(self) -> None:
        """Start with a view that is uncompiled, unfused and not bound to pages."""
        set_attention(self.view, interface.NAME)
        if not parallel_modules(self.view):  # those are the user's own modules
            use_kernels(self.view)
        for found in self._latents:
            keep_latents(found.attention, found.expansion, found.plain)
        self._layer_at: dict[int, int] = {}
        self._compiled = False
        self.regions: list[Region] = []
        self.packed_groups: int | None = None
        self._cache: PagedCache | None = None
        self._backend: AttentionBackend | None = None

    def on_view(self, view: PreTrainedModel) -> PackedForward:
        """Return the same forward on another view, unfused and uncompiled, without a copy or a probe.

        Args:
            view: Another view of the same state of the model; the new forward owns it.

        Raises:
            ValueError: The view has other modules.
        """
        other = dict(zip(map(id, self.view.modules()), view.modules(), strict=True))
        made = copy.copy(self)
        made.view = view
        made._paged_layers = {id(other[key]): layer for key, layer in self._paged_layers.items()}
        made._parallel = [[cast(nn.Linear, other[id(module)]) for module in group] for group in self._parallel]
        made._mixers = Mixers(view)
        made._latents = [
            one._replace(attention=other[id(one.attention)], expansion=cast(nn.Linear, other[id(one.expansion)]))
            for one in self._latents
        ]
        made._begin()
        return made

    def _probe(self, latents: bool) -> tuple[attention_probe.ProbeResult, LinearCalls]:
        tokens = torch.arange(1, attention_probe.PROBE_TOKENS + 1, device=self.device) % self.vocab_size
        positions = torch.arange(len(tokens), device=self.device)
        # For layers with states, each token is the first one of a row.
        rows = torch.arange(1, len(tokens) + 1, device=self.device, dtype=torch.int32)
        each_alone = DecodeContext(rows[:0], rows, torch.zeros_like(rows), torch.ones_like(rows))
        tables = StateTables(len(tokens) + 1, self.device)

        def call(tokens: torch.Tensor, kwargs: dict[str, Any], positions: torch.Tensor = positions) -> torch.Tensor:
            with recurrent.active(self._recurrent_step(each_alone, tables)):
                return self._call(tokens, positions, None, kwargs)

        def forward(**context: Any) -> None:
            seen.calls.clear()
            logits = call(tokens, context)
            self.logit_size, self.dtype = logits.shape[-1], logits.dtype

        def run(tokens: torch.Tensor) -> torch.Tensor:
            return attention_probe.without_attention(lambda: call(tokens, {}))

        stateful = bool(self._mixers.modules)
        with torch.inference_mode():
            with watch_linears(self.view) as seen:
                findings = attention_probe.probe(self.name, forward, may_lack_attention=stateful)
                layers = [module for module in self.view.modules() if id(module) in findings.layers]
                self._cache_argument = cache_argument(self.view, layers)
                if self._cache_argument is not None:
                    findings = attention_probe.probe(self.name, forward)
            self.states = dict(tables.shapes)
            try:
                if not stateful:
                    refuse_states(self.view)
                refuse_mixing(run, tokens, self.vocab_size)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{self.name} is not served: {error}") from error
            if latents:
                self._latents = self._find_latents(findings, lambda positions: call(tokens, {}, positions))
        return findings, seen

    @property
    def latent_layers(self) -> int:
        """Number of layers that keep latents in pages."""
        return len(self._latents)

    def _find_latents(
        self, findings: attention_probe.ProbeResult, run: Callable[[torch.Tensor], Any]
    ) -> list[FoundLatents]:
        """The layers that expand latents; their shapes become those of latents.

        Args:
            findings: What the probe learned.
            run: Runs the view over a few tokens at given positions.
        """
        if parallel_modules(self.view):
            return []
        # Nothing but the rotary part may depend on positions, and some dependences begin at high ones. The positions
        # follow each other, because transformers takes a jump for the start of another sequence. Models that expand no
        # latents never run at high positions: some index by them what they keep of a sequence.
        count = attention_probe.PROBE_TOKENS
        found: list[FoundLatents] = []
        for end in (count, max(context_length(self.view) or 0, count)):
            positions = torch.arange(end - count, end, device=self.device)
            try:
                found = find_latents(self.view, findings.layers, findings.shapes, partial(run, positions))
            except UnsupportedModelError as error:
                logger.info("%s keeps expanded keys and values: %s", self.name, error)
                return []
            if not found:
                return []
        for one in found:
            findings.shapes[findings.layers[id(one.attention)].index] = one.shape
        return found

    def _recurrent_step(self, context: AttentionContext, tables: StateTables) -> recurrent.RecurrentStep:
        return recurrent.RecurrentStep(context, tables, self._mixers.layers)

    def fuse(self, *, skinny: bool = False) -> None:
        """Let projections of one input share a product; their weights are packed, see `linear.packing`.

        Quantized layers of a known form keep their weights and get products of ours, see `linear.quantized`.

        Args:
            skinny: Whether uncompiled code sends few rows to our own kernel.
        """
        counters = torch.zeros(MAX_STRIPS, dtype=torch.int32, device=self.device)
        for module in self.view.modules():
            if is_plain(module):
                convert(module, counters, skinny=skinny)
        convert_quantized(self.view, counters, skinny=skinny)
        self._say_what_stays()
        self.packed_groups = pack(self._parallel)

    def _say_what_stays(self) -> None:
        """Log, once in a process for each class, which quantized layers no kernel of ours reads."""
        read = {type(layer).__name__ for layer in quantized_layers(self.view)}
        for kind in quantized_kinds(self.view):
            if kind not in read and (self.name, kind) not in _told:
                _told.add((self.name, kind))
                logger.info(
                    "%s: layers of %s run their own forward: our kernels do not read their weights here",
                    self.name,
                    kind,
                )

    def compile(
        self,
        run_example: Callable[[], Any],
        backend: str = "inductor",
        *,
        pdl: bool = False,
        run_single: Callable[[], Any] | None = None,
    ) -> None:
        """Compile the layers of the view; see `regions`.

        Args:
            run_example: Calls this forward with `EXAMPLE_TOKENS` tokens and samples all of them.
            backend: Backend of `torch.compile`.
            pdl: Use programmatic dependent launch; see `pdl_check`.
            run_single: Calls this forward with one token; None if steps of one token need no compiled code.

        Raises:
            Exception: Any error of the compiler. Call `uncompile` before using the forward again.
        """
        modules = [(m, self._paged_layers[id(m)]) for m in self.view.modules() if id(m) in self._paged_layers]
        self._layer_at = attach_tags(modules, self.device)
        keep_equal(self.view)
        self._compiled = True
        mixing = {*self._paged_layers, *map(id, self._mixers.modules)}
        self.regions = compile_regions(self.view, mixing, run_example, backend, pdl=pdl, run_single=run_single)
        ready_products(self.view, (16, 32, 64))
        ready_quantized(self.view, self.dtype, (1, 2, 4, 16, 32, 64))

    def uncompile(self) -> None:
        """Remove compiled code from the view."""
        remove_regions(self.regions)
        self._compiled, self.regions = False, []

    def tune(self, batches: list[int]) -> None:
        """Measure kernel settings on this device, unless they are stored already. Nothing else may run on the device.

        Args:
            batches: Numbers of rows of decode steps.
        """
        assert self._backend is not None and self._cache is not None
        # Typical lengths of chats. Contexts grow while they are served, and each setting is good at other lengths too.
        self._backend.tune(self._cache, batches=batches, context=1024, prompt=1024)
        tune_products(self.view, tuple(batches))
        tune_quantized(self.view, self.dtype, tuple(batches))

    def bind(self, cache: PagedCache, backend: AttentionBackend) -> None:
        """Use these pages and kernels from now on."""
        self._cache, self._backend = cache, backend

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [sampled, vocab] in the model's dtype, one row per entry of `sample_index` (all tokens if None)."""
        assert self._cache is not None and self._backend is not None
        call = PagedCall(inputs.context, self._cache, self._backend, self._paged_layers, self._layer_at)
        # Compiled code would check every attribute of a keyword argument in each call.
        passed = self._passes_context and not self._compiled
        kwargs = {"paged": call} if passed else {}
        with ExitStack() as stack:
            if not passed:
                stack.enter_context(interface.active(call))
            if self.states:
                tables = self._cache.states(inputs.context.page_table.shape[-2], self.states)
                stack.enter_context(recurrent.active(self._recurrent_step(inputs.context, tables)))
            if inputs.embeddings:
                stack.enter_context(merging_at_decoder(self.view, inputs.embeddings, len(inputs.token_ids)))
            logits = self._call(
                inputs.token_ids,
                inputs.position_ids,
                inputs.sample_index,
                kwargs,
                inputs.embeddings,
                inputs.rope_positions,
            )
        if inputs.sample_index is not None and not self._takes_logits_to_keep:
            logits = logits[inputs.sample_index]
        return logits

    def _call(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor | None,
        kwargs: dict[str, Any],
        embeddings: tuple[PromptPiece, ...] = (),
        rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._takes_positions:
            position_ids = positions[None]
            if self.position_dims:
                position_ids = rope_positions(positions, rope, embeddings, self.position_dims)[:, None]
            kwargs = {**kwargs, "position_ids": position_ids}
        if self._cache_argument is not None:
            kwargs = {**kwargs, self._cache_argument: PositionCache(positions)}
        if keep is not None and self._takes_logits_to_keep:
            kwargs = {**kwargs, "logits_to_keep": keep}
        if embeddings and not any(piece.merged for piece in embeddings):
            view: Any = self.view
            embedded = view.get_input_embeddings()(tokens)
            for piece in embeddings:
                embedded[piece.start : piece.start + len(piece.embeddings)] = piece.embeddings
            kwargs = {**kwargs, "inputs_embeds": embedded[None]}
        else:
            kwargs = {**kwargs, "input_ids": tokens[None]}
        out = self.view(use_cache=False, return_dict=True, **kwargs)
        logits: torch.Tensor = out.logits
        return logits[0]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all parameters except an embedding that is only looked up."""
        # A weight that is sharded over ranks counts with this rank's part.
        seen: dict[int, int] = {id(p): getattr(p, "_local_tensor", p).nbytes for p in self.view.parameters()}
        view: Any = self.view
        embedding, output = view.get_input_embeddings(), view.get_output_embeddings()
        if output is not None and getattr(output, "weight", None) is not embedding.weight:
            seen.pop(id(embedding.weight), None)
        return sum(seen.values())


def _parameters(module: nn.Module) -> set[str]:
    """Names of the arguments that a model's forward takes, itself or in a call to which it passes its keywords."""
    # A forward set on the instance precedes the class's forward, and usually calls it.
    forwards = [vars(module).get("forward"), *(vars(base).get("forward") for base in type(module).__mro__)]
    names: set[str] = set()
    for forward in forwards:
        if not callable(forward):
            continue
        parameters = inspect.signature(forward).parameters.values()
        names.update(one.name for one in parameters if one.kind not in _OPEN)
        if forward is not forwards[0] and all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters):
            break
    if names <= {"self"}:
        # The forward passes all arguments on: if not to a base class, then to the model within.
        names.update(*(_parameters(child) for child in module.children() if isinstance(child, PreTrainedModel)))
    return names
