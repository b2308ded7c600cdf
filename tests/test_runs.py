"""Runs that are stopped, killed, resumed and tracked, and what they leave and print."""

import functools
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import common

import numpy
import pytest
import torch
from process import Script, run_python
from test_scripts import FEW, REPO, SCRIPTS, read_jsonl

SMALL = {"prompts_per_step": 4, "eval_prompts": 4, "eval_every": 2, "num_steps": 5, "save_every": 2, "data": FEW}


class Killed(BaseException):
    pass


def outcome(folder):
    """All that a run leaves, but for its times."""
    files = {file.name: file.read_bytes() for file in (folder / "model").iterdir()}
    for name in ("metrics", "samples"):
        rows = read_jsonl(folder / f"{name}.jsonl")
        timed = ("time/", "memory/", "tokens_per_second")
        files[name] = [{key: row[key] for key in row if not key.startswith(timed)} for row in rows]
    return files


@functools.cache
def whole(script, **settings):
    """What a run leaves that was never stopped."""
    with tempfile.TemporaryDirectory() as folder:
        SCRIPTS[script].main(SCRIPTS[script].Args(**settings, output_dir=folder))
        return outcome(Path(folder))


def draw(completions, **columns):
    return [random.random() + numpy.random.rand() + torch.rand(1).item() for _ in completions]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(script, tmp_path, monkeypatch, capsys):
    """Killed in its fourth step, after metrics were written, with a checkpoint of its second."""
    module, log, folder = SCRIPTS[script], common.Run.log, tmp_path / "killed"
    own = {"sft": {"learning_rate": 1e-3, "eval_prompts": 40}}  # its accuracy changes at once
    settings = SMALL | own.get(script, {"reward": ("exact_answer", "test_runs:draw")})

    def log_and_die(run, step, metrics):
        log(run, step, metrics)
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "log", log_and_die)
        module.main(module.Args(**settings, output_dir=str(folder)))
    assert not (folder / "model").exists()
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    final = module.main(module.Args(resume=str(folder)))
    closing = capsys.readouterr().out.splitlines()[-1]
    expected = whole(script, **settings)
    assert outcome(folder) == expected
    name = "pairs" if script == "dpo" else "exact_answer"
    first, last = (expected["metrics"][i][f"eval/{name}"] for i in (0, -1))
    assert re.match(rf"{script}: held-out {name} {first:.3f} -> {last:.3f}( .*)? in ", closing)
    assert final[f"eval/{name}"] == last


def die_at(last, function=common.decay):
    """The function, which ends the run where its second argument is that one: common.decay, in a step's update."""

    def die(first, second):
        if second == last:
            raise Killed
        return function(first, second)

    return die


def kill(step, script, folder, monkeypatch, **settings):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common, "decay", die_at(step))
        SCRIPTS[script].main(SCRIPTS[script].Args(**settings, output_dir=str(folder)))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch):
    kill(2, "sft", tmp_path / "killed", monkeypatch, **SMALL)
    assert not (tmp_path / "killed" / "checkpoint").exists()
    SCRIPTS["sft"].main(SCRIPTS["sft"].Args(resume=str(tmp_path / "killed")))
    assert outcome(tmp_path / "killed") == whole("sft", **SMALL)


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_kill_during_a_save_leaves_the_last_good_checkpoint(moment, tmp_path):
    """Killed in the save of step 4, halfway through its bytes, or when they are all written but not yet in place."""
    folder, name = tmp_path / "run", moment.split(".")
    patch = f"""
import io, json, os, signal, sys
import common, grpo, torch
owner, name, calls = {name[0]}, "{name[1]}", []
original = getattr(owner, name)
def killed(*arguments):
    calls.append(arguments)
    if len(calls) == 2 + (name == "replace"):  # its first is args.json's
        if name == "save":
            original(arguments[0], whole := io.BytesIO())
            arguments[1].write(whole.getvalue()[:whole.tell() // 2])
            arguments[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, name, killed)
grpo.main(grpo.Args(output_dir="{folder}", **json.loads(sys.argv[1])))
"""
    done = run_python("-c", patch, json.dumps(SMALL), cwd=REPO)
    assert done.returncode == -signal.SIGKILL
    assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    SCRIPTS["grpo"].main(SCRIPTS["grpo"].Args(resume=str(folder)))
    assert outcome(folder) == whole("grpo", **SMALL)


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(tmp_path):
    settings = ["--num-steps", 100_000, "--prompts-per-step", 4, "--eval-prompts", 4, "--eval-every", 100_000]
    process = Script(["reinforce.py", *settings, "--save-every", 0, "--output-dir", tmp_path / "run"], cwd=REPO)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    done = process.wait(60)
    steps = read_jsonl(metrics)[-1]["step"]
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last == f"stopped after step {steps}; go on with: python reinforce.py --resume '{tmp_path}/run'"
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"] == steps


def test_sigterm_saves_like_ctrl_c_and_a_second_one_ends_at_once(tmp_path, monkeypatch):
    """What a scheduler sends before it takes the machine away; the handlers are as before afterwards."""
    log, signals, before = common.Run.log, {2: 1, 3: 1}, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def log_and_terminate(run, step, metrics):
        log(run, step, metrics)
        for _ in range(signals.get(step, 0)):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(common.Run, "log", log_and_terminate)
    sft = SCRIPTS["sft"]
    with pytest.raises(SystemExit, match="stopped after step 2; go on with"):
        sft.main(sft.Args(**SMALL, output_dir=str(tmp_path / "stopped")))
    with (tmp_path / "stopped" / "samples.jsonl").open("a") as file:
        file.write("{}\n" * 99)  # of steps that a kill took: they are cut off, and no hole stays there
    with pytest.raises(SystemExit, match="stopped after step 3; go on with"):
        sft.main(sft.Args(resume=str(tmp_path / "stopped")))
    signals = {3: 2}
    with pytest.raises(KeyboardInterrupt):
        sft.main(sft.Args(**SMALL, output_dir=str(tmp_path / "ended")))
    assert torch.load(tmp_path / "ended" / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    monkeypatch.undo()
    sft.main(sft.Args(resume=str(tmp_path / "stopped")))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert outcome(tmp_path / "stopped") == whole("sft", **SMALL)


def test_a_finished_run_has_all_and_can_go_on(tmp_path, monkeypatch):
    """Killed while its model is saved, it only saves that again; with more steps it trains on."""
    sft, folder = SCRIPTS["sft"], tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", die_at(folder / "model", os.replace))  # its last act
        sft.main(sft.Args(**SMALL, output_dir=str(folder)))
    sft.main(sft.Args(resume=str(folder)))
    assert outcome(folder) == whole("sft", **SMALL)
    assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["step"] == 5
    assert sft.main(sft.Args(resume=str(folder), num_steps=7))["step"] == 7
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == list(range(8))
    assert outcome(folder)["model.safetensors"] != whole("sft", **SMALL)["model.safetensors"]
    assert json.loads((folder / "args.json").read_text())["num_steps"] == 7


def test_a_run_in_a_thread_and_one_that_fails_leave_signals_as_they_were(tmp_path, monkeypatch):
    def broken(completions, **columns):
        if len(completions) > SMALL["eval_prompts"]:  # in a step
            raise ConnectionError("the judge is down")
        return [0.0] * len(completions)

    monkeypatch.setattr(common, "broken", broken, raising=False)
    before, grpo, results = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], SCRIPTS["grpo"], []
    with pytest.raises(ConnectionError, match="the judge is down") as kept:  # as a notebook keeps the last traceback
        grpo.main(grpo.Args(reward=("broken",), output_dir=str(tmp_path / "broken"), **SMALL))
    assert kept.tb and [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    args = grpo.Args(output_dir=str(tmp_path / "thread"), **SMALL)
    thread = threading.Thread(target=lambda: results.append(grpo.main(args)["step"]))
    thread.start()
    thread.join()
    assert results == [5]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_wandb_gets_each_steps_metrics_once_after_a_resume_too(tmp_path, monkeypatch):
    """Wandb is a stand-in here, which takes a step that it has had only once, as the real one does."""
    begun, logged, sft, folder = [], {}, SCRIPTS["sft"], tmp_path / "run"

    def log(metrics, step):
        logged.setdefault(step, metrics)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **x: begun.append(x), log=log))
    kill(4, "sft", folder, monkeypatch, **SMALL, track="wandb")
    sft.main(sft.Args(resume=str(folder)))
    assert [(call["dir"], call["config"]["num_steps"]) for call in begun] == [(folder, 5)] * 2
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [*logged] == [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    for name in ("loss/sft", "eval/exact_answer"):
        assert [logged[row["step"]][name] for row in rows if name in row] == [row[name] for row in rows if name in row]


def test_runs_of_one_moment_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {common.Run(SCRIPTS["sft"].Args()).dir for _ in range(50)}
    assert len(folders) == 50


def test_the_terminal_shows_what_a_model_says_and_takes_no_command_of_it(tmp_path, capsys, tokenizer):
    run = common.Run(SCRIPTS["sft"].Args(output_dir=str(tmp_path / "run")))
    run.start([1] * 64, [1], model=(torch.nn.Linear(9, 1), None))
    assert capsys.readouterr().out.splitlines() == [
        "model  models/arithmetic: trains 1e-05 M of 1e-05 M parameters; auto, auto",
        "rows   64 to train on, 1 held out; 100 steps, 1.0 to an epoch",
        f"run    {tmp_path / 'run'}",
        "1 held-out rows: too few to tell much; give others by --eval-data, or more --eval-prompts",
    ]
    said = ["\x1b[2J\x07\r85\x9b", 200 * "a" + 200 * "b", *"bc"]
    scores = {"right": torch.tensor([1.0, 0, 0, 0]), "long": torch.tensor([0.5] * 4)}
    for step, count in ((0, 3), (1, 1), (100, 3)):
        run.log_samples(step, "eval", tokenizer, [{"prompt": "a\nb" + 99 * "c"}] * 4, said, scores)
        run.log(step, {"eval/right": scores["right"], "eval/none": torch.tensor([torch.nan]), "reward/mean": 12.3})
        figures, *samples = capsys.readouterr().out.splitlines()  # that of four rows; samples.jsonl has all
        assert re.fullmatch(rf"step {step}  right 0.250  reward 12  \d+ s", figures) and len(samples) == count
        assert count == 1 or samples[1].endswith("-> '" + 69 * "a" + " ... " + 69 * "b" + "' | right 0 long 0.5")
        assert samples[0] == "    '" + r"a\nb" + 99 * "c" + r"' -> '\x1b[2J\x07\r85\x9b' | right 1 long 0.5"
    assert run.bar.postfix == "right .25 reward 12.30 0 tok/s"
    for step in (1, 2):
        run.log(step, {"completion/truncated": torch.ones(3), "group/zero_std": torch.tensor([1.0, 0.0])})
    run.log(3, {"eval/right": 0.1, "eval/truncated": 1.0})
    advice = [f"step {i}: {common.ADVICE[name]}" for i, name in ((1, "completion/truncated"), (3, "eval/truncated"))]
    assert re.findall("step .: .*", capsys.readouterr().out) == advice
    run.log(4, {"eval/right": 0.1, "eval/margin": 0.2, "eval/truncated": 0.25, "reward/margin": 0.3, "kl/ref": 20.0})
    assert "step 4  right 0.100  margin 0.200  truncated 0.250  train margin 0.300  kl 20  " in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert [row["completion"] for row in rows] == 3 * said and [row["right"] for row in rows] == 3 * [1, 0, 0, 0]


@pytest.mark.parametrize(("name", "said"), [("right", " (0.900 at step 1)"), ("loss", " (0.100 at step 2)")])
def test_the_closing_line_names_the_best_evaluation(name, said, tmp_path, capsys):
    model, tokenizer = common.load_model("models/arithmetic", "cpu")
    run = common.Run(SCRIPTS["sft"].Args(output_dir=str(tmp_path)))
    run.start([1], [1], model=(model, None))
    for step, value in enumerate((0.3, 0.9, 0.1, 0.5)):
        run.log(step, {"eval/none": torch.tensor([torch.nan]), f"eval/{name}": value})
    run.finish(model, tokenizer)
    assert f"held-out {name} 0.300 -> 0.500{said} in 0 s" in capsys.readouterr().out
