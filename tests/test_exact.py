"""Gradients against the exact ones of a model whose every completion can be enumerated (tests/oracle.py).

A vocabulary of 4 with one stop token, sampled at temperature 0.7: 13 completions of up to 2 tokens, 40 of up to 3.
"""

import dpo
import grpo
import ppo
import reinforce
import rejection_sampling
import trpo

import pytest
import torch
from conftest import random_model
from oracle import Oracle, flat_gradient
from torch.nn.attention import SDPBackend, sdpa_kernel

TEMPERATURE = 0.7
pytestmark = pytest.mark.usefixtures("double")


def oracle_of(max_new_tokens=2, kind="gpt2", moved=0.0, prompt=(1, 3)):
    """The oracle of a random model, or of one whose weights are moved away from it: another policy."""
    model = random_model(kind, vocab_size=4).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += moved * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return Oracle(model, list(prompt), max_new_tokens=max_new_tokens, temperature=TEMPERATURE)


def logprobs_of(oracle, module=reinforce):
    """[M, T] by the script's own path, the padding included."""
    return module.token_logprobs(oracle.model, *oracle.batch(), temperature=TEMPERATURE)


def rewards_of(oracle):
    return (torch.arange(len(oracle.p)) * 5 % 7 / 7 + 0.3).double()


def all_groups(oracle, size):
    """Indices [K, size] of every group of completions, and the probability [K] of each."""
    groups = torch.cartesian_prod(*[torch.arange(len(oracle.p))] * size)
    return groups, oracle.p.detach()[groups].prod(1)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def close(got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, wanted, atol=tolerance * wanted.abs().max().item(), rtol=100 * tolerance)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_logprobs_are_those_of_every_completion(kind):
    oracle = oracle_of(3, kind)
    assert len(oracle.p) == 40 and oracle.p.sum().item() == pytest.approx(1.0, abs=1e-12)
    got = logprobs_of(oracle)
    tolerance = 1e-10 if kind == "gpt2" else 1e-5  # the norms of the others are in float32
    for row, expected in zip(got, oracle.token_logprobs):
        close(row[: len(expected)], expected, tolerance)
        assert (row[len(expected) :] == 0).all()
    gradient = oracle.gradient((got.sum(1).exp() * rewards_of(oracle)).sum())
    close(gradient, oracle.policy_gradient(rewards_of(oracle)), tolerance)


# REINFORCE


@pytest.mark.parametrize(("baseline", "share"), [("none", 1.0), ("mean", 2 / 3), ("leave_one_out", 1.0)])
def test_reinforce_in_expectation_over_all_groups(baseline, share):
    """Exact for none and leave-one-out; the mean over all G shrinks it by (G - 1) / G, here 2 / 3."""
    oracle = oracle_of()
    groups, probability = all_groups(oracle, 3)
    rewards = rewards_of(oracle)[groups].view(-1)
    advantages = reinforce.compute_advantages(rewards, samples_per_prompt=3, baseline=baseline)
    weighted = (advantages.view(-1, 3) * probability[:, None]).view(-1)  # the loss is linear in the advantages
    rows = groups.view(-1)
    loss = reinforce.policy_loss(logprobs_of(oracle)[rows], weighted, oracle.mask[rows], normalizer=3)
    close(-oracle.gradient(loss), share * oracle.policy_gradient(rewards_of(oracle)))


# GRPO

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def expected_grpo_gradient(oracles, rewards, loss_type, scale, size=3):
    """Minus the expected gradient of a first update on a group of each prompt, the prompts weighing the same."""
    losses = 0.0
    for oracle, reward in zip(oracles, rewards):
        groups, probability = all_groups(oracle, size)
        rows = groups.view(-1)
        advantages = grpo.compute_advantages(reward[rows], samples_per_prompt=size, scale=scale)
        normalizers = [grpo.loss_normalizer(oracle.mask[group], loss_type, 2) for group in groups]
        weights = probability / torch.stack([torch.as_tensor(n) for n in normalizers]) / len(oracles)
        weighted = (advantages.view(-1, size) * weights[:, None]).view(-1)  # the loss is linear in the advantages
        logprobs = logprobs_of(oracle, grpo)[rows]
        settings = {"loss_type": loss_type, "beta": 0.0, "normalizer": 1.0, "kl_estimator": "k3", **CLIP}
        losses += grpo.policy_loss(logprobs, logprobs.detach(), None, weighted, oracle.mask[rows], **settings)
    return -flat_gradient(losses, oracles[0].model)


def test_dr_grpo_is_the_policy_gradient_and_grpo_is_not():
    """Dr. GRPO (arXiv 2503.20783): the exact direction, times (G - 1) / G / max_new_tokens.

    Division by the length turns it, as does that by the number of tokens in the batch, which comes from the samples; so
    does division by the standard deviation, which weighs a prompt the more the less its completions differ.
    """
    oracle = oracle_of()
    other = Oracle(oracle.model, [2, 2, 1], max_new_tokens=2, temperature=TEMPERATURE)
    oracles, rewards = [oracle, other], [rewards_of(oracle), 0.1 * rewards_of(other).flip(0)]
    exact = sum(o.policy_gradient(r) for o, r in zip(oracles, rewards)) / 2
    close(expected_grpo_gradient(oracles, rewards, "dr_grpo", "none"), exact * (2 / 3) / 2)
    for loss_type, scale, most in (("grpo", "none", 0.9995), ("dapo", "none", 0.99999), ("dr_grpo", "std", 0.96)):
        assert cosine(expected_grpo_gradient(oracles, rewards, loss_type, scale), exact) < most, (loss_type, scale)


# KL to a reference: what the estimators are worth, in a loss and in a reward


def kl_loss(oracle, other, estimator):
    """The expected KL term of grpo.py's loss with beta 1, and its gradient, the samples being data."""
    logprobs, ref = logprobs_of(oracle, grpo), logprobs_of(other, grpo).detach()
    settings = {"beta": 1.0, "kl_estimator": estimator, "loss_type": "dr_grpo", "normalizer": 1.0, **CLIP}
    zero = torch.zeros(1).double()
    rows = [(x[None], x.detach()[None], r[None], zero, m[None]) for x, r, m in zip(logprobs, ref, oracle.mask)]
    loss = sum(p * grpo.policy_loss(*row, **settings) for p, row in zip(oracle.p.detach(), rows))
    return loss.detach(), oracle.gradient(loss)


def kl_of_each_state(oracle, other, forward):
    """sum over states s of sg(pi(s)) KL(pi(.|s) || ref(.|s)), or of the reverse; the gradient sees the KLs alone."""
    total = 0.0
    for state, (index, *_) in oracle.prefixes().items():
        pi, ref = oracle.log_softmax[index][len(state)], other.log_softmax[index][len(state)].detach()
        reach = oracle.token_logprobs[index][: len(state)].sum().exp().detach()
        total = total + reach * ((ref.exp() * (ref - pi)) if forward else (pi.exp() * (pi - ref))).sum()
    return total


@pytest.mark.parametrize("max_new_tokens", [1, 3])
def test_kl_estimators_in_the_loss(max_new_tokens):
    """k3 has the exact KL for a value and the forward KL's gradient, k2 the gradient of the KL itself: token by token.

    A token's share in the KL of the states that it leads to reaches neither gradient, so that for completions of
    several tokens k2's is not the gradient of the completions' KL, as it is for one token.
    """
    oracle, other = oracle_of(max_new_tokens), oracle_of(max_new_tokens, moved=0.01)
    exact = oracle.kl(other)
    value, gradient = kl_loss(oracle, other, "k3")
    assert exact.item() > 0.1
    close(value, exact.detach())
    close(gradient, oracle.gradient(kl_of_each_state(oracle, other, forward=True)))
    assert cosine(gradient, oracle.gradient(exact)) < 0.9995
    value, gradient = kl_loss(oracle, other, "k2")
    assert abs(value - exact) > 0.01 * exact  # biased, if little
    token_kl = kl_of_each_state(oracle, other, forward=False)
    close(gradient, oracle.gradient(token_kl))
    if max_new_tokens == 1:
        close(gradient, oracle.gradient(exact))
    else:
        assert cosine(gradient, oracle.gradient(exact)) < 0.996
    close(token_kl.detach(), exact.detach())  # the value knows no difference
    # k1 as a loss: its value is right, but its gradient is of nothing
    k1 = (oracle.p.detach() * (oracle.logp - other.logp.detach())).sum()
    close(k1.detach(), exact.detach())
    assert oracle.gradient(k1).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("moved", "kl", "k3", "k2"),
    [(0.005, 0.134, 0.951, 0.989), (0.01, 0.390, 0.914, 0.961), (0.04, 4.091, 0.840, 0.885)],
)
def test_how_far_the_gradients_of_k3_and_k2_turn(moved, kl, k3, k2):
    """Their cosines with the gradient of the KL of completions of 3 tokens; docs/correctness.md quotes them."""
    oracle, other = oracle_of(3), oracle_of(3, moved=moved)
    exact = oracle.kl(other)
    assert exact.item() == pytest.approx(kl, abs=1e-3)
    for estimator, expected in (("k3", k3), ("k2", k2)):
        gradient = kl_loss(oracle, other, estimator)[1]
        assert cosine(gradient, oracle.gradient(exact)) == pytest.approx(expected, abs=1e-3), estimator


def test_k1_in_the_reward_is_the_gradient_of_the_completions_kl():
    """As reinforce.py and trpo.py take it off a completion's reward, and ppo.py off each token's."""
    oracle, other = oracle_of(3), oracle_of(3, moved=0.01)
    logprobs = logprobs_of(oracle)
    kl = (logprobs - logprobs_of(other)).detach() * oracle.mask  # [M, T]
    exact = oracle.gradient(oracle.kl(other))
    weight = oracle.p.detach()
    close(oracle.gradient(reinforce.policy_loss(logprobs, -kl.sum(1) * weight, oracle.mask, normalizer=1)), exact)
    to_go, _ = ppo.compute_gae(-kl, torch.zeros_like(kl), oracle.mask, gamma=1.0, gae_lambda=1.0)
    close(-ppo_gradient(oracle, to_go), exact)
    loss = trpo.policy_loss(logprobs, logprobs.detach(), -kl.sum(1) * weight, oracle.mask, normalizer=1)
    close(oracle.gradient(loss), exact)


# PPO


def exact_values(oracle, rewards):
    """[M, T]: expected reward of the state in which each token is sampled; 77 in the padding."""
    p = oracle.p.detach()
    values = torch.full(oracle.mask.shape, 77.0).double()
    for state, index in oracle.prefixes().items():
        values[index, len(state)] = (p * rewards)[index].sum() / p[index].sum()
    return values


def advantages_of(oracle, rewards, values, gae_lambda):
    """As ppo.py's main lays rewards out: the score on the last token, a stop token or not."""
    token_rewards = torch.zeros_like(oracle.mask).double()
    token_rewards[range(len(rewards)), oracle.lengths - 1] = rewards
    return ppo.compute_gae(token_rewards, values, oracle.mask, gamma=1.0, gae_lambda=gae_lambda)[0]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_advantages_of_the_exact_values_have_mean_0_in_each_state(gae_lambda):
    oracle = oracle_of(3)
    rewards = rewards_of(oracle)
    advantages = advantages_of(oracle, rewards, exact_values(oracle, rewards), gae_lambda)
    assert advantages.abs().max() > 0.1 and (advantages[oracle.mask == 0] == 0).all()
    for state, index in oracle.prefixes().items():
        mean = (oracle.p.detach()[index] * advantages[index, len(state)]).sum()
        assert abs(mean) < 1e-12, state


def ppo_gradient(oracle, advantages):
    """Minus the expected gradient of the first update."""
    logprobs = logprobs_of(oracle, ppo)
    weighted, settings = advantages * oracle.p.detach()[:, None], {"clip_range": 0.2, "normalizer": 1}
    return -oracle.gradient(ppo.policy_loss(logprobs, logprobs.detach(), weighted, oracle.mask, **settings))


def test_ppos_first_update_is_the_policy_gradient():
    """With the exact values for each lambda; with wrong ones for lambda 1 alone, which needs no values to be right."""
    oracle = oracle_of(3)
    rewards = rewards_of(oracle)
    exact, right = oracle.policy_gradient(rewards), exact_values(oracle, rewards)
    wrong = right + torch.tensor([0.3, -0.5, 0.2])  # of the state alone, as a baseline must be
    for gae_lambda in (0.0, 0.5, 1.0):
        close(ppo_gradient(oracle, advantages_of(oracle, rewards, right, gae_lambda)), exact)
    close(ppo_gradient(oracle, advantages_of(oracle, rewards, wrong, 1.0)), exact)
    assert (ppo_gradient(oracle, advantages_of(oracle, rewards, wrong, 0.5)) - exact).norm() > 0.05 * exact.norm()


# TRPO


def test_fisher_vector_product_over_all_completions():
    """Weighted by their probabilities, it is E[g g'] v of whole completions, g the gradient of log p(y)."""
    oracle = oracle_of(2)
    vector = torch.randn(len(oracle.gradient(oracle.logp[0])), generator=torch.Generator().manual_seed(0)).double()
    jacobian = torch.stack([oracle.gradient(logp) for logp in oracle.logp])  # [M, n]
    expected = jacobian.T @ (oracle.p.detach() * (jacobian @ vector))
    settings = {"temperature": TEMPERATURE, "normalizer": 1.0}
    parameters = list(oracle.model.parameters())
    *factor, weight = trpo.fisher_factors(oracle.model, parameters, oracle.batch(), **settings)
    p = oracle.p.detach().repeat_interleave(oracle.lengths)[:, None]  # of each token's completion
    close(trpo.fisher_vector_product([(*factor, weight * p)], parameters, vector), expected)
    # and it is the Hessian of the completions' exact KL at the policy itself
    with sdpa_kernel(SDPBackend.MATH):
        again = Oracle(oracle.model, oracle.prompt, max_new_tokens=2, temperature=TEMPERATURE)
    kl = (again.p.detach() * (again.logp.detach() - again.logp)).sum()
    first = trpo.flatten(torch.autograd.grad(kl, parameters, create_graph=True))
    assert first.abs().max() < 1e-10
    close(trpo.flatten(torch.autograd.grad(first @ vector, parameters)), expected, 1e-9)


def test_the_searchs_surrogate_and_kl_are_exact():
    oracle, other = oracle_of(3), oracle_of(3, moved=0.01)
    rewards, surrogate, kl = rewards_of(oracle), 0.0, 0.0
    for row, p in enumerate(oracle.p.detach()):
        completion = [x[row : row + 1] for x in (oracle.ids, oracle.mask, rewards)]
        chunks = [(*oracle.batch()[:2], *completion)]
        s, k = trpo.surrogate_and_kl(other.model, oracle.model, chunks, temperature=TEMPERATURE)  # per token
        surrogate, kl = surrogate + p * s * oracle.lengths[row], kl + p * k * oracle.lengths[row]
    close(kl, oracle.kl(other).detach())
    ratios = [(new - old).exp().sum() for new, old in zip(other.token_logprobs, oracle.token_logprobs)]
    close(surrogate, (oracle.p * rewards * torch.stack(ratios)).sum().detach())


# rejection sampling


def test_best_of_n_over_all_groups():
    """What is kept of every group of 3, by its probability, against F(r)^3 - F(r-)^3; every reward is another."""
    oracle = oracle_of(2)
    groups, probability = all_groups(oracle, 3)
    rewards = rewards_of(oracle) + torch.arange(len(oracle.p)) / 100
    assert len(set(rewards.tolist())) == len(rewards)
    texts = [str(oracle.completions[index]) for index in groups.view(-1)]
    settings = {"samples_per_prompt": 3, "strategy": "best_of_prompt", "threshold": 0.4}
    settings["generator"] = torch.Generator().manual_seed(0)
    kept = rejection_sampling.select(rewards[groups].view(-1), texts, **settings)
    got = torch.zeros(len(rewards)).double().index_add(0, groups.view(-1)[kept], probability[kept // 3])
    order = rewards.argsort()
    cumulative = torch.cat([torch.zeros(1), oracle.p.detach()[order].cumsum(0)]) ** 3
    expected = torch.zeros(len(rewards)).double()
    expected[order] = cumulative.diff()
    expected[rewards <= 0.4] = 0.0  # the best of a group of failures is a failure
    assert (expected == 0).any()
    close(got, expected)


# DPO


def minimise(loss, log_policy):
    """log_policy [M], normalised, where the loss is least."""
    logits = log_policy.detach().clone().requires_grad_()
    settings = {"tolerance_grad": 1e-10, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], max_iter=5000, **settings)

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def pairs_of(count):
    return torch.cartesian_prod(torch.arange(count), torch.arange(count))


def expected_loss(reference, preference, loss_type, beta, label_smoothing=0.0):
    """Of every pair, each order by how often people prefer it, as a function of the policy's log-probs [M]."""
    w, l = pairs_of(len(reference)).unbind(1)
    settings = {"beta": beta, "loss_type": loss_type, "label_smoothing": label_smoothing}

    def loss(policy):
        return (preference * dpo.dpo_loss(policy[w], policy[l], reference[w], reference[l], **settings)).sum()

    return loss


def test_dpos_minimiser_is_the_closed_form():
    """pi(y) as ref(y) exp(r(y) / beta), for preferences by Bradley and Terry (arXiv 2305.18290, eq. 4)."""
    oracle, beta = oracle_of(2), 0.5
    reference, rewards = oracle.logp.detach(), rewards_of(oracle)
    w, l = pairs_of(len(reference)).unbind(1)
    optimum = (reference + rewards / beta).log_softmax(0)
    preference = torch.sigmoid(rewards[w] - rewards[l])
    close(minimise(expected_loss(reference, preference, "sigmoid", beta), reference).exp(), optimum.exp())
    # with a fifth of the labels flipped the plain loss misses it, and the robust one does not
    flipped = 0.8 * preference + 0.2 * (1 - preference)
    close(minimise(expected_loss(reference, flipped, "robust", beta, 0.2), reference).exp(), optimum.exp())
    missed = minimise(expected_loss(reference, flipped, "sigmoid", beta), reference)
    assert (missed.exp() - optimum.exp()).abs().max() > 0.02


def test_minimisers_of_the_other_losses():
    """On one pair that everyone labels alike or a share p does: what each loss is after, by hand."""
    reference, p, beta = torch.tensor([0.3, 0.7]).double().log(), 0.8, 0.5
    preference = torch.tensor([0.0, p, 1 - p, 0.0]).double()  # of the pairs 00, 01, 10, 11

    def margin(loss_type, preference, label_smoothing=0.0):
        policy = minimise(expected_loss(reference, preference, loss_type, beta, label_smoothing), reference)
        return ((policy - reference)[0] - (policy - reference)[1]).item()

    assert margin("ipo", preference) == pytest.approx((2 * p - 1) / (2 * beta), abs=1e-6)  # arXiv 2310.12036, eq. 17
    certain = torch.tensor([0.0, 1.0, 0.0, 0.0]).double()
    assert margin("ipo", certain) == pytest.approx(1 / (2 * beta), abs=1e-6)
    e = 0.1  # conservative DPO stops where the model is as sure as the labels are: sigmoid(beta h) = 1 - e
    assert margin("sigmoid", certain, e) == pytest.approx(torch.tensor((1 - e) / e).log().item() / beta, abs=1e-5)
    assert margin("hinge", certain) >= 1 / beta - 1e-6  # no gradient once the margin is 1 / beta
