"""The benchmarks run, and print what they measured with where it was measured. What they measure is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapter_store.store import AdapterStore
from tests.support.native import native_or_skip
from tests.support.web_server import Answer, Ask, web_server

ROOT = Path(__file__).parents[1]
SMALL = ["--requests", "2", "--prompt-tokens", "4", "--new-tokens", "4", "--num-adapters", "2"]


def run(module: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines that a benchmark prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_two_programs_are_asked_in_turns_and_their_ratios_told() -> None:
    program = " ".join([sys.executable, "-m", "benchmarks.throughput", *SMALL])
    rows = run("compare", "--pairs", "2", "--ours", program, "--peer", f"{program} --cases base,mixed_adapters")
    assert [row["case"] for row in rows] == ["base", "mixed_adapters"]  # those that both know
    for row in rows:
        assert row["ratios"] == [pytest.approx(a / b, rel=0.2) for a, b in zip(row["ours"], row["peer"], strict=True)]
        assert {"cpu", "torch", "commit"} <= set(row["provenance"])


def test_a_server_is_measured_beside_a_peer_with_the_cpu_of_its_processes() -> None:
    events = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'

    def answer(ask: Ask) -> Answer:
        return Answer(200, {"Content-Type": "text/event-stream"}, events)

    with web_server(answer) as ours, web_server(answer) as peer:
        rows = run("serving", "--url", ours.address, "--peer", peer.address, "--peer-name", "other", "--rounds", "2",
                   "--requests", "6", "--new-tokens", "3", "--cases", "closed:2:stream,poisson:500:whole")  # fmt: skip
    assert [(row["case"], row.get("server", row.get("peer"))) for row in rows] == [
        (case, who) for case in ("closed:2:stream", "poisson:500:whole") for who in ("chorus", "other", "other")
    ]
    assert len(ours.asked) == len(peer.asked) == 16 + 2 * 2 * 6
    ratio = rows[0]["tokens_per_s"]["median"] / rows[1]["tokens_per_s"]["median"]
    assert rows[2]["ratios"]["tokens_per_s"] == pytest.approx(ratio, rel=0.9)
    assert any(key.startswith("cpu_us_per_token_") for key in rows[0])


def test_a_server_that_answers_less_than_was_asked_for_is_not_measured() -> None:
    with web_server(lambda _: Answer(200, {}, b'{"usage": {"completion_tokens": 2}}')) as server:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.serving", "--url", server.address, "--requests", "1",
             "--new-tokens", "3", "--cases", "closed:1:whole"],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode != 0
    assert "16 of 16 requests failed; the first: no 3 tokens" in done.stderr


def test_the_host_s_share_of_a_step_is_measured_without_a_model() -> None:
    (row,) = run("overhead", "--sequences", "4", "--steps", "40")
    assert row["step_ms"] > 0
    assert row["config"]["sequences"] == 4


def test_the_cost_of_a_large_body_is_measured_beside_an_idle_loop() -> None:
    idle, ids = run("bodies", "--rounds", "1", "--cases", "idle;2,000,000 token ids")
    assert (idle["status"], ids["status"]) == (0, 400)
    assert all(row["loop_ms"] > 0 and row["thread_ms"] > 0 for row in (idle, ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "num_rows"),
    [
        ("throughput", ["--rounds", "1"], 3),
        ("lora_cost", ["--rounds", "1", "--counts", "1,2", "--registered", "20"], 3),
        ("lessons", ["--rounds", "1"], 4),
    ],
)
def test_every_case_has_its_line(module: str, arguments: list[str], num_rows: int) -> None:
    rows = run(module, *SMALL, *arguments)
    assert len(rows) == num_rows
    assert all(row["provenance"]["cores"] for row in rows)


def test_models_of_real_shapes_are_made_on_the_spot(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "benchmarks.make_model", str(tmp_path), "--shape", "tiny", "--adapters", "2"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["adapter-0000", "adapter-0001"]
    assert (tmp_path / "base" / "tokenizer.json").exists()


@pytest.mark.slow
def test_adapters_in_eight_bits_are_set_against_those_in_sixteen() -> None:
    rows = run("quantized.adapter_dtypes", "--parts", "images,answers", "--count", "3", "--dtypes", "float32")
    *images, answers = rows
    assert len(images) == 9
    for row in images:
        assert row["int8"]["bytes"] < 0.53 * row["bfloat16"]["bytes"]
        assert row["int8"]["max_error"] < 0.02
    assert set(answers["all"]) == {"auto", "int8"}


@pytest.mark.slow
def test_the_sampler_and_the_start_are_measured() -> None:
    rows = run("sampler", "--rows", "2", "--vocab", "300", "--steps", "3") + run("start", "--rounds", "1")
    assert [row["case"] for row in rows][-2:] == ["5 logprobs", "start"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--quantization", "int8", "--quantize-lm-head")])
def test_steps_of_one_device_are_set_against_their_floors(options: tuple[str, ...]) -> None:
    """On the CPU with a tiny shape: the program for GPUs, as far as it goes without one."""
    sizes = {"batches": "1,4", "contexts": "40", "adapters": "3", "steps": "4", "rounds": "1", "prefill-sequences": "2",
             "prefill-tokens": "32", "product-size": "256", "copy-mib": "4"}  # fmt: skip
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    rows = run("device_step", "--shape", "tiny", "--device", "cpu", *arguments, *options)
    assert [row["case"].split(",")[0] for row in rows] == [
        "rates", *["decode 1 x 40"] * 4, *["decode 4 x 40"] * 4, "prefill of 2 x 32"
    ]  # fmt: skip
    assert all(row["floor_ms"] > 0 for row in rows if row["case"].endswith("base"))


def test_every_byte_of_an_adapter_is_read_once_however_many_ask_for_it_at_once() -> None:
    for row in run("adapters", "singleflight", "--requests", "40"):
        assert row["times_read"] == 1


def test_the_store_s_tiers_are_measured_beside_plain_lru() -> None:
    sizes = ["--adapters", "50", "--requests", "120", "--host-adapters", "8", "--disk-adapters", "16"]
    rows = run("adapters", "traffic", *sizes)
    assert [row["case"] for row in rows] == ["zipf 0.8", "zipf 1.0", "scan"]
    for row in rows:
        for policy in ("", "lru_"):
            shares = [row[f"{policy}{figure}"] for figure in ("host_hit_rate", "disk_hit_rate", "source_rate")]
            assert sum(shares) == pytest.approx(1, abs=0.001), "every request found its adapter in exactly one place"


@pytest.mark.slow
def test_the_first_token_is_timed_for_every_place_an_adapter_can_be_in() -> None:
    """It ends with an error when adapters came from elsewhere than the figures would say."""
    rows = run("adapters", "ttft", "--samples", "3")
    assert {"host", "host_first_mapped", "folder", "bucket"} <= {row["place"] for row in rows}


@pytest.mark.slow
@pytest.mark.ray
def test_steps_beside_a_load_are_told_from_those_without() -> None:
    sizes = {"streams": "2", "cold-adapters": "4", "steps": "10", "prompt-tokens": "4", "kv-mib": "64"}
    (row,) = run("adapters", "interference", *[part for name, value in sizes.items() for part in (f"--{name}", value)])
    assert row["loads"] >= 4
    assert min(row["steps"].values()) > 0
    assert row["steps"]["own"] == row["loads"]


@pytest.mark.slow
def test_few_and_many_registered_names_are_looked_up_by_turns() -> None:
    if not hasattr(AdapterStore, "register"):
        pytest.skip("this store registers no names")
    rows = run("adapters", "lookup", "--names", "10,100", "--lookups", "20", "--rounds", "2")
    assert [row["names"] for row in rows] == [10, 100]


@pytest.mark.slow
def test_quantized_layers_are_timed_beside_bfloat16_ones() -> None:
    native_or_skip()
    rows = run("quantized.kernels", "--layers", "o", "--rows", "1,16", "--kinds", "int4,nf4,torch-int4", "--pairs", "1")
    assert [(row["rows"], row["kind"]) for row in rows] == [
        (count, kind) for count in (1, 16) for kind in ("int4", "nf4", "torch-int4")
    ]
    assert all(row["speedup"] > 0 for row in rows)
