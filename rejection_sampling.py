"""Rejection sampling: sample completions, select the best of them by reward, and fine-tune on these; round after round.

Loss, over the N tokens of the selected completions of a minibatch:

    L = -1/N sum_i sum_t log pi(y_it | x_i, y_i,<t)

Each round samples from the policy that the last one left. The strategies, of completions above the threshold: each
prompt's best, all, or the best of the batch, as many as there are prompts; and random, one of each prompt whatever its
reward: the control that tells whether the selection taught anything.

Source: Touvron et al., arXiv 2307.09288, section 3.2.3; Dong et al., arXiv 2304.06767; exposition: arXiv 2509.04501.
Simplified: a round learns from its own completions alone, none are kept from earlier ones.

    python rejection_sampling.py
    python rejection_sampling.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --micro-batch-size 8 --max-new-tokens 512 --eval-every 50 --eval-prompts 100

A row of the .jsonl file: {"prompt": [{"role": "user", "content": "What is 37 + 48?"}], "answer": "85"}
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Literal

import common  # before torch: it sets how OpenMP's threads wait

import torch
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    model: str = "models/arithmetic"  # folder or hub id of a causal LM, or a LoRA folder; the defaults suit this one
    data: str = "models/arithmetic/sums.jsonl"  # a .jsonl file, or folder or hub id of a data set
    eval_data: str = ""  # rows for evaluation; without it a tenth of the prompts is held out
    reward: tuple[str, ...] = ("exact_answer",)  # names, or file.py:function; all are evaluated, the first is shown
    reward_weights: tuple[float, ...] = ()  # one weight for each reward; 1 each without it
    num_steps: int = 60  # steps; each takes the next batch of prompts
    prompts_per_step: int = 32  # prompts in a step
    samples_per_prompt: int = 8  # completions of each prompt
    micro_batch_size: int = 128  # completions in one forward and backward pass: sets the memory, not the result
    max_new_tokens: int = 8  # tokens in a completion, its stop token included
    temperature: float = 1.0  # divides the logits, in sampling and in every log-prob
    learning_rate: float = 1e-4  # peak learning rate of AdamW
    warmup_steps: int = 0  # steps over which the learning rate rises from 0
    lr_schedule: Literal["linear", "constant"] = "linear"  # whether it then falls to 0, or stays
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    seed: int = 1  # seed of all random numbers
    device: str = "auto"  # auto is CUDA, else MPS, else the CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of forward passes; auto is bfloat16 on CUDA, else float32
    lora_rank: int = 0  # rank of LoRA adapters; 0 trains the whole model
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    eval_every: int = 10  # steps between evaluations
    eval_prompts: int = 500  # held-out prompts in an evaluation, at most
    save_every: int = 50  # steps between checkpoints; 0 saves at Ctrl-C only
    output_dir: str = ""  # folder of the run; runs/<script>-<time> without it
    resume: str = ""  # folder of a run to continue
    track: Literal["none", "wandb"] = "none"  # where metrics go besides metrics.jsonl

    # the algorithm's own
    num_epochs: int = 1  # passes over the completions of a step
    num_minibatches: int = 1  # optimizer steps in a pass
    strategy: Literal["best_of_prompt", "threshold", "best_of_batch", "random"] = "best_of_prompt"  # what is trained
    threshold: float = 0.5  # a completion passes with a reward above it; random asks for none


@torch.no_grad()
def rollout(model, prompt_ids, prompt_mask, *, max_new_tokens, samples_per_prompt=1, temperature=0.0):
    """Sample from the plain softmax at the temperature (0: greedy), for left-padded prompts [N, P], until a stop token.

    Returns completion_ids, completion_mask (1.0 up to and including the first stop token) and log-probs, all [B, T],
    B = N * samples_per_prompt, the samples of a prompt adjacent; and truncated [B], where there is no stop token.
    """
    stop_ids = torch.tensor(model.generation_config.eos_token_id, device=prompt_ids.device)
    prompt_of = torch.arange(len(prompt_ids), device=prompt_ids.device).repeat_interleave(samples_per_prompt)  # [B]
    alive = torch.arange(len(prompt_of), device=prompt_ids.device)  # rows of the result that are still in the batch
    completion_ids = prompt_ids.new_zeros(len(alive), max_new_tokens)
    completion_mask = torch.zeros_like(completion_ids, dtype=torch.float32)
    logprobs = torch.zeros_like(completion_mask)
    truncated = torch.ones_like(alive, dtype=torch.bool)
    token, mask, cache = prompt_ids, prompt_mask, None  # token: input of the next pass, at first the prompts
    for t in range(max_new_tokens):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -token.shape[1] :]  # 0 for padding, which is masked
        inputs = {"input_ids": token, "attention_mask": mask, "position_ids": position_ids}
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        log_softmax = (output.logits[:, -1].float() / (temperature or 1.0)).log_softmax(-1)  # [N, V], then [alive, V]
        if t == 0:  # each prompt was read once; its samples go on from copies of its cache
            cache, log_softmax, mask = output.past_key_values, log_softmax[prompt_of], mask[prompt_of]
            cache.reorder_cache(prompt_of)  # every kind of cache has this
        if temperature > 0:  # by one random number a row; torch.multinomial draws V of them, which takes longer
            cdf = log_softmax.exp().cumsum(-1, dtype=torch.float32 if mask.device.type == "mps" else torch.float64)
            token = torch.searchsorted(cdf, torch.rand_like(cdf[:, -1:]) * cdf[:, -1:], right=True)  # [b, 1]
            token = token.clamp(max=cdf.shape[1] - 1)  # rounding may draw the total itself
        else:
            token = log_softmax.argmax(-1, keepdim=True)
        completion_ids[alive, t] = token[:, 0]
        completion_mask[alive, t] = 1.0
        logprobs[alive, t] = log_softmax.gather(1, token)[:, 0]
        going = ~torch.isin(token[:, 0], stop_ids)
        truncated[alive] = going
        if not going.any():
            break
        if not going.all():  # rows with a stop token leave the batch
            cache.reorder_cache(going.nonzero()[:, 0])
            alive, token, mask = alive[going], token[going], mask[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return completion_ids[:, : t + 1], completion_mask[:, : t + 1], logprobs[:, : t + 1], truncated


def hidden_states(model, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """Hidden states [b, longest, H] that predict the completions' tokens, by model.trunk, the model without its head.
    The G completions of a prompt share one pass over it: each goes on from a copy of its KV cache, with gradients."""
    G, P, longest = len(completion_ids) // len(prompt_ids), prompt_ids.shape[1], int(completion_mask.sum(1).max())
    read = max(1, longest - 1)  # nothing follows the last token; but a pass needs one
    ids = completion_ids[:, :read]
    mask = torch.cat([prompt_mask.repeat_interleave(G, 0), completion_mask[:, :read].long()], 1)  # [b, P + read]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if G == 1 or not model.shares_prompts:  # one pass over prompts and completions
        ids = torch.cat([prompt_ids.repeat_interleave(G, 0), ids], 1)
        output = model.trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.last_hidden_state[:, P - 1 :][:, :longest]
    inputs = {"input_ids": prompt_ids, "attention_mask": prompt_mask, "position_ids": positions[::G, :P]}
    prompts = model.trunk(**inputs, use_cache=True)
    prompts.past_key_values.reorder_cache(torch.arange(len(prompt_ids), device=ids.device).repeat_interleave(G))
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions[:, P:]}
    completions = model.trunk(**inputs, past_key_values=prompts.past_key_values, use_cache=True)
    after_prompt = prompts.last_hidden_state[:, -1:].repeat_interleave(G, 0)  # [b, 1, H]
    return torch.cat([after_prompt, completions.last_hidden_state], 1)[:, :longest]


def token_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *, temperature=1.0):
    """log pi(y_t | x, y_<t) [b, T] of completions [b, T] of prompts [n, P], a prompt's adjacent; 0 after their end.

    Logits are computed for completion tokens only, in chunks of 2**24 (GPU: 2**26); at most four chunks are kept.
    """
    hidden = hidden_states(model, prompt_ids, prompt_mask, completion_ids, completion_mask)  # [b, longest, H]
    kept = completion_mask > 0  # [b, T]
    hidden, targets = hidden[kept[:, : hidden.shape[1]]], completion_ids[kept]  # [k, H], [k]

    def of_chunk(hidden, targets):  # [k]; softmax in float32: huggingface/transformers#31267
        log_softmax = (common.logits_of(model, hidden).float() / temperature).log_softmax(-1)  # [k, V]
        return log_softmax.gather(-1, targets[:, None])[:, 0]

    size = max(1, 2 ** (24 if kept.device.type == "cpu" else 26) // model.config.get_text_config().vocab_size)
    if len(targets) > 4 * size:  # too many to keep: the backward pass computes each chunk's again
        of_chunk = partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)
    logprobs = torch.cat([of_chunk(*chunk) for chunk in zip(hidden.split(size), targets.split(size))])
    return logprobs.new_zeros(kept.shape).masked_scatter(kept, logprobs)


def select(rewards, texts, *, samples_per_prompt, strategy, threshold, generator):
    """Indices, ascending, of the completions to learn from; NaN, not scored, is never one of them.

    rewards [B] and B texts, a prompt's samples adjacent. Ties fall to any of the tied, as the generator decides,
    not to the one sampled first. Where a prompt may give several completions, those of equal text count once.
    """
    order = torch.randperm(len(rewards), generator=generator)
    if strategy != "random":
        order = order[rewards[order].argsort(descending=True, stable=True)]
    kept, seen = [], set()
    for index in order.tolist():
        prompt = index // samples_per_prompt
        key = prompt if strategy in ("best_of_prompt", "random") else (prompt, texts[index])
        passed = rewards[index] > threshold if strategy != "random" else not rewards[index].isnan()
        if passed and key not in seen:
            seen.add(key)
            kept.append(index)
    if strategy == "best_of_batch":
        kept = kept[: len(rewards) // samples_per_prompt]
    return torch.tensor(sorted(kept), dtype=torch.long)


def sft_loss(logprobs, completion_mask, *, normalizer):
    """-sum_i sum_t log pi / normalizer, where the normalizer is the number of target tokens in the whole batch."""
    return -(logprobs * completion_mask).sum() / normalizer


def evaluate(run, step, model, tokenizer, rows, score, args):
    """{eval/<name>: values [n]}: each reward of greedy completions of held-out prompts."""
    answers = []
    with common.autocast(args):
        for batch in common.eval_batches(rows, args):
            prompts = common.prompt_batch(tokenizer, batch, model.device)
            *completions, truncated = rollout(model, *prompts, max_new_tokens=args.max_new_tokens)
            answers += zip(*common.decode(tokenizer, *completions, step), truncated.tolist())
    texts, ids, truncated = map(list, zip(*answers))
    _, components = score(rows, texts, ids)
    run.log_samples(step, "eval", tokenizer, rows[:8], texts, components)
    return {f"eval/{name}": values for name, values in components.items()} | {"eval/truncated": torch.tensor(truncated)}


def main(args: Args) -> dict[str, float]:
    """Train, evaluate, save; returns the last value of each metric."""
    args = common.check_args(args)
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns=("prompt",))
    score = common.load_reward(args.reward, args.reward_weights)
    run = common.Run(args)
    model, tokenizer = common.load_model(args.model, args.device, args)
    common.check_prompts(model, tokenizer, train_rows + eval_rows, args.max_new_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    G = args.samples_per_prompt

    run.start(train_rows, eval_rows, model=(model, optimizer))
    if run.done == 0:
        run.log(0, evaluate(run, 0, model, tokenizer, eval_rows, score, args))
    for step in run.steps():
        # 1. sample G completions of T tokens for each of N prompts: B = N G, a prompt's adjacent
        rows = common.take_batch(train_rows, step, args)
        prompts = common.prompt_batch(tokenizer, rows, model.device)  # prompt_ids and prompt_mask [N, P]
        with common.autocast(args):
            completion_ids, completion_mask, sampled_logprobs, truncated = rollout(  # [B, T], truncated [B]
                model, *prompts, max_new_tokens=args.max_new_tokens, samples_per_prompt=G, temperature=args.temperature
            )
        lengths = completion_mask.sum(1)  # [B], before unscored completions are masked
        run.lap("rollout")

        # 2. score
        texts, ids = common.decode(tokenizer, completion_ids, completion_mask, sampled_logprobs, step)
        rewards, components = score([row for row in rows for _ in range(G)], texts, ids)
        rewards = rewards.to(model.device)  # [B], NaN where no reward could score
        completion_mask[rewards.isnan()] = 0.0  # unscored ones take no part in the update; lengths still has them
        run.lap("score")

        # 3. select: kept [K] are rows of the batch
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        kept = select(
            torch.tensor(common.gather(rewards.tolist())), common.gather(texts), samples_per_prompt=G,
            strategy=args.strategy, threshold=args.threshold, generator=generator,
        )  # fmt: skip
        kept = kept[kept // len(texts) == common.RANK] % len(texts)  # those that this process sampled
        # -1 is a row of no weight, for processes that kept less than another: all of them make the same steps
        most = max(common.gather([len(kept)]))
        filled = torch.cat([kept, kept.new_full((most - len(kept),), -1)])

        # 4. update: in each epoch one optimizer step on each minibatch of the kept completions
        optimizer.param_groups[0]["lr"] = learning_rate = args.learning_rate * common.decay(args, step)
        stats = defaultdict(float)
        passes = (torch.randperm(most) for _ in range(args.num_epochs if most else 0))
        minibatches = [filled[m].to(model.device) for order in passes for m in order.chunk(args.num_minibatches)]
        for minibatch in minibatches:
            mask = completion_mask[minibatch] * (minibatch >= 0)[:, None]  # [K, T]
            tokens = common.total(mask.sum())
            chosen = (prompts[0][minibatch // G], prompts[1][minibatch // G], completion_ids[minibatch], mask)
            for micro, inputs in common.micro_batches(chosen, torch.arange(len(minibatch)), args.micro_batch_size):
                with common.autocast(args):
                    logprobs = token_logprobs(model, *inputs, temperature=args.temperature)  # [b, T]
                loss = sft_loss(logprobs, mask[micro], normalizer=tokens)
                loss.backward()
                stats["loss/sft"] += loss.detach()
            common.sum_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            stats["grad_norm"] += float(norm)
            optimizer.step()
            optimizer.zero_grad()
        stats = {name: value / len(minibatches) for name, value in stats.items()}
        seconds = run.lap("update")

        # 5. log: numbers as they are, 0-dim tensors summed over all processes, others averaged
        metrics = stats | {
            **{f"reward/{name}": scores for name, scores in components.items()},
            "reward/mean": rewards,
            "select/kept": torch.isin(torch.arange(len(texts)), kept),
            "select/prompts": torch.isin(torch.arange(len(rows)), kept // G),
            "select/reward": rewards[kept],
            "policy/entropy": -sampled_logprobs[completion_mask > 0],
            "completion/length": lengths,
            "completion/truncated": truncated,
            "group/zero_std": (rewards.view(-1, G) == rewards[::G, None]).all(1),
            "tokens_per_second": lengths.sum() / seconds,
            "learning_rate": learning_rate,
        }
        run.log_samples(step, "train", tokenizer, rows[:1] * G, texts, components)
        if step % args.eval_every == 0 or step == args.num_steps:
            metrics |= evaluate(run, step, model, tokenizer, eval_rows, score, args)
        run.log(step, metrics)
        run.save(step)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args, description=common.usage(__doc__)))
