"""REINFORCE: sample completions and raise the log-probability of those that score above a baseline.

Loss, over the B completions of a step, A_i = R_i - b_i detached:

    L = -1/B sum_i A_i sum_t log pi(y_it | x_i, y_i,<t)

The baseline b_i is none, the mean of the group (the completions of one prompt), or the mean of the others in the
group (leave-one-out, RLOO). The last is unbiased; the full mean shrinks the gradient by (G - 1) / G for a group of G.
With beta, R_i is the score minus beta sum_t (log pi - log pi_ref): the k1 estimate, whose gradient in the reward is
that of KL(pi || pi_ref).

Source: Williams 1992; arXiv 2509.04501, section on REINFORCE; leave-one-out and KL in the reward: Ahmadian et al.,
arXiv 2402.14740. Simplified: each rollout serves one update, so there is no ratio and nothing to clip.

    python reinforce.py
    python reinforce.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
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
    num_steps: int = 150  # steps; each takes the next batch of prompts
    prompts_per_step: int = 16  # prompts in a step
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
    baseline: Literal["none", "mean", "leave_one_out"] = "leave_one_out"  # what a completion's reward is compared with
    beta: float = 0.0  # weight of the KL to the starting model in the rewards; 0 loads no second model

    def __post_init__(self):
        if self.samples_per_prompt < 2 and self.baseline != "none":
            raise SystemExit("--samples-per-prompt: a completion is compared with others of its prompt; give 2 or more")


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


def batch_logprobs(model, batch, args):
    """token_logprobs [B, T] of a whole batch, one micro-batch at a time."""
    micros = zip(*(x.split(args.micro_batch_size) for x in batch))
    return torch.cat([token_logprobs(model, *micro, temperature=args.temperature) for micro in micros])


def compute_advantages(rewards, *, samples_per_prompt, baseline):
    """Rewards [B] minus their baseline; a prompt's samples are adjacent. NaN, not scored, counts for nothing: 0."""
    groups = rewards.float().view(-1, samples_per_prompt)  # [N, G]
    scored = ~groups.isnan()
    total, count = groups.nansum(1, keepdim=True), scored.sum(1, keepdim=True)
    if baseline == "none":
        b = torch.zeros_like(groups)
    elif baseline == "mean":
        b = total / count
    else:
        b = (total - groups) / (count - 1)  # arXiv 2402.14740, eq. 8; a group of one has nothing to compare with
    return (groups - b).nan_to_num(0.0, 0.0, 0.0).view(-1)


def policy_loss(logprobs, advantages, completion_mask, *, normalizer):
    """-sum_i A_i sum_t log pi / normalizer, where the normalizer is the number of completions in the whole batch."""
    return -(advantages[:, None] * logprobs * completion_mask).sum() / normalizer


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
    ref_model = common.load_reference(args, model, device) if args.beta else None
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

        # 3. advantages, after the KL to the starting model is taken off the rewards
        with torch.no_grad(), autocast:
            ref_logprobs = batch_logprobs(ref_model, batch, args) if args.beta else sampled_logprobs  # [B, T]
        kl = (sampled_logprobs - ref_logprobs) * completion_mask  # [B, T]
        shaped_rewards = rewards - args.beta * kl.sum(1)  # [B]
        advantages = compute_advantages(shaped_rewards, samples_per_prompt=G, baseline=args.baseline)  # [B]

        # 4. update: one optimizer step on the whole batch
        decay = min(step / max(1, args.warmup_steps), 1) * (1 - (step - 1) / args.num_steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * decay
        stats = defaultdict(float)
        longest = lengths.view(-1, G).amax(1).cpu()  # [N]
        prompts = longest.argsort(stable=True)  # micro-batches then hold little padding
        minibatch = (prompts[:, None] * G + torch.arange(G)).flatten().to(device)  # a prompt's rows together
        minibatch = common.nonzero_rows(minibatch, advantages)  # the others' gradient is 0
        completions = common.total((~rewards.isnan()).sum()).clamp(min=1)
        for micro in minibatch.split(args.micro_batch_size):
            inputs, mask = [x[micro] for x in batch], completion_mask[micro]
            with autocast:
                logprobs = token_logprobs(model, *inputs, temperature=args.temperature)  # [b, T]
            loss = policy_loss(logprobs, advantages[micro], mask, normalizer=completions)
            loss.backward()
            stats["loss/policy"] += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        stats["grad_norm"] += run.check_finite(step, norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = run.lap("update")

        # 5. log: numbers, parts of sums over all processes, and tensors whose mean is logged
        scored, groups = completion_mask > 0, rewards.view(-1, G)
        metrics = stats | {
            **{f"reward/{name}": scores for name, scores in components.items()},
            "reward/mean": rewards,
            "policy/entropy": -sampled_logprobs[scored],
            "completion/length": lengths,
            "completion/truncated": truncated,
            "group/zero_std": groups.amax(1) == groups.amin(1),
            "tokens_per_second": lengths.sum() / seconds,
        }
        if args.beta:
            metrics["kl/ref"] = kl[scored]
        run.log_samples(step, "train", tokenizer, rows[:1] * G, texts, components)
        if step % args.eval_every == 0 or step == args.num_steps:
            metrics["eval/accuracy"] = evaluate(run, step, model, tokenizer, eval_rows, score, args)
        run.log(step, metrics)
        run.save(step)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args))
