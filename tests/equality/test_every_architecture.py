"""Every causal language model of transformers is served as transformers says, or refused by name, as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.sweep import make_family, outcome
from tests.support.tiny_architectures import FAMILIES, NOT_MADE
from tests.support.write_architectures import PAGE, reason, rows

# Routers that are linear layers and give tuples, layers whose weight is looked at, norms without weights, a window that
# only the mask knows, LoRA behind the decoder layers, positions of their own, attention of its own, a state.
SAMPLE = ("phimoe", "hunyuan_v1_moe", "olmo", "modernbert-decoder", "llama4_text", "roberta", "falcon", "mamba")
# What no message may say: names of ours, what Python calls its errors.
OURS = re.compile(
    r"chorus|Traceback|(Attribute|Key|Type)Error|object has no attribute|_recorder|PackedLinear|LoraLinear"
)
NAMED = re.compile(
    r"^\w+: (\w+(\.\w+)+ \(\w+\)|\w+(ForCausalLM|Config|LMHeadModel)\b|\w+(\.\w+)+ )|max_position_embeddings"
)


def check(family: str, kernels: str, folder: Path) -> None:
    found = outcome(make_family(family, folder / family), kernels)
    assert not found.differs, found.differs
    told = rows(PAGE.read_text(encoding="utf-8"))[family]
    if found.refused:
        assert reason(found.refused) == told
        assert NAMED.search(found.refused), f"no layer, and no field of config.json: {found.refused}"
        assert not OURS.search(found.refused), found.refused
        assert "erve " in found.refused.rpartition(". ")[2] + found.refused.rpartition("; ")[2], "no remedy"
        assert "\n" not in found.refused
    else:
        assert told == str(found.num_adapted)
        assert found.num_adapted > 0
    assert found.near_ties <= 1


@pytest.mark.parametrize("family", SAMPLE)
def test_odd_architectures_are_served_or_refused_by_name(family: str, tmp_path: Path) -> None:
    check(family, "auto", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_served_or_refused_by_name(family: str, kernels: str, tmp_path: Path) -> None:
    check(family, kernels, tmp_path)


def test_the_page_names_every_architecture_of_transformers() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert set(rows(page)) == {*FAMILIES, *NOT_MADE} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert f"transformers {__version__}" in page
    served = [family for family, told in rows(page).items() if told.isdigit()]
    assert len(served) >= 60
