"""GRAPE: score completions by a rubric for their prompt's category, each item weighted by how sure its critic is.

A rubric has items k with weights w_k: verifiers, functions that check a completion, and questions to a critic model. An
item gives completion i a score s_ik and a confidence p_ik, from 0 to 1. With c_k, the mean of p_ik over the completions
of the prompt (or the batch), the reward is a mean over those items that could be scored:

    R_i = sum_k w_k c_k s_ik / sum_k w_k c_k

Then A_i = (R_i - mean R) / (std R + 1e-4) over the G completions of a prompt, and the loss is that of grpo.py. A rubric
of one item with confidence 1 is GRPO itself, to the last bit.

We had public accounts of arXiv 2509.04501, not its text. They report: rubrics by category in place of one reward model;
items checked against the truth, or scored by a prompted critic that also gives a confidence; items weighted by average
confidence; the advantage relative to the other completions of the prompt; PPO's clipped update; GRPO as the case of one
item. Our reconstruction: the formula, its scope; that a verifier has confidence 1, an item without a score is left out;
the loss's settings; how a critic is read: score p(yes) / (p(yes) + p(no)), confidence |p(yes) - p(no)|.

    python grape.py
    python grape.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --rubric examples/rubrics/gsm8k.json --micro-batch-size 8 --max-new-tokens 512 --eval-every 50

A row of the .jsonl file, and a rubric file; where there are several, the rows name theirs in a column "category":

    {"prompt": [{"role": "user", "content": "What is 37 + 48?"}], "answer": "85"}
    {"category": "sums", "items": [{"name": "right", "weight": 2, "verifier": "exact_answer"},
                                   {"name": "clear", "weight": 1, "question": "Is the answer clearly stated?"}]}
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    clip_low: float = 0.2  # the ratio is clipped below at 1 - clip_low
    clip_high: float = 0.2  # the ratio is clipped above at 1 + clip_high
    scale: Literal["std", "none"] = "std"  # divisor of a group's advantages: their std, or none
    beta: float = 0.04  # weight of the KL to the starting model in the loss; 0 loads no second model
    rubric: tuple[str, ...] = ("examples/rubrics/arithmetic.json",)  # rubric files, one for each category of prompts
    critic_model: str = ""  # folder or hub id of the model that answers questions; the starting model without it
    confidence_scope: Literal["group", "batch", "none"] = "group"  # over what confidences are averaged

    def __post_init__(self):
        if self.samples_per_prompt < 2:
            raise SystemExit("--samples-per-prompt: a completion is compared with others of its prompt; give 2 or more")


CRITIC_PROMPT = "Question: {prompt}\n\nAnswer: {completion}\n\n{question} Reply with yes or no.\n\nReply:"


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


def load_rubrics(paths, rows=()):
    """{category: items} of rubric files; the function stands in place of the name of an item's verifier."""
    rubrics = {}
    for path in paths:
        rubric = json.loads(Path(path).read_text(encoding="utf-8"))
        category, items = str(rubric["category"]), rubric["items"]
        for item in items:
            if ("verifier" in item) == ("question" in item) or not item["weight"] > 0:
                raise SystemExit(f'--rubric {path}: {item} needs a "weight" above 0 and a "verifier" or a "question"')
            if "verifier" in item:
                item["verifier"] = common.load_function(item["verifier"], Path(path).parent)
        names = {item["name"] for item in items} - {"mean"}  # reward/mean is the rubric's
        if category in rubrics or len(names) < max(1, len(items)):
            raise SystemExit(f"--rubric {path}: no items, two of a name, one called mean, or a second of its category")
        rubrics[category] = items
    if len(rubrics) > 1 and (other := {str(row.get("category")) for row in rows} - rubrics.keys()):
        raise SystemExit(f'--data: a "category" is {min(other)}, none of {", ".join(rubrics)}')
    return rubrics


@torch.no_grad()
def ask_critic(critic, tokenizer, question, rows, completions, *, batch_size):
    """Scores and confidences [2, B] of a yes-no question on each completion, by the critic's next-token probabilities;
    NaN where yes and no have less than 1 % together, which is no answer, or where the question is too long."""
    spellings = [[word, word.title(), f" {word}", f" {word.title()}"] for word in ("yes", "no")]
    yes, no = ({tokenizer(text, add_special_tokens=False).input_ids[0] for text in texts} for texts in spellings)
    yes, no = sorted(yes - no), sorted(no - yes)  # a token that begins both, a space, tells nothing
    asked = []  # (token ids, row) of each question
    for row, completion in zip(rows, completions):
        text = CRITIC_PROMPT.format(prompt=common.text_of(row["prompt"]), completion=completion, question=question)
        message = [{"role": "user", "content": text}] if tokenizer.chat_template else text
        asked_row = {"prompt": message, "chat_template_kwargs": row.get("chat_template_kwargs")}
        asked.append((tuple(common.prompt_tokens(tokenizer, asked_row)), asked_row))
    readable, answers = [x for x in dict(asked).items() if len(x[0]) <= critic.context_length], {}  # equal ones once
    for start in range(0, len(readable), batch_size):
        batch = dict(readable[start : start + batch_size])
        input_ids, mask = common.prompt_batch(tokenizer, batch.values(), critic.device)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        hidden = critic.trunk(**inputs, use_cache=False).last_hidden_state[:, -1]  # [b, H]
        probabilities = common.logits_of(critic, hidden).float().softmax(-1)  # [b, V]
        p_yes, p_no = probabilities[:, yes].sum(1), probabilities[:, no].sum(1)
        answer = torch.stack([p_yes / (p_yes + p_no), (p_yes - p_no).abs()], 1)  # [b, 2]
        answers |= zip(batch, answer.where((p_yes + p_no >= 0.01)[:, None], math.nan).cpu())
    return torch.stack([answers.get(ids, torch.tensor([math.nan] * 2)) for ids, _ in asked], 1)


def call_verifier(item, rows, texts, ids):
    """Scores and confidences [2, B] by a reward function that returns pairs of them, or scores of confidence 1."""
    values = common.call_reward(item["name"], item["verifier"], rows, texts, ids)
    pairs = [value if isinstance(value, tuple | list) else (value, 1.0) for value in values]
    for score, sure in pairs:
        if score is not None and not (math.isfinite(score) and 0 <= sure <= 1):
            raise SystemExit(f"verifier {item['name']}: returned {score, sure}, not a score and a confidence of 0 to 1")
    return torch.tensor([(math.nan, math.nan) if score is None else (score, sure) for score, sure in pairs]).T


def score_rubrics(rubrics, ask, rows, texts, ids=None, **scope):
    """Rewards [B] by the rubric of each row's category; scores and confidences [B] of each item, by its name."""
    names = list(dict.fromkeys(item["name"] for items in rubrics.values() for item in items))
    weights = torch.zeros(len(rows), len(names))  # [B, K]
    scores, confidences = torch.full((2, *weights.shape), math.nan)  # NaN where an item is of another category
    for category, items in rubrics.items():
        members = [i for i, row in enumerate(rows) if len(rubrics) == 1 or str(row["category"]) == category]
        own = [[column[i] for i in members] for column in (rows, texts, ids or [None] * len(rows))]
        for item in items if members else ():
            k = names.index(item["name"])
            judged = ask(item["question"], *own[:2]) if "question" in item else call_verifier(item, *own)
            scores[members, k], confidences[members, k] = judged  # [2, members]
            weights[members, k] = float(item["weight"])
    rewards = rubric_rewards(scores, confidences, weights, **scope)
    return rewards, dict(zip(names, scores.T)), dict(zip(names, confidences.T))


def rubric_rewards(scores, confidences, weights, *, samples_per_prompt, confidence_scope):
    """R_i [B] above, of scores, confidences [B, K], weights [B, K] or [K]; NaN where no item could be scored."""
    scored = ~scores.isnan()  # [B, K]
    known, c = confidences.float().nan_to_num() * scored, torch.ones_like(scores)  # [B, K]
    if confidence_scope == "group":
        known, count = (x.view(-1, samples_per_prompt, x.shape[1]).sum(1) for x in (known, scored))  # [N, K]
        c = (known / count.clamp(min=1)).repeat_interleave(samples_per_prompt, 0)
    if confidence_scope == "batch":
        c = common.total(known.sum(0)) / common.total(scored.sum(0)).clamp(min=1)  # [K]
    shares = weights * c * scored
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-12)  # so the share of a lone item is exactly 1
    return (shares * scores.float().nan_to_num()).sum(1).where(scored.any(1), math.nan)


def compute_advantages(rewards, *, samples_per_prompt, scale):
    """Rewards [B] relative to their group; a prompt's samples are adjacent. NaN, not scored, counts for nothing: 0."""
    groups = rewards.float().view(-1, samples_per_prompt)  # [N, G]
    groups = groups - groups.nan_to_num(-torch.inf).amax(1, keepdim=True)  # equal rewards become exact zeros
    count = (~groups.isnan()).sum(1, keepdim=True)
    centred = (groups - groups.nansum(1, keepdim=True) / count).nan_to_num(0.0)
    if scale == "std":
        centred = centred / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    return centred.view(-1)


def policy_loss(
    logprobs, old_logprobs, ref_logprobs, advantages, completion_mask, *, clip_low, clip_high, beta, normalizer
):
    """The loss of grpo.py; the normalizer is the number of completions in the whole minibatch."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # an infinite ratio times an advantage of 0 is NaN
    advantages = advantages[:, None]
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * advantages, clipped_ratio * advantages)
    if beta:
        log_ref_ratio = ref_logprobs - logprobs
        loss = loss + beta * (log_ref_ratio.exp() - log_ref_ratio - 1)
    loss = loss / completion_mask.sum(1, keepdim=True).clamp(min=1)
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
    rubrics = load_rubrics(args.rubric, train_rows)
    score = common.load_reward(args.reward)
    run = common.Run(args)
    model, tokenizer = common.load_model(args.model, args.device, args)
    common.check_prompts(model, tokenizer, train_rows + eval_rows, args.max_new_tokens)
    ref_model = common.load_reference(args, model) if args.beta else None
    critic, critic_tokenizer = ref_model, tokenizer  # no second copy of the start
    asks = any("question" in item for items in rubrics.values() for item in items)
    if asks and (args.critic_model or ref_model is None):
        critic, critic_tokenizer = common.load_model(args.critic_model or args.model, model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    G = args.samples_per_prompt
    on_policy = args.num_epochs * args.num_minibatches == 1  # pi_old is then pi itself

    run.start(train_rows, eval_rows, model=(model, optimizer))
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
        ask = partial(ask_critic, critic, critic_tokenizer, batch_size=args.micro_batch_size)
        ask = common.autocast(args)(ask)  # the critic only, not the verifiers
        rewards, components, confidences = score_rubrics(
            rubrics, ask, [row for row in rows for _ in range(G)], texts, ids, samples_per_prompt=G,
            confidence_scope=args.confidence_scope,
        )  # fmt: skip
        rewards = rewards.to(model.device)  # [B], NaN where no item could score
        completion_mask[rewards.isnan()] = 0.0  # unscored ones take no part in the update; lengths still has them
        batch = (*prompts, completion_ids, completion_mask)
        run.lap("score")

        # 3. advantages, relative to the other completions of the prompt; the log-probs that the update starts from
        minibatches = torch.randperm(len(rows)).chunk(args.num_minibatches)  # of prompts, the same in each epoch
        old_logprobs = None if on_policy else batch_logprobs(model, batch, minibatches, args)  # [B, T]
        ref_logprobs = batch_logprobs(ref_model, batch, minibatches, args) if args.beta else None  # [B, T]
        advantages = compute_advantages(rewards, samples_per_prompt=G, scale=args.scale)  # [B]

        # 4. update: in each epoch one optimizer step on each minibatch of prompts
        optimizer.param_groups[0]["lr"] = learning_rate = args.learning_rate * common.decay(args, step)
        stats = defaultdict(float)
        for minibatch in minibatches * args.num_epochs:
            minibatch_mask = completion_mask.view(len(rows), G, -1)[minibatch].flatten(0, 1)  # [n G, T]
            tokens = common.total(minibatch_mask.sum()).clamp(min=1)
            completions = common.total(minibatch_mask.any(1).sum()).clamp(min=1)
            if on_policy and not args.beta:  # else tied groups count in kl/old, and the KL pulls at them
                minibatch = common.without_ties(minibatch, advantages.view(-1, G))  # the others' gradient is 0
            for micro, inputs in common.micro_batches(batch, minibatch, args.micro_batch_size):
                mask = completion_mask[micro]  # [b, T]
                with common.autocast(args):
                    logprobs = token_logprobs(model, *inputs, temperature=args.temperature)  # [b, T]
                old = logprobs.detach() if on_policy else old_logprobs[micro]
                ref = ref_logprobs[micro] if args.beta else None
                loss = policy_loss(
                    logprobs, old, ref, advantages[micro], mask, clip_low=args.clip_low, clip_high=args.clip_high,
                    beta=args.beta, normalizer=completions,
                )  # fmt: skip
                loss.backward()
                ratio = (logprobs.detach() - old).clamp(-20, 20).exp()
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
            **{f"confidence/{name}": values for name, values in confidences.items()},
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
