"""What the Dockerfiles say would work: each is rehearsed, and what it leaves behind serves."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.dockerfile import Rehearsal, context, instructions
from tests.support.project import ROOT, project_files

DOCKERFILES = sorted((ROOT / "k8s" / "docker").glob("Dockerfile.*"))
# In the image: every package is there, from the image and not from here, and the router's application is made.
SERVES = """
import importlib, importlib.metadata, pathlib, pkgutil, sys
import adapter_store, deployments, engine
for package in (adapter_store, deployments, engine):
    assert sys.prefix in package.__file__, package.__file__
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # A GPU's kernels want a GPU, a program runs when it is imported.
        if not found.name.startswith("engine.triton_kernels") and not found.name.endswith("__main__"):
            importlib.import_module(found.name)
from deployments.http.api import create_api
from deployments.http.auth import ApiKeys
from deployments.settings.app import LimitSettings
from deployments.start import settings
assert settings()
from unittest.mock import MagicMock
app = create_api(MagicMock(), ApiKeys(frozenset()), LimitSettings())
print(app.version, *app.openapi()["paths"])
"""


@pytest.fixture(scope="module", params=DOCKERFILES, ids=lambda path: path.name)
def rehearsal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    return Rehearsal(request.param, ROOT, project_files(), tmp_path_factory.mktemp("image"))


def test_an_image_serves_what_it_was_built_from(rehearsal: Rehearsal) -> None:
    done = rehearsal.run("-c", SERVES)
    assert done.returncode == 0, done.stderr[-3000:]
    version, *paths = done.stdout.split()
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {"/v1/chat/completions", "/generate", "/adapters", "/health"} <= {*paths}


def test_an_image_installs_what_the_project_needs(rehearsal: Rehearsal) -> None:
    stage = rehearsal.last
    written = (stage.root / "tmp" / "requirements.txt").read_text().splitlines()
    assert written == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    installed = [step for step in stage.skipped if step.startswith("pip install")]
    assert any("--requirement /tmp/requirements.txt" in step for step in installed)
    assert "torch" in installed[0], "torch comes first, from the index that the builder names"


def test_what_the_cpu_image_starts_is_in_it(tmp_path: Path) -> None:
    (dockerfile,) = (path for path in DOCKERFILES if path.suffix == ".cpu")
    steps = instructions(dockerfile)
    assert ("CMD", '["python", "-m", "deployments.start", "serve_config.yaml"]') in steps
    copied = {rest for name, rest in steps if name == "COPY"}
    assert {"demo demo", "serve_config.yaml ./"} <= copied
    model = re.search(r"model: (\S+)", (ROOT / "serve_config.yaml").read_text())
    assert model
    sent = context(ROOT, ROOT / ".dockerignore", project_files())
    assert ROOT / model[1] / "config.json" in sent


@pytest.mark.parametrize(
    "name", ["tests/conftest.py", ".git/config", "docs/structure.md", "benchmarks/plot.py", "engine/native/_kernels.so"]
)
def test_the_context_leaves_out_what_no_image_needs(name: str) -> None:
    assert context(ROOT, ROOT / ".dockerignore", [ROOT / name]) == []


@pytest.mark.parametrize("name", ["README.md", "pyproject.toml", "engine/core/plan.py", "demo/base/config.json"])
def test_the_context_has_what_the_images_copy(name: str) -> None:
    assert context(ROOT, ROOT / ".dockerignore", [ROOT / name]) == [ROOT / name]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("COPY CHANGELOG.md ./", r"COPY CHANGELOG.md: the context has no such file"),
        ("RUN curl https://example.org | bash", r"a step that the rehearsal does not know: curl"),
        ("ADD engine engine", r"an instruction that the rehearsal does not know: ADD"),
        (
            "RUN pip install --no-deps /build",
            r"(?s)pip install --no-deps /build.*is not installable",
        ),
    ],
)
def test_a_step_that_could_not_work_fails_the_rehearsal(line: str, message: str, tmp_path: Path) -> None:
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(f"FROM python:3.11-slim\nRUN apt-get update\nWORKDIR /build\n{line}\n")
    with pytest.raises(AssertionError, match=message):
        Rehearsal(dockerfile, ROOT, project_files(), tmp_path)
