"""Files that AutoAWQ, gptqmodel, llm-compressor, bitsandbytes and torchao wrote (tests/quant/tools) are served.

`make test-quantizers` does the same with files written anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.quantized_by_tools import check_logits, check_mixed_adapters, check_rounded_inputs
from tests.support.quantizer_tools import FILES

WRITTEN = sorted(path.name for path in FILES.iterdir())
WEIGHTS_ONLY = [name for name in WRITTEN if "dynamic" not in name and "w8a8" not in name]
# One of each format and architecture; the rest are slow together.
QUICK = (
    "autoawq-llama",
    "gptqmodel-qwen2-asymmetric",
    "llmcompressor-mixtral-w4a16-asymmetric",
    "bitsandbytes-llama-nf4",
)


@pytest.mark.parametrize("name", WRITTEN)
def test_logits_are_those_of_the_tools_own_library(name: str, tmp_path: Path) -> None:
    check_logits(FILES / name, tmp_path)


def test_inputs_rounded_by_the_tools_own_rule_give_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rounded_inputs(FILES / "llmcompressor-qwen2-w8a8", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WEIGHTS_ONLY]
)
def test_it_is_served_with_four_mixed_adapters(name: str, tmp_path: Path) -> None:
    check_mixed_adapters(FILES / name, tmp_path)
