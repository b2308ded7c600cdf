"""TRPO: the largest step along the natural gradient that keeps the policy within a KL bound and raises the surrogate.

With N tokens in the batch, r_t = pi / pi_old and A_i the advantages of reinforce.py, each update solves

    maximise  L = 1/N sum_i A_i sum_t r_t   subject to   D = 1/N sum_i sum_t KL(pi_old(.|x, y_<t) || pi(.|x, y_<t)) <= d

to first order in L and second in D. F, the Hessian of D at pi_old (the Fisher matrix), is never formed, only multiplied
with: conjugate gradient solves (F + damping) x = grad L, and the step is sqrt(2 d / x'Fx) x, of which D is predicted to
be d. It is halved until L has risen and D is within d, both measured anew on the whole batch; if that never happens the
parameters stay as they are. The KL is exact, over the whole vocabulary: from samples the matrix would be noise. F takes
some completions of each prompt, whose graph is kept for all products of an update. F, and L and D of the search, are
float32; on a GPU grad L is not.

Source: Schulman et al., arXiv 1502.05477, section 6 and appendix C; arXiv 2509.04501, section on TRPO. Simplified: the
bound falls linearly to 0, as the learning rate does in the other scripts, to which it corresponds.

    python trpo.py
    python trpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --max-kl 1e-3 \\
        --micro-batch-size 8 --max-new-tokens 512 --eval-every 50 --eval-prompts 100

A row of the .jsonl file: {"prompt": "What is 37 + 48?", "answer": "85"}; every column reaches the reward by name.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import common  # before torch: it calms OpenMP

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
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
    num_steps: int = 60
    """steps, each on prompts of its own"""
    prompts_per_step: int = 64
    """prompts in a step"""
    samples_per_prompt: int = 4
    """completions of each prompt"""
    micro_batch_size: int = 128
    """sequences in one forward and backward pass; changes memory, never the result"""
    max_new_tokens: int = 8
    """tokens in a completion, its stop token included"""
    temperature: float = 1.0
    """divides the logits, in sampling and in every log-prob"""
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
    baseline: Literal["none", "mean", "leave_one_out"] = "leave_one_out"
    """what a completion's reward is compared with"""
    beta: float = 0.0
    """weight of the KL to the starting model in the rewards; 0 loads no second model"""
    max_kl: float = 0.02
    """bound on the KL of an update, mean over the completion tokens, at the first step; it falls linearly to 0"""
    fisher_samples: int = 1
    """completions of each prompt that the Fisher matrix is made of (arXiv 1502.05477, appendix C, takes a tenth)"""
    damping: float = 0.1
    """added to the Fisher matrix' diagonal in conjugate gradient"""
    cg_iterations: int = 5
    """of conjugate gradient, at most"""
    cg_tolerance: float = 0.05
    """conjugate gradient ends once the residual is so small a part of the gradient"""
    max_backtracks: int = 10
    """halvings of a step before the update is given up"""


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


def next_token_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *, temperature):
    """log pi(. | x, y_<t) [B, T, V] over the whole vocabulary; token_logprobs are those of the sampled tokens."""
    prompt, completion = (prompt_ids, prompt_mask), (completion_ids[:, :-1], completion_mask[:, :-1])
    hidden = hidden_states(model.base_model, *prompt, *completion)  # [B, T, H]
    return (common.logits_of(model, hidden).float() / temperature).log_softmax(-1)


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


def policy_loss(logprobs, old_logprobs, advantages, completion_mask, *, normalizer):
    """-sum_i A_i sum_t pi / pi_old / normalizer, where the normalizer is the number of tokens in the whole batch."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    return -(advantages[:, None] * ratio * completion_mask).sum() / normalizer


def flatten(tensors):
    """One vector [n] of several tensors."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def fisher_factors(model, chunk, *, temperature, normalizer):
    """What fisher_vector_product needs of a micro-batch, kept for all products of a step; J is d log_softmax / d theta.

    Returns log_softmax [b, T, V], probe of its shape, J' probe [n] with its graph, and the weight of each token [b, T].
    """
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative (pytorch/pytorch#116350)
        log_softmax = next_token_logprobs(model, *chunk, temperature=temperature)
        probe = torch.zeros_like(log_softmax, requires_grad=True)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradient = torch.autograd.grad(log_softmax, parameters, probe, create_graph=True)
    return log_softmax, probe, flatten(gradient), chunk[-1] / normalizer


def fisher_vector_product(factors, parameters, vector, *, damping=0.0):
    """(F + damping) v [n] for a vector v [n]; F is the Hessian, at pi itself, of the tokens' mean KL(pi_old || pi).

    F = J' diag(pi) J / tokens (arXiv 1502.05477, appendix C.1). J' u is linear in u, so (J' u) . v has the derivative
    J v by u: backward passes are all that is needed.
    """
    product = torch.zeros_like(vector)
    for log_softmax, probe, gradient, weight in factors:
        with sdpa_kernel(SDPBackend.MATH):  # gradient checkpointing computes attention once more
            (jvp,) = torch.autograd.grad(gradient @ vector, probe, retain_graph=True)  # J v [b, T, V]
            jvp = log_softmax.detach().exp() * jvp * weight[..., None]
            product = product + flatten(torch.autograd.grad(log_softmax, parameters, jvp, retain_graph=True))
    return common.mean(product) + damping * vector


def conjugate_gradient(fvp, b, *, iterations, tolerance):
    """x [n] of which fvp(x) is nearly b, and the norm of the residual b - fvp(x) as a part of b's.

    Ends after so many iterations, once that part is below the tolerance, or at a direction without curvature, of which
    a Fisher matrix with damping has none.
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    square = b @ b
    for _ in range(iterations):
        if square.sqrt() <= tolerance * b.norm():
            break
        product = fvp(direction)
        curvature = direction @ product
        if curvature <= 0:
            break
        x += square / curvature * direction
        residual -= square / curvature * product
        previous, square = square, residual @ residual
        direction = residual + square / previous * direction
    return x, square.sqrt() / b.norm()


@torch.no_grad()
def surrogate_and_kl(model, old_model, chunks, *, temperature):
    """The surrogate and the KL to the old policy, per token, of the parameters as they are: a fresh forward of both."""
    tokens = common.mean(sum(chunk[3].sum() for chunk in chunks)).clamp(min=1e-3)
    surrogate = kl = 0.0
    wide = torch.float32 if tokens.device.type == "mps" else torch.float64
    for *chunk, advantages in chunks:
        old, new = (next_token_logprobs(m, *chunk, temperature=temperature) for m in (old_model, model))
        # normalised once more: that float32's probabilities do not quite add up to 1 moves a KL by 1e-7
        old, new = (x.to(wide).log_softmax(-1) for x in (old, new))
        kl += ((old.exp() * (old - new)).sum(-1) * chunk[-1]).sum() / tokens
        old, new = (x.gather(-1, chunk[2][..., None])[..., 0] for x in (old, new))
        surrogate -= policy_loss(new, old, advantages, chunk[-1], normalizer=tokens)
    return common.mean(surrogate), common.mean(kl)


@torch.no_grad()
def line_search(measure, parameters, step, *, max_kl, max_backtracks):
    """Move the parameters by the first of step, step / 2, step / 4, .. that raises the surrogate within the KL bound.

    measure() gives surrogate and KL of the parameters as they are. Returns the fraction of the step [n] that was taken
    and the KL there. If none will do both are 0, and the parameters to the bit what they were.
    """
    old_parameters = [parameter.clone() for parameter in parameters]
    deltas = step.split([parameter.numel() for parameter in parameters])
    surrogate_before, _ = measure()
    for fraction in [0.5**backtrack for backtrack in range(max_backtracks + 1)]:
        for parameter, old_parameter, delta in zip(parameters, old_parameters, deltas):
            parameter.copy_(old_parameter + fraction * delta.view_as(parameter))
        surrogate, kl = measure()
        if surrogate > surrogate_before and kl <= max_kl:
            return fraction, kl
    for parameter, old_parameter in zip(parameters, old_parameters):
        parameter.copy_(old_parameter)
    return 0.0, 0.0


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
    if args.samples_per_prompt < 2 and args.baseline != "none":
        raise SystemExit("--samples-per-prompt: a completion is compared with others of its prompt, so give 2 or more")
    columns = ("prompt",)
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns=columns)
    score = common.load_reward(args.reward, args.reward_weights)
    run = common.Run(args)
    device, autocast = pick_device(args.device, args.dtype)
    # each process has the whole model: FSDP's parameters cannot be differentiated through twice
    trained = {"lora_rank": args.lora_rank, "gradient_checkpointing": args.gradient_checkpointing, "replicated": True}
    model, tokenizer = common.load_model(args.model, device, **trained)
    common.check_prompts(model, tokenizer, train_rows + eval_rows, args.max_new_tokens)
    ref_model = common.load_reference(args, model, device) if args.beta else None
    stop_ids = model.generation_config.eos_token_id
    old_model = common.load_model(args.model, device, **trained)[0]  # the policy that sampled
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    G, B = args.samples_per_prompt, args.prompts_per_step // common.WORLD_SIZE * args.samples_per_prompt
    sampling = {"samples_per_prompt": G, "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    greedy = {"max_new_tokens": args.max_new_tokens, "batch_size": B}

    parts = {"model": model}  # what a checkpoint holds
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

        # 3. advantages, after the KL to the starting model is taken off the rewards
        ref_logprobs = sampled_logprobs  # [B, T]; replaced below where they are needed
        with torch.no_grad(), autocast:
            if args.beta:
                ref_logprobs = [token_logprobs(ref_model, *chunk, temperature=args.temperature) for chunk in chunks]
                ref_logprobs = torch.cat(ref_logprobs)
        kl = (sampled_logprobs - ref_logprobs) * completion_mask  # [B, T]
        shaped_rewards = rewards - args.beta * kl.sum(1)  # [B]
        advantages = compute_advantages(shaped_rewards, samples_per_prompt=G, baseline=args.baseline)  # [B]

        # 4. update: along the natural gradient, as far as the bound allows
        max_kl = args.max_kl * (1 - (step - 1) / args.num_steps)
        stats = {"loss/policy": 0.0, "grad_norm": 0.0}
        longest = lengths.view(-1, G).amax(1)  # [N]; micro-batches keep a prompt's rows together, with little padding
        rank = longest.argsort(stable=True).argsort().repeat_interleave(G)  # [B]
        minibatch = torch.arange(B, device=device)
        # the mean over the processes, as gradients are: so each token weighs the same, wherever it is
        normalizer = common.mean(completion_mask[minibatch].sum()).clamp(min=1e-3)
        by_prompt = minibatch[rank[minibatch].argsort(stable=True)]
        for micro in by_prompt.split(args.micro_batch_size):
            mask = completion_mask[micro]
            with autocast:
                logprobs = token_logprobs(model, *(x[micro] for x in batch), temperature=args.temperature)  # [b, T]
            loss = policy_loss(logprobs, logprobs.detach(), advantages[micro], mask, normalizer=normalizer)
            loss.backward()
            stats["loss/policy"] += loss.detach()
        gradient = -common.mean(flatten([parameter.grad for parameter in parameters]))
        stats["grad_norm"] += gradient.norm()
        run.check_finite(step, stats, batch)
        model.zero_grad()
        if gradient.any():  # there is none where no completion was better than another
            old_model.load_state_dict(model.state_dict())
            some = (torch.arange(B, device=device) % G < args.fisher_samples).nonzero()[:, 0]
            tokens = common.mean(completion_mask[some].sum()).clamp(min=1e-3)
            settings = {"temperature": args.temperature, "normalizer": tokens}
            micros = some.split(args.micro_batch_size)
            factors = [fisher_factors(model, [x[micro] for x in batch], **settings) for micro in micros]
            fvp = partial(fisher_vector_product, factors, parameters)
            settings = {"iterations": args.cg_iterations, "tolerance": args.cg_tolerance}
            x, stats["cg/residual"] = conjugate_gradient(partial(fvp, damping=args.damping), gradient, **settings)
            full_step = (2 * max_kl / (x @ fvp(x))).sqrt() * x
            del factors, fvp  # the search needs their graphs' memory
            chunks = [(*chunk, a) for chunk, a in zip(chunks, advantages.split(args.micro_batch_size))]
            measure = partial(surrogate_and_kl, model, old_model, chunks, temperature=args.temperature)
            settings = {"max_kl": max_kl, "max_backtracks": args.max_backtracks}
            fraction, stats["kl/old"] = line_search(measure, parameters, full_step, **settings)
            stats["line_search/fraction"], stats["line_search/failed"] = fraction, fraction == 0.0
            stats["kl/predicted"] = fraction**2 * max_kl

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
