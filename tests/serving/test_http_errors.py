"""Every error of the engine and of the store has an answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapter_store.errors import AdapterNotFound, StoreError
from deployments.calls import Fault, Refused
from deployments.errors import ANSWERS, fault_of
from engine.errors import EngineError, InvalidRequest, PromptTooLong


def _tree(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


CLASSES = [
    kind for root in (EngineError, StoreError) for kind in _tree(root) if kind.__module__.split(".")[0] != "tests"
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_class_has_an_answer(kind: type[Exception]):
    answer = ANSWERS[kind.code]  # type: ignore[attr-defined]
    assert 400 <= answer.status < 600
    assert 400 <= answer.lorax_status < 600
    if kind.retryable:  # type: ignore[attr-defined]
        assert answer.retry_after_s, "a caller that may try again must be told when"


def test_the_codes_of_an_error_survive_as_data():
    assert fault_of(InvalidRequest("n", "too many")) == Fault(code="invalid_request", message="n: too many", param="n")
    assert fault_of(PromptTooLong("5 > 4")).code == "context_length_exceeded"
    assert fault_of(AdapterNotFound("x", ("local",))).code == "adapter_not_found"
    assert fault_of(Refused(Fault(code="queue_full", message="full"))).code == "queue_full"


def test_an_unexpected_error_tells_nothing_of_the_server():
    fault = fault_of(KeyError("/secret/path"))
    assert fault.code == "internal_error"
    assert "secret" not in fault.message
