"""The offline front end: prompts in, outputs back, clear words when something is asked that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engine.engine
from engine import LLM, FinishReason, SamplingParams
from engine.errors import AdapterError, ConfigError, EngineDead, InvalidRequest, PromptTooLong
from engine.output import OutputProcessor
from engine.text.tokenizer import Tokenizer
from tests.engine_api.alphabet import AlphabetRunner, make_parts
from tests.support.tiny_model import make_adapter, make_base, make_tokenizer, reference_generate

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


@pytest.fixture
def runner() -> AlphabetRunner:
    return AlphabetRunner()


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch, runner: AlphabetRunner) -> LLM:
    """After each letter it says the next."""
    monkeypatch.setattr(engine.engine, "load_parts", lambda config, neighbours: make_parts(runner))
    return LLM("alphabet", max_num_seqs=4, block_size=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A real model and an adapter of it."""
    root = tmp_path_factory.mktemp("tiny")
    base = make_base("llama", root / "base")
    return base, make_adapter(base, root / "adapter", seed=1)


# ---- what comes back


def test_outputs_come_in_the_order_of_the_prompts_whatever_their_lengths(llm: LLM) -> None:
    prompts = [chr(ord("a") + i) * (1 + i % 5) for i in range(20)]
    params = [SamplingParams(max_tokens=1 + (i * 7) % 9, temperature=0.0) for i in range(20)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.token_ids) for output in outputs] == [p.max_tokens for p in params]
    assert all(output.text.startswith(chr(ord("a") + i + 1)) for i, output in enumerate(outputs))


def test_text_and_token_ids_may_be_mixed_as_prompts(llm: LLM) -> None:
    text, ids = llm.generate(["abc", [97, 98, 99]], GREEDY)
    assert text.text == ids.text == "defg"
    assert (text.prompt, ids.prompt) == ("abc", None)
    assert text.prompt_token_ids == ids.prompt_token_ids == (97, 98, 99)


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99]])
def test_one_prompt_needs_no_list(llm: LLM, prompt: Any) -> None:
    assert [output.text for output in llm.generate(prompt, GREEDY)] == ["defg"]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_every_sample_is_there_and_the_short_properties_speak_of_the_first(llm: LLM) -> None:
    output = llm.generate("a", SamplingParams(max_tokens=3, temperature=0.0, n=3))[0]
    assert [sample.text for sample in output.samples] == ["bcd"] * 3
    first = output.samples[0]
    assert (output.text, output.token_ids, output.finish_reason) == (first.text, first.token_ids, first.finish_reason)


def test_a_stop_string_ends_the_text_and_is_named(llm: LLM) -> None:
    output = llm.generate("a", SamplingParams(max_tokens=50, temperature=0.0, stop=("ef",)))[0]
    assert (output.text, output.finish_reason, output.samples[0].stop_reason) == ("bcd", FinishReason.STOP, "ef")
    assert llm.stats().running == 0


def test_more_prompts_than_the_queue_holds_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.engine, "load_parts", lambda config, neighbours: make_parts(AlphabetRunner()))
    outputs = LLM("alphabet", max_num_seqs=2, max_queued_requests=2).generate(["a"] * 9, GREEDY)
    assert [output.text for output in outputs] == ["bcde"] * 9


def test_metrics_tell_where_the_time_went(llm: LLM) -> None:
    llm.generate("abcdefgh" * 2, GREEDY)
    metrics = llm.generate("abcdefgh" * 2, GREEDY)[0].metrics
    assert (metrics.num_prompt_tokens, metrics.num_output_tokens, metrics.num_cached_tokens) == (16, 4, 12)
    assert 0 <= metrics.queue_s <= metrics.ttft_s


def test_what_fails_while_it_runs_is_an_output_and_the_others_go_on(llm: LLM, runner: AlphabetRunner) -> None:
    runner.poison = ord("y")
    good, bad = llm.generate(["a", "w"], GREEDY)
    assert (good.text, good.error) == ("bcde", None)
    assert (bad.text, bad.finish_reason) == ("xy", FinishReason.ERROR)
    assert bad.error is not None
    assert bad.error.code == "request_failed"


def test_an_interrupt_between_steps_leaves_nothing_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(OutputProcessor, "process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], SamplingParams(max_tokens=50, temperature=0.0))
    assert llm.generate("a", GREEDY)[0].text == "bcde"
    assert (llm.stats().running, llm.stats().total_requests) == (0, 3)


def test_what_an_interrupt_left_in_the_queue_takes_no_room_from_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.engine, "load_parts", lambda config, neighbours: make_parts(AlphabetRunner()))
    llm = LLM("alphabet", max_num_seqs=1, block_size=4, max_queued_requests=2)
    with monkeypatch.context() as patch:
        patch.setattr(OutputProcessor, "process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY)
    assert [output.text for output in llm.generate(["a", "b", "c"], GREEDY)] == ["bcde", "cdef", "defg"]


def test_an_interrupt_within_a_step_is_the_end_of_the_engine(llm: LLM, runner: AlphabetRunner) -> None:
    runner.fails_with = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", GREEDY)
    runner.fails_with = None
    with pytest.raises(EngineDead, match="interrupted"):
        llm.generate("a", GREEDY)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_conversation_is_written_with_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_tokenizer = make_tokenizer()
    hf_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    parts = make_parts(AlphabetRunner())
    object.__setattr__(parts, "tokenizer", Tokenizer(hf_tokenizer))
    monkeypatch.setattr(engine.engine, "load_parts", lambda config, neighbours: parts)
    chats = [[{"role": "user", "content": "a"}], [{"role": "system", "content": "x"}, {"role": "user", "content": "c"}]]
    llm = LLM("alphabet")
    assert [output.text for output in llm.chat(chats, GREEDY)] == ["bcde", "defg"]
    assert llm.chat(chats[0], GREEDY)[0].text == "bcde"


# ---- what is refused


def test_an_unknown_setting_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(TypeError, match=r"'max_num_seq'.*'max_num_seqs'"):
        LLM("anywhere", max_num_seq=4)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        LLM(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"params": [GREEDY]}, InvalidRequest, "params: 1 values for 2 prompts"),
        ({"params": ["greedy", "greedy"]}, InvalidRequest, "params: 'greedy' is a str"),
        ({"adapters": ["x"]}, InvalidRequest, "adapters: 1 values for 2 prompts"),
        ({"prompts": ["a", ""]}, InvalidRequest, "prompt_token_ids"),
        ({"prompts": ["a", [5, 259]]}, InvalidRequest, "259"),
        ({"prompts": ["a", "a" * 500]}, PromptTooLong, "500"),
    ],
)
def test_invalid_inputs_raise_before_anything_runs(
    llm: LLM, runner: AlphabetRunner, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.generate(**{"prompts": ["a", "b"], **arguments})
    assert runner.plans == []


# ---- adapters of a real model


def test_adapters_are_used_by_name_and_may_come_later(tiny: tuple[Path, Path]) -> None:
    base, folder = tiny
    llm = LLM(base, adapters={"poet": folder}, max_num_seqs=4, num_threads=1)
    llm.add_adapter("bard", folder)
    assert llm.adapters == ("poet", "bard")
    params = SamplingParams(max_tokens=6, temperature=0.0)
    outputs = llm.generate(["hello"] * 3, params, adapters=["poet", None, "bard"])
    assert [output.adapter for output in outputs] == ["poet", None, "bard"]
    for output in outputs:
        expected, _ = reference_generate(base, folder if output.adapter else None, list(b"hello"), 6)
        assert list(output.token_ids) == expected
    # The same files are one version, whatever its names.
    assert len(llm.stats().resident_adapters) == 1


def test_an_unknown_adapter_is_answered_with_the_names_that_are_close(tiny: tuple[Path, Path]) -> None:
    base, folder = tiny
    llm = LLM(base, adapters={"poet": folder, "lawyer": folder}, num_threads=1)
    with pytest.raises(AdapterError, match=r"'poett'; did you mean 'poet'\?"):
        llm.generate("hello", adapters="poett")
    with pytest.raises(AdapterError, match=r"known are: \['lawyer', 'poet'\]"):
        llm.generate("hello", adapters="zzz")


def test_a_folder_that_is_no_adapter_is_named(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"'broken' in .*{tmp_path.name}"):
        LLM(tiny[0], adapters={"broken": tmp_path}, num_threads=1)


def test_sampling_without_a_seed_differs_from_call_to_call_and_with_one_does_not(tiny: tuple[Path, Path]) -> None:
    llm = LLM(tiny[0], max_num_seqs=4, num_threads=1)
    params = SamplingParams(max_tokens=12, temperature=2.0, ignore_eos=True)
    assert len({output.token_ids for output in llm.generate(["hello"] * 3, params)}) == 3
    seeded = SamplingParams(max_tokens=12, temperature=2.0, ignore_eos=True, seed=5)
    assert len({output.token_ids for output in llm.generate(["hello"] * 3, seeded)}) == 1
