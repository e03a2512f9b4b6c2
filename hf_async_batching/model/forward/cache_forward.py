"""Run a model's view with its family's own cache class, for families whose tokens cannot be packed.

Tokens of different rows cannot share one packed sequence if attention bypasses transformers' interface, builds its own
masks or keeps a recurrent state. But every family that generates can run as `generate` runs it: new tokens go in, with
the family's cache. How many rows share such a run depends on the family:

- *padded*: all rows that decode, the shorter ones padded on the left, as in a batch of `generate`;
- *lockstep*: rows of equal length, for families without padding (their positions follow the cache's length);
- *single*: one row at a time, each with its own cache object, for families with an unusual cache class.

Prompts are computed in pieces. If a family can continue its state by only one token at a time, the prompt is computed
at once with its last piece (*whole*). The parity check decides which of these ways serves a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from hf_async_batching.attention.base import AttentionBackend, AttentionContext, DecodeContext
from hf_async_batching.errors import UnsupportedModelError, does_not_fit
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.model.forward.generate_loop import CACHE_NAMES, GenerateLoop, prepare_view
from hf_async_batching.model.forward.row_cache import RowCache
from hf_async_batching.model.forward.step_inputs import StepInputs
from hf_async_batching.model.view.model_view import embedding_shape, make_view

Batching = Literal["padded", "lockstep", "single"]

MODES: tuple[tuple[Batching, bool], ...] = (
    ("padded", False),
    ("padded", True),
    ("lockstep", False),
    ("lockstep", True),
    ("single", True),
)
"""Pairs of a way to batch and whether prompts are computed whole, the fastest pair first."""

_PROBE_TOKENS = 3
# Arguments of the forward that follow from the rows' lengths. A family with further arguments runs row by row.
_FOLLOWS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}


class _Piece(NamedTuple):
    """New tokens of a row; the first is at `position` in the row and at `query` among the step's tokens."""

    row: int
    query: int
    length: int
    position: int


class _Work(NamedTuple):
    """A row's tokens to compute now; the last of them is at `query` among the step's tokens."""

    row: int
    start: int
    tokens: torch.Tensor
    query: int


class CacheForward:
    """Calls the view for one step.

    Args:
        model: The user's model; the forward makes a shared-weight view of it.
        batching: Which rows share a run.
        whole_prompts: Whether a prompt waits for its last piece and is then computed at once.

    Attributes:
        name: Class of the model, for messages.
        route: How the model is served, for messages.
        layers: Shapes of keys and values per layer, for the pages; empty if there are none.
        vocab_size: Rows of the input embedding; token ids must be below.
        embedding_size: Columns of the input embedding.
        logit_size: Width of the logits; it can differ from `vocab_size`.
        device: Device of the weights.
        dtype: Dtype of the logits.
        whole_prompts: The argument.
        recomputes: Whether a row can be computed again from its tokens.
        prefix_cacheable: Whether pages hold the whole state of a prefix.
        state_bytes: Memory per row outside its pages, in bytes.

    Raises:
        UnsupportedModelError: The model cannot run in this way.
    """

    tile_size = 1 << 30
    capturable = False
    takes_embeddings = False
    position_dims = 0
    packed_groups: int | None = None

    def __init__(self, model: PreTrainedModel, batching: Batching = "single", whole_prompts: bool = True) -> None:
        self.name = type(model).__name__
        self.view: Any = make_view(model, None)
        prepare_view(self.view)
        self.device: torch.device = next(self.view.parameters()).device
        self.dtype: torch.dtype = torch.float32
        self.vocab_size, self.embedding_size = embedding_shape(self.view)
        self.logit_size = self.vocab_size
        self.whole_prompts = whole_prompts
        self.recomputes = batching != "single"
        self._batching = batching
        self._rows: RowCache | None = None
        self._cache_name = ""
        self._arguments: dict[str, Any] = {}
        try:
            with torch.inference_mode():
                self._probe()
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.name} is not served: {error}") from error
        except Exception as error:
            if not does_not_fit(error):
                raise
            raise UnsupportedModelError(
                f"{self.name} is not served: it does not generate ({type(error).__name__}: {error})"
            ) from error
        self.layers: list[LayerShape] = self._rows.shapes if self._rows is not None else []
        self.state_bytes = self._rows.state_bytes if self._rows is not None else 0
        kept = [batching, "row states" if self.state_bytes else "", "whole prompts" if self.whole_prompts else ""]
        self.route = ", ".join(filter(None, kept)) if self._rows is not None else batching
        self.prefix_cacheable = bool(self.layers) and not whole_prompts and not self.state_bytes
        self._loops: dict[int, GenerateLoop] = {}
        self._held: dict[int, list[torch.Tensor]] = {}
        self._pages: PagedCache | None = None
        self._num_rows = 0

    def _probe(self) -> None:
        """Run a few tokens as `generate` does, and read the cache that they leave."""
        tokens = torch.arange(1, _PROBE_TOKENS + 1, device=self.device)[None] % self.vocab_size
        loop = GenerateLoop(self.view)
        loop.prepare(tokens)
        prepared = dict(loop.arguments)
        pristine = {name: copy.deepcopy(prepared[name]) for name in CACHE_NAMES if prepared.get(name) is not None}
        logits = loop.start(tokens)
        self.logit_size, self.dtype = logits.shape[-1], logits.dtype
        if self._batching == "single":
            return
        if len(pristine) != 1:
            raise UnsupportedModelError("it makes its own cache")
        self._cache_name, cache = next(iter(pristine.items()))
        unknown = {name for name, value in prepared.items() if name not in _FOLLOWS and not _is_constant(value)}
        if unknown != {self._cache_name}:
            raise UnsupportedModelError(f"its forward takes {', '.join(sorted(unknown - {self._cache_name}))}")
        positions = prepared.get("position_ids")
        if positions is not None and positions.dim() != 2:
            raise UnsupportedModelError("its positions have several dimensions")
        self._arguments = prepared
        self._rows = RowCache(cache, loop.arguments[self._cache_name], _PROBE_TOKENS)

    def bind(self, cache: PagedCache, backend: AttentionBackend) -> None:  # noqa: ARG002
        """Use these pages from now on; the state of all rows is dropped."""
        self._pages = cache
        self._num_rows = 0
        self._loops.clear()
        self._held.clear()

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [sampled, vocab] in the model's dtype, one row per entry of `sample_index` (all tokens if None)."""
        context = inputs.context
        if self._rows is not None and self._num_rows != context.page_table.shape[0]:
            self._num_rows = context.page_table.shape[0]
            self._rows.allocate(self._num_rows)
        sampled = inputs.sample_index
        queries = list(range(len(inputs.token_ids))) if sampled is None else sampled.tolist()
        logits: dict[int, torch.Tensor] = {}
        for group in self._groups(self._work(inputs, set(queries))):
            out = self._run_single(group[0]) if self._rows is None else self._run(group, context)
            logits.update({work.query: row for work, row in zip(group, out, strict=True)})
        # Padding entries keep zeros; nothing reads them.
        out = torch.zeros(len(queries), self.logit_size, dtype=self.dtype, device=self.device)
        for index, query in enumerate(queries):
            if query in logits:
                out[index] = logits[query]
        return out

    def _work(self, inputs: StepInputs, sampled: set[int]) -> list[_Work]:
        work: list[_Work] = []
        for piece in _pieces(inputs.context):
            end = piece.query + piece.length
            tokens = inputs.token_ids[piece.query : end]
            start = piece.position
            if self.whole_prompts:
                if start == 0:
                    self._held[piece.row] = []
                held = self._held.get(piece.row)
                if held is not None:
                    held.append(tokens.clone())
                    if end - 1 not in sampled:
                        continue
                    del self._held[piece.row]
                    tokens, start = torch.cat(held), 0
            work.append(_Work(piece.row, start, tokens, end - 1))
        return work

    def _groups(self, work: list[_Work]) -> list[list[_Work]]:
        key: Callable[[_Work], Any]
        if self._batching == "single":
            return [[one] for one in work]
        if self._batching == "padded":
            key = lambda one: (one.start > 0 and len(one.tokens) == 1) or (one.start, len(one.tokens))  # noqa: E731
        else:
            key = lambda one: (one.start, len(one.tokens))  # noqa: E731
        groups: dict[Any, list[_Work]] = {}
        for one in work:
            groups.setdefault(key(one), []).append(one)
        return list(groups.values())

    def _run(self, group: list[_Work], context: AttentionContext) -> torch.Tensor:
        assert self._rows is not None and self._pages is not None
        starts = [work.start for work in group]
        rows = torch.tensor([work.row for work in group], device=self.device)
        tokens = torch.stack([work.tokens for work in group])
        count, longest = tokens.shape[1], max(starts)
        step = self._rows.load(rows, starts, context.page_table, self._pages)
        arguments = {**self._arguments, self._cache_name: step.cache}
        if arguments.get("position_ids") is not None:
            begins = torch.tensor(starts, device=self.device)[:, None]
            arguments["position_ids"] = begins + torch.arange(count, device=self.device)
        if min(starts) < longest:
            # `generate` drops a mask that is all ones.
            padding = torch.tensor([longest - start for start in starts], device=self.device)[:, None]
            arguments["attention_mask"] = (torch.arange(longest + count, device=self.device) >= padding).long()
        prepared = self.view.prepare_inputs_for_generation(
            tokens, next_sequence_length=count, is_first_iteration=longest == 0, **arguments
        )
        out = self.view(**prepared, return_dict=True)
        self._rows.store(step, rows, starts, context.page_table, self._pages)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def _run_single(self, work: _Work) -> list[torch.Tensor]:
        if work.start == 0:
            loop = self._loops[work.row] = GenerateLoop(self.view)
            return [loop.start(work.tokens[None])]
        return [self._loops[work.row].step(work.tokens[None])]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum({id(p): p.nbytes for p in self.view.parameters()}.values())


def _is_constant(value: Any) -> bool:
    """Whether an argument has the same value for any tokens."""
    if isinstance(value, dict):
        return all(_is_constant(item) for item in value.values())
    return value is None or isinstance(value, (bool, int, float, str))


def _pieces(context: AttentionContext) -> list[_Piece]:
    """The step's tokens by row, without the padding row's tokens."""
    if isinstance(context, DecodeContext):
        rows, positions = context.rows.tolist(), context.positions.tolist()
        pieces = [_Piece(row, query, 1, position) for query, (row, position) in enumerate(zip(rows, positions))]
    else:
        tiles = (context.tile_rows, context.tile_queries, context.tile_lengths, context.tile_positions)
        pieces = [_Piece(*tile) for tile in torch.stack([tensor.int() for tensor in tiles], 1).tolist()]
    return [piece for piece in pieces if piece.row and piece.length]
