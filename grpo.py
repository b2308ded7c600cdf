"""GRPO: PPO's clipped update with advantages relative to a group, without a value model; and its well-known variants.

A_i = (R_i - mean R) / std R over the G completions of a prompt, r_t = pi / pi_old for each token, n_i tokens in
completion i, B completions and N tokens in the optimizer batch, k_t the estimate of the KL to the starting model:

    l_t = -min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i) + beta k_t

    grpo      L = 1/B sum_i 1/n_i sum_t l_t                                   arXiv 2402.03300, eq. 3
    dapo      L = 1/N sum_i sum_t l_t,  clip_high > clip_low                  arXiv 2503.14476, eq. 8
    dr_grpo   L = 1/(B max_new_tokens) sum_i sum_t l_t,  no division by std   arXiv 2503.20783, section 3.2
    gspo      grpo with one r = exp(mean_t log pi / pi_old) for each i        arXiv 2507.18071, eq. 5 and 7
    cispo     dapo with l_t = -sg(clip(r_t)) A_i log pi + beta k_t            arXiv 2506.13585, eq. 4 and 5

    k3 = pi_ref / pi - 1 - log pi_ref / pi    the paper's: unbiased, but its gradient is that of KL(pi_ref || pi)
    k2 = (log pi_ref / pi)^2 / 2              its gradient is that of KL(pi || pi_ref), on-policy (arXiv 2512.21852)

Either gradient is of each token's own KL: what a token does to the KL of those after it counts in rewards alone.

Source: arXiv 2509.04501, section on GRPO; and the papers above. Simplified: the reference stays the starting model, and
dynamic sampling (arXiv 2503.14476) is left out. Clip range, std and beta default to those of the loss type's own paper.

    python grpo.py
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --micro-batch-size 8 --max-new-tokens 512 --eval-every 50 --eval-prompts 100

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
    num_steps: int = 150
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
    num_epochs: int = 1
    """passes over the completions of a step"""
    num_minibatches: int = 1
    """optimizer steps in a pass"""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """see above; sets the next four where they are not given"""
    clip_low: float | None = None
    """the ratio is clipped below at 1 - clip_low"""
    clip_high: float | None = None
    """the ratio is clipped above at 1 + clip_high"""
    scale: Literal["std", "none"] | None = None
    """whether a group's advantages are divided by its standard deviation"""
    beta: float | None = None
    """weight of the KL to the starting model in the loss; 0 loads no second model"""
    kl_estimator: Literal["k3", "k2"] = "k3"
    """of that KL"""
    overlong_buffer: int = 0
    """a completion loses up to 1 reward over the last so many tokens it may have (arXiv 2503.14476, eq. 13)"""


PAPER_SETTINGS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale": "std", "beta": 0.04},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "scale": "std", "beta": 0.0},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale": "none", "beta": 0.0},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "scale": "std", "beta": 0.0},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0, "scale": "std", "beta": 0.0},  # r in 0 .. 5 (arXiv 2510.13786)
}


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


def compute_advantages(rewards, *, samples_per_prompt, scale):
    """Rewards [B] relative to their group; a prompt's samples are adjacent. NaN, not scored, counts for nothing: 0."""
    groups = rewards.float().view(-1, samples_per_prompt)  # [N, G]
    scored = ~groups.isnan()
    count = scored.sum(1, keepdim=True)
    centred = (groups - groups.nansum(1, keepdim=True) / count).nan_to_num(0.0)
    if scale == "std":
        centred = centred / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    # rounding leaves a residue in a group that all scored the same, and the division would blow it up
    spread = groups.nan_to_num(-torch.inf).amax(1, keepdim=True) > groups.nan_to_num(torch.inf).amin(1, keepdim=True)
    return (centred * spread).view(-1)


def compute_ratio(logprobs, old_logprobs, completion_mask, *, loss_type):
    """pi / pi_old of each token [B, T]; for gspo of each completion [B, 1], the geometric mean over its tokens."""
    log_ratio = logprobs - old_logprobs
    if loss_type == "gspo":
        lengths = completion_mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio * completion_mask).sum(1, keepdim=True) / lengths
    return log_ratio.clamp(-20, 20).exp()  # an infinite ratio times an advantage of 0 is NaN


def policy_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    advantages,
    completion_mask,
    *,
    loss_type,
    clip_low,
    clip_high,
    beta,
    kl_estimator,
    normalizer,
):
    """The formulas above: log-probs and mask [B, T], advantages [B]; ref_logprobs is not read where beta is 0.

    The normalizer is loss_normalizer's of the whole optimizer batch.
    """
    ratio = compute_ratio(logprobs, old_logprobs, completion_mask, loss_type=loss_type)
    advantages = advantages[:, None]
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    if loss_type == "cispo":
        loss = -clipped_ratio.detach() * advantages * logprobs
    else:
        loss = -torch.min(ratio * advantages, clipped_ratio * advantages)
    if beta:
        log_ref_ratio = ref_logprobs - logprobs
        kl = log_ref_ratio.exp() - log_ref_ratio - 1 if kl_estimator == "k3" else log_ref_ratio.square() / 2
        loss = loss + beta * kl
    if loss_type in ("grpo", "gspo"):
        loss = loss / completion_mask.sum(1, keepdim=True).clamp(min=1)
    return (loss * completion_mask).sum() / normalizer


def loss_normalizer(completion_mask, loss_type, max_new_tokens):
    """What an optimizer batch's loss is divided by: its completions, its tokens, or the tokens it had room for."""
    completions, tokens = completion_mask.any(1).sum(), completion_mask.sum()
    return {"dapo": tokens, "cispo": tokens, "dr_grpo": completions * max_new_tokens}.get(loss_type, completions)


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
    if args.samples_per_prompt < 2:
        raise SystemExit("--samples-per-prompt: a completion is compared with others of its prompt, so give 2 or more")
    for name, setting in PAPER_SETTINGS[args.loss_type].items():
        if getattr(args, name) is None:
            setattr(args, name, setting)
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    G, B = args.samples_per_prompt, args.prompts_per_step // common.WORLD_SIZE * args.samples_per_prompt
    sampling = {"samples_per_prompt": G, "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    greedy = {"max_new_tokens": args.max_new_tokens, "batch_size": B}
    loss_settings = {"loss_type": args.loss_type, "clip_low": args.clip_low, "clip_high": args.clip_high}
    loss_settings |= {"beta": args.beta, "kl_estimator": args.kl_estimator}

    parts = {"model": model, "optimizer": optimizer}  # what a checkpoint holds
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

        # 3. advantages, relative to the other completions of the prompt; the log-probs that the update starts from
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
        over = (lengths - args.max_new_tokens + args.overlong_buffer).clamp(min=0) / max(1, args.overlong_buffer)
        shaped_rewards = rewards - over  # [B]
        advantages = compute_advantages(shaped_rewards, samples_per_prompt=G, scale=args.scale)  # [B]

        # 4. update: one optimizer step on each minibatch
        decay = min(step / max(1, args.warmup_steps), 1) * (1 - (step - 1) / args.num_steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * decay
        stats = {"loss/policy": 0.0, "policy/clip_frac": 0.0, "kl/old": 0.0, "grad_norm": 0.0}
        longest = lengths.view(-1, G).amax(1)  # [N]; micro-batches keep a prompt's rows together, with little padding
        rank = longest.argsort(stable=True).argsort().repeat_interleave(G)  # [B]
        for minibatch in minibatches:
            # the mean over the processes, as gradients are: so each token weighs the same, wherever it is
            tokens = common.mean(completion_mask[minibatch].sum()).clamp(min=1e-3)
            normalizer = loss_normalizer(completion_mask[minibatch], args.loss_type, args.max_new_tokens)
            normalizer = common.mean(normalizer).clamp(min=1e-3)
            by_prompt = minibatch[rank[minibatch].argsort(stable=True)]
            for micro in by_prompt.split(args.micro_batch_size):
                mask = completion_mask[micro]
                with autocast:
                    logprobs = token_logprobs(model, *(x[micro] for x in batch), temperature=args.temperature)  # [b, T]
                old = old_logprobs[micro] if len(minibatches) > 1 else logprobs.detach()
                ref = ref_logprobs[micro]
                loss = policy_loss(logprobs, old, ref, advantages[micro], mask, normalizer=normalizer, **loss_settings)
                loss.backward()
                stats["loss/policy"] += loss.detach()
                ratio = compute_ratio(logprobs.detach(), old, mask, loss_type=args.loss_type)
                clipped = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
                stats["policy/clip_frac"] += (clipped * mask).sum() / tokens
                stats["kl/old"] += ((ratio - 1 - ratio.log()) * mask).sum() / tokens
            stats["grad_norm"] += torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            run.check_finite(step, stats, batch)
            optimizer.step()
            optimizer.zero_grad()
        stats = {name: total / len(minibatches) for name, total in stats.items()}

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
