"""Rejection sampling: sample completions, select the best of them by reward, and fine-tune on these; round after round.

Loss, over the N tokens of the selected completions of a minibatch:

    L = -1/N sum_i sum_t log pi(y_it | x_i, y_i,<t)

Each round samples from the policy that the last one left. The strategies: from each prompt its best completion, every
completion above the threshold, the best of the whole batch whatever their prompts, as many as there are prompts; and
random, one of each prompt whatever its reward: the control that tells whether the selection taught anything. A best
completion that is not above the threshold is still a failure: its prompt gives nothing to the round.

Source: arXiv 2509.04501, section on rejection sampling; Touvron et al., arXiv 2307.09288, section 3.2.3; Dong et al.,
arXiv 2304.06767. Simplified: a round learns from its own completions alone, none are kept from earlier ones.

    python rejection_sampling.py
    python rejection_sampling.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --micro-batch-size 8 --max-new-tokens 512 --eval-every 50 --eval-prompts 100

A row of the .jsonl file: {"prompt": "What is 37 + 48?", "answer": "85"}; every column reaches the reward by name.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import common  # first: it sets how OpenMP's threads wait

import torch
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    model: str = "models/arithmetic"  # checkpoint folder or hub id of a causal language model
    data: str = "arithmetic"  # `arithmetic`, a .jsonl file, or a hub data set id
    eval_data: str = ""  # rows for evaluation; without it a tenth of the prompts is held out
    reward: tuple[str, ...] = ("exact_answer",)  # or math, format, length, file.py:function; the first also evaluates
    reward_weights: tuple[float, ...] = ()  # one weight for each reward; 1 each without it
    num_steps: int = 60  # steps; each takes the next batch of prompts
    prompts_per_step: int = 32  # prompts in a step
    samples_per_prompt: int = 8  # completions of each prompt
    micro_batch_size: int = 128  # sequences in one forward and backward pass: sets the memory, not the result
    max_new_tokens: int = 8  # tokens in a completion, its stop token included
    temperature: float = 1.0  # divides the logits, in sampling and in every log-prob
    learning_rate: float = 1e-4  # peak learning rate of AdamW; it falls linearly to 0
    warmup_steps: int = 0  # steps over which the learning rate rises from 0
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
    track: Literal["none", "tensorboard", "wandb"] = "none"  # where metrics go besides metrics.jsonl
    num_epochs: int = 1  # passes over the completions of a step
    num_minibatches: int = 1  # optimizer steps in a pass
    strategy: Literal["best_of_prompt", "threshold", "best_of_batch", "random"] = "best_of_prompt"  # see above
    threshold: float = 0.5  # a completion passes with a reward above it; random asks for none


def sample(logits, temperature):
    """A token [b, 1] for each row of logits [b, V], from the softmax at the temperature (0: greedy); its log-prob."""
    log_softmax = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature > 0:  # by one random number a row; torch.multinomial draws V of them, which takes longer
        dtype = torch.float32 if logits.device.type == "mps" else torch.float64
        cdf = log_softmax.exp().cumsum(-1, dtype=dtype)
        uniform = torch.rand(len(cdf), 1, dtype=dtype, device=cdf.device)
        token = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
    else:
        token = log_softmax.argmax(-1, keepdim=True)
    return token, log_softmax.gather(1, token)[:, 0]


@torch.no_grad()
def rollout(model, prompt_ids, prompt_mask, *, max_new_tokens, samples_per_prompt=1, temperature=0.0):
    """Sample completions from the plain softmax at the temperature, 0 being greedy: no top-k, top-p or penalties.

    Each prompt, left-padded in prompt_ids and prompt_mask [N, P], is prefilled once, and its KV cache repeated for its
    samples; a row leaves the batch with its first stop token. Returns completion_ids, completion_mask (1.0 up to and
    including that token), the log-probs of the sampled tokens, all [B, T], B = N * samples_per_prompt, and truncated
    [B]: whether a completion has no stop token.
    """
    stop_ids = torch.tensor(model.generation_config.eos_token_id, device=prompt_ids.device)
    prompt_of = torch.arange(len(prompt_ids), device=prompt_ids.device).repeat_interleave(samples_per_prompt)  # [B]
    alive = torch.arange(len(prompt_of), device=prompt_ids.device)  # rows of the result that are still in the batch
    completion_ids = prompt_ids.new_zeros(len(alive), max_new_tokens)
    completion_mask = torch.zeros_like(completion_ids, dtype=torch.float32)
    logprobs, truncated = torch.zeros_like(completion_mask), torch.ones_like(alive, dtype=torch.bool)
    token, mask, cache = prompt_ids, prompt_mask, None
    for t in range(max_new_tokens):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -token.shape[1] :]  # padding gets 0, unattended
        inputs = {"input_ids": token, "attention_mask": mask, "position_ids": position_ids}
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1]  # [N, V] of the prompts, then [b, V] of the rows in the batch
        if t == 0:
            cache, logits, mask = output.past_key_values, logits[prompt_of], mask[prompt_of]
            cache.reorder_cache(prompt_of)  # one copy for each sample; every kind of cache has this
        token, logprob = sample(logits, temperature)  # [b, 1], [b]
        going = ~torch.isin(token[:, 0], stop_ids)
        completion_ids[alive, t], logprobs[alive, t] = token[:, 0], logprob
        completion_mask[alive, t], truncated[alive] = 1.0, going
        if not going.any():
            break
        if not going.all():
            cache.reorder_cache(going.nonzero()[:, 0])
            alive, token, mask = alive[going], token[going], mask[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return completion_ids[:, : t + 1], completion_mask[:, : t + 1], logprobs[:, : t + 1], truncated


def hidden_states(model, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """The trunk's states [B, T+1, H] after a prompt [B, P] and after each token of its completion [B, T].

    Rows with the same prompt share one pass over it: its KV cache is repeated for them, and gradients flow back through
    the cache. That pays from two rows a prompt on.
    """
    trunk = getattr(model, "trunk", model.base_model)  # the model without its head; FSDP must be entered by model.trunk
    first = int(prompt_mask.argmax(1).min())
    prompt_ids, prompt_mask = prompt_ids[:, first:], prompt_mask[:, first:]  # without what is padding in every row
    prompts, row_of = torch.unique(torch.cat([prompt_mask, prompt_ids], 1), dim=0, return_inverse=True)  # [N, 2P], [B]
    attention_mask = torch.cat([prompt_mask, completion_mask.long()], 1)  # [B, P+T]
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    P = prompt_ids.shape[1]
    alone = completion_ids.shape[1] == 0 or 2 * len(prompts) > len(prompt_ids)  # fewer than two rows a prompt
    if common.anywhere(alone or not common.shares_prompts(model.base_model)):
        input_ids = torch.cat([prompt_ids, completion_ids], 1)
        output = trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        return output.last_hidden_state[:, P - 1 :]
    mask, input_ids = prompts.split(P, 1)  # [N, P]
    settings = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    output = trunk(input_ids=input_ids, use_cache=True, **settings)
    cache, after_prompt = output.past_key_values, output.last_hidden_state[row_of, -1:]  # [B, 1, H]
    cache.reorder_cache(row_of)
    settings = {"attention_mask": attention_mask, "position_ids": position_ids[:, P:], "past_key_values": cache}
    output = trunk(input_ids=completion_ids, use_cache=True, **settings)
    return torch.cat([after_prompt, output.last_hidden_state], 1)


def token_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *, temperature=1.0):
    """log pi(y_t | x, y_<t) of given completions [B, T], 0 after their end, under the temperature that sampled them.

    Logits are made of completion tokens only, 2**24 at a time; up to 2**26 are held for the backward pass.
    """
    width = int(completion_mask.sum(1).max().clamp(min=1))
    completion = completion_ids[:, : width - 1], completion_mask[:, : width - 1]  # the last token is a target only
    hidden = hidden_states(model, prompt_ids, prompt_mask, *completion)  # [B, width, H]
    kept = completion_mask > 0  # [B, T]: the state at t predicts token t
    hidden, targets = hidden[kept[:, :width]], completion_ids[kept]  # [n, H], [n]

    def of_chunk(hidden, targets):  # [n]; softmax in float32: huggingface/transformers#31267
        log_softmax = (common.logits_of(model, hidden).float() / temperature).log_softmax(-1)  # [n, V]
        return log_softmax.gather(-1, targets[:, None])[:, 0]

    size = max(1, 2**24 // model.config.get_text_config().vocab_size)
    chunks = list(zip(hidden.split(size), targets.split(size)))
    again = len(chunks) > 4  # more than 2**26 logits are not held: each chunk's are made again in the backward pass
    logprobs = torch.cat([checkpoint(of_chunk, *c, use_reentrant=False) if again else of_chunk(*c) for c in chunks])
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
    """First rewards [n] of greedy completions of this process's held-out prompts; their mean is the accuracy."""
    texts, ids, rows = [], [], common.share(rows)
    size = args.prompts_per_step // common.WORLD_SIZE * getattr(args, "samples_per_prompt", 1)  # as in a rollout
    with common.autocast(args), common.gathered(model):
        for start in range(0, len(rows), size):
            prompts = common.prompt_batch(tokenizer, rows[start : start + size], model.device)
            completion_ids, completion_mask, _, _ = rollout(model, *prompts, max_new_tokens=args.max_new_tokens)
            decoded = common.decode(tokenizer, completion_ids, completion_mask)
            texts, ids = texts + decoded[0], ids + decoded[1]
    _, components = score(rows, texts, ids)
    run.log_samples(step, "eval", tokenizer, rows[:8], texts, components)
    return next(iter(components.values()))


@common.restored()
def main(args: Args) -> dict[str, float]:
    """Train, evaluate, save; returns the last value of each metric."""
    args = common.check_args(args)
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns=("prompt",))
    score = common.load_reward(args.reward, args.reward_weights, train_rows + eval_rows)
    run = common.Run(args)
    device, autocast = common.pick_device(args), common.autocast(args)
    model, tokenizer = common.load_model(args.model, device, train=args)
    common.check_prompts(model, tokenizer, train_rows + eval_rows, args.max_new_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    G = args.samples_per_prompt
    sampling = {"samples_per_prompt": G, "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}

    run.start(model=(model, optimizer))
    if run.done == 0:
        run.log(0, {"eval/accuracy": evaluate(run, 0, model, tokenizer, eval_rows, score, args)})
    for step in run.steps():
        # 1. sample G completions of each of N prompts: B = N G sequences of P prompt and T completion tokens
        rows = common.take_batch(train_rows, step, args)
        padded = common.prompt_batch(tokenizer, rows, device)  # prompt_ids and prompt_mask [N, P]
        with autocast, common.gathered(model):
            completion_ids, completion_mask, sampled_logprobs, truncated = rollout(model, *padded, **sampling)  # [B, T]
        prompt_ids, prompt_mask = (x.repeat_interleave(G, 0) for x in padded)  # [B, P]
        lengths = completion_mask.sum(1)  # [B], as truncated is
        run.lap("rollout")

        # 2. score
        texts, ids = common.decode(tokenizer, completion_ids, completion_mask)
        rewards, components = score([row for row in rows for _ in range(G)], texts, ids)
        rewards = rewards.to(device)  # [B]; NaN where nothing could score the completion,
        completion_mask[rewards.isnan()] = 0.0  # which then takes no part in the update, though its length is logged
        batch = (prompt_ids, prompt_mask, completion_ids, completion_mask)
        run.lap("score")

        # 3. select: kept [K] are rows of the batch
        how = {"strategy": args.strategy, "threshold": args.threshold}
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        all_rewards, all_texts = torch.tensor(common.gather(rewards.tolist())), common.gather(texts)
        kept = select(all_rewards, all_texts, samples_per_prompt=G, generator=generator, **how)
        kept = kept[kept // len(texts) == common.RANK] % len(texts)  # those that this process sampled
        # -1 is a row of no weight, for processes that kept less than another: all of them run the same passes
        most = max(common.gather([len(kept)]))
        filled = torch.cat([kept, kept.new_full((most - len(kept),), -1)])

        # 4. update: in each epoch one optimizer step on each minibatch of the kept completions
        decay = min(step / max(1, args.warmup_steps), 1) * (1 - (step - 1) / args.num_steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * decay
        stats = defaultdict(float)
        passes = (torch.randperm(most) for _ in range(args.num_epochs if most else 0))
        minibatches = [filled[m].to(device) for order in passes for m in order.chunk(args.num_minibatches)]
        for minibatch in minibatches:
            minibatch = minibatch[lengths[minibatch].argsort(stable=True)]  # micro-batches then hold little padding
            tokens = common.total((completion_mask[minibatch] * (minibatch >= 0)[:, None]).sum())
            for micro in minibatch.split(args.micro_batch_size):
                inputs, mask = [x[micro] for x in batch], completion_mask[micro] * (micro >= 0)[:, None]
                with autocast:
                    logprobs = token_logprobs(model, *inputs, temperature=args.temperature)  # [b, T]
                loss = sft_loss(logprobs, mask, normalizer=tokens)
                loss.backward()
                stats["loss/sft"] += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            stats["grad_norm"] += run.check_finite(step, norm)
            optimizer.step()
            optimizer.zero_grad()
        stats = {name: value / len(minibatches) for name, value in stats.items()}
        seconds = run.lap("update")

        # 5. log: numbers, parts of sums over all processes, and tensors whose mean is logged
        scored, groups = completion_mask > 0, rewards.view(-1, G)
        metrics = stats | {
            **{f"reward/{name}": scores for name, scores in components.items()},
            "reward/mean": rewards,
            "select/kept": torch.isin(torch.arange(len(texts)), kept),
            "select/prompts": torch.isin(torch.arange(len(rows)), kept // G),
            "select/reward": rewards[kept],
            "policy/entropy": -sampled_logprobs[scored],
            "completion/length": lengths,
            "completion/truncated": truncated,
            "group/zero_std": groups.amax(1) == groups.amin(1),
            "tokens_per_second": lengths.sum() / seconds,
        }
        run.log_samples(step, "train", tokenizer, rows[:1] * G, texts, components)
        if step % args.eval_every == 0 or step == args.num_steps:
            metrics["eval/accuracy"] = evaluate(run, step, model, tokenizer, eval_rows, score, args)
        run.log(step, metrics)
        run.save(step)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args))
