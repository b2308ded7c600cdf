"""Direct preference optimisation (DPO): raise chosen completions over rejected ones, relative to the starting model.

Loss, the mean over pairs, with h = log pi / pi_ref of a whole completion, h_w of the chosen, h_l of the rejected one:

    sigmoid   L = -log sigmoid(beta (h_w - h_l))                                  arXiv 2305.18290, eq. 7
    ipo       L = (h_w - h_l - 1 / (2 beta))^2, h per token                       arXiv 2310.12036, eq. 17
    hinge     L = max(0, 1 - beta (h_w - h_l))                                    arXiv 2309.06657
    robust    L = (-(1 - e) log sigmoid(beta (h_w - h_l)) + e log sigmoid(beta (h_l - h_w))) / (1 - 2 e)
                                                                                  arXiv 2403.00409
    sppo      L = (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2                 arXiv 2405.00675
    simpo     L = -log sigmoid(beta (log pi_w - log pi_l) - gamma), per token     arXiv 2405.14734

e is the label smoothing, the share of pairs thought to be the wrong way round. sigmoid with it is conservative DPO,
(1 - e) of a pair's loss and e of the reversed pair's; robust has it as above; the others define none and refuse it.
All but simpo need the reference.

Source: Rafailov et al., arXiv 2305.18290; arXiv 2509.04501, section on DPO. Simplified: the reference stays the
starting model. A chosen completion may well lose probability on the way: only the margin is optimised.

    python dpo.py
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --micro-batch-size 8 --max-new-tokens 512 --max-length 1024 --eval-every 50 --eval-prompts 100

A row of the .jsonl file: {"prompt": "What is 37 + 48?", "chosen": " 85", "rejected": " 75"}, or chat messages.
"""

import itertools
import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import common  # first: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    model: str = "models/arithmetic"  # checkpoint folder or hub id of a causal language model
    data: str = "arithmetic"  # `arithmetic`, a .jsonl file, or a hub data set id
    eval_data: str = ""  # rows for evaluation; without it a tenth of the prompts is held out
    reward: tuple[str, ...] = ("exact_answer",)  # or math, format, length, file.py:function; the first also evaluates
    reward_weights: tuple[float, ...] = ()  # one weight for each reward; 1 each without it
    num_steps: int = 200  # steps; each takes the next batch of prompts
    prompts_per_step: int = 64  # prompts in a step
    micro_batch_size: int = 128  # sequences in one forward and backward pass: sets the memory, not the result
    max_new_tokens: int = 8  # tokens in a completion, its stop token included
    learning_rate: float = 5e-5  # peak learning rate of AdamW; it falls linearly to 0
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
    max_length: int = 512  # tokens of prompt and completion; a longer completion is cut off
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "sppo", "simpo"] = "sigmoid"  # see above
    beta: float | None = None  # how closely the policy is held to the reference; by default 0.1, sppo 0.001, simpo 2
    simpo_gamma: float = 1.0  # the margin gamma of simpo
    label_smoothing: float = 0.0  # share of pairs thought to be the wrong way round, for sigmoid and robust

    def __post_init__(self):
        if self.micro_batch_size % 2:
            raise SystemExit("--micro-batch-size: a pair is two sequences that stay together, so give an even number")
        smoothed = self.loss_type in ("sigmoid", "robust")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and not smoothed):
            raise SystemExit("--label-smoothing: sigmoid and robust take less than 0.5, the other losses none")


PAPER_BETA = {"sppo": 0.001, "simpo": 2.0}


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


def collate(examples, device):
    """prompt_ids, prompt_mask [B, P], completion_ids, completion_mask [B, T] of B (prompt ids, completion ids)."""
    prompt_ids, prompt_mask = common.pad([prompt for prompt, _ in examples], "left", device)
    completion_ids, completion_mask = common.pad([completion for _, completion in examples], "right", device)
    return prompt_ids, prompt_mask, completion_ids, completion_mask.float()


def to_pair(row):
    """A row with a prompt, which chosen and rejected may begin with instead, and one answer of the assistant each."""
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if not chosen or not rejected:
        return row
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if not texts:
        chosen, rejected = (common.turns_of(x, "assistant") for x in (chosen, rejected))
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))]
    if texts:
        shared = "".join(shared)
        prompt = start = prompt or "".join(shared.rpartition("\n\nAssistant:")[:2])  # as in hh-rlhf
    else:
        prompt = prompt or shared
        start = common.turns_of(prompt, "user")
    if shared[: len(start)] == start and not (texts and re.fullmatch(r"\w*", start)):  # a single word may be chance
        chosen, rejected = chosen[len(start) :], rejected[len(start) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        single = "\n\nHuman:" not in answer if texts else [turn["role"] for turn in answer] == ["assistant"]
        if not single:
            raise ValueError(f'"{name}" is not one answer of the assistant to "prompt"; move all turns before it there')
    return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokenize(model, tokenizer, rows, args):
    """(prompt, chosen), (prompt, rejected) ids of each pair. Pairs that come out equal or empty are dropped."""
    longest, examples = min(args.max_length, common.context_length(model)), []
    for row in rows:
        prompt, stop_ids = common.prompt_tokens(tokenizer, row), model.generation_config.eos_token_id
        both = [common.completion_tokens(tokenizer, row, row[x], stop_ids) for x in ("chosen", "rejected")]
        common.check_ids(model, tokenizer, prompt + both[0] + both[1])
        chosen, rejected = (completion[: max(0, longest - len(prompt))] for completion in both)
        examples += [((prompt, chosen), (prompt, rejected))] if chosen and rejected and chosen != rejected else []
    if len(examples) < len(rows):
        dropped = f"{len(rows) - len(examples)} of {len(rows)} rows"
        print(f"dropped {dropped}, empty or equal in their first {longest} tokens")
    if not examples:
        raise SystemExit(f"--max-length {args.max_length}: leaves no row")
    return examples


def sequence_logprobs(logprobs, completion_mask, *, loss_type):
    """log pi(y | x) [B] of whole completions from those of their tokens [B, T]; ipo and simpo take the mean of them."""
    total = (logprobs * completion_mask).sum(1)
    return total / completion_mask.sum(1) if loss_type in ("ipo", "simpo") else total


@torch.no_grad()
def reference_logprobs(model, examples, args):
    """log pi_ref [pairs, 2] of the chosen and rejected completion of all pairs that the run will see; 0 for simpo.

    Computed once, by the model before it is trained, so that no second one is needed.
    """
    table = torch.full((len(examples), 2), -math.inf, device=model.device)
    if args.loss_type == "simpo":
        return table.zero_()
    for step in range(1, min(args.num_steps, math.ceil(len(examples) / args.prompts_per_step)) + 1):
        indices, pairs = zip(*common.take_batch(examples, step, args))
        micros = zip(*(x.split(args.micro_batch_size) for x in collate(list(itertools.chain(*pairs)), model.device)))
        with common.autocast(args):
            logps = [sequence_logprobs(token_logprobs(model, *m), m[-1], loss_type=args.loss_type) for m in micros]
        table[list(indices)] = torch.cat(logps).view(-1, 2)
    return common.total(table, torch.distributed.ReduceOp.MAX)  # each process had a share; later it gets other rows


def dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, loss_type, label_smoothing, gamma=0.0
):
    """The formulas above, a loss for each pair [N], of log-probs [N] of completions, per token for ipo and simpo."""
    if loss_type == "simpo":
        return -F.logsigmoid(beta * (chosen_logps - rejected_logps).float() - gamma)
    h_w, h_l = (chosen_logps - ref_chosen_logps).float(), (rejected_logps - ref_rejected_logps).float()
    if loss_type == "ipo":
        return (h_w - h_l - 1 / (2 * beta)).square()
    if loss_type == "hinge":
        return (1 - beta * (h_w - h_l)).clamp(min=0)
    if loss_type == "sppo":
        return (h_w - 1 / (2 * beta)).square() + (h_l + 1 / (2 * beta)).square()
    right, wrong = F.logsigmoid(beta * (h_w - h_l)), F.logsigmoid(beta * (h_l - h_w))  # as labelled, and reversed
    if loss_type == "robust":
        return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


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
    args = replace(args, beta=PAPER_BETA.get(args.loss_type, 0.1) if args.beta is None else args.beta)
    columns = ("prompt", "chosen", "rejected")
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns, to_pair)
    score = common.load_reward(args.reward, args.reward_weights, train_rows + eval_rows)
    run = common.Run(args)
    device, autocast = common.pick_device(args), common.autocast(args)
    model, tokenizer = common.load_model(args.model, device, train=args)
    common.check_prompts(model, tokenizer, eval_rows, args.max_new_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    loss_settings = {"loss_type": args.loss_type, "beta": args.beta, "gamma": args.simpo_gamma}
    loss_settings |= {"label_smoothing": args.label_smoothing}
    examples = list(enumerate(tokenize(model, tokenizer, train_rows, args)))
    all_ref_logps = reference_logprobs(model, examples, args)  # [pairs, 2]

    run.start(model=(model, optimizer))
    if run.done == 0:
        run.log(0, {"eval/accuracy": evaluate(run, 0, model, tokenizer, eval_rows, score, args)})
    for step in run.steps():
        # 1. pairs: B = 2 N sequences of P prompt and T completion tokens, each chosen one before its rejected one
        indices, pairs = zip(*common.take_batch(examples, step, args))
        batch = collate(list(itertools.chain(*pairs)), device)
        completion_mask = batch[-1]  # [B, T]
        lengths = completion_mask.sum(1)  # [B]
        ref_logps = all_ref_logps[list(indices)]  # [N, 2]

        # 2. update: one optimizer step on the whole batch
        decay = min(step / max(1, args.warmup_steps), 1) * (1 - (step - 1) / args.num_steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * decay
        stats = defaultdict(float)
        logps = torch.zeros_like(ref_logps)  # [N, 2]
        order = lengths.view(-1, 2).amax(1).argsort(stable=True)  # [N]; micro-batches then hold little padding
        for part in order.split(args.micro_batch_size // 2):  # [n] pairs
            micro = torch.stack([2 * part, 2 * part + 1], 1).flatten()  # [b]
            inputs, mask = [x[micro] for x in batch], completion_mask[micro]
            with autocast:
                logprobs = token_logprobs(model, *inputs)  # [b, T]
            new_logps = sequence_logprobs(logprobs, mask, loss_type=args.loss_type).view(-1, 2)  # [n, 2]
            losses = dpo_loss(*new_logps.unbind(1), *ref_logps[part].unbind(1), **loss_settings)  # [n]
            loss = losses.sum() / args.prompts_per_step
            loss.backward()
            logps[part] = new_logps.detach()
            stats["loss/dpo"] += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        stats["grad_norm"] += run.check_finite(step, norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = run.lap("update")

        # 3. log: numbers, parts of sums over all processes, and tensors whose mean is logged
        chosen_rewards, rejected_rewards = (args.beta * (logps - ref_logps)).unbind(1)  # [N], the implicit ones
        metrics = stats | {
            "reward/chosen": chosen_rewards,
            "reward/rejected": rejected_rewards,
            "reward/margin": chosen_rewards - rejected_rewards,
            "reward/accuracy": chosen_rewards > rejected_rewards,
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
            "completion/length": lengths,
            "tokens_per_second": lengths.sum() / seconds,
        }
        if step % args.eval_every == 0 or step == args.num_steps:
            metrics["eval/accuracy"] = evaluate(run, step, model, tokenizer, eval_rows, score, args)
        run.log(step, metrics)
        run.save(step)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args))
