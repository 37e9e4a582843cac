"""Answers that are kept: whose they are, how many, and what goes first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.kept.answers import Answers

MAX_BYTES, MAX_OF_ONE, MAX_AGE_S = 100, 60, 10.0
TENANTS = st.sampled_from(["", "a", "b"])
NAMES = st.sampled_from(["1", "2", "3", "4"])


class KeptAnswers(RuleBasedStateMachine):
    """Against a list of what was kept, used longest ago first."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.answers = Answers(MAX_BYTES, MAX_OF_ONE, MAX_AGE_S, lambda: self.now_s)
        self.model: list[tuple[str, str, bytes, float]] = []

    def _without(self, tenant: str, name: str) -> None:
        self.model = [row for row in self.model if row[:2] != (tenant, name)]

    @rule(seconds=st.floats(0.0, 6.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(tenant=TENANTS, name=NAMES, data=st.binary(max_size=80))
    def put(self, tenant: str, name: str, data: bytes) -> None:
        is_kept = self.answers.put(tenant, name, data)
        assert is_kept == (len(data) <= MAX_OF_ONE)
        self._without(tenant, name)
        if is_kept:
            self.model.append((tenant, name, data, self.now_s + MAX_AGE_S))

    @rule(tenant=TENANTS, name=NAMES)
    def get(self, tenant: str, name: str) -> None:
        found = self.answers.get(tenant, name)
        (row,) = [row for row in self.model if row[:2] == (tenant, name)] or [None]
        if found is not None:
            assert row is not None
            assert found == row[2]
            assert self.now_s < row[3]
            self._without(tenant, name)
            self.model.append(row)
        elif row is not None and self.now_s < row[3]:
            newer = self.model[self.model.index(row) :]
            sizes = sum(len(data) for _, _, data, _ in newer), sum(len(r[2]) for r in newer if r[0] == tenant)
            assert sizes[0] > MAX_BYTES or sizes[1] > MAX_OF_ONE, "it went although there was room"
            self._without(tenant, name)

    @rule(tenant=TENANTS, name=NAMES)
    def delete(self, tenant: str, name: str) -> None:
        self.answers.delete(tenant, name)
        self._without(tenant, name)
        assert self.answers.get(tenant, name) is None

    @invariant()
    def is_bounded(self) -> None:
        assert self.answers.num_bytes <= MAX_BYTES
        assert len(self.answers._all) == sum(map(len, self.answers._of.values()))
        for tenant in ("", "a", "b"):
            assert self.answers._num_bytes[tenant] <= MAX_OF_ONE


TestKeptAnswers = KeptAnswers.TestCase
TestKeptAnswers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
