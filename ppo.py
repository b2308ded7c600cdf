"""PPO: several clipped updates on each rollout, with an advantage for each token from a learned value model.

With r_t = pi / pi_old and N tokens in the optimizer batch, the policy and the value model minimise

    L_policy = -1/N sum_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)
    L_value  = 1/(2N) sum_t max((V_t - R_t)^2, (V_old + clip(V_t - V_old, -eps_v, eps_v) - R_t)^2)

where advantages come from generalised advantage estimation over a completion's tokens,

    A_t = delta_t + gamma lambda A_t+1,  delta_t = reward_t + gamma V_t+1 - V_t,  R_t = A_t + V_t,

and are then whitened over all tokens of the rollout. A token's reward is -beta (log pi - log pi_ref), plus the
score on the stop token, after which V is 0. A completion that was cut off has not ended: the value of the state after
its last token stands for what is missing, the score included. So where none ends (completion/truncated is 1), no score
is learned from: raise --max-new-tokens.

Source: Schulman et al., arXiv 1707.06347, eq. 7; GAE: arXiv 1506.02438, eq. 16; for language models: arXiv 2203.02155
and 2403.17031; arXiv 2509.04501, section on PPO. TRL differs: it puts the score one position after the stop token.

    python ppo.py
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --value-learning-rate 1e-5 --micro-batch-size 8 --max-new-tokens 512 --eval-every 50 --eval-prompts 100

A row of the .jsonl file: {"prompt": "What is 37 + 48?", "answer": "85"}; every column reaches the reward by name.
"""

import time
from dataclasses import dataclass
from typing import Literal

import common  # before torch: it calms OpenMP

import torch
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    model: str = "models/arithmetic"
    """checkpoint folder or hub id of a causal language model"""
    data: str = "arithmetic"
    """`arithmetic`, a .jsonl file, or a hub data set id"""
    eval_data: str = ""
    """rows for evaluation; without it a tenth of the prompts is held out"""
    reward: tuple[str, ...] = ("exact_answer",)
    """one or several of exact_answer, format, length, file.py:function; the first is the accuracy of evaluations"""
    reward_weights: tuple[float, ...] = ()
    """one weight for each reward; 1 each without it"""
    num_steps: int = 80
    """steps, each on prompts of its own"""
    prompts_per_step: int = 16
    """prompts in a step"""
    samples_per_prompt: int = 8
    """completions of each prompt"""
    micro_batch_size: int = 128
    """sequences in one forward and backward pass; changes memory, never the result"""
    max_new_tokens: int = 8
    """tokens in a completion, its stop token included"""
    temperature: float = 1.0
    """divides the logits, in sampling and in every log-prob"""
    learning_rate: float = 1e-4
    """AdamW's at its highest; it falls linearly to 0"""
    warmup_steps: int = 0
    """steps over which the learning rate rises from 0"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    seed: int = 1
    """of all that is random"""
    device: str = "auto"
    """auto is CUDA, else MPS, else the CPU"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of forward passes: auto is bfloat16 on CUDA, float32 elsewhere; parameters are always float32"""
    lora_rank: int = 0
    """of LoRA adapters, which are then all that is trained; 0 trains the whole model"""
    merge_adapters: bool = False
    """save the model with the adapters in its weights, not the adapters alone"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass: less memory, more time"""
    eval_every: int = 10
    """steps between evaluations"""
    eval_prompts: int = 500
    """held-out prompts in an evaluation, at most"""
    save_every: int = 50
    """steps between checkpoints; 0 saves at Ctrl-C only"""
    output_dir: str = ""
    """folder of the run; runs/<script>-<time> without it"""
    resume: str = ""
    """folder of a run to go on with, as if it had never stopped"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """where metrics go besides metrics.jsonl"""
    num_epochs: int = 2
    """passes over the completions of a step"""
    num_minibatches: int = 2
    """optimizer steps in a pass"""
    beta: float = 0.05
    """weight of the KL to the starting model in the rewards; 0 loads no second model"""
    clip_range: float = 0.2
    """the ratio is clipped to 1 - clip_range .. 1 + clip_range"""
    value_clip_range: float = 0.2
    """a value moves at most so far from that of the rollout; fit it to the rewards' scale"""
    value_learning_rate: float = 1e-3
    """AdamW's for the value model, at the first step"""
    gamma: float = 1.0
    """discount"""
    gae_lambda: float = 0.95
    """1 is the whole return minus the value, 0 is one step of temporal difference"""
    target_kl: float | None = None
    """no more updates on a rollout once the policy is so far from the one that sampled it, per token"""


def pick_device(device, dtype):
    """The device, `auto` being CUDA, else MPS, else the CPU, and the context of forward passes: bfloat16 on CUDA.

    Parameters stay float32: AdamW on bfloat16 ones rounds nearly every RL-sized step away (NVIDIA-NeMo/RL#2322).
    """
    if device == "auto":
        mps = torch.backends.mps.is_available() and common.WORLD_SIZE == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {device}: {str(error).splitlines()[0]}") from None
    kind = torch.device(device).type
    bfloat16 = dtype == "bfloat16" or (dtype == "auto" and kind == "cuda")
    return torch.device(device), torch.autocast(kind, torch.bfloat16, enabled=bfloat16)


def take_batch(rows, *, step, size, seed):
    """The rows of a step (from 1): epoch after epoch, each in an order that only seed and epoch determine."""
    orders, batch = {}, []
    for position in range((step - 1) * size, step * size):
        epoch, index = divmod(position, len(rows))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(len(rows), generator=generator).tolist()
        batch.append(rows[orders[epoch][index]])
    return batch


def pad(sequences, side, device):
    """Token ids and mask [N, longest] of N lists of ids, padded on the side "left" or "right".

    The mask comes from lengths, and what stands in the padding never matters: a mask made by comparing ids with the pad
    token deletes the stop token where the two are one (huggingface/trl#3091).
    """
    width = max(map(len, sequences))
    ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        columns = slice(width - len(sequence), width) if side == "left" else slice(len(sequence))
        ids[row, columns] = torch.tensor(sequence)
        mask[row, columns] = 1
    return ids.to(device), mask.to(device)


def decode(tokenizer, ids, mask, *, special=False):
    """Texts of what the mask keeps of each row, without special tokens unless asked for."""
    kept = [row[keep] for row, keep in zip(ids.cpu(), mask.cpu() > 0)]
    return [tokenizer.decode(row, skip_special_tokens=not special) for row in kept]


@torch.no_grad()
def rollout(model, prompt_ids, prompt_mask, *, samples_per_prompt, max_new_tokens, temperature):
    """Sample completions from the plain softmax at the temperature, 0 being greedy: no top-k, top-p or penalties.

    Each prompt, left-padded in prompt_ids and prompt_mask [N, P], is prefilled once, and its KV cache repeated for its
    samples; a row leaves the batch with its first stop token. Returns completion_ids, completion_mask (1.0 up to and
    including that token) and the log-probs of the sampled tokens, all [B, T] with B = N * samples_per_prompt.
    """
    stop_ids = torch.tensor(model.generation_config.eos_token_id, device=prompt_ids.device)
    P, wide = prompt_ids.shape[1], torch.float32 if prompt_ids.device.type == "mps" else torch.float64
    position_ids = (prompt_mask.cumsum(1) - 1).clamp(min=0)  # absolute positions must not count the padding
    output = model(
        input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=position_ids, use_cache=True, logits_to_keep=1
    )
    cache = output.past_key_values
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device).repeat_interleave(samples_per_prompt)
    cache.reorder_cache(rows)  # which every kind of cache has, those of linear attention included
    logits = output.logits[:, -1].repeat_interleave(samples_per_prompt, 0)  # [B, V]
    mask = prompt_mask.repeat_interleave(samples_per_prompt, 0)
    mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], 1)  # [B, P+T]
    completion_ids = prompt_ids.new_zeros(len(mask), max_new_tokens)
    completion_mask = torch.zeros_like(completion_ids, dtype=torch.float32)
    logprobs = torch.zeros_like(completion_mask)
    alive = torch.arange(len(mask), device=mask.device)  # rows of the result that the batch still holds
    for t in range(max_new_tokens):
        log_softmax = (logits.float() / (temperature or 1.0)).log_softmax(-1)
        if temperature > 0:
            # one random number a row: torch.multinomial draws one for each token of the vocabulary, which takes longer
            cdf = log_softmax.exp().cumsum(-1, dtype=wide)
            number = torch.rand(len(cdf), 1, dtype=wide, device=cdf.device) * cdf[:, -1:]
            token = torch.searchsorted(cdf, number, right=True).clamp(max=cdf.shape[1] - 1)
        else:
            token = log_softmax.argmax(-1, keepdim=True)
        completion_ids[alive, t] = token[:, 0]
        completion_mask[alive, t] = 1.0
        logprobs[alive, t] = log_softmax.gather(1, token)[:, 0]
        going = ~torch.isin(token[:, 0], stop_ids)
        if t + 1 == max_new_tokens or not going.any():
            break
        if not going.all():
            cache.reorder_cache(going.nonzero()[:, 0])
            alive, token, mask = alive[going], token[going], mask[going]
        seen = mask[:, : P + t + 1]
        position_ids = seen.sum(1, keepdim=True) - 1
        logits = model(
            input_ids=token, attention_mask=seen, position_ids=position_ids, past_key_values=cache, use_cache=True
        ).logits[:, -1]
    return completion_ids[:, : t + 1], completion_mask[:, : t + 1], logprobs[:, : t + 1]


def hidden_states(trunk, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """The trunk's states [B, T+1, H] after a prompt [B, P] and after each token of its completion [B, T].

    Rows with the same prompt share one pass over it: its KV cache is repeated for them, and gradients flow back through
    the cache. That pays from two rows a prompt on.
    """
    prompts, row_of = torch.unique(torch.cat([prompt_mask, prompt_ids], 1), dim=0, return_inverse=True)  # [N, 2P], [B]
    attention_mask = torch.cat([prompt_mask, completion_mask.long()], 1)  # [B, P+T]
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    P = prompt_ids.shape[1]
    kinds = getattr(trunk.config, "layer_types", None) or ()
    linear = "linear_attention" in kinds or "hybrid" in kinds  # whose cache is written in place
    checkpointing = getattr(trunk, "gradient_checkpointing", False) and torch.is_grad_enabled()  # it allows no cache
    if common.anywhere(2 * len(prompts) > len(prompt_ids) or linear or checkpointing):
        input_ids = torch.cat([prompt_ids, completion_ids], 1)
        settings = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        return trunk(input_ids=input_ids, **settings).last_hidden_state[:, P - 1 :]
    mask, input_ids = prompts.split(P, 1)  # [N, P]
    settings = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": True}
    output = trunk(input_ids=input_ids, **settings)
    cache, states = output.past_key_values, output.last_hidden_state[row_of, -1:]  # [B, 1, H]
    if completion_ids.shape[1] == 0:
        return states
    cache.reorder_cache(row_of)
    settings = {"attention_mask": attention_mask, "position_ids": position_ids[:, P:], "past_key_values": cache}
    output = trunk(input_ids=completion_ids, use_cache=True, **settings)
    return torch.cat([states, output.last_hidden_state], 1)


def token_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *, temperature=1.0):
    """log pi(y_t | x, y_<t) of given completions [B, T], 0 after their end, under the temperature that sampled them.

    No logits are made of prompts or padding, and of other tokens no more than 2**24 at a time.
    """
    first, width = int(prompt_mask.argmax(1).min()), int(completion_mask.sum(1).max().clamp(min=1))
    width = common.largest(width)  # so that all processes run the same passes
    prompt = prompt_ids[:, first:], prompt_mask[:, first:]  # without what is padding in every row
    hidden = hidden_states(model.base_model, *prompt, completion_ids[:, : width - 1], completion_mask[:, : width - 1])
    kept = completion_mask > 0  # [B, T]
    hidden = hidden[:, : kept.shape[1]][kept[:, :width]]  # [n, H]
    targets = completion_ids[kept]  # [n]: the state at t predicts token t + 1

    def score(hidden, targets):  # [n]; in float32, as bfloat16 is noisy: huggingface/transformers#31267
        log_softmax = (common.logits_of(model, hidden).float() / temperature).log_softmax(-1)  # [n, V]
        return log_softmax.gather(-1, targets[:, None])[:, 0]

    size = max(1, 2**24 // model.config.get_text_config().vocab_size)
    chunks = list(zip(hidden.split(size), targets.split(size)))
    if len(chunks) > 1:  # made again in the backward pass, so that they are never there all at once
        logprobs = torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks])
    else:
        logprobs = score(hidden, targets)
    return logprobs.new_zeros(kept.shape).masked_scatter(kept, logprobs)


class ValueModel(torch.nn.Module):
    """Values of a completion's states: its own trunk keeps their gradients off the policy; the head starts at 0."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.head = torch.nn.Linear(trunk.get_input_embeddings().embedding_dim, 1, device=trunk.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        common.shard(self.head, trunk.device)

    def forward(self, prompt_ids, prompt_mask, completion_ids, completion_mask):
        """Values [B, T+1]: of the state that each token is sampled in, and of the state after the last token."""
        hidden = hidden_states(self.trunk, prompt_ids, prompt_mask, completion_ids, completion_mask)  # [B, T+1, H]
        # flat, as FSDP2 warns of the view that a linear layer makes of three dimensions
        return self.head(hidden.flatten(0, 1)).view(hidden.shape[:2]).float()


def compute_gae(token_rewards, values, completion_mask, *, gamma, gae_lambda, bootstrap=None):
    """Advantages and returns [B, T], 0 after a completion's end (arXiv 1506.02438, eq. 16).

    token_rewards, values, completion_mask [B, T]; bootstrap [B] is the value of the state after the last token: 0, the
    default, after a stop token.
    """
    token_rewards, values = token_rewards.float(), values.float()
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(next_advantage) if bootstrap is None else bootstrap.float()
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        inside = completion_mask[:, t] > 0  # on padding nothing changes, so the bootstrap meets the last token
        advantages[:, t] = torch.where(inside, delta + gamma * gae_lambda * next_advantage, 0.0)
        next_advantage = torch.where(inside, advantages[:, t], next_advantage)
        next_value = torch.where(inside, values[:, t], next_value)
    return advantages, (advantages + values) * completion_mask


def whiten(advantages, completion_mask):
    """Mean 0 and variance 1 over all tokens of the mask, 0 elsewhere."""
    tokens = common.mean(completion_mask.sum()).clamp(min=1e-3)
    mean = common.mean((advantages * completion_mask).sum()) / tokens
    variance = common.mean(((advantages - mean).square() * completion_mask).sum()) / tokens
    return (advantages - mean) * completion_mask / (variance + 1e-8).sqrt()


def policy_loss(logprobs, old_logprobs, advantages, completion_mask, *, clip_range, normalizer):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7); all [B, T], the normalizer is the optimizer batch's tokens."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # an infinite ratio times an advantage of 0 is NaN
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.min(ratio * advantages, clipped_ratio * advantages)
    return (loss * completion_mask).sum() / normalizer


def value_loss(values, old_values, returns, completion_mask, *, value_clip_range, normalizer):
    """Half the squared error, the worse of the value's and the clipped value's (arXiv 2005.12729); all [B, T]."""
    clipped_values = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    loss = torch.max((values - returns).square(), (clipped_values - returns).square()) / 2
    return (loss * completion_mask).sum() / normalizer


def evaluate(run, step, model, tokenizer, rows, score, *, max_new_tokens, batch_size):
    """Mean of the first reward over greedy completions of held-out prompts: the accuracy, where that is 0 or 1."""
    scores, rows = [], common.share(rows)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompt_ids, prompt_mask = pad(
            [common.prompt_tokens(tokenizer, row["prompt"]) for row in batch], "left", model.device
        )
        completion_ids, completion_mask, _ = rollout(
            model, prompt_ids, prompt_mask, samples_per_prompt=1, max_new_tokens=max_new_tokens, temperature=0.0
        )
        texts = decode(tokenizer, completion_ids, completion_mask)
        _, components = score(batch, texts)
        scores.append(next(iter(components.values())))
        if start == 0:
            prompts = decode(tokenizer, prompt_ids[:8], prompt_mask[:8], special=True)
            run.log_samples(step, "eval", prompts, texts, components)
    return common.nanmean(torch.cat(scores)).item()


def main(args: Args) -> dict[str, float]:
    """Train, evaluate, save; returns the last value of every metric."""
    args = common.check_args(args)
    if args.prompts_per_step // common.WORLD_SIZE * args.samples_per_prompt % args.num_minibatches:
        raise SystemExit("--num-minibatches: a step's completions, of each process, do not divide into so many parts")
    columns = ("prompt",)
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns=columns)
    score = common.load_reward(args.reward, args.reward_weights)
    run = common.Run(args)
    device, autocast = pick_device(args.device, args.dtype)
    trained = {"lora_rank": args.lora_rank, "gradient_checkpointing": args.gradient_checkpointing, "autocast": autocast}
    model, tokenizer = common.load_model(args.model, device, **trained)
    common.check_prompts(model, tokenizer, train_rows + eval_rows, args.max_new_tokens)
    ref_model = common.load_reference(args, model, device) if args.beta else None
    stop_ids = model.generation_config.eos_token_id
    value_model = ValueModel(common.load_model(args.model, device, **trained)[0].base_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    optimizer.add_param_group({"params": value_model.parameters()})
    G, B = args.samples_per_prompt, args.prompts_per_step // common.WORLD_SIZE * args.samples_per_prompt
    sampling = {"samples_per_prompt": G, "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    greedy = {"max_new_tokens": args.max_new_tokens, "batch_size": B}

    parts = {"model": model, "value_model": value_model, "optimizer": optimizer}  # what a checkpoint holds
    steps_done = run.start(parts)
    if steps_done == 0:
        with autocast, common.whole(model):
            accuracy = evaluate(run, 0, model, tokenizer, eval_rows, score, **greedy)
        run.log(0, {"eval/accuracy": accuracy})
    for step in range(steps_done + 1, args.num_steps + 1):
        # 1. sample G completions of each prompt: B sequences of P prompt and T completion tokens
        start = time.perf_counter()
        rows = common.share(take_batch(train_rows, step=step, size=args.prompts_per_step, seed=args.seed))
        prompt_ids, prompt_mask = pad([common.prompt_tokens(tokenizer, row["prompt"]) for row in rows], "left", device)
        with autocast, common.whole(model):
            completion_ids, completion_mask, sampled_logprobs = rollout(model, prompt_ids, prompt_mask, **sampling)
        rows = [row for row in rows for _ in range(G)]
        prompt_ids, prompt_mask = prompt_ids.repeat_interleave(G, 0), prompt_mask.repeat_interleave(G, 0)  # [B, P]
        lengths = completion_mask.sum(1)  # [B]
        ended = torch.isin(completion_ids, torch.tensor(stop_ids, device=device)) & (completion_mask > 0)  # [B, T]
        truncated = ~ended.any(1)  # [B]
        rollout_seconds = time.perf_counter() - start

        # 2. score
        texts = decode(tokenizer, completion_ids, completion_mask)
        rewards, components = score(rows, texts)
        rewards = rewards.to(device)  # [B], NaN where nothing could score the completion:
        completion_mask[rewards.isnan()] = 0.0  # it then takes no part in the update, though its length is logged
        batch = (prompt_ids, prompt_mask, completion_ids, completion_mask)
        chunks = list(zip(*(x.split(args.micro_batch_size) for x in batch)))

        # 3. rewards, values and advantages of each token; the log-probs that the update starts from
        rows_by_prompt = torch.arange(B).view(-1, G)  # [N, G]; they stay together, so a prompt is computed once
        passes = [rows_by_prompt[torch.randperm(B // G)].view(-1).to(device) for _ in range(args.num_epochs)]
        minibatches = [minibatch for order in passes for minibatch in order.chunk(args.num_minibatches)]
        old_logprobs = ref_logprobs = sampled_logprobs  # [B, T]; replaced below where they are needed
        with torch.no_grad(), autocast:
            if len(minibatches) > 1:  # else they are by definition those of the update itself
                old_logprobs = [token_logprobs(model, *chunk, temperature=args.temperature) for chunk in chunks]
                old_logprobs = torch.cat(old_logprobs)
            if args.beta:
                ref_logprobs = [token_logprobs(ref_model, *chunk, temperature=args.temperature) for chunk in chunks]
                ref_logprobs = torch.cat(ref_logprobs)
        kl = (sampled_logprobs - ref_logprobs) * completion_mask  # [B, T]
        token_rewards = -args.beta * kl
        ends = torch.where(truncated, 0.0, rewards.nan_to_num())
        token_rewards.scatter_add_(1, lengths.long()[:, None] - 1, ends[:, None])
        with torch.no_grad(), autocast:
            values = torch.cat([value_model(*chunk) for chunk in chunks])  # [B, T+1]
        old_values, bootstrap = values[:, :-1], values[:, -1] * truncated  # [B, T], [B]: only truncated rows fill all T
        gae_settings = {"gamma": args.gamma, "gae_lambda": args.gae_lambda, "bootstrap": bootstrap}
        advantages, returns = compute_gae(token_rewards, old_values, completion_mask, **gae_settings)  # [B, T]
        advantages = whiten(advantages, completion_mask)

        # 4. update: one optimizer step on each minibatch
        decay = min(step / max(1, args.warmup_steps), 1) * (1 - (step - 1) / args.num_steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * decay
        optimizer.param_groups[1]["lr"] = args.value_learning_rate * decay
        stats = {"loss/policy": 0.0, "policy/clip_frac": 0.0, "kl/old": 0.0, "grad_norm": 0.0}
        stats["loss/value"], updates = 0.0, 0
        longest = lengths.view(-1, G).amax(1)  # [N]; micro-batches keep a prompt's rows together, with little padding
        rank = longest.argsort(stable=True).argsort().repeat_interleave(G)  # [B]
        for minibatch in minibatches:
            # the mean over the processes, as gradients are: so each token weighs the same, wherever it is
            tokens = common.mean(completion_mask[minibatch].sum()).clamp(min=1e-3)
            policy_settings = {"clip_range": args.clip_range, "normalizer": tokens}
            value_settings = {"value_clip_range": args.value_clip_range, "normalizer": tokens}
            kl_before = float(stats["kl/old"])
            by_prompt = minibatch[rank[minibatch].argsort(stable=True)]
            for micro in by_prompt.split(args.micro_batch_size):
                mask = completion_mask[micro]
                with autocast:
                    logprobs = token_logprobs(model, *(x[micro] for x in batch), temperature=args.temperature)  # [b, T]
                old = old_logprobs[micro] if len(minibatches) > 1 else logprobs.detach()
                loss = policy_loss(logprobs, old, advantages[micro], mask, **policy_settings)
                loss.backward()  # before the values are computed: activations of one model at a time
                with autocast:
                    values = value_model(*(x[micro] for x in batch))[:, :-1]  # [b, T]
                loss_v = value_loss(values, old_values[micro], returns[micro], mask, **value_settings)
                loss_v.backward()
                stats["loss/policy"] += loss.detach()
                stats["loss/value"] += loss_v.detach()
                ratio = (logprobs.detach() - old).exp()
                clipped = (ratio < 1 - args.clip_range) | (ratio > 1 + args.clip_range)
                stats["policy/clip_frac"] += (clipped * mask).sum() / tokens
                stats["kl/old"] += ((ratio - 1 - ratio.log()) * mask).sum() / tokens
            updates += 1
            if args.target_kl and common.mean(stats["kl/old"] - kl_before) > args.target_kl:
                optimizer.zero_grad()
                break
            torch.nn.utils.clip_grad_norm_(value_model.parameters(), args.max_grad_norm)
            stats["grad_norm"] += torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            run.check_finite(step, stats, batch)
            optimizer.step()
            optimizer.zero_grad()
        stats = {name: total / updates for name, total in stats.items()}

        # 5. log
        seconds = time.perf_counter() - start
        groups, sampled_tokens = rewards.view(-1, G), common.mean(completion_mask.sum())
        metrics = stats | {
            "reward/mean": common.nanmean(rewards),
            **{f"reward/{name}": common.nanmean(values) for name, values in components.items()},
            "policy/entropy": -(sampled_logprobs * completion_mask).sum() / sampled_tokens,  # as sampled
            "completion/length": lengths.mean(),
            "completion/truncated": truncated.float().mean(),
            "group/zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
            "time/rollout": rollout_seconds,
            "time/update": seconds - rollout_seconds,
            "tokens_per_second": common.WORLD_SIZE * lengths.sum() / seconds,
        }
        if args.beta:
            metrics["kl/ref"] = kl.sum() / sampled_tokens
        prompts = decode(tokenizer, prompt_ids[:G], prompt_mask[:G], special=True)
        run.log_samples(step, "train", prompts, texts, components)
        if step % args.eval_every == 0 or step == args.num_steps:
            with autocast, common.whole(model):
                metrics["eval/accuracy"] = evaluate(run, step, model, tokenizer, eval_rows, score, **greedy)
        run.log(step, metrics)
        run.save(step, parts)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args))
