"""Every optimizer step of each script's main, in float64, against its docstring's loss written out by hand.

A GPT-2 (absolute positions) with random weights, a padded vocabulary, several stop ids, pad equal to EOS and a chat
template; prompts of several lengths, so the batch is padded; completions of random bytes, which text cannot give back;
a temperature, a KL weight, a reward that cannot score some completions, micro-batches that divide nothing evenly. The
formulas by hand see single completions, row by row without padding (oracle.plain_logprobs): whatever in main depends on
padding, order, micro-batches, a forgotten temperature or the wrong model's log-probs shows up as another gradient.
"""

import copy
import json
import re
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import common
import dpo
import grape
import grpo
import ppo
import reinforce
import rejection_sampling
import sft
import trpo

import pytest
import torch
from conftest import sample_in_float32
from oracle import flat_gradient, plain_log_softmax, plain_logprobs

STOP_IDS = {0, *range(10, 60)}  # of conftest's chat_model
TEMPERATURE, BETA, G = 0.8, 0.3, 4
pytestmark = pytest.mark.usefixtures("double")


def judge(prompts, completions, **columns):
    """A score by the bytes of a completion, None for some; None, or the same, for all completions of two prompts."""
    numbers = [int(re.search(r"\d+", turns[0]["content"])[0]) for turns in prompts]
    codes = [zlib.crc32(turns[0]["content"].encode()) % 5 for turns in completions]
    return [{1: None, 2: 0.5}.get(n, None if code == 4 else code / 4) for n, code in zip(numbers, codes)]


def doubt(prompts, completions, **columns):
    """Scores with confidences, None for other completions than the judge's."""
    scores = judge(prompts, [[{"content": turns[0]["content"][::-1]}] for turns in completions])
    return [None if score is None else (1 - score, 0.2 + score / 2) for score in scores]


def spy(monkeypatch, owner, name):
    """(arguments, settings, result) of each call of a function from now on."""
    calls, function = [], getattr(owner, name)

    def spied(*args, **settings):
        calls.append((args, settings, function(*args, **settings)))
        return calls[-1][-1]

    monkeypatch.setattr(owner, name, spied)
    return calls


class Rollout:
    """Of each completion: prompt, completion, reward, None for no score; and the models that there were then."""

    def __init__(self, prompts, completions, tokenizer, model, value_model):
        self.prompts, self.completions = both = prompts, completions
        self.model, self.value_model = model, value_model
        self.turns = [[[{"content": tokenizer.decode(ids, skip_special_tokens=True)}] for ids in x] for x in both]
        self.rewards = judge(*self.turns)

    def scored(self, rows=range(6 * G)):
        return [i for i in rows if self.rewards[i] is not None]

    def tokens(self, rows):
        return sum(len(self.completions[i]) for i in rows)

    def logprobs(self, model):
        return [plain_logprobs(model, *row, TEMPERATURE) for row in zip(self.prompts, self.completions)]


class Recording:
    """What main did: rollouts, and before each optimizer step the gradient and the policy that has it."""

    value_model = None

    def __init__(self, tmp_path, monkeypatch, chat_model, chat_data, tokenizer, module, **settings):
        self.tokenizer, self.start, self.rollouts, self.updates, self.learned = tokenizer, None, [], [], 0
        sample_in_float32(module, monkeypatch)
        monkeypatch.setattr(module, "rollout", partial(self.on_rollout, module.rollout))
        monkeypatch.setattr(module, "token_logprobs", partial(self.on_logprobs, module.token_logprobs))
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", partial(self.on_update, torch.nn.utils.clip_grad_norm_))
        orders = spy(monkeypatch, torch, "randperm")
        settings = {"model": chat_model, "data": chat_data, "eval_data": chat_data, "eval_prompts": 6} | settings
        settings |= {"num_steps": 2, "prompts_per_step": 6, "max_new_tokens": 4, "reward": ("test_update:judge",)}
        if module not in (sft, dpo):
            settings |= {"temperature": TEMPERATURE, "samples_per_prompt": G}
        args = module.Args(**{"micro_batch_size": 5} | settings, output_dir=str(tmp_path / "run"))
        args.learning_rate = 1e-3
        module.main(args)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        self.metrics, self.args = [json.loads(line) for line in lines][1:], args
        self.orders = [order for _, settings, order in orders if not settings]  # those of the updates

    def on_rollout(self, rollout, model, prompt_ids, prompt_mask, **settings):
        self.model = model
        self.start = self.start or copy.deepcopy(model)
        result = rollout(model, prompt_ids, prompt_mask, **settings)
        if samples := settings.get("samples_per_prompt"):
            prompts = [ids[mask > 0].tolist() for ids, mask in zip(prompt_ids, prompt_mask) for _ in range(samples)]
            completions = [ids[mask > 0].tolist() for ids, mask in zip(*result[:2])]
            models = copy.deepcopy((model, self.value_model))
            self.rollouts.append(Rollout(prompts, completions, self.tokenizer, *models))
        return result

    def on_logprobs(self, token_logprobs, *batch, **settings):
        self.learned += len(batch[3]) * torch.is_grad_enabled()  # completions in the updates' passes
        return token_logprobs(*batch, **settings)

    def on_update(self, clip, parameters, *norm, **settings):
        parameters = list(parameters)
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        model = self.model if parameters[0] is next(self.model.parameters()) else self.value_model
        update = {"gradient": gradient, "model": copy.deepcopy(model), "rollout": (self.rollouts or [None])[-1]}
        self.updates.append(SimpleNamespace(**update))
        return clip(parameters, *norm, **settings)


def close(got, wanted, tolerance=1e-6):  # the rollout's own log-probs, in the KL of the rewards, are float32
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, atol=tolerance * wanted.abs().max().item(), rtol=1e-4)


def check_metrics(recording, parts=(range(6 * G),)):
    """The metrics of the last step, counted completion by completion; the KL is the mean of its minibatches."""
    rollout, metrics = recording.rollouts[-1], recording.metrics[-1]
    rewards, completions, scored = rollout.rewards, rollout.completions, rollout.scored()
    assert scored and all(None in rollout.rewards for rollout in recording.rollouts)
    sampled, ref = rollout.logprobs(rollout.model), rollout.logprobs(recording.start)
    tokens = rollout.tokens(scored)
    truncated = [completion[-1] not in STOP_IDS for completion in completions]
    assert 0 < sum(truncated) < len(truncated)
    groups = [rewards[start : start + G] for start in range(0, len(rewards), G)]
    expected = {
        "reward/mean": sum(rewards[i] for i in scored) / len(scored),
        "policy/entropy": -sum(sampled[i].sum() for i in scored).item() / tokens,
        "completion/length": sum(map(len, completions)) / len(completions),
        "completion/truncated": sum(truncated) / len(truncated),
        "group/zero_std": sum(None not in group and len(set(group)) == 1 for group in groups) / len(groups),
    }
    scored = [rollout.scored(part) for part in parts]
    kl = [sum((sampled[i] - ref[i]).sum() for i in rows).item() / rollout.tokens(rows) for rows in scored]
    expected["kl/ref"] = sum(kl) / len(kl)
    for name in expected.keys() & metrics.keys():
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert "kl/ref" in metrics or not getattr(recording.args, "beta", 0)


@pytest.fixture
def record(tmp_path, monkeypatch, chat_model, chat_data, tokenizer):
    return partial(Recording, tmp_path, monkeypatch, chat_model, chat_data, tokenizer)


def prompts_with(advantages):
    """How many prompts have a completion with an advantage: the others' completions take no part in an update."""
    return len({i // G for i, advantage in enumerate(advantages) if advantage})


def leave_one_out(recording, rollout):
    """A_i by its definition, of rewards minus beta times the sampled log-ratio to the starting model.

    0 where nothing was scored, or nothing else of the prompt.
    """
    sampled, ref = rollout.logprobs(rollout.model), rollout.logprobs(recording.start)
    kl = [recording.args.beta * (x - y).sum().item() for x, y in zip(sampled, ref)]
    rewards = {i: rollout.rewards[i] - kl[i] for i in rollout.scored()}
    advantages = [0.0] * len(sampled)
    for i, reward in rewards.items():
        others = [other for j, other in rewards.items() if j // G == i // G and j != i]
        advantages[i] = reward - sum(others) / len(others) if others else 0.0
    return advantages


@pytest.mark.parametrize("beta", [BETA, 0.0])
def test_reinforce(record, beta):
    recording, learned = record(reinforce, beta=beta), 0
    assert len(recording.updates) == 2
    for update in recording.updates:
        rollout = update.rollout
        advantages, logprobs = leave_one_out(recording, rollout), rollout.logprobs(update.model)
        loss = -sum(a * x.sum() for a, x in zip(advantages, logprobs)) / len(rollout.scored())
        close(update.gradient, flat_gradient(loss, update.model))
        learned += G * prompts_with(advantages)
    assert recording.learned == learned < 2 * 6 * G
    check_metrics(recording)


def fisher_product(rollout, vector):
    """F v = J' diag(pi) (J v), J v by the difference of two policies a small step apart, of 2 completions a prompt."""
    moved, length = [copy.deepcopy(rollout.model) for _ in range(2)], 1e-5 / vector.abs().max()
    for model, sign in zip(moved, (length, -length)):
        weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        torch.nn.utils.vector_to_parameters(weights + sign * vector, model.parameters())
    some, total = [i for i in rollout.scored() if i % G < 2], 0.0
    for i in some:
        row = (rollout.prompts[i], rollout.completions[i], TEMPERATURE)
        plus, minus, log_softmax = (plain_log_softmax(model, *row) for model in (*moved, rollout.model))
        total = total + ((log_softmax.exp() * (plus - minus) / (2 * length)).detach() * log_softmax).sum()
    return flat_gradient(total / rollout.tokens(some), rollout.model)


def test_trpo(record, monkeypatch):
    products, conjugate_gradient = [], trpo.conjugate_gradient

    def solve(fvp, b, **settings):
        vector = torch.randn(len(b), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        products.append((b.clone(), vector, fvp(vector)))
        assert settings["damping"] == 0.3
        return conjugate_gradient(fvp, b, **settings)

    monkeypatch.setattr(trpo, "conjugate_gradient", solve)
    recording, learned = record(trpo, beta=BETA, fisher_samples=2, damping=0.3), 0
    assert len(products) == 2
    for (b, vector, product), rollout in zip(products, recording.rollouts):
        advantages, logprobs = leave_one_out(recording, rollout), rollout.logprobs(rollout.model)
        surrogate = sum(a * x.sum() for a, x in zip(advantages, logprobs)) / rollout.tokens(rollout.scored())
        close(b, flat_gradient(surrogate, rollout.model))
        learned += G * prompts_with(advantages)
        close(product, fisher_product(rollout, vector), tolerance=1e-5)
    assert recording.learned == learned < 2 * 6 * G
    check_metrics(recording)


def minibatches(recording, passes):
    """The completions of each update, the same in each epoch of a rollout; those of a prompt stay together."""
    assert len(recording.orders) == 2 and all(sorted(order.tolist()) == list(range(6)) for order in recording.orders)
    chunks = [chunk.tolist() for order in recording.orders for _ in range(passes) for chunk in order.chunk(passes)]
    return [[prompt * G + sample for prompt in chunk for sample in range(G)] for chunk in chunks]


def grpo_by_hand(recording, passes, beta):
    """All updates of both rollouts: loss type grpo, k3, std with one degree of freedom less, clip at 0.2."""
    assert len(recording.updates) == 2 * passes**2
    outside, learned = [], 0
    for minibatch, update in zip(minibatches(recording, passes), recording.updates):
        rollout = update.rollout
        new, old, ref = (rollout.logprobs(model) for model in (update.model, rollout.model, recording.start))
        scored, advantages, loss, clipped = rollout.scored(minibatch), [0.0] * 6 * G, 0.0, 0
        for i in scored:
            group = [rollout.rewards[j] for j in scored if j // G == i // G]
            mean = sum(group) / len(group)
            std = (sum((r - mean) ** 2 for r in group) / max(1, len(group) - 1)) ** 0.5
            if max(group) > min(group):
                advantages[i] = (rollout.rewards[i] - mean) / (std + 1e-4)
            ratio, x = (new[i] - old[i].detach()).exp(), ref[i].detach() - new[i]
            gain = torch.min(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i])
            loss = loss + (beta * (x.exp() - x - 1) - gain).mean() / len(scored)
            clipped += ((ratio < 0.8) | (ratio > 1.2)).sum().item()
        close(update.gradient, flat_gradient(loss, update.model))
        outside.append(clipped / rollout.tokens(scored))
        learned += G * prompts_with(advantages) if passes == 1 and not beta else len(minibatch)
    assert recording.learned == learned
    assert (learned < 2 * 6 * G) == (passes == 1 and not beta)
    last = outside[-(passes**2) :]
    assert (sum(last) > 0) == (len(last) > 1)  # with one update of a rollout the ratio is 1 and nothing is clipped
    assert recording.metrics[-1]["policy/clip_frac"] == pytest.approx(sum(last) / len(last), abs=1e-6)
    check_metrics(recording, minibatches(recording, passes)[-passes:])


@pytest.mark.parametrize("passes, beta", [(2, BETA), (1, BETA), (1, 0.0)])
def test_grpo(record, passes, beta):
    """Four updates of each rollout; and one, for which no old log-probs are computed, and without a KL not all rows."""
    grpo_by_hand(record(grpo, beta=beta, num_epochs=passes, num_minibatches=passes), passes, beta)


@pytest.mark.parametrize("passes, beta", [(2, BETA), (1, 0.0)])
def test_grape(record, tmp_path, passes, beta):
    items = [{"name": "a", "weight": 2, "verifier": "test_update:judge"}]
    items += [{"name": "b", "weight": 1, "verifier": "test_update:doubt"}]
    (tmp_path / "rubric.json").write_text(json.dumps({"category": "any", "items": items}))
    settings = {"num_epochs": passes, "num_minibatches": passes, "beta": beta}
    recording = record(grape, rubric=(str(tmp_path / "rubric.json"),), **settings)
    for rollout in recording.rollouts:
        doubted = doubt(*rollout.turns)
        for i, (score, pair) in enumerate(zip(rollout.rewards, doubted)):
            sure = [other[1] for other in doubted[i // G * G : i // G * G + G] if other is not None]
            parts = [(2.0, score)] if score is not None else []
            parts += [(sum(sure) / len(sure), pair[0])] if pair is not None else []
            rollout.rewards[i] = sum(w * s for w, s in parts) / sum(w for w, _ in parts) if parts else None
    grpo_by_hand(recording, passes, beta)


@pytest.fixture
def value_model(monkeypatch):
    class Spied(ppo.ValueModel):
        def __init__(self, model):
            super().__init__(model)
            self.double()
            torch.nn.init.constant_(self.head.weight, 0.05)
            monkeypatch.setattr(Recording, "value_model", self)

    monkeypatch.setattr(ppo, "ValueModel", Spied)


@pytest.mark.parametrize("passes", [2, 1])
def test_ppo(record, value_model, passes):
    gamma, lam, clip, value_clip = 0.9, 0.8, 0.2, 0.05
    settings = {"num_epochs": passes, "num_minibatches": passes, "beta": BETA}
    recording = record(ppo, gamma=gamma, gae_lambda=lam, value_clip_range=value_clip, **settings)
    assert len(recording.updates) == 4 * passes**2  # of two rollouts; the value model's before the policy's

    def values_of(model, prompt, completion):
        hidden = model.base_model(torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
        return model.head(hidden)[len(prompt) - 1 : -1, 0]  # [T]

    any_clipped = False
    updates = zip(minibatches(recording, passes), recording.updates[::2], recording.updates[1::2])
    for minibatch, value_update, update in updates:
        rollout, advantages, old_values = update.rollout, {}, {}
        new, old, ref = (rollout.logprobs(m) for m in (update.model, rollout.model, recording.start))
        for i in rollout.scored():
            T, reward = len(rollout.completions[i]), -BETA * (old[i] - ref[i]).detach()
            reward[-1] += rollout.rewards[i]
            old_values[i] = values_of(rollout.value_model, rollout.prompts[i], rollout.completions[i]).detach()
            v = [*old_values[i], 0.0]  # 0 after the last token, whether it is a stop token or not
            delta = [reward[t] + gamma * v[t + 1] - v[t] for t in range(T)]
            to_go = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, T)) for t in range(T)]
            advantages[i] = torch.stack(to_go)
        everything = torch.cat(list(advantages.values()))
        mean, deviation = everything.mean(), (everything.var(unbiased=False) + 1e-8).sqrt()
        tokens, loss, loss_v = rollout.tokens(rollout.scored(minibatch)), 0.0, 0.0
        for i in rollout.scored(minibatch):
            ratio, advantage = (new[i] - old[i].detach()).exp(), (advantages[i] - mean) / deviation
            loss = loss - torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).sum() / tokens
            returns, v_old = advantages[i] + old_values[i], old_values[i]
            v = values_of(value_update.model, rollout.prompts[i], rollout.completions[i])
            clipped = v_old + (v - v_old).clamp(-value_clip, value_clip)
            any_clipped |= bool((clipped != v).any())
            loss_v = loss_v + torch.max((v - returns) ** 2, (clipped - returns) ** 2).sum() / 2 / tokens
        close(update.gradient, flat_gradient(loss, update.model))
        close(value_update.gradient, flat_gradient(loss_v, value_update.model))
    assert any_clipped == (passes > 1)
    check_metrics(recording)


@pytest.mark.parametrize(("target_kl", "epochs"), [(1e-9, 1), (1e9, 3)])
def test_ppos_target_kl_ends_the_updates_after_an_epoch(record, target_kl, epochs):
    recording = record(ppo, num_epochs=3, num_minibatches=3, target_kl=target_kl)
    assert len(recording.updates) == 2 * len(recording.rollouts) * 3 * epochs


def test_rejection_sampling(record, monkeypatch):
    selected = spy(monkeypatch, rejection_sampling, "select")
    recording = record(rejection_sampling, num_epochs=2, num_minibatches=2, threshold=0.5)
    assert len(recording.updates) == 8 and len(selected) == 2
    for number, update in enumerate(recording.updates):
        rollout, kept = update.rollout, selected[number // 4][-1]
        for prompt in range(6):  # the best of each prompt, if it is above the threshold
            group = range(prompt * G, prompt * G + G)
            best = max((rollout.rewards[i] or 0.0) for i in group)
            assert [rollout.rewards[i] for i in kept.tolist() if i in group] == [best] * (best > 0.5)
        minibatch = kept[recording.orders[number // 2]].chunk(2)[number % 2].tolist()
        logprobs = rollout.logprobs(update.model)
        loss = -sum(logprobs[i].sum() for i in minibatch) / rollout.tokens(minibatch)
        close(update.gradient, flat_gradient(loss, update.model))
    check_metrics(recording)


def templates(tokenizer, chat_data, *columns):
    """Prompt and completion ids of the rows of conftest's chat_data, as the template reads aloud."""
    for row in map(json.loads, Path(chat_data).read_text().splitlines()):
        answers = [[*tokenizer(row[column][0]["content"]).input_ids, tokenizer.eos_token_id] for column in columns]
        yield tokenizer(f"<user>{row['prompt'][0]['content']}<assistant>").input_ids, *answers


def test_sft(record, tokenizer, chat_data, monkeypatch):
    collated = spy(monkeypatch, common, "collate")
    recording, known = record(sft), list(templates(tokenizer, chat_data, "completion"))
    assert len(recording.updates) == 2
    for update, ((prompts, completions, _), *_) in zip(recording.updates, collated[1:]):  # evaluate's
        examples = list(zip(prompts, completions))
        assert len(examples) == 6 and all(example in known for example in examples)
        total = sum(plain_logprobs(update.model, *example, 1.0).sum() for example in examples)
        close(update.gradient, flat_gradient(-total / sum(map(len, completions)), update.model))


@pytest.mark.parametrize("micro_batch_size, weight", [(1, 0.0), (5, 0.3)])
def test_dpo(record, tokenizer, chat_data, monkeypatch, micro_batch_size, weight):
    batches = spy(monkeypatch, common, "collate")
    recording = record(dpo, micro_batch_size=micro_batch_size, beta=BETA, sft_weight=weight)
    known = list(templates(tokenizer, chat_data, "chosen", "rejected"))
    assert len(recording.updates) == 2
    for update, metrics, ((prompts, answers, _), *_) in zip(
        recording.updates, recording.metrics, batches[-3:]
    ):  # the last is evaluate's
        assert len(prompts) == 6 and all(pair in known for pair in zip(prompts, answers[::2], answers[1::2]))
        rows = [(prompts[i // 2], completion) for i, completion in enumerate(answers)]
        logps, ref = (
            torch.stack([plain_logprobs(model, *row, 1.0).sum() for row in rows]).view(-1, 2)
            for model in (update.model, recording.start)
        )
        for name, expected in zip(("logps/chosen", "logps/rejected"), logps.mean(0).tolist()):
            assert metrics[name] == pytest.approx(expected)
        h = (logps - ref.detach()) @ torch.tensor([1.0, -1.0])
        nll = -logps[:, 0] / torch.tensor([len(completion) for _, completion in rows[::2]])  # arXiv 2404.19733, eq. 1
        loss = (weight * nll - (BETA * h).sigmoid().log()).mean()
        close(update.gradient, flat_gradient(loss, update.model))
