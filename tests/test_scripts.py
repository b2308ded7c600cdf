"""Whole runs: each script learns from the embedded default, and runs on a chat model with a data file of its own."""

import dataclasses
import json
import math
import re
import tempfile
from importlib import import_module
from pathlib import Path

import common
import grape
import grpo
import ppo

import copies
import pytest
import torch
import tyro

REPO = Path(__file__).parent.parent
SCRIPTS = {script: import_module(script) for script in copies.SCRIPTS}
SAMPLING = [name for name in SCRIPTS if name not in ("sft", "dpo")]
KEPT = tempfile.TemporaryDirectory()
FEW = f"{KEPT.name}/sums.jsonl"  # 104 of the sums, for runs that start sooner
MANY = f"{KEPT.name}/more.jsonl"  # 1,667 of them
for file, every in ((FEW, 97), (MANY, 6)):
    Path(file).write_text(
        "".join((REPO / "models/arithmetic/sums.jsonl").read_text().splitlines(keepends=True)[::every])
    )


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# steps, and the held-out accuracy that they must reach from 0.3; how far each gets, benchmarks/defaults.py measures
TARGETS = {"sft": (15, 0.6), "rejection_sampling": (8, 0.4), "reinforce": (24, 0.5), "trpo": (4, 0.34)}
TARGETS |= {"ppo": (8, 0.45), "grpo": (24, 0.55), "dpo": (24, 0.4), "grape": (24, 0.45)}


@pytest.mark.parametrize(("script", "steps", "target"), [(name, *TARGETS[name]) for name in SCRIPTS])
def test_learns(script, steps, target, tmp_path, capsys):
    """With the flags that a user gives, from the project's root."""
    out = tmp_path / "run"
    flags = ["--num-steps", str(steps), "--eval-every", "20", "--data", MANY, "--output-dir", str(out)]
    SCRIPTS[script].main(tyro.cli(SCRIPTS[script].Args, args=flags))
    printed = capsys.readouterr().out
    name, metrics = "pairs" if script == "dpo" else "exact_answer", read_jsonl(out / "metrics.jsonl")
    pattern = rf"{script}: held-out {name} (\S+) -> (\S+)( .*)? in \d+ s, model in {re.escape(str(out))}/model"
    before, after = map(float, re.fullmatch(pattern, printed.strip().splitlines()[-1]).groups()[:2])
    assert [f"{metrics[i][f'eval/{name}']:.3f}" for i in (0, -1)] == [f"{x:.3f}" for x in (before, after)]
    assert 0.2 < metrics[0]["eval/exact_answer"] < 0.4 and metrics[-1]["eval/exact_answer"] >= target
    assert re.match(r"model  .*\nrows   .*\nrun    .*\nstep 0  .* s\n    'What is ", printed)
    assert [row["step"] for row in metrics] == list(range(steps + 1))
    assert json.loads((out / "args.json").read_text())["num_steps"] == steps
    assert {row["step"] for row in read_jsonl(out / "samples.jsonl")} >= {0, steps}
    names = {name for row in metrics for name in row}
    assert {"eval/exact_answer", "tokens_per_second", "time/update", "time/total", "completion/length"} <= names
    if script in SAMPLING:
        assert {"reward/mean", "completion/truncated", "policy/entropy"} <= names
        assert ("reward/right" if script == "grape" else "reward/exact_answer") in names


def run(script, folder, **settings):
    """The metrics of a short run."""
    small = {"num_steps": 1, "prompts_per_step": 4, "eval_prompts": 2, "data": FEW, "output_dir": str(folder)}
    return SCRIPTS[script].main(SCRIPTS[script].Args(**small | settings))


def weights_of(folder):
    return common.load_model(str(folder), torch.device("cpu"))[0].state_dict()


def judged_by(script, tmp_path, function):
    """The flags by which a reward judges evaluations and steps, in grape.py as a rubric's verifier."""
    (tmp_path / "own.py").write_text(function)
    item = {"name": "judge", "weight": 1, "verifier": "own.py:judge"}
    (tmp_path / "rubric.json").write_text(json.dumps({"category": "any", "items": [item]}))
    own = {"reward": (f"{tmp_path}/own.py:judge",)}
    return own | ({"rubric": (str(tmp_path / "rubric.json"),)} if script == "grape" else {})


@pytest.mark.parametrize("script", SCRIPTS)
def test_chat_model_with_own_data(script, tmp_path, chat_model, chat_data):
    """Absolute positions, a padded vocabulary, pad equal to EOS, a chat template; then a rerun from the saved model."""
    folder, settings = chat_model, {"num_steps": 2, "eval_every": 1, "max_new_tokens": 6, "micro_batch_size": 5}
    settings |= {"reward": ("exact_answer", f"{REPO}/examples/rewards.py:length")}
    settings |= {"threshold": -1.0} if script == "rejection_sampling" else {}
    for out in (tmp_path / "first", tmp_path / "second"):
        metrics = run(script, out, model=folder, data=chat_data, **settings)
        assert all(math.isfinite(value) for value in metrics.values())
        samples = read_jsonl(out / "samples.jsonl")
        assert all(row["prompt"].startswith("<user>") and row["prompt"].endswith("<assistant>") for row in samples)
        assert all({"exact_answer", "length"} <= set(row) for row in samples if row["phase"] == "eval")
        before, after = weights_of(folder), weights_of(out / "model")
        assert any((before[name] != after[name]).any() for name in before)
        folder = str(out / "model")


@pytest.mark.parametrize("script", ["ppo", "grpo", "grape"])
def test_ratio_is_1_on_the_first_minibatch(script, tmp_path, monkeypatch):
    """To the last bit, though log-probs depend on the rows beside them, here much more than in bfloat16."""
    module, seen = SCRIPTS[script], []
    policy_loss, token_logprobs = module.policy_loss, module.token_logprobs

    def beside(model, *inputs, **settings):
        return token_logprobs(model, *inputs, **settings) + 1e-3 * (inputs[2].sum() % 101) * inputs[3]

    def spy(logprobs, old_logprobs, *args, **settings):
        seen.append((logprobs.detach(), old_logprobs))
        return policy_loss(logprobs, old_logprobs, *args, **settings)

    monkeypatch.setattr(module, "token_logprobs", beside)
    monkeypatch.setattr(module, "policy_loss", spy)
    settings = {"num_epochs": 2, "num_minibatches": 2, "micro_batch_size": 8, "samples_per_prompt": 4}
    run(script, tmp_path / "run", prompts_per_step=8, temperature=0.7, learning_rate=1e-3, **settings)
    first, second = seen[:4], seen[4:]  # epochs of 2 minibatches of 2 micro-batches
    assert len(second) == 4 and all((new == old).all() for new, old in first[:2])
    assert max((new - old).abs().max() for new, old in second) > 1e-3
    assert all((one == two).all() for (_, one), (_, two) in zip(first, second))  # frozen at the rollout


@pytest.mark.parametrize("script", ["reinforce", "trpo", "ppo", "grpo", "grape"])
def test_the_kl_to_the_start_is_0_at_the_start_whatever_the_sampler_says(script, tmp_path, monkeypatch):
    """Both log-probs are of one kind of pass: a KV cache's in bfloat16, or another engine's, differ from it."""
    rollout = SCRIPTS[script].rollout

    def another_engine(*args, **settings):
        ids, mask, logprobs, truncated = rollout(*args, **settings)
        return ids, mask, logprobs - 0.05 * mask, truncated

    monkeypatch.setattr(SCRIPTS[script], "rollout", another_engine)
    settings = {"beta": 0.1, "dtype": "bfloat16", "micro_batch_size": 12, "prompts_per_step": 8}
    assert run(script, tmp_path / "run", **settings)["kl/ref"] == 0.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_of_logits_that_are_not_finite_nothing_is_drawn(script, tmp_path, monkeypatch):
    """Of NaN a sampler draws some token: in a step that is the vocabulary's last one, in an evaluation the first."""
    load_model, take_batch, models, bad = common.load_model, common.take_batch, [], 2 if script in SAMPLING else 0

    def load(*args, **settings):
        models.append(load_model(*args, **settings))
        return poison() if bad == 0 else models[-1]

    def poison():
        models[0][0].get_input_embeddings().weight.data.fill_(math.nan)
        return models[-1]

    monkeypatch.setattr(common, "load_model", load)
    monkeypatch.setattr(
        common, "take_batch", lambda rows, step, args: (step == bad and poison(), take_batch(rows, step, args))[1]
    )
    with pytest.raises(FloatingPointError, match=f"step {bad}: logits that are not finite"):
        run(script, tmp_path / "run", num_steps=3, eval_every=3)


@pytest.mark.parametrize("script", SAMPLING)
def test_a_step_that_nothing_could_score_leaves_the_weights_finite(script, tmp_path, capsys):
    judge = "return [0.0 if len(prompts) == 2 else None for _ in prompts]"  # 2 in an evaluation, more in a step
    flags = judged_by(script, tmp_path, f"def judge(prompts, **columns):\n    {judge}\n")
    run(script, tmp_path / "run", num_steps=2, **flags)
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run" / "model").values())
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert capsys.readouterr().out.count(": no reward could score any completion") == 1


@pytest.mark.parametrize("script", ["grpo", "grape"])
def test_seconds_in_a_reward_are_the_scores_and_not_the_updates(script, tmp_path):
    judge = "time.sleep(2.0 * (len(prompts) > 1))\n    return list(map(len, completions))"
    flags = judged_by(script, tmp_path, f"import time\ndef judge(prompts, completions, **columns):\n    {judge}\n")
    metrics = run(script, tmp_path / "run", prompts_per_step=2, samples_per_prompt=2, eval_prompts=1, **flags)
    assert metrics["time/score"] >= 2.0 > metrics["time/update"] + metrics["time/rollout"] > 0


def test_of_three_times_the_prompts_those_that_do_not_tie_are_trained(tmp_path, monkeypatch):
    """DAPO's dynamic sampling: as many prompts as without it, filled up with tied ones where too few differ."""
    rollouts, trained, rollout, policy_loss = [], [], grpo.rollout, grpo.policy_loss
    monkeypatch.setattr(grpo, "rollout", lambda *a, **k: rollouts.append(rollout(*a, **k)) or rollouts[-1])
    monkeypatch.setattr(grpo, "policy_loss", lambda *a, **k: trained.append(a[3].view(4, -1)) or policy_loss(*a, **k))
    differs = {"many": lambda i: i % 2, "few": lambda i: i == 5}
    for name, function in differs.items():
        scores = [float(function(i) and j == 0) for i in range(12) for j in range(8)]
        own = lambda completions, scores=scores, **columns: scores if len(completions) > 2 else [0.0] * 2  # noqa: E731
        monkeypatch.setattr(common, name, own, raising=False)
        settings = {"loss_type": "dapo", "reward": (name,), "eval_every": 9, "num_minibatches": 1, "beta": 0.01}
        run("grpo", tmp_path / name, mask_truncated=False, **settings)
        assert len(rollouts[-2][0]) == 12 * 8  # before the last evaluation
    many, few = trained
    assert [int((advantages != 0).any(1).sum()) for advantages in (many, few)] == [4, 1]


def test_a_completion_that_was_cut_off_is_left_out_where_asked(tmp_path, monkeypatch):
    """DAPO's overlong filtering: of the loss and its denominator, not of the group's mean nor of the lengths."""
    losses, rollouts, rollout, policy_loss = [], [], grpo.rollout, grpo.policy_loss
    monkeypatch.setattr(grpo, "rollout", lambda *a, **k: rollouts.append(rollout(*a, **k)) or rollouts[-1])
    monkeypatch.setattr(grpo, "policy_loss", lambda *a, **k: losses.append((a, k)) or policy_loss(*a, **k))
    monkeypatch.setattr(common, "turns", lambda prompts, **columns: [i % 3 for i in range(len(prompts))], raising=False)
    settings = {"max_new_tokens": 3, "num_minibatches": 1, "beta": 0.01, "eval_every": 9, "reward": ("turns",)}
    metrics = run("grpo", tmp_path / "run", mask_truncated=True, **settings)
    _, mask, _, truncated = rollouts[-2]
    (*_, advantages, kept), more = losses[0]
    assert 0 < truncated.sum() < 32 and kept.sum() == mask[~truncated].sum() and not kept[truncated.argsort()[-1]].sum()
    assert more["normalizer"] == (~truncated).sum() and (advantages[truncated.nonzero()] != 0).any()
    assert metrics["completion/length"] == pytest.approx((kept.sum() + 3 * truncated.sum()).item() / 32)


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "gspo", "cispo"])
def test_grpo_loss_types_run_over_several_updates(loss_type, tmp_path):
    settings = {"num_steps": 3, "num_epochs": 2, "num_minibatches": 2, "learning_rate": 1e-3, "overlong_buffer": 4}
    metrics = run("grpo", tmp_path / "run", loss_type=loss_type, **settings)
    assert metrics["kl/old"] > 0  # old log-probs are frozen while the policy moves
    assert metrics["policy/clip_frac"] > 0 or loss_type == "cispo"
    assert "kl/ref" not in metrics  # no reference model where the paper has none
    recorded = json.loads((tmp_path / "run" / "args.json").read_text())
    assert {name: recorded[name] for name in grpo.LOSS_DEFAULTS[loss_type]} == grpo.LOSS_DEFAULTS[loss_type]


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_weights_however_often_it_is_evaluated(script, tmp_path):
    """To the last bit: evaluations are greedy, and draw nothing from the training's random numbers."""
    weights, samples = [], []
    for out, seed, eval_every in ((tmp_path / "a", 1, 1), (tmp_path / "b", 1, 5), (tmp_path / "c", 2, 5)):
        run(script, out, num_steps=2, eval_prompts=8, seed=seed, eval_every=eval_every)
        weights.append(weights_of(out / "model"))
        samples.append([row for row in read_jsonl(out / "samples.jsonl") if (row["phase"], row["step"]) == ("eval", 0)])
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert any((weights[0][name] != weights[2][name]).any() for name in weights[0])
    assert samples[0] == samples[1] == samples[2]  # the starting model's greedy answers, whatever the seed


@pytest.mark.parametrize("script", ["sft", "ppo", "trpo", "grape"])
def test_bfloat16_forward_passes_leave_float32_parameters_that_small_steps_move(script, tmp_path, monkeypatch):
    """Of bfloat16 weights a step of 1e-6 rounds 98 in 100 away (NVIDIA-NeMo/RL#2322)."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        seen.append({p.dtype for p in parameters} | {p.grad.dtype for p in parameters})
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    rate = {} if script == "trpo" else {"learning_rate": 1e-6}
    run(script, tmp_path / "run", num_steps=2, dtype="bfloat16", **rate)
    assert script == "trpo" or set.union(*seen) == {torch.float32}
    before, after = weights_of("models/arithmetic"), weights_of(tmp_path / "run" / "model")
    layers = [name for name in before if "layers" in name and "norm" not in name]
    moved = sum((before[name] != after[name]).sum() for name in layers) / sum(before[name].numel() for name in layers)
    assert moved > 0.9


def test_sft_drops_rows_that_are_too_long_and_fakes_no_stop_token(tmp_path, monkeypatch, capsys):
    """A row that was cut off would teach to stop, or not to, in the middle of an answer (huggingface/trl#3091)."""
    rows = [{"prompt": "What is 1 + 1?", "completion": " 2" * n} for n in (1, 2, 9)]
    rows += [{"prompt": "What is 2 + 2?", "completion": " 4"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen, collate = [], common.collate
    monkeypatch.setattr(common, "collate", lambda p, c, device: seen.extend(c) or collate(p, c, device))
    settings = {"data": str(tmp_path / "d.jsonl"), "eval_data": str(tmp_path / "d.jsonl"), "prompts_per_step": 3}
    run("sft", tmp_path / "run", num_steps=2, max_length=20, **settings)
    assert "dropped 1 of 4 answers" in capsys.readouterr().out
    assert len(seen) == 6 + 4 and {len(completion) for completion in seen} == {3, 5}
    assert all(completion[-1] == 0 and 0 not in completion[:-1] for completion in seen)
    for script, length in (("sft", 5), ("dpo", 3)):
        with pytest.raises(SystemExit, match="no row is left to train on: all are beyond --max-length"):
            run(script, tmp_path / script, max_length=length)


def test_ppos_value_model_starts_at_0_and_shares_nothing_with_the_policy(tmp_path, monkeypatch):
    """So no gradient of the values reaches the policy, and the first advantages are the returns."""
    groups, values = [], []
    step, compute_gae = torch.optim.AdamW.step, ppo.compute_gae
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: groups.append(self.param_groups) or step(self))
    monkeypatch.setattr(ppo, "compute_gae", lambda r, v, *a, **k: values.append(v) or compute_gae(r, v, *a, **k))
    run("ppo", tmp_path / "run")
    policy, value = ({p.data_ptr() for p in param_groups[0]["params"]} for param_groups in groups[:2])
    assert policy and value and not policy & value
    assert (values[0] == 0).all()


def test_settings_are_those_of_the_papers():
    """Typed from the papers once more: clip, std and beta of each loss type."""
    papers = {
        "grpo": (0.2, 0.2, "std", 0.04),  # arXiv 2402.03300, section 4.2
        "dapo": (0.2, 0.28, "std", 0.0),  # arXiv 2503.14476, section 4.1
        "dr_grpo": (0.2, 0.2, "none", 0.0),  # arXiv 2503.20783
        "gspo": (3e-4, 4e-4, "std", 0.0),  # arXiv 2507.18071, section 5.1
        "cispo": (1.0, 4.0, "std", 0.0),  # arXiv 2510.13786: a ratio of at most 5
    }
    names = ("clip_low", "clip_high", "scale", "beta")
    assert {x: tuple(settings[name] for name in names) for x, settings in grpo.LOSS_DEFAULTS.items()} == papers
    more = {x: {**settings} for x, settings in grpo.LOSS_DEFAULTS.items() if len(settings) > 4}
    assert {x: list(settings.values())[4:] for x, settings in more.items()} == {"dapo": [3, True]}
    defaults = grape.Args()
    assert (defaults.clip_low, defaults.clip_high, defaults.scale, defaults.beta) == papers["grpo"]


def test_copies_are_equal():
    """Functions and classes of one name are the same to the letter, unless copies.DIFFERENT gives a reason."""
    texts = copies.read()
    assert copies.drifted(texts) == []
    in_all = set.intersection(*(set(copies.pieces(text)) for text in texts.values()))
    assert in_all == {"Args", "rollout", "hidden_states", "token_logprobs", "evaluate", "main"}


def test_flags_of_one_name_mean_one_thing():
    """Type and help of a flag that several scripts have; defaults may differ."""
    seen, own = {}, {"beta", "max_length", "loss_type"}  # of rewards or of the loss; of rows or of completions
    own |= {"clip_low", "clip_high", "scale"}  # in grpo.py the loss type's
    for script in SCRIPTS:
        flag = r"^    (\w+): ([^=\n]+?)(?: \| None)? = [^#\n]*  # (.+)$"  # None where another flag sets the default
        lines = re.findall(flag, (REPO / f"{script}.py").read_text(), re.MULTILINE)
        assert [name for name, _, _ in lines] == [field.name for field in dataclasses.fields(SCRIPTS[script].Args)]
        for name, *flag in lines:
            if name not in own:
                assert seen.setdefault(name, flag) == flag, f"{script}.py: {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_has_a_help_of_its_own(script, capsys):
    """As tyro prints it: a comment over several fields would be the help of each, one in a wrong place of none."""
    with pytest.raises(SystemExit):
        description = common.usage(SCRIPTS[script].__doc__)
        tyro.cli(SCRIPTS[script].Args, args=["--help"], prog="script", description=description)
    printed = re.sub(r"[^\x20-\x7e]|\s", "", capsys.readouterr().out)  # without the frame and its line breaks
    described, printed = printed.split("options", 1)
    assert f"python{script}.py--model" in described and "Source" not in described
    helps = []
    for line in (REPO / f"{script}.py").read_text().splitlines():
        if match := re.match(r"    (\w+): [^#]*  # (.+)$", line):
            name, text = match.groups()
            helps.append(text)
            shown = re.search(rf"--{name.replace('_', '-')}.*?\(default", printed)
            assert re.sub(r"\s", "", text) in shown.group(), name
    assert len(set(helps)) == len(helps) == len(dataclasses.fields(SCRIPTS[script].Args))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "trpo"])
def test_learning_rate_warms_up_and_falls_to_0_or_stays(script, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    names = {"num_epochs", "num_minibatches"} & {field.name for field in dataclasses.fields(SCRIPTS[script].Args)}
    settings = {"num_steps": 4, "warmup_steps": 2, "learning_rate": 1e-3, **dict.fromkeys(names, 1)}
    run(script, tmp_path / "run", prompts_per_step=8, **settings)
    rates = rates[:: 2 if script == "ppo" else 1]  # its value model has an optimizer of its own
    logged = [row["learning_rate"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert logged == rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    args = SCRIPTS[script].Args(num_steps=4, warmup_steps=2, lr_schedule="constant")
    assert [common.decay(args, step) for step in range(1, 5)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("script", ["reinforce", "trpo", "ppo"])
def test_the_kl_to_the_starting_model_is_taken_off_the_rewards(script, tmp_path, monkeypatch):
    """What compute_advantages or compute_gae is given, from the rollout's log-probs and another load of the model.

    In ppo.py the score is the last token's, whether that is a stop token or not.
    """
    module, seen, rollouts = SCRIPTS[script], [], []
    name = "compute_gae" if script == "ppo" else "compute_advantages"
    compute, rollout = getattr(module, name), module.rollout
    monkeypatch.setattr(module, name, lambda x, *a, **k: seen.append(x.clone()) or compute(x, *a, **k))
    monkeypatch.setattr(module, "rollout", lambda *a, **k: rollouts.append((a, rollout(*a, **k))) or rollouts[-1][1])
    monkeypatch.setattr(common, "two", lambda prompts, **columns: [2.0, 0.0] * (len(prompts) // 2), raising=False)
    settings = {"num_steps": 2, "prompts_per_step": 16, "samples_per_prompt": 4, "beta": 0.5, "temperature": 0.8}
    settings |= {} if script == "trpo" else {"learning_rate": 1e-3}
    run(script, tmp_path / "run", reward=("two",), eval_every=9, max_new_tokens=4, **settings)
    (_, *prompts), (ids, mask, sampled, truncated) = rollouts[2]  # of the second step, where the policy has moved
    start = common.load_model("models/arithmetic", torch.device("cpu"))[0]
    with torch.no_grad():
        kl = (sampled - module.token_logprobs(start, *prompts, ids, mask, temperature=0.8)) * mask
    assert kl.abs().sum() > 0.01 and 0 < truncated.sum() < 64
    score = torch.tensor([2.0, 0.0] * 32)
    expected = score - 0.5 * kl.sum(1)
    if script == "ppo":
        expected = -0.5 * kl
        expected[torch.arange(64), mask.sum(1).long() - 1] += score
    torch.testing.assert_close(seen[1], expected, atol=1e-4, rtol=1e-4)
