"""What each sampling parameter promises, rule by rule; transformers' processors are the oracle where they exist."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from engine.core.plan import Sample
from engine.request import SamplingParams
from engine.runner.penalties import TokenHistory
from engine.runner.sampler import Sampler
from tests.support.sampling import drawn, greedy, one, row_of, sample, start_of
from tests.support.sampling_oracle import Row


class TestChoice:
    def test_greedy_takes_the_lowest_id_of_equals(self) -> None:
        assert greedy([0.0, 3.0, 1.0, 3.0]) == 1
        assert greedy([0.0] * 70 + [1.0] * 70) == 70

    def test_top_k_breaks_ties_by_token_id(self) -> None:
        assert drawn([1.0, 2.0, 1.0, 1.0], top_k=2) == {0, 1}

    def test_top_p_breaks_ties_by_token_id(self) -> None:
        assert drawn([0.0, 0.0, 0.0, 0.0], top_p=0.5) == {0, 1}

    def test_top_p_keeps_the_token_that_reaches_the_mass(self) -> None:
        logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
        assert drawn(logits, top_p=0.49) == {0}
        assert drawn(logits, top_p=0.51) == {0, 1}
        assert drawn(logits, top_p=0.81) == {0, 1, 2}

    def test_top_p_counts_what_top_k_left(self) -> None:
        logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
        assert drawn(logits, top_p=0.6) == {0, 1}
        assert drawn(logits, top_k=2, top_p=0.55) == {0}  # 0.4 of the remaining 0.7 is 0.57

    def test_filters_see_the_temperature(self) -> None:
        logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
        assert drawn(logits, temperature=0.1, top_p=0.9) == {0}
        assert drawn(logits, temperature=100.0, top_p=0.6) == {0, 1}

    def test_the_most_likely_token_always_stays(self) -> None:
        assert drawn([0.0, 5.0], top_p=1e-300) == {1}

    def test_each_way_to_ask_for_the_most_likely_token_gives_the_greedy_one(self) -> None:
        neighbours = ({"top_p": 0}, {"top_p": 0.0, "top_k": 3}, {"top_p": 0.0, "min_p": 1.0}, {"top_p": 5e-324},
                      {"top_p": 0.0, "temperature": 100.0}, {"top_k": 1}, {"temperature": 5e-324},
                      {"temperature": 1e-30, "top_p": 0.5}, {"min_p": 1.0}, {"min_p": 1.0, "top_k": -1})  # fmt: skip
        for logits in ([0.1, 0.3, 0.2, 0.3 - 1e-3], [-5.0, -4.0, 3.0, 2.5], [0.0] * 500 + [1.0, 0.5]):
            for params in neighbours:
                assert drawn(logits, **params) == drawn(logits, temperature=0.0), params

    def test_top_p_of_nothing_breaks_ties_as_greedy_does(self) -> None:
        assert drawn([1.0, 1.0, 0.0], top_p=0.0) == drawn([1.0, 1.0, 0.0], temperature=0.0) == {0}

    def test_a_top_k_of_minus_one_is_all(self) -> None:
        assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
        assert drawn([0.0, 5.0, 5.0], min_p=1.0) == {1, 2}

    def test_extreme_temperatures_are_harmless(self) -> None:
        assert drawn([3.0, 3.5, -2.0], temperature=1e-300) == {1}
        assert drawn([3e38, -3e38, 0.0], temperature=1e-30) == {0}
        assert drawn([1.0, 2.0, 3.0], temperature=100.0) == {0, 1, 2}

    def test_the_number_belongs_to_seed_sample_and_position(self) -> None:
        logits = [0.0] * 1000

        def token(seed: int, sample_index: int, position: int) -> tuple[int, ...]:
            row = Row(logits, SamplingParams(max_tokens=None), seed, sample_index, output=(0,) * position)
            return sample([row])[0].token_ids

        assert token(5, 0, 0) == token(5, 0, 0)
        assert len({token(s, i, p) for s in (5, 6, 2**64 - 1) for i in (0, 1) for p in (0, 1, 2)}) == 18


class TestPenalties:
    @pytest.mark.parametrize("penalty", [1.3, 0.7])
    def test_repetition_equals_transformers_over_prompt_and_output(self, penalty: float) -> None:
        torch.manual_seed(0)
        logits = torch.randn(1, 50)
        ids = torch.tensor([[1, 7, 7, 49, 3]])
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())[0]
        params = SamplingParams(repetition_penalty=penalty)
        row = Row(logits[0].tolist(), params, prompt=(1, 7, 7), output=(49, 3))
        assert penalised(row) == pytest.approx(expected.tolist(), rel=1e-6)

    def test_presence_counts_once_and_frequency_each_time_in_the_output_alone(self) -> None:
        params = SamplingParams(max_tokens=None, presence_penalty=0.5, frequency_penalty=0.25)
        row = Row([1.0, 1.0, 1.0], params, prompt=(0, 0, 0), output=(1, 1, 2))
        assert penalised(row) == pytest.approx([1.0, 0.0, 0.25])

    def test_own_samples_count_from_the_next_step_on(self) -> None:
        sampler = Sampler(3)
        params = SamplingParams(max_tokens=None, temperature=0.0, frequency_penalty=1.0)
        sampler.start(start_of(1, Row([], params)))
        tokens = []
        for position in range(6):
            step = sampler.sample(torch.tensor([[2.5, 2.0, 0.25]]), (row_of(1, position),))
            tokens += step.samples[0].token_ids
        assert tokens == [0, 1, 0, 1, 0, 2]

    def test_resumed_output_counts_as_output(self) -> None:
        params = SamplingParams(max_tokens=None, temperature=0.0, frequency_penalty=1.0)
        whole, rest = Sampler(3), Sampler(3)
        whole.start(start_of(1, Row([], params)))
        logits = torch.tensor([[2.5, 2.0, 0.25]])
        tokens = [whole.sample(logits.clone(), (row_of(1, i),)).samples[0].token_ids[0] for i in range(6)]
        rest.start(start_of(1, Row([], params, output=tuple(tokens[:3]))))
        resumed = [rest.sample(logits.clone(), (row_of(1, i),)).samples[0].token_ids[0] for i in range(3, 6)]
        assert resumed == tokens[3:]

    def test_a_row_of_the_history_is_clean_for_the_next_sequence(self) -> None:
        sampler = Sampler(3)
        params = SamplingParams(max_tokens=None, temperature=0.0, presence_penalty=2.0, repetition_penalty=9.0)
        for seq_id in range(10):
            sampler.start(start_of(seq_id, Row([], params)))
            step = sampler.sample(torch.tensor([[1.5, 1.0, 0.0]]), (row_of(seq_id, 0),))
            assert step.samples[0].token_ids == (0,)
            sampler.end(seq_id)

    def test_prompt_tokens_beyond_the_vocabulary_have_no_logit_to_change(self) -> None:
        params = SamplingParams(max_tokens=None, temperature=0.0, repetition_penalty=2.0)
        assert sample([Row([1.0, 0.9], params, prompt=(0, 2, 99))])[0].token_ids == (1,)

    def test_tiny_repetition_penalty_overflows_harmlessly(self) -> None:
        params = SamplingParams(max_tokens=None, repetition_penalty=1e-300)
        assert sample([Row([1.0, 0.5, 2.0], params, prompt=(1,))])[0].token_ids == (1,)


def penalised(row: Row) -> list[float]:
    """The row's logits after the penalties."""
    p = row.params
    history = TokenHistory(len(row.logits), torch.device("cpu"))
    for _ in range(6):  # past the table's first size
        at = history.open(row.prompt, row.output)
    logits = torch.stack((torch.zeros(len(row.logits)), torch.tensor(row.logits)))
    strengths = (torch.tensor([x]) for x in (p.repetition_penalty, p.presence_penalty, p.frequency_penalty))
    history.penalise(logits, torch.tensor([1]), torch.tensor([at]), *strengths)
    assert logits[0].tolist() == [0.0] * len(row.logits)
    return logits[1].tolist()


class TestFiltersAgainstTransformers:
    @pytest.mark.parametrize(
        ("params", "warper"),
        [
            ({"top_k": 5}, TopKLogitsWarper(5)),
            ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
            ({"top_p": 0.2}, TopPLogitsWarper(0.2)),
            ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
            ({"typical_p": 0.2}, TypicalLogitsWarper(0.2)),
            ({"typical_p": 0.6}, TypicalLogitsWarper(0.6)),
            ({"typical_p": 0.95}, TypicalLogitsWarper(0.95)),
        ],
    )
    def test_the_same_tokens_survive(self, params: dict[str, float], warper: object) -> None:
        torch.manual_seed(1)
        logits = torch.randn(1, 20)
        kept = warper(torch.zeros(1, 0, dtype=torch.long), logits.clone())[0].isfinite().nonzero()[:, 0]  # type: ignore[operator]
        assert drawn(logits[0].tolist(), draws=6_000, **params) == set(kept.tolist())


class TestMinTokens:
    def test_eos_and_stop_tokens_wait_until_then(self) -> None:
        rule = {"min_tokens": 2, "stop_token_ids": (3,), "eos": (2,)}
        logits = [0.0, 1.0, 5.0, 4.0]
        assert greedy(logits, output=(), **rule) == 1
        assert greedy(logits, output=(0,), **rule) == 1
        assert greedy(logits, output=(0, 0), **rule) == 2

    def test_ignored_eos_may_come_at_any_time(self) -> None:
        logits = [0.0, 5.0, 6.0]
        assert greedy(logits, min_tokens=1, ignore_eos=True, eos=(1,), stop_token_ids=(2,)) == 1

    def test_banned_tokens_are_never_drawn(self) -> None:
        params = SamplingParams(min_tokens=1)
        rows = [Row([0.0, 9.0, 0.0], params, seed=seed, eos=(1,)) for seed in range(300)]
        assert {s.token_ids[0] for s in sample(rows)} == {0, 2}

    def test_a_ban_of_everything_bans_nothing(self) -> None:
        assert greedy([0.0, 1.0], min_tokens=1, stop_token_ids=(0, 1)) == 1

    def test_stop_tokens_beyond_the_vocabulary_need_no_ban(self) -> None:
        assert greedy([0.0, 1.0], min_tokens=1, stop_token_ids=(2, 77)) == 1


class TestLogitBias:
    def test_bias_is_added_before_the_choice(self) -> None:
        assert greedy([0.0, 1.0, 2.0], logit_bias={0: 2.5}) == 0
        assert greedy([0.0, 1.0, 2.0], logit_bias={2: -100.0}) == 1

    def test_a_bias_against_everything_leaves_the_order(self) -> None:
        assert greedy([0.0, 1.0, 2.0], logit_bias={0: -100.0, 1: -100.0, 2: -100.0}) == 2

    def test_bias_of_a_token_that_is_none_fails_that_row_alone(self) -> None:
        wrong = SamplingParams(max_tokens=None, temperature=0.0, logit_bias={3: 1.0})
        right = SamplingParams(max_tokens=None, temperature=0.0)
        failed, other = sample([Row([0.0, 1.0, 2.0], wrong), Row([0.0, 1.0, 2.0], right)])
        assert failed == Sample(0, (), error="logit_bias names token 3, the model's tokens are 0 to 2")
        assert other == Sample(1, (2,))


class TestLogprobs:
    def test_they_are_the_models_before_any_change(self) -> None:
        logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
        expected = torch.log_softmax(logits.double(), dim=0)
        found = one(
            logits.tolist(), logprobs=5, temperature=0.3, logit_bias={7: 50.0}, repetition_penalty=1.5, top_k=3
        ).logprobs
        assert found is not None
        assert found[0].token_id == 7
        assert found[0].logprob == pytest.approx(float(expected[7]), abs=1e-6)
        values, ids = expected.topk(5)
        assert [i for i, _ in found[0].top] == ids.tolist()
        assert [v for _, v in found[0].top] == pytest.approx(values.tolist(), abs=1e-6)

    @pytest.mark.parametrize("vocab_size", [3, 5000])
    def test_equals_come_in_order_of_token_id(self, vocab_size: int) -> None:
        found = one([0.0] * vocab_size, logprobs=3).logprobs
        assert found is not None
        assert [i for i, _ in found[0].top] == [0, 1, 2]
        assert [v for _, v in found[0].top] == pytest.approx([-math.log(vocab_size)] * 3)

    def test_each_row_gets_as_many_as_it_asked_for(self) -> None:
        rows = [Row([0.0, 1.0, 2.0], SamplingParams(max_tokens=None, logprobs=k)) for k in (None, 0, 2, 20)]
        found = [s.logprobs for s in sample(rows)]
        assert found[0] is None
        assert [len(x[0].top) for x in found[1:] if x is not None] == [0, 2, 3]  # a vocabulary of three has no more


class TestFailures:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 2}, {"logprobs": 2}], ids=str)
    def test_logits_that_are_not_finite_fail_their_row_alone(self, bad: float, params: dict[str, float]) -> None:
        made = SamplingParams(max_tokens=None, **params)  # type: ignore[arg-type]
        good = Row([0.0, 1.0, 2.0], made, seed=3)
        alone = sample([good])[0]
        failed, other = sample([Row([0.0, bad, 2.0], made), good])
        assert failed.token_ids == ()
        assert failed.logprobs is None
        assert "not finite" in str(failed.error)
        assert (other.token_ids, other.logprobs, other.error) == (alone.token_ids, alone.logprobs, None)

    def test_logits_whose_sum_overflows_are_finite_all_the_same(self) -> None:
        lowest = torch.finfo(torch.float32).min
        assert greedy([lowest, lowest, 1.0, lowest]) == 2
        assert drawn([lowest, lowest, 1.0, lowest], draws=20) == {2}

    def test_logits_of_another_shape_are_refused(self) -> None:
        sampler = Sampler(3)
        sampler.start(start_of(1, Row([], SamplingParams())))
        with pytest.raises(ValueError, match=r"logits \(1, 4\) should be \(1, 3\)"):
            sampler.sample(torch.zeros(1, 4), (row_of(1, 0),))

    def test_a_sequence_that_was_not_started_is_an_error(self) -> None:
        with pytest.raises(KeyError):
            Sampler(3).sample(torch.zeros(1, 3), (row_of(1, 0),))


class TestLifeCycle:
    def test_parameters_follow_the_sequences_of_each_step(self) -> None:
        sampler = Sampler(3)
        for seq_id, bias in enumerate(({0: 9.0}, {1: 9.0}, {2: 9.0})):
            params = SamplingParams(max_tokens=None, temperature=0.0, logit_bias=bias)
            sampler.start(start_of(seq_id, Row([], params)))
        for order in ((0, 1, 2), (2, 0), (1,), (2, 1, 0)):
            step = sampler.sample(torch.zeros(len(order), 3), tuple(row_of(i, 0) for i in order))
            assert step.token_ids.tolist() == list(order)

    def test_a_sequence_that_starts_again_forgets_its_former_self(self) -> None:
        sampler = Sampler(3)
        for bias in ({0: 9.0}, {1: 9.0}):
            params = SamplingParams(max_tokens=None, temperature=0.0, logit_bias=bias)
            sampler.start(start_of(1, Row([], params)))
            step = sampler.sample(torch.zeros(1, 3), (row_of(1, 0),))
            assert step.token_ids.tolist() == list(bias)

    def test_ending_twice_is_harmless(self) -> None:
        sampler = Sampler(3)
        sampler.start(start_of(1, Row([], SamplingParams(presence_penalty=1.0))))
        sampler.end(1)
        sampler.end(1)
        with pytest.raises(KeyError):
            sampler.sample(torch.zeros(1, 3), (row_of(1, 0),))

    def test_half_precision_logits_are_taken_as_they_are(self) -> None:
        sampler = Sampler(3)
        sampler.start(start_of(1, Row([], SamplingParams(temperature=0.0, logprobs=0))))
        logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
        (found,) = sampler.sample(logits, (row_of(1, 0),)).samples
        assert found.logprobs is not None
        assert found.logprobs[0].logprob == pytest.approx(float(torch.log_softmax(logits[0].double(), 0)[1]), abs=1e-6)
