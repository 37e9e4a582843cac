"""Whatever `/openapi.json` lets a client send is answered, and as it says: schemathesis writes the requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.fakes import URL, FakeBackend, serve

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
MODELS = ("demo", "alpha")  # the base and an adapter; names that are made up mostly end in 404


def _schema(examples: int, *, with_boundaries: bool) -> Any:
    """Of an application over fakes. `examples`: random requests for each operation; boundaries: of each field."""
    app = serve(FakeBackend(reply=lambda call: "yes")).app
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    schema.config.generation.update(deterministic=True, database="none", max_examples=examples)
    schema.config.phases.coverage.enabled = with_boundaries
    # Other methods than those told are asked in tests/serving/test_methods.py, OPTIONS among them.
    schema.config.phases.coverage.unexpected_methods = set()
    return schema


SOME = _schema(6, with_boundaries=False)
ALL = _schema(60, with_boundaries=True)
OPERATIONS = sum(1 for _ in ALL.get_all_operations())


def _check(case: Any, sent: Counter[str]) -> None:
    label = case.operation.label
    sent[label] += 1
    if case.meta.generation.mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODELS[sent[label] % 2]
    case.call_and_validate(base_url=URL, checks=CHECKS)


@pytest.fixture(scope="module")
def some_sent() -> Counter[str]:
    """How many requests of which operation."""
    return Counter()


@pytest.fixture(scope="module")
def all_sent() -> Iterator[Counter[str]]:
    """As `some_sent`; they are to be thousands once every operation had its own."""
    sent: Counter[str] = Counter()
    yield sent
    if len(sent) == OPERATIONS:
        assert sent.total() >= 3000


@SOME.parametrize()
def test_a_request_is_answered_as_the_schema_says(case: Any, some_sent: Counter[str]):
    _check(case, some_sent)


@pytest.mark.slow
@ALL.parametrize()
def test_thousands_of_requests_are_answered_as_the_schema_says(case: Any, all_sent: Counter[str]):
    _check(case, all_sent)
