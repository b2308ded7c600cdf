"""Several processes do what one does: the same updates, metrics and files; and they end together.

Two processes with gloo, some of them under torchrun; worker.py has the runs.
"""

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import grpo

import pytest
import torch
from conftest import CHAT_TEMPLATE, random_model
from process import Script
from safetensors.torch import load_file
from test_scripts import FEW, REPO, read_jsonl
from test_update import doubt, judge

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(*command):
    """The finished torchrun; it must not be waited for in vain."""
    command = [*TORCHRUN, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=ENVIRONMENT, timeout=100)


def work(folder, jobs, processes, torchrun=False, ends=True):
    file = folder / f"jobs-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(jobs))
    command = [REPO / "tests" / "worker.py", file]
    done = launch(*command) if torchrun else Script(command, cwd=REPO, processes=processes, **ENVIRONMENT).wait()
    assert (done.returncode == 0) == ends, done.stderr[-3000:]
    return done


def weights(folder):
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


def figures(folder):
    rows = read_jsonl(folder / "metrics.jsonl")
    rows[1].pop("reward/accuracy", None)  # dpo.py's; its first margins are 0 but for rounding
    rows = [{name: row[name] for name in row if not name.startswith(("time/", "tokens_per_second"))} for row in rows]
    return [{name: math.nan if x is None else x for name, x in row.items()} for row in rows]  # no item's score


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


RUBRICS = {"one": [{"name": "judge", "weight": 1.0, "verifier": "mine.py:judge"}], "two": []}
RUBRICS["two"] += [{"name": "doubt", "weight": 2.0, "verifier": "mine.py:doubt"}]
RUBRICS["two"] += [{"name": "asked", "weight": 1.0, "question": "Is it right?"}]
# Of each script an update or several of the whole batch: orders of minibatches differ from process to process.
JOBS = {
    "sft": {"prompts_per_step": 6},
    "rejection_sampling": {"strategy": "threshold", "threshold": 0.9},
    "rejection_sampling-batch": {"strategy": "best_of_batch"},
    "reinforce": {"beta": 0.1},
    "reinforce-opt": {"beta": 0.1, "lora_rank": 2, "micro_batch_size": 4, "model": "opt"},
    "trpo": {"beta": 0.1, "max_kl": 0.001},
    "ppo": {"value_clip_range": 1.0},
    "ppo-lora": {"lora_rank": 2, "gradient_checkpointing": True},
    "grpo": {"num_epochs": 2, "beta": 0.1},
    "grpo-dapo": {"loss_type": "dapo", "oversample": 1},  # each process chooses among its own prompts
    "grpo-lora": {"beta": 0.1, "lora_rank": 2},
    # more than an epoch, with log-probs kept from the first one, whose last step has rows of the next one
    "dpo": {"num_steps": 6, "prompts_per_step": 10},
    "grape": {},
    "grape-batch": {"confidence_scope": "batch"},
    # a prompt for each process and step: in some steps only one of them has a question for the critic
    "grape-few": {"prompts_per_step": 2, "num_steps": 4},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random GPT-2, chat messages, a reward that cannot score all, and rubrics of two categories."""
    folder = tmp_path_factory.mktemp("distributed")
    tokenizer = common.load_model("models/arithmetic", torch.device("cpu"))[1]
    tokenizer.chat_template = CHAT_TEMPLATE
    critic, stop_ids = random_model("llama", max_position_embeddings=512), (0, *range(10, 60))
    opt = random_model("opt", stop_ids=stop_ids, word_embed_proj_dim=16)  # which has linear layers outside its blocks
    for name, model in (("model", random_model("gpt2", stop_ids=stop_ids)), ("critic", critic), ("opt", opt)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = []
    for i in range(40):
        texts = (f"{'add ' * (i % 4)}{i} to {i}", f"#### {2 * i + 2}", f"#### {3 * i + 3}")
        prompt, right, wrong = ([{"role": r, "content": t}] for r, t in zip(("user", "assistant", "assistant"), texts))
        row = {"prompt": prompt, "completion": right, "chosen": right, "rejected": wrong}
        rows.append(row | {"category": "two" if i % 3 else "one"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text("import re\nimport zlib\n" + inspect.getsource(judge) + inspect.getsource(doubt))
    for category, items in RUBRICS.items():
        (folder / f"{category}.json").write_text(json.dumps({"category": category, "items": items}))
    return folder


def job(place, name, output_dir, **more):
    """What worker.py takes: the job's own settings, and those of all."""
    settings = {"num_steps": 2, "prompts_per_step": 4, "micro_batch_size": 6, "eval_prompts": 3, "eval_every": 1}
    settings |= {"model": str(place / "model"), "data": str(place / "data.jsonl"), "max_new_tokens": 4}
    script = name.partition("-")[0]
    settings |= {"num_minibatches": 1} if script == "ppo" else {}
    settings |= {} if script == "trpo" else {"learning_rate": 1e-3}
    settings |= {"reward": [f"{place}/mine.py:judge"], "output_dir": str(output_dir)} | JOBS[name] | more
    settings["model"] = str(place / Path(settings["model"]).name)
    if script not in ("sft", "dpo"):
        settings |= {"samples_per_prompt": 4, "temperature": 0.8}
    if script == "grape":
        settings |= {"rubric": [f"{place}/{name}.json" for name in RUBRICS], "critic_model": str(place / "critic")}
    return {"script": script, "args": settings}


@pytest.fixture(scope="module")
def both(place):
    """The folders of all jobs, run by one process and by two."""
    for processes in (1, 2):
        work(place, [job(place, name, place / str(processes) / name) for name in JOBS], processes)
    return place / "1", place / "2"


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_update_as_one_does(both, name):
    """Weights and figures, in float64; the start is the same for all jobs, and each has moved from it."""
    alone, together = (folder / name for folder in both)
    assert_same(together, alone)
    assert figures(alone)[-1].get("grad_norm", 1.0) > 0
    assert (together / "samples.jsonl").read_text() != ""


RESUMED = {"num_steps": 4, "save_every": 2, "eval_every": 2}


@pytest.fixture(scope="module")
def stopped(place):
    """Of two scripts, a run by one process, and runs by one and by two that were killed in their fourth step.

    Of two processes one is killed, in the middle of an update, so that the other one waits for it.
    """
    jobs = {"ppo": {"beta": 0.1}, "grpo-lora": {}, "dpo": {}}
    random = job(place, "grpo", place / "whole" / "random", **RESUMED, num_minibatches=2) | {"own_rollout": True}
    work(place, [random], 2)
    work(place, [job(place, name, place / "whole" / name, **RESUMED, **own) for name, own in jobs.items()], 1)
    for processes, names in ((1, ["ppo"]), (2, jobs)):
        for name in names:
            killed = job(place, name, place / "killed" / str(processes) / name, **RESUMED, **jobs[name])
            torchrun, start = (processes, name) == (2, "ppo"), time.monotonic()
            done = work(place, [killed | {"die": [processes - 1, 4]}], processes, torchrun, ends=False)
            assert time.monotonic() - start < 90 and (not torchrun or "Signal 9 (SIGKILL)" in done.stderr)
    random["args"]["output_dir"] = str(place / "killed" / "random")
    work(place, [random | {"die": [1, 4]}], 2, ends=False)
    return place


@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (1, 2)])
def test_a_killed_run_goes_on_with_as_many_processes_or_others(stopped, before, after):
    """It was killed in step 4, after step 2 was saved, and ends as if it never had been, or been another's."""
    folder = stopped / f"{before}-{after}"
    shutil.copytree(stopped / "killed" / str(before), folder)
    names = [path.name for path in folder.iterdir()]
    for name in names:
        assert [row["step"] for row in read_jsonl(folder / name / "metrics.jsonl")][-1] == 3
    resumed = [{"script": name.partition("-")[0], "args": {"resume": str(folder / name)}} for name in names]
    work(stopped, resumed, after)
    for name in names:
        assert_same(folder / name, stopped / "whole" / name)
        sampled = [row["step"] for row in read_jsonl(folder / name / "samples.jsonl")]
        assert sampled == sorted(sampled) and sampled.count(3) == 4 * (not name.startswith("dpo"))  # and once only


def test_each_process_goes_on_with_its_own_random_numbers(stopped):
    """With minibatches and samples by chance, as they are: to the last bit."""
    resumed = {"script": "grpo", "args": {"resume": str(stopped / "killed" / "random")}, "own_rollout": True}
    work(stopped, [resumed], 2)
    assert_same(stopped / "killed" / "random", stopped / "whole" / "random", 0.0)


def test_the_readmes_command_writes_and_says_everything_once(tmp_path):
    """A whole script, as a user starts it, in which each process draws random numbers of its own."""
    (tmp_path / "spy.py").write_text(
        "import os, pathlib, torch\n"
        "def drawn(completions, **columns):\n"
        "    if len(completions) > 21:  # in a step, for which each process has a seed of its own\n"
        "        pathlib.Path(__file__).with_name(os.environ['RANK']).write_text(str(torch.initial_seed()))\n"
        "    return [float(completion.strip().isdigit()) for completion in completions]\n"
    )
    flags = ["--num-steps", 3, "--eval-prompts", 41, "--eval-every", 3, "--reward", f"{tmp_path}/spy.py:drawn"]
    done = launch("grpo.py", "--output-dir", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "0").read_text() != (tmp_path / "1").read_text()
    lines = [line for line in done.stdout.splitlines() if "held-out drawn" in line]
    assert len(lines) == 1 and lines[0].endswith(f"model in {tmp_path / 'run' / 'model'}")
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    files = {"args.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "model"}
    assert {file.name for file in (tmp_path / "run").iterdir()} == files
    accuracy = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]["eval/drawn"] * 41
    assert accuracy == pytest.approx(round(accuracy), abs=1e-6)  # a mean over all 41, not of two halves' means


def test_ctrl_c_on_one_process_saves_on_all(tmp_path):
    """Torchrun passes the signal on, to each process at another moment: they agree on the step to stop after."""
    flags = ["--data", FEW, "--eval-prompts", "8", "--num-steps", "2000", "--output-dir", str(tmp_path / "run")]
    command, metrics = [*TORCHRUN, "sft.py", *flags], tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPO, env=ENVIRONMENT) as process:
        while not metrics.exists() or metrics.read_text().count("\n") < 4:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    steps = [row["step"] for row in read_jsonl(metrics)]
    told = f"stopped after step {steps[-1]}; go on with: torchrun --nproc-per-node 2 sft.py --resume '{tmp_path}/run'"
    assert process.returncode != 0 and told in errors
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"] == steps[-1] < 2000


def test_a_signal_that_both_torchrun_and_a_scheduler_send_does_not_end_at_once(tmp_path, monkeypatch):
    run = common.Run(grpo.Args(output_dir=str(tmp_path)))
    run.start([0], [0], model=(torch.nn.Linear(1, 1), None))
    steps = run.steps()
    next(steps)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    assert run.stopping
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    steps.close()
