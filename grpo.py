"""GRPO: PPO's clipped update with advantages relative to a group, without a value model; and its well-known variants.

A_i = (R_i - mean R) / (std R + 1e-4) over a prompt's G completions, r_t = pi / pi_old of each token, n_i tokens in
completion i, B completions and N tokens in the minibatch, k_t the estimated KL to the starting model, sg stop-gradient:

    l_t = -min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i) + beta k_t

    grpo      L = 1/B sum_i 1/n_i sum_t l_t                                   arXiv 2402.03300, eq. 3
    dapo      L = 1/N sum_i sum_t l_t,  clip_high > clip_low                  arXiv 2503.14476, eq. 8
    dr_grpo   L = 1/(B max_new_tokens) sum_i sum_t l_t,  no division by std   arXiv 2503.20783, section 3.2
    gspo      grpo with one r = exp(mean_t log(pi / pi_old)) for each i       arXiv 2507.18071, eq. 5 and 7
    cispo     dapo with l_t = -sg(clip(r_t)) A_i log pi + beta k_t            arXiv 2506.13585, eq. 4 and 5

    k3 = pi_ref / pi - 1 - log(pi_ref / pi)   the paper's: unbiased, but its gradient is that of KL(pi_ref || pi)
    k2 = log(pi_ref / pi)^2 / 2               its gradient is that of KL(pi || pi_ref), on-policy (arXiv 2512.21852)

As terms of the loss both ignore what a token does to the KL of later tokens; a KL in the rewards does not.

Source: the papers above; exposition: arXiv 2509.04501. Clip range, std and beta default to the values of the loss
type's paper; a clip range that it does not state is 0.2, cispo's that of arXiv 2510.13786. DAPO also samples
--oversample times the prompts, trains the groups that do not tie, then tied ones up to the batch, and leaves out
truncated completions. Simplified: in one pass, where it samples until the batch is full; the reference stays the start.

    python grpo.py
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --micro-batch-size 8 --max-new-tokens 512 --eval-every 50 --eval-prompts 100

A row of the .jsonl file: {"prompt": [{"role": "user", "content": "What is 37 + 48?"}], "answer": "85"}
"""

from collections import defaultdict
from dataclasses import dataclass, replace
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
    num_steps: int = 150  # steps; each takes the next batch of prompts
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
    num_epochs: int = 1  # passes over the completions of a step
    num_minibatches: int = 1  # optimizer steps in a pass
    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"  # which of the losses; sets the next six
    clip_low: float | None = None  # the ratio is clipped below at 1 - clip_low (0.2; gspo 3e-4, cispo 1)
    clip_high: float | None = None  # the ratio is clipped above at 1 + clip_high (0.2; dapo 0.28, gspo 4e-4, cispo 4)
    scale: Literal["std", "none"] | None = None  # divisor of a group's advantages: std or none (std; dr_grpo none)
    beta: float | None = None  # weight of the KL to the start in the loss (grpo 0.04, else 0); 0 loads no second model
    oversample: int | None = None  # sample this many times the prompts, train those first that do not tie (1; dapo 3)
    mask_truncated: bool | None = None  # leave completions without a stop token out of the loss (False; dapo True)
    kl_estimator: Literal["k3", "k2"] = "k3"  # how the loss estimates the KL to the starting model
    overlong_buffer: int = 0  # over this many last tokens the reward falls by up to 1 (arXiv 2503.14476, eq. 13)

    def __post_init__(self):
        if self.samples_per_prompt < 2:
            raise SystemExit("--samples-per-prompt: a completion is compared with others of its prompt; give 2 or more")


LOSS_DEFAULTS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale": "std", "beta": 0.04},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "scale": "std", "beta": 0.0, "oversample": 3, "mask_truncated": True},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale": "none", "beta": 0.0},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "scale": "std", "beta": 0.0},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0, "scale": "std", "beta": 0.0},  # r in 0 .. 5 (arXiv 2510.13786)
}


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


def compute_advantages(rewards, *, samples_per_prompt, scale):
    """Rewards [B] relative to their group; a prompt's samples are adjacent. NaN, not scored, counts for nothing: 0."""
    groups = rewards.float().view(-1, samples_per_prompt)  # [N, G]
    groups = groups - groups.nan_to_num(-torch.inf).amax(1, keepdim=True)  # equal rewards become exact zeros
    count = (~groups.isnan()).sum(1, keepdim=True)
    centred = (groups - groups.nansum(1, keepdim=True) / count).nan_to_num(0.0)
    if scale == "std":
        centred = centred / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    return centred.view(-1)


def compute_ratio(logprobs, old_logprobs, completion_mask, *, loss_type):
    """pi / pi_old of each token [B, T]; for gspo of each completion [B, 1], the geometric mean over its tokens."""
    log_ratio = logprobs - old_logprobs
    if loss_type == "gspo":
        lengths = completion_mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio * completion_mask).sum(1, keepdim=True) / lengths
    return log_ratio.clamp(-20, 20).exp()  # an infinite ratio times an advantage of 0 is NaN


def policy_loss(
    logprobs, old_logprobs, ref_logprobs, advantages, completion_mask,
    *, loss_type, clip_low, clip_high, beta, kl_estimator, normalizer,
):  # fmt: skip
    """The formulas above: log-probs and mask [B, T], advantages [B]; ref_logprobs is not read where beta is 0.

    The normalizer is loss_normalizer's of the whole minibatch.
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
    """What a minibatch's loss is divided by: its completions, its tokens, or the tokens it had room for."""
    completions, tokens = completion_mask.any(1).sum(), completion_mask.sum()
    return {"dapo": tokens, "cispo": tokens, "dr_grpo": completions * max_new_tokens}.get(loss_type, completions)


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
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = replace(args, **{"oversample": 1, "mask_truncated": False} | LOSS_DEFAULTS[args.loss_type] | given)
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns=("prompt",))
    score = common.load_reward(args.reward, args.reward_weights)
    run = common.Run(args)
    model, tokenizer = common.load_model(args.model, args.device, args)
    common.check_prompts(model, tokenizer, train_rows + eval_rows, args.max_new_tokens)
    ref_model = common.load_reference(args, model) if args.beta else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    G = args.samples_per_prompt
    on_policy = args.num_epochs * args.num_minibatches == 1  # pi_old is then pi itself
    sampling_args = replace(args, prompts_per_step=args.oversample * args.prompts_per_step)

    run.start(train_rows, eval_rows, model=(model, optimizer))
    if run.done == 0:
        run.log(0, evaluate(run, 0, model, tokenizer, eval_rows, score, args))
    for step in run.steps():
        # 1. sample G completions of T tokens for each of N prompts: B = N G, a prompt's adjacent; b of a micro-batch
        rows = common.take_batch(train_rows, step, sampling_args)
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
        if args.mask_truncated:
            completion_mask[truncated] = 0.0  # their rewards still count in the group's mean
        batch = (*prompts, completion_ids, completion_mask)
        run.lap("score")

        # 3. advantages, relative to the other completions of the prompt; the log-probs that the update starts from
        overlong = (lengths - args.max_new_tokens + args.overlong_buffer).clamp(min=0) / max(1, args.overlong_buffer)
        shaped = rewards - overlong  # [B]
        advantages = compute_advantages(shaped, samples_per_prompt=G, scale=args.scale)  # [B]
        tied = (advantages.view(-1, G) == 0).all(1)  # [N]
        # of what was oversampled, groups that do not tie come first
        kept = tied.int().argsort(stable=True)[: len(rows) // args.oversample].sort().values
        minibatches = kept[torch.randperm(len(kept))].chunk(args.num_minibatches)  # prompts, the same in each epoch
        old_logprobs = None if on_policy else batch_logprobs(model, batch, minibatches, args)  # [B, T]
        ref_logprobs = batch_logprobs(ref_model, batch, minibatches, args) if args.beta else None  # [B, T]

        # 4. update: in each epoch one optimizer step on each minibatch of prompts
        optimizer.param_groups[0]["lr"] = learning_rate = args.learning_rate * common.decay(args, step)
        stats = defaultdict(float)
        for minibatch in minibatches * args.num_epochs:
            minibatch_mask = completion_mask.view(len(rows), G, -1)[minibatch].flatten(0, 1)  # [n G, T]
            tokens = common.total(minibatch_mask.sum()).clamp(min=1)
            normalizer = common.total(loss_normalizer(minibatch_mask, args.loss_type, args.max_new_tokens)).clamp(min=1)
            if on_policy and not args.beta:  # else tied groups count in kl/old, and the KL pulls at them
                minibatch = common.without_ties(minibatch, advantages.view(-1, G))  # the others' gradient is 0
            for micro, inputs in common.micro_batches(batch, minibatch, args.micro_batch_size):
                mask = completion_mask[micro]  # [b, T]
                with common.autocast(args):
                    logprobs = token_logprobs(model, *inputs, temperature=args.temperature)  # [b, T]
                old = logprobs.detach() if on_policy else old_logprobs[micro]
                ref = ref_logprobs[micro] if args.beta else None
                loss = policy_loss(
                    logprobs, old, ref, advantages[micro], mask, loss_type=args.loss_type, clip_low=args.clip_low,
                    clip_high=args.clip_high, beta=args.beta, kl_estimator=args.kl_estimator, normalizer=normalizer,
                )  # fmt: skip
                loss.backward()
                ratio = compute_ratio(logprobs.detach(), old, mask, loss_type=args.loss_type)
                clipped = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
                stats["loss/policy"] += loss.detach()
                stats["policy/clip_frac"] += (clipped * mask).sum() / tokens
                stats["kl/old"] += ((ratio - 1 - ratio.log()) * mask).sum() / tokens  # k3 of KL(pi_old || pi)
                if args.beta:  # not the sampler's log-probs, which round differently in bfloat16
                    stats["kl/ref"] += ((old - ref) * mask).sum() / tokens
            common.sum_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            stats["grad_norm"] += float(norm)
            optimizer.step()
            optimizer.zero_grad()
        stats = {name: value / (args.num_epochs * len(minibatches)) for name, value in stats.items()}
        seconds = run.lap("update")

        # 5. log: numbers as they are, 0-dim tensors summed over all processes, others averaged
        metrics = stats | {
            **{f"reward/{name}": scores for name, scores in components.items()},
            "reward/mean": rewards,
            "policy/entropy": -sampled_logprobs[completion_mask > 0],
            "completion/length": lengths,
            "completion/truncated": truncated,
            "group/zero_std": (shaped.view(-1, G) == shaped[::G, None]).all(1),
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
