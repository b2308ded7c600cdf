"""GRAPE: the reward of a completion is a rubric of its prompt's category, each item weighted by how sure its critic is.

A rubric has items k with weights w_k: verifiers, functions that check a completion, and questions to a critic model. An
item gives completion i a score s_ik and a confidence p_ik, both from 0 to 1. The reward is the mean over those items
that could be scored for it, each weighted by w_k and by c_k, the mean of p_ik over the completions of the prompt (or of
the batch):

    R_i = sum_k w_k c_k s_ik / sum_k w_k c_k

Then A_i = (R_i - mean R) / std R over the G completions of a prompt, and the loss is that of grpo.py. A rubric of one
item with confidence 1 is GRPO itself, to the last bit.

Known of GRAPE, from public accounts of arXiv 2509.04501: rubrics by category of prompt in place of one reward model;
items checked against the truth, or scored by a prompted critic that also gives a confidence; items weighted by their
average confidence; the advantage relative to the other completions of the prompt; PPO's clipped update; GRPO as the
case of one item.
Our reconstruction, and nobody else's word, is the rest: the formula above, its normalisation and scope; that a verifier
has confidence 1, and that an item without a score is left out; division by std and all settings of the loss, which are
grpo.py's; and how a critic is read, by its next-token probabilities: score p(yes) / (p(yes) + p(no)), confidence
|p(yes) - p(no)|.

    python grape.py
    python grape.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --rubric rubrics/gsm8k.json \\
        --micro-batch-size 8 --max-new-tokens 512 --eval-every 50 --eval-prompts 100

A row of the .jsonl file: {"prompt": "What is 37 + 48?", "answer": "85"}; every column reaches the reward by name.
A rubric file; where there are several, the rows name theirs in a column "category":

    {"category": "arithmetic", "items": [{"name": "right", "weight": 1, "verifier": "exact_answer"},
                                         {"name": "clear", "weight": 1, "question": "Is the answer clearly stated?"}]}
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    rubric: tuple[str, ...] = ("rubrics/arithmetic.json",)
    """rubric files, one for each category of prompts"""
    critic_model: str = ""
    """checkpoint folder or hub id of the model that answers the rubrics' questions; the starting model without it"""
    confidence_scope: Literal["group", "batch", "none"] = "group"
    """what an item's confidence is averaged over: a prompt's completions, all of its category; none takes 1 for all"""


PAPER_SETTINGS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale": "std", "beta": 0.04},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "scale": "std", "beta": 0.0},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale": "none", "beta": 0.0},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "scale": "std", "beta": 0.0},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0, "scale": "std", "beta": 0.0},  # r in 0 .. 5 (arXiv 2510.13786)
}

CRITIC_PROMPT = "Question: {prompt}\n\nAnswer: {completion}\n\n{question} Reply with yes or no.\n\nReply:"


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


def load_rubrics(paths: tuple[str, ...]) -> dict[str, list[dict]]:
    """{category: items} of rubric files; the function stands in place of the name of an item's verifier."""
    if not paths:
        raise SystemExit("--rubric: name at least one file")
    rubrics = {}
    for path in map(common.bundled, paths):
        try:
            rubric = json.loads(Path(path).read_text(encoding="utf-8"))
            category, items = rubric["category"], rubric["items"]
            for item in items:
                weight, kind = item["weight"], [key for key in ("verifier", "question") if key in item]
                if len(kind) != 1 or not weight > 0 or not isinstance(item["name"], str):
                    raise ValueError(f'{item} needs a "name", a "weight" above 0, a "verifier" or a "question"')
            if not items or category in rubrics or len({item["name"] for item in items}) < len(items):
                raise ValueError("no items, a second rubric of this category, or a second item of one name")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"--rubric {path}: {error!r}; see the example in grape.py's docstring") from None
        for item in items:
            if "verifier" in item:
                item["verifier"] = common.load_function(
                    item["verifier"], Path(path).parent, f"--rubric {path}, verifier"
                )
        rubrics[category] = items
    return rubrics


def call_verifier(name: str, function: Callable, rows: list[dict], texts: list[str]) -> torch.Tensor:
    """Scores and confidences [2, B] by a reward function that returns pairs of them, or scores of confidence 1."""
    values = common.call_reward(name, function, rows, texts)
    pairs = [value if isinstance(value, tuple | list) else (value, 1.0) for value in values]
    for pair in pairs:
        if len(pair) != 2 or (pair[0] is not None and not 0 <= pair[1] <= 1):
            common.fail(f"verifier {name}: returned {pair}, not a score or (score, confidence from 0 to 1)")
    scores, confidences = zip(*pairs)
    return torch.stack([common.to_floats(name, scores, texts), common.to_floats(name, confidences, texts)])


@torch.no_grad()
def ask_critic(critic, tokenizer, question, rows, completions, *, batch_size):
    """Scores and confidences [2, B] of a yes-no question on each completion, by the critic's next-token probabilities.

    NaN where the critic gives yes and no less than 1 % together: that is no answer.
    """
    spellings = [[word, word.title(), f" {word}", f" {word.title()}"] for word in ("yes", "no")]
    yes, no = ({tokenizer(text, add_special_tokens=False).input_ids[0] for text in texts} for texts in spellings)
    yes, no = sorted(yes - no), sorted(no - yes)  # a token that begins both, a space, tells nothing
    answers = []
    prompts = [common.text_of(row["prompt"]) for row in rows]
    texts = [CRITIC_PROMPT.format(prompt=p, completion=c, question=question) for p, c in zip(prompts, completions)]
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        input_ids, mask = pad([common.prompt_tokens(tokenizer, text) for text in batch], "left", critic.device)
        length, context = input_ids.shape[1], common.context_length(critic)
        if length > context:
            common.fail(f"--critic-model: a question of {length} tokens is longer than its context of {context}")
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        output = critic(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, logits_to_keep=1)
        probabilities = output.logits[:, -1].float().softmax(-1)  # [b, V]
        p_yes, p_no = probabilities[:, yes].sum(1), probabilities[:, no].sum(1)
        answer = torch.stack([p_yes / (p_yes + p_no), (p_yes - p_no).abs()])  # [2, b]: score and confidence
        answers.append(answer.where(p_yes + p_no >= 0.01, float("nan")))
    return torch.cat(answers, 1).cpu()


def score_items(items, rows, texts, ask):
    """Scores and confidences [2, B, K] of a rubric's K items, NaN where an item could not be scored.

    A verifier is a reward function that returns scores, or pairs of score and confidence; a score has confidence 1.
    """
    columns = []
    for item in items:
        if "question" in item:
            columns.append(ask(item["question"], rows, texts))
        else:
            columns.append(call_verifier(item["name"], item["verifier"], rows, texts))
    return torch.stack(columns, 2)


def score_rubrics(rubrics, rows, texts, ask, *, samples_per_prompt, confidence_scope):
    """Rewards [B] by the rubric of each row's category; scores and confidences [B] of each item, by its name."""
    rewards, components, item_confidences = torch.full((len(rows),), float("nan")), {}, {}
    for category, items in rubrics.items():
        members = [i for i, row in enumerate(rows) if len(rubrics) == 1 or row["category"] == category]
        scores, confidences = torch.zeros(2, 0, len(items))
        if members:  # [b, K]
            scores, confidences = score_items(items, [rows[i] for i in members], [texts[i] for i in members], ask)
        weights = torch.tensor([float(item["weight"]) for item in items])
        scope = {"samples_per_prompt": samples_per_prompt, "confidence_scope": confidence_scope}
        rewards[members] = rubric_rewards(scores, confidences, weights, **scope)
        for k, item in enumerate(items):
            for column, values in ((components, scores), (item_confidences, confidences)):
                column.setdefault(item["name"], torch.full_like(rewards, float("nan")))[members] = values[:, k]
    return rewards, components, item_confidences


def rubric_rewards(scores, confidences, weights, *, samples_per_prompt, confidence_scope):
    """R_i [B] above, of scores and confidences [B, K] and weights [K]; a prompt's samples are adjacent.

    NaN where no item could be scored; 0 where those that could have no confidence.
    """
    scored = ~scores.isnan()  # [B, K]
    known, c = confidences.float().nan_to_num() * scored, torch.ones_like(scores)  # [B, K]
    if confidence_scope == "group":
        groups = (len(scores) // samples_per_prompt, samples_per_prompt, len(weights))
        known, count = (x.view(groups).sum(1) for x in (known, scored))  # [N, K]
        c = (known / count.clamp(min=1)).repeat_interleave(samples_per_prompt, 0)
    if confidence_scope == "batch":
        c = common.mean(known.sum(0)) / common.mean(scored.sum(0)).clamp(min=1e-3)  # [K]
    shares = weights * c * scored
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-12)  # so the share of a lone item is exactly 1
    return (shares * scores.float().nan_to_num()).sum(1).where(scored.any(1), float("nan"))


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
    rubrics = load_rubrics(args.rubric)
    asks = any("question" in item for items in rubrics.values() for item in items)
    if args.critic_model and not asks:
        raise SystemExit(f"--critic-model: no item of {', '.join(args.rubric)} has a question")
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
    critic, critic_tokenizer = ref_model, tokenizer
    if asks and (args.critic_model or ref_model is None):
        critic, critic_tokenizer = common.load_model(args.critic_model or args.model, device, named_by="--critic-model")
    ask = partial(ask_critic, critic, critic_tokenizer, batch_size=args.micro_batch_size)
    rubric_settings = {"samples_per_prompt": args.samples_per_prompt, "confidence_scope": args.confidence_scope}
    for number, row in enumerate(train_rows, 1):
        if len(rubrics) > 1 and row.get("category") not in rubrics:
            raise SystemExit(f'--data {args.data}, row {number}: "category" is none of {", ".join(rubrics)}')
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
        with autocast, common.whole(critic) if asks else nullcontext():
            rewards, components, confidences = score_rubrics(rubrics, rows, texts, ask, **rubric_settings)
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
            **{f"confidence/{name}": common.nanmean(values) for name, values in confidences.items()},
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
