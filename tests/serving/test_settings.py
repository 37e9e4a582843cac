"""Settings: typos stop the start, and the shipped file is valid."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from deployments.settings import AppArgs

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
        ({"api_keys_env": "sk-abc"}, "api_keys_env"),
        ({"limits": {"max_body_bytes": -1}}, "max_body_bytes"),
    ],
)
def test_a_setting_that_cannot_work_is_named(changes: dict[str, Any], named: str):
    with pytest.raises(ValidationError, match=named.replace(".", r"\.")):
        _args(**changes)


def test_relative_paths_are_resolved_when_the_application_is_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    args = _args(model="demo", adapters={"sources": [{"kind": "file", "path": "demo/adapters"}]})
    assert args.model == str(ROOT / "demo")
    assert args.adapters.sources[0].path == str(ROOT / "demo" / "adapters")  # type: ignore[union-attr]


def test_settings_travel_between_processes():
    args = _args(engine={"max_num_seqs": 4}, adapters={"sources": [{"kind": "s3", "bucket": "abc"}]})
    assert pickle.loads(pickle.dumps(args)) == args
    assert args.engine_config().max_num_seqs == 4


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
