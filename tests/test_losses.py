"""Losses and advantages against formulas worked by hand and a second path through torch."""

import grpo
import ppo
import reinforce
import sft
import trpo

import pytest
import torch
from conftest import random_model

B, T = 6, 5
LENGTHS = torch.tensor([5, 2, 3, 1, 4, 5])
MASK = (torch.arange(T) < LENGTHS[:, None]).float()


def tensors(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, ref = (-torch.rand(B, T, generator=generator, dtype=dtype) * 2 for _ in range(3))
    advantages = torch.randn(B, generator=generator, dtype=dtype)
    return logprobs.requires_grad_(), old, ref, advantages


def test_sft_loss_is_cross_entropy_of_the_completions():
    """transformers' own loss, with the prompt's and the padding's labels at -100."""
    model = random_model("llama")
    prompt_ids, completion_ids = torch.tensor([[7, 8], [9, 10]]), torch.tensor([[11, 12, 0], [13, 0, 55]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    labels = torch.cat([torch.full_like(prompt_ids, -100), completion_ids.masked_fill(mask == 0, -100)], 1)
    ones = torch.ones_like(prompt_ids)
    logprobs = sft.token_logprobs(model, prompt_ids, ones, completion_ids, mask)
    loss = sft.sft_loss(logprobs, mask, normalizer=mask.sum())
    whole = torch.cat([prompt_ids, completion_ids], 1)
    expected = model(whole, attention_mask=torch.cat([ones, mask.long()], 1), labels=labels).loss
    torch.testing.assert_close(loss, expected)


def test_unscored_completions_take_no_part():
    nan = float("nan")
    rewards = torch.tensor([1.0, nan, 0.0, nan, nan, 1.0])
    loo = reinforce.compute_advantages(rewards, samples_per_prompt=3, baseline="leave_one_out")
    assert loo.tolist() == [1.0, 0.0, -1.0, 0.0, 0.0, 0.0]
    grouped = grpo.compute_advantages(rewards, samples_per_prompt=3, scale="none")
    assert grouped.tolist() == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", ["std", "none"])
def test_grpo_advantages(scale):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.2, 0.3, 0.1, 0.8])
    got = grpo.compute_advantages(rewards, samples_per_prompt=4, scale=scale)
    for group, advantages in zip(rewards.split(4), got.split(4)):
        expected = (group - group.mean()) / (group.std() + 1e-4 if scale == "std" else 1.0)
        torch.testing.assert_close(advantages, expected)
    for size in (3, 5, 6, 7):  # a tied group has exactly no gradient, not a rounding residue over 1e-4
        tied = (torch.arange(1, 50) / 10).repeat_interleave(size)
        assert (grpo.compute_advantages(tied, samples_per_prompt=size, scale=scale) == 0).all()


def test_gae_by_hand():
    """V after the last token is 0, whatever stands in the padding: the second row's 77 and 100."""
    rewards = torch.tensor([[0.0, 0.0, 1.0], [-0.1, 2.0, 77.0]])
    values = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.6, 100.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    advantages, returns = ppo.compute_gae(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    # delta_t = r_t + 0.9 V_t+1 - V_t;  A_t = delta_t + 0.45 A_t+1
    a = 1.0 - 0.3
    b = 0.9 * 0.3 - 0.4 + 0.45 * a
    c = 0.9 * 0.4 - 0.5 + 0.45 * b
    d = 2.0 - 0.6
    e = -0.1 + 0.9 * 0.6 - 0.2 + 0.45 * d
    expected = torch.tensor([[c, b, a], [e, d, 0.0]])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_ppo_policy_loss_clips_only_what_would_gain():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]]).double()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]]).double()
    logprobs = ratio.log().requires_grad_()
    settings = {"clip_range": 0.2, "normalizer": 5.0}
    loss = ppo.policy_loss(logprobs, torch.zeros(1, 5).double(), advantages, torch.ones(1, 5), **settings)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 5)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -torch.tensor([[0.0, -1.5, 0.5, 0.0, 2.2]]).double() / 5)


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0])
def test_a_ratio_out_of_all_bounds_stays_finite(log_ratio):
    """A token that the policy left has an infinite ratio, and infinity times an advantage of 0 is NaN."""
    old, mask = torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2)
    for advantage in (0.0, 1.0, -1.0):
        logprobs = (old + torch.tensor([[0.0, log_ratio]])).requires_grad_()
        losses = [ppo.policy_loss(logprobs, old, advantage * mask, mask, clip_range=0.2, normalizer=1)]
        settings = {"loss_type": "grpo", "beta": 0.0, "kl_estimator": "k3", "clip_low": 0.2, "clip_high": 0.2}
        losses += [grpo.policy_loss(logprobs, old, old, torch.tensor([advantage]), mask, normalizer=1, **settings)]
        losses += [trpo.policy_loss(logprobs, old, torch.tensor([advantage]), mask, normalizer=1)]
        for loss in losses:
            (gradient,) = torch.autograd.grad(loss, logprobs)
            assert loss.isfinite() and gradient.isfinite().all()
