"""Python's collector rests while an engine is made."""

from __future__ import annotations

import gc
import multiprocessing
import os
from typing import Any

import pytest
from support.tiny_models import tiny_model

from hf_async_batching import GenerationManager
from hf_async_batching.engine import supervisor
from hf_async_batching.runtime.gc_pause import no_collections


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with no_collections():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_it_stays_off_until_the_last_one_leaves() -> None:
    first, second = no_collections(), no_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled(), "for the second, a capture say"
    second.__exit__(None, None, None)
    assert gc.isenabled(), "as the first found it"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_collects() -> None:
    """Workers of data loaders and tokenizers may be forked by other threads during a start."""
    with no_collections():
        child = multiprocessing.get_context("fork").Process(target=_exit_well_if_it_collects)
        child.start()
        child.join(60)
        assert not gc.isenabled()
    assert child.exitcode == 0


def _exit_well_if_it_collects() -> None:
    before = gc.isenabled()
    with no_collections():
        off = not gc.isenabled()
    os._exit(0 if before and off and gc.isenabled() else 1)


def test_no_collection_holds_a_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    build_engine, seen = supervisor.build_engine, []

    def watched(*args: Any) -> Any:
        seen.append(gc.isenabled())
        return build_engine(*args)

    monkeypatch.setattr(supervisor, "build_engine", watched)
    with GenerationManager(tiny_model("Llama")) as manager:
        assert manager.submit([5], max_new_tokens=1, do_sample=False).result().token_ids
        assert seen == [False] and gc.isenabled()


def test_a_start_that_fails_does_not_keep_it_off() -> None:
    def start() -> None:
        with no_collections():
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        start()
    assert gc.isenabled()


def test_collections_spare_what_the_tests_import() -> None:
    """A full one would look at a million objects, for a second each; a visitor of the demo's tests waits for it."""
    assert gc.get_freeze_count() > 50_000
    assert gc.isenabled()
