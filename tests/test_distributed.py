"""Several processes do what one does: the same updates, metrics and files; and they end together.

Two processes run under torchrun with gloo, on sharded models; worker.py has the runs.
"""

import json
import os
import subprocess
import sys
import time

import common

import pytest
import torch
from conftest import CHAT_TEMPLATE, random_model
from safetensors.torch import load_file
from test_scripts import REPO, read_jsonl
from test_update import JUDGE

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(command, **environment):
    """The finished process; it must not be waited for in vain."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=REPO, env=environment, timeout=100
    )


def work(folder, jobs, processes):
    file = folder / f"jobs-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(jobs))
    return launch([*(TORCHRUN if processes == 2 else [sys.executable]), REPO / "tests" / "worker.py", file])


def weights(folder):
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


def figures(folder):
    rows = [
        {name: value for name, value in row.items() if not name.startswith(("time/", "tokens_per_second"))}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]
    rows[1].pop("reward/accuracy", None)  # dpo.py's; its first margins are 0 but for rounding
    return rows


def assert_same(folder, other, tolerance=1e-9):
    """The same weights and the same figures in each line."""
    here, there = weights(folder), weights(other)
    assert here.keys() == there.keys()
    for name in here:
        assert here[name].dtype == torch.float64
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=tolerance, msg=f"{folder.name}: {name}")
    here, there = figures(folder), figures(other)
    assert [row.keys() for row in here] == [row.keys() for row in there]
    for row, expected in zip(here, there):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), folder.name


RUBRICS = {
    "one": [{"name": "judge", "weight": 1.0, "verifier": "mine.py:judge"}],
    "two": [
        {"name": "doubt", "weight": 2.0, "verifier": "mine.py:doubt"},
        {"name": "asked", "weight": 1.0, "question": "Is it right?"},
    ],
}
# Of each script an update or several of the whole batch: orders of minibatches differ from process to process.
JOBS = {
    "sft": {"script": "sft", "prompts_per_step": 6},
    "sft-checkpointing": {"script": "sft", "prompts_per_step": 6, "gradient_checkpointing": True},
    "rejection_sampling": {"script": "rejection_sampling", "strategy": "threshold", "threshold": 0.9},
    "reinforce": {"script": "reinforce", "beta": 0.1},
    "trpo": {"script": "trpo", "beta": 0.1, "max_kl": 0.001},
    "trpo-lora": {"script": "trpo", "lora_rank": 2, "max_kl": 0.001},
    "ppo": {"script": "ppo", "num_minibatches": 1, "value_clip_range": 1.0},
    "ppo-lora": {"script": "ppo", "num_minibatches": 1, "lora_rank": 2, "gradient_checkpointing": True},
    "ppo-target": {"script": "ppo", "num_minibatches": 1, "num_epochs": 4, "target_kl": 1e-4},
    "grpo": {"script": "grpo", "num_minibatches": 1, "num_epochs": 2, "beta": 0.1},
    "grpo-dapo": {"script": "grpo", "num_minibatches": 1, "loss_type": "dapo"},
    "grpo-lora": {"script": "grpo", "num_minibatches": 1, "beta": 0.1, "lora_rank": 2},
    "dpo": {
        "script": "dpo",
        "num_steps": 4,
        "prompts_per_step": 12,
    },  # more than an epoch, with log-probs kept from the first one
    "dpo-live": {"script": "dpo", "reference": "live", "lora_rank": 2},
    "grape": {"script": "grape", "num_minibatches": 1},
    "grape-batch": {"script": "grape", "num_minibatches": 1, "confidence_scope": "batch"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random GPT-2, chat messages, a reward that cannot score all, and rubrics of two categories."""
    folder = tmp_path_factory.mktemp("distributed")
    tokenizer = common.load_model("models/arithmetic", torch.device("cpu"))[1]
    tokenizer.chat_template = CHAT_TEMPLATE
    critic = random_model("llama")
    critic.config.max_position_embeddings = 512
    for name, model in (("model", random_model("gpt2", stop_ids=(0, *range(10, 60)))), ("critic", critic)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    turns = [
        [[{"role": role, "content": text}] for role, text in (("user", f"{'add ' * (i % 4)}{i} to {i}"), *said)]
        for i, said in ((i, [("assistant", f"#### {n * i + n}") for n in (2, 3)]) for i in range(40))
    ]
    rows = [
        {"prompt": p, "completion": right, "chosen": right, "rejected": wrong, "category": "two" if i % 5 else "one"}
        for i, (p, right, wrong) in enumerate(turns)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(JUDGE)
    for category, items in RUBRICS.items():
        (folder / f"{category}.json").write_text(json.dumps({"category": category, "items": items}))
    return folder


def job(place, name, output_dir, **more):
    """What worker.py takes: the job's own settings, and those of all."""
    settings = {"num_steps": 2, "prompts_per_step": 4, "micro_batch_size": 6, "eval_prompts": 3, "eval_every": 1}
    settings |= {"model": str(place / "model"), "data": str(place / "data.jsonl"), "max_new_tokens": 4}
    settings |= {"reward": [f"{place}/mine.py:judge"], "output_dir": str(output_dir)} | JOBS[name] | more
    script = settings.pop("script")
    if script != "trpo":
        settings["learning_rate"] = 1e-3
    if script not in ("sft", "dpo"):
        settings |= {"samples_per_prompt": 4, "temperature": 0.8}
    if script == "grape":
        settings |= {"rubric": [f"{place}/{name}.json" for name in RUBRICS], "critic_model": str(place / "critic")}
    return {"script": script, "args": settings}


@pytest.fixture(scope="module")
def both(place):
    """The folders of all jobs, run by one process and by two."""
    for processes in (1, 2):
        done = work(place, [job(place, name, place / str(processes) / name) for name in JOBS], processes)
        assert done.returncode == 0, done.stderr[-3000:]
    return place / "1", place / "2"


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_update_as_one_does(both, name):
    """Weights and figures, in float64; the start is the same for all jobs, and each has moved from it."""
    alone, together = (folder / name for folder in both)
    assert_same(together, alone)
    assert figures(alone)[-1].get("grad_norm", 1.0) > 0
    assert (together / "samples.jsonl").read_text() != ""
