"""Compiles the Triton kernels for cards that are not here: launches become compilations, with the same specialization.

Run as a program, since Triton decides when it is imported whether it interprets:
`python -m support.ahead_of_time '[[[80, 90], ["bfloat16"], ["decode llama"]]]'`, a list of jobs. No launch names stand
for all. Prints one JSON object for each kernel, with the number of its job.
A module that has kernels of its own adds a function to `LAUNCHES` that launches them on CPU tensors.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

_OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")
# How a launch specializes is the same for all cards.
_BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class Launch(NamedTuple):
    """A recorded launch: all that the compiler needs."""

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def compile(self, capability: int) -> Any:
        """The compiled kernel (`.metadata`, `.asm`)."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


@contextmanager
def recording(label: str) -> Iterator[list[Launch]]:
    """Launches of kernels inside are recorded and not run."""
    recorded: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # By Triton's own code, which a name of a parameter can break where the interpreter does not mind it.
        bind = create_function_from_signature(self.signature, self.params, _BACKEND)
        packed = self._pack_args(_BACKEND, kwargs, *bind(*args, **kwargs))
        options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
        recorded.append(Launch(label, self, *packed[1:], options))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield recorded
    finally:
        JITFunction.run = original


class Shape(NamedTuple):
    """The sizes of one attention layer."""

    heads: int
    kv_heads: int
    size: int
    size_v: int
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None
    sinks: bool = False

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the layer asks of attention."""
        return {
            "scaling": 0.1,
            "sliding_window": self.window,
            "softcap": self.softcap,
            "chunk": self.chunk,
            "sinks": torch.empty(self.heads, dtype=dtype) if self.sinks else None,
        }


SHAPES = {
    "llama": Shape(32, 8, 128, 128),
    "smollm2": Shape(9, 3, 64, 64),
    "gemma": Shape(8, 4, 256, 256, window=512, softcap=50.0),
    "odd": Shape(4, 4, 192, 128),
    "many": Shape(40, 1, 80, 80),
    "sinks": Shape(64, 8, 64, 64, window=128, sinks=True),
    "chunked": Shape(40, 8, 128, 128, chunk=8192),
}


def _attention(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    pages = 64
    return {
        "key_cache": torch.empty(pages, 16, shape.kv_heads, shape.size, dtype=dtype),
        "value_cache": torch.empty(pages, 16, shape.kv_heads, shape.size_v, dtype=dtype),
        "page_table": torch.zeros(33, 256, dtype=torch.int32),
    }


def decode(shape: Shape, dtype: torch.dtype, beside_prefill: bool = False, **changes: Any) -> None:
    from hf_async_batching.attention import triton_kernels as kernels

    index, counters = torch.zeros(32, dtype=torch.int32), torch.zeros(4096, dtype=torch.int32)
    rule = kernels.default_decode_config(
        32, shape.kv_heads, shape.heads // shape.kv_heads, shape.size, shape.size_v, dtype, torch.device("cpu")
    )
    kernels.decode_attention(
        torch.empty(32, shape.heads, shape.size, dtype=dtype), **_attention(shape, dtype), rows=index,
        context_lengths=index, **shape.options(dtype), counters=counters,
        config=rule._replace(**changes),
        new=(
            torch.empty(32, shape.kv_heads, shape.size, dtype=dtype),
            torch.empty(32, shape.kv_heads, shape.size_v, dtype=dtype),
        ),
        beside_prefill=beside_prefill,
    )  # fmt: skip


def prefill(shape: Shape, dtype: torch.dtype, **arguments: Any) -> None:
    from hf_async_batching.attention import triton_kernels as kernels

    index = torch.zeros(4, dtype=torch.int32)
    kernels.prefill_attention(
        torch.empty(64, shape.heads, shape.size, dtype=dtype), **_attention(shape, dtype), tile_rows=index,
        tile_query_starts=index, tile_query_lengths=index, tile_first_positions=index,
        **shape.options(dtype), **arguments,
    )  # fmt: skip


def write(shape: Shape, dtype: torch.dtype) -> None:
    from hf_async_batching.attention import triton_kernels as kernels

    index, caches = torch.zeros(4, dtype=torch.int32), _attention(shape, dtype)
    key, value = (torch.empty(4, shape.kv_heads, size, dtype=dtype) for size in (shape.size, shape.size_v))
    kernels.write_kv(key, value, *caches.values(), rows=index, positions=index)


def latents(heads: int, dtype: torch.dtype, *, major: int = 8, rank: int = 512, pdl: bool = False) -> None:
    """Attention to latents of DeepSeek-V2-Lite's and V3's size; `major` is the capability that the rules go by."""
    from hf_async_batching.attention import triton_latents as door

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    index = torch.zeros(4, dtype=torch.int32)
    table = torch.zeros(4, 8, dtype=torch.int32)
    given = door.Latents(empty(4, heads, rank), empty(4, heads, 64), empty(2, 32, 1, rank + 64), table)
    with mock.patch.object(door, "major", return_value=major):
        door.write_latents(empty(4, rank + 64), given.cache, table, index, index)
        config = door.default_latent_config(4, heads, dtype, torch.device("cpu"))._replace(splits=16, pdl=pdl)
        door.decode_latents(given, empty(4, rank + 64), index, index, scaling=0.1, config=config)
        with mock.patch.object(door, "supports_pdl", return_value=pdl):
            door.prefill_latents(given, index, index, index, index, scaling=0.1)
            if dtype == torch.float32:
                return
            weight = empty(heads, 256, rank)
            door.multiply_few(empty(32, heads, 192)[..., :128], weight[:, :128])
            door.multiply_few(empty(1, heads, rank), weight[:, 128:].transpose(1, 2))


def skinny(dtype: torch.dtype) -> None:
    from hf_async_batching.linear.skinny import candidates, default_setting, skinny_linear

    counters, smallest_card = torch.zeros(8192, dtype=torch.int32), 99 * 1024
    for rows, n, k in ((1, 576, 1536), (32, 4096, 4096), (64, 28672, 4096)):
        x, weight = torch.empty(rows, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
        for setting in {default_setting(rows, n, k, smallest_card), *candidates(rows, n, k, smallest_card)[:2]}:
            skinny_linear(x, weight, torch.empty(n, dtype=dtype), counters, setting)


def skinny_early(dtype: torch.dtype) -> None:
    """As cards with programmatic dependent launch run it."""
    from hf_async_batching.linear import skinny

    counters, x = torch.zeros(8192, dtype=torch.int32), torch.empty(32, 4096, dtype=dtype)
    for n in (4096, 28672):
        setting = skinny.default_setting(32, n, 4096, 227 * 1024)
        with mock.patch.object(skinny, "supports_pdl", return_value=True):
            skinny.skinny_linear(x, torch.empty(n, 4096, dtype=dtype), None, counters, setting)


def nibbles(dtype: torch.dtype) -> None:
    """Products with 4-bit weights, as a card looks their values up."""
    from hf_async_batching.linear.quantized import nibbles as door
    from hf_async_batching.linear.quantized.weight import QuantizedWeight

    counters, n, k = torch.zeros(8192, dtype=torch.int32), 1024, 4096
    scale = torch.empty(n * k // 64)
    double = scale.to(torch.uint8), torch.empty(256), torch.empty(n * k // 64 // 256), torch.empty(())
    for rows, way in ((2, "vector"), (32, "sums"), (32, "weights"), (32, "rounded")):
        rule = door.default_setting(rows, n, k, 64)
        setting = rule if rule.way == way else door.NibbleSetting(way, 64, 128, 2, 4, 4)
        for scales in ((scale,), double) if rule.way == way else ((scale,),):
            weight = QuantizedWeight("nf4", torch.empty(n * k // 2, 1, dtype=torch.uint8), scales, n, k, 64)
            with mock.patch.object(door, "permutes", return_value=True):
                x = torch.empty(rows, k, dtype=dtype)
                door.nibble_linear(x, weight, "nf4", None, counters, setting, high_first=True)


def nibbles_early(dtype: torch.dtype) -> None:
    """As cards with programmatic dependent launch run it."""
    from hf_async_batching.linear.quantized import nibbles as door

    with mock.patch.object(door, "supports_pdl", return_value=True):
        nibbles(dtype)


def fp8(dtype: torch.dtype) -> None:
    """Products with blocks of 8-bit floats, for cards that multiply them."""
    from hf_async_batching.linear.quantized import fp8 as door
    from hf_async_batching.linear.quantized.weight import QuantizedWeight

    counters = torch.zeros(8192, dtype=torch.int32)
    for n, k in ((1024, 4096), (4096, 14336)):
        packed, scale = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n // 128, k // 128)
        weight = QuantizedWeight("fp8 blocks", packed, (scale,), n, k, 128)
        for rows in (2, 64):
            x = torch.empty(rows, k, dtype=dtype)
            with mock.patch.object(door, "supports_pdl", return_value=rows == 2):
                door.fp8_linear(x, weight, None, counters, door.default_setting(n, k))


def words(dtype: torch.dtype) -> None:
    """Products with 4-bit integers as GPTQ and AWQ lay them out."""
    from hf_async_batching.linear.quantized import words as door
    from hf_async_batching.linear.quantized.weight import QuantizedWeight

    counters, n, k = torch.zeros(8192, dtype=torch.int32), 1024, 4096
    scales = torch.empty(k // 128, n, dtype=torch.float16), torch.empty(k // 128, n // 8, dtype=torch.int32)
    for along, shape in ((True, (k // 8, n)), (False, (k, n // 8))):
        weight = QuantizedWeight("", torch.empty(shape, dtype=torch.int32), scales, n, k, 128)
        for rows in (2, 64):
            x = torch.empty(rows, k, dtype=dtype)
            with mock.patch.object(door, "supports_pdl", return_value=rows == 2 and dtype == torch.bfloat16):
                door.word_linear(x, weight, None, counters, door.default_setting(n, k, 128), along_inputs=along)


def experts(
    dtype: torch.dtype, tokens: tuple[int, ...] = (1, 32, 256), library: bool = True, layouts: int = 3
) -> None:
    """The first `layouts` layers of experts as Qwen3-MoE, gpt-oss and Nemotron-H lay them out."""
    from hf_async_batching.experts import triton_experts
    from hf_async_batching.experts.layer import ExpertWeights, GateForm

    gpt_oss = GateForm(interleaved=True, alpha=1.702, limit=7.0, shift=1.0)
    for form, transposed, count, hidden, inner in (
        (GateForm(), False, 128, 2048, 768),
        (gpt_oss, True, 32, 2880, 2880),
        (GateForm("relu2", gated=False), False, 128, 2688, 1856),
    )[:layouts]:
        outputs = inner * (1 + form.gated)
        up, down = torch.empty(1, outputs, hidden, dtype=dtype), torch.empty(1, hidden, inner, dtype=dtype)
        if transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        biases = [torch.empty(1, size, dtype=dtype) if transposed else None for size in (outputs, hidden)]
        # Sizes are all that a launch depends on.
        layer = ExpertWeights(up.expand(count, -1, -1), biases[0], down.expand(count, -1, -1), biases[1], transposed)
        for rows in tokens:
            x, index = torch.empty(rows, hidden, dtype=dtype), torch.zeros(rows, 4, dtype=torch.int64)
            scores = torch.empty(rows, 4, dtype=dtype)
            triton_experts.experts_by_kernel(x, index, scores, layer, form)
        if library:
            x, index = torch.empty(300, hidden, dtype=dtype), torch.zeros(300, 4, dtype=torch.int64)
            with mock.patch("torch.nn.functional.grouped_mm", lambda a, b, offs: a.new_empty(len(a), b.shape[2])):
                triton_experts.experts_by_library(x, index, torch.empty(300, 4, dtype=dtype), layer, form)


def mxfp4(dtype: torch.dtype, tokens: tuple[int, ...] = (1, 257)) -> None:
    """A layer of experts of gpt-oss, in MXFP4."""
    from hf_async_batching.experts import triton_experts
    from hf_async_batching.experts.layer import ExpertWeights, GateForm

    form, size = GateForm(interleaved=True, alpha=1.702, limit=7.0, shift=1.0), 2880
    # Sizes are all that a launch depends on.
    weights: dict[int, list[torch.Tensor]] = {}
    for outputs in (2 * size, size):
        blocks = torch.empty(1, outputs, size // 32, 16, dtype=torch.uint8).expand(32, -1, -1, -1)
        scales = torch.empty(1, outputs, size // 32, dtype=torch.uint8).expand(32, -1, -1)
        weights[outputs] = [blocks, torch.empty(1, outputs, dtype=dtype).expand(32, -1), scales]
    (up, up_bias, up_scales), (down, down_bias, down_scales) = weights.values()
    layer = ExpertWeights(up, up_bias, down, down_bias, False, up_scales, down_scales)
    with mock.patch.object(triton_experts, "has_bfloat16", return_value=True):
        for rows in tokens:
            x, index = torch.empty(rows, size, dtype=dtype), torch.zeros(rows, 4, dtype=torch.int64)
            triton_experts.experts_by_kernel(x, index, torch.empty(rows, 4, dtype=dtype), layer, form)
        triton_experts.expand(down[:1], down_scales[:1], dtype)


def experts_early(dtype: torch.dtype) -> None:
    """As cards with programmatic dependent launch run it."""
    from hf_async_batching.experts import topk, triton_experts

    with (
        mock.patch.object(triton_experts, "supports_pdl", return_value=True),
        mock.patch.object(topk, "supports_pdl", return_value=True),
    ):
        experts(dtype, (1, 32), layouts=1)
        routers(dtype)


def routers(dtype: torch.dtype) -> None:
    """The choices of Qwen3-MoE, gpt-oss and a group-limited router."""
    from hf_async_batching.experts.topk import topk_by_kernel

    for scores, k, softmax in ((128, 8, True), (32, 4, False), (60, 6, True)):
        topk_by_kernel(torch.empty(4, scores, dtype=dtype), k, softmax)


def tables(dtype: torch.dtype) -> None:
    from hf_async_batching.runner.row_tables import RowTables

    state = RowTables(max_rows=4, max_pages_per_row=2, device=torch.device("cpu"), fused=True)
    state.commit(state.decode_inputs(4), torch.zeros(4, dtype=torch.int32), torch.zeros(4))


def largest(dtype: torch.dtype) -> None:
    from hf_async_batching.sampling.argmax import argmax_in_parts

    argmax_in_parts(torch.empty(32, 128256, dtype=dtype), 16)


def sampling(vocab: int, dtype: torch.dtype) -> None:
    from hf_async_batching.core.plan import Features
    from hf_async_batching.core.row_layout import PARAMS
    from hf_async_batching.sampling import triton_sampler as fused
    from hf_async_batching.sampling.metadata import SamplingMetadata
    from hf_async_batching.sampling.token_history import TokenHistory

    index = torch.zeros(4, dtype=torch.int32)
    params, positions = torch.zeros(4, PARAMS, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    memory = TokenHistory(max_rows=4, max_length=8, vocab_size=vocab, device=torch.device("cpu"))
    memory.ensure(words=False, seen=True)
    rows = SamplingMetadata(params, positions, index, memory)
    assert memory.seen is not None
    fused.mark_seen(index, positions, memory.seen)
    for features in (
        Features(sampling=True, top_k=64, seen=True, penalty=True),
        Features(sampling=True, top_k=1024),
        Features(seen=True, penalty=True),
    ):
        fused.choose(torch.empty(4, vocab, dtype=dtype), rows, features)


def prefill_early(dtype: torch.dtype) -> None:
    """As cards with programmatic dependent launch run it."""
    from hf_async_batching.attention import triton_kernels as kernels

    with mock.patch.object(kernels, "supports_pdl", return_value=True):
        prefill(SHAPES["llama"], dtype)


def _prompt_and_decoding_rows() -> Any:
    """A step of 2 rows that decode, and 2 tiles of 64 tokens of a prompt."""
    from hf_async_batching.attention.base import MixedContext
    from hf_async_batching.kv_cache.state_tables import StateTables
    from hf_async_batching.recurrent.step import RecurrentStep

    tokens, tiles = torch.zeros(130, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    context = MixedContext(tokens, tokens, tokens, tiles, tiles, tiles, tiles, tiles[:2])
    return RecurrentStep(context, StateTables(2, torch.device("cpu")), {})


def delta_rule(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    from hf_async_batching.recurrent.triton_delta_rule import row_delta_rule

    mixed = torch.empty(1, 130, 2, 2 * key_dim + 2 * value_dim, dtype=dtype)
    query, key, value = mixed.split([key_dim, key_dim, 2 * value_dim], dim=-1)
    value, g = value.reshape(1, 130, 4, value_dim), torch.empty(1, 130, 4)
    row_delta_rule(_prompt_and_decoding_rows(), "scan", query, key, value, g, g.to(dtype), normalize=True)


def delta_rule_large(dtype: torch.dtype) -> None:
    """As cards with much shared memory run it."""
    from hf_async_batching.recurrent import triton_delta_rule

    with mock.patch.object(triton_delta_rule, "shared_memory_limit", return_value=163 * 1024):
        delta_rule(128, 128, dtype)


def mamba2(dim: int, size: int, dtype: torch.dtype) -> None:
    from hf_async_batching.recurrent.triton_mamba2 import row_mamba2_scan

    hidden, dt = torch.empty(1, 130, 4, dim, dtype=dtype), torch.empty(1, 130, 4, dtype=dtype)
    B, A = torch.empty(1, 130, 2, size, dtype=dtype), torch.empty(4)
    step, limit = _prompt_and_decoding_rows(), (0.0, float("inf"))
    row_mamba2_scan(step, "scan", hidden, dt, A, B, B, D=A, dt_bias=A, softplus=True, limit=limit)


# Everything is compiled from what these launch. `decode llama` is the launch of `decode` at the shape `llama`.
LAUNCHES: dict[str, Callable[[torch.dtype], None]] = {}
for _name, _shape in SHAPES.items():
    LAUNCHES[f"decode {_name}"] = functools.partial(decode, _shape, splits=1)
    LAUNCHES[f"decode split {_name}"] = functools.partial(decode, _shape, splits=3)
    LAUNCHES[f"decode apart {_name}"] = functools.partial(decode, _shape, splits=3, fused=False)
    LAUNCHES[f"prefill {_name}"] = functools.partial(prefill, _shape)
    LAUNCHES[f"write {_name}"] = functools.partial(write, _shape)
LAUNCHES["skinny"] = skinny
LAUNCHES["latents"] = functools.partial(latents, 16)
LAUNCHES["latents many"] = functools.partial(latents, 128)
LAUNCHES["nibbles"] = nibbles
LAUNCHES["experts"] = experts
LAUNCHES["routers"] = routers
LAUNCHES["mxfp4"] = mxfp4
LAUNCHES["tables"] = tables
LAUNCHES["largest"] = largest
LAUNCHES["sampling"] = functools.partial(sampling, 151936)
LAUNCHES["sampling odd"] = functools.partial(sampling, 50257)
LAUNCHES["delta rule"] = functools.partial(delta_rule, 128, 128)
LAUNCHES["delta rule wide"] = functools.partial(delta_rule, 256, 256)
LAUNCHES["mamba2"] = functools.partial(mamba2, 64, 128)
LAUNCHES["mamba2 wide"] = functools.partial(mamba2, 128, 256)
# Not for cards before compute capability 9, and so named when asked for only.
EXTRA = {
    "decode pdl": functools.partial(decode, SHAPES["llama"], splits=3, pdl=True),
    "decode apart pdl": functools.partial(decode, SHAPES["llama"], splits=3, fused=False, pdl=True),
    "delta rule large": delta_rule_large,
    "prefill early": prefill_early,
    "latents pdl": functools.partial(latents, 16, major=9, pdl=True),
    "latents many pdl": functools.partial(latents, 128, major=9, pdl=True),
    "skinny early": skinny_early,
    "nibbles early": nibbles_early,
    "fp8": fp8,
    "words early": words,
    "experts few": functools.partial(experts, tokens=(1, 32), library=False),
    "experts early": experts_early,
}


def same_code_beside_prompts() -> bool:
    """Whether decoding beside prompts launches what decoding alone launches."""
    with recording("") as launches:
        for beside in (False, True):
            decode(SHAPES["llama"], torch.float16, splits=3, pdl=True, beside_prefill=beside)
    one, other = launches
    return (one.signature, one.constants, one.attributes) == (other.signature, other.constants, other.attributes)


def main() -> None:
    work = []
    for job, (capabilities, dtypes, names) in enumerate(json.loads(sys.argv[1])):
        for name in names or sorted(LAUNCHES):
            for dtype in dtypes:
                with recording(f"{name} {dtype}") as launches:
                    (LAUNCHES | EXTRA)[name](getattr(torch, dtype))
                work += [(job, launch, capability) for launch in launches for capability in capabilities]

    def compiled(item: tuple[int, Launch, int]) -> str:
        job, launch, capability = item
        about = {"job": job, "launch": launch.label, "kernel": launch.kernel.__name__, "capability": capability}
        try:
            kernel = launch.compile(capability)
            about |= {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
            ptx = kernel.asm["ptx"]
            about |= {"waits": ptx.count("griddepcontrol.wait"), "lets": ptx.count("griddepcontrol.launch_dependents")}
            about["waits first"] = ptx.rfind("griddepcontrol.wait") < ptx.find("griddepcontrol.launch_dependents")
        except Exception as error:
            about["failed"] = f"{type(error).__name__}: {error}"
        return json.dumps(about)

    print(json.dumps({"same code beside prompts": same_code_beside_prompts()}))
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(compiled, work):
            print(line, flush=True)


if __name__ == "__main__":
    main()
