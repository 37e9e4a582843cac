"""Writes docs/architectures.md: `python -m tests.support.write_architectures`, some minutes on one core.

Each family of tests/support/tiny_architectures.py is made tiny and tried; tests hold the page to the list of families
and, where they are marked slow, to what becomes of them.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from transformers import __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
from transformers.utils import logging

from engine.checkpoint.folder import OTHERWISE, REMEDY
from tests.support.sweep import Outcome, make_family, outcome
from tests.support.tiny_architectures import FAMILIES, NOT_MADE

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Which architectures are served

Every causal language model of transformers {version}, made tiny with random weights and tried. Served means: greedy
text in float32 is that of transformers, token for token, and with a LoRA adapter of every linear layer that of PEFT, on
the compiled kernels and on torch's. What is not served is refused at start, by the name of a layer. The `model_type`
of a checkpoint is in its config.json.

`python -m tests.support.write_architectures` writes this page; `make test-slow` tries all of it, `make test` a sample.
A checkpoint of a served family can still be refused for a setting in its config.json; the message says which.

Layers inside of experts carry no LoRA (transformers keeps the weights of all experts in one parameter), nor do routers
that are no plain linear layers.
"""


def rows(page: str) -> dict[str, str]:
    """The families of the page, and what it says of each."""
    cells = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `")]
    return {cell[0].strip(" `"): cell[-1].strip() for cell in cells}


def reason(message: str) -> str:
    """A refusal without its remedy, which is this page."""
    return message.partition(": ")[2].removesuffix(REMEDY).removesuffix(OTHERWISE).replace("|", "/")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[str, Outcome] = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found[family] = outcome(make_family(family, Path(folder) / "base"), "auto")
        print(family, found[family], flush=True)
    page = [
        HEAD.format(version=__version__),
        "## Served\n",
        "| model_type | class | layers with LoRA, of three or so |",
        "|---|---|---|",
    ]
    for family, one in found.items():
        if not one.refused:
            assert not one.differs, (family, one)
            page.append(f"| `{family}` | {CLASSES[family]} | {one.num_adapted} |")
    page += ["\n## Refused\n", "| model_type | class | why |", "|---|---|---|"]
    page += [f"| `{f}` | {CLASSES[f]} | {reason(one.refused)} |" for f, one in found.items() if one.refused]
    page += [
        "\n## Not tried\n",
        "No tiny model of these was made: whether they are served is found out when they are loaded.\n",
    ]
    page += ["| model_type | class | why not |", "|---|---|---|"]
    page += [f"| `{family}` | {CLASSES[family]} | {why} |" for family, why in NOT_MADE.items()]
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
