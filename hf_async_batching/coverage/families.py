"""Make tiny random models of every causal language model class in the installed transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_async_batching.coverage.check import check_model, prompt_lengths
from hf_async_batching.coverage.comparison import Comparison
from hf_async_batching.coverage.loaded_dtype import as_loaded
from hf_async_batching.coverage.plain_reference import exact_reference, make_prompts, reference
from hf_async_batching.coverage.variants import VARIANTS
from hf_async_batching.coverage.verdicts import Verdict
from hf_async_batching.model.small.tiny_configs import tiny_config

# With fewer distinct tokens a greedy run proves little: a model that repeats one token could be right by chance.
MIN_DISTINCT = 8
# With some weights, rounding alone changes what a 16-bit model generates, and a comparison proves nothing. If rounding
# can change a log-probability by more than this, other weights are tried.
_MAX_TOLERANCE = 1.0
# Matrices that are not scaled. Doge selects by the largest results of a softplus, most of which would become equal.
_AS_IT_IS = {"doge": ("dt_proj",)}


def class_names() -> list[str]:
    """Classes that `AutoModelForCausalLM` makes, and all others named `*ForCausalLM`."""
    named = {name for name in dir(transformers) if name.endswith("ForCausalLM") and not name.startswith("Auto")}
    return sorted(named | set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def entry_names() -> list[str]:
    """Entries of the table: every class, and after a plus sign the variants that real checkpoints of some have."""
    return sorted(class_names() + [name for name in VARIANTS if is_there(name)])


def tiny_model(class_name: str, scale: float = 4.0, embedding_scale: float = 1.0, **changes: Any) -> PreTrainedModel:
    """Make a random float32 model whose outputs depend on all of its weights.

    Args:
        class_name: A class of transformers.
        scale: Factor on the matrices: with the usual initialization a tiny model repeats one token.
        embedding_scale: Factor on the embeddings.
        changes: Config fields to set to other values.

    Raises:
        Exception: Any error of the model's classes.
    """
    model_class = getattr(transformers, class_name)
    torch.manual_seed(sum(map(ord, class_name)))
    config = tiny_config(model_class.config_class, **changes)
    model: PreTrainedModel = model_class(config).float().eval()
    # The configs of some families ask for forced or suppressed tokens of a real vocabulary.
    plain: Any = GenerationConfig
    model.generation_config = plain(pad_token_id=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if not torch.isfinite(parameter).all():
                parameter.normal_(0, 0.02)
            if parameter.dim() > 1:
                if not any(part in name for part in _AS_IT_IS.get(config.model_type, ())):
                    parameter.mul_(embedding_scale if "embed" in name else scale)
            elif parameter.dim() == 1 and bool((parameter == 0).all()):
                parameter.normal_(0, 0.1)
    return model


def is_there(name: str) -> bool:
    """Whether the installed transformers has the class of an entry."""
    return hasattr(transformers, name.partition("+")[0])


def check_family(
    name: str, device: str = "cpu", dtype: str = "float32", report: Callable[[Verdict], object] | None = None
) -> Verdict:
    """Make a tiny model of a class or a variant, and check it.

    Args:
        name: One of `entry_names`.
        device: Device of the model.
        dtype: Dtype of the weights, as `from_pretrained` loads them.
        report: See `check_model`.
    """
    class_name, changes = name.partition("+")[0], VARIANTS.get(name, {})
    best: tuple[PreTrainedModel, Comparison] | None = None
    failure, most = "its outputs are not finite", 0
    for scales in ((4.0, 1.0), (2.0, 1.0), (12.0, 1.0), (1.0, 1.0), (4.0, 40.0), (1.0, 40.0), (30.0, 1.0)):
        try:
            model = as_loaded(tiny_model(class_name, *scales, **changes), getattr(torch, dtype))
            model = model.to(torch.device(device))  # type: ignore[arg-type]
        except Exception as error:
            return Verdict("not built", _line(error))
        try:
            vocab = model.config.get_text_config(decoder=True).vocab_size
            plain = exact_reference(model)
            known = reference(plain, make_prompts(vocab, prompt_lengths(model)[0]), fresh=True)
            if not all(abs(value) < 1e4 for values in known.logprobs for value in values):
                continue
            most = max(most, known.distinct_tokens)
            if known.distinct_tokens < MIN_DISTINCT:
                failure = "it repeats the same tokens"
                continue
            compared = Comparison(plain, known, fresh=True)
        except Exception as error:
            failure = f"plain `generate` raises {_line(error)}"
            break
        if best is None or compared.tolerance < best[1].tolerance:
            best = model, compared
        if best[1].tolerance <= _MAX_TOLERANCE:
            break
    if best is None:
        return Verdict("no reference", failure, "", most)
    # The requests end long before a compilation would, and the engine compares compiled with uncompiled code itself.
    return check_model(best[0], compared=best[1], compile=False, report=report)


def _line(error: Exception) -> str:
    """Return the first sentence of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0]}"
