"""What a change of the batch costs: the biases and bans of a request are written out once, when it is made."""

from __future__ import annotations

import pickle

import pytest
import torch

from engine.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams
from engine.runner.batch_params import BatchParams, SequenceSampling
from engine.runner.sampler import Sampler
from tests.support.sampling import row_of, start_of
from tests.support.sampling_oracle import Row


class Unread(dict[int, float]):
    """Biases that nobody may go through any more."""

    def items(self) -> object:  # type: ignore[override]
        raise AssertionError("the biases are written out again")

    __iter__ = keys = values = items  # type: ignore[assignment]


def sequence(params: SamplingParams, banned: tuple[int, ...] = ()) -> SequenceSampling:
    return SequenceSampling(params, 1, 0, banned, None, None)


def test_batches_are_put_together_from_what_each_request_has_written_once() -> None:
    rng = torch.Generator().manual_seed(0)
    maps = [
        {int(i): float(i % 7) - 3 for i in torch.randperm(5000, generator=rng)[:size]} for size in (0, 1, 0, 40, 1024)
    ]
    params = [SamplingParams(logit_bias=biases) for biases in maps]
    for one in params:
        object.__setattr__(one, "logit_bias", Unread(one.logit_bias))
    for order in ([0, 1, 2, 3, 4], [4, 3], [2, 0], [1, 1, 4]):
        batch = BatchParams(tuple(order), [sequence(params[i]) for i in order], torch.device("cpu"))
        found = torch.zeros(len(order), 5000)
        found.index_put_((batch.bias_rows, batch.bias_token_ids), batch.biases, accumulate=True)
        expected = torch.zeros(len(order), 5000)
        for row, i in enumerate(order):
            for token_id, bias in maps[i].items():
                expected[row, token_id] = bias
        assert torch.equal(found, expected)
        assert batch.changes_logits == bool(len(batch.biases))


def test_what_was_written_travels_with_the_request() -> None:
    params = SamplingParams(logit_bias={5: 1.5, 3: -2.0})
    copy = pickle.loads(pickle.dumps(params))
    assert copy == params
    assert [list(numbers) for numbers in copy.packed_bias] == [[5, 3], [1.5, -2.0]]


def test_as_many_biases_as_there_may_be_change_the_choice() -> None:
    vocab_size = MAX_LOGIT_BIAS + 8
    params = SamplingParams(max_tokens=None, temperature=0.0, logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 50.0))
    sampler = Sampler(vocab_size)
    sampler.start(start_of(0, Row(logits=[], params=params)))
    logits = torch.zeros(1, vocab_size)
    logits[0, vocab_size - 1] = 40.0
    assert sampler.sample(logits, (row_of(0, 0),)).samples[0].token_ids == (0,)


def test_bans_are_put_together_once_for_as_long_as_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tuple(range(MAX_STOP_TOKEN_IDS))
    params = [SamplingParams(max_tokens=50, min_tokens=n, stop_token_ids=ids) for n in (3, 0, 5)]
    batch = BatchParams((0, 1, 2), [sequence(p, ids if p.min_tokens else ()) for p in params], torch.device("cpu"))
    made = [0]
    pairs = batch._pairs

    def counted(bans: list[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        made[0] += 1
        return pairs(bans)

    monkeypatch.setattr(batch, "_pairs", counted)
    rows = []
    for position in range(6):
        banned = batch.banned([position] * 3)
        rows.append([] if banned is None else sorted(set(banned[0].tolist())))
        assert banned is None or sorted(set(banned[1].tolist())) == list(ids)
    assert rows == [[0, 2]] * 3 + [[2]] * 2 + [[]]
    assert made == [2], "once for both, once for the one that is left"
