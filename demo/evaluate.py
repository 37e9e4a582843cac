"""How often the base and each adapter answer held-out lines exactly (all characters right, and then `</s>`).

`python -m demo.evaluate` prints a table; generation is greedy, in float32, batched, through transformers and PEFT.
"""

import argparse
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from demo.checkpoint import ADAPTERS, BASE, EOS, load_adapter, load_base, load_tokenizer
from demo.recipes import RECIPES
from demo.text import Example, held_out
from demo.transforms import TRANSFORMS, same

ROWS = 200
"""Prompts a batch."""

Model: TypeAlias = PreTrainedModel | PeftModel


def answers(model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy answers, in the order of `prompts`; one without `</s>` within 128 tokens gets a `…` at its end."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].encode()))
    found: dict[int, str] = {}
    for at in range(0, len(order), ROWS):
        chosen = order[at : at + ROWS]
        inputs = tokenizer([prompts[index] for index in chosen], return_tensors="pt", padding=True, padding_side="left")
        output = cast(Any, model).generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=128,
            do_sample=False,
        )
        for index, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ended = EOS in row
            text = str(tokenizer.decode(row[: row.index(EOS)] if ended else row))
            found[index] = text if ended else text + "…"
    return [found[index] for index in range(len(prompts))]


def wrong(model: Model, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Example]) -> list[tuple[Example, str]]:
    """The examples that `model` does not answer exactly, each with what it answered."""
    given = answers(model, tokenizer, [example.prompt for example in asked])
    return [(example, text) for example, text in zip(asked, given, strict=True) if text != example.answer]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="held-out lines per adapter")
    parser.add_argument("--seed", type=int, default=0, help="which held-out lines")
    parser.add_argument("--adapter", action="append", default=[], choices=["base", *RECIPES], help="only; repeatable")
    parser.add_argument("--words", action="store_true", help="only sentences, without earlier lines")
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong answer")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    tokenizer = load_tokenizer()
    lines = [f"{'adapter':10} {'rank':>4} {'variant':13} {'targets':11} {'exact':>13} {'weights, bytes':>15}"]
    for name in tqdm(chosen.adapter or ["base", *RECIPES]):
        asked = held_out(name, TRANSFORMS.get(name, same), chosen.count, chosen.seed, words=chosen.words)
        model: Model = load_base() if name == "base" else load_adapter(name)
        failures = wrong(model, tokenizer, asked)
        right = f"{len(asked) - len(failures)}/{len(asked)} {1 - len(failures) / len(asked):.1%}"
        if name == "base":
            weights, words = BASE / "model.safetensors", ("-", "-", "-")
        else:
            recipe = RECIPES[name]
            weights = ADAPTERS / name / "adapter_model.safetensors"
            words = (str(recipe.rank), recipe.variant, recipe.targets_word)
        lines.append(f"{name:10} {words[0]:>4} {words[1]:13} {words[2]:11} {right:>13} {weights.stat().st_size:>15,}")
        if chosen.show_wrong:
            lines += [f"    {example.prompt!r}: {text!r}, not {example.answer!r}" for example, text in failures]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
