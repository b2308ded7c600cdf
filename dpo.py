"""Direct preference optimisation (DPO): raise chosen completions over rejected ones, relative to the starting model.

Loss, averaged over pairs; h = log(pi / pi_ref) of a completion, h_w of the chosen, h_l of the rejected, m = h_w - h_l:

    sigmoid   L = -log sigmoid(beta m)                                            arXiv 2305.18290, eq. 7
    ipo       L = (m - 1 / (2 beta))^2, h per token as in TRL, not in eq. 17      arXiv 2310.12036, eq. 17
    hinge     L = max(0, 1 - beta m)                                              arXiv 2309.06657
    robust    L = (-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e)   arXiv 2403.00409
    sppo      L = (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2, sppo_hard      arXiv 2405.00675
    simpo     L = -log sigmoid(beta (log pi_w - log pi_l) - gamma), per token     arXiv 2405.14734

e is the label smoothing, the share of pairs thought to be the wrong way round. With it sigmoid is conservative DPO:
(1 - e) times a pair's loss plus e times that of the swapped pair. All but sigmoid and robust refuse it.
A chosen completion may well lose probability on the way, as only the margin is optimised: --sft-weight, of a term
-log pi_w per token (arXiv 2404.19733), acts against it. pi_ref is the starting model. Exposition: arXiv 2509.04501.

    python dpo.py
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --learning-rate 1e-6 \\
        --micro-batch-size 8 --max-new-tokens 512 --max-length 1024 --eval-every 50 --eval-prompts 100

A row of the .jsonl file: {"prompt": [{"role": "user", "content": "What is 37 + 48?"}],
    "chosen": [{"role": "assistant", "content": "85"}], "rejected": [{"role": "assistant", "content": "75"}]}
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import common  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    model: str = "models/arithmetic"  # folder or hub id of a causal LM, or a LoRA folder; the defaults suit this one
    data: str = "models/arithmetic/sums.jsonl"  # a .jsonl file, or folder or hub id of a data set
    eval_data: str = ""  # rows for evaluation; without it a tenth of the prompts is held out
    reward: tuple[str, ...] = ("exact_answer",)  # names, or file.py:function; all are evaluated, the first is shown
    num_steps: int = 200  # steps; each takes the next batch of prompts
    prompts_per_step: int = 64  # prompts in a step
    micro_batch_size: int = 128  # completions in one forward and backward pass: sets the memory, not the result
    max_new_tokens: int = 8  # tokens in a completion, its stop token included
    learning_rate: float = 5e-5  # peak learning rate of AdamW
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
    max_length: int = 512  # tokens of prompt and completion; a longer completion is cut off, without a stop token
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "sppo", "simpo"] = "sigmoid"  # which of the losses
    beta: float | None = None  # how closely the policy is held to the reference; by default 0.1, sppo 0.001, simpo 2
    simpo_gamma: float = 1.0  # the margin gamma of simpo
    sft_weight: float = 0.0  # weight of the chosen completions' negative log-likelihood per token (RPO)
    label_smoothing: float = 0.0  # share of pairs thought to be the wrong way round, for sigmoid and robust

    def __post_init__(self):
        if (e := self.label_smoothing) and not (0 < e < 0.5 and self.loss_type in ("sigmoid", "robust")):
            raise SystemExit("--label-smoothing: sigmoid and robust take less than 0.5, the other losses none")


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


def to_pair(row):
    """The row with a prompt of its own, which chosen and rejected may begin with; they keep one assistant turn each."""
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if not chosen or not rejected:
        return row
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))]
    if isinstance(chosen, str):
        shared = "".join(shared)
        prompt = prompt or "".join(shared.rpartition("\n\nAssistant:")[:2])  # as in hh-rlhf
    else:
        prompt = prompt or shared[: min(len(chosen), len(rejected)) - 1]  # the answers may be equal, too
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if shared[: len(prompt)] == prompt and not (isinstance(prompt, str) and prompt.isalnum()):  # one word: by chance
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for answer in (chosen, rejected):
        if ("\n\nHuman:" in answer) if isinstance(answer, str) else [turn["role"] for turn in answer] != ["assistant"]:
            raise ValueError(f'not one assistant turn: {answer!r:.60}; the turns before it belong in "prompt"')
    return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokenize(model, tokenizer, rows, args):
    """(prompt, (chosen, rejected)) ids of each pair. Pairs that come out equal or empty are dropped."""
    longest, stop_ids, examples = min(args.max_length, model.context_length), model.generation_config.eos_token_id, []
    for row in rows:
        prompt = common.prompt_tokens(tokenizer, row)
        both = [common.completion_tokens(tokenizer, row, row[x], stop_ids) for x in ("chosen", "rejected")]
        chosen, rejected = (completion[: max(0, longest - len(prompt))] for completion in both)
        examples += [(prompt, (chosen, rejected))] if chosen and rejected and chosen != rejected else []
    if len(examples) < len(rows):
        print(f"dropped {len(rows) - len(examples)} of {len(rows)} pairs, empty or equal in {longest} tokens")
    return examples


def sequence_logprobs(logprobs, completion_mask, *, loss_type):
    """log pi(y | x) [B] of whole completions from those of their tokens [B, T]; ipo and simpo take the mean of them."""
    summed = (logprobs * completion_mask).sum(1)
    return summed / completion_mask.sum(1) if loss_type in ("ipo", "simpo") else summed


@torch.no_grad()
def pair_logprobs(model, pairs, args):
    """log pi [N, 2] of the chosen and the rejected completion of each pair."""
    if not pairs:
        return torch.zeros(0, 2, device=model.device)
    prompts, answers = zip(*pairs)
    batch = common.collate(prompts, [*itertools.chain(*answers)], model.device)
    logps = torch.zeros(2 * len(pairs), device=model.device)
    for rows, inputs in common.micro_batches(batch, torch.arange(len(pairs)), max(2, args.micro_batch_size)):
        with common.autocast(args):
            logprobs = token_logprobs(model, *inputs)  # [b, T]
        logps[rows] = sequence_logprobs(logprobs, inputs[3], loss_type=args.loss_type)
    return logps.view(-1, 2)


def reference_logprobs(model, examples, args):
    """log pi_ref [pairs, 2] of all pairs that the run will see, made once, by the model before its training."""
    table = torch.full((len(examples), 2), -math.inf, device=model.device)
    if args.loss_type == "simpo":
        return table.zero_()
    for step in range(1, min(args.num_steps, math.ceil(len(examples) / args.prompts_per_step)) + 1):
        indices, pairs = zip(*common.take_batch(examples, step, args))
        table[list(indices)] = pair_logprobs(model, pairs, args)
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


@torch.no_grad()
def evaluate(run, step, model, tokenizer, rows, pairs, ref_logps, score, args):
    """{eval/<name>: values [n]}: held-out pairs in order, their loss and margin; each reward of greedy completions."""
    answers = []
    with common.autocast(args):
        for batch in common.eval_batches(rows, args):
            prompts = common.prompt_batch(tokenizer, batch, model.device)
            *completions, truncated = rollout(model, *prompts, max_new_tokens=args.max_new_tokens)
            answers += zip(*common.decode(tokenizer, *completions, step), truncated.tolist())
        logps = pair_logprobs(model, pairs, args)
    texts, ids, truncated = map(list, zip(*answers))
    _, components = score(rows, texts, ids)
    run.log_samples(step, "eval", tokenizer, rows[:8], texts, components)
    losses = dpo_loss(
        *logps.unbind(1), *ref_logps.unbind(1), beta=args.beta, loss_type=args.loss_type,
        label_smoothing=args.label_smoothing, gamma=args.simpo_gamma,
    )  # fmt: skip
    margins = args.beta * (logps - ref_logps).diff(dim=1).neg()  # [n, 1]
    figures = {"pairs": margins.sign() / 2 + 0.5, "loss": losses, "margin": margins} | components  # a tie is a half
    return {f"eval/{name}": values for name, values in figures.items()} | {"eval/truncated": torch.tensor(truncated)}


def main(args: Args) -> dict[str, float]:
    """Train, evaluate, save; returns the last value of each metric."""
    args = common.check_args(args)
    if args.beta is None:
        args = replace(args, beta={"sppo": 0.001, "simpo": 2.0}.get(args.loss_type, 0.1))
    columns = ("prompt", "chosen", "rejected")
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns, to_pair)
    score = common.load_reward(args.reward)
    run = common.Run(args)
    model, tokenizer = common.load_model(args.model, args.device, args)
    common.check_prompts(model, tokenizer, eval_rows, args.max_new_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    examples = list(enumerate(tokenize(model, tokenizer, train_rows, args)))
    all_ref_logps = reference_logprobs(model, examples, args)  # [pairs, 2]
    held_out = tokenize(model, tokenizer, [row for row in eval_rows if row.get("chosen") and row.get("rejected")], args)
    eval_ref_logps = pair_logprobs(model, held_out, args) * (args.loss_type != "simpo")  # [n, 2]

    run.start(examples, eval_rows, model=(model, optimizer))
    if run.done == 0:
        run.log(0, evaluate(run, 0, model, tokenizer, eval_rows, held_out, eval_ref_logps, score, args))
    for step in run.steps():
        # 1. N pairs: 2 N completions of T tokens, each chosen one before its rejected one
        indices, pairs = zip(*common.take_batch(examples, step, args))
        prompts, answers = zip(*pairs)
        batch = common.collate(prompts, [*itertools.chain(*answers)], model.device)
        completion_mask = batch[-1]  # [2 N, T]
        lengths = completion_mask.sum(1)  # [2 N]
        ref_logps = all_ref_logps[list(indices)]  # [N, 2]

        # 2. update: one optimizer step on the whole batch
        optimizer.param_groups[0]["lr"] = learning_rate = args.learning_rate * common.decay(args, step)
        stats = defaultdict(float)
        logps = torch.zeros_like(ref_logps)  # [N, 2]
        for micro, inputs in common.micro_batches(batch, torch.arange(len(pairs)), max(2, args.micro_batch_size)):
            with common.autocast(args):
                logprobs = token_logprobs(model, *inputs)  # [b, T]
            part = micro.view(-1, 2)[:, 0] // 2  # [n] pairs
            new_logps = sequence_logprobs(logprobs, completion_mask[micro], loss_type=args.loss_type).view(-1, 2)
            losses = dpo_loss(
                *new_logps.unbind(1), *ref_logps[part].unbind(1), beta=args.beta, loss_type=args.loss_type,
                label_smoothing=args.label_smoothing, gamma=args.simpo_gamma,
            )  # [n]  # fmt: skip
            nll = -logprobs[::2].sum(1) / lengths[micro[::2]]  # [n], of the chosen completions, per token
            loss = (losses + args.sft_weight * nll).sum() / args.prompts_per_step
            loss.backward()
            logps[part] = new_logps.detach()
            stats["loss/dpo"] += loss.detach()
        common.sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        stats["grad_norm"] += float(norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = run.lap("update")

        # 3. log: numbers as they are, 0-dim tensors summed over all processes, others averaged
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
            "learning_rate": learning_rate,
        }
        if step % args.eval_every == 0 or step == args.num_steps:
            metrics |= evaluate(run, step, model, tokenizer, eval_rows, held_out, eval_ref_logps, score, args)
        run.log(step, metrics)
        run.save(step)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args, description=common.usage(__doc__)))
