"""Whole runs: each script learns from the embedded default, and runs on a chat model with a data file of its own."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import common
import dpo
import grape
import grpo
import ppo
import reinforce
import rejection_sampling
import sft
import trpo

import copies
import pytest
import torch
import tyro

REPO = Path(__file__).parent.parent
MODULES = (sft, rejection_sampling, reinforce, trpo, ppo, grpo, dpo, grape)
SCRIPTS = {module.__name__: module for module in MODULES}
SAMPLING = [name for name in SCRIPTS if name not in ("sft", "dpo")]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# steps, and the held-out accuracy that they must reach from at most 0.35
TARGETS = {"sft": (40, 0.9), "rejection_sampling": (30, 0.7), "reinforce": (60, 0.7), "trpo": (12, 0.5)}
TARGETS |= {"ppo": (40, 0.7), "grpo": (60, 0.7), "dpo": (60, 0.65), "grape": (60, 0.7)}


@pytest.mark.parametrize(("script", "steps", "target"), [(name, *TARGETS[name]) for name in SCRIPTS])
def test_learns(script, steps, target, tmp_path, monkeypatch, capsys):
    """With the flags that a user gives, from a folder that is not the scripts'; one of them in a process of its own."""
    out = tmp_path / "run"
    flags = ["--num-steps", str(steps), "--eval-every", "20", "--output-dir", str(out)]
    if script == "sft":
        command = [sys.executable, str(REPO / f"{script}.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        monkeypatch.chdir(tmp_path)
        SCRIPTS[script].main(tyro.cli(SCRIPTS[script].Args, args=flags))
        printed = capsys.readouterr().out
    pattern = rf"{script}: held-out accuracy (\d\.\d+) -> (\d\.\d+) in \d+ s, model in {re.escape(str(out))}/model"
    before, after = map(float, re.fullmatch(pattern, printed.strip().splitlines()[-1]).groups())
    assert 0.15 <= before <= 0.35 and after >= target
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(steps + 1))
    assert json.loads((out / "args.json").read_text())["num_steps"] == steps
    assert {row["step"] for row in read_jsonl(out / "samples.jsonl")} >= {0, steps}
    names = {name for row in metrics for name in row}
    assert {"eval/accuracy", "tokens_per_second", "time/update", "completion/length"} <= names
    if script in SAMPLING:
        assert {"reward/mean", "completion/truncated", "group/zero_std", "policy/entropy"} <= names
        assert ("reward/right" if script == "grape" else "reward/exact_answer") in names


@pytest.mark.parametrize("script", SCRIPTS)
def test_chat_model_with_own_data(script, tmp_path, chat_model, chat_data):
    """Absolute positions, a padded vocabulary, pad equal to EOS, a chat template; then a rerun from the saved model."""
    module, folder = SCRIPTS[script], chat_model
    for run in ("first", "second"):
        args = module.Args(model=folder, data=chat_data, num_steps=2, prompts_per_step=4, eval_every=1)
        args.output_dir, args.max_new_tokens, args.micro_batch_size = str(tmp_path / run), 6, 5
        args.reward, args.reward_weights = ("exact_answer", "length"), (1.0, 0.1)
        if script in ("dpo", "sft"):
            args.micro_batch_size = 2
        if script == "rejection_sampling":
            args.threshold = -1.0
        module.main(args)
        assert all(map(torch.isfinite, map(torch.tensor, read_jsonl(tmp_path / run / "metrics.jsonl")[-1].values())))
        samples = read_jsonl(tmp_path / run / "samples.jsonl")
        assert all(row["prompt"].startswith("<user>add") or row["prompt"].startswith("<user>") for row in samples)
        assert all(row["prompt"].endswith("<assistant>") for row in samples)
        assert all({"exact_answer", "length"} <= set(row) for row in samples if row["phase"] == "eval")
        before = common.load_model(folder, torch.device("cpu"))[0].state_dict()
        after = common.load_model(str(tmp_path / run / "model"), torch.device("cpu"))[0].state_dict()
        assert any((before[name] != after[name]).any() for name in before)
        folder = str(tmp_path / run / "model")


@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batch_size_changes_nothing(script, tmp_path):
    results = []
    for size in (32, 4 if script == "dpo" else 3):
        args = SCRIPTS[script].Args(
            num_steps=3, prompts_per_step=4, eval_every=3, eval_prompts=8, micro_batch_size=size
        )
        args.output_dir = str(tmp_path / str(size))
        results.append(SCRIPTS[script].main(args))
    for name in ("loss/sft", "loss/policy", "loss/value", "loss/dpo", "kl/ref", "kl/old", "reward/mean", "grad_norm"):
        if name in results[0]:
            assert results[0][name] == pytest.approx(results[1][name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("script", ["ppo", "grpo", "grape"])
def test_ratio_is_1_on_the_first_minibatch(script, tmp_path, monkeypatch):
    """To the last bit, though the sampler's own log-probs are others, as a KV cache's or another engine's may be."""
    module, ratios = SCRIPTS[script], []
    policy_loss, rollout = module.policy_loss, module.rollout

    def another_engine(*args, **settings):
        ids, mask, logprobs, truncated = rollout(*args, **settings)
        return ids, mask, logprobs - 0.05 * mask, truncated

    def spy(logprobs, old_logprobs, *args, **settings):
        ratios.append(((logprobs - old_logprobs).abs().max().item(), old_logprobs.sum(1).sort().values))
        return policy_loss(logprobs, old_logprobs, *args, **settings)

    monkeypatch.setattr(module, "rollout", another_engine)
    monkeypatch.setattr(module, "policy_loss", spy)
    args = module.Args(num_steps=1, prompts_per_step=16, num_epochs=3, num_minibatches=1, eval_prompts=2)
    args.learning_rate, args.temperature, args.output_dir = 1e-3, 0.7, str(tmp_path / "run")
    args.dtype = "bfloat16"
    module.main(args)
    assert len(ratios) == 3
    assert ratios[0][0] == 0.0 and ratios[1][0] > 0.01 and ratios[2][0] > 0.01
    assert (ratios[0][1] == ratios[2][1]).all()  # frozen at the rollout, in each pass in an order of its own


def test_ppo_scores_stop_tokens_and_bootstraps_what_was_cut_off(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("def one(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    rollouts, gaes = [], []
    rollout, compute_gae = ppo.rollout, ppo.compute_gae
    monkeypatch.setattr(ppo, "rollout", lambda *a, **k: rollouts.append(rollout(*a, **k)) or rollouts[-1])
    monkeypatch.setattr(ppo, "compute_gae", lambda *a, **k: gaes.append((a, k)) or compute_gae(*a, **k))
    args = ppo.Args(num_steps=2, prompts_per_step=16, max_new_tokens=3, eval_prompts=1, eval_every=5, beta=0.0)
    args.reward, args.output_dir = (f"{tmp_path}/one.py:one",), str(tmp_path / "run")
    ppo.main(args)
    ids, mask, _, _ = rollouts[2]  # of the second step, after evaluation and the first; the value head has left 0
    (token_rewards, _, gae_mask), settings = gaes[1]
    ended = ((ids == 0) & (mask > 0)).any(1)
    assert ended.any() and not ended.all() and (gae_mask == mask).all()
    expected = torch.zeros_like(mask)
    expected[torch.arange(len(ids)), mask.sum(1).long() - 1] = ended.float()
    assert (token_rewards == expected).all()
    assert (settings["bootstrap"][ended] == 0).all() and (settings["bootstrap"][~ended] != 0).all()


@pytest.mark.parametrize("script", ["reinforce", "trpo", "ppo", "grpo", "grape"])
def test_micro_batches_keep_a_prompts_rows_together(script, tmp_path, monkeypatch):
    """So that each prompt is computed once in the update: in micro-batches of G rows there is one prompt in each."""
    module, prompts, lengths = SCRIPTS[script], [], []
    token_logprobs = module.token_logprobs

    def spy(model, prompt_ids, prompt_mask, completion_ids, completion_mask, **settings):
        if torch.is_grad_enabled():
            prompts.append(len(prompt_ids.unique(dim=0)))
            lengths.append(completion_mask.sum(1).max().item())
        return token_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, **settings)

    monkeypatch.setattr(module, "token_logprobs", spy)
    args = module.Args(num_steps=1, prompts_per_step=8, samples_per_prompt=4, micro_batch_size=4, eval_prompts=2)
    args.output_dir, args.reward = str(tmp_path / "run"), (f"{tmp_path}/rising.py:rising",)  # no tie is left out
    (tmp_path / "rising.py").write_text("def rising(completions, **columns):\n    return range(len(completions))\n")
    if script in ("ppo", "grpo", "grape"):
        args.num_epochs = args.num_minibatches = 1
    module.main(args)
    assert prompts == [1] * 8
    assert lengths == sorted(lengths)  # and those of like length follow each other


@pytest.mark.parametrize("script", SAMPLING)
def test_a_step_that_nothing_could_score_leaves_the_weights_finite(script, tmp_path, capsys):
    judge = "return [0.0 if len(prompts) == 2 else None for _ in prompts]"  # 2 in an evaluation, more in a step
    (tmp_path / "down.py").write_text(f"def judge(prompts, completions, **columns):\n    {judge}\n")
    args = SCRIPTS[script].Args(num_steps=2, prompts_per_step=2, eval_prompts=2, reward=(f"{tmp_path}/down.py:judge",))
    args.output_dir = str(tmp_path / "run")
    if script == "grape":
        item = {"name": "judge", "weight": 1, "verifier": "down.py:judge"}
        (tmp_path / "rubric.json").write_text(json.dumps({"category": "any", "items": [item]}))
        args.rubric = (str(tmp_path / "rubric.json"),)
    SCRIPTS[script].main(args)
    model, _ = common.load_model(str(tmp_path / "run" / "model"), torch.device("cpu"))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "step 2: no reward could score any completion" in capsys.readouterr().out


@pytest.mark.parametrize("script", SAMPLING)
def test_seconds_in_a_reward_are_the_scores_and_not_the_updates(script, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "def slow(prompts, completions, **columns):\n"
        "    time.sleep(0.0 if len(prompts) == 1 else 2.0)\n"
        "    return [float(len(completion)) for completion in completions]\n"
    )
    args = SCRIPTS[script].Args(num_steps=1, prompts_per_step=2, samples_per_prompt=2, eval_prompts=1)
    args.reward, args.output_dir = (f"{tmp_path}/slow.py:slow",), str(tmp_path / "run")
    if script == "grape":
        item = {"name": "slow", "weight": 1, "verifier": "slow.py:slow"}
        (tmp_path / "rubric.json").write_text(json.dumps({"category": "any", "items": [item]}))
        args.rubric = (str(tmp_path / "rubric.json"),)
    metrics = SCRIPTS[script].main(args)
    assert metrics["time/score"] >= 2.0 > metrics["time/update"] + metrics["time/rollout"] > 0


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "gspo", "cispo"])
def test_grpo_loss_types_run_over_several_updates(loss_type, tmp_path):
    args = grpo.Args(num_steps=3, prompts_per_step=4, num_epochs=2, num_minibatches=2, loss_type=loss_type)
    args.eval_every, args.eval_prompts, args.overlong_buffer = 3, 8, 4
    args.learning_rate, args.output_dir = 1e-3, str(tmp_path / "run")
    metrics = grpo.main(args)
    assert metrics["kl/old"] > 0  # old log-probs are frozen while the policy moves
    assert metrics["policy/clip_frac"] > 0 or loss_type == "cispo"
    assert "kl/ref" not in metrics  # no reference model where the paper has none
    recorded = json.loads((tmp_path / "run" / "args.json").read_text())
    assert {name: recorded[name] for name in grpo.PAPER_SETTINGS[loss_type]} == grpo.PAPER_SETTINGS[loss_type]


def test_ppo_stops_a_rollouts_updates_at_target_kl(tmp_path, monkeypatch):
    """The norm that is logged is of the updates that were made, not of the minibatch that the bound stopped."""
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a)) or norms[-1])
    args = ppo.Args(num_steps=1, prompts_per_step=4, num_epochs=8, target_kl=1e-6, eval_prompts=8)
    args.output_dir = str(tmp_path / "run")
    stopped = ppo.main(args)
    norms = norms[1::2]  # after the value model's the policy's
    assert 0 < len(norms) < 8 and stopped["grad_norm"] == pytest.approx((sum(norms) / len(norms)).item())
    args.target_kl, args.output_dir = None, str(tmp_path / "free")
    assert stopped["kl/old"] < 0.5 * ppo.main(args)["kl/old"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_weights_however_often_it_is_evaluated(script, tmp_path):
    """To the last bit: evaluations are greedy, and draw nothing from the training's random numbers."""
    weights, samples = [], []
    for run, seed, eval_every in (("a", 1, 1), ("b", 1, 5), ("c", 2, 5)):
        args = SCRIPTS[script].Args(num_steps=3, prompts_per_step=8, eval_prompts=8, seed=seed, eval_every=eval_every)
        args.output_dir = str(tmp_path / run)
        SCRIPTS[script].main(args)
        weights.append(common.load_model(str(tmp_path / run / "model"), torch.device("cpu"))[0].state_dict())
        rows = read_jsonl(tmp_path / run / "samples.jsonl")
        samples.append([row for row in rows if row["phase"] == "eval" and row["step"] == 0])
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert any((weights[0][name] != weights[2][name]).any() for name in weights[0])
    assert samples[0] == samples[1] == samples[2]  # the starting model's greedy answers, whatever the seed


@pytest.mark.parametrize("script", SCRIPTS)
def test_bfloat16_forward_passes_leave_float32_parameters_that_small_steps_move(script, tmp_path, monkeypatch):
    """Of bfloat16 weights a step of 1e-6 rounds 98 in 100 away (NVIDIA-NeMo/RL#2322)."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        seen.append({p.dtype for p in parameters} | {p.grad.dtype for p in parameters})
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    args = SCRIPTS[script].Args(num_steps=2, prompts_per_step=16, eval_prompts=2, dtype="bfloat16")
    args.output_dir = str(tmp_path / "run")
    if script != "trpo":
        args.learning_rate = 1e-6
    SCRIPTS[script].main(args)
    assert script == "trpo" or set.union(*seen) == {torch.float32}
    before = common.load_model("models/arithmetic", torch.device("cpu"))[0].state_dict()
    after = common.load_model(str(tmp_path / "run" / "model"), torch.device("cpu"))[0].state_dict()
    layers = [name for name in before if "layers" in name and "norm" not in name]
    moved = sum((before[name] != after[name]).sum() for name in layers) / sum(before[name].numel() for name in layers)
    assert moved > 0.9


def test_sft_drops_rows_that_are_too_long_and_fakes_no_stop_token(tmp_path, monkeypatch, capsys):
    """A row that was cut off would teach to stop, or not to, in the middle of an answer (huggingface/trl#3091)."""
    rows = [{"prompt": "What is 1 + 1?", "completion": " 2" * n} for n in (1, 2, 9)]
    rows += [{"prompt": "What is 2 + 2?", "completion": " 4"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "e.jsonl").write_text(json.dumps(rows[0]) + "\n")
    seen, collate = [], sft.collate
    monkeypatch.setattr(sft, "collate", lambda examples, device: seen.extend(examples) or collate(examples, device))
    settings = {"data": str(tmp_path / "d.jsonl"), "eval_data": str(tmp_path / "e.jsonl"), "num_steps": 2}
    args = sft.Args(prompts_per_step=3, eval_prompts=1, max_length=20, output_dir=str(tmp_path / "run"), **settings)
    sft.main(args)
    assert "dropped 1 of 4 answers" in capsys.readouterr().out
    assert len(seen) == 6 and {len(completion) for _, completion in seen} == {3, 5}
    assert all(completion[-1] == 0 and 0 not in completion[:-1] for _, completion in seen)
    args.max_length, args.output_dir = 5, str(tmp_path / "none")
    with pytest.raises(SystemExit, match="--max-length 5"):
        sft.main(args)


def test_ppos_value_model_starts_at_0_and_shares_nothing_with_the_policy(tmp_path, monkeypatch):
    """So no gradient of the values reaches the policy, and the first advantages are the returns."""
    groups, values = [], []
    step, compute_gae = torch.optim.AdamW.step, ppo.compute_gae
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: groups.append(self.param_groups) or step(self))
    monkeypatch.setattr(ppo, "compute_gae", lambda r, v, *a, **k: values.append(v) or compute_gae(r, v, *a, **k))
    ppo.main(ppo.Args(num_steps=1, prompts_per_step=4, eval_prompts=2, output_dir=str(tmp_path / "run")))
    policy, value = ({p.data_ptr() for p in param_groups[0]["params"]} for param_groups in groups[:2])
    assert policy and value and not policy & value
    assert (values[0] == 0).all()


def test_settings_are_those_of_the_papers():
    """Typed from the papers once more: clip, std and beta of each loss type, beta of each DPO loss."""
    papers = {
        "grpo": (0.2, 0.2, "std", 0.04),  # arXiv 2402.03300, section 4.2
        "dapo": (0.2, 0.28, "std", 0.0),  # arXiv 2503.14476, section 4.1
        "dr_grpo": (0.2, 0.2, "none", 0.0),  # arXiv 2503.20783
        "gspo": (3e-4, 4e-4, "std", 0.0),  # arXiv 2507.18071, section 5.1
        "cispo": (1.0, 4.0, "std", 0.0),  # arXiv 2510.13786: a ratio of at most 5
    }
    for module in (grpo, grape):
        assert {name: tuple(settings.values()) for name, settings in module.PAPER_SETTINGS.items()} == papers
        assert {tuple(settings) for settings in module.PAPER_SETTINGS.values()} == {
            ("clip_low", "clip_high", "scale", "beta")
        }
    assert dpo.PAPER_BETA == {"sppo": 0.001, "simpo": 2.0}


def test_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(SystemExit, match="already holds a run"):
        sft.main(sft.Args(output_dir=str(tmp_path)))
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"
    (tmp_path / "other" / "model").mkdir(parents=True)
    with pytest.raises(SystemExit, match="already holds a run"):
        sft.main(sft.Args(output_dir=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("reinforce", {"samples_per_prompt": 1}),
        ("trpo", {"samples_per_prompt": 1}),
        ("grpo", {"samples_per_prompt": 1}),
        ("grape", {"samples_per_prompt": 1}),
        ("ppo", {"temperature": 0.0}),
        ("dpo", {"label_smoothing": 0.1, "loss_type": "ipo"}),
        ("dpo", {"micro_batch_size": 3}),
    ],
)
def test_flags_that_cannot_work_are_refused(script, flags, tmp_path):
    name = next(iter(flags)).replace("_", "-")
    with pytest.raises(SystemExit, match=f"--{name}"):
        SCRIPTS[script].main(SCRIPTS[script].Args(output_dir=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


def test_copies_are_equal():
    """Functions and classes of one name are the same to the letter, unless copies.DIFFERENT gives a reason."""
    texts = copies.read()
    assert copies.drifted(texts) == []
    assert {"sample", "rollout", "token_logprobs", "evaluate"} <= set.intersection(
        *(set(copies.pieces(texts[s])) for s in texts)
    )


def test_a_changed_copy_is_found_and_carried_to_its_twins():
    texts = copies.read()
    changed = texts | {"grpo": texts["grpo"].replace("log_ref_ratio.square() / 2", "log_ref_ratio.abs()")}
    changed["grpo"] = changed["grpo"].replace("going.any()", "going.sum()")
    assert copies.drifted(changed) == [
        "grpo.py: rollout is not that of sft.py",
        "grape.py: policy_loss is not that of grpo.py",
    ]
    carried = copies.carry("grpo", changed)
    assert copies.drifted(carried) == []
    assert "log_ref_ratio.abs()" in carried["grape"] and carried["grpo"] == changed["grpo"]
    assert all("going.sum()" in text for text in carried.values())
    assert carried["ppo"].replace("going.sum()", "going.any()") == texts["ppo"]  # its own policy_loss untouched


def test_flags_of_one_name_mean_one_thing():
    """Type and help of a flag that several scripts have; defaults may differ."""
    seen, own = {}, {"beta", "max_length", "loss_type"}  # of rewards or of the loss; of rows or of completions
    for script in SCRIPTS:
        lines = re.findall(
            r"^    (\w+): ([^=\n]+) = [^#\n]*  # (.+)$", (REPO / f"{script}.py").read_text(), re.MULTILINE
        )
        assert [name for name, _, _ in lines] == [field.name for field in dataclasses.fields(SCRIPTS[script].Args)]
        for name, *flag in lines:
            if name not in own:
                assert seen.setdefault(name, flag) == flag, f"{script}.py: {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_has_a_help_of_its_own(script, capsys):
    """As tyro prints it: a comment over several fields would be the help of each, one in a wrong place of none."""
    with pytest.raises(SystemExit):
        tyro.cli(SCRIPTS[script].Args, args=["--help"], prog="script")
    printed = re.sub(r"[^\x20-\x7e]|\s", "", capsys.readouterr().out)  # without the frame and its line breaks
    helps = []
    for line in (REPO / f"{script}.py").read_text().splitlines():
        if match := re.match(r"    (\w+): [^#]*  # (.+)$", line):
            name, text = match.groups()
            helps.append(text)
            shown = re.search(rf"--{name.replace('_', '-')}.*?\(default", printed)
            assert re.sub(r"\s", "", text) in shown.group(), name
    assert len(set(helps)) == len(helps) == len(dataclasses.fields(SCRIPTS[script].Args))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "trpo"])
def test_learning_rate_warms_up_and_falls_to_0(script, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    args = SCRIPTS[script].Args(num_steps=4, warmup_steps=2, prompts_per_step=8, eval_prompts=2, learning_rate=1e-3)
    args.output_dir = str(tmp_path / "run")
    for name in ("num_epochs", "num_minibatches"):
        if hasattr(args, name):
            setattr(args, name, 1)
    SCRIPTS[script].main(args)
    rates = rates[:: 2 if script == "ppo" else 1]  # its value model has an optimizer of its own
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize("script", ["reinforce", "trpo", "ppo"])
def test_the_kl_to_the_starting_model_is_taken_off_the_rewards(script, tmp_path, monkeypatch):
    """What compute_advantages or compute_gae is given, from the rollout's log-probs and another load of the model."""
    module, seen, rollouts = SCRIPTS[script], [], []
    name = "compute_gae" if script == "ppo" else "compute_advantages"
    compute, rollout = getattr(module, name), module.rollout
    monkeypatch.setattr(module, name, lambda x, *a, **k: seen.append(x.clone()) or compute(x, *a, **k))
    monkeypatch.setattr(module, "rollout", lambda *a, **k: rollouts.append((a, rollout(*a, **k))) or rollouts[-1][1])
    (tmp_path / "two.py").write_text(
        "def two(prompts, completions, **columns):\n    return [2.0, 0.0] * (len(prompts) // 2)\n"
    )
    args = module.Args(num_steps=2, prompts_per_step=16, samples_per_prompt=4, eval_prompts=2, eval_every=9, beta=0.5)
    args.reward, args.temperature, args.output_dir = (f"{tmp_path}/two.py:two",), 0.8, str(tmp_path / "run")
    if script != "trpo":
        args.learning_rate = 3e-3
    module.main(args)
    (_, prompt_ids, prompt_mask), (ids, mask, sampled, _) = rollouts[
        2
    ]  # of the second step, where the policy has moved
    start = common.load_model("models/arithmetic", torch.device("cpu"))[0]
    prompts = (x.repeat_interleave(4, 0) for x in (prompt_ids, prompt_mask))
    with torch.no_grad():
        kl = (sampled - module.token_logprobs(start, *prompts, ids, mask, temperature=0.8)) * mask
    assert kl.abs().sum() > 0.01
    score, ended = torch.tensor([2.0, 0.0] * 32), ((ids == 0) & (mask > 0)).any(1)
    expected = score - 0.5 * kl.sum(1)
    if script == "ppo":
        expected = -0.5 * kl
        expected[torch.arange(64), mask.sum(1).long() - 1] += score * ended
    torch.testing.assert_close(seen[1], expected, atol=1e-4, rtol=1e-4)
