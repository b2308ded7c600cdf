"""DPO's losses against formulas in plain floats, and its pairs."""

import json
import math
from pathlib import Path

import common
import dpo
import sft

import pytest
import torch
from test_scripts import FEW

CHOSEN, REJECTED = [-4.0, -1.0, -7.5], [-3.0, -6.0, -7.0]
REF_CHOSEN, REF_REJECTED = [-5.0, -2.0, -6.0], [-2.5, -2.0, -7.5]
LOSS_TYPES = ["sigmoid", "ipo", "hinge", "robust", "sppo", "simpo"]


def loss_of(loss_type, label_smoothing=0.0, beta=0.3, logps=(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)):
    tensors = [torch.tensor(x, dtype=torch.float64) for x in logps]
    return dpo.dpo_loss(*tensors, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, gamma=0.4)


def by_hand(loss_type, w, l, rw, rl, e, beta=0.3):
    def nls(x):  # -log sigmoid
        return math.log(1 + math.exp(-x))

    d = (w - rw) - (l - rl)
    return {
        "sigmoid": (1 - e) * nls(beta * d) + e * nls(-beta * d),
        "robust": ((1 - e) * nls(beta * d) - e * nls(-beta * d)) / (1 - 2 * e),
        "ipo": (d - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * d),
        "sppo": (w - rw - 1 / (2 * beta)) ** 2 + (l - rl + 1 / (2 * beta)) ** 2,
        "simpo": nls(beta * (w - l) - 0.4),
    }[loss_type]


@pytest.mark.parametrize(("loss_type", "e"), [*((t, 0.0) for t in LOSS_TYPES), ("sigmoid", 0.1), ("robust", 0.1)])
def test_losses_are_the_docstrings_formulas(loss_type, e):
    expected = [by_hand(loss_type, *pair, e) for pair in zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
    got = loss_of(loss_type, e)
    assert got.shape == (3,) and got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "value"),
    [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("sppo", 50.0)],
)
def test_loss_at_the_reference(loss_type, value):
    """Where the policy is the reference every margin is 0: log 2 for the sigmoid, with smoothing or without."""
    logps = (CHOSEN, REJECTED, CHOSEN, REJECTED)
    assert loss_of(loss_type, beta=0.1, logps=logps).tolist() == pytest.approx([value] * 3)
    if loss_type in ("sigmoid", "robust"):
        assert loss_of(loss_type, 0.2, beta=0.1, logps=logps).tolist() == pytest.approx([value] * 3)


def test_robust_is_unbiased_under_flipped_labels():
    """With a share e of pairs the wrong way round its expectation is the loss of clean pairs (arXiv 2403.00409)."""
    e, swapped = 0.2, (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
    expectation = (1 - e) * loss_of("robust", e) + e * loss_of("robust", e, logps=swapped)
    torch.testing.assert_close(expectation, loss_of("sigmoid"))


def test_sequence_logprobs_is_a_sum_and_a_mean_for_ipo_and_simpo():
    logprobs, mask = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -2.0, -3.0]]), torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    for loss_type in LOSS_TYPES:
        expected = [-1.5, -2.0] if loss_type in ("ipo", "simpo") else [-3.0, -6.0]
        assert dpo.sequence_logprobs(logprobs, mask, loss_type=loss_type).tolist() == expected


def run(folder, **settings):
    """The metrics of each step."""
    small = {
        "num_steps": 3,
        "prompts_per_step": 4,
        "eval_every": 3,
        "eval_prompts": 4,
        "micro_batch_size": 6,
        "data": FEW,
    }
    dpo.main(dpo.Args(**small | settings, output_dir=str(folder / "run")))
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:]


def sums_of_logps(path, rows):
    """log pi of the chosen and rejected answers of rows by transformers' own loss, one at a time."""
    model, tokenizer = common.load_model(path, "cpu")
    logps = []
    for text in [row["prompt"] + row[name] for row in rows for name in ("chosen", "rejected")]:
        ids, start = (
            tokenizer(text, return_tensors="pt").input_ids,
            len(tokenizer(text.partition("?")[0] + "?").input_ids),
        )
        ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
        labels = ids.clone().index_fill(1, torch.arange(start), -100)
        logps.append(-model(input_ids=ids, labels=labels).loss.item() * (ids.shape[1] - start))
    return torch.tensor(logps).view(-1, 2)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_held_out_pairs_are_measured_as_transformers_would(loss_type, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(FEW).read_text().splitlines()[:5]]
    rows = [row | {"answer": None, "chosen": " so it is, I say", "rejected": f" no, {i}"} for i, row in enumerate(rows)]
    data = {"data": FEW, "eval_data": write(tmp_path / "e.jsonl", rows), "eval_prompts": 5}
    metrics = run(tmp_path, **data, loss_type=loss_type, learning_rate=3e-3)[-1]
    logps, ref = (sums_of_logps(path, rows) for path in (str(tmp_path / "run" / "model"), "models/arithmetic"))
    if loss_type == "simpo":
        logps, ref = logps / torch.tensor([[17.0, 7.0]]), torch.zeros(5, 2)  # per character, a token here, and the end
    margins = {"sigmoid": 0.1, "simpo": 2.0}[loss_type] * (logps - ref).diff(dim=1).neg()
    assert metrics["eval/margin"] == pytest.approx(margins.mean().item(), abs=1e-3)
    assert metrics["eval/pairs"] == pytest.approx((margins > 0).float().mean().item())
    nls = -torch.nn.functional.logsigmoid(margins - float(loss_type == "simpo"))
    assert metrics["eval/loss"] == pytest.approx(nls.mean().item(), abs=1e-3)
    assert metrics["eval/exact_answer"] is None  # it has nothing to compare
    assert f"dpo: held-out pairs {0.5 if loss_type == 'sigmoid' else 0.2:.3f} -> " in capsys.readouterr().out


def test_held_out_demonstrations_in_free_text_are_measured_by_their_loss(tmp_path, capsys):
    texts = (" so it is, I say", " no, it is not so", " it may be so then")
    rows = [{"prompt": f"What is {i}?", "completion": text} for i, text in enumerate(texts)]
    data = {"data": FEW, "eval_data": write(tmp_path / "e.jsonl", rows), "prompts_per_step": 2, "num_steps": 1}
    last = sft.main(sft.Args(**data, learning_rate=3e-3, output_dir=str(tmp_path / "run")))
    pairs = [row | {"chosen": row["completion"], "rejected": row["completion"]} for row in rows]
    sums = [-sums_of_logps(path, pairs)[:, 0].sum() for path in ("models/arithmetic", str(tmp_path / "run/model"))]
    nll = [total / sum(len(text) + 1 for text in texts) for total in sums]  # characters are tokens; and the ends
    assert last["eval/loss"] == pytest.approx(nll[1].item(), abs=1e-4)
    assert f"sft: held-out loss {nll[0]:.3f} -> {nll[1]:.3f} (" in capsys.readouterr().out


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sppo", "simpo"])
def test_runs_with_each_loss(loss_type, tmp_path, monkeypatch):
    betas, dpo_loss = set(), dpo.dpo_loss
    monkeypatch.setattr(dpo, "dpo_loss", lambda *x, beta, **k: betas.add(beta) or dpo_loss(*x, beta=beta, **k))
    rows = run(tmp_path, loss_type=loss_type)
    assert betas == {{"sppo": 0.001, "simpo": 2.0}.get(loss_type, 0.1)}  # the papers'
    assert all(math.isfinite(value) for row in rows for value in row.values())
    if loss_type == "sigmoid":
        assert rows[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    if loss_type != "simpo":
        assert rows[0]["reward/margin"] == pytest.approx(0.0, abs=1e-4)
    for row in rows:
        assert row["reward/margin"] == pytest.approx(row["reward/chosen"] - row["reward/rejected"], abs=1e-4)
    assert rows[2]["logps/chosen"] < 0 and rows[2]["logps/rejected"] < 0


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_without_a_difference_are_dropped_and_counted(tmp_path, capsys):
    rows = [
        {"prompt": "What is 1 + 1?", "chosen": " 2", "rejected": " 3"},
        {"prompt": "What is 1 + 2?", "chosen": " 3", "rejected": " 4"},
        {"prompt": "What is 1 + 3?", "chosen": " 4", "rejected": " 4"},  # equal
        {"prompt": "What is 1 + 4?", "chosen": " 5555", "rejected": " 5554"},  # equal once cut off
        {"prompt": "What is the sum of 1 + 5?", "chosen": " 6", "rejected": " 7"},  # no room left
    ]
    data = {"data": write(tmp_path / "d.jsonl", rows), "eval_data": write(tmp_path / "e.jsonl", rows[:1])}
    run(tmp_path, **data, max_length=18)
    assert "dropped 3 of 5 pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no row is left to train on"):
        run(tmp_path / "none", **data, max_length=10)
