"""A stranger's files cost nobody anything: each has a verdict that names what is wrong, after bounded work."""

import re
import subprocess
import sys

import numpy as np
import pytest

from adapter_store.errors import AdapterRejected, AdapterTooLarge, StoreError
from adapter_store.image import patterns, strict_json
from adapter_store.image.config_fields import HARMLESS, HONOURED, REFUSED_WHEN_SET
from adapter_store.image.inspect import Limits, max_header_bytes
from adapter_store.image.packing import pack
from adapter_store.image.patterns import Question, first_matches
from adapter_store.image.spec import read_spec
from tests.support.fake_sources import site, small_spec
from tests.support.hostile_adapters import KINDS, cases
from tests.support.hostile_bombs import bombs
from tests.support.hostile_files import CONFIG, Case

SEED = 20261130
CALLS_PER_BYTE = 6  # the worst is a list of one-digit numbers: the parser makes about nine calls for each
MAX_PROCESSES = 4  # one for each field with patterns
SPEC = small_spec()
BOMBS = {case.kind: case for case in bombs()}
# What a message names: a file, a part of one, or a field.
NAMED = re.compile(
    rf"adapter_|safetensors|tensor|header|target|{'|'.join([*HARMLESS, *HONOURED, *REFUSED_WHEN_SET])}|is set to"
)


class Work:
    """Counts calls of functions, and processes, while it is looked at."""

    def __init__(self, monkeypatch):
        self.calls, self.processes = 0, 0
        run = subprocess.run

        def counted(*args, **kwargs):
            self.processes += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(patterns.subprocess, "run", counted)

    def __enter__(self):
        self.calls = self.processes = 0
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _count(self, frame, event, argument):
        self.calls += event in ("call", "c_call")


def verdict(case: Case) -> str:
    """ "accepted", or why not. Raises: whatever is no verdict."""
    try:
        packed = pack(case.files, SPEC, Limits(max_rank=512, max_bytes=1 << 20))
    except (AdapterRejected, AdapterTooLarge) as error:
        message = str(error)
        message.encode()  # as an answer and a log line are
        assert message.isprintable(), repr(message)
        assert len(message) < 1200, message[:300]
        assert NAMED.search(message), message
        return error.code
    assert packed.rank >= 1
    assert np.isfinite(packed.data.view(np.float32)).all()
    assert all(notice.isprintable() and len(notice) < 600 for notice in packed.manifest.get("notices", ()))
    return "accepted"


def walk(number, seed, monkeypatch):
    work, verdicts = Work(monkeypatch), {}
    for index, case in enumerate(cases(number, seed)):
        with work:
            try:
                told = verdict(case)
            except AssertionError:
                raise
            except BaseException as error:
                pytest.fail(f"case {index} ({case.kind}) has no verdict but {type(error).__name__}: {error}")
        size = sum(map(len, case.files.values()))
        limit = 30_000 + CALLS_PER_BYTE * size
        assert work.calls <= limit, f"case {index} ({case.kind}): {work.calls} calls for {size} bytes"
        assert work.processes <= MAX_PROCESSES, f"case {index} ({case.kind}): {work.processes} processes"
        verdicts.setdefault(case.kind, []).append(told)
    return verdicts


def test_every_hostile_adapter_has_a_verdict_that_names_what_is_wrong(monkeypatch):
    verdicts = walk(440, SEED, monkeypatch)
    assert set(verdicts) == set(KINDS)
    assert all("adapter_rejected" in told for told in verdicts.values())
    assert sum(told.count("accepted") for told in verdicts.values()) > 20, "what is only odd should be served"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_thousands_of_hostile_adapters_have_a_verdict(part, monkeypatch):
    assert sum(map(len, walk(1100, SEED + 1 + part, monkeypatch).values())) == 1100


@pytest.mark.parametrize("kind", sorted(BOMBS))
def test_the_worst_of_each_kind_has_a_verdict_after_bounded_work(kind, monkeypatch):
    work, case = Work(monkeypatch), BOMBS[kind]
    with work:
        verdict(case)
    looked_at = min(sum(map(len, case.files.values())), 2 << 20)
    assert work.calls <= 30_000 + CALLS_PER_BYTE * looked_at
    assert work.processes <= MAX_PROCESSES


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:" * 26 + "a" + "{1,99})" * 26,
        "((((a{1,60000}){1,60000}){1,60000}){1,60000})" * 50,
        "(.*)*" * 12 + "x",
        "(a|a)*" * 30 + "b",
        "(?i)" + "[\\U00000000-\\U0010ffff]" * 170,
        "(?:a|" * 800 + "b" + ")" * 800,
        "(" * 2000 + ")" * 2000,
        "(?=" * 1000 + ")" * 1000,
        "[" * 4000,
        "(?P<a>.*)(?P=a)*" * 5 + "x",
        "(?:(?:.*)+)+$x",
        "\\",
        "a" * 4097,
        "\U0010ffff" * 1000,
        "(?<=(?:.*))",
        "(?>(.*)*)" * 10 + "x",
    ],
)
def test_a_pattern_that_would_take_for_ever_ends_in_another_process(pattern):
    """Nothing of it is compiled or matched here, and what it may use there is limited; so it ends."""
    names = tuple(f"model.layers.{layer}.self_attn.{'a' * 30}_proj" for layer in range(80))
    for how in ("whole", "suffix", "layer"):
        try:
            found = first_matches(Question("target_modules", how, (pattern,)), names)
        except AdapterRejected as error:
            told = error.reason
        else:
            told = f"target_modules: {len(found)} answers"
        assert told.startswith("target_modules: ")


def test_a_pattern_that_is_stopped_is_told_with_its_field_and_a_remedy():
    (case,) = [case for case in BOMBS.values() if case.kind == "rank_pattern backtracks for ever"]
    told = r"rank_pattern: matching .* takes more than .* name the modules in a list"
    with pytest.raises(AdapterRejected, match=told):
        pack(case.files, SPEC)


@pytest.mark.parametrize("kind", sorted(kind for kind in BOMBS if "16 MiB" in kind or "too large" in kind))
def test_what_is_larger_than_an_adapter_of_this_base_can_need_is_not_parsed(kind, monkeypatch):
    parsed, parse = [], strict_json._parse
    monkeypatch.setattr(strict_json, "_parse", lambda text, *hooks: parsed.append(len(text)) or parse(text, *hooks))
    with pytest.raises(AdapterRejected, match=r"\d+"):
        pack(BOMBS[kind].files, SPEC)
    assert max(parsed, default=0) < 1000  # the configuration of the other file


def test_a_header_may_grow_with_the_sites_of_the_base():
    small, large = read_spec(SPEC), read_spec(SPEC | {"sites": [site(i, f"m{i}", 8, 8) for i in range(10_000)]})
    assert max_header_bytes(small) < 1 << 20
    assert max_header_bytes(large) > 10_000 * 2 * 120


def test_a_process_that_cannot_be_started_is_told(monkeypatch):
    monkeypatch.setattr(patterns.sys, "executable", "/no/such/python")
    with pytest.raises(StoreError, match=r"target_modules: .* no process can be started"):
        first_matches(Question("target_modules", "whole", ("(?:no|such)",)), ("a",))


def test_no_failed_adapter_holds_on_to_its_bytes():
    """What the store remembers of a refusal is the refusal alone, not the frames that it was raised through."""
    from adapter_store.names.catalog import Catalog, ImageKey, NameKey
    from adapter_store.sources.base import SourceFile, SourceListing

    catalog = Catalog()
    listing = SourceListing(files=(SourceFile(name=CONFIG, etag="1", num_bytes=1),))
    digest = catalog.observe(NameKey("s", "a"), listing, 0.0)
    key = ImageKey(digest, "spec")
    catalog.start_fetch(key)
    try:
        pack(next(iter(cases(1, 1))).files | {CONFIG: b"{"}, SPEC)
    except AdapterRejected as error:
        catalog.fetch_failed(key, error, 10.0)
    for _ in range(3):
        failure = catalog.failure(key, 1.0)
        assert (failure.__traceback__, failure.__cause__, failure.__context__) == (None, None, None)
        with pytest.raises(AdapterRejected, match="not JSON"):
            raise failure
