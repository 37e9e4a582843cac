"""The programs that trained the demo still train: the same seed gives the same start, and the loss falls."""

import itertools
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from demo import train
from demo.checkpoint import EOS, make_config
from demo.recipes import RECIPES, Cycle
from demo.text import Example, mixture
from demo.transforms import same


def _trained(steps: int) -> float:
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config())
    return train.fit(model, train.batches("test", same, mixture, 8), (Cycle(steps=steps, rate=2e-3),), "test")


def test_the_loss_falls_and_is_the_same_for_the_same_seed():
    first = _trained(1)
    assert _trained(25) < first
    assert _trained(1) == pytest.approx(first, rel=1e-5)


def test_only_the_answer_and_its_end_carry_loss():
    ids, labels = train.encode(Example(earlier=(), line="ab", answer="AB"))
    assert [label for label in labels if label != train.IGNORED] == [*b"AB", EOS]
    assert len(ids) == len(labels)
    rows, targets = train.collate([(ids, labels), (ids[:2], labels[:2])])
    assert rows.shape == targets.shape == (2, len(ids))
    assert (targets[1, 2:] == train.IGNORED).all()


def test_rates_rise_fall_and_cover_every_step():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    seen = []
    for _ in train.rates(optimizer, (Cycle(steps=20, rate=1e-2), Cycle(steps=5, rate=1e-3, planned=50))):
        optimizer.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert len(seen) == 25
    assert max(seen[:20]) == pytest.approx(1e-2, rel=0.05)
    assert all(rate <= 1e-3 * 1.0001 for rate in seen[20:])


def test_training_batches_do_not_run_dry():
    batches = list(itertools.islice(train.batches("upper/0", same, mixture, 4), 40))
    assert all(ids.shape[0] == 4 for ids, _ in batches)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to train"),
        (["--polish", "--all"], "--polish goes on"),
        (["--polish", "--adapter", next(name for name, it in RECIPES.items() if not it.polish)], "no polish for"),
        (["--adapter", "nobody"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_trains_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
):
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit):
        train.main()
    assert told in capsys.readouterr().err
