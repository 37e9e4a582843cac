"""Trains the demo base and its adapters from a seed.

`python -m demo.train --all` retrains everything; `--base` and `--adapter NAME` (repeatable) single parts. An adapter is
trained on the base that lies in `demo/base`, so after a new base every adapter must be trained again.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import LlamaForCausalLM

from demo.checkpoint import ADAPTERS, BOS, EOS, PAD, load_base, make_config, save_adapter, save_base
from demo.recipes import BASE_CYCLES, BASE_EASY_STEPS, BASE_ROWS, POLISH_CYCLES, RECIPES, Cycle, Recipe
from demo.text import Draw, Example, examples, hard_mixture, mixture, repetitive, words_and_repetitive, words_mostly
from demo.transforms import TRANSFORMS, Transform, same

IGNORED = -100
"""The label of positions that carry no loss."""

_POOL_BATCHES = 16


def encode(example: Example) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row: only the answer and its `</s>` carry loss."""
    prompt = [BOS, *example.prompt.encode()]
    answer = [*example.answer.encode(), EOS]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def collate(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Left-aligned ids and labels. Padding comes last and carries no loss, so a causal model needs no mask for it.

    Shapes: two int64 tensors [rows, longest row].
    """
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in rows])
    return ids, labels


def batches(seed: str, transform: Transform, draw: Draw, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of rows of similar length: pools of rows are sorted, cut, and their batches shuffled."""
    source = examples(f"train/{seed}", transform, draw, reserved=False)
    rng = random.Random(f"order/{seed}")
    while True:
        pool = sorted(map(encode, itertools.islice(source, rows * _POOL_BATCHES)), key=lambda row: len(row[0]))
        cuts = [collate(pool[at : at + rows]) for at in range(0, len(pool), rows)]
        rng.shuffle(cuts)
        yield from cuts


def rates(optimizer: Optimizer, cycles: Sequence[Cycle]) -> Iterator[None]:
    """Sets the learning rate of `optimizer` before each step of `cycles`, one after the other."""
    for cycle in cycles:
        schedule = OneCycleLR(
            optimizer, max_lr=cycle.rate, total_steps=(cycle.planned or cycle.steps) + 1, pct_start=0.1
        )
        for _ in range(cycle.steps):
            yield
            schedule.step()


def fit(model: nn.Module, source: Iterator[tuple[Tensor, Tensor]], cycles: Sequence[Cycle], title: str) -> float:
    """Trains what requires a gradient with AdamW; returns the mean loss of the last 50 steps."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=cycles[0].rate, betas=(0.9, 0.98), weight_decay=0.0)
    losses: list[float] = []
    model.train()
    bar = tqdm(rates(optimizer, cycles), total=sum(cycle.steps for cycle in cycles), desc=title, mininterval=1.0)
    for _ in bar:
        ids, labels = next(source)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses = [*losses[-49:], loss.item()]
        bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)
    model.eval()
    return sum(losses) / len(losses)


def base_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Lines to repeat: every kind first, then more of the hard kinds."""
    easy = batches(f"base/{seed}", same, mixture, BASE_ROWS)
    hard = batches(f"base/hard/{seed}", same, hard_mixture, BASE_ROWS)
    return itertools.chain(itertools.islice(easy, BASE_EASY_STEPS), hard)


def train_base(seed: int) -> None:
    """Trains the base to repeat the last line and writes `demo/base`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config())
    fit(model, base_batches(seed), BASE_CYCLES, "base")
    save_base(model)
    polish_base(seed)


def polish_base(seed: int) -> None:
    """The last stage of `train_base`, on the base that is there."""
    model = load_base()
    fit(model, batches(f"base/polish/{seed}", same, repetitive, BASE_ROWS), POLISH_CYCLES, "base, polish")
    save_base(model)


def lora_config(recipe: Recipe) -> LoraConfig:
    """PEFT's words for a recipe."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
    )


def _fold(layer: LoraLinear) -> None:
    """Makes `layer` compute x (W + s B A)ᵀ instead of x Wᵀ + s ((x Aᵀ) Bᵀ): the same function, fewer passes.

    The rows outnumber the weights' sides by far here; a step costs about half as much on a CPU.
    """

    def forward(rows: Tensor) -> Tensor:
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        return nn.functional.linear(rows, layer.base_layer.weight + layer.scaling["default"] * delta)

    layer.forward = forward


def _folded(model: nn.Module) -> PeftModel:
    assert isinstance(model, PeftModel)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            _fold(layer)
    return model


def train_adapter(name: str, seed: int) -> None:
    """Trains adapter `name` on the frozen base and writes `demo/adapters/<name>`."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    model = _folded(get_peft_model(load_base(), lora_config(recipe)))
    source = batches(f"{name}/{seed}", TRANSFORMS[name], words_mostly, recipe.rows)
    for cycle in recipe.cycles:
        fit(model, source, (cycle,), name)
    for stage in range(len(recipe.polish)):
        _polish(model, name, stage, seed)
    save_adapter(model, ADAPTERS / name)


def polish_adapter(name: str, seed: int) -> None:
    """The last cycle of `train_adapter`, on the adapter that is there."""
    model = _folded(PeftModel.from_pretrained(load_base(), str(ADAPTERS / name), is_trainable=True))
    _polish(model, name, len(RECIPES[name].polish) - 1, seed)
    save_adapter(model, ADAPTERS / name)


def _polish(model: PeftModel, name: str, stage: int, seed: int) -> None:
    recipe = RECIPES[name]
    source = batches(f"{name}/polish/{stage}/{seed}", TRANSFORMS[name], words_and_repetitive, recipe.rows)
    fit(model, source, (recipe.polish[stage],), f"{name}, polish")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the base, then every adapter")
    parser.add_argument("--base", action="store_true", help="the base")
    parser.add_argument(
        "--polish",
        action="store_true",
        help="the last cycle only, on what is there: of the adapters named, or the base",
    )
    parser.add_argument("--adapter", action="append", default=[], choices=sorted(RECIPES), help="one; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    chosen = parser.parse_args()
    if not (chosen.all or chosen.base or chosen.polish or chosen.adapter):
        parser.error("nothing to train: name --all, --base or --adapter")
    if chosen.polish and (chosen.all or chosen.base):
        parser.error("--polish goes on with what is there; --all and --base begin anew, and polish at their end")
    if unpolished := [name for name in chosen.adapter if chosen.polish and not RECIPES[name].polish]:
        parser.error(f"recipes.py has no polish for {', '.join(unpolished)}")
    torch.set_num_threads(chosen.threads)
    start = time.perf_counter()
    if chosen.all or chosen.base:
        train_base(chosen.seed)
    elif chosen.polish and not chosen.adapter:
        polish_base(chosen.seed)
    train = polish_adapter if chosen.polish else train_adapter
    for name in RECIPES if chosen.all else chosen.adapter:
        train(name, chosen.seed)
    tqdm.write(f"trained in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
