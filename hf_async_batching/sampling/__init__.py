"""From logits to tokens, one job a file."""

from hf_async_batching.sampling.metadata import SampledRows
from hf_async_batching.sampling.sampler import Sampler

__all__ = ["SampledRows", "Sampler"]
