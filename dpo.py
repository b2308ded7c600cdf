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

import time
from dataclasses import dataclass
from typing import Literal

import common  # before torch: it calms OpenMP

import torch
import torch.nn.functional as F
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
    num_steps: int = 200
    """steps, each on prompts of its own"""
    prompts_per_step: int = 64
    """prompts in a step"""
    micro_batch_size: int = 128
    """sequences in one forward and backward pass; changes memory, never the result"""
    max_new_tokens: int = 8
    """tokens in a completion, its stop token included"""
    learning_rate: float = 5e-5
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
    max_length: int = 512
    """tokens of prompt and completion; a longer completion is cut off"""
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "sppo", "simpo"] = "sigmoid"
    """see above"""
    beta: float | None = None
    """how closely the policy is held to the reference; 0.1, but 0.001 for sppo and 2 for simpo, where not given"""
    simpo_gamma: float = 1.0
    """the margin gamma of simpo"""
    label_smoothing: float = 0.0
    """share of pairs thought to be the wrong way round, for sigmoid and robust"""
    reference: Literal["kept", "live"] = "kept"
    """its log-probs are computed before the training and kept by row, or at each step by a second model"""


PAPER_BETA = {"sppo": 0.001, "simpo": 2.0}


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


def collate(examples, device):
    """prompt_ids, prompt_mask [B, P], completion_ids, completion_mask [B, T] of B (prompt ids, completion ids)."""
    prompt_ids, prompt_mask = pad([prompt for prompt, _ in examples], "left", device)
    completion_ids, completion_mask = pad([completion for _, completion in examples], "right", device)
    return prompt_ids, prompt_mask, completion_ids, completion_mask.float()


def sequence_logprobs(logprobs, completion_mask, *, loss_type):
    """log pi(y | x) [B] of whole completions from those of their tokens [B, T]; ipo and simpo take the mean of them."""
    total = (logprobs * completion_mask).sum(1)
    return total / completion_mask.sum(1) if loss_type in ("ipo", "simpo") else total


@torch.no_grad()
def reference_logprobs(ref_model, batch, *, loss_type, micro_batch_size):
    """log pi_ref [N, 2] of the chosen and rejected completions of a batch of collate; 0 without a reference."""
    if ref_model is None:
        return torch.zeros(len(batch[0]) // 2, 2, device=batch[0].device)
    chunks = list(zip(*(x.split(micro_batch_size) for x in batch)))
    logprobs = [sequence_logprobs(token_logprobs(ref_model, *c), c[-1], loss_type=loss_type) for c in chunks]
    return torch.cat(logprobs).view(-1, 2)


def dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, loss_type, label_smoothing, gamma=0.0
):
    """The formulas above, one loss for each pair [N]. Log-probs [N] of whole completions, per token for ipo and simpo.

    ValueError if the label smoothing is not from 0 to less than 0.5, or not 0 where the loss type defines none.
    """
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in ("sigmoid", "robust")):
        raise ValueError(f"{label_smoothing} for {loss_type}: give sigmoid or robust less than 0.5, the others 0")
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
    if args.micro_batch_size % 2:
        raise SystemExit("--micro-batch-size: a pair is two sequences that stay together, so give an even number")
    args.beta = PAPER_BETA.get(args.loss_type, 0.1) if args.beta is None else args.beta
    loss_settings = {"loss_type": args.loss_type, "beta": args.beta, "gamma": args.simpo_gamma}
    loss_settings |= {"label_smoothing": args.label_smoothing}
    try:
        dpo_loss(*torch.zeros(4, 1), **loss_settings)
    except ValueError as error:
        raise SystemExit(f"--label-smoothing {error}") from None
    columns = ("prompt", "chosen", "rejected")
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns=columns)
    score = common.load_reward(args.reward, args.reward_weights)
    run = common.Run(args)
    device, autocast = pick_device(args.device, args.dtype)
    trained = {"lora_rank": args.lora_rank, "gradient_checkpointing": args.gradient_checkpointing, "autocast": autocast}
    model, tokenizer = common.load_model(args.model, device, **trained)
    common.check_prompts(model, tokenizer, eval_rows, args.max_new_tokens)
    ref_model = common.load_reference(args, model, device) if args.reference == "live" else model
    ref_model = None if args.loss_type == "simpo" else ref_model
    stop_ids = model.generation_config.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    max_length = min(args.max_length, common.context_length(model))
    examples = []
    for row in train_rows:
        prompt = common.prompt_tokens(tokenizer, row["prompt"])
        both = [common.completion_tokens(tokenizer, row["prompt"], row[name], stop_ids) for name in columns[1:]]
        chosen, rejected = (completion[: max(0, max_length - len(prompt))] for completion in both)
        pair = (prompt, chosen), (prompt, rejected)
        examples += [(len(examples), pair)] if chosen and rejected and chosen != rejected else []
    if len(examples) < len(train_rows):
        dropped = f"{len(train_rows) - len(examples)} of {len(train_rows)} pairs"
        print(f"dropped {dropped} that are empty or equal in the first {max_length} tokens, prompt included")
    if not examples:
        raise SystemExit(f"--max-length {args.max_length}: every pair is empty or equal within it")
    B = 2 * args.prompts_per_step // common.WORLD_SIZE
    greedy = {"max_new_tokens": args.max_new_tokens, "batch_size": B}
    reference_settings = {"loss_type": args.loss_type, "micro_batch_size": args.micro_batch_size}
    kept_logps = torch.full((len(examples), 2), -torch.inf, device=device)  # log pi_ref of chosen and rejected
    steps_of_an_epoch = -(-len(examples) // args.prompts_per_step)
    for step in range(1, min(args.num_steps, steps_of_an_epoch) + 1) if args.reference == "kept" else ():
        rows = common.share(take_batch(examples, step=step, size=args.prompts_per_step, seed=args.seed))
        index, pairs = zip(*rows)
        with autocast:
            batch = collate([example for pair in pairs for example in pair], device)
            kept_logps[list(index)] = reference_logprobs(ref_model, batch, **reference_settings)
    kept_logps = common.largest(kept_logps)  # each process had its share; in a later epoch it gets other rows

    parts = {"model": model, "optimizer": optimizer}  # what a checkpoint holds
    steps_done = run.start(parts)
    if steps_done == 0:
        with autocast, common.whole(model):
            accuracy = evaluate(run, 0, model, tokenizer, eval_rows, score, **greedy)
        run.log(0, {"eval/accuracy": accuracy})
    for step in range(steps_done + 1, args.num_steps + 1):
        # 1. pairs: B sequences of P prompt and T completion tokens, each chosen one before its rejected one
        start = time.perf_counter()
        rows = common.share(take_batch(examples, step=step, size=args.prompts_per_step, seed=args.seed))
        index, pairs = zip(*rows)
        batch = collate([example for pair in pairs for example in pair], device)
        completion_mask = batch[-1]  # [B, T]
        lengths = completion_mask.sum(1)  # [B]
        if args.reference == "live":
            with autocast:
                kept_logps[list(index)] = reference_logprobs(ref_model, batch, **reference_settings)
        ref_logps = kept_logps[list(index)]  # [N, 2]

        # 2. update: one optimizer step on the whole batch
        decay = min(step / max(1, args.warmup_steps), 1) * (1 - (step - 1) / args.num_steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * decay
        stats = {"loss/dpo": 0.0, "grad_norm": 0.0}
        logps = torch.zeros_like(ref_logps)  # [N, 2]
        longest = lengths.view(-1, 2).amax(1)  # micro-batches then hold little padding
        minibatch = torch.arange(B, device=device).view(-1, 2)[longest.argsort(stable=True)].view(-1)
        normalizer = len(pairs)
        for micro in minibatch.split(args.micro_batch_size):
            mask = completion_mask[micro]
            with autocast:
                logprobs = token_logprobs(model, *(x[micro] for x in batch))  # [b, T]
            chosen, rejected = sequence_logprobs(logprobs, mask, loss_type=args.loss_type).view(-1, 2).unbind(1)  # [n]
            some = micro[::2] // 2  # [n], the pairs whose two completions the micro-batch holds
            ref_chosen, ref_rejected = ref_logps[some].unbind(1)
            loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **loss_settings).sum() / normalizer
            logps[some] = torch.stack([chosen, rejected], 1).detach()
            loss.backward()
            stats["loss/dpo"] += loss.detach()
        stats["grad_norm"] += torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        run.check_finite(step, stats, batch)
        optimizer.step()
        optimizer.zero_grad()

        # 3. log
        seconds = time.perf_counter() - start
        chosen_rewards, rejected_rewards = (args.beta * (logps - ref_logps)).unbind(1)  # [N], the implicit ones
        metrics = stats | {
            "reward/chosen": chosen_rewards.mean(),
            "reward/rejected": rejected_rewards.mean(),
            "reward/margin": (chosen_rewards - rejected_rewards).mean(),
            "reward/accuracy": (chosen_rewards > rejected_rewards).float().mean(),
            "logps/chosen": logps[:, 0].mean(),
            "logps/rejected": logps[:, 1].mean(),
            "completion/length": lengths.mean(),
            "time/update": seconds,
            "tokens_per_second": common.WORLD_SIZE * lengths.sum() / seconds,
        }
        if step % args.eval_every == 0 or step == args.num_steps:
            with autocast, common.whole(model):
                metrics["eval/accuracy"] = evaluate(run, step, model, tokenizer, eval_rows, score, **greedy)
        run.log(step, metrics)
        run.save(step, parts)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args))
