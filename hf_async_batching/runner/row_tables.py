"""The tables on the device that last as long as a row, and the carry-over that reads them.

Every table is indexed by row. Row 0 is the padding row: no request has it, and its entries in all tables stay 0.

A row that has sampled an end-of-sequence token, or reached its length, is *finished*. The host learns this when the
step's tokens arrive. By then it may have planned more steps for the row; the row's entries in these steps are padding.
The flag saves work and keeps the row's pages unchanged; the host decides which token ends a request.
"""

from __future__ import annotations

import torch

from hf_async_batching.attention.base import DecodeContext, MixedContext
from hf_async_batching.core.plan import Features
from hf_async_batching.core.row_layout import FIRST_EOS, FIRST_SHIFT, MAX_LENGTH, PARAMS, START
from hf_async_batching.core.step_layout import NO_PADDING, Padding, Sections
from hf_async_batching.model.forward.step_inputs import StepInputs
from hf_async_batching.runtime.triton_start import runs_triton
from hf_async_batching.sampling.outcome_marks import tokens_of, without_token
from hf_async_batching.sampling.token_history import TokenHistory


class RowTables:
    """The row tables. All methods enqueue device work and must run inside a pipeline kernel.

    Args:
        max_rows: Rows that requests can own; the tables have one more.
        max_pages_per_row: Width of the page table.
        device: Device of the tables.
        fused: Whether decode steps use the Triton kernels; None for CUDA with Triton.
        max_length: Tokens that a row can reach; the width of the token history.
        vocab_size: Upper bound of token ids, exclusive; for the token history.
        max_samples: Tokens that a step can sample; None for `max_rows`.
        padding: The largest step with prompts that is captured.
        groups: Groups of layers with separate pages.
        position_dims: Dimensions of a token's position; 0 if it is one number.

    Attributes:
        last_token: int32 [rows], the last sampled token of the row; 0 if none could be drawn.
        lengths: int32 [rows], tokens whose keys and values are in the cache.
        finished: int32 [rows], 1 for a row whose request ends with `last_token`, or for lack of one.
        page_table: int32 [rows, max_pages_per_row], or [groups, rows, max_pages_per_row].
        params: int32 [rows, PARAMS], sampling parameters (columns in `row_layout`).
        decode_rows: int32 [max_rows], the rows of a decode step; they stay until the host sends others.
        padded: int32 [3 * tokens + 5 * entries], the inputs of a step with prompts, at the address that its graph
            reads.
        memory: Histories, rules and occurred tokens, for rows that need them.
        out_tokens: int32 [max_samples], outcomes (see `outcomes`) of the last step, in plan order.
        out_logprobs: float32 [max_samples], their log-probabilities if requested.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_pages_per_row: int,
        device: torch.device,
        fused: bool | None = None,
        max_length: int = 0,
        vocab_size: int = 0,
        max_samples: int | None = None,
        padding: Padding = NO_PADDING,
        groups: int = 1,
        position_dims: int = 0,
    ) -> None:
        def table(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.last_token = table(max_rows + 1)
        self.lengths = table(max_rows + 1)
        self.finished = table(max_rows + 1)
        self._groups = groups
        self._position_dims = position_dims
        if groups == 1:
            self.page_table = table(max_rows + 1, max_pages_per_row)
        else:
            # A table that is not aligned to 16 bytes would need kernels of its own, compiled while a step waits.
            self.page_table = table(groups, max_rows + 1, -(-max_pages_per_row // 4) * 4)
        self.params = table(max_rows + 1, PARAMS)
        self.decode_rows = table(max_rows)
        self.padded = table(padding.sections.total)
        max_samples = max(max_rows if max_samples is None else max_samples, padding.sections.samples)
        self.out_tokens = table(max_samples)
        self.out_logprobs = table(max_samples, dtype=torch.float32)
        self._fused = runs_triton(device) if fused is None else fused
        self.memory = TokenHistory(max_rows=max_rows, max_length=max_length, vocab_size=vocab_size, device=device)

    @torch.inference_mode()
    def ready(self) -> None:
        """Compile the kernels of decode steps, on tables that no request uses yet."""
        inputs = self.decode_inputs(1)
        self.commit(inputs, torch.zeros_like(inputs.context.rows), None)

    def apply_updates(self, staged: torch.Tensor, sections: Sections) -> None:
        """Start new rows, and enter new pages and outside tokens, as `staging.encode` wrote them to `staged`."""
        size = sections.new_rows * (1 + PARAMS)
        if sections.new_rows:
            records = staged[:size].view(sections.new_rows, 1 + PARAMS)
            rows = records[:, 0]
            self.params[rows] = records[:, 1:]
            # From the record, even if it is 0: torch would copy a Python scalar from pageable host memory, and wait
            # for it.
            self.lengths[rows] = records[:, 1 + START]
            self.finished[rows] = torch.zeros_like(rows)
            self.memory.start(rows)
        if sections.new_pages:
            row, index, page = staged[size : size + 3 * sections.new_pages].view(-1, 3).unbind(1)
            if self._groups == 1:
                self.page_table[row, index] = page
            else:
                self.page_table[index % self._groups, row, index // self._groups] = page
        if sections.writes:
            row, column, value = staged[sections.writes_start : sections.given_start].view(3, -1).unbind(0)
            self.memory.write(row, column, value, self.params)
        if sections.given:
            row, token = staged[sections.given_start : sections.updates_end].view(2, -1).unbind(0)
            self.last_token[row] = token
        if sections.decode:
            start = sections.updates_end
            self.decode_rows[: sections.decode] = staged[start : start + sections.decode]

    def decode_inputs(self, size: int) -> StepInputs:
        """Carry-over for a step in which the first `size` entries of `decode_rows` decode one token each."""
        rows = self.decode_rows[:size]
        if self._fused:
            from hf_async_batching.runner.row_table_kernels import begin_decode

            rows, token_ids, position_ids, positions, context_lengths = begin_decode(
                rows, self.finished, self.lengths, self.last_token
            )
        else:
            rows = self._padding_where_finished(rows)
            positions = self.lengths[rows]
            token_ids, position_ids, context_lengths = self.last_token[rows].long(), positions.long(), positions + 1
        context = DecodeContext(self.page_table, rows, positions, context_lengths)
        rope = self._rope_positions(rows, position_ids)
        return StepInputs(token_ids, position_ids, None, context, rope_positions=rope)

    def mixed_inputs(self, staged: torch.Tensor, sections: Sections, num_decodes: int = 0) -> StepInputs:
        """Carry-over for a step with prompt pieces: the host's token if it gave one, else the row's last token.

        The first `num_decodes` tokens are known to be decoding rows, which attention can process faster.
        """
        start = sections.updates_end
        token_end = start + 3 * sections.tokens
        sample_end = token_end + sections.samples
        given, rows, offsets = staged[start:token_end].view(3, -1).unbind(0)
        samples = staged[token_end:sample_end].long()
        tile_rows, tile_queries, tile_lengths, tile_offsets = staged[sample_end : sections.total].view(4, -1).unbind(0)
        # The entry and the tile of a finished decoding row; a row with a prompt piece is never finished.
        rows, tile_rows = self._padding_where_finished(rows), self._padding_where_finished(tile_rows)
        positions = self.lengths[rows] + offsets
        token_ids = torch.where(given < 0, self.last_token[rows], given)
        context = MixedContext(
            self.page_table,
            rows,
            positions,
            tile_rows=tile_rows,
            tile_queries=tile_queries,
            tile_lengths=tile_lengths,
            tile_positions=self.lengths[tile_rows] + tile_offsets,
            decode_lengths=positions[:num_decodes] + 1,
        )
        position_ids = positions.long()
        rope = self._rope_positions(rows, position_ids)
        return StepInputs(token_ids.long(), position_ids, samples, context, rope_positions=rope)

    def _rope_positions(self, rows: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor | None:
        """int64 [dims, tokens], the positions of tokens behind their rows' prompts."""
        if not self._position_dims:
            return None
        shifts = self.params[rows, FIRST_SHIFT : FIRST_SHIFT + self._position_dims]
        return position_ids + shifts.t()

    def keep_padded(self, staged: torch.Tensor, sections: Sections) -> None:
        """Copy the inputs of a padded step from its staged array, in which they start at different offsets."""
        size = sections.total - sections.updates_end
        self.padded[:size] = staged[sections.updates_end : sections.total]

    def padded_inputs(self, padding: Padding) -> StepInputs:
        """Carry-over for a padded step whose inputs were kept."""
        return self.mixed_inputs(self.padded[: padding.sections.total], padding.sections, padding.decodes)

    def note(self, inputs: StepInputs, features: Features) -> None:
        """Enter the inputs of a step into the memories of its rows, if any row needs it."""
        if features.memory or features.seen:
            context = inputs.context
            if self._fused and isinstance(context, DecodeContext) and not features.memory:
                from hf_async_batching.sampling.triton_sampler import mark_seen

                assert self.memory.seen is not None
                mark_seen(context.rows, inputs.token_ids, self.memory.seen)
                return
            self.memory.note(context.rows, context.positions, inputs.token_ids, self.params, words=features.memory)

    def commit(self, inputs: StepInputs, tokens: torch.Tensor, logprobs: torch.Tensor | None) -> None:
        """Advance the rows of a step, and keep the sampled tokens.

        Args:
            inputs: The step.
            tokens: int32 [sampled], outcomes (see `outcomes`).
            logprobs: float32 [sampled], or None.
        """
        context = inputs.context
        if isinstance(context, DecodeContext) and self._fused:
            from hf_async_batching.runner.row_table_kernels import commit_decode

            commit_decode(
                context.rows,
                context.context_lengths,
                tokens,
                logprobs,
                params=self.params,
                lengths=self.lengths,
                last_token=self.last_token,
                finished=self.finished,
                out_tokens=self.out_tokens,
                out_logprobs=self.out_logprobs,
            )
            return
        if isinstance(context, DecodeContext):
            self.lengths[context.rows] = context.context_lengths
        else:
            self.lengths.index_add_(0, context.tile_rows, context.tile_lengths)
        rows = self.sampled_rows(inputs)
        # A row with several sampled positions continues from a token that the host will give, so any of its samples
        # may be kept here.
        records, taken = self.params[rows], tokens_of(tokens)
        is_eos = (records[:, FIRST_EOS:] == taken[:, None]).any(1)
        is_last = self.next_positions(inputs) + 1 >= records[:, MAX_LENGTH]
        self.finished[rows] = (is_eos | is_last | without_token(tokens)).int()
        self.last_token[rows] = taken
        for table in (self.lengths, self.finished, self.last_token):
            table[:1].zero_()  # the padding row, to which many entries may have written
        self.out_tokens[: tokens.shape[0]] = tokens
        if logprobs is not None:
            self.out_logprobs[: tokens.shape[0]] = logprobs

    def _padding_where_finished(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * (1 - self.finished[rows])

    def sampled_rows(self, inputs: StepInputs) -> torch.Tensor:
        """int32 [sampled], the row of each sampled position."""
        rows = inputs.context.rows
        return rows if inputs.sample_index is None else rows[inputs.sample_index]

    def next_positions(self, inputs: StepInputs) -> torch.Tensor:
        """int64 [sampled], the position that each sampled token will take."""
        positions = inputs.position_ids
        return (positions if inputs.sample_index is None else positions[inputs.sample_index]) + 1
