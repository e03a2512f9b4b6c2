"""Scheduler and pipeline, step by step, without threads: the owner of an engine calls `step` until it has no work."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from hf_async_batching.core.plan import Launch, NewRow, Plan, Result
from hf_async_batching.core.request import Request
from hf_async_batching.core.timeline import Span, StepRecord
from hf_async_batching.devices.base import Device
from hf_async_batching.engine.plan_delay import PlanDelay
from hf_async_batching.errors import InvalidProbabilitiesError
from hf_async_batching.runner.pipeline import Pipeline
from hf_async_batching.scheduler.outputs import TokenOutput
from hf_async_batching.scheduler.scheduler import Scheduler


class Engine:
    """Keeps `depth` steps in flight.

    Args:
        scheduler: Makes plans.
        pipeline: Runs plans.
        device: The device whose events are timed.
        depth: Steps in flight at once.
        timeline_steps: Number of step records to keep.
        debug: Check the scheduler's bookkeeping after every step.

    Attributes:
        plan_delay: Decides how long plans can wait.
        depth: The argument; it may be lowered, and raised again up to the argument, between steps.
        records: Records of the last steps, oldest first.
        started: Rows of requests whose prompts began in the last call of `step`.
        outputs: Scores and logits, float32 [vocab] each or None, of requests that asked for them and got a token in
            the last call of `step`.
        offered: Request ids with the logits that the last call of `step` offered to their choosers, float32 [vocab]
            on the device.
        failed: Request ids with the errors that ended them in the last call of `step`; for example, no token could be
            drawn.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        device: Device,
        *,
        depth: int,
        timeline_steps: int = 512,
        debug: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.pipeline = pipeline
        self.device = device
        self.depth = depth
        self.records: deque[StepRecord] = deque(maxlen=timeline_steps)
        self.started: tuple[NewRow, ...] = ()
        self.outputs: dict[str, tuple[Any, Any]] = {}
        self.failed: list[tuple[str, BaseException]] = []
        self.offered: list[tuple[str, Any]] = []
        self._blocked = False  # nothing can advance before a chooser outside the engine has chosen
        self._in_flight: deque[Launch] = deque()
        self.plan_delay = PlanDelay()
        self._debug = debug

    def add(self, request: Request) -> None:
        """Queue a request; see `Scheduler.add`."""
        self._blocked = False
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> TokenOutput | None:
        """End a request; see `Scheduler.cancel`."""
        self._blocked = False
        return self.scheduler.cancel(request_id)

    def weights_updated(self) -> None:
        """Drop prefixes that were computed before; see `Scheduler.weights_updated`."""
        self.scheduler.weights_updated()

    def choose(self, request_id: str, token: int) -> TokenOutput | None:
        """Continue a request with its chooser's token; see `Scheduler.choose`."""
        self._blocked = False
        return self.scheduler.choose(request_id, token)

    def make_way(self) -> None:
        """Let waiting requests take the rows and pages of requests with slow choosers; see `Scheduler.make_way`."""
        self._blocked &= not self.scheduler.make_way()

    @property
    def has_work(self) -> bool:
        """Whether a step is in flight, or a live request can continue without a chooser."""
        return bool(self._in_flight) or (self.scheduler.has_live and not self._blocked)

    @property
    def waits_outside(self) -> bool:
        """Whether every live request waits for its chooser, or for rows or pages of such requests."""
        return self._blocked and self.scheduler.has_live

    def spare_seconds(self) -> float:
        """How long the next plan can wait for requests that could join it, in seconds; see `plan_delay`."""
        # With more steps in flight, results would wait too; with none, the device waits for the plan.
        if len(self._in_flight) != 1 or self.device.runs_inline or not self.scheduler.has_room:
            return 0.0
        plan = self._in_flight[0].plan
        if plan.chunks:
            return 0.0
        return self.plan_delay.spare_seconds(
            self.records, len(plan.decode_rows), plan.context_tokens, time.perf_counter()
        )

    @property
    def in_flight(self) -> str:
        """Describe the steps whose results have not arrived."""
        steps = [
            f"step {plan.step} ({len(plan.decode_rows)} rows that decode, {plan.num_prompt_tokens} tokens of prompts)"
            for plan in [launch.plan for launch in self._in_flight]
        ]
        return ", ".join(steps) or "a step that was being launched or read"

    def step(self) -> list[TokenOutput]:
        """Launch the next step if there is one; collect the oldest if `depth` are in flight or none was launched."""
        started = time.perf_counter()
        if self.outputs or self.failed or self.offered:
            self.outputs, self.failed, self.offered = {}, [], []
        plan = self.scheduler.plan()
        self.started = plan.new_rows if plan is not None else ()
        if self.started and any([new_row.again for new_row in self.started]):
            self.started = tuple(new_row for new_row in self.started if not new_row.again)
        self.plan_delay.planned(plan is not None)
        if plan is not None:
            self._in_flight.append(self.pipeline.launch(plan, started))
        elif not self._in_flight and self.scheduler.waits_outside:
            self._blocked = True
        elif not self._in_flight and self.scheduler.has_live:
            raise RuntimeError("the scheduler has live requests, but no step is in flight and it makes no plan")
        token_outputs: list[TokenOutput] = []
        if self._in_flight and (plan is None or len(self._in_flight) >= self.depth):
            token_outputs = self._collect(self._in_flight.popleft())
            # More than one step only after the depth was lowered.
            while len(self._in_flight) >= self.depth:
                token_outputs += self._collect(self._in_flight.popleft())
        if self._debug:
            self.scheduler.check_invariants()
        return token_outputs

    def _collect(self, launch: Launch) -> list[TokenOutput]:
        result = self.pipeline.collect(launch)
        arrived = time.perf_counter()
        token_outputs = self.scheduler.complete(result)
        if result.offered is not None:
            live = set(self.scheduler.offered)
            self.offered += [
                (offer.request_id, logits)
                for offer, logits in zip(launch.plan.offers, result.offered, strict=True)
                if offer.request_id in live
            ]
        if self.scheduler.undrawable:
            self.failed += [(failed, _undrawable(failed)) for failed in self.scheduler.undrawable]
            self.scheduler.undrawable.clear()
        if launch.plan.wanted:
            self._keep_outputs(launch.plan, result, token_outputs)
        compute = self._span(launch, "compute_start", "compute_done")
        assert compute is not None
        self.plan_delay.collected(arrived, *compute)
        plan = launch.plan
        self.records.append(
            StepRecord(
                step=plan.step,
                decode_rows=len(plan.decode_rows),
                prompt_tokens=plan.num_prompt_tokens,
                # With drafts, only the accepted tokens count.
                tokens=sum(new.token is not None for new in token_outputs) if plan.drafts else plan.num_sampled,
                context_tokens=plan.context_tokens,
                # If work runs during its launch, that part is not host time.
                plan=(launch.planned_at, compute[0] if self.device.runs_inline else launch.launched_at),
                settle=(arrived, time.perf_counter()),
                compute=compute,
                h2d=self._span(launch, "h2d_start", "h2d_done"),
                d2h=self._span(launch, "d2h_start", "d2h_done"),
            )
        )
        return token_outputs

    def _keep_outputs(self, plan: Plan, result: Result, token_outputs: list[TokenOutput]) -> None:
        made = {output.request_id for output in token_outputs if output.token is not None}
        wanted = [request_id for run in plan.wanted for request_id in run.request_ids]
        nothing = [None] * len(wanted)
        self.outputs = {
            request_id: (scores, logits)
            for request_id, scores, logits in zip(
                wanted, result.scores or nothing, result.logits or nothing, strict=True
            )
            if request_id in made
        }

    def _span(self, launch: Launch, start: str, end: str) -> Span | None:
        if end not in launch.events:
            return None
        return self.device.time_of(launch.events[start]), self.device.time_of(launch.events[end])

    def let_go(self) -> None:
        """Drop references to finished requests and to the last step's results, for an engine that waits."""
        self.started, self.outputs, self.failed, self.offered = (), {}, [], []
        self.scheduler.let_go()

    def close(self) -> None:
        """Wait until all device work has completed."""
        self.pipeline.close()
        self._in_flight.clear()


def _undrawable(request_id: str) -> InvalidProbabilitiesError:
    return InvalidProbabilitiesError(
        f"request {request_id}: probability tensor contains either `inf`, `nan` or element < 0: the scores hold NaN "
        "or inf, or all of them are -inf, so no token can be drawn; check the model's weights, `logits_processor` and "
        "`suppress_tokens`"
    )
