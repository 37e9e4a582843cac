"""What was asked for, as the command line says it, and the refusal of what cannot be done."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ConfigError

CALIBRATED = ("awq", "gptq")
METHODS = (*CALIBRATED, "int8", "int8-dynamic", "int4", "nf4", "fp8")
GROUPED = ("awq", "gptq", "int4")

_EPILOG = """\
A line of a FILE is {"text": ...}, {"messages": [...]} (the model's chat template is applied) or {"prompt": ...,
"completion": ...}. awq and gptq need --calibration; for the other methods it only tells more in the report. A run that
was killed goes on behind the last finished layer when it is started again with the same arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run. `bits` are those of gptq; the other methods have their own."""

    model: Path
    out: Path
    method: str
    calibration: Path | None = None
    held_out: Path | None = None
    group_size: int | None = None
    bits: int = 4
    desc_act: bool = False
    lm_head: bool = False
    device: str = "cpu"
    max_samples: int = 128
    resume: bool = True

    def check(self) -> None:
        """Raises: ConfigError for what a method does not know, and for what is not on this machine."""
        if self.method in CALIBRATED and self.calibration is None:
            raise ConfigError(f"method={self.method!r} needs text to calibrate with; give --calibration FILE.jsonl")
        if self.desc_act and self.method != "gptq":
            raise ConfigError(f"desc_act is an order of GPTQ's and unknown to {self.method!r}; leave --desc-act out")
        if self.bits != 4 and self.method != "gptq":
            raise ConfigError(f"bits={self.bits}: the bits of {self.method!r} are its own; --bits belongs to gptq")
        if self.group_size is not None and self.method not in GROUPED:
            raise ConfigError(
                f"group_size={self.group_size}: {self.method!r} has a fixed one; --group-size belongs to "
                f"{', '.join(GROUPED)}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size={self.group_size} must be at least 1")
        if self.lm_head and self.method in CALIBRATED:
            raise ConfigError(f"{self.method!r} leaves the lm_head in 16 bits; leave --lm-head out, or use int4")
        if self.max_samples < 1:
            raise ConfigError(f"max_samples={self.max_samples} must be at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device='cuda', but torch finds no CUDA device; use --device cpu")
        if self.device == "cpu" and self.method == "awq" and torch.cuda.is_available():
            raise ConfigError("autoawq takes every GPU that it sees; give --device cuda, or set CUDA_VISIBLE_DEVICES=")
        for name, path in (("calibration", self.calibration), ("held-out", self.held_out)):
            if path is not None and not path.is_file():
                raise ConfigError(f"--{name} {str(path)!r} is not a file; give a file of JSON lines")


def parse(argv: list[str] | None = None) -> Options:
    """The options of a command line; ends the process with status 2 and a sentence where it is none."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.quantize",
        description="Make a quantized checkpoint of a model in a folder.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a 16- or 32-bit transformers checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist, or be empty")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="JSON lines: the text that is calibrated with")
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE", help="JSON lines: the text that is measured with (else the "
        "last tenth of the calibration text, which is then not calibrated with)",
    )  # fmt: skip
    parser.add_argument("--group-size", type=int, metavar="N", help="inputs that share a scale (awq, gptq, int4; 128)")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of gptq (4)")
    parser.add_argument("--desc-act", action="store_true", help="gptq: the inputs that matter most first")
    parser.add_argument("--lm-head", action="store_true", help="quantize the lm_head too (not awq, gptq)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--max-samples", type=int, default=128, metavar="N", help="windows of 512 tokens, at most, to calibrate with, "
        "and to measure with (128)",
    )  # fmt: skip
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with unfinished work or discard it",
    )
    given = vars(parser.parse_args(argv))
    return Options(**{**given, "out": given["out"].resolve()})
