"""What people point at as a base model is served, or refused in one message that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.assembly import load_parts
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError
from engine.model.loader import load_model
from engine.model_folder import locate
from tests.support.tiny_model import make_base

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5000000000\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture
def base(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "base"))


def hub_cache(base: Path, place: Path, revision: str = "a1b2", main: bool = True) -> Path:
    """As huggingface_hub lays a model out: files in blobs, links to them in the snapshot."""
    root = place / "models--org--name"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "snapshots" / revision).mkdir(parents=True)
    for index, file in enumerate(sorted(base.iterdir())):
        blob = root / "blobs" / f"{revision}{index:04d}"
        shutil.copyfile(file, blob)
        (root / "snapshots" / revision / file.name).symlink_to(Path("../../blobs") / blob.name)
    if main:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(revision)
    return root


def linked(base: Path, place: Path) -> Path:
    (place / "link").symlink_to(base)
    return place / "link"


def sharded(base: Path) -> list[str]:
    """Cut a checkpoint into shards with an index. Returns: their names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="40KB")
    shards = sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values()))
    assert len(shards) > 2
    return shards


def training_run(base: Path, place: Path) -> Path:
    run = place / "run"
    for step in (500, 1500):
        shutil.copytree(base, run / f"checkpoint-{step}")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
            (run / f"checkpoint-{step}" / name).write_bytes(b"{}")
    (run / "trainer_state.json").write_text("{}")
    return run


def renamed(name: str) -> Callable[[Path, Path], Path]:
    return lambda base, place: base.rename(place / name)


SERVED: dict[str, Callable[[Path, Path], Path | str]] = {
    "a snapshot of the hub's cache": lambda base, place: hub_cache(base, place) / "snapshots" / "a1b2",
    "the hub's cache folder of a model": hub_cache,
    "such a folder without refs": lambda base, place: hub_cache(base, place, main=False),
    "such a folder with two snapshots": lambda base, place: (
        hub_cache(base, place, "older", main=False),
        hub_cache(base, place, "newer"),
    )[1],
    "a link to the folder": linked,
    "a checkpoint of a training run": lambda base, place: training_run(base, place) / "checkpoint-1500",
    "a name with spaces": renamed("my model, final (2)"),
    "a name with signs": renamed("model=v1@2026%20#x"),
    "a name in other letters": renamed("模型-größe-🎵"),
    "a trailing slash": lambda base, _: f"{base}/",
    "dots in the path": lambda base, _: f"{base}/../{base.name}/.",
    "a folder with shards": lambda base, _: (sharded(base), base)[1],
    "a folder with pickled weights too": lambda base, _: ((base / "pytorch_model.bin").write_bytes(b"x"), base)[1],
    "a folder with GGUF files too": lambda base, _: ((base / "model-Q4_K_M.gguf").write_bytes(b"GGUF"), base)[1],
}


@pytest.mark.parametrize("case", SERVED)
def test_what_people_point_at_is_served(case: str, base: Path, tmp_path: Path) -> None:
    given = SERVED[case](base, tmp_path)
    assert load_parts(EngineConfig(model=str(given), num_threads=1, max_model_len=32)).vocab_size == 259


def test_relative_paths_and_the_home_folder_are_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    monkeypatch.setenv("HOME", str(base.parent))
    texts = []
    for given in ("base", "./base", "~/base", base):
        llm = LLM(given, num_threads=1, max_model_len=32)
        texts.append(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, temperature=0.0))[0].token_ids)
    assert len(set(texts)) == 1


def dangling(base: Path, place: Path) -> Path:
    root = hub_cache(base, place)
    for blob in (root / "blobs").iterdir():
        if blob.stat().st_size > 50_000:
            blob.unlink()
    return root


def with_file(name: str, content: str | bytes) -> Callable[[Path, Path], Path]:
    def change(base: Path, _: Path) -> Path:
        (base / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return base

    return change


def only(*names: str) -> Callable[[Path, Path], Path]:
    """A folder with files of these names, and config.json if it is among them."""

    def make(base: Path, place: Path) -> Path:
        folder = place / "only"
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((base / "config.json").read_bytes() if name.endswith("config.json") else b"{}")
        return folder

    return make


def without_shard(base: Path, _: Path) -> Path:
    (base / sharded(base)[1]).unlink()
    return base


def without_index(base: Path, _: Path) -> Path:
    sharded(base)
    (base / INDEX).unlink()
    return base


def misnamed_index(base: Path, _: Path) -> Path:
    sharded(base)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] = {name: f"renamed-{file}" for name, file in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    return base


def broken_index(base: Path, _: Path) -> Path:
    sharded(base)
    (base / INDEX).write_text("{")
    return base


def lost_tensors(base: Path, _: Path) -> Path:
    """The index knows nothing of one shard: all files that it names are there, and yet a part of the model is not."""
    lost = sharded(base)[1]
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != lost}
    (base / INDEX).write_text(json.dumps(index))
    return base


def two_snapshots(base: Path, place: Path) -> Path:
    hub_cache(base, place, "older", main=False)
    return hub_cache(base, place, "newer", main=False)


ADAPTER = json.dumps({"base_model_name_or_path": "org/the-base", "peft_type": "LORA"})
# what is given -> what the message must say: what is there, and what to do
REFUSED: dict[str, tuple[Callable[[Path, Path], Path | str], str]] = {
    "a name of the hub": (lambda *_: "meta-llama/Llama-3.1-8B", "hf download meta-llama/Llama-3.1-8B --local-dir"),
    "no such folder": (lambda _, place: place / "nowhere" / "at" / "all", "no folder of that name.*give its path"),
    "a broken link": (lambda _, place: linked(place / "gone", place), "is a link to .*gone.*mend the link"),
    "a weight file": (lambda base, _: base / "model.safetensors", "not a folder.*give the folder that it is in"),
    "a GGUF file": (lambda base, place: only("m.gguf")(base, place) / "m.gguf", "a GGUF file.*folder with safetensors"),
    "weights as a Git LFS pointer": (with_file("model.safetensors", POINTER), r"model\.safetensors is a Git LFS"),
    "a tokenizer as a Git LFS pointer": (with_file("tokenizer.json", POINTER), r"tokenizer\.json is a .*git lfs pull"),
    "an adapter": (with_file("adapter_config.json", ADAPTER), "is an adapter.*base model.*'org/the-base'"),
    "an adapter of a broken config": (with_file("adapter_config.json", "{"), "is an adapter.*give its base model"),
    "a training run": (training_run, "output of a training run.*2 checkpoints.*checkpoint-1500"),
    "pickled weights": (only("config.json", "pytorch_model.bin"), r"pytorch_model\.bin.*not read.*save_pretrained"),
    "pickled shards": (only("config.json", "pytorch_model-00001-of-00002.bin"), r"pickled weights.*save_pretrained"),
    "a folder of GGUF files": (only("model-Q4_K_M.gguf", "README.md"), r"\(model-Q4_K_M\.gguf\).*in safetensors"),
    "GGUF beside a config": (only("config.json", "m.gguf"), r"a GGUF file \(m\.gguf\).*safetensors"),
    "Meta's own format": (only("consolidated.00.pth", "params.json"), "Meta's own format.*transformers' format"),
    "Mistral's own format": (only("consolidated.safetensors", "params.json"), "Mistral's own names.*transformers'"),
    "params alone": (only("params.json"), r"params\.json.*transformers' format"),
    "TensorFlow weights": (only("config.json", "tf_model.h5"), "TensorFlow weights.*safetensors"),
    "no weights": (only("config.json"), r"no \*\.safetensors.*download the weights"),
    "weights by another name": (only("config.json", "weights.safetensors"), r"weights\.safetensors.*rename"),
    "a missing shard": (without_shard, "lacks model-00002-of.*1 are missing.*finish the copy"),
    "a missing index": (without_index, f"model-00001-of.*no {INDEX}.*copy it too"),
    "an index of other names": (misnamed_index, "lacks renamed-model-00001-of"),
    "an index that is no JSON": (broken_index, f"{INDEX} has no weight_map"),
    "an index without a shard": (lost_tensors, r"lacks the weights of \d+ parameters, first "),
    "a folder above": (only("x/config.json", "y/config.json"), "has such folders inside: give .*x"),
    "an empty folder": (only(), r"config\.json, \*\.safetensors, tokenizer\.json"),
    "links without their files": (dangling, r"model\.safetensors is a link to a file that is not there.*download"),
    "two snapshots and no main": (two_snapshots, "2 snapshots .newer, older.*give the path of one"),
    "no name at all": (lambda *_: "", "model="),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_remedy(case: str, base: Path, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    given = make(base, tmp_path)
    with pytest.raises(EngineError, match=message) as caught:
        load_model(EngineConfig(model=str(given), num_threads=1))
    assert "\n" not in str(caught.value)


def test_a_name_of_the_hub_that_is_in_the_cache_is_told_where(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    hub_cache(base, tmp_path / ".cache/huggingface/hub")
    with pytest.raises(ConfigError, match=r"give '.*models--org--name'"):
        locate("org/name")
