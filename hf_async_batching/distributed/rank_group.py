"""The ranks over which transformers has sharded a model, and the messages from rank 0 to the others.

A model that was loaded with `tp_plan="auto"` computes its layers with collectives: every rank must run the same
forwards in the same order. Only rank 0 has requests and a scheduler. It broadcasts its plans over a Gloo group on the
host, and every rank launches them on its own tables and pages. The model itself gathers the logits, so all ranks
sample the same tokens from the same numbers, and no tokens are sent.
"""

from __future__ import annotations

import datetime
import pickle
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedModel

from hf_async_batching.core.plan import Features, Plan
from hf_async_batching.core.request import Request
from hf_async_batching.errors import UnsupportedArgumentError, UnsupportedModelError

# Most messages are plans of a few hundred bytes, for which one broadcast is enough.
_BUFFER = 8192
_LENGTH = 8


@dataclass(frozen=True, slots=True)
class Start:
    """Build an engine; all ranks do it at the same time, because its checks run the model."""


@dataclass(frozen=True, slots=True)
class Step:
    """Launch a plan.

    Attributes:
        plan: The plan, without its decode rows if they are the previous plan's.
        rows_unchanged: Whether the decode rows are the previous plan's.
        collected: Steps whose tokens rank 0 has read since the last message, with checksums of the tokens.
    """

    plan: Plan
    rows_unchanged: bool
    collected: dict[int, int]


@dataclass(frozen=True, slots=True)
class Warm:
    """Run and capture every decode bucket."""

    features: Features


@dataclass(frozen=True, slots=True)
class Tune:
    """Measure kernel settings, and capture again: all ranks must replay a step, or none."""


@dataclass(frozen=True, slots=True)
class End:
    """Close the engine."""


@dataclass(frozen=True, slots=True)
class Quit:
    """Stop following."""


Message = Start | Step | Warm | Tune | End | Quit


class RankGroup:
    """The ranks of a model.

    Args:
        size: Number of ranks: all processes of the default group.

    Attributes:
        rank: The rank of this process.
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.rank = distributed.get_rank()
        self.size = size
        # The timeout is very long, because an engine may wait for work for any time.
        self._group = distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=365))
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: PreTrainedModel) -> RankGroup | None:
        """The ranks of a model; None for a model that is not sharded. All ranks must call it at the same time.

        Raises:
            UnsupportedModelError: The model is sharded in a way that is not served.
        """
        size = getattr(model, "_tp_size", None) or 1
        sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
        if size == 1 and not sharded:
            return None
        name = type(model).__name__
        if size == 1:
            raise UnsupportedModelError(
                f"{name} is not served: its weights are sharded over processes, and not by transformers' tensor "
                "parallelism; load it with tp_plan='auto'"
            )
        if not distributed.is_initialized() or distributed.get_world_size() != size:
            processes = distributed.get_world_size() if distributed.is_initialized() else 1
            raise UnsupportedModelError(
                f"{name} is not served: its tensor parallelism has {size} ranks of {processes} processes; start as "
                "many processes as it has ranks"
            )
        return cls(size)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which plans."""
        return self.rank == 0

    def send(self, message: Message) -> None:
        """Send a message from rank 0 to the other ranks."""
        content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._broadcast(content)

    def receive(self) -> Message:
        """Wait for a message from rank 0."""
        message: Message = pickle.loads(self._broadcast(None))
        return message

    def least(self, value: int) -> int:
        """The smallest value of all ranks; all ranks must call it."""
        tensor = torch.tensor([value], dtype=torch.int64)
        with self._lock:
            distributed.all_reduce(tensor, distributed.ReduceOp.MIN, group=self._group)
        return int(tensor)

    def _broadcast(self, content: bytes | None) -> bytes:
        buffer = torch.zeros(_BUFFER, dtype=torch.uint8)
        if content is not None:
            first = len(content).to_bytes(_LENGTH, "little") + content[: _BUFFER - _LENGTH]
            buffer[: len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
        distributed.broadcast(buffer, src=0, group=self._group)
        received = buffer.numpy().tobytes()
        length = int.from_bytes(received[:_LENGTH], "little")
        beginning = received[_LENGTH : _LENGTH + length]
        if length <= len(beginning):
            return beginning
        if content is not None:
            rest = torch.frombuffer(bytearray(content[len(beginning) :]), dtype=torch.uint8)
        else:
            rest = torch.zeros(length - len(beginning), dtype=torch.uint8)
        distributed.broadcast(rest, src=0, group=self._group)
        return beginning + rest.numpy().tobytes()


def check_sendable(request: Request) -> None:
    """Refuse a request that cannot be sent to the other ranks.

    Raises:
        UnsupportedArgumentError: The request holds embeddings, or an object that cannot be pickled.
    """
    if request.prompt_embeddings is not None:
        raise UnsupportedArgumentError("`inputs_embeds` are not served with tensor parallelism; pass token ids")
    try:
        pickle.dumps(request)
    except Exception as error:  # a caller's object can raise any error
        raise UnsupportedArgumentError(
            f"a logits processor of this request cannot be sent to the other ranks ({error}); leave it out, or use "
            "plain `model.generate`"
        ) from error


def checksum(tokens: Any) -> int:
    """A checksum of the tokens that a step has sampled."""
    return hash(tuple(tokens))
