"""Every optimizer step of each script's main, in float64, against its docstring's loss written out by hand.

A GPT-2 (absolute positions) with random weights, a padded vocabulary, several stop ids, pad equal to EOS and a chat
template; prompts of several lengths, so the batch is padded; completions of random bytes, which text cannot give back;
a temperature, a KL weight, a reward that cannot score some completions, micro-batches that divide nothing evenly. The
formulas by hand see single completions, row by row without padding (oracle.plain_logprobs): whatever in main depends on
padding, order, micro-batches, a forgotten temperature or the wrong model's log-probs shows up as another gradient.
"""

import copy
import json
import zlib
from pathlib import Path
from types import SimpleNamespace

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
from oracle import flat_gradient, plain_log_softmax, plain_logprobs

STOP_IDS = {0, *range(10, 60)}  # of conftest's chat_model
TEMPERATURE, BETA, G = 0.8, 0.3, 4
pytestmark = pytest.mark.usefixtures("double")

JUDGE = """
import zlib
def judge(prompts, completions, **columns):
    codes = [zlib.crc32(turns[0]["content"].encode()) % 5 for turns in completions]
    return [None if code == 4 else code / 3 for code in codes]
def doubt(prompts, completions, **columns):
    codes = [zlib.crc32(turns[0]["content"].encode()) % 10 for turns in completions]
    return [None if code in (1, 4) else (code / 9, (10 - code) / 12) for code in codes]
"""


def judge(text):
    code = zlib.crc32(text.encode()) % 5
    return None if code == 4 else code / 3


def doubt(text):
    code = zlib.crc32(text.encode()) % 10
    return None if code in (1, 4) else (code / 9, (10 - code) / 12)


class Recording:
    """What main did: rollouts, and before each optimizer step the gradient and the policy that has it."""

    def __init__(self, module, tmp_path, monkeypatch, chat_model, chat_data, **settings):
        self.module, self.monkeypatch = module, monkeypatch
        self.rollouts, self.updates, self.orders, self.start = [], [], [], None
        self.spy("rollout", self.on_rollout)
        for name, hook in (("select", "kept"), ("collate", "collated"), ("conjugate_gradient", "solved")):
            if hasattr(module, name):
                self.record(name, hook)
        clip = torch.nn.utils.clip_grad_norm_
        monkeypatch.setattr(
            torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: clip(self.on_update(list(parameters)), norm)
        )
        randperm = torch.randperm
        monkeypatch.setattr(torch, "randperm", lambda n, **k: self.on_order(randperm(n, **k), k))
        (tmp_path / "mine.py").write_text(JUDGE)
        common_settings = {"num_steps": 2, "prompts_per_step": 6, "micro_batch_size": 5, "eval_prompts": 6}
        args = module.Args(model=chat_model, data=chat_data, eval_data=chat_data, **(common_settings | settings))
        args.reward, args.learning_rate = (f"{tmp_path}/mine.py:judge",), 1e-3
        args.max_new_tokens, args.output_dir = 4, str(tmp_path / "run")
        if module not in (sft, dpo):
            args.temperature, args.samples_per_prompt = TEMPERATURE, G
        module.main(args)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        self.metrics = [json.loads(line) for line in lines][1:]
        self.args = args

    def spy(self, name, wrapped):
        function = getattr(self.module, name)
        self.monkeypatch.setattr(self.module, name, lambda *a, **k: wrapped(function, *a, **k))

    def record(self, name, into):
        setattr(self, into, [])
        self.spy(name, lambda f, *a, **k: getattr(self, into).append((a, f(*a, **k))) or getattr(self, into)[-1][1])

    def on_rollout(self, rollout, model, prompt_ids, prompt_mask, **settings):
        self.model = model
        if self.start is None:
            self.start = copy.deepcopy(model)
        with self.monkeypatch.context() as patch:  # sampling itself stays in float32
            patch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(torch.float32))
            result = rollout(model, prompt_ids, prompt_mask, **settings)
        if settings.get("temperature", 0) > 0:
            rows = list(zip(prompt_ids, prompt_mask)), list(zip(*result))
            prompts = [ids[mask > 0].tolist() for ids, mask in rows[0]]
            completions = [ids[mask > 0].tolist() for ids, mask, _, _ in rows[1]]
            old_value = copy.deepcopy(self.value_model) if hasattr(self, "value_model") else None
            self.rollouts.append(
                SimpleNamespace(
                    prompts=[prompt for prompt in prompts for _ in range(settings["samples_per_prompt"])],
                    completions=completions,
                    model=copy.deepcopy(model),
                    value_model=old_value,
                )
            )
        return result

    def on_update(self, parameters):
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        model = self.model if parameters[0] is next(self.model.parameters()) else self.value_model
        self.updates.append(
            SimpleNamespace(gradient=gradient, model=copy.deepcopy(model), rollout=len(self.rollouts) - 1)
        )
        return parameters

    def on_order(self, order, settings):
        if "generator" not in settings:
            self.orders.append(order.clone())
        return order

    def texts(self, rollout, tokenizer):
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.completions]


def logprobs_of(model, rollout, temperature=TEMPERATURE):
    return [plain_logprobs(model, p, c, temperature) for p, c in zip(rollout.prompts, rollout.completions)]


def close(got, wanted, tolerance=1e-6):  # the rollout's own log-probs, in the KL of the rewards, are float32
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, atol=tolerance * wanted.abs().max().item(), rtol=1e-4)


def check_metrics(recording, tokenizer, rewards_of):
    """The metrics of the last step, counted completion by completion."""
    rollout, metrics = recording.rollouts[-1], recording.metrics[-1]
    rewards = rewards_of(recording.texts(rollout, tokenizer))
    scored = [i for i, reward in enumerate(rewards) if reward is not None]
    assert scored and any(None in rewards_of(recording.texts(r, tokenizer)) for r in recording.rollouts)
    sampled, ref = logprobs_of(rollout.model, rollout), logprobs_of(recording.start, rollout)
    tokens = sum(len(rollout.completions[i]) for i in scored)
    truncated = [completion[-1] not in STOP_IDS for completion in rollout.completions]
    assert 0 < sum(truncated) < len(truncated)
    groups = [rewards[start : start + G] for start in range(0, len(rewards), G)]
    expected = {
        "reward/mean": sum(rewards[i] for i in scored) / len(scored),
        "policy/entropy": -sum(sampled[i].sum() for i in scored).item() / tokens,
        "completion/length": sum(map(len, rollout.completions)) / len(rewards),
        "completion/truncated": sum(truncated) / len(truncated),
        "group/zero_std": sum(None not in group and len(set(group)) == 1 for group in groups) / len(groups),
        "kl/ref": sum((sampled[i] - ref[i]).sum() for i in scored).item() / tokens,
    }
    for name in expected.keys() & metrics.keys():
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert "kl/ref" in metrics or not getattr(recording.args, "beta", 0)


def leave_one_out(rewards):
    """A_i by its definition; 0 where nothing was scored, or nothing else of the prompt."""
    advantages = []
    for i, reward in enumerate(rewards):
        start = i // G * G
        others = [rewards[j] for j in range(start, start + G) if j != i and rewards[j] is not None]
        advantages.append(reward - sum(others) / len(others) if reward is not None and others else 0.0)
    return advantages


def penalised(recording, rollout, rewards):
    """Each reward minus beta times the sampled log-ratio to the starting model."""
    sampled, ref = logprobs_of(rollout.model, rollout), logprobs_of(recording.start, rollout)
    kl = [(s - r).sum().item() for s, r in zip(sampled, ref)]
    return [None if reward is None else reward - BETA * k for reward, k in zip(rewards, kl)]


def judged(texts):
    return [judge(text) for text in texts]


@pytest.fixture
def record(tmp_path, monkeypatch, chat_model, chat_data):
    def run(module, **settings):
        return Recording(module, tmp_path, monkeypatch, chat_model, chat_data, **settings)

    return run


def test_reinforce(record, tokenizer):
    recording = record(reinforce, beta=BETA)
    assert len(recording.updates) == len(recording.rollouts) == 2
    for update, rollout in zip(recording.updates, recording.rollouts):
        rewards = judged(recording.texts(rollout, tokenizer))
        advantages = leave_one_out(penalised(recording, rollout, rewards))
        scored = sum(reward is not None for reward in rewards)
        logprobs = logprobs_of(update.model, rollout)
        loss = -sum(a * x.sum() for a, x in zip(advantages, logprobs)) / scored
        close(update.gradient, flat_gradient(loss, update.model))
    check_metrics(recording, tokenizer, judged)


def test_trpo(record, tokenizer, monkeypatch):
    products = []
    conjugate_gradient = trpo.conjugate_gradient

    def spy(fvp, b, **settings):
        vector = torch.randn(len(b), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        products.append((b.clone(), vector, fvp(vector)))
        return conjugate_gradient(fvp, b, **settings)

    monkeypatch.setattr(trpo, "conjugate_gradient", spy)
    recording = record(trpo, beta=BETA, fisher_samples=2, damping=0.3)
    assert len(products) == 2
    for (b, vector, product), rollout in zip(products, recording.rollouts):
        rewards = judged(recording.texts(rollout, tokenizer))
        advantages = leave_one_out(penalised(recording, rollout, rewards))
        scored = [i for i, reward in enumerate(rewards) if reward is not None]
        tokens = sum(len(rollout.completions[i]) for i in scored)
        logprobs = logprobs_of(rollout.model, rollout)
        surrogate = sum(a * x.sum() for a, x in zip(advantages, logprobs)) / tokens
        close(b, flat_gradient(surrogate, rollout.model))
        # F v = J' diag(pi) (J v), J v by the difference of two policies a small step apart, of 2 completions a prompt
        some = [i for i in scored if i % G < 2]
        moved = []
        for sign in (1e-5, -1e-5):
            other, offset = copy.deepcopy(rollout.model), 0
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter += sign * vector[offset : offset + parameter.numel()].view_as(parameter)
                    offset += parameter.numel()
            moved.append(other)
        total = 0.0
        for i in some:
            row = (rollout.prompts[i], rollout.completions[i], TEMPERATURE)
            with torch.no_grad():
                plus, minus = (plain_log_softmax(model, *row) for model in moved)
            log_softmax = plain_log_softmax(rollout.model, *row)
            total = total + (log_softmax.detach().exp() * (plus - minus) / 2e-5 * log_softmax).sum()
        total = total / sum(len(rollout.completions[i]) for i in some)
        close(product, flat_gradient(total, rollout.model) + 0.3 * vector, tolerance=1e-5)
    check_metrics(recording, tokenizer, judged)


def rows_of(order):
    """The rows of a shuffle in which the completions of a prompt stay together."""
    return torch.tensor([prompt * G + sample for prompt in order.tolist() for sample in range(G)])


def grpo_by_hand(recording, tokenizer, rewards_of, num_minibatches=2, num_epochs=2, beta=BETA):
    """All updates of both rollouts: loss type grpo, k3, std with one degree of freedom less, clip at 0.2."""
    assert len(recording.updates) == 2 * num_minibatches * num_epochs
    B = len(recording.rollouts[0].completions)
    outside = []
    for number, update in enumerate(recording.updates):
        rollout = recording.rollouts[update.rollout]
        order = rows_of(recording.orders[number // num_minibatches])
        assert sorted(order.tolist()) == list(range(B))
        minibatch = order.chunk(num_minibatches)[number % num_minibatches].tolist()
        rewards = rewards_of(recording.texts(rollout, tokenizer))
        scored = [i for i in minibatch if rewards[i] is not None]
        new, old, ref = (logprobs_of(m, rollout) for m in (update.model, rollout.model, recording.start))
        loss, clipped = 0.0, 0
        for i in scored:
            group = [r for r in rewards[i // G * G : i // G * G + G] if r is not None]
            mean = sum(group) / len(group)
            std = (sum((r - mean) ** 2 for r in group) / max(1, len(group) - 1)) ** 0.5
            advantage = (rewards[i] - mean) / (std + 1e-4) if max(group) > min(group) else 0.0
            ratio = (new[i] - old[i].detach()).exp()
            x = ref[i].detach() - new[i]
            token_losses = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + beta * (x.exp() - x - 1)
            loss = loss + token_losses.mean() / len(scored)
            clipped += ((ratio < 0.8) | (ratio > 1.2)).sum().item()
        close(update.gradient, flat_gradient(loss, update.model))
        outside.append(clipped / sum(len(rollout.completions[i]) for i in scored))
    last = outside[-num_minibatches * num_epochs :]
    assert (sum(last) > 0) == (len(last) > 1)  # with one update of a rollout the ratio is 1 and nothing is clipped
    assert recording.metrics[-1]["policy/clip_frac"] == pytest.approx(sum(last) / len(last), abs=1e-6)
    check_metrics(recording, tokenizer, rewards_of)


@pytest.mark.parametrize("passes, beta", [(2, BETA), (1, BETA), (1, 0.0)])
def test_grpo(record, tokenizer, passes, beta):
    """Four updates of each rollout; and one, for which no old log-probs are computed, and without a KL not all rows."""
    recording = record(grpo, beta=beta, num_epochs=passes, num_minibatches=passes)
    grpo_by_hand(recording, tokenizer, judged, passes, passes, beta)


@pytest.mark.parametrize("module", [reinforce, trpo, grpo, grape])
@pytest.mark.parametrize("beta, passes", [(0.0, 1), (0.0, 2), (BETA, 1)])
def test_rows_without_an_advantage_take_no_part_in_the_update(record, tmp_path, monkeypatch, module, beta, passes):
    """Their gradient is 0, unless a KL or the ratio of a second pass has something to do with them."""
    advantages, rows = [], []
    compute_advantages, token_logprobs = module.compute_advantages, module.token_logprobs

    def spied_advantages(*arguments, **settings):
        advantages.append(compute_advantages(*arguments, **settings))
        return advantages[-1]

    def spied_logprobs(model, *batch, **settings):
        if torch.is_grad_enabled():
            rows.append(len(batch[0]))
        return token_logprobs(model, *batch, **settings)

    monkeypatch.setattr(module, "compute_advantages", spied_advantages)
    monkeypatch.setattr(module, "token_logprobs", spied_logprobs)
    rubric = tmp_path / "rubric.json"
    rubric.write_text(
        json.dumps({"category": "any", "items": [{"name": "a", "weight": 1, "verifier": "mine.py:judge"}]})
    )
    more = {
        reinforce: {},
        trpo: {},
        grpo: {"num_epochs": passes},
        grape: {"num_epochs": passes, "rubric": (str(rubric),)},
    }
    record(module, beta=beta, **more[module])
    have_one, all_rows = (torch.cat(advantages) != 0).sum().item(), sum(map(len, advantages))
    assert 0 < have_one < all_rows
    left_out = module in (reinforce, trpo) or (beta == 0 and passes == 1)
    assert sum(rows) == (have_one if left_out else passes * all_rows)


def test_grape(record, tokenizer, tmp_path):
    items = [
        {"name": "a", "weight": 2, "verifier": "mine.py:judge"},
        {"name": "b", "weight": 1, "verifier": "mine.py:doubt"},
    ]
    (tmp_path / "rubric.json").write_text(json.dumps({"category": "any", "items": items}))
    recording = record(grape, beta=BETA, num_epochs=2, num_minibatches=2, rubric=(str(tmp_path / "rubric.json"),))

    def rubric(texts):
        rewards = []
        for i, text in enumerate(texts):
            group = [doubt(t) for t in texts[i // G * G : i // G * G + G]]
            sure = [pair[1] for pair in group if pair is not None]
            c = sum(sure) / len(sure) if sure else 0.0
            parts = [(2.0, judge(text))] if judge(text) is not None else []
            parts += [(c, doubt(text)[0])] if doubt(text) is not None else []
            rewards.append(sum(w * s for w, s in parts) / sum(w for w, _ in parts) if parts else None)
        return rewards

    grpo_by_hand(recording, tokenizer, rubric)


@pytest.mark.parametrize("passes", [2, 1])
def test_ppo(record, tokenizer, monkeypatch, passes):
    models = []

    class Spied(ppo.ValueModel):
        def __init__(self, model):
            super().__init__(model)
            self.double()
            with torch.no_grad():
                self.head.weight.fill_(0.05)
            models.append(self)

    monkeypatch.setattr(ppo, "ValueModel", Spied)
    monkeypatch.setattr(Recording, "value_model", property(lambda self: models[0]), raising=False)
    gamma, lam, clip, value_clip = 0.9, 0.8, 0.2, 0.05
    recording = record(
        ppo,
        beta=BETA,
        num_epochs=passes,
        num_minibatches=passes,
        gamma=gamma,
        gae_lambda=lam,
        value_clip_range=value_clip,
    )
    assert len(recording.updates) == 4 * passes**2  # of two rollouts; the value model's before the policy's

    def values_of(value_model, rollout):
        rows = []
        for prompt, completion in zip(rollout.prompts, rollout.completions):
            hidden = value_model.base_model(torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
            rows.append(value_model.head(hidden)[len(prompt) - 1 :, 0])  # [T+1]
        return rows

    any_clipped = False
    for number in range(2 * passes**2):
        value_update, update = recording.updates[2 * number : 2 * number + 2]
        rollout = recording.rollouts[update.rollout]
        minibatch = rows_of(recording.orders[number // passes]).chunk(passes)[number % passes].tolist()
        rewards = judged(recording.texts(rollout, tokenizer))
        scored = [i for i, reward in enumerate(rewards) if reward is not None]
        new, old, ref = (logprobs_of(m, rollout) for m in (update.model, rollout.model, recording.start))
        with torch.no_grad():
            old_values = values_of(rollout.value_model, rollout)
        advantages = {}
        for i in scored:
            T, ended = len(rollout.completions[i]), rollout.completions[i][-1] in STOP_IDS
            reward = -BETA * (old[i] - ref[i]).detach()
            reward[-1] += rewards[i] if ended else 0.0
            v = old_values[i].clone()
            v[-1] = 0.0 if ended else v[-1]  # nothing follows a stop token; what was cut off goes on
            delta = [reward[t] + gamma * v[t + 1] - v[t] for t in range(T)]
            advantages[i] = torch.stack(
                [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, T)) for t in range(T)]
            )
        everything = torch.cat(list(advantages.values()))
        whitened = {
            i: (a - everything.mean()) / (everything.var(unbiased=False) + 1e-8).sqrt() for i, a in advantages.items()
        }
        inside = [i for i in minibatch if i in advantages]
        tokens = sum(len(rollout.completions[i]) for i in inside)
        loss = loss_v = 0.0
        new_values = values_of(value_update.model, rollout)
        for i in inside:
            ratio = (new[i] - old[i].detach()).exp()
            loss = loss - torch.min(ratio * whitened[i], ratio.clamp(1 - clip, 1 + clip) * whitened[i]).sum() / tokens
            returns = advantages[i] + old_values[i][:-1]
            v, v_old = new_values[i][:-1], old_values[i][:-1]
            clipped = v_old + (v - v_old).clamp(-value_clip, value_clip)
            any_clipped |= bool((clipped != v).any())
            loss_v = loss_v + torch.max((v - returns) ** 2, (clipped - returns) ** 2).sum() / 2 / tokens
        close(update.gradient, flat_gradient(loss, update.model))
        close(value_update.gradient, flat_gradient(loss_v, value_update.model))
    assert any_clipped == (passes > 1)
    check_metrics(recording, tokenizer, judged)


def test_rejection_sampling(record, tokenizer):
    recording = record(rejection_sampling, num_epochs=2, num_minibatches=2, threshold=0.5)
    assert len(recording.updates) == 8 and len(recording.kept) == 2
    for number, update in enumerate(recording.updates):
        rollout, (_, kept) = recording.rollouts[update.rollout], recording.kept[update.rollout]
        rewards = judged(recording.texts(rollout, tokenizer))
        for prompt in range(6):  # the best of each prompt, if it is above the threshold
            group = range(prompt * G, prompt * G + G)
            best = max((rewards[i] or 0.0) for i in group)
            assert [rewards[i] for i in kept.tolist() if i in group] == [best] * (best > 0.5)
        minibatch = kept[recording.orders[number // 2]].chunk(2)[number % 2].tolist()
        logprobs = logprobs_of(update.model, rollout)
        loss = -sum(logprobs[i].sum() for i in minibatch) / sum(len(rollout.completions[i]) for i in minibatch)
        close(update.gradient, flat_gradient(loss, update.model))
    check_metrics(recording, tokenizer, judged)


def template(tokenizer, row, column):
    """Prompt and completion ids of a row of conftest's chat_data, as the template reads aloud."""
    prompt = f"<user>{row['prompt'][0]['content']}<assistant>"
    return tokenizer(prompt).input_ids, [*tokenizer(row[column][0]["content"]).input_ids, tokenizer.eos_token_id]


def test_sft(record, tokenizer, chat_data):
    recording = record(sft)
    rows = [json.loads(line) for line in Path(chat_data).read_text().splitlines()]
    known = [template(tokenizer, row, "completion") for row in rows]
    assert len(recording.updates) == 2
    for update, ((examples, _), _) in zip(recording.updates, recording.collated):
        assert len(examples) == 6 and all(example in known for example in examples)
        total = sum(plain_logprobs(update.model, *example, 1.0).sum() for example in examples)
        loss = -total / sum(len(completion) for _, completion in examples)
        close(update.gradient, flat_gradient(loss, update.model))


def test_dpo(record, tokenizer, chat_data):
    recording = record(dpo, micro_batch_size=4, beta=BETA)
    rows = [json.loads(line) for line in Path(chat_data).read_text().splitlines()]
    known = [(template(tokenizer, row, "chosen"), template(tokenizer, row, "rejected")) for row in rows]
    assert len(recording.updates) == 2
    for update, metrics, ((examples, _), _) in zip(recording.updates, recording.metrics, recording.collated[-2:]):
        pairs = list(zip(examples[::2], examples[1::2]))
        assert len(pairs) == 6 and all(pair in known for pair in pairs)
        for name, column in (("logps/chosen", 0), ("logps/rejected", 1)):
            logps = [plain_logprobs(update.model, *pair[column], 1.0).sum().item() for pair in pairs]
            assert metrics[name] == pytest.approx(sum(logps) / len(logps))
        loss = 0.0
        for chosen, rejected in pairs:
            h = [
                (plain_logprobs(update.model, *x, 1.0) - plain_logprobs(recording.start, *x, 1.0).detach()).sum()
                for x in (chosen, rejected)
            ]
            loss = loss - (BETA * (h[0] - h[1])).sigmoid().log() / len(pairs)
        close(update.gradient, flat_gradient(loss, update.model))
