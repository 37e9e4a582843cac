"""Settings: typos stop the start, and the shipped file is valid."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from deployments.settings.app import AppArgs

ROOT = Path(__file__).parents[2]


def _args(**changes: Any) -> AppArgs:
    return AppArgs.model_validate({"model": str(ROOT / "demo"), "model_id": "demo"} | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modle": "x"}, "modle"),
        ({"engine": {"max_num_seq": 4}}, "max_num_seq"),
        ({"engine": {"max_num_seqs": "4"}}, "max_num_seqs"),
        ({"engine": {"max_num_seqs": 0}}, "max_num_seqs=0"),
        ({"engine": {"dtype": "float64"}}, "dtype"),
        ({"engine": {"model": "x"}}, "model"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"model_id": "../x"}, "model_id"),
        ({"adapters": {"sources": [{"kind": "ftp", "path": "x"}]}}, "kind"),
        ({"adapters": {"sources": [{"kind": "file"}]}}, "path"),
        ({"adapters": {"sources": [{"kind": "s3", "bucket": "abc", "secret": "x"}]}}, "secret"),
        ({"adapters": {"sources": [{"kind": "file", "path": "a"}, {"kind": "file", "path": "b"}]}}, "local"),
        ({"adapters": {"sources": [{"kind": "file", "path": "a", "name": "catalog"}]}}, "catalog"),
        (
            {"adapters": {"sources": [{"kind": "s3", "bucket": "abc", "access_key_id_env": "A"}]}},
            "secret_access_key_env",
        ),
        ({"adapters": {"sources": [{"kind": "s3", "bucket": "abc", "session_token_env": "T"}]}}, "session_token_env"),
        ({"adapters": {"sources": [{"kind": "http", "base_url": "ftp://h/x"}]}}, "base_url"),
        ({"adapters": {"sources": [{"kind": "http", "base_url": "https://h/x?a=b"}]}}, "base_url"),
        ({"adapters": {"sources": [{"kind": "hub", "token_env": "hf_abc-def"}]}}, "NAME of an environment variable"),
        ({"adapters": {"pinned": ["../x"]}}, "../x"),
        ({"adapters": {"pinned": ["x"], "allowed": ["y*"]}}, "pinned: the patterns of `allowed` leave out 'x'"),
        ({"adapters": {"niceness": 20}}, "niceness"),
        ({"adapters": {"warm_bytes": -1}}, "warm_bytes"),
        ({"admin_keys_env": "sk-abc"}, "admin_keys_env"),
        ({"api_keys_env": "sk-abc"}, "api_keys_env"),
        ({"limits": {"max_body_bytes": -1}}, "max_body_bytes"),
    ],
)
def test_a_setting_that_cannot_work_is_named(changes: dict[str, Any], named: str):
    with pytest.raises(ValidationError, match=named.replace(".", r"\.")):
        _args(**changes)


@pytest.mark.parametrize(
    ("folder", "model_id"),
    [
        ("SmolLM2-135M", "SmolLM2-135M"),
        ("my model (v2)", "my-model-v2-"),
        ("..", None),
        ("_x", "x"),
        ("\u00fc", "base"),
    ],
)
def test_a_model_without_a_name_is_called_like_its_folder(tmp_path: Path, folder: str, model_id: str | None):
    (tmp_path / folder).mkdir(exist_ok=True)
    args = AppArgs.model_validate({"model": str(tmp_path / folder)})
    assert args.model_id == (model_id or tmp_path.parent.name)
    assert _args(model=str(tmp_path / folder)).model_id == "demo"


def test_relative_paths_are_resolved_when_the_application_is_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    args = _args(model="demo", adapters={"sources": [{"kind": "file", "path": "demo/adapters"}], "disk_path": "cache"})
    assert args.model == str(ROOT / "demo")
    assert args.adapters.disk_path == str(ROOT / "cache")
    assert args.adapters.sources[0].path == str(ROOT / "demo" / "adapters")  # type: ignore[union-attr]


def test_settings_travel_between_processes():
    args = _args(engine={"max_num_seqs": 4}, adapters={"sources": [{"kind": "s3", "bucket": "abc"}]})
    assert pickle.loads(pickle.dumps(args)) == args
    assert args.engine_config().max_num_seqs == 4


def test_a_new_replica_warms_half_of_what_its_device_keeps_unless_it_is_told_otherwise():
    assert _args().warm_bytes(1000) == 500
    assert _args(adapters={"warm_bytes": 0}).warm_bytes(1000) == 0


def test_the_shipped_config_is_valid_for_serve_and_for_us(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve_config.yaml").read_text()))
    (application,) = config.applications
    args = AppArgs.model_validate(application.args)
    assert application.import_path == "deployments.app:build"
    assert args.num_replicas == 2
    assert args.num_replicas * args.replica_num_cpus + args.num_routers * args.router_num_cpus <= 2
    assert config.http_options.host == "127.0.0.1"
    assert config.http_options.request_timeout_s is None
