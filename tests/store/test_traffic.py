"""Counts that halve with time, for no more names than there is room for."""

import math

from hypothesis import given
from hypothesis import strategies as st

from adapter_store.names.traffic import Traffic


def test_a_request_counts_half_after_the_half_life():
    traffic = Traffic(10.0)
    traffic.count("a", 100.0)
    traffic.count("a", 110.0)
    assert traffic.value("a", 110.0) == 1.5
    assert traffic.value("a", 120.0) == 0.75
    assert traffic.value("never", 120.0) == 0.0


def test_a_clock_that_is_set_back_takes_nothing_away():
    traffic = Traffic(10.0)
    traffic.count("a", 100.0)
    assert traffic.value("a", 0.0) == 1.0


def test_the_most_wanted_come_first():
    traffic = Traffic(10.0)
    for _ in range(3):
        traffic.count("once", 0.0)
    traffic.count("now", 30.0)
    traffic.count("now", 30.0)
    assert traffic.top(5, 30.0) == ("now", "once")
    assert traffic.top(1, 30.0) == ("now",)


def test_only_the_most_wanted_half_is_remembered_when_there_are_too_many():
    traffic = Traffic(10.0, max_keys=100)
    for number in range(50):
        traffic.count("hot", number)
    for number in range(1_000):
        traffic.count(number, 50.0)
        assert len(traffic) <= 100
    assert traffic.value("hot", 50.0) > 1
    assert len(traffic.take_changed()) <= 100, "nor does what nobody takes pile up"


def test_what_has_changed_is_told_once_and_adds_up_where_it_is_restored():
    traffic, copy = Traffic(10.0), Traffic(10.0)
    traffic.count("a", 0.0)
    traffic.count("a", 10.0)
    ((key, value, at),) = traffic.take_changed()
    assert traffic.take_changed() == ()
    copy.count("a", 20.0)
    copy.restore(key, value, at)
    assert copy.value("a", 20.0) == 1.0 + 1.5 / 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 50)), max_size=30), st.floats(0, 50))
def test_a_count_is_the_sum_of_all_its_requests_decayed(requests, later):
    traffic, now = Traffic(7.0), 0.0
    times = []
    for key, pause in requests:
        now += pause
        traffic.count(key, now)
        times.append((key, now))
    now += later
    for key in "abc":
        want = sum(0.5 ** ((now - at) / 7.0) for other, at in times if other == key)
        assert math.isclose(traffic.value(key, now), want, abs_tol=1e-9)
