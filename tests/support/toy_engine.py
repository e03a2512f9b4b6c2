"""A whole engine on the simulated device, around a toy model whose tokens depend on everything that it reads.

The toy model writes every token into pages and predicts the next one from a hash over the row's pages, its length and
a 'weight', which is also part of what it writes. A stale table, a page with another sequence's tokens or of an older
weight, or an input that arrived too early changes the hash. With states, each row also keeps a hash of all its tokens,
which changes its next token and which no page holds. Of the tokens that a step computes, a row reads its own
only: what other rows of the step write stands there for later steps, as in a model whose rows run in any order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_async_batching.config import Admission
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Plan
from hf_async_batching.core.request import Request
from hf_async_batching.core.row_layout import HISTORY_START
from hf_async_batching.core.step_layout import Padding, Sections
from hf_async_batching.devices.base import Guard, Stream
from hf_async_batching.devices.simulated import SimulatedDevice
from hf_async_batching.engine.engine import Engine
from hf_async_batching.kv_cache.state_tables import StateShape, StateTables
from hf_async_batching.model.forward.step_inputs import StepInputs
from hf_async_batching.runner.model_runner import ModelRunner
from hf_async_batching.runner.pipeline import Pipeline
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.scheduler.outputs import TokenOutput
from hf_async_batching.scheduler.prompt_lookup import MAX_DRAFTED
from hf_async_batching.scheduler.scheduler import Scheduler

VOCAB = 29
EOS = 7
WEIGHT = 12345
STATE = ("hash", (1,), torch.int64)
_PRIME = 1_000_003


def _mix(state: int, value: int) -> int:
    return (state * 31 + value * 7919 + 17) % _PRIME


def _slot(token: int, position: int, weight: int) -> int:
    return token * 1009 + position + 77_777 * weight


def reference(
    request: Request,
    weight: int = WEIGHT,
    window: int | None = None,
    groups: int = 1,
    full_attention_groups: int = 0,
    *,
    with_states: bool = False,
) -> list[int]:
    """The tokens of a request, by the definition of the toy model alone."""
    tokens = list(request.prompt)
    while len(tokens) - len(request.prompt) < request.max_new_tokens:
        state = weight
        for group in range(groups):
            for position, token in enumerate(tokens):
                if window is None or group < full_attention_groups or position >= len(tokens) - window:
                    state = _mix(state, _slot(token, position, weight) + group)
        if with_states:
            hashed = weight
            for position, token in enumerate(tokens):
                hashed = _mix(hashed, _slot(token, position, weight))
            state = _mix(state, hashed)
        tokens.append(state % VOCAB)
        if tokens[-1] in request.eos_token_ids:
            break
    return tokens[len(request.prompt) :]


class ToyForward:
    """The model: one int64 per page slot. Each group of layers reads its own pages, one after the other."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        window: int | None = None,
        groups: int = 1,
        full_attention_groups: int = 0,
        states: StateTables | None = None,
    ) -> None:
        self.states = states
        self.window = window
        self.groups = groups
        self.full_attention_groups = full_attention_groups
        self.pages = torch.zeros(num_pages + 1, page_size, dtype=torch.int64)
        self.weight = torch.zeros(1, dtype=torch.int64)
        self.owners: dict[int, Request] = {}
        self.written_after_the_end = 0

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        context = inputs.context
        size = self.pages.shape[1]
        tables = context.page_table.tolist() if self.groups > 1 else [context.page_table.tolist()]
        rows, positions, weight = context.rows.tolist(), inputs.position_ids.tolist(), int(self.weight)
        before = self.pages.tolist()
        first: dict[int, int] = {}  # row -> where the tokens of this step begin
        hashed: list[int] = []
        for row, position, token in zip(rows, positions, inputs.token_ids.tolist(), strict=True):
            for group, table in enumerate(tables):
                self.pages[table[row][position // size], position % size] = _slot(token, position, weight) + group
            first.setdefault(row, position)
            if self.states is not None:
                table = self.states.table(*STATE)
                hashed.append(_mix(int(table[row, 0]) if position else weight, _slot(token, position, weight)))
                table[row, 0] = hashed[-1]
            if row and position >= len(self.owners[row].prompt) and token in self.owners[row].eos_token_ids:
                self.written_after_the_end += 1
        after = self.pages.tolist()
        sampled = range(len(rows)) if inputs.sample_index is None else inputs.sample_index.tolist()
        logits = torch.zeros(len(sampled), VOCAB)
        for out, i in enumerate(sampled):
            state = weight
            for group, table in enumerate(tables):
                sees_all = self.window is None or group < self.full_attention_groups
                for position in range(0 if sees_all else max(0, positions[i] + 1 - self.window), positions[i] + 1):
                    memory = before if position < first[rows[i]] else after
                    state = _mix(state, memory[table[rows[i]][position // size]][position % size])
            if self.states is not None:
                state = _mix(state, hashed[i])
            logits[out, state % VOCAB] = 1.0
        return logits


@dataclass
class ToyEngine:
    """An engine on a simulated device, its scheduler made by `scheduler_class`.

    With `outputs`, most requests want their scores or logits; with `remembers`, most keep their history, which is
    compared with what it must be after each of their steps. With `choosers`, the tokens of most are chosen outside of
    the engine, a while after their logits came, and some of these need the logits of a group.
    """

    depth: int
    seed: int
    without: Guard | None = None
    num_pages: int = 12
    page_size: int = 4
    max_rows: int = 4
    max_batch_tokens: int = 9
    scheduler_class: type[Scheduler] = Scheduler
    debug: bool = True
    fused: bool = False
    outputs: bool = False
    remembers: bool = False
    choosers: bool = False
    window: int | None = None
    groups: int = 1
    full_attention_groups: int = 0
    draft_rows: int = 0
    snapshots: int | None = None
    admission: Admission = "fcfs"
    least_rows: int = 1
    device: Any = None
    requests: dict[str, Request] = field(default_factory=dict)
    emitted: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    made: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    wrong_histories: list[str] = field(default_factory=list)
    histories: int = 0
    offered: dict[str, torch.Tensor] = field(default_factory=dict)
    choices: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed + 1)
        self._whole: dict[str, list[int]] = {}
        self.device = self.device or SimulatedDevice(self.seed, self.without)
        largest = Padding(self.max_batch_tokens + 32, self.max_rows + MAX_DRAFTED, self.max_rows)
        self.states: StateTables | None = None
        if self.snapshots is not None:
            name, shape, dtype = STATE
            shapes = {name: StateShape(shape, dtype)}
            self.states = StateTables(self.max_rows + 1, torch.device("cpu"), shapes, self.snapshots)
        self.forward = ToyForward(
            self.num_pages, self.page_size, self.window, self.groups, self.full_attention_groups, self.states
        )
        self.state = RowTables(
            max_rows=max(self.max_rows, self.least_rows),
            max_pages_per_row=self.num_pages,
            device=torch.device("cpu"),
            fused=self.fused,
            max_length=self.num_pages * self.page_size,
            vocab_size=VOCAB,
            max_samples=self.max_rows + MAX_DRAFTED,
            padding=largest,
            groups=self.groups,
        )
        graphs = self.device.supports_graphs
        self.runner = ModelRunner(
            self.forward,
            self.state,
            self.device,
            max_rows=self.max_rows,
            largest=largest,
            spread=self.admission == "longest_first",
            graphs=graphs,
            least_rows=self.least_rows,
            states=self.states,
        )
        run = self.runner.run

        def run_for_owners(plan: Plan, *rest: Any) -> None:
            self.forward.owners.update((new_row.row, new_row.request) for new_row in plan.new_rows)
            run(plan, *rest)
            for row in (*plan.decode_rows, *[chunk.row for chunk in plan.chunks]):
                if self.forward.owners[row].logits.needs_memory:
                    self._compare_history(row)

        self.runner.run = run_for_owners  # type: ignore[method-assign]
        limits = Sections.largest(
            max_rows=self.max_rows,
            max_batch_tokens=largest.tokens,
            num_pages=self.num_pages,
            writes=self.num_pages * self.page_size,
            drafted=largest.sections.samples - self.max_rows,
        )
        pipeline = Pipeline(
            self.device, self.state, self.runner, depth=self.depth, limits=limits, tile_size=3, logit_size=VOCAB
        )
        self.scheduler = self.scheduler_class(
            num_pages=self.num_pages,
            page_size=self.page_size,
            max_rows=self.max_rows,
            max_batch_tokens=self.max_batch_tokens,
            max_writes=self.num_pages * self.page_size,
            window=self.window,
            groups=self.groups,
            full_attention_groups=self.full_attention_groups,
            snapshots=self.snapshots,
            draft_rows=self.draft_rows,
            admission=self.admission,
        )
        # What has no owner means nothing: the adversary overwrites it at once, in no stream's order.
        self.scheduler.pages.on_release = self._scribble_pages
        self.scheduler.rows.on_release = self._scribble_rows
        self.engine = Engine(self.scheduler, pipeline, self.device, depth=self.depth, debug=self.debug)
        # The caller's stream is still writing the weights when the first request comes.
        self.write_weight(WEIGHT)

    def reference(self, request: Request, weight: int = WEIGHT) -> list[int]:
        """The tokens of a request, by the definition of this engine's model."""
        with_states = self.states is not None
        return reference(
            request, weight, self.window, self.groups, self.full_attention_groups, with_states=with_states
        )

    def write_weight(self, weight: int) -> None:
        """Change the model in place, on the caller's stream, which later steps wait for."""
        self.device.launch(Stream.CALLER, lambda: self.forward.weight.fill_(weight))
        self.engine.pipeline.order_after_caller()

    def _scribble_pages(self, pages: list[int]) -> None:
        for page in pages:
            self.forward.pages[page] = self._random.randrange(_PRIME)

    def _scribble_rows(self, rows: list[int]) -> None:
        for row in rows:
            self.state.last_token[row] = self._random.randrange(VOCAB)
            self.state.finished[row] = self._random.randrange(2)
            self.state.lengths[row] = self._random.randrange(self.num_pages * self.page_size)
            if self.states is not None:
                self.states.table(*STATE)[row] = self._random.randrange(_PRIME)
            self.state.page_table[..., row, :] = self._random.randrange(1, self.num_pages + 1)

    def step(self) -> None:
        """One step; keeps what it emitted."""
        token_outputs = self.engine.step()
        for request_id, made in self.engine.outputs.items():
            self.made.setdefault(request_id, []).append(made)
        self._keep(token_outputs)
        for request_id, logits in self.engine.offered:
            assert request_id not in self.reasons, "logits of a request that has ended"
            assert request_id not in self.offered, "logits before the token that was chosen from the last ones"
            self.offered[request_id] = logits

    def choose(self, all_of_them: bool) -> None:
        """Let choosers choose that have what they need: all of them, or some."""
        for request_id in list(self.offered):
            group = self.requests[request_id].group
            members = [i for i, r in self.requests.items() if i == request_id or (group and r.group == group)]
            live = [i for i in members if i not in self.reasons]
            if request_id not in self.offered or any(i not in self.offered for i in live):
                continue
            if not all_of_them and self._random.random() < 0.5:
                continue
            tokens = {i: int(self.offered.pop(i).argmax()) for i in live}
            for i, token in tokens.items():
                self._choose(i, token)

    def _choose(self, request_id: str, token: int) -> None:
        """What the loops beside the engine do with a token."""
        request, tokens = self.requests[request_id], self.emitted.setdefault(request_id, [])
        tokens.append(token)
        self.choices += 1
        if token in request.eos_token_ids:
            self.cancel(request_id)
            self.reasons[request_id] = "eos"
            return
        output = self.engine.choose(request_id, token)
        if output is not None:
            self._keep([output])

    def cancel(self, request_id: str) -> None:
        """Cancel a request that may have ended."""
        output = self.engine.cancel(request_id)
        if output is not None:
            self._keep([output])

    def extras(self, request_id: str, prompt: tuple[int, ...], rng: random.Random) -> dict[str, Any]:
        """What a request wants beyond tokens."""
        wanted: dict[str, Any] = {}
        if self.outputs and rng.random() < 0.7:
            wanted = {"output_scores": rng.random() < 0.7, "output_logits": rng.random() < 0.7}
        if self.remembers and rng.random() < 0.7:
            # Longer than any history, so that it changes no token.
            wanted["logits"] = LogitsParams(no_repeat_ngram_size=64)
        if self.choosers and rng.random() < 0.7:
            wanted["chooser"] = "outside"
            # Few enough that a group fits alone, as is seen to where requests are submitted.
            wanted["group"] = rng.choice((None, f"group {int(request_id) // 2}"))
        if self.draft_rows and rng.random() < 0.8:
            wanted["lookup_tokens"] = rng.randint(1, 6)
        return wanted

    def _compare_history(self, row: int) -> None:
        request, length = self.forward.owners[row], int(self.state.lengths[row])
        whole = self._whole.get(request.request_id)
        if whole is None:
            endless = replace(request, max_new_tokens=request.max_new_tokens + 4, eos_token_ids=())
            whole = self._whole[request.request_id] = [*request.prompt, *self.reference(endless)]
        if any(token in request.eos_token_ids for token in whole[len(request.prompt) : length]):
            return  # a surplus step: the request has ended
        self.histories += 1
        assert self.state.memory.words is not None
        history = self.state.memory.words[row, HISTORY_START : HISTORY_START + length].tolist()
        if history != whole[:length]:
            self.wrong_histories.append(f"{history} for {whole[:length]}")

    def _keep(self, token_outputs: list[TokenOutput]) -> None:
        for output in token_outputs:
            assert output.request_id not in self.reasons, "a token or an end after the end"
            if output.token is not None:
                self.emitted.setdefault(output.request_id, []).append(output.token)
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason


def run_random_schedule(
    engine: ToyEngine, seed: int, num_requests: int = 7, conversations: bool = False
) -> dict[str, Request]:
    """Drive an engine through arrivals, cancels, ends by EOS and by length, and shortage of pages.

    With `conversations`, prompts begin with one of two system prompts, or with an earlier request and its completion.
    """
    rng = random.Random(seed)
    capacity = engine.num_pages // engine.groups * engine.page_size
    requests = engine.requests
    cancelled = rng.choice((0.0, 0.0, 0.05))
    systems = [_tokens(rng, rng.randint(4, 13)) for _ in range(2)]
    for _ in range(2000):
        if len(requests) == num_requests and not engine.engine.has_work and not engine.engine.waits_outside:
            return requests
        while len(requests) < num_requests and rng.random() < 0.4:
            prompt = _continued(rng, engine, systems) if conversations else _tokens(rng, rng.randint(1, 18))
            request = Request(
                request_id=str(len(requests)),
                prompt=prompt,
                max_new_tokens=rng.randint(1, min(14, capacity - len(prompt))),
                eos_token_ids=(EOS,) if rng.random() < 0.7 else (),
                **engine.extras(str(len(requests)), prompt, random.Random(seed + len(requests))),
            )
            requests[request.request_id] = request
            engine.engine.add(request)
        if requests and rng.random() < cancelled:
            engine.cancel(rng.choice(list(requests)))
        if engine.engine.has_work:
            engine.step()
        engine.choose(all_of_them=not engine.engine.has_work)
    raise RuntimeError("the schedule has no end")


def _tokens(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(length))


def _continued(rng: random.Random, engine: ToyEngine, systems: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The same prompt again, the next turn of a conversation, or the first turn of one."""
    earlier = rng.choice(list(engine.requests.values())) if engine.requests else None
    kind = rng.random()
    if earlier is not None and kind < 0.15:
        return earlier.prompt
    if earlier is not None and kind < 0.6:
        # Whatever is there: also of requests that are live or were cancelled.
        turn = (*earlier.prompt, *engine.emitted.get(earlier.request_id, ()), *_tokens(rng, rng.randint(1, 4)))
        if len(turn) <= 30:
            return turn
    return (*rng.choice(systems), *_tokens(rng, rng.randint(1, 5)))


def verify(engine: ToyEngine, requests: dict[str, Request], weight: int = WEIGHT) -> None:
    """Every token right, every request ended, every page and row back."""
    for request_id, request in requests.items():
        got, want = engine.emitted.get(request_id, []), engine.reference(request, weight)
        if engine.reasons[request_id] == "cancelled":
            assert got == want[: len(got)], f"request {request_id}: {got} is no prefix of {want}"
        else:
            assert got == want, f"request {request_id}: {got} != {want}"
            expected = "eos" if want[-1] in request.eos_token_ids else "length"
            assert engine.reasons[request_id] == expected
    assert not wrong_outputs(engine)
    assert not engine.forward.written_after_the_end, "a surplus step wrote to the pages of a row that had ended"
    assert engine.scheduler.pages.in_use == 0
    assert engine.scheduler.rows.in_use == 0


def wrong_outputs(engine: ToyEngine) -> list[str]:
    """Requests whose scores or logits are not those of the toy model, or were not asked for."""
    wrong = []
    for request_id, request in engine.requests.items():
        tokens, made = engine.emitted.get(request_id, []), engine.made.get(request_id, [])
        asked = (request.output_scores, request.output_logits)
        if len(made) != (len(tokens) if any(asked) else 0):
            wrong.append(f"{request_id}: {len(made)} for {len(tokens)} tokens")
        for token, lines in zip(tokens, made, strict=False):
            one_hot = torch.zeros(VOCAB)
            one_hot[token] = 1.0
            if any(want and (line is None or not torch.equal(line, one_hot)) for want, line in zip(asked, lines)):
                wrong.append(f"{request_id}: not {token}")
    return wrong
