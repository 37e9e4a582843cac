"""`python -m engine.quantize MODEL OUT --method ...`: exit status 0, or 2 and a sentence on what cannot be done."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import fields
from typing import Any

from transformers.utils import logging as hf_logging

from engine.errors import ConfigError, EngineError, ModelNotSupported
from engine.quantize import awq, gptq, rounded
from engine.quantize.measure import (
    Errors,
    Quality,
    load_original,
    load_quantized,
    output_errors,
    quality,
    weight_errors,
)
from engine.quantize.options import CALIBRATED, Options, parse
from engine.quantize.report import report, table, versions
from engine.quantize.source import HEAD, Source, open_source
from engine.quantize.stored import Stored
from engine.quantize.texts import WINDOW_TOKENS, Texts, load_tokenizer, read_texts
from engine.quantize.work import Work, check_out, open_work

_NOT_OF_THE_RESULT = ("model", "out", "resume", "calibration", "held_out")  # paths: their contents are
_SPARE_BYTES = 64 << 20


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    hf_logging.disable_progress_bar()
    try:
        told = make(options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on behind the last finished layer", file=sys.stderr)
        return 130
    print(table(told))
    print(f"{options.out} is a checkpoint; quantization_report.json in it has the whole report")
    return 0


def make(options: Options) -> dict[str, Any]:
    """Make the checkpoint and return its report. Raises: EngineError for everything that is not a fault of ours."""
    options.check()
    check_out(options.out)
    source = open_source(options.model, lm_head=options.lm_head)
    if options.method in CALIBRATED:
        (awq if options.method == "awq" else gptq).check(source)
    group_size = rounded.group_size_of(source, options)
    texts = _texts(source, options)
    config = _config(source, options, group_size)
    num_units = len(source.units())
    with open_work(
        options.out, num_units, _identity(source, options), _needed_bytes(source, options), resume=options.resume
    ) as work:
        _quantize(source, options, group_size, texts, work)
        work.write_index()
        stored = Stored(work.folder, config["quantization_config"])
        errors, told = _measure(source, options, texts, stored, config, work)
        result = report(source, options, config["quantization_config"], stored, errors, told, texts.held_out_from)
        work.publish(source.folder, config, result)
    return result


def _texts(source: Source, options: Options) -> Texts:
    if options.calibration is None and options.held_out is None:
        return Texts()
    text_config = source.config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None) or WINDOW_TOKENS
    texts = read_texts(
        options.calibration,
        options.held_out,
        load_tokenizer(source.folder),
        options.max_samples,
        min(WINDOW_TOKENS, longest),
    )
    for windows in (texts.calibration, texts.held_out):
        if windows is not None and int(windows.max()) >= text_config.vocab_size:
            raise ConfigError(
                f"the tokenizer in {str(source.folder)!r} makes the token {int(windows.max())}, and the model has "
                f"{text_config.vocab_size}: it is another model's; put the right one there"
            )
    return texts


def _config(source: Source, options: Options, group_size: int | None) -> dict[str, Any]:
    """The config.json of the result."""
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_text())
    if HEAD in source.layers:
        config["tie_word_embeddings"] = False  # the head has codes of its own, the embedding stays
    if options.method == "awq":
        assert group_size is not None
        config["quantization_config"] = awq.configuration(group_size)
        config["dtype"] = "float16"
        config.pop("torch_dtype", None)
    elif options.method == "gptq":
        assert group_size is not None
        config["quantization_config"] = gptq.configuration(options, group_size)
    else:
        config["quantization_config"] = rounded.configuration(source, options, group_size)
    return config


def _identity(source: Source, options: Options) -> dict[str, Any]:
    """All that the bytes of the result depend on: work that differs in it is other work."""
    digests = {
        key: None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
        for key, path in (("calibration", options.calibration), ("held_out", options.held_out))
    }
    plain = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in _NOT_OF_THE_RESULT}
    return {**plain, **digests, "model": source.digest(), **versions(options.method)}


def _needed_bytes(source: Source, options: Options) -> int:
    """A bound from above: codes with a scale for every 32 of them, everything else as it was."""
    bits = options.bits if options.method == "gptq" else 8 if options.method in ("int8", "int8-dynamic", "fp8") else 4
    elements = sum(layer.out_features * layer.in_features for layer in source.layers.values())
    quantized = {f"{layer.name}.weight" for layer in source.layers.values()}
    rest = sum(tensor.num_bytes for name, tensor in source.files.items() if name not in quantized)
    return elements * (bits + 1) // 8 + rest + _SPARE_BYTES


def _quantize(source: Source, options: Options, group_size: int | None, texts: Texts, work: Work) -> None:
    if options.method not in CALIBRATED:
        rounded.run(source, options, group_size, work)
        return
    assert group_size is not None
    assert texts.calibration is not None
    if options.method == "gptq":
        gptq.run(source, options, group_size, texts.calibration, work)
    else:
        awq.run(source, options, group_size, texts.calibration, work)


def _measure(
    source: Source, options: Options, texts: Texts, stored: Stored, config: dict[str, Any], work: Work
) -> tuple[Errors, Quality | None]:
    """Errors by layer, and quality where there is text. AWQ's errors are known since its layers were made: only then
    were its inputs at hand, scaled as its weights are."""
    if options.method == "awq":
        errors: Errors = {name: each for about in work.done.values() if about for name, each in about.items()}
    else:
        errors = weight_errors(source, stored)
    if texts.held_out is None:
        return errors, None
    try:
        original = load_original(source, options.device)
        quantized = load_quantized(source, stored, config, options.device)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise ModelNotSupported(f"transformers cannot load {str(source.folder)!r}: {error}") from error
    if options.method != "awq" and texts.calibration is not None:
        for name, value in output_errors(original, quantized, source, texts.calibration).items():
            errors.setdefault(name, {})["output_error"] = value
    return errors, quality(original, quantized, texts.held_out)


if __name__ == "__main__":
    sys.exit(main())
