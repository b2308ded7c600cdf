"""Runs that are stopped, killed, resumed, tracked, or that a user's mistake ends."""

import json
import signal
import sys
import time
from types import SimpleNamespace

import common

import pytest
import torch
from process import Script, run_python
from test_scripts import REPO, SCRIPTS, read_jsonl

SMALL = {"prompts_per_step": 4, "eval_prompts": 4, "eval_every": 2, "num_steps": 5, "save_every": 2}


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(script, tmp_path, monkeypatch, capsys):
    """Killed in its fourth step, after metrics were written, with a checkpoint of its second."""
    module, log = SCRIPTS[script], common.Run.log
    fast = {"learning_rate": 1e-3, "eval_prompts": 40} if script == "sft" else {}  # its accuracy changes at once
    module.main(module.Args(**SMALL | fast, output_dir=str(tmp_path / "whole")))
    closing = capsys.readouterr().out.splitlines()[-1].partition(" in ")[0]

    def log_and_die(run, step, metrics):
        log(run, step, metrics)
        if step == 4:
            raise Killed

    monkeypatch.setattr(common.Run, "log", log_and_die)
    monkeypatch.setattr(common.Run, "save", lambda run, step: step < 4 and SAVE(run, step))
    with pytest.raises(Killed):
        module.main(module.Args(**SMALL | fast, output_dir=str(tmp_path / "killed")))
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "model").exists()
    assert [row["step"] for row in read_jsonl(tmp_path / "killed" / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    final = module.main(module.Args(resume=str(tmp_path / "killed")))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert capsys.readouterr().out.splitlines()[-1].partition(" in ")[0] == closing
    assert final["eval/accuracy"] == read_jsonl(tmp_path / "whole" / "metrics.jsonl")[-1]["eval/accuracy"]


SAVE = common.Run.save


def test_a_reward_that_draws_random_numbers_draws_on_after_a_resume(tmp_path, monkeypatch):
    (tmp_path / "lottery.py").write_text(
        "import random, numpy, torch\n"
        "def draw(prompts, completions, **columns):\n"
        "    return [random.random() + numpy.random.rand() + torch.rand(1).item() for _ in prompts]\n"
    )
    settings = SMALL | {"reward": (f"{tmp_path / 'lottery.py'}:draw",)}
    grpo = SCRIPTS["grpo"]
    grpo.main(grpo.Args(**settings, output_dir=str(tmp_path / "whole")))
    monkeypatch.setattr(common.Run, "check_finite", die_at(4))
    with pytest.raises(Killed):
        grpo.main(grpo.Args(**settings, output_dir=str(tmp_path / "killed")))
    monkeypatch.undo()
    grpo.main(grpo.Args(resume=str(tmp_path / "killed")))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def die_at(last, check_finite=common.Run.check_finite):
    """A check_finite that ends the run in that step, before its update."""

    def check(run, step, norm):
        if step == last:
            raise Killed
        return check_finite(run, step, norm)

    return check


# A process that has imported everything and computed nothing; what it forks is a run that starts at once.
KILLER = """
import json, os, random, shutil, signal, sys, time
import common, grpo, torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

folder, settings, chance = sys.argv[1], json.loads(sys.argv[2]), random.Random(int(sys.argv[3]))
checkpoint, kills, before = os.path.join(folder, "checkpoint", "state.pt"), 0, 0
while True:
    saved = os.path.exists(checkpoint)
    if not saved:
        shutil.rmtree(folder, ignore_errors=True)
    start, child = time.time(), os.fork()
    if child == 0:
        args = grpo.Args(resume=folder) if saved else grpo.Args(output_dir=folder, **settings)
        grpo.main(args)
        os._exit(0)
    seconds = chance.uniform(0.0, 2.5 * (1 + kills / 10) if kills else 0.3)  # so that slow machines get on, too
    done, status = 0, 0
    while not done and time.time() - start < seconds:
        time.sleep(0.002)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    elif status == 0:
        break
    else:
        sys.exit("a run ended by itself")
    if os.path.exists(checkpoint):
        step = torch.load(checkpoint, weights_only=True)["step"]
        assert step >= before, (step, before)
        before = step
print("kills", kills)
"""
# 30 steps of about 0.1 s, a third of it the save; a start takes 0.5 s


def test_killed_at_random_moments_a_run_ends_in_the_same_weights(tmp_path):
    settings = SMALL | {"num_steps": 30, "save_every": 1, "samples_per_prompt": 4, "eval_every": 30}
    grpo = SCRIPTS["grpo"]
    grpo.main(grpo.Args(**settings, output_dir=str(tmp_path / "whole")))
    done = run_python("-c", KILLER, tmp_path / "killed", json.dumps(settings), time.time_ns(), cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 1
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_kill_during_a_save_leaves_the_last_good_checkpoint(moment, tmp_path):
    """Killed in the save of step 4, halfway through its bytes, or when they are all written but not yet in place."""
    folder, name = tmp_path / "run", moment.split(".")
    patch = f"""
import json, os, signal, sys
import common, grpo, torch
owner, name, calls = {name[0]}, "{name[1]}", []
original = getattr(owner, name)
def killed(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
        if name == "save":
            original(arguments[0], "{folder}/whole.pt")
            data = open("{folder}/whole.pt", "rb").read()
            arguments[1].write(data[:len(data) // 2])
            arguments[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, name, killed)
grpo.main(grpo.Args(output_dir="{folder}", **json.loads(sys.argv[1])))
"""
    done = run_python("-c", patch, json.dumps(SMALL), cwd=REPO)
    assert done.returncode == -signal.SIGKILL
    assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    grpo = SCRIPTS["grpo"]
    grpo.main(grpo.Args(resume=str(folder)))
    grpo.main(grpo.Args(**SMALL, output_dir=str(tmp_path / "whole")))
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(tmp_path):
    settings = ["--num-steps", "100000", "--prompts-per-step", "4", "--eval-prompts", "4", "--eval-every", "100000"]
    process = Script([REPO / "reinforce.py", *settings, "--save-every", "0", "--output-dir", "run"], cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    done = process.wait(60)
    steps = read_jsonl(metrics)[-1]["step"]
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last == f"stopped after step {steps}; go on with: python {REPO / 'reinforce.py'} --resume run"
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"] == steps


@pytest.mark.parametrize("killed_in", [1, 2])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(killed_in, tmp_path, monkeypatch):
    sft, settings = SCRIPTS["sft"], SMALL | {"num_steps": 3, "save_every": 3}
    sft.main(sft.Args(**settings, output_dir=str(tmp_path / "whole")))
    monkeypatch.setattr(common.Run, "check_finite", die_at(killed_in))
    with pytest.raises(Killed):
        sft.main(sft.Args(**settings, output_dir=str(tmp_path / "killed")))
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "checkpoint").exists()
    sft.main(sft.Args(resume=str(tmp_path / "killed")))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_sigterm_saves_like_ctrl_c_and_a_second_one_ends_at_once(tmp_path, monkeypatch):
    """What a scheduler sends before it takes the machine away; the handlers are as before afterwards."""
    log, twice, before = common.Run.log, False, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def log_and_terminate(run, step, metrics):
        log(run, step, metrics)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
            if twice:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(common.Run, "log", log_and_terminate)
    sft = SCRIPTS["sft"]
    with pytest.raises(SystemExit, match="stopped after step 3; go on with"):
        sft.main(sft.Args(**SMALL, output_dir=str(tmp_path / "stopped")))
    twice = True
    with pytest.raises(KeyboardInterrupt):
        sft.main(sft.Args(**SMALL, output_dir=str(tmp_path / "ended")))
    assert torch.load(tmp_path / "ended" / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    monkeypatch.undo()
    sft.main(sft.Args(resume=str(tmp_path / "stopped")))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    sft.main(sft.Args(**SMALL, output_dir=str(tmp_path / "whole")))
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_signal_while_the_model_is_saved_does_not_lose_it(tmp_path, monkeypatch):
    get_state = common.get_state
    monkeypatch.setattr(common, "get_state", lambda *part: signal.raise_signal(signal.SIGTERM) or get_state(*part))
    sft = SCRIPTS["sft"]
    sft.main(sft.Args(**SMALL | {"save_every": 0}, output_dir=str(tmp_path / "run")))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_tensorboard_gets_each_steps_metrics_once_after_a_resume_too(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sft, folder, settings = SCRIPTS["sft"], tmp_path / "run", SMALL | {"track": "tensorboard"}
    monkeypatch.setattr(common.Run, "check_finite", die_at(4))
    with pytest.raises(Killed):
        sft.main(sft.Args(**settings, output_dir=str(folder)))
    monkeypatch.undo()
    sft.main(sft.Args(resume=str(folder)))
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    rows = read_jsonl(folder / "metrics.jsonl")
    for name in ("loss/sft", "eval/accuracy"):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in expected
        ]


def test_wandb_takes_tensorboards_metrics_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    """A stand-in for the package: what is called, with what, before the first metric is written."""
    calls, sft, folder = [], SCRIPTS["sft"], tmp_path / "run"

    def init(**settings):
        calls.append(settings | {"begun": (folder / "tensorboard").exists()})

    wandb = SimpleNamespace(init=init, __spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(common.Run, "check_finite", die_at(4))
    with pytest.raises(Killed):
        sft.main(sft.Args(**SMALL, track="wandb", output_dir=str(folder)))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sft.main(sft.Args(resume=str(folder)))
    assert [call.pop("begun") for call in calls] == [False, True]
    first, second = calls
    assert first.pop("config")["num_steps"] == second.pop("config")["num_steps"] == 5
    assert first == second and first["resume"] == "allow" and first["sync_tensorboard"]
    assert first["id"].startswith("run-") and first["dir"] == folder


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_any_step(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(package, package), None)
    monkeypatch.setattr(common.Run, "steps", lambda run: pytest.fail("a step was made"))
    with pytest.raises(SystemExit, match=f"--track {package}: install the package: .*{package}"):
        SCRIPTS["sft"].main(SCRIPTS["sft"].Args(track=package, output_dir=str(tmp_path / "run")))


def test_the_terminal_shows_some_completions_with_their_rewards(tmp_path, capsys):
    sft = SCRIPTS["sft"]
    sft.main(sft.Args(**SMALL, reward=("exact_answer", "length"), output_dir=str(tmp_path / "run")))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    shown = [row for row in read_jsonl(tmp_path / "run" / "samples.jsonl") if row["phase"] == "eval"]
    assert len(lines) == 4 * 3  # at steps 0, 2, 4 and 5, of 4 prompts each
    first = shown[0]
    rewards = f"exact_answer {first['exact_answer']:.3g} length {first['length']:.3g}"
    assert lines[0] == f"step 0     {first['prompt']!r} -> {first['completion']!r} | {rewards}"


def test_what_a_model_says_cannot_command_the_terminal(tmp_path, capsys, tokenizer):
    sft = SCRIPTS["sft"]
    run = common.Run(sft.Args(output_dir=str(tmp_path / "run")))
    run.start()
    said = ["\x1b[2J\x07\r85\x9b"]
    run.log_samples(0, "eval", tokenizer, [{"prompt": "a\nb"}], said, {"right": torch.tensor([1.0])})
    assert capsys.readouterr().out.strip() == r"step 0     'a\nb' -> '\x1b[2J\x07\r85\x9b' | right 1"
