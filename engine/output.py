"""What a commit reports becomes what the caller reads: text deltas, stop strings, one terminal delta per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.request import FinishReason, OutputDelta, Request
from engine.text.detokenizer import Detokenizer, DetokenizerFactory
from engine.text.stop import StopMatcher

if TYPE_CHECKING:
    from engine.core.sequence import SequenceUpdate
    from engine.text.tokenizer import Tokenizer

SampleKey = tuple[str, int]  # (request id, sample index)


class OutputProcessor:
    """Turns `SequenceUpdate`s into `OutputDelta`s. Not thread-safe: one thread owns it.

    - The text is what the tokens say behind the prompt: prompt and text together read as all tokens at once.
    - Text of the first `min_tokens` tokens takes no part in stop strings: none may begin or end in it.
    - Special tokens have no text, but a stop string that spells one ends the text there (see `engine.text.stop`).
    - The token that completes a stop string is the last one delivered; what the model produced beyond it is dropped.
    - A stop token (end-of-sequence or `stop_token_ids`) is delivered as a token; its text is shown only with
      `include_stop_str_in_output` (and never if it is a special token).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizers = DetokenizerFactory(tokenizer)
        self._samples: dict[SampleKey, _Sample] = {}
        self._finishes: list[SampleKey] = []

    def open(self, request: Request) -> OutputDelta | None:
        """Expect updates of all samples of a request.

        `resumed_output_token_ids` are replayed without being delivered again, so that text and stop strings go on where
        they were cut. Returns the terminal delta if they hold a stop string already.
        """
        for index in range(request.sample_index, request.sample_index + request.params.n):
            self._samples[(request.request_id, index)] = _Sample(request, self._detokenizers)
        if not request.resumed_output_token_ids:
            return None
        key = (request.request_id, request.sample_index)
        self._samples[key].read(request.resumed_output_token_ids, None)
        if self._samples[key].matcher.matched is None:
            return None
        self._finishes.append(key)
        return OutputDelta(
            request_id=request.request_id,
            sample_index=request.sample_index,
            finish_reason=FinishReason.STOP,
            stop_reason=self._samples[key].matcher.matched,
        )

    def process(self, update: SequenceUpdate) -> OutputDelta | None:
        """The delta of one update; None when there is nothing to deliver (any more)."""
        key = (update.request_id, update.sample_index)
        sample = self._samples.get(key)
        if sample is None:
            return None
        if update.finish_reason is not None:
            del self._samples[key]
        if sample.matcher.matched is not None:
            return None  # its terminal delta is out; the scheduler hears of it a step later
        if not update.token_ids and update.finish_reason is None:
            return None
        text, num_read = sample.read(update.token_ids, update.finish_reason)
        logprobs = update.logprobs[:num_read] if update.logprobs is not None else None
        stopped = sample.matcher.matched is not None
        if stopped and update.finish_reason is None:
            self._finishes.append(key)
        return OutputDelta(
            update.request_id,
            update.sample_index,
            update.token_ids[:num_read],
            text,
            logprobs,
            FinishReason.STOP if stopped else update.finish_reason,
            sample.matcher.matched if stopped else update.stop_reason,
            None if stopped else update.error,
            update.num_cached_tokens,
            update.queue_s,
            update.vector,
        )

    def take_finishes(self) -> tuple[SampleKey, ...]:
        """Samples ended by a stop string since the last call: the scheduler must be told to finish them."""
        finishes, self._finishes = tuple(self._finishes), []
        return finishes

    def drop(self, request: Request) -> None:
        """Forget a request whose caller went away."""
        for index in range(request.sample_index, request.sample_index + request.params.n):
            self._samples.pop((request.request_id, index), None)


class _Sample:
    """Progress of one sample's text."""

    __slots__ = ("detokenizer", "include_stop", "matcher", "min_tokens", "num_tokens")

    def __init__(self, request: Request, detokenizers: DetokenizerFactory) -> None:
        params = request.params
        skip = params.skip_special_tokens
        self.detokenizer: Detokenizer = detokenizers.new(request.prompt_token_ids, skip_special_tokens=skip)
        hidden = detokenizers.special_texts if skip else ()
        self.matcher = StopMatcher(params.stop, params.include_stop_str_in_output, hidden)
        self.include_stop = params.include_stop_str_in_output
        self.min_tokens = params.min_tokens
        self.num_tokens = 0

    def read(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> tuple[str, int]:
        """Take in tokens; with a finish reason nothing is held back any longer.

        Returns the text to show and how many of the tokens were read: a stop string ends the reading.
        """
        if finish_reason is None and len(token_ids) == 1:  # nearly always
            self.num_tokens += 1
            return self._take(token_ids[0]), 1
        shown: list[str] = []
        for num_read, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            is_stop_token = finish_reason is FinishReason.STOP and num_read == len(token_ids)
            shown.append(self._take(token_id, is_silent=is_stop_token and not self.include_stop))
            if self.matcher.matched is not None:
                return "".join(shown), num_read
        if finish_reason is not None:
            shown.append(self._show(self.detokenizer.finish()))
            shown.append(self.matcher.finish())
        return "".join(shown), len(token_ids)

    def _take(self, token_id: int, *, is_silent: bool = False) -> str:
        shown = "" if is_silent else self._show(self.detokenizer.push(token_id))
        if self.matcher.sees_hidden and self.num_tokens > self.min_tokens:
            shown += self.matcher.push_hidden(self.detokenizer.hidden_text(token_id))
        return shown

    def _show(self, text: str) -> str:
        return text if self.num_tokens <= self.min_tokens else self.matcher.push(text)


def merge(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Deltas of one sample, in order, as one. At least one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    logprobs = tuple(item for delta in deltas for item in delta.logprobs or ())
    return OutputDelta(
        request_id=last.request_id,
        sample_index=last.sample_index,
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        logprobs=logprobs if any(delta.logprobs is not None for delta in deltas) else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
        num_cached_tokens=max(delta.num_cached_tokens for delta in deltas),
        queue_s=max(delta.queue_s for delta in deltas),
        vector=last.vector,
    )
