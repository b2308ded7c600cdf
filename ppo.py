"""PPO: several clipped updates on each rollout, with an advantage for each token from a learned value model.

With r_t = pi / pi_old and N tokens in the minibatch, the policy and the value model minimise

    L_policy = -1/N sum_t min(r_t A_t, clip(r_t, 1 - clip_range, 1 + clip_range) A_t)
    L_value  = 1/(2N) sum_t max((V_t - R_t)^2, (V_old + clip(V_t - V_old, -/+ value_clip_range) - R_t)^2)

where advantages come from generalised advantage estimation over a completion's tokens,

    A_t = delta_t + gamma lambda A_{t+1},  delta_t = reward_t + gamma V_old_{t+1} - V_old_t,  R_t = A_t + V_old_t,

and are then whitened over all tokens of the rollout. A token's reward is -beta log(pi_old / pi_ref), plus the score on
a completion's last token, whether that is a stop token or not; after it V is 0. Source: arXiv 1707.06347, eq. 7; GAE:
arXiv 1506.02438, eq. 16; arXiv 2203.02155, 2403.17031. Exposition: arXiv 2509.04501.

    python ppo.py
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --value-learning-rate 1e-5 --micro-batch-size 8 --max-new-tokens 512 --eval-every 50 --eval-prompts 100

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
    num_steps: int = 80  # steps; each takes the next batch of prompts
    prompts_per_step: int = 16  # prompts in a step
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
    num_epochs: int = 2  # passes over the completions of a step
    num_minibatches: int = 2  # optimizer steps in a pass
    beta: float = 0.05  # weight of the KL to the starting model in the rewards; 0 loads no second model
    clip_range: float = 0.2  # the ratio is clipped to 1 - clip_range .. 1 + clip_range
    value_clip_range: float = 0.2  # how far a value may move from that of the rollout; fit it to the rewards' scale
    value_learning_rate: float = 1e-3  # peak learning rate of the value model's AdamW
    gamma: float = 1.0  # discount
    gae_lambda: float = 0.95  # 1 is the whole return minus the value, 0 is one step of temporal difference
    target_kl: float | None = None  # a pass whose last minibatch has more KL per token than this is the step's last


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


@torch.no_grad()
def batch_logprobs(model, batch, minibatches, args):
    """token_logprobs [B, T] in the update's micro-batches: in bfloat16 a row's log-probs depend on its batch."""
    logprobs = torch.zeros_like(batch[3])
    for minibatch in minibatches:
        for rows, inputs in common.micro_batches(batch, minibatch, args.micro_batch_size):
            with common.autocast(args):
                logprobs[rows] = token_logprobs(model, *inputs, temperature=args.temperature)
    return logprobs


class ValueModel(torch.nn.Module):
    """A value for each token, by a trunk of its own, not the policy's, and a linear head that starts at 0."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.trunk, self.shares_prompts = model.base_model, model.trunk, model.shares_prompts
        self.head = torch.nn.Linear(model.get_input_embeddings().embedding_dim, 1, device=model.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, prompt_ids, prompt_mask, completion_ids, completion_mask):
        """Values [b, T] of the states that the tokens are sampled in; 0 beyond the longest completion."""
        hidden = hidden_states(self, prompt_ids, prompt_mask, completion_ids, completion_mask)  # [b, longest, H]
        values = (hidden.float() * self.head.weight[0]).sum(-1) + self.head.bias  # autocast would make them bfloat16
        return torch.nn.functional.pad(values, (0, completion_mask.shape[1] - values.shape[1]))


def compute_gae(token_rewards, values, completion_mask, *, gamma, gae_lambda):
    """Advantages and returns [B, T], 0 after a completion's last token, where V is 0 (arXiv 1506.02438, eq. 16)."""
    token_rewards, values = token_rewards.float(), values.float() * completion_mask  # [B, T]
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = (delta + gamma * gae_lambda * next_advantage) * completion_mask[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(advantages, completion_mask):
    """Mean 0 and variance 1 over all tokens of the mask, 0 elsewhere."""
    tokens = common.total(completion_mask.sum()).clamp(min=1)
    mean = common.total((advantages * completion_mask).sum()) / tokens
    variance = common.total(((advantages - mean).square() * completion_mask).sum()) / tokens
    return (advantages - mean) * completion_mask / (variance + 1e-8).sqrt()


def policy_loss(logprobs, old_logprobs, advantages, completion_mask, *, clip_range, normalizer):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7); all [B, T], the normalizer is the minibatch's tokens."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # an infinite ratio times an advantage of 0 is NaN
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.min(ratio * advantages, clipped_ratio * advantages)
    return (loss * completion_mask).sum() / normalizer


def value_loss(values, old_values, returns, completion_mask, *, value_clip_range, normalizer):
    """Half the squared error, the worse of the value's and the clipped value's (arXiv 2005.12729); all [B, T]."""
    clipped_values = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    loss = torch.max((values - returns).square(), (clipped_values - returns).square()) / 2
    return (loss * completion_mask).sum() / normalizer


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
    ref_model = common.load_reference(args, model) if args.beta else None
    value_model = ValueModel(common.load_model(args.model, model.device, args)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    value_optimizer = torch.optim.AdamW(value_model.parameters(), weight_decay=0.0, fused=True)  # each step sets lr
    G = args.samples_per_prompt

    run.start(train_rows, eval_rows, model=(model, optimizer), value_model=(value_model, value_optimizer))
    if run.done == 0:
        run.log(0, evaluate(run, 0, model, tokenizer, eval_rows, score, args))
    for step in run.steps():
        # 1. sample G completions of T tokens for each of N prompts: B = N G, a prompt's adjacent; b of a micro-batch
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
        batch = (*prompts, completion_ids, completion_mask)
        run.lap("score")

        # 3. log-probs and values that the update starts from; the reward and the advantage of each token
        minibatches = torch.randperm(len(rows)).chunk(args.num_minibatches)  # of prompts, the same in each epoch
        old_logprobs = batch_logprobs(model, batch, minibatches, args)  # [B, T]; the sampler's are rounded differently
        old_values = torch.zeros_like(old_logprobs)  # [B, T]
        for minibatch in minibatches:
            for micro, inputs in common.micro_batches(batch, minibatch, args.micro_batch_size):
                with torch.no_grad(), common.autocast(args):
                    old_values[micro] = value_model(*inputs)
        token_rewards = torch.zeros_like(old_logprobs)  # [B, T]
        if args.beta:
            kl_ref = (old_logprobs - batch_logprobs(ref_model, batch, minibatches, args)) * completion_mask
            token_rewards = -args.beta * kl_ref
        token_rewards.scatter_add_(1, lengths.long()[:, None] - 1, rewards.nan_to_num()[:, None])  # on the last token
        advantages, returns = compute_gae(  # [B, T]
            token_rewards, old_values, completion_mask, gamma=args.gamma, gae_lambda=args.gae_lambda
        )
        advantages = whiten(advantages, completion_mask)

        # 4. update: in each epoch one optimizer step on each minibatch of prompts
        optimizer.param_groups[0]["lr"] = learning_rate = args.learning_rate * common.decay(args, step)
        value_optimizer.param_groups[0]["lr"] = args.value_learning_rate * common.decay(args, step)
        stats, updates = defaultdict(float), 0
        for _ in range(args.num_epochs):
            for minibatch in minibatches:
                tokens = common.total(completion_mask.view(len(rows), G, -1)[minibatch].sum()).clamp(min=1)
                kl = 0.0  # r - 1 - log r estimates KL(pi_old || pi)
                for micro, inputs in common.micro_batches(batch, minibatch, args.micro_batch_size):
                    mask, old, advantage = completion_mask[micro], old_logprobs[micro], advantages[micro]  # [b, T]
                    with common.autocast(args):
                        logprobs = token_logprobs(model, *inputs, temperature=args.temperature)  # [b, T]
                    loss = policy_loss(logprobs, old, advantage, mask, clip_range=args.clip_range, normalizer=tokens)
                    loss.backward()
                    with common.autocast(args):  # after the policy's backward pass: activations of one model at a time
                        values = value_model(*inputs)  # [b, T]
                    targets = old_values[micro], returns[micro], mask  # [b, T]
                    loss_v = value_loss(values, *targets, value_clip_range=args.value_clip_range, normalizer=tokens)
                    loss_v.backward()
                    ratio = (logprobs.detach() - old).clamp(-20, 20).exp()
                    clipped = (ratio < 1 - args.clip_range) | (ratio > 1 + args.clip_range)
                    kl += ((ratio - 1 - ratio.log()) * mask).sum() / tokens
                    stats["loss/policy"] += loss.detach()
                    stats["loss/value"] += loss_v.detach()
                    stats["policy/clip_frac"] += (clipped * mask).sum() / tokens
                stats["kl/old"] += kl
                for key, net, opt in ("grad_norm/value", value_model, value_optimizer), ("grad_norm", model, optimizer):
                    common.sum_gradients(net)
                    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm, error_if_nonfinite=True)
                    stats[key] += float(norm)
                    opt.step()
                    opt.zero_grad()
                updates += 1
            if args.target_kl and common.total(kl) > args.target_kl:  # kl: of the epoch's last minibatch
                break
        stats = {name: value / updates for name, value in stats.items()}
        seconds = run.lap("update")

        # 5. log: numbers as they are, 0-dim tensors summed over all processes, others averaged
        metrics = stats | {
            **{f"reward/{name}": scores for name, scores in components.items()},
            "reward/mean": rewards,
            "policy/entropy": -sampled_logprobs[completion_mask > 0],
            "completion/length": lengths,
            "completion/truncated": truncated,
            "tokens_per_second": lengths.sum() / seconds,
            "learning_rate": learning_rate,
        }
        if args.beta:
            metrics["kl/ref"] = kl_ref[completion_mask > 0]
        run.log_samples(step, "train", tokenizer, rows[:1] * G, texts, components)
        if step % args.eval_every == 0 or step == args.num_steps:
            metrics |= evaluate(run, step, model, tokenizer, eval_rows, score, args)
        run.log(step, metrics)
        run.save(step)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args, description=common.usage(__doc__)))
