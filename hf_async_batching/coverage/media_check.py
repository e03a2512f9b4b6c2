"""Check classes that read pictures or sounds: ragged batches, late joins and shared prefixes, against `generate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel

from hf_async_batching.config import BatchingConfig
from hf_async_batching.coverage.media_models import (
    IMAGE,
    image_class_names,
    media_batch,
    media_class_names,
    tiny_media_model,
)
from hf_async_batching.errors import UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.manager import GenerationManager

MediaStatus = Literal["exact", "wrong", "refused", "no reference", "no batch", "not built"]

_ROWS: tuple[list[int], ...] = ([], [1], [2, 3], [4, 1, 5])
_NEW_TOKENS = 8
# Rows in pieces, beside rows that decode.
_CONFIG = BatchingConfig(page_size=16, num_pages=256, max_rows=4, max_batch_tokens=24)
_TOLERANCE = 0.002
_WIDTH = 200


@dataclass(frozen=True, slots=True)
class MediaVerdict:
    """What became of one class.

    Attributes:
        status: The result.
        route: How the model was served; empty if it was not.
        note: The refusal, or the error.
    """

    status: MediaStatus
    route: str = ""
    note: str = ""


def check_media_class(class_name: str) -> MediaVerdict:
    """Make a tiny model of a class and serve a ragged batch with none to three pictures a row.

    The batch goes through `generate(custom_generate=...)`. Then each of its rows goes through `submit` twice, while
    the rows before decode. Tokens and log-probabilities are compared with plain `generate`.
    """
    try:
        model = tiny_media_model(class_name)
        batch = None if model.config.is_encoder_decoder else media_batch(model, _ROWS)
    except Exception as error:
        return _without_batch(class_name, error)
    if batch is None:
        return _refusal(model)
    options: dict[str, Any] = {
        "max_new_tokens": _NEW_TOKENS,
        "eos_token_id": None,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    runner: Any = model
    try:
        expected = runner.generate(**batch, **options)
    except Exception as error:
        return MediaVerdict("no reference", note=_line(error))
    try:
        with GenerationManager(model, _CONFIG) as manager:
            got = runner.generate(**batch, **options, custom_generate=manager.bind())
            assert manager.assembly is not None
            route = manager.assembly.forward.route
            same = _agree(got, expected) and _rows_agree(model, manager, options)
    except (UnsupportedArgumentError, UnsupportedModelError) as error:
        return MediaVerdict("refused", note=_line(error))
    return MediaVerdict("exact" if same else "wrong", route)


def _agree(got: Any, expected: Any) -> bool:
    if not torch.equal(got.sequences, expected.sequences):
        return False
    pairs = zip(got.logits, expected.logits, strict=True)
    return all(bool(((a.log_softmax(-1) - b.log_softmax(-1)).abs() < _TOLERANCE).all()) for a, b in pairs)


def _rows_agree(model: Any, manager: GenerationManager, options: dict[str, Any]) -> bool:
    """Submit each row twice; each begins while the ones before decode, the second behind the first one's pages."""
    handles, expected = [], []
    for row in (*_ROWS[1:], *_ROWS[1:]):
        batch: dict[str, Any] = media_batch(model, [row], seed=8)
        known = model.generate(**batch, **options)
        chosen = known.sequences[0, batch["input_ids"].shape[1] :]
        scores = torch.stack([one[0].log_softmax(-1) for one in known.logits]).gather(1, chosen[:, None])
        expected.append((chosen.tolist(), scores[:, 0]))
        del batch["attention_mask"]
        handle = manager.submit(**batch, max_new_tokens=_NEW_TOKENS, eos_token_id=None, do_sample=False, logprobs=True)
        next(iter(handle))
        handles.append(handle)
    for handle, (tokens, logprobs) in zip(handles, expected, strict=True):
        completion = handle.result(120)
        if completion.token_ids != tokens or completion.logprobs is None:
            return False
        if not bool(((torch.tensor(completion.logprobs) - logprobs).abs() < _TOLERANCE).all()):
            return False
    return True


def _without_batch(class_name: str, error: Exception) -> MediaVerdict:
    """A class for which no batch could be made may still be refused, before its tower would run."""
    try:
        model = tiny_media_model(class_name)
    except Exception as failure:
        return MediaVerdict("not built", note=_line(failure))
    verdict = _refusal(model)
    return verdict if verdict.status == "refused" else MediaVerdict("no batch", note=_line(error))


def _refusal(model: PreTrainedModel) -> MediaVerdict:
    try:
        with GenerationManager(model, _CONFIG) as manager:
            ids = torch.tensor([[5, 6, IMAGE, 7]])
            manager.media.check(ids, {}, "pixel_values")
            assert manager.assembly is not None
            return MediaVerdict("no batch", manager.assembly.forward.route)
    except (UnsupportedArgumentError, UnsupportedModelError) as error:
        return MediaVerdict("refused", note=_line(error))
    except Exception as error:
        return MediaVerdict("no batch", note=_line(error))


def _line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "\N{HORIZONTAL ELLIPSIS}"


def media_entries() -> list[str]:
    """The classes of the table, each once."""
    return sorted({name for name in media_class_names().values() if hasattr(transformers, name)})


def image_entries() -> list[str]:
    """The classes of the table that read pictures."""
    return sorted(set(image_class_names().values()) & set(media_entries()))


_INTRODUCTION = """\
# Which models are served with pictures and sounds

Made by `hf-async-batching coverage --media`: every class that `AutoModelForMultimodalLM` makes (with those of
`AutoModelForImageTextToText`), with tiny random weights, on the CPU in float32. A batch of four rows with none, one,
two and three pictures (or sounds), padded on the left, goes through
`model.generate(custom_generate=hf_async_batching.generate)`; then each row twice through `submit`, beside rows that
decode and behind pages that are known. All prompts are computed in pieces of at most 24 tokens.

| a result says | which means |
| --- | --- |
| exact | every token is that of plain `model.generate`, every log-probability within 0.002 |
| wrong | other tokens or log-probabilities |
| refused | not served, by an error that says why, before a tower runs |
| no reference | plain `generate` fails on the tiny model |
| no batch | the tests make no batch for the class; texts are served |
| not built | no tiny model could be made |
"""


def media_page(verdicts: Mapping[str, MediaVerdict]) -> str:
    """The table in Markdown."""
    counted = Counter(verdict.status for verdict in verdicts.values())
    figures = ", ".join(f"{count} {status}" for status, count in counted.most_common())
    lines = [_INTRODUCTION, f"transformers {transformers.__version__}: {figures}.\n"]
    lines += ["| class | result | served as | |", "| --- | --- | --- | --- |"]
    for name, verdict in sorted(verdicts.items()):
        note = verdict.note.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {name} | {verdict.status} | {verdict.route} | {note} |")
    return "\n".join(lines) + "\n"
