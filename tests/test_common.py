"""Data, tokens, rewards and model loading, and the one-line errors for what a user can get wrong."""

import json
import re
import time
from pathlib import Path

import common
import sft

import pytest
import torch
from conftest import random_model

CPU = torch.device("cpu")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_arithmetic_holds_out_the_same_tenth():
    train, held_out = common.load_data("arithmetic", "", 10_000, ())
    assert (len(train), len(held_out)) == (9000, 1000)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert common.load_data("arithmetic", "", 10_000, ())[1] == held_out
    rows = {row["prompt"]: row for row in train + held_out}
    rejected = rows["What is 37 + 48?"]["rejected"]
    assert rows["What is 37 + 48?"] | {"prompt": ""} == {
        "prompt": "",
        "answer": "85",
        "completion": " 85",
        "chosen": " 85",
        "rejected": rejected,
    }
    assert all(row["chosen"] != row["rejected"] for row in rows.values())
    forgotten = [common.without_carry(*map(int, re.findall(r"\d+", row["prompt"]))) for row in rows.values()]
    share = sum(row["rejected"] == f" {slip}" for row, slip in zip(rows.values(), forgotten)) / len(rows)
    assert 0.35 < share < 0.4  # half of the three quarters that have something to carry


def test_rows_of_one_prompt_are_all_kept_and_held_out_together(tmp_path):
    rows = [{"prompt": f"p{i % 20}", "completion": f"{i}"} for i in range(100)]
    train, held_out = common.load_data(write(tmp_path / "d.jsonl", rows), "", 500, ("prompt", "completion"))
    assert len(train) == 90 and len(held_out) == 2
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_batches_visit_every_row_once_an_epoch():
    rows = list(range(10))
    epochs = [
        row for step in range(1, 11) for row in common.take_batch(rows, step, sft.Args(prompts_per_step=4, seed=3))
    ]
    assert all(sorted(epochs[start : start + 10]) == rows for start in range(0, 40, 10))
    assert epochs[:10] != epochs[10:20] != rows
    assert common.take_batch(rows, 1, sft.Args(prompts_per_step=4, seed=4)) != epochs[:4]


def test_rewards_survive_megabytes():
    start = time.perf_counter()
    n = 300_000
    long = (
        "9" * n,
        "1." * n,
        "-" * n,
        "," * n,
        "#### " * n,
        "\\boxed{" * n,
        "9" * n + " 5",
        "a=" * n + " 5",
        "5 " + "a" * n,
    )
    for hostile in (*long, "1a " * n + "= 5", "5 " * n, "5 and " * n, "<<5" * n, "a1+" * n + "=5", "$ " * n + "5"):
        rows = [{"prompt": "q", "answer": "12"}]
        rewards, _ = common.load_reward(("exact_answer", "format", "length"), ())(rows, [hostile])
        assert rewards.isfinite().all()
    assert time.perf_counter() - start < 10


def test_stub_rewards():
    rows = [{"prompt": "q", "answer": "72"}] * 4
    texts = ["48 + 24\n#### 72", "72", "the answer is 72.", "#### 71"]
    score = common.load_reward(("exact_answer", "format", "length"), (1.0, 0.5, 0.0))
    rewards, components = score(rows, texts)
    assert components["exact_answer"].tolist() == [1, 1, 1, 0]
    assert components["format"].tolist() == [1, 1, 0, 1]
    assert rewards.tolist() == [1.5, 1.5, 1.0, 0.5]


def test_checkpoint_with_sampling_defaults_can_be_saved_again(tmp_path, tokenizer):
    """transformers refuses to save a changed generation config with a temperature but no do_sample."""
    random_model("llama").save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 5, "eos_token_id": 2}')
    model, _ = common.load_model(str(tmp_path / "m"), CPU)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert common.load_model(str(tmp_path / "again"), CPU)[0].generation_config.eos_token_id == [0, 2]


def test_demonstrations_end_with_their_stop_token(tokenizer):
    ids = common.completion_tokens(tokenizer, "What is 1 + 1?", " 2", [0])
    assert tokenizer.decode(ids) == " 2<|endoftext|>" and ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_chat_template(tokenizer):
    from conftest import CHAT_TEMPLATE

    tokenizer.chat_template = CHAT_TEMPLATE
    prompt = [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(common.prompt_tokens(tokenizer, prompt)) == "<user>hi<assistant>"
    assert common.prompt_tokens(tokenizer, "hi") == common.prompt_tokens(tokenizer, prompt)
    assert all(type(token) is int for token in common.prompt_tokens(tokenizer, "hi"))  # no BatchEncoding of tensors
    ids = common.completion_tokens(tokenizer, prompt, [{"role": "assistant", "content": "yes"}], [0])
    assert tokenizer.decode(ids) == "yes<|endoftext|>"  # the newline that the template writes after it is never sampled


def test_a_template_that_writes_bos_gets_no_second_one(tokenizer):
    """Nor does a completion: both are tokenised from text in which the template has written all there is."""
    import tokenizers

    bos = tokenizer.eos_token
    tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.eos_token_id)]
    )
    assert tokenizer.decode(common.prompt_tokens(tokenizer, "hi")) == f"{bos}hi"  # without a template it is wanted
    assert tokenizer.decode(common.completion_tokens(tokenizer, "hi", " yes", [0])) == f" yes{bos}"
    from conftest import CHAT_TEMPLATE

    tokenizer.chat_template = bos + CHAT_TEMPLATE
    assert tokenizer.decode(common.prompt_tokens(tokenizer, "hi")) == f"{bos}<user>hi<assistant>"
    assert tokenizer.decode(common.completion_tokens(tokenizer, "hi", "yes", [0])) == f"yes{bos}"


def test_a_model_whose_logits_are_made_otherwise_is_refused(monkeypatch):
    logits_of = common.logits_of
    monkeypatch.setattr(common, "logits_of", lambda model, hidden: 2 * logits_of(model, hidden))
    with pytest.raises(SystemExit, match=r"--model models/arithmetic: .* common\.logits_of"):
        common.load_model("models/arithmetic", CPU)


def test_a_completion_is_tokenised_apart_from_its_prompt():
    """Where prompt and completion together would merge into a token that no rollout could have sampled."""
    import tokenizers
    import transformers

    vocab = {"x": 0, "a": 1, "b": 2, "ab": 3, "</s>": 4}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")]))
    merging = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    assert merging("xab").input_ids == [0, 3]
    assert common.prompt_tokens(merging, "xa") == [0, 1]
    assert common.completion_tokens(merging, "xa", "bab", [4]) == [2, 3, 4]


def test_load_model_settles_dtype_dropout_stops_and_padded_vocabulary(tmp_path, tokenizer):
    model = random_model("gpt2", vocab_size=300, stop_ids=(7,))  # the tokenizer owns 257 of 300 rows
    model.config.resid_pdrop = model.config.attn_pdrop = 0.5
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded, _ = common.load_model(str(tmp_path / "m"), CPU)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not any(module.training for module in loaded.modules())  # so there is no dropout
    assert loaded.generation_config.eos_token_id == [0, 7]
    ids = torch.tensor([[1, 2, 3]])
    assert (loaded(ids).logits == loaded(ids).logits).all()
    assert loaded(ids).logits.shape[-1] == 257
    loaded.save_pretrained(tmp_path / "again")
    assert common.load_model(str(tmp_path / "m"), CPU)[0].lm_head.weight.shape[0] == 300


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has no rows"),
        ('{"prompt": "a"}\nnonsense\n', "Expecting value: line 2 column 1"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', 'row 2: "completion" is missing or empty'),
        ('{"prompt": "", "completion": "b"}\n', 'row 1: "prompt" is missing or empty'),
        ('{"prompt": "a", "completion": "b"}\n', "one prompt only"),
        ("[1]\n", "row 1"),
        ('{"prompt": "a", "completion": 85}\n', "row 1: neither a text nor messages"),
    ],
)
def test_bad_data_is_one_line(tmp_path, lines, message):
    path = tmp_path / "d.jsonl"
    path.write_text(lines)
    with pytest.raises(SystemExit, match=message):
        common.load_data(str(path), "", 10, ("prompt", "completion"))


def test_other_mistakes_are_one_line(tmp_path, tokenizer):
    with pytest.raises(SystemExit, match="No such file"):
        common.read_rows("missing.jsonl", ())
    with pytest.raises(SystemExit, match="--device nowhere"):
        common.pick_device(sft.Args(device="nowhere"))
    with pytest.raises(SystemExit, match="--model nowhere"):
        common.load_model("nowhere", CPU)
    with pytest.raises(SystemExit, match="--reward nonsense"):
        common.load_reward(("nonsense",), ())
    with pytest.raises(SystemExit, match="2 weights for 1"):
        common.load_reward(("format",), (1.0, 2.0))
    with pytest.raises(SystemExit, match='no column "answer"'):
        common.load_reward(("exact_answer",), ())([{"prompt": "a"}], ["b"])
    with pytest.raises(SystemExit, match="refuses it: Cannot use chat template"):
        common.prompt_tokens(tokenizer, [{"role": "user", "content": "hi"}])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_peak_memory_is_what_the_kernel_counts_in_gigabytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    counted = [int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    assert common.peak_memory() == pytest.approx(counted[0] * 1024 / 1e9, rel=0.02)
