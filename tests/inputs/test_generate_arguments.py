"""The typed keyword arguments are the fields that are served."""

from __future__ import annotations

import inspect
import typing

from hf_async_batching import GenerationManager
from hf_async_batching.inputs.compatibility import FIELDS
from hf_async_batching.inputs.generate_arguments import DatasetArguments, RequestArguments


def test_every_served_field_has_a_type() -> None:
    served = {name for name, entry in FIELDS.items() if entry.status == "honoured"}
    named = set(typing.get_type_hints(DatasetArguments))
    assert named == served | {"use_cache"}, "`use_cache` has no effect and is often given"
    assert named - set(typing.get_type_hints(RequestArguments)) == {"num_return_sequences"}


def test_no_field_is_an_argument_of_its_own_too() -> None:
    for method in (GenerationManager.submit, GenerationManager.make_request):
        assert not RequestArguments.__annotations__.keys() & inspect.signature(method).parameters.keys()


def test_no_argument_must_be_given() -> None:
    assert RequestArguments.__required_keys__ == DatasetArguments.__required_keys__ == frozenset()
