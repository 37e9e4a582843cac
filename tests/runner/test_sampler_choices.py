"""Which tokens may be chosen at all: those allowed, no bad words; and typical_p. transformers is the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper
from transformers.generation.logits_process import NoBadWordsLogitsProcessor

from engine.core.plan import Sample
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from engine.runner.sampler import Sampler
from tests.support import sampling_oracle
from tests.support.sampling import drawn, greedy, one, row_of, sample, start_of
from tests.support.sampling_oracle import Row


class TestTypical:
    @pytest.mark.parametrize("vocab_size", [40, 6000])
    @pytest.mark.parametrize(
        "before", [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9}]
    )
    def test_typical_p_keeps_what_transformers_keeps_behind_the_other_filters(
        self, before: dict[str, float], vocab_size: int
    ) -> None:
        """In float64, where no tie is an accident; what is kept is read off shares that hit each token once."""
        warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
        for seed, mass in enumerate((0.05, 0.3, 0.5, 0.9, 0.999)):
            logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
            scores = logits.double() / before.get("temperature", 1.0)
            for name, value in before.items():
                scores = warpers[name](value)(None, scores) if name in warpers else scores
            kept = TypicalLogitsWarper(mass)(None, scores)[0].isfinite().nonzero()[:, 0]
            params = SamplingParams(max_tokens=None, typical_p=mass, **before)  # type: ignore[arg-type]
            found, _ = sampling_oracle.keep(logits[0].double().tolist(), params)
            assert sorted(found) == kept.tolist()

    def test_the_most_likely_token_may_be_untypical(self) -> None:
        logits = [math.log(0.4), *[math.log(0.6 / 40)] * 40]
        assert 0 not in drawn(logits, typical_p=0.3)
        assert drawn(logits, typical_p=0.3, top_k=1) == {0}


class TestAllowedTokens:
    def test_no_other_token_comes(self) -> None:
        logits = [9.0, 0.0, 0.5, 0.0, 8.0]
        assert drawn(logits, allowed_token_ids=(3, 1)) == {1, 3}
        assert greedy(logits, allowed_token_ids=(1, 2)) == 2
        assert drawn([0.0] * 5000, allowed_token_ids=(7, 4999), top_k=50) == {7, 4999}
        assert drawn([0.0] * 5000, allowed_token_ids=(7, 4999), top_p=0.9, min_p=0.1) == {7, 4999}

    def test_a_bias_and_a_penalty_still_count_among_them(self) -> None:
        assert greedy([9.0, 0.0, 0.5], allowed_token_ids=(1, 2), logit_bias={1: 1.0}) == 1
        assert greedy([9.0, 0.0, 0.5], allowed_token_ids=(1, 2), presence_penalty=1.0, output=(2,)) == 1

    def test_an_end_that_must_wait_comes_when_nothing_else_may(self) -> None:
        rule = {"eos": (1,), "min_tokens": 3}
        assert greedy([9.0, 0.0, 0.5], allowed_token_ids=(1,), **rule) == 1
        assert greedy([9.0, 5.0, 0.5], allowed_token_ids=(1, 2), **rule) == 2

    def test_others_keep_their_tokens(self) -> None:
        some = SamplingParams(max_tokens=None, temperature=0.0, allowed_token_ids=(1,))
        every = SamplingParams(max_tokens=None, temperature=0.0)
        found = sample([Row([2.0, 1.0, 3.0], params) for params in (every, some, every, some)])
        assert [s.token_ids for s in found] == [(2,), (1,), (2,), (1,)]

    def test_one_that_the_model_has_not_fails_its_row_alone(self) -> None:
        wrong = SamplingParams(max_tokens=None, temperature=0.0, allowed_token_ids=(1, 3))
        right = SamplingParams(max_tokens=None, temperature=0.0)
        failed, other = sample([Row([0.0, 1.0, 2.0], wrong), Row([0.0, 1.0, 2.0], right)])
        assert failed.error == "allowed_token_ids names token 3, the model's tokens are 0 to 2"
        assert other == Sample(1, (2,))


class TestBadWords:
    WORDS = ((4,), (1, 2), (1, 1, 3), (5, 0), (2, 2, 2, 2), (3, 0))

    @pytest.mark.parametrize("seed", range(12))
    def test_the_same_tokens_are_banned_as_by_transformers(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        said = tuple(torch.randint(0, 4, (5,), generator=rng).tolist())
        logits = torch.randn(1, 6, generator=rng)
        expected = NoBadWordsLogitsProcessor([list(word) for word in self.WORDS])(torch.tensor([said]), logits.clone())[
            0
        ]
        assert drawn(logits[0].tolist(), bad_words_token_ids=self.WORDS, output=said) == set(
            expected.isfinite().nonzero()[:, 0].tolist()
        )

    def test_a_word_of_several_tokens_never_comes_out_whole(self) -> None:
        sampler = Sampler(3)
        params = SamplingParams(max_tokens=None, bad_words_token_ids=((0, 1), (1, 1), (2, 2, 2), (0, 0, 0, 0)))
        for seq_id in range(8):
            sampler.start(start_of(seq_id, Row([], params, seed=seq_id)))
        texts = [""] * 8
        for position in range(60):
            step = sampler.sample(torch.zeros(8, 3), tuple(row_of(i, position) for i in range(8)))
            texts = [text + str(s.token_ids[0]) for text, s in zip(texts, step.samples, strict=True)]
        assert not any(word in text for word in ("01", "11", "222", "0000") for text in texts)
        assert all("22" in text and "000" in text for text in texts)

    def test_resumed_output_counts_as_output_and_the_prompt_does_not(self) -> None:
        word = {"bad_words_token_ids": ((7, 7, 2),)}
        logits = [0.0, 1.0, 5.0, *[0.0] * 5]
        assert greedy(logits, output=(7, 7), **word) == 1
        params = SamplingParams(max_tokens=None, temperature=0.0, **word)  # type: ignore[arg-type]
        assert sample([Row(logits, params, prompt=(7, 7))])[0].token_ids == (2,)

    def test_what_a_former_sequence_said_is_forgotten(self) -> None:
        sampler = Sampler(3)
        params = SamplingParams(max_tokens=None, temperature=0.0, bad_words_token_ids=((0, 0),))
        for seq_id in range(10):
            sampler.start(start_of(seq_id, Row([], params)))
            for position, token in enumerate((0, 1, 0)):
                step = sampler.sample(torch.tensor([[1.5, 1.0, 0.0]]), (row_of(seq_id, position),))
                assert step.samples[0].token_ids == (token,)
            sampler.end(seq_id)

    def test_a_token_comes_though_each_would_complete_a_bad_word(self) -> None:
        words = ((0, 0), (0, 1), (0, 2))
        assert greedy([0.0, 2.0, 1.0], output=(0,), bad_words_token_ids=words) == 1
        assert greedy([0.0, 2.0, 1.0], output=(0,), bad_words_token_ids=(*words[1:], (2, 0))) == 0
        assert greedy([0.0, 2.0, 1.0], output=(0,), bad_words_token_ids=words[1:], allowed_token_ids=(1, 2)) == 1

    def test_words_that_are_the_whole_vocabulary_fail_their_row(self) -> None:
        assert "all the tokens" in str(one([0.0, 1.0], bad_words_token_ids=((0,), (1,))).error)
        with pytest.raises(InvalidRequest, match="all that allowed_token_ids allows"):
            SamplingParams(allowed_token_ids=(1, 2), bad_words_token_ids=((1,), (2,)))
