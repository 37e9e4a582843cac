"""Errors reach another process whole, and their codes stay what they are."""

import inspect
import pickle

import pytest

from adapter_store import errors
from adapter_store.errors import StoreError
from adapter_store.records import StoreConfig, check_name, version_digest

EXAMPLES = [
    errors.AdapterNameInvalid("../x", "'..' is not allowed"),
    errors.AdapterNotFound("x", ("a", "b")),
    errors.AdapterVersionGone("x", "0" * 64),
    errors.AdapterRejected("rank 0", "x"),
    errors.AdapterTooLarge("its image", 10, 5, "x"),
    errors.SourceUnavailable("s", "down"),
    errors.SourceUnknown("s", ("a",)),
    errors.SpecUnknown("0" * 64),
    errors.SpecInvalid("dtype"),
    errors.StoreFull(1, 2, 3),
    errors.RegistrationInvalid("x", "no source is named 'y'"),
    errors.PinRefused("x", 3, 2, 4),
    errors.StoreConfigInvalid("refresh_s", "negative"),
]


def leaves():
    return {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__}


def test_every_error_is_drawn_in_the_tree_with_its_code():
    for cls in leaves():
        assert cls.__name__ in errors.__doc__
        assert cls is StoreError or cls.code in errors.__doc__
    codes = [cls.code for cls in leaves()]
    assert len(set(codes)) == len(codes)


def test_there_is_an_example_of_every_error():
    assert {type(example) for example in EXAMPLES} == leaves() - {StoreError}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: error.code)
def test_an_error_pickles_with_its_message_and_fields(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize("name", ["a", "A1", "team/x_1.2-b", "a/b/c", "x" * 200])
def test_a_name_of_letters_digits_and_slashes_is_a_name(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/..",
        "a..b",
        ".hidden",
        "a/.b",
        "-a",
        "a b",
        "a\\b",
        "a\n",
        "a\x00",
        "ä",
        "a%2e",
        "x" * 201,
        "C:/x",
        "s3://x",
        "~",
        None,
    ],
)
def test_path_traversal_and_other_tricks_are_no_names(name):
    with pytest.raises(errors.AdapterNameInvalid):
        check_name(name)


def test_a_version_depends_on_source_name_and_every_etag():
    base = version_digest("s", "n", [("a", "1"), ("b", "2")])
    assert base == version_digest("s", "n", [("b", "2"), ("a", "1")])
    others = [
        version_digest("t", "n", [("a", "1"), ("b", "2")]),
        version_digest("s", "m", [("a", "1"), ("b", "2")]),
        version_digest("s", "n", [("a", "1"), ("b", "3")]),
        version_digest("s", "n", [("a", "1")]),
        version_digest("s", "n", [("a1", ""), ("b", "2")]),
    ]
    assert len({base, *others}) == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host_bytes", 0),
        ("refresh_s", -1),
        ("lease_ttl_s", 0),
        ("max_rank", True),
        ("fetch_retries", "3"),
        ("max_adapter_bytes", 1 << 40),
        ("failure_ttl_s", float("nan")),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(field, value):
    with pytest.raises(errors.StoreConfigInvalid) as caught:
        StoreConfig(**{field: value})
    assert caught.value.field == field
