"""What a round of rejection sampling keeps."""

import json
from collections import Counter

import rejection_sampling
from rejection_sampling import select

import pytest
import torch

NAN = float("nan")
REWARDS = torch.tensor([0.1, 0.9, 0.9, 0.3, 0.6, 0.8, 0.2, 0.2, 0.4, NAN, 0.7, NAN])
TEXTS = ["a", "b", "b", "c", "a", "b", "c", "d", "a", "b", "c", "d"]


def kept(strategy, threshold=0.5, seed=0, rewards=REWARDS, texts=TEXTS):
    generator = torch.Generator().manual_seed(seed)
    settings = {"samples_per_prompt": 4, "strategy": strategy, "threshold": threshold, "generator": generator}
    return select(rewards, texts, **settings).tolist()


def test_each_strategy_by_hand():
    assert kept("best_of_prompt") in ([1, 5, 10], [2, 5, 10])
    assert kept("best_of_prompt", threshold=0.75) in ([1, 5], [2, 5])  # the third prompt's best does not pass
    assert kept("threshold") in ([1, 4, 5, 10], [2, 4, 5, 10])  # 1 and 2 are one text of one prompt
    assert kept("threshold", threshold=0.9) == []  # above, not at
    assert kept("best_of_batch") in ([1, 5, 10], [2, 5, 10])  # as many as prompts
    assert kept("best_of_batch", threshold=0.05, texts=list("abcdefghijkl")) == [1, 2, 5]  # two of one prompt
    assert kept("best_of_batch", threshold=2.0) == []
    for seed in range(20):
        random = kept("random", threshold=2.0, seed=seed)
        assert [index // 4 for index in random] == [0, 1, 2] and not {9, 11} & set(random)  # which nothing could score


@pytest.mark.parametrize("strategy", ["best_of_prompt", "random"])
def test_ties_fall_to_each_alike_and_by_seed(strategy):
    """4 tied samples of which one text comes twice: it is kept twice as often, as the best of n by chance would be."""
    rewards, texts = torch.ones(4), ["a", "a", "b", "c"]
    counts = Counter(kept(strategy, seed=seed, rewards=rewards, texts=texts)[0] for seed in range(4000))
    statistic = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert len(counts) == 4 and statistic < 16.3  # chi-squared with 3 degrees of freedom, p = 0.001
    assert kept(strategy, seed=7, rewards=rewards) == kept(strategy, seed=7, rewards=rewards)


def test_only_what_is_kept_is_learned_from(tmp_path, monkeypatch):
    """The rows that reach token_logprobs are those that select returned, and the kept share is logged."""
    seen, selected = [], []
    token_logprobs = rejection_sampling.token_logprobs

    def spy(rewards, texts, **settings):
        selected.append((rewards, select(rewards, texts, **settings)))
        return selected[-1][1]

    monkeypatch.setattr(rejection_sampling, "select", spy)
    monkeypatch.setattr(
        rejection_sampling, "token_logprobs", lambda m, *b, **k: seen.append(b) or token_logprobs(m, *b, **k)
    )
    args = rejection_sampling.Args(num_steps=1, prompts_per_step=6, samples_per_prompt=5, eval_prompts=2, num_epochs=2)
    args.num_minibatches, args.output_dir = 2, str(tmp_path / "run")
    rejection_sampling.main(args)
    ((rewards, kept),) = selected
    assert 0 < len(kept) < 6 and all(rewards[kept] == 1.0)
    assert sum(len(batch[2]) for batch in seen) == 2 * len(kept)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert metrics["select/kept"] == pytest.approx(len(kept) / 30)
    assert metrics["select/prompts"] == pytest.approx(len(kept) / 6) and metrics["select/reward"] == 1.0
