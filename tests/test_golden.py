"""Ours against TRL's own losses and advantages on fixed numbers (tests/golden.json, made by benchmarks/golden.py).

Where the two differ on purpose, the test holds the difference too, so that it is exactly the one that is meant.
"""

import json
from pathlib import Path

import common
import dpo
import grpo
import ppo
import reinforce
import sft

import pytest
import torch
from transformers import AutoTokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def inputs_of(section):
    """The tensors that TRL was given; None is NaN."""

    def tensor(value):
        return torch.tensor([float("nan") if x is None else x for x in value] if isinstance(value[0], float) else value)

    return {n: tensor(v) if isinstance(v, list) else v for n, v in GOLDEN[section]["inputs"].items()}


def close(got, wanted):
    torch.testing.assert_close(torch.as_tensor(got), torch.tensor(wanted), atol=3e-6, rtol=1e-5)


def test_versions():
    """PPO left TRL after 1.12."""
    assert {name: section["trl"] for name, section in GOLDEN.items()} == {
        **dict.fromkeys(["grpo_losses", "grpo_advantages", "rloo", "dpo", "sft", "replay"], "1.16.0"),
        "ppo": "1.12.0",
    }


@pytest.mark.parametrize("variant", sorted(GOLDEN["grpo_losses"]["outputs"].keys() - {"grpo with TRL's KL"}))
def test_grpo_losses(variant):
    x, expected = inputs_of("grpo_losses"), GOLDEN["grpo_losses"]["outputs"][variant]
    loss_type = variant.split()[0]
    settings = {name: grpo.LOSS_DEFAULTS[loss_type][name] for name in ("clip_low", "clip_high")}
    if loss_type != "cispo":  # of which TRL has no lower clip, and epsilon_high is the ratio itself: 1 + clip_high
        assert settings == {"clip_low": expected["epsilon"], "clip_high": expected["epsilon_high"]}
    assert 1 + settings["clip_high"] == expected["epsilon_high"] or loss_type != "cispo"
    settings |= {"loss_type": loss_type, "beta": expected["beta"], "kl_estimator": "k3"}
    settings["normalizer"] = grpo.loss_normalizer(x["mask"], loss_type, 8)
    logprobs = x["logprobs"].requires_grad_()
    inputs = (logprobs, x["old_logprobs"], x["ref_logprobs"], x["advantages"], x["mask"])
    loss = grpo.policy_loss(*inputs, **settings)
    close(loss, expected["loss"])
    close(*torch.autograd.grad(loss, logprobs), expected["gradient"])


def test_trls_kl_is_times_the_ratio():
    """Differs: TRL's default multiplies k3 with pi / pi_old (arXiv 2512.02556); ours is that of arXiv 2402.03300."""
    x, outputs = inputs_of("grpo_losses"), GOLDEN["grpo_losses"]["outputs"]
    log_ref_ratio = x["ref_logprobs"] - x["logprobs"]
    k3 = log_ref_ratio.exp() - log_ref_ratio - 1
    extra = ((x["logprobs"] - x["old_logprobs"]).exp() - 1) * k3 * x["mask"]
    difference = 0.04 * (extra.sum(1) / x["mask"].sum(1)).mean()
    close(outputs["grpo"]["loss"] + difference, outputs["grpo with TRL's KL"]["loss"])
    assert difference.abs() > 0.01


@pytest.mark.parametrize(("scale", "trl_scale"), [("std", "group"), ("none", "none")])
def test_grpo_advantages(scale, trl_scale):
    """Unscored completions and groups that tie among them."""
    got = grpo.compute_advantages(inputs_of("grpo_advantages")["rewards"], samples_per_prompt=4, scale=scale)
    close(got, GOLDEN["grpo_advantages"]["outputs"][trl_scale])


def test_rloo():
    """Leave-one-out, plain and after the k1 KL is taken off the rewards, and the gradient of a first update.

    Differs: TRL's loss has a sequence ratio, of which the value is -A where it is 1, ours is -A log pi: the gradients
    are one. And TRL divides by all completions, we by those that were scored: here all 16 are asked for.
    """
    x, expected = inputs_of("rloo"), GOLDEN["rloo"]["outputs"]
    settings = {"samples_per_prompt": 4, "baseline": "leave_one_out"}
    close(reinforce.compute_advantages(x["rewards"], **settings), expected["advantages"])
    kl = ((x["logprobs"] - x["ref_logprobs"]) * x["mask"]).sum(1)
    advantages = reinforce.compute_advantages(x["rewards"] - x["beta"] * kl, **settings)
    close(advantages, expected["with a KL"])
    logprobs = x["logprobs"].requires_grad_()
    loss = reinforce.policy_loss(logprobs, advantages, x["mask"], normalizer=16)
    close(*torch.autograd.grad(loss, logprobs), expected["gradient"])


@pytest.mark.parametrize("variant", ["sigmoid", "hinge", "ipo", "robust", "sppo", "simpo"])
def test_dpo_losses(variant):
    x, expected = inputs_of("dpo"), GOLDEN["dpo"]["outputs"][variant]
    logprobs = x["logprobs"].requires_grad_()
    chosen, rejected = dpo.sequence_logprobs(logprobs, x["mask"], loss_type=variant).split(4)
    ref_logps = x["ref_logps"] / (x["mask"].sum(1) if variant == "ipo" else 1.0)
    settings = {"beta": expected["beta"], "gamma": expected.get("gamma", 0.0)}
    settings |= {"loss_type": variant, "label_smoothing": expected.get("label_smoothing", 0.0)}
    loss = dpo.dpo_loss(chosen, rejected, *ref_logps.split(4), **settings).mean()
    close(loss, expected["loss"])
    if variant != "simpo":  # TRL's is a function of whole completions' log-probs
        close(*torch.autograd.grad(loss, logprobs), expected["gradient"])


def test_dpo_label_smoothing_is_ours_alone():
    """Differs: TRL's sigmoid loss takes --label-smoothing and ignores it; ours is conservative DPO."""
    x, outputs = inputs_of("dpo"), GOLDEN["dpo"]["outputs"]
    assert outputs["sigmoid, smoothed"]["label_smoothing"] == 0.2
    assert outputs["sigmoid, smoothed"]["loss"] == outputs["sigmoid"]["loss"]
    chosen, rejected = dpo.sequence_logprobs(x["logprobs"], x["mask"], loss_type="sigmoid").split(4)
    reference = x["ref_logps"].split(4)
    asked = (chosen, rejected, *reference), (rejected, chosen, *reversed(reference))
    plain, smoothed, reversed_ = (
        dpo.dpo_loss(*logps, beta=0.1, loss_type="sigmoid", label_smoothing=e).mean()
        for logps, e in ((asked[0], 0.0), (asked[0], 0.2), (asked[1], 0.0))
    )
    close(plain, outputs["sigmoid, smoothed"]["loss"])
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * reversed_)
    assert (smoothed - plain).abs() > 0.01


def test_sft_from_text_to_gradient():
    """Token ids, stop token, labels, loss and gradient norm of rows that both read from text."""
    rows, expected = GOLDEN["sft"]["inputs"]["rows"], GOLDEN["sft"]["outputs"]
    model, tokenizer = common.load_model("models/arithmetic", torch.device("cpu"))
    stop_ids = model.generation_config.eos_token_id
    examples = []
    trls = zip(rows, expected["input_ids"], expected["labels"], expected["attention_mask"])
    for row, ids, labels, attended in trls:
        prompt = common.prompt_tokens(tokenizer, row)
        completion = common.completion_tokens(tokenizer, row, row["completion"], stop_ids)
        examples.append((prompt, completion))
        assert prompt + completion == ids[: sum(attended)]
        assert [-100] * len(prompt) + completion == labels[: sum(attended)]
    batch = common.collate(*zip(*examples), model.device)
    loss = sft.sft_loss(sft.token_logprobs(model, *batch), batch[-1], normalizer=batch[-1].sum())
    close(loss, expected["loss"])
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert norm.item() == pytest.approx(expected["grad_norm"], rel=1e-4)


class Ppo:
    """TRL's layout: the score one slot after a completion's stop token, or on the last token where there is no slot."""

    def __init__(self, x):
        lengths = torch.tensor(GOLDEN["ppo"]["inputs"]["lengths"])
        slots = torch.arange(5)
        self.mask = (slots < lengths[:, None]).float()
        self.mask_plus_1 = (slots < lengths[:, None] + 1).float()
        self.last, self.score_slot = lengths - 1, lengths.clamp(max=4)
        self.kl_rewards = -x["beta"] * (x["logprobs"] - x["ref_logprobs"]) * self.mask
        self.scores, self.values = x["scores"], x["values"] * self.mask_plus_1

    def rewards(self, slot):
        return self.kl_rewards.scatter_add(1, slot[:, None], self.scores[:, None])


@pytest.mark.parametrize("variant", GOLDEN["ppo"]["outputs"])
def test_ppo(variant):
    """GAE, returns, clipped policy loss, clipped value loss and their gradients.

    Differs, in main only: there the score sits on the last token, after which the value is 0. And TRL whitens with one
    degree of freedom less, so its advantages are ours times sqrt((N - 1) / N).
    """
    x, expected = inputs_of("ppo"), GOLDEN["ppo"]["outputs"][variant]
    trl = Ppo(x)
    discounts = {"gamma": expected["gamma"], "gae_lambda": expected["gae_lambda"]}
    advantages, returns = ppo.compute_gae(trl.rewards(trl.score_slot), trl.values, trl.mask_plus_1, **discounts)
    close(advantages * trl.mask, expected["raw_advantages"])
    close(returns, expected["returns"])
    tokens = trl.mask.sum()
    whitened = ppo.whiten(advantages * trl.mask, trl.mask)
    close(whitened * ((tokens - 1) / tokens).sqrt(), expected["advantages"])

    new_logprobs, new_values = x["new_logprobs"].requires_grad_(), x["new_values"].requires_grad_()
    trls = torch.tensor(expected["advantages"])
    settings = {"clip_range": x["clip_range"], "normalizer": tokens}
    loss = ppo.policy_loss(new_logprobs, x["logprobs"], trls, trl.mask, **settings)
    close(loss, expected["policy_loss"])
    close(*torch.autograd.grad(loss, new_logprobs), expected["policy_gradient"])
    settings = {"value_clip_range": x["clip_range"], "normalizer": trl.mask_plus_1.sum()}
    loss = ppo.value_loss(new_values, trl.values, returns, trl.mask_plus_1, **settings)
    close(loss, expected["value_loss"])
    close(*torch.autograd.grad(loss, new_values), expected["value_gradient"])


@pytest.mark.parametrize("variant", GOLDEN["ppo"]["outputs"])
def test_where_ppos_score_sits(variant):
    """On the last token, ours; one slot after it, TRL's, with a value there that is trained too.

    With gamma and lambda 1 the advantages are the same: what TRL's extra value takes away it gives back. Otherwise they
    differ at the last token by s - gamma V_+1 - gamma lambda (s - V_+1), and before it by that discounted.
    """
    x, expected = inputs_of("ppo"), GOLDEN["ppo"]["outputs"][variant]
    trl, gamma, lam = Ppo(x), expected["gamma"], expected["gae_lambda"]
    ours, _ = ppo.compute_gae(trl.rewards(trl.last), trl.values, trl.mask, gamma=gamma, gae_lambda=lam)
    difference = ours - torch.tensor(expected["raw_advantages"])
    by_hand = torch.zeros(6, 5)
    for row, last in enumerate(trl.last.tolist()):
        if last < 4:  # a full row has no slot for it, and TRL puts the score on its last token as well
            s, v = trl.scores[row], trl.values[row, last + 1]
            for t in range(last + 1):
                by_hand[row, t] = (s - gamma * v - gamma * lam * (s - v)) * (gamma * lam) ** (last - t)
    close(difference, by_hand.tolist())
    assert (difference.abs().max() < 1e-5) == (gamma == lam == 1.0)


@pytest.mark.parametrize("module", [grpo, reinforce, sft, dpo], ids=lambda module: module.__name__)
def test_three_steps_from_text_on_are_trls(module, tmp_path, monkeypatch):
    """Tokens, rewards, ties, losses and gradients of whole runs, and AdamW between them; completions are given."""
    x, expected = GOLDEN["replay"]["inputs"], GOLDEN["replay"]["outputs"][module.__name__]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in x["rows"]))
    tokenizer = AutoTokenizer.from_pretrained("models/arithmetic")
    given = iter([x["completions"][start : start + 4] for start in (0, 4, 8)])

    def replay(model, *prompts, **settings):
        ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for own in next(given) for text in own]
        ids, mask = common.pad(ids, "right", "cpu")
        return ids, mask.float(), torch.zeros(ids.shape), torch.zeros(len(ids), dtype=torch.bool)

    monkeypatch.setattr(module, "rollout", replay)
    monkeypatch.setattr(module, "evaluate", lambda *x: {"eval/none": 0.0})
    monkeypatch.setattr(common, "take_batch", lambda rows, step, args: rows[4 * step - 4 : 4 * step])
    settings = {
        "data": f"{tmp_path}/d.jsonl",
        "eval_data": f"{tmp_path}/d.jsonl",
        "num_steps": 3,
        "prompts_per_step": 4,
    }
    settings |= {"learning_rate": 1e-3, "lr_schedule": "constant", "output_dir": str(tmp_path / "run")}
    if module in (grpo, reinforce):
        settings |= {"samples_per_prompt": 4, "beta": 0.0}
    module.main(module.Args(**settings))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    names = {"reward": "reward/mean", "frac_reward_zero_std": "group/zero_std", "rewards/margins": "reward/margin"}
    names |= {"grad_norm": "grad_norm", "logps/chosen": "logps/chosen"} | {"loss": f"loss/{module.__name__}"}
    for key, values in expected.items():
        if names[key] in rows[0]:  # a policy gradient's loss has another constant
            assert [row[names[key]] for row in rows] == pytest.approx(values, rel=2e-4, abs=2e-5), key
    assert len(expected["grad_norm"]) == 3 and min(expected["grad_norm"]) > 0.01
