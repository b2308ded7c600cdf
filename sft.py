"""Supervised fine-tuning (SFT): raise the log-probability of demonstrated completions.

Loss, over the N target tokens of the optimizer batch, the completions with their stop tokens and never the prompts:

    L = -1/N sum_i sum_t log pi(y_it | x_i, y_i,<t)

Source: Ouyang et al., arXiv 2203.02155, section 3.5; exposition: arXiv 2509.04501. Simplified: no packing of several
rows into one sequence. Rewards only measure the evaluations.

    python sft.py
    python sft.py --model Qwen/Qwen2.5-0.5B --data train.jsonl --learning-rate 1e-5 \\
        --micro-batch-size 8 --max-new-tokens 512 --max-length 1024 --eval-every 50 --eval-prompts 100

A row of the .jsonl file: {"prompt": "What is 37 + 48?", "completion": " 85"}; for a chat model {"messages": [...]}.
"""

from collections import defaultdict
from dataclasses import dataclass
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
    num_steps: int = 100  # steps; each takes the next batch of prompts
    prompts_per_step: int = 64  # prompts in a step
    micro_batch_size: int = 128  # completions in one forward and backward pass: sets the memory, not the result
    max_new_tokens: int = 8  # tokens in a completion, its stop token included
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
    max_length: int = 512  # tokens of prompt and completion; longer rows are dropped: cut off, they teach to break off


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


def to_demonstration(row):
    """A conversation, "messages", as a prompt and a completion that begins with the first turn to be learned."""
    prompt, completion = row.get("prompt") or [], row.get("completion")
    if isinstance(completion, str) or not (completion or row.get("messages")):
        return row
    if not completion:
        prompt, completion = [], row["messages"]
    elif completion[0]["role"] != "assistant":
        raise ValueError('"completion" must begin with a turn of the assistant')
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [*prompt[-1:], *completion] if len(completion) > 1 else completion  # one may go on with the prompt's
    roles = ", ".join(turn["role"] for turn in turns)
    if "assistant, assistant" in roles or any(turn.get("weight", 1) not in (0, 1) for turn in completion):
        raise ValueError(f'two answers of the assistant in turn ({roles}), or a "weight" that is not 0 or 1')
    first = next((i for i, turn in enumerate(completion) if is_target(turn)), len(completion))
    return row | {"prompt": [*prompt, *completion[:first]], "completion": completion[first:]}


def is_target(turn):
    return turn["role"] == "assistant" and turn.get("weight", 1) == 1


def tokenize(model, tokenizer, rows, args):
    """(prompt, completion) ids of each answer to be learned; those beyond --max-length are dropped."""
    longest, stop_ids, examples = min(args.max_length, model.context_length), model.generation_config.eos_token_id, []
    for row in rows:
        turns, answers = row["completion"], [(row, row["completion"])]
        if isinstance(turns, list):
            targets = [i for i, turn in enumerate(turns) if is_target(turn)]
            answers = [(row | {"prompt": [*row["prompt"], *turns[:i]]}, turns[i : i + 1]) for i in targets]
        for asked, answer in answers:
            ids = common.prompt_tokens(tokenizer, asked), common.completion_tokens(tokenizer, asked, answer, stop_ids)
            examples.append(ids)
    kept = [(prompt, completion) for prompt, completion in examples if len(prompt) + len(completion) <= longest]
    if len(kept) < len(examples):
        print(f"dropped {len(examples) - len(kept)} of {len(examples)} answers, which end beyond {longest} tokens")
    return kept


def sft_loss(logprobs, completion_mask, *, normalizer):
    """-sum_i sum_t log pi / normalizer, where the normalizer is the number of target tokens in the whole batch."""
    return -(logprobs * completion_mask).sum() / normalizer


@torch.no_grad()
def evaluate(run, step, model, tokenizer, rows, examples, score, args):
    """{eval/<name>: values [n]}: each reward of greedy completions of held-out prompts; eval/loss of each token."""
    answers, losses = [], [torch.zeros(0)]  # the losses of each token of the demonstrations
    with common.autocast(args):
        for batch in common.eval_batches(rows, args):
            prompts = common.prompt_batch(tokenizer, batch, model.device)
            *completions, truncated = rollout(model, *prompts, max_new_tokens=args.max_new_tokens)
            answers += zip(*common.decode(tokenizer, *completions, step), truncated.tolist())
        for some in common.eval_batches(examples, args):
            batch = common.collate(*zip(*some), model.device)
            for _, inputs in common.micro_batches(batch, torch.arange(len(some)), args.micro_batch_size):
                losses.append(-token_logprobs(model, *inputs)[inputs[-1] > 0].cpu())
    texts, ids, truncated = map(list, zip(*answers))
    _, components = score(rows, texts, ids)
    run.log_samples(step, "eval", tokenizer, rows[:8], texts, components)
    components["loss"] = torch.cat(losses)
    return {f"eval/{name}": values for name, values in components.items()} | {"eval/truncated": torch.tensor(truncated)}


def main(args: Args) -> dict[str, float]:
    """Train, evaluate, save; returns the last value of each metric."""
    args = common.check_args(args)
    columns = ("prompt", "completion")
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns, to_demonstration)
    score = common.load_reward(args.reward)
    run = common.Run(args)
    model, tokenizer = common.load_model(args.model, args.device, args)
    common.check_prompts(model, tokenizer, eval_rows, args.max_new_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    examples = tokenize(model, tokenizer, train_rows, args)
    held_out = tokenize(model, tokenizer, [row for row in eval_rows if row.get("completion")], args)

    run.start(examples, eval_rows, model=(model, optimizer))
    if run.done == 0:
        run.log(0, evaluate(run, 0, model, tokenizer, eval_rows, held_out, score, args))
    for step in run.steps():
        # 1. demonstrations: N prompts of P tokens with a completion of T tokens each
        batch = common.collate(*zip(*common.take_batch(examples, step, args)), model.device)
        completion_mask = batch[-1]  # [N, T]
        lengths = completion_mask.sum(1)  # [N]

        # 2. update: one optimizer step on the whole batch
        optimizer.param_groups[0]["lr"] = learning_rate = args.learning_rate * common.decay(args, step)
        stats = defaultdict(float)
        tokens = common.total(completion_mask.sum())
        for micro, inputs in common.micro_batches(batch, torch.arange(len(lengths)), args.micro_batch_size):
            with common.autocast(args):
                logprobs = token_logprobs(model, *inputs)  # [b, T]
            loss = sft_loss(logprobs, completion_mask[micro], normalizer=tokens)
            loss.backward()
            stats["loss/sft"] += loss.detach()
        common.sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        stats["grad_norm"] += float(norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = run.lap("update")

        # 3. log: numbers as they are, 0-dim tensors summed over all processes, others averaged
        metrics = stats | {
            "completion/length": lengths,
            "tokens_per_second": lengths.sum() / seconds,
            "learning_rate": learning_rate,
        }
        if step % args.eval_every == 0 or step == args.num_steps:
            metrics |= evaluate(run, step, model, tokenizer, eval_rows, held_out, score, args)
        run.log(step, metrics)
        run.save(step)
    return run.finish(model, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args, description=common.usage(__doc__)))
