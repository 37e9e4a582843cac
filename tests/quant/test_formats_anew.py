"""Checkpoints that other people's tools write while the test runs, in environments of `make test-quantizers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.quantized_by_tools import check_logits, check_mixed_adapters
from tests.support.quantizer_tools import FILES, SCRIPTS, run_tool, write_bases

pytestmark = pytest.mark.quantizers

NAMES = sorted(path.name for path in FILES.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_bases(folder)
    for environment in SCRIPTS:
        run_tool(environment, folder)
    return folder


def test_the_tools_write_the_files_that_the_default_tests_keep(written: Path) -> None:
    assert sorted(path.parent.name for path in written.glob("*/expected.safetensors")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_tools_own_library(written: Path, name: str, tmp_path: Path) -> None:
    check_logits(written / name, tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if "dynamic" not in name and "w8a8" not in name])
def test_it_is_served_with_four_mixed_adapters(written: Path, name: str, tmp_path: Path) -> None:
    check_mixed_adapters(written / name, tmp_path)
