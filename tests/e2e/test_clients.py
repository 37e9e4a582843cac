"""Programs of the package index, unmodified, each from an environment of its own, against a server of the demo.

`make test-slow` makes the environments (`make clients` does so alone). What is not installed fails: nothing is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import KEY, ROOT, Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HERE = Path(__file__).parent / "clients"
SAID = "HELLO WORLD"


def _run(name: str, command: list[str], tmp_path: Path, seconds: int = 240) -> str:
    python = ROOT / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python.relative_to(ROOT)} is missing; `make clients` makes it")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "OMP_", "MKL_"))}
    environment |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    environment |= {"OPENAI_API_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(python), *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return done.stdout


def _told(name: str, server: Server, tmp_path: Path) -> dict[str, Any]:
    script = HERE / f"{name.replace('-', '_')}_program.py"
    told: dict[str, Any] = json.loads(_run(name, [str(script), server.url, KEY], tmp_path).splitlines()[-1])
    return told


def test_litellm(server: Server, tmp_path: Path) -> None:
    told = _told("litellm", server, tmp_path)
    assert (told["whole"], told["streamed"]) == (SAID, SAID)
    assert told["formed"]["word"] in ("left", "right")
    assert told["vectors"] == [128, 128]


def test_langchain(server: Server, tmp_path: Path) -> None:
    told = _told("langchain", server, tmp_path)
    assert (told["whole"], told["streamed"], told["text"]) == (SAID, SAID, SAID)
    assert told["formed"]["word"] in ("left", "right")
    assert told["vectors"] == [128, 128]


def test_llama_index(server: Server, tmp_path: Path) -> None:
    told = _told("llama-index", server, tmp_path)
    assert (told["whole"], told["streamed"], told["text"]) == (SAID, SAID, SAID)


def test_instructor(server: Server, tmp_path: Path) -> None:
    towns = _told("instructor", server, tmp_path)["towns"]
    assert len(towns) == 2
    assert all(town["city"] in ("Rome", "Oslo") for town in towns)


def test_guidellm(server: Server, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        "-m", "guidellm", "run", "--disable-console",
        "--backend", f"kind=openai_http,target={server.url},model=upper,api_key={KEY}",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=16",
        "--tokenizer", f"kind=hf_auto,model={ROOT / 'demo' / 'base'}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16", "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    _run("guidellm", command, tmp_path)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    done = benchmark["requests"]
    assert (len(done["successful"]), len(done["errored"])) == (16, 0)


def test_lm_eval_gives_the_scores_of_its_own_backend(server: Server, tmp_path: Path) -> None:
    base = str(ROOT / "demo" / "base")
    where = f"base_url={server.url}/v1/completions"
    ours = f"model=demo,{where},tokenizer={base},tokenizer_backend=huggingface,num_concurrent=4,add_bos_token=True"
    theirs = f"pretrained={base},dtype=float32"
    scores = {}
    for name, model, arguments in (("ours", "local-completions", ours), ("theirs", "hf", theirs)):
        folder = tmp_path / name
        command = [
            "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "chorus_choice,chorus_repeat",
            "--include_path", str(HERE / "lm_eval_tasks"), "--output_path", str(folder), "--batch_size", "1",
        ]  # fmt: skip
        _run("lm-eval", command + (["--device", "cpu"] if model == "hf" else []), tmp_path, seconds=400)
        (written,) = folder.rglob("results*.json")
        results = json.loads(written.read_text())["results"]
        scores[name] = {
            task: {
                metric: value for metric, value in told.items() if isinstance(value, float) and "stderr" not in metric
            }
            for task, told in results.items()
        }
    assert scores["ours"] == scores["theirs"]
    assert set(scores["ours"]) == {"chorus_choice", "chorus_repeat"}
    assert scores["ours"]["chorus_repeat"]["exact_match,none"] > 0.5
