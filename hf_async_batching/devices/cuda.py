"""CUDA: three streams, blocking events, pinned host memory, graphs in one memory pool.

Only this module touches torch's streams, events and graphs. `runner/pipeline.py` decides their order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_async_batching.devices.base import Graph, Guard, Kernel, Stream
from hf_async_batching.runtime.gc_pause import no_collections

# A device must not be synchronized while one of its streams is being captured; captures of several engines, and the
# start of another engine, take turns.
_exclusive = threading.Lock()

# torch hands streams out of a small ring: engines that come and go must not take new ones each time, or one day two
# of them, or an engine and the user, would share a stream.
_spare_streams: dict[torch.device, list[dict[Stream, torch.cuda.Stream]]] = {}

# Event times are float32 milliseconds since an origin: it moves along, so that they stay precise.
_ORIGIN_MILLISECONDS = 60_000.0


def synchronize_device(device: torch.device) -> None:
    """Wait for everything on a device, but not while a stream of it is being captured."""
    with _exclusive:
        torch.cuda.synchronize(device)


def empty_cache() -> None:
    """Give the blocks that torch keeps back to all devices; torch gives none back while a stream is captured."""
    with _exclusive:
        torch.cuda.empty_cache()


def use_on_current_stream(tensor: torch.Tensor) -> None:
    """Keep the memory of a tensor that an engine has made until the calling thread's stream is done with it.

    The work that made the tensor must have completed.
    """
    tensor.record_stream(torch.cuda.current_stream(tensor.device))


class CudaDevice:
    """One CUDA device.

    Args:
        device: The device of the model's weights. Everything that this thread has enqueued on its current stream so
            far runs before anything enqueued here.
    """

    supports_graphs = True
    runs_inline = False

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        with _exclusive, torch.cuda.device(device):
            spare = _spare_streams.setdefault(device, [])
            self._streams: dict[Stream, torch.cuda.Stream] = (
                spare.pop()
                if spare
                else {
                    stream: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                    for stream in (Stream.H2D, Stream.COMPUTE, Stream.D2H)
                }
            )
            self._pool: object | None = None
            self._graph_bytes = 0
            # Event times are relative to one event whose host time is known.
            torch.cuda.synchronize(device)
            self._origin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._origin.record(self._streams[Stream.COMPUTE])
            self._origin.synchronize()
            self._origin_time = time.perf_counter()

    def host_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device="cpu", pin_memory=True)

    def device_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=self.torch_device)

    def copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        with self._on(stream):
            destination.copy_(source, non_blocking=True)

    def launch(self, stream: Stream, kernel: Kernel) -> None:
        with self._on(stream):
            kernel()

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        """Make a stream the thread's current one.

        `torch.cuda.stream` calls the same two functions but takes six times as long.
        """
        before = torch._C._cuda_getCurrentStream(self._index)
        new = self._streams[stream]
        torch._C._cuda_setStream(stream_id=new.stream_id, device_index=new.device_index, device_type=new.device_type)
        try:
            yield
        finally:
            torch._C._cuda_setStream(stream_id=before[0], device_index=before[1], device_type=before[2])

    def record(self, stream: Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(
            torch.cuda.current_stream(self.torch_device) if stream is Stream.CALLER else self._streams[stream]
        )
        return event

    def wait(self, stream: Stream, event: torch.cuda.Event | None, guard: Guard) -> None:
        if event is not None:
            self._streams[stream].wait_event(event)

    def synchronize(self, event: torch.cuda.Event | None, guard: Guard) -> None:
        if event is not None and not event.query():  # type: ignore[no-untyped-call]
            event.synchronize()

    def time_of(self, event: torch.cuda.Event) -> float:
        elapsed = self._origin.elapsed_time(event)
        happened = float(self._origin_time + elapsed * 1e-3)
        if elapsed > _ORIGIN_MILLISECONDS:
            self._origin, self._origin_time = event, happened
        return happened

    def capture(self, work: Kernel) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with _exclusive:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()  # the capture begins with it, and its effect must not count against the graph
            before = torch.cuda.memory_reserved(self.torch_device)
            # A collection on this thread could free device memory, which a capture does not survive. In thread-local
            # error mode the user's own threads may allocate memory on this card meanwhile.
            with (
                no_collections(),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,  # type: ignore[arg-type]
                    stream=self._streams[Stream.COMPUTE],
                    capture_error_mode="thread_local",
                ),
            ):
                work()
        self._graph_bytes += max(0, torch.cuda.memory_reserved(self.torch_device) - before)
        return graph

    def graph_bytes(self) -> int:
        return self._graph_bytes

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
        self._pool = None
        with _exclusive:
            _spare_streams[self.torch_device].append(self._streams)
