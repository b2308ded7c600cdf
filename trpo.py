"""TRPO: the largest step along the natural gradient that keeps the policy within a KL bound and raises the surrogate.

With N tokens in the batch, r_t = pi / pi_old and A_i the advantages of reinforce.py, each update solves

    maximise  L = 1/N sum_i A_i sum_t r_t   subject to   D = 1/N sum_i sum_t KL(pi_old(.|x, y_<t) || pi(.|x, y_<t)) <= d

to first order in L and second in D. F, the Hessian of D at pi_old (the Fisher matrix), is never formed, only multiplied
with: conjugate gradient solves (F + damping) x = grad L, and the step is sqrt(2 d / x'Fx) x, of which D is predicted to
be d. It is halved until L has risen and D is within d, both measured anew; if that never happens the parameters stay as
they are. The KL is exact, over the whole vocabulary: samples would make it noise. F and the search are float32.
Source: arXiv 1502.05477, section 6, appendix C; exposition: arXiv 2509.04501. Simplified: the bound falls to 0.

    python trpo.py
    python trpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --max-kl 0.08 --cg-iterations 2 \\
        --prompts-per-step 8 --samples-per-prompt 16 --micro-batch-size 8 --max-new-tokens 256 --eval-prompts 100

A row of the .jsonl file: {"prompt": [{"role": "user", "content": "What is 37 + 48?"}], "answer": "85"}
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import common  # before torch: it sets how OpenMP's threads wait

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    model: str = "models/arithmetic"  # folder or hub id of a causal LM, or a LoRA folder; the defaults suit this one
    data: str = "models/arithmetic/sums.jsonl"  # a .jsonl file, or folder or hub id of a data set
    eval_data: str = ""  # rows for evaluation; without it a tenth of the prompts is held out
    reward: tuple[str, ...] = ("exact_answer",)  # names, or file.py:function; all are evaluated, the first is shown
    reward_weights: tuple[float, ...] = ()  # one weight for each reward; 1 each without it
    num_steps: int = 60  # steps; each takes the next batch of prompts
    prompts_per_step: int = 64  # prompts in a step
    samples_per_prompt: int = 4  # completions of each prompt
    micro_batch_size: int = 128  # completions in one forward and backward pass: sets the memory, not the result
    max_new_tokens: int = 8  # tokens in a completion, its stop token included
    temperature: float = 1.0  # divides the logits, in sampling and in every log-prob
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
    baseline: Literal["none", "mean", "leave_one_out"] = "leave_one_out"  # what a completion's reward is compared with
    beta: float = 0.0  # weight of the KL to the starting model in the rewards; 0 loads no second model
    max_kl: float = 0.02  # bound on an update's KL, the mean over tokens; it falls linearly to 0
    fisher_samples: int = 1  # completions of each prompt in the Fisher matrix (arXiv 1502.05477, appendix C: a tenth)
    damping: float = 0.3  # added to the Fisher matrix's diagonal, as a part of its curvature along the gradient
    cg_iterations: int = 5  # iterations of conjugate gradient, at most
    cg_tolerance: float = 0.05  # conjugate gradient ends at a residual of this part of the gradient
    max_backtracks: int = 10  # halvings of a step before the update is given up

    def __post_init__(self):
        if self.samples_per_prompt < 2 and self.baseline != "none":
            raise SystemExit("--samples-per-prompt: a completion is compared with others of its prompt; give 2 or more")


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


def next_token_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *, temperature):
    """log pi(. | x, y_<t) [n, V] over the whole vocabulary, for the n tokens of the completions one after the other."""
    hidden = hidden_states(model, prompt_ids, prompt_mask, completion_ids, completion_mask)  # [b, longest, H]
    hidden = hidden[completion_mask[:, : hidden.shape[1]] > 0]  # [n, H]
    return (common.logits_of(model, hidden).float() / temperature).log_softmax(-1)


def compute_advantages(rewards, *, samples_per_prompt, baseline):
    """Rewards [B] minus their baseline; a prompt's samples are adjacent. NaN, not scored, counts for nothing: 0."""
    groups = rewards.float().view(-1, samples_per_prompt)  # [N, G]
    scored = ~groups.isnan()
    summed, count = groups.nansum(1, keepdim=True), scored.sum(1, keepdim=True)
    if baseline == "none":
        b = torch.zeros_like(groups)
    elif baseline == "mean":
        b = summed / count
    else:
        b = (summed - groups) / (count - 1)  # arXiv 2402.14740, eq. 8; a group of one has nothing to compare with
    return (groups - b).nan_to_num(0.0, 0.0, 0.0).view(-1)


def policy_loss(logprobs, old_logprobs, advantages, completion_mask, *, normalizer):
    """-sum_i A_i sum_t pi / pi_old / normalizer, where the normalizer is the number of tokens in the whole batch."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    return -(advantages[:, None] * ratio * completion_mask).sum() / normalizer


def flatten(tensors):
    """One vector [n] of several tensors."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def fisher_factors(model, parameters, chunk, *, temperature, normalizer):
    """What fisher_vector_product needs of a micro-batch, kept for all products of a step: log_softmax [n, V], a probe
    of its shape, J' probe with its graph, where J is d log_softmax / d theta, and the weight of a token."""
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative (pytorch/pytorch#116350)
        log_softmax = next_token_logprobs(model, *chunk, temperature=temperature)
        probe = torch.zeros_like(log_softmax, requires_grad=True)
        gradient = torch.autograd.grad(log_softmax, parameters, probe, create_graph=True, materialize_grads=True)
    return log_softmax, probe, flatten(gradient), 1 / normalizer


def fisher_vector_product(factors, parameters, vector):
    """F v [n] for a vector v [n]; F = J' diag(pi) J / tokens (arXiv 1502.05477, appendix C.1) is the Hessian, at pi, of
    the mean KL(pi_old || pi). J' u is linear in u, so (J' u) . v has the derivative J v by u."""
    product = torch.zeros_like(vector)
    for log_softmax, probe, gradient, weight in factors:
        with sdpa_kernel(SDPBackend.MATH):  # gradient checkpointing computes attention once more
            (jvp,) = torch.autograd.grad(gradient @ vector, probe, retain_graph=True)  # J v [n, V]
            jvp = log_softmax.detach().exp() * jvp * weight
            gradients = torch.autograd.grad(log_softmax, parameters, jvp, retain_graph=True, materialize_grads=True)
            product = product + flatten(gradients)
    return common.total(product)


def conjugate_gradient(fvp, b, *, iterations, tolerance, damping=0.0):
    """x [n] that nearly solves (F + lambda) x = b, lambda being the damping times F's curvature along b; the residual's
    norm as a part of b's; and x'Fx. Ends after so many iterations, below the tolerance, or where F has no curvature."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    square = b @ b
    for iteration in range(iterations):
        if square.sqrt() <= tolerance * b.norm():
            break
        product = fvp(direction)
        if iteration == 0:  # the direction is b; from here on it is lambda
            damping = damping * (b @ product) / square
        product = product + damping * direction
        curvature = direction @ product
        if curvature <= 0:
            break
        x += square / curvature * direction
        residual -= square / curvature * product
        previous, square = square, residual @ residual
        direction = residual + square / previous * direction
    return x, square.sqrt() / b.norm(), x @ (b - residual) - damping * (x @ x)


@torch.no_grad()
def surrogate_and_kl(model, old_model, chunks, *, temperature):
    """The surrogate and the KL to the old policy, per token, of the parameters as they are: a fresh forward of both."""
    tokens = common.total(sum(chunk[3].sum() for chunk in chunks)).clamp(min=1)
    surrogate = kl = 0.0
    dtype = torch.float32 if tokens.device.type == "mps" else torch.float64
    for *chunk, advantages in chunks:
        old, new = (next_token_logprobs(m, *chunk, temperature=temperature) for m in (old_model, model))
        # normalised once more: that float32's probabilities do not quite add up to 1 moves a KL by 1e-7
        old, new = (x.to(dtype).log_softmax(-1) for x in (old, new))  # [n, V]
        kl += (old.exp() * (old - new)).sum() / tokens
        completion_ids, kept = chunk[2], chunk[3] > 0  # [b, T]
        log_ratio = (new - old).gather(-1, completion_ids[kept][:, None])[:, 0]  # [n]
        surrogate += (advantages.repeat_interleave(kept.sum(1)) * log_ratio.exp()).sum() / tokens
    return common.total(surrogate), common.total(kl)


@torch.no_grad()
def line_search(measure, parameters, step, *, max_kl, max_backtracks):
    """Move the parameters by the first of step, step / 2, step / 4, .. that raises the surrogate within the KL bound.

    measure() gives surrogate and KL of the parameters as they are. Returns the fraction of the step [n] that was taken
    and the KL there; if none will do both are 0, and the parameters to the bit what they were."""
    old_parameters = parameters_to_vector(parameters)  # [n]
    surrogate_before, _ = measure()
    for fraction in [0.5**backtrack for backtrack in range(max_backtracks + 1)]:
        vector_to_parameters(old_parameters + fraction * step, parameters)
        surrogate, kl = measure()
        if surrogate > surrogate_before and kl <= max_kl:
            return fraction, kl
    vector_to_parameters(old_parameters, parameters)
    return 0.0, 0.0


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
    float32 = replace(args, dtype="float32")  # LoRA's frozen weights, too, as they are differentiated twice
    model, tokenizer = common.load_model(args.model, args.device, float32)
    old_model = common.load_model(args.model, model.device, float32)[0]  # the policy that sampled
    common.check_prompts(model, tokenizer, train_rows + eval_rows, args.max_new_tokens)
    ref_model = common.load_reference(args, model) if args.beta else None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    G = args.samples_per_prompt

    run.start(train_rows, eval_rows, model=(model, None))
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

        # 3. advantages, after the KL to the starting model is taken off the rewards
        shaped_rewards = rewards
        if args.beta:
            own, ref = (batch_logprobs(one, batch, [torch.arange(len(rows))], args) for one in (model, ref_model))
            kl = (own - ref) * completion_mask  # [B, T]; not the sampler's log-probs, whose rounding is another
            shaped_rewards = rewards - args.beta * kl.sum(1)  # [B]
        advantages = compute_advantages(shaped_rewards, samples_per_prompt=G, baseline=args.baseline)  # [B]

        # 4. update: along the natural gradient, as far as the bound allows
        max_kl = args.max_kl * (1 - (step - 1) / args.num_steps)
        stats = defaultdict(float)
        everything = torch.arange(len(rows))
        minibatch = common.without_ties(everything, advantages.view(-1, G))  # the others' gradient is 0
        tokens = common.total(completion_mask.sum()).clamp(min=1)
        for micro, inputs in common.micro_batches(batch, minibatch, args.micro_batch_size):
            with common.autocast(args):
                logprobs = token_logprobs(model, *inputs, temperature=args.temperature)  # [b, T]
            mask, old = completion_mask[micro], logprobs.detach()  # [b, T]
            loss = policy_loss(logprobs, old, advantages[micro], mask, normalizer=tokens)
            loss.backward()
            stats["loss/policy"] += loss.detach()
        gradient = -common.total(flatten([torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]))
        stats["grad_norm"] += float(torch.nn.utils.get_total_norm([gradient], error_if_nonfinite=True))
        model.zero_grad()
        if gradient.any():  # [n]; there is none where no completion was better than another
            old_model.load_state_dict(model.state_dict())
            some = torch.arange(len(lengths), device=model.device) % G < args.fisher_samples
            fisher_batch = (*prompts, completion_ids[some], completion_mask[some])
            tokens = common.total(completion_mask[some].sum()).clamp(min=1)
            factors = [
                fisher_factors(model, parameters, inputs, temperature=args.temperature, normalizer=tokens)
                for _, inputs in common.micro_batches(fisher_batch, everything, args.micro_batch_size)
            ]
            fvp = partial(fisher_vector_product, factors, parameters)
            x, residual, curvature = conjugate_gradient(
                fvp, gradient, iterations=args.cg_iterations, tolerance=args.cg_tolerance, damping=args.damping
            )
            full_step = (2 * max_kl / curvature).sqrt() * x
            del factors, fvp  # the search needs their graphs' memory
            micros = common.micro_batches(batch, everything, args.micro_batch_size)
            chunks = [(*inputs, advantages[rows]) for rows, inputs in micros]
            measure = partial(surrogate_and_kl, model, old_model, chunks, temperature=args.temperature)
            fraction, kl_old = line_search(
                measure, parameters, full_step, max_kl=max_kl, max_backtracks=args.max_backtracks
            )
            stats |= {"cg/residual": float(residual), "kl/old": float(kl_old), "kl/predicted": fraction**2 * max_kl}
            stats |= {"line_search/fraction": fraction, "line_search/failed": float(fraction == 0.0)}
        seconds = run.lap("update")

        # 5. log: numbers as they are, 0-dim tensors summed over all processes, others averaged
        metrics = stats | {
            **{f"reward/{name}": scores for name, scores in components.items()},
            "reward/mean": rewards,
            "policy/entropy": -sampled_logprobs[completion_mask > 0],
            "completion/length": lengths,
            "completion/truncated": truncated,
            "group/zero_std": (rewards.view(-1, G) == rewards[::G, None]).all(1),
            "tokens_per_second": lengths.sum() / seconds,
        }
        if args.beta:
            metrics["kl/ref"] = kl[completion_mask > 0]
        run.log_samples(step, "train", tokenizer, rows[:1] * G, texts, components)
        if step % args.eval_every == 0 or step == args.num_steps:
            metrics |= evaluate(run, step, model, tokenizer, eval_rows, score, args)
        run.log(step, metrics)
        run.save(step)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args, description=common.usage(__doc__)))
