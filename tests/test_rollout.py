"""Sampling and scoring: what is sampled is what is scored, on absolute and rotary positions, padded or not."""

import grpo
import trpo

import pytest
import torch
from conftest import random_model
from oracle import Oracle

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
COMPLETIONS = [[20, 21, 22, 0], [23, 0], [24, 25, 26, 27]]


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def batch_of(completions, width):
    """Inputs of token_logprobs: the three prompts, an equal number of completions of each, padded to the width."""
    ids = torch.tensor([c + [99] * (width - len(c)) for c in completions])
    mask = torch.tensor([[1.0] * len(c) + [0.0] * (width - len(c)) for c in completions])
    return *padded(PROMPTS), ids, mask


def test_greedy_is_generates_greedy(model):
    prompt_ids, prompt_mask = padded(PROMPTS)
    ids, mask, _, _ = grpo.rollout(model, prompt_ids, prompt_mask, max_new_tokens=10)
    for prompt, row, keep in zip(PROMPTS, ids, mask > 0):
        alone = torch.tensor([prompt])
        expected = model.generate(alone, attention_mask=alone.ne(-1), do_sample=False, max_new_tokens=10)
        assert row[keep].tolist() == expected[0, len(prompt) :].tolist()


def test_logprobs_do_not_depend_on_padding(model):
    """Against the model's own logits for one unpadded row, so the shift by one position is checked too."""
    scored = grpo.token_logprobs(model, *batch_of(COMPLETIONS, 4))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        expected = torch.stack([logits[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])
        torch.testing.assert_close(scored[row, : len(completion)], expected, atol=1e-4, rtol=0)
        assert (scored[row, len(completion) :] == 0).all()


def test_every_stop_id_ends_a_row_and_is_counted():
    model = random_model("llama", vocab_size=8, stop_ids=(0, 3))
    prompt_ids, prompt_mask = padded([[5, 6], [7]])
    torch.manual_seed(0)
    ids, mask, logprobs, truncated = grpo.rollout(
        model, prompt_ids, prompt_mask, samples_per_prompt=64, max_new_tokens=6, temperature=1.0
    )
    ends = set()
    for row, keep, logprob, cut in zip(ids.tolist(), mask.tolist(), logprobs, truncated.tolist()):
        stops = [t for t, token in enumerate(row) if token in (0, 3) and (t == 0 or keep[t])]
        length = stops[0] + 1 if stops else len(row)
        assert cut == (not stops)
        assert keep == [1.0] * length + [0.0] * (len(row) - length)
        assert (logprob[:length] < 0).all() and (logprob[length:] == 0).all()
        ends.add(row[length - 1])
    assert {0, 3} < ends  # both stop ids, and rows that were cut off


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampling_is_the_whole_softmax(temperature):
    """A chi-squared test of 40,000 first tokens: a top-k of 50, a top-p or a wrong temperature is far outside."""
    model = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    prompt_ids, prompt_mask = padded(PROMPTS[:1])
    torch.manual_seed(0)
    ids, _, _, _ = grpo.rollout(
        model, prompt_ids, prompt_mask, samples_per_prompt=40_000, max_new_tokens=1, temperature=temperature
    )
    probabilities = (model(prompt_ids).logits[0, -1] / temperature).softmax(-1)
    expected = probabilities * len(ids)
    observed = torch.bincount(ids[:, 0], minlength=300).float()
    common_tokens = expected >= 5  # the rest in one cell, as the test's approximation asks for
    expected = torch.cat([expected[common_tokens], expected[~common_tokens].sum(0, keepdim=True) + 1e-9])
    observed = torch.cat([observed[common_tokens], observed[~common_tokens].sum(0, keepdim=True)])
    cells = len(expected)
    assert cells > 100
    statistic = ((observed - expected).square() / expected).sum().item()
    assert statistic < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_whole_completions_are_sampled_with_their_probabilities(kind):
    """A chi-squared test over all 40 completions that each of two prompts in one padded batch can have (oracle.py)."""
    model, stop, draws = random_model(kind, vocab_size=4), (0,), 20_000
    prompts = [[1, 3], [2, 2, 1, 0, 3]]
    torch.manual_seed(0)
    ids, mask, _, _ = grpo.rollout(model, *padded(prompts), samples_per_prompt=draws, max_new_tokens=3, temperature=1.5)
    for prompt, rows, keep in zip(prompts, ids.split(draws), mask.split(draws)):
        oracle = Oracle(model, prompt, max_new_tokens=3, stop_ids=stop, temperature=1.5)
        index = {tuple(completion): number for number, completion in enumerate(oracle.completions)}
        drawn = [index[tuple(row[:n])] for row, n in zip(rows.tolist(), keep.sum(1).int().tolist())]
        observed, expected = torch.bincount(torch.tensor(drawn), minlength=40).float(), oracle.p.detach() * draws
        often = expected >= 5  # the others in one cell, as the test's approximation asks for
        observed, expected = (torch.cat([x[often], x[~often].sum(0, keepdim=True)]) for x in (observed, expected))
        cells = len(expected)
        assert cells > 15
        statistic = ((observed - expected).square() / (expected + 1e-9)).sum()
        assert statistic < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5


def test_log_softmax_is_of_float32_logits():
    """Of a bfloat16 model: in bfloat16 itself it is off by about 0.03 (genlm/genlm-backend#66)."""
    model = random_model("llama").to(torch.bfloat16)
    prompt_ids, prompt_mask = padded(PROMPTS)
    torch.manual_seed(0)
    ids, mask, sampled, _ = grpo.rollout(model, prompt_ids, prompt_mask, max_new_tokens=4, temperature=0.7)
    scored = grpo.token_logprobs(model, prompt_ids, prompt_mask, ids, mask, temperature=0.7)
    whole = trpo.next_token_logprobs(model, prompt_ids, prompt_mask, ids, mask, temperature=0.7)
    positions = (torch.cat([prompt_mask, mask.long()], 1).cumsum(1) - 1).clamp(min=0)
    both = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask.long()], 1)
    logits = model(both[0], attention_mask=both[1], position_ids=positions).logits[:, prompt_ids.shape[1] - 1 : -1]
    expected = (logits.double() / 0.7).log_softmax(-1)
    assert sampled.dtype == scored.dtype == whole.dtype == torch.float32
    torch.testing.assert_close(whole.double(), expected[mask > 0], atol=1e-4, rtol=0)
    chosen = expected.gather(-1, ids[..., None])[..., 0] * mask
    torch.testing.assert_close(scored.double(), chosen, atol=1e-4, rtol=0)
    first = model(prompt_ids, attention_mask=prompt_mask, position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0))
    first = (first.logits[:, -1].double() / 0.7).log_softmax(-1).gather(-1, ids[:, :1])[:, 0]
    torch.testing.assert_close(sampled[:, 0].double(), first, atol=1e-4, rtol=0)


GROUPS = [*COMPLETIONS, [28], [29, 30, 31, 0, 32], [33], [34, 35], [36, 37], [38]]  # three of each prompt


def scored(model, completions, width=6, temperature=0.7):
    """Log-probs and gradient of their sum, weighted unevenly."""
    model.zero_grad()
    logprobs = grpo.token_logprobs(model, *batch_of(completions, width), temperature=temperature)
    (logprobs * torch.arange(1.0, len(completions) + 1)[:, None]).sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_kv_cache_is_of_autocasts_dtype(monkeypatch):
    """Rotary embeddings make keys float32: the cache would be twice as large, and be cast anew for each token."""
    model, caches, ids = random_model("llama"), [], torch.tensor([[1, 2, 3]])
    forward = type(model).forward

    def spy(self, **inputs):
        output = forward(self, **inputs)
        caches.append(
            [tensor.dtype for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        )
        return output

    monkeypatch.setattr(type(model), "forward", spy)
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grpo.rollout(model, ids, torch.ones_like(ids), max_new_tokens=3, samples_per_prompt=2, temperature=1.0)
        assert set(caches[-1]) == {dtype}
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # whose gradients may be NaN


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_equal_prompts_are_computed_once(model, shares_prompts):
    """The tokens that the trunk is given are counted; test_batches.py has their gradient."""
    given, model.shares_prompts = [], shares_prompts
    model.base_model.register_forward_hook(
        lambda m, args, settings, out: given.append(settings["input_ids"].numel()), with_kwargs=True
    )
    scored(model, GROUPS)
    # 3 prompts of up to 6 tokens, then 9 times all but the last completion token; or all in one pass
    assert given == ([3 * 6, 9 * 4] if shares_prompts else [9 * (6 + 4)])
    given.clear()
    scored(model, COMPLETIONS)
    assert given == [3 * (6 + 3)]  # nothing to share: one pass


@pytest.mark.parametrize("log2, size, passes", [(22, 4, 2), (20, 16, 1)])
def test_log_probs_are_made_in_chunks_of_the_vocabulary(model, log2, size, passes):
    """With a vocabulary said to be of 2**22 no more than 4 tokens have logits at a time; the same numbers come out.

    Up to four chunks, 2**26 logits, are held for the backward pass, more are made again in it.
    """
    whole, gradient = scored(model, GROUPS)
    tokens, sizes = int((whole < 0).sum()), []
    assert (tokens > 4 * size) == (passes == 2) and tokens > size
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    model.config.vocab_size = 2**log2
    chunked, again = scored(model, GROUPS)
    assert max(sizes) == size and sum(sizes) == passes * tokens
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(again, gradient, atol=1e-6 * gradient.abs().max().item(), rtol=1e-4)
