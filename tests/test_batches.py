"""Groups, padding, caches and micro-batches change nothing: losses and gradients are those of plain rows, in float64.

A plain row is one completion behind its prompt, unpadded, in a forward pass of the whole model for itself.
"""

import itertools

import common
import dpo
import grape
import grpo
import ppo
import reinforce
import sft
import trpo

import pytest
import torch
from conftest import random_model

# what the models of several families have of their own; those with states of their own share no prompts
FAMILIES = {
    "gpt2": {},
    "llama": {},
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
}
CASES = [(family, G) for family in ("gpt2", "llama", "gemma2") for G in (1, 2, 3, 5)]
CASES += zip(("qwen2", "gemma3_text", "cohere", "granite", "qwen3_moe", "lfm2", "qwen3_5_text"), (3, 5, 2, 3, 5, 3, 2))


@pytest.fixture
def model(request, tmp_path, tokenizer, monkeypatch, double):
    random_model(request.param, vocab_size=257, **FAMILIES[request.param]).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = common.load_model(str(tmp_path), torch.device("cpu"))[0]
    model.config._experts_implementation = "eager"  # grouped_mm knows no float64
    with monkeypatch.context() as patch:
        for name in ("float", "float32"):  # which norms and routers ask for
            patch.setattr(torch, name, torch.float64)
        yield model


def random_batch(G, generator):
    """Prompts, completions of random tokens and lengths, G for each prompt; one has a single token, one none at all."""

    def ids(lengths):
        return [torch.randint(257, (length,), generator=generator).tolist() for length in lengths]

    lengths = torch.randint(1, 8, (3 * G,), generator=generator)
    lengths[torch.randperm(3 * G, generator=generator)[:2]] = torch.tensor([1, 1 if G == 2 else 0])  # G = 2: dpo.py's
    return ids(torch.randint(1, 12, (3,), generator=generator)), ids(lengths)


class Losses:
    """Every loss of the scripts on some rows of a batch, whose other tensors are random."""

    def __init__(self, mask, G, generator):
        B, T = self.shape = mask.shape
        self.mask, self.tokens = mask, mask.sum()
        self.old, self.ref, self.old_values, self.returns = torch.randn(4, B, T, generator=generator) - 1
        self.advantages, self.token_advantages = torch.randn(B, generator=generator), self.returns.roll(1)
        self.pairs = G == 2
        self.ref_logps = torch.randn(B, generator=generator)

    def __call__(self, logprobs, values, rows):
        old, ref, mask, advantages = self.old[rows], self.ref[rows], self.mask[rows], self.advantages[rows]
        B, T, tokens, clip = *self.shape, self.tokens, {"clip_low": 0.2, "clip_high": 0.3, "beta": 0.1}
        losses = {"sft": sft.sft_loss(logprobs, mask, normalizer=tokens)}
        losses["reinforce"] = reinforce.policy_loss(logprobs, advantages, mask, normalizer=B)
        losses["trpo"] = trpo.policy_loss(logprobs, old, advantages, mask, normalizer=tokens)
        settings = {"clip_range": 0.2, "normalizer": tokens}
        losses["ppo"] = ppo.policy_loss(logprobs, old, self.token_advantages[rows], mask, **settings)
        settings = {"value_clip_range": 0.2, "normalizer": tokens}
        losses["value"] = ppo.value_loss(values, self.old_values[rows], self.returns[rows], mask, **settings)
        losses["grape"] = grape.policy_loss(logprobs, old, ref, advantages, mask, normalizer=B, **clip)
        for loss_type in grpo.LOSS_DEFAULTS:
            normalizer = grpo.loss_normalizer(self.mask, loss_type, T)
            for kl in ("k3", "k2"):
                settings = {"loss_type": loss_type, "kl_estimator": kl, "normalizer": normalizer} | clip
                losses[loss_type, kl] = grpo.policy_loss(logprobs, old, ref, advantages, mask, **settings)
        for loss_type in ("sigmoid", "ipo", "hinge", "robust", "sppo", "simpo") if self.pairs else ():
            logps = dpo.sequence_logprobs(logprobs, mask, loss_type=loss_type).view(-1, 2)
            pairs, settings = [*logps.unbind(1), *self.ref_logps[rows].view(-1, 2).unbind(1)], {"label_smoothing": 0.1}
            losses[loss_type] = dpo.dpo_loss(*pairs, loss_type=loss_type, beta=0.3, gamma=0.2, **settings).sum() / B
        return losses


def plain_rows(model, value_model, prompts, completions, T):
    """Log-probs at temperature 0.7 and values [B, T], 0 after a completion's end."""
    G, both = len(completions) // len(prompts), []
    for i, completion in enumerate(completions):
        prompt = prompts[i // G]
        ids, start = torch.tensor([[*prompt, *completion]]), len(prompt) - 1
        log_softmax = (model(input_ids=ids, use_cache=False).logits[0, start:-1] / 0.7).log_softmax(-1)
        logprobs = log_softmax[range(len(completion)), completion]
        values = value_model.head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, start:-1])[:, 0]
        both.append([torch.cat([x, torch.zeros(T - len(completion))]) for x in (logprobs, values)])
    return [torch.stack(x) for x in zip(*both)]


@pytest.mark.parametrize(("model", "G"), CASES, indirect=["model"])
def test_losses_and_gradients_are_those_of_plain_rows(model, G):
    """Micro-batches that divide a group and that do not, slices of a prompt's completions, and one for all."""
    assert model.shares_prompts == (model.config.model_type not in ("lfm2", "qwen3_5_text"))
    generator = torch.Generator().manual_seed(G)
    value_model = ppo.ValueModel(model)
    torch.nn.init.normal_(value_model.head.weight, generator=generator)
    parameters = [*model.parameters(), *value_model.head.parameters()]
    prompts, completions = random_batch(G, generator)
    batch = common.collate(prompts, completions, model.device)
    mask = batch[3]
    losses_of, weights = Losses(mask, G, generator), {}

    def gradient(losses):
        """Of all losses together, each with a weight that makes it count as much as the others."""
        for parameter in parameters:
            parameter.grad = None
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])

    rows = torch.arange(3 * G)
    plain = plain_rows(model, value_model, prompts, completions, mask.shape[1])
    leaves = [x.detach().requires_grad_() for x in plain]
    for name, loss in losses_of(*leaves, rows).items():
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        weights[name] = 1 / sum(x.norm() for x in gradients if x is not None)
    expected = losses_of(*plain, rows)
    expected_gradient = gradient(expected)
    for size in {max(1, G - 2), G, G + 2, 100}:
        total, total_gradient, seen = dict.fromkeys(expected, 0.0), 0.0, []
        for micro, inputs in common.micro_batches(batch, torch.randperm(3), max(2, size) if G == 2 else size):
            logprobs, values = grpo.token_logprobs(model, *inputs, temperature=0.7), value_model(*inputs)
            for got, wanted in zip((logprobs, values * mask[micro]), plain):
                torch.testing.assert_close(got, wanted[micro], atol=1e-10, rtol=1e-8)
            losses = losses_of(logprobs, values, micro)
            total = {name: total[name] + loss.item() for name, loss in losses.items()}
            total_gradient = total_gradient + gradient(losses)
            seen += micro.tolist()
        assert sorted(seen) == rows.tolist()
        args = grpo.Args(micro_batch_size=size, temperature=0.7, device="cpu")
        minibatches = torch.randperm(len(batch[0])).chunk(2)
        logprobs = grpo.batch_logprobs(model, batch, minibatches, args)
        torch.testing.assert_close(logprobs, plain[0], atol=1e-10, rtol=1e-8)
        assert total == pytest.approx({name: loss.item() for name, loss in expected.items()}, rel=1e-9, abs=1e-12)
        scale = expected_gradient.abs().max().item()
        torch.testing.assert_close(total_gradient, expected_gradient, atol=1e-9 * scale, rtol=1e-7)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_what_is_sampled_has_the_log_probs_of_plain_rows(model):
    prompts, _ = random_batch(3, torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = list(range(60))  # so that some completions end early
    torch.manual_seed(0)
    settings = {"max_new_tokens": 7, "samples_per_prompt": 3, "temperature": 0.7}
    ids, mask, logprobs, _ = grpo.rollout(model, *common.pad(prompts, "left", model.device), **settings)
    completions = [row[keep].tolist() for row, keep in zip(ids, mask > 0)]
    assert len(set(map(len, completions))) > 2
    expected, _ = plain_rows(model, ppo.ValueModel(model), prompts, completions, ids.shape[1])
    torch.testing.assert_close(logprobs, expected.detach(), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("G", [1, 2, 3, 5])
def test_a_micro_batch_is_whole_prompts_or_a_slice_of_one(G):
    prompts, completions = random_batch(G, torch.Generator().manual_seed(0))
    batch = common.collate(prompts, completions, torch.device("cpu"))
    for chosen, size in itertools.product(([0, 1, 2], [2, 0], [1]), range(1, 3 * G + 2)):
        seen, longest = [], []
        for rows, (prompt_ids, prompt_mask, *completion) in common.micro_batches(batch, torch.tensor(chosen), size):
            owners = (rows // G).view(len(prompt_ids), -1)  # [n, completions of each]
            assert len(rows) <= size and (len(owners) == 1 or owners.shape[1] == G)
            for owner, ids, keep in zip(owners.tolist(), prompt_ids, prompt_mask > 0):
                assert len(set(owner)) == 1 and ids[keep].tolist() == prompts[owner[0]]
            assert prompt_mask[:, 0].any()  # no column of padding alone
            assert all(torch.equal(x, whole[rows]) for x, whole in zip(completion, batch[2:]))
            seen += rows.tolist()
            longest += [max(len(completions[owner * G + i]) for i in range(G)) for owner in owners[:, 0].tolist()]
        assert sorted(seen) == sorted(prompt * G + i for prompt in chosen for i in range(G))
        assert longest == sorted(longest)  # so that completions of similar lengths are together


def test_ties_are_left_out_by_whole_prompts_and_one_stays():
    advantages = torch.tensor([[0.0, 0.0], [0.0, 1.0], [-1.0, 1.0], [0.0, 0.0]])
    for prompts, expected in (([3, 2, 0, 1], [2, 1]), ([1, 2], [1, 2]), ([3, 0], [3])):
        assert common.without_ties(torch.tensor(prompts), advantages).tolist() == expected
