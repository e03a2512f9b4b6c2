"""A model over a whole dataset: `generate_dataset`."""

from hf_async_batching.dataset.generate import generate_dataset
from hf_async_batching.dataset.run.progress import DatasetProgress

__all__ = ["DatasetProgress", "generate_dataset"]
