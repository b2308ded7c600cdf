"""Data, batches and models as common.py hands them to the scripts."""

import re

import common
import sft

import pytest
import torch
from conftest import random_model
from test_data import CPU, folder_of, write

SUMS = "models/arithmetic/sums.jsonl"


def without_carry(a, b):
    """Each digit of a sum by itself."""
    return a + b if a + b < 10 else without_carry(a // 10, b // 10) * 10 + (a % 10 + b % 10) % 10


def test_the_sums_hold_out_the_same_tenth():
    train, held_out = common.load_data(SUMS, "", 10_000, ())
    assert (len(train), len(held_out)) == (9000, 1000)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert common.load_data(SUMS, "", 500, ())[1] == held_out[:500]
    rows = {tuple(map(int, re.findall(r"\d+", row["prompt"]))): row for row in train + held_out}
    assert len(rows) == 10_000
    for (a, b), row in rows.items():
        texts = {
            "prompt": f"What is {a} + {b}?",
            "answer": str(a + b),
            "completion": f" {a + b}",
            "chosen": f" {a + b}",
        }
        assert row == texts | {"rejected": row["rejected"]} and row["rejected"] != row["chosen"]
    slips = [row["rejected"] == f" {without_carry(*numbers)}" for numbers, row in rows.items()]
    assert 0.35 < sum(slips) / len(slips) < 0.4  # half of the three quarters that have something to carry


def test_rows_of_one_prompt_are_all_kept_and_held_out_together(tmp_path):
    rows = [{"prompt": f"p{i % 20}", "completion": f"{i}"} for i in range(100)]
    train, held_out = common.load_data(write(tmp_path / "d.jsonl", *rows), "", 500, ("prompt", "completion"))
    assert len(train) == 90 and len(held_out) == 2
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_batches_visit_every_row_once_an_epoch():
    rows, args = list(range(10)), sft.Args(prompts_per_step=4, seed=3)
    epochs = [row for step in range(1, 11) for row in common.take_batch(rows, step, args)]
    assert all(sorted(epochs[start : start + 10]) == rows for start in range(0, 40, 10))
    assert epochs[:10] != epochs[10:20] != rows
    assert common.take_batch(rows, 1, sft.Args(prompts_per_step=4, seed=4)) != epochs[:4]


def test_processes_share_rows_and_evaluations(monkeypatch):
    rows, args = list(range(10)), sft.Args(prompts_per_step=8)
    whole = common.take_batch(rows, 2, args)
    monkeypatch.setattr(common, "WORLD_SIZE", 4)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(common, "RANK", rank)
        parts.append(common.take_batch(rows, 2, args))
        assert [len(batch) for batch in common.eval_batches(rows[:5], args)] == [2, 2, 1]  # as many as in a step
    with pytest.raises(SystemExit, match="--prompts-per-step: must be a multiple of the processes"):
        common.check_args(sft.Args(prompts_per_step=6))
    assert [row for part in parts for row in part] == whole and {len(part) for part in parts} == {2}


def test_padding_is_by_length_as_stop_and_pad_may_be_one_token(tokenizer):
    batch = common.collate([[5, 6, 7], [8]], [[9, 0], [0], [9, 9, 9], [0, 0, 0]], CPU)
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch
    assert prompt_ids.tolist() == [[5, 6, 7], [0, 0, 8]] and prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert completion_ids.tolist() == [[9, 0, 0], [0, 0, 0], [9, 9, 9], [0, 0, 0]]
    assert completion_mask.tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    texts, ids = common.decode(tokenizer, completion_ids, completion_mask)
    assert ids == [[9, 0], [0], [9, 9, 9], [0, 0, 0]] and texts == [
        tokenizer.decode([9]),
        "",
        tokenizer.decode([9] * 3),
        "",
    ]


def test_load_model_settles_dtype_dropout_stops_and_padded_vocabulary(tmp_path, tokenizer):
    model = random_model("gpt2", vocab_size=300, stop_ids=(7,))  # the tokenizer owns 257 of 300 rows
    model.config.resid_pdrop = model.config.attn_pdrop = 0.5
    folder = str(folder_of(tmp_path, tokenizer, model.to(torch.bfloat16)))
    loaded, _ = common.load_model(folder, CPU)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not any(module.training for module in loaded.modules())  # so there is no dropout
    assert loaded.generation_config.eos_token_id == [0, 7] and loaded.context_length == 64
    ids = torch.tensor([[1, 2, 3]])
    assert (loaded(ids).logits == loaded(ids).logits).all()
    assert loaded(ids).logits.shape[-1] == common.logits_of(loaded, loaded.trunk(input_ids=ids)[0]).shape[-1] == 257
    assert loaded.get_output_embeddings().weight.shape[0] == 300  # and 300 are saved


@pytest.mark.parametrize(("dtype", "enabled"), [("auto", False), ("float32", False), ("bfloat16", True)])
def test_on_a_cpu_passes_are_in_float32_unless_asked(dtype, enabled):
    args = common.check_args(sft.Args(dtype=dtype, device="cpu"))
    with common.autocast(args):
        assert torch.is_autocast_enabled("cpu") is enabled
