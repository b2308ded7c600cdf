"""What every script needs and no algorithm owns: processes, models, data, rewards and the bookkeeping of a run.

What a user can get wrong ends in SystemExit with one line: what is wrong, where, and how to mend it.
"""

import asyncio
import contextlib
import copy
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import MethodType

# Threads spin while they wait for each other, which starves them once a core has other work: benchmarks/openmp.py
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from builtin_rewards import REWARDS, text_of

import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

transformers.utils.logging.disable_progress_bar()

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
if WORLD_SIZE > 1 and torch.cuda.is_available():  # before a reward file puts a model on the first GPU
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


@contextlib.contextmanager
def explained(what: str, kinds=Exception):
    """An error of these kinds ends the run in one line: what was wrong, and the error's own first line."""
    try:
        yield
    except kinds as error:
        raise SystemExit(f"{what}: {(str(error) or repr(error)).splitlines()[0]}") from None


def check_args(args):
    """The flags, refused where they cannot work; with --resume those of that run.

    Only --device and --micro-batch-size may then be given anew: they change a result by its last digits at most.
    """
    if args.resume:
        with explained(f"--resume {args.resume}: not the folder of a run of this script", (OSError, ValueError)):
            stored = json.loads(Path(args.resume, "args.json").read_text())
            if stored.keys() != vars(args).keys():
                raise ValueError("its flags are others")
        stored = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        stored |= {"resume": args.resume, "output_dir": args.resume}
        given = {x: value for x, value in vars(args).items() if value not in (stored[x], getattr(type(args), x))}
        if fixed := [name for name in given if name not in ("device", "micro_batch_size")]:
            flags = " ".join(f"--{name.replace('_', '-')}" for name in fixed)
            raise SystemExit(f"--resume {args.resume}: goes on with that run's own settings; leave out {flags}")
        args = replace(args, **stored | given)
    counts = "prompts_per_step samples_per_prompt micro_batch_size max_new_tokens num_epochs num_minibatches eval_every"
    for name in [*counts.split(), "eval_prompts", "temperature", "learning_rate", "max_grad_norm"]:
        if not getattr(args, name, 1) > 0:  # as NaN is not
            raise SystemExit(f"--{name.replace('_', '-')}: {getattr(args, name)}, but it must be more than 0")
    minibatches = getattr(args, "num_minibatches", 1)
    if args.prompts_per_step % (WORLD_SIZE * minibatches):
        parts = f"{WORLD_SIZE} processes and {minibatches} minibatches"
        raise SystemExit(f"--prompts-per-step: {args.prompts_per_step} do not divide among {parts}")
    return args


def pick_device(args) -> torch.device:
    """The device of --device; auto is CUDA, else MPS, else the CPU."""
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = auto if args.device == "auto" else args.device
    with explained(f"--device {device}: cannot be used", (RuntimeError, AssertionError)):
        return torch.empty(0, device=device).device


def autocast(args) -> torch.autocast:
    """The context of forward passes: bfloat16 on CUDA, unless --dtype says otherwise.

    Parameters stay float32: AdamW on bfloat16 ones rounds nearly every RL-sized step away (NVIDIA-NeMo/RL#2322).
    """
    kind = pick_device(args).type
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and kind == "cuda")
    return torch.autocast(kind, torch.bfloat16, enabled=bfloat16)


def total(value: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum of a tensor over all processes, as gradients are summed; or its maximum, or what the op is."""
    value = value.clone()
    if WORLD_SIZE > 1:
        dist.all_reduce(value, op)
    return value


def anywhere(condition: bool) -> bool:
    """Whether it holds on one process at least: FSDP needs all processes to run the same passes."""
    return total(torch.tensor(float(condition))).item() > 0


def share(rows: list) -> list:
    """The rows of this process: of equal number, if that divides."""
    return rows[len(rows) * RANK // WORLD_SIZE : len(rows) * (RANK + 1) // WORLD_SIZE]


def gather(items: list) -> list:
    """The items of all processes, in their order."""
    lists = [items] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(lists, items)
    return list(itertools.chain(*lists))


def nonzero_rows(rows: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Those of the rows [n] whose advantage, of [B], is not 0: the others' policy gradient is.

    One at least, and as many on each process, as FSDP needs all processes to run the same passes.
    """
    zero = advantages[rows] == 0
    count = int(total((~zero).sum().clamp(min=1), dist.ReduceOp.MAX))
    return rows[zero.int().argsort(stable=True)[:count].sort().values]


def shard(module, device: torch.device):
    """The module on the device, its parameters, gradients and optimizer state split among the processes by FSDP2.

    Each layer's parameters are gathered for its own pass; embeddings and head stay whole to the end of the backward
    pass, so that logits can be made chunk by chunk. Gradients are summed over the processes, not averaged.
    """
    if WORLD_SIZE > 1:
        layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
        mesh = dist.init_device_mesh(device.type, (WORLD_SIZE,))
        for part in [*reversed(layers), module]:  # inner ones first
            fully_shard(part, mesh=mesh, reshard_after_forward=part is not module)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other (pytorch/pytorch#190747)
    return module.to(device)


@contextlib.contextmanager
def gathered(model):
    """All parameters of a sharded model on each process, for passes that differ from process to process."""
    parts = [module for module in model.modules() if hasattr(module, "unshard")] if WORLD_SIZE > 1 and model else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not parts[0], recurse=False)
        part.reshard()


def bundled(path: str) -> str:
    """The path of a file or folder beside this file, for a relative path that does not exist here."""
    beside = Path(__file__).parent / path
    return str(beside) if beside.exists() and not Path(path).exists() else path


def load_model(path: str, device: torch.device, *, train=None, sharded: bool = True, named_by: str = "--model"):
    """A causal LM in float32, in eval mode for good, and its tokenizer, from a checkpoint folder or a hub id.

    With the flags in `train` it gets --lora-rank adapters and --gradient-checkpointing. Settled here for all scripts:
    - dropout is off: the log-probs of one completion must come out the same twice (arXiv 2403.17031, detail 5);
    - `generation_config.eos_token_id` is the list of all ids that end a completion, the model's and the tokenizer's,
      which differ for Qwen2.5 base (huggingface/trl#7039);
    - logits of a padded vocabulary that no token has are cut off, for the sampler and the log-probs alike: training
      raises them until one is sampled (vllm-project/vllm#13175);
    - `model.trunk(**inputs)` is the pass without the head, from which FSDP gathers parameters too.
    """
    path = bundled(path)
    if Path(path, "adapter_config.json").exists():
        raise SystemExit(f"{named_by} {path}: adapters, not a model; merge them as docs/scaling.md shows")
    with explained(f"{named_by} {path}: not the folder or hub id of a causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # without dtype the checkpoint's own would be loaded, often bfloat16 (huggingface/transformers#42805)
        settings = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, **settings
        )
        old = (".attn.bias", ".attention.bias", ".masked_bias")  # buffers of GPT-2 and GPT-Neo that were saved once
        loading["unexpected_keys"] = [name for name in loading["unexpected_keys"] if not name.endswith(old)]
        unfit = {kind: sorted(map(str, names))[:3] for kind, names in loading.items()}
        if any(unfit.values()):
            raise ValueError(f"its weights do not fit, such as {unfit}")
        if hasattr(model.config, "quantization_config"):
            raise ValueError("its weights are quantized and cannot be trained")
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # they are for a loss of their own
    # the processor of a model that sees or hears, without which the saved one would not open
    kinds = ("preprocessor", "processor", "video_preprocessor") if config is not model.config else ()
    found = [cached_file(path, f"{x}_config.json", _raise_exceptions_for_missing_entries=False) for x in kinds]
    model.processor_files = [file for file in found if file]
    eos, vocab_size = model.generation_config.eos_token_id, max(tokenizer.get_vocab().values()) + 1
    stop_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not stop_ids:
        raise SystemExit(f"{named_by} {path}: no stop token; set eos_token_id in its generation_config.json")
    # a new one: with the checkpoint's own sampling fields kept, saving could be refused after the training
    pad_id = min(stop_ids) if model.generation_config.pad_token_id is None else model.generation_config.pad_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(stop_ids), pad_token_id=pad_id)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits[..., :vocab_size])
    ids = torch.tensor([[min(stop_ids), 0]])
    kind = "no causal language model with a KV cache, or one whose logits common.logits_of does not make"
    with torch.no_grad(), explained(f"{named_by} {path}: {kind}", (AttributeError, AssertionError)):
        first = model(input_ids=ids[:, :1], attention_mask=torch.ones_like(ids[:, :1]), use_cache=True)
        logits = logits_of(model, model.base_model(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(first.logits, logits[:, :1], atol=1e-3, rtol=1e-3)
        first.past_key_values.reorder_cache(torch.tensor([0]))
    if train and train.lora_rank:
        add_adapters(model, train)
    if train and train.gradient_checkpointing:
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not layers:
            raise SystemExit(f"--gradient-checkpointing: {named_by} {path} has no layers to do it; leave it out")
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        model.base_model.recomputes = True
    model.trunk = MethodType(lambda model, **inputs: model.base_model(**inputs), model)
    model = shard(model, device) if sharded else model.to(device)
    register_fsdp_forward_method(model, "trunk")  # which does nothing to a model that is not sharded
    return model, tokenizer


def add_adapters(model, args) -> None:
    """Freeze the model and give each of its linear layers but the head a trainable LoRA adapter (arXiv 2106.09685)."""
    with explained("--lora-rank: needs `pip install peft`", ImportError):
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
    # an alpha that does not grow with the rank lets one learning rate fit all ranks (thinkingmachines.ai/blog/lora)
    settings = {"lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with explained("--lora-rank: a layer that peft cannot adapt", ValueError):
        model.add_adapter(LoraConfig(r=args.lora_rank, **settings))
    with autocast(args):  # which keeps the casts of trained weights, but makes those of frozen ones in each pass anew
        bfloat16 = torch.is_autocast_enabled(pick_device(args).type)
    for layer in model.modules():
        if bfloat16 and isinstance(layer, BaseTunerLayer):
            layer.base_layer.to(torch.bfloat16)


class AdaptersOff:
    """A model with its adapters off: what the training started from, without a second copy."""

    def __init__(self, model) -> None:
        self.model, self.adapters = model, [m for m in model.modules() if hasattr(m, "_disable_adapters")]

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, function=None, **inputs):
        for layer in self.adapters:
            layer._disable_adapters = True  # peft's own way also ends their training, for good where FSDP shards them
        try:
            return (function or self.model)(**inputs)
        finally:
            for layer in self.adapters:
                layer._disable_adapters = False

    def trunk(self, **inputs):
        return self(self.model.trunk, **inputs)


def load_reference(args, model, device: torch.device):
    """The model that the training starts from; with --lora-rank the trained one without its adapters."""
    return AdaptersOff(model) if args.lora_rank else load_model(args.model, device)[0]


def shares_prompts(trunk) -> bool:
    """Whether gradients can flow through a prompt's KV cache: not if layers run twice, or write it in place."""
    kinds = getattr(trunk.config.get_text_config(), "layer_types", None) or ()
    return not getattr(trunk, "recomputes", False) and not {"linear_attention", "hybrid", "hybrid_sliding"} & set(kinds)


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [.., V] of some of the trunk's hidden states [.., H], as the model's own pass makes them."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere's; then Falcon-H1's and Granite's
    scale *= getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
    logits = logits if scale == 1.0 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def arithmetic() -> list[dict]:
    """The built-in task: all sums of two numbers below 100, as prompts with answers, demonstrations and pairs.

    A rejected answer forgets the carry, as the base model in models/arithmetic mostly does (37 + 48 is "75"), or is off
    in one digit or two, as a coin decides: so a preference for the carry alone does not tell right from wrong.
    """
    slips = random.Random(0)
    rows = []
    for a, b in itertools.product(range(100), repeat=2):
        off = slips.choice([a + b + d for d in (-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20) if a + b + d >= 0])
        slip = slips.choice([off, without_carry(a, b)])
        row = {"prompt": f"What is {a} + {b}?", "answer": f"{a + b}", "completion": f" {a + b}"}
        rows.append(row | {"chosen": f" {a + b}", "rejected": f" {off if slip == a + b else slip}"})
    return rows


def without_carry(a: int, b: int) -> int:
    """The sum of two numbers below 100, each digit added on its own: 37 + 48 -> 75, 75 + 48 -> 13."""
    return (a // 10 + b // 10) % 10 * 10 + (a + b) % 10


def read_rows(source: str, columns: tuple[str, ...], prepare: Callable | None = None) -> list[dict]:
    """Rows of `arithmetic`, of a .jsonl, .json, .csv or .parquet file, or of a hub data set's train split (`id` or
    `id:configuration`), after `prepare(row)`; they must have the columns."""
    if source == "arithmetic":
        return arithmetic()
    file = Path(source)
    with explained(source, (OSError, ValueError)):
        if file.suffix in (".json", ".jsonl") or (file.is_file() and file.suffix not in (".csv", ".parquet")):
            text = file.read_text("utf-8-sig").strip()  # without the mark that Excel and Windows put first
            lines = filter(str.strip, text.split("\n"))
            rows = json.loads(text if text.startswith("[") else "[" + ",\n".join(lines) + "]")  # so errors name a line
        else:
            with explained(f"{source}: needs `pip install datasets`", ImportError):
                import datasets
            name, _, configuration = source.partition(":")
            local = {"path": file.suffix[1:], "data_files": source}
            hub = {"path": name, "name": configuration or None}
            rows = list(datasets.load_dataset(**(local if file.is_file() else hub), split="train"))
    if not rows:
        raise SystemExit(f"{source}: has no rows")
    texts = ("prompt", "completion", "chosen", "rejected", "messages")  # columns of texts or chat messages
    for number, row in enumerate(rows, 1):
        with explained(f"{source}, row {number}", (ValueError, TypeError, KeyError, AttributeError)):
            # NaN is no JSON, and half of a surrogate pair no text: a log or a tokenizer would end the run at them
            json.dumps(row, ensure_ascii=False, allow_nan=False, default=str).encode()
            row = {name: to_turns(value) if name in texts else value for name, value in row.items()}
            rows[number - 1] = row = prepare(row) if prepare else row
            if empty := [column for column in columns if not row.get(column)]:
                raise ValueError(f'"{empty[0]}" is missing or empty')
    return rows


def to_turns(value: str | list | None) -> str | list[dict] | None:
    """A text as it is; messages with a text as their content."""
    if isinstance(value, str | None):
        return value
    turns = without_none(value) if isinstance(value, list) else [value]
    for turn in turns:
        parts = turn.get("content", "") if isinstance(turn, dict) and turn.get("role") else [{}]
        texts = [parts] if isinstance(parts, str) else [part.get("text") for part in parts]
        if None in texts or not (any(texts) or turn.get("tool_calls") or turn["role"] in ("system", "tool")):
            raise ValueError(f"neither a text nor messages with role and content: {value!r:.100}")
        turn["content"] = "".join(texts)
    return turns


def without_none(value):
    """Without the None that Arrow puts where another row has something; a tool call's arguments as an object."""
    if isinstance(value, dict):
        arguments = {"arguments": json.loads(value["arguments"])} if isinstance(value.get("arguments"), str) else {}
        return {key: without_none(part) for key, part in value.items() if part is not None} | arguments
    return [without_none(part) for part in value] if isinstance(value, list) else value


def load_data(source: str, eval_source: str, eval_prompts: int, columns: tuple, prepare=None) -> tuple[list, list]:
    """Rows to train on, which must have the columns, and at most `eval_prompts` rows held out.

    Without an `eval_source` a tenth of the prompts is held out, chosen by hash, so that it is the same in each run.
    """
    rows = read_rows(source, columns, prepare)
    if eval_source:
        held_out = read_rows(eval_source, ("prompt",), prepare)
    else:
        digests = [hashlib.md5(json.dumps(row["prompt"], default=str).encode()).hexdigest() for row in rows]
        by_digest = dict(sorted(zip(digests, rows), key=lambda item: item[0]))
        if len(by_digest) < 2:
            raise SystemExit(f"--data {source}: one prompt only, so none can be held out; add rows or give --eval-data")
        chosen = dict(list(by_digest.items())[: max(1, len(by_digest) // 10)])
        held_out = list(chosen.values())
        rows = [row for digest, row in zip(digests, rows) if digest not in chosen]
    held_out = held_out[:eval_prompts]
    if len(held_out) < WORLD_SIZE:
        raise SystemExit(f"{eval_source or source}: {len(held_out)} held-out prompts for {WORLD_SIZE} processes")
    columns = dict.fromkeys(name for row in rows + held_out for name in row)  # a reward gets all, in each batch
    return [columns | row for row in rows], [columns | row for row in held_out]


def take_batch(rows: list, step: int, args) -> list:
    """This process's rows of a step (from 1): epoch after epoch, each in an order that seed and epoch determine."""
    first = (step - 1) * args.prompts_per_step
    epochs = range(first // len(rows), (first + args.prompts_per_step - 1) // len(rows) + 1)
    generators = [torch.Generator().manual_seed(args.seed * 1_000_003 + epoch) for epoch in epochs]
    orders = torch.cat([torch.randperm(len(rows), generator=generator) for generator in generators]).tolist()
    return share([rows[index] for index in orders[first % len(rows) :][: args.prompts_per_step]])


def turns_of(message: str | list[dict], role: str) -> list[dict]:
    return [{"role": role, "content": message}] if isinstance(message, str) else message


def render(tokenizer, prompt: str | list[dict] | dict, answer: str | list[dict] | None = None) -> str:
    """A prompt, or that of a row with its tools, and the answer if there is one, as the model reads them.

    A chat template makes a text a user's turn, unless it holds the template's marks already. Where the prompt ends with
    the assistant's turn, that goes on.
    """
    row = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    prompt, template = row["prompt"], partial(tokenizer.apply_chat_template, tokenize=False)
    if not tokenizer.chat_template and isinstance(prompt, str):
        return prompt + text_of(answer or "")
    with explained(f"prompt {str(prompt)[:80]!r}: the chat template refuses it"):  # whatever a template may raise
        turns, bos = turns_of(prompt, "user"), tokenizer.bos_token or ""
        if isinstance(prompt, str):
            words = [{"role": role, "content": "WORDS"} for role in ("user", "assistant")]
            opened, closing = template(words[:1], add_generation_prompt=True), template(words).rpartition("WORDS")[2]
            before, after = (part.strip() for part in template(words[:1]).removeprefix(bos).split("WORDS"))
            marks = before.rpartition("\n")[2], after or opened.partition("WORDS")[2].strip()  # of a user's turn
            if any(marks) and all(mark in prompt for mark in marks):
                start = bos if opened.startswith(bos) and not prompt.startswith(bos) else ""
                return start + prompt + ("" if answer is None else text_of(answer) + closing)
        continued = turns[-1]["role"] == "assistant"
        settings = {"add_generation_prompt": not continued, "continue_final_message": continued}
        if answer is not None:
            turn, settings = turns_of(answer, "assistant")[0], {}
            merged = turn | {"content": turns[-1]["content"] + turn["content"]}
            turns = [*turns[:-1], merged] if continued else [*turns, turn]
        tools = without_none(row.get("tools") or None)
        settings |= {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        return template(turns, **settings, **without_none(row.get("chat_template_kwargs") or {}))


def prompt_tokens(tokenizer, prompt: str | list[dict] | dict) -> list[int]:
    """Token ids of a prompt. A chat template writes its own BOS, so none is added (huggingface/open-r1#462)."""
    text, eos = render(tokenizer, prompt), tokenizer.eos_token
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
    ended = ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(eos)  # by a tokenizer that ends each text
    return ids[:-1] if ended else ids


def completion_tokens(tokenizer, prompt, completion: str | list[dict], stop_ids: list[int]) -> list[int]:
    """Token ids of a demonstrated completion, its stop token last: the ids that the policy itself would have sampled.

    They are those of the whole text, after the prompt's. Where the two would merge at the boundary the completion is
    tokenised apart, behind a line break, as some tokenizers put a space before a text: so the prompt's ids are always
    those of a rollout (huggingface/trl#2209). The stop token is that with which the chat template ends a turn, if any.
    """
    start, text = render(tokenizer, prompt), render(tokenizer, prompt, completion)
    turn = turns_of(completion, "assistant")[0]
    parts = [turn["content"], turn.get("reasoning_content", "")]
    parts += [call["function"]["name"] for call in turn.get("tool_calls", ())]
    if not text.startswith(start) or not all("".join(part.split()) in "".join(text.split()) for part in parts):
        shown = f"prompt {start[-80:]!r}: the chat template does not write its answer as it is"
        raise SystemExit(f"{shown}; give prompt and completion as texts with the template's marks")
    for before in (start, "\n", ""):
        texts = [before, before + text[len(start) :]]
        head, ids = (tokenizer(x, add_special_tokens=False).input_ids for x in texts)
        if ids[: len(head)] == head:
            break
    ids = ids[len(head) :]
    stops = [index for index, token in enumerate(ids) if token in stop_ids]
    stop = stop_ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return ids[: stops[-1] + 1] if stops else [*ids, stop]


def context_length(model) -> float:
    """Tokens that the model can read; infinite for relative positions."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_prompts(model, tokenizer, rows: list[dict], max_new_tokens: int) -> None:
    """Refuse prompts that the model cannot read, or that leave no room for a completion."""
    room = context_length(model) - max_new_tokens
    for row in rows:
        ids = prompt_tokens(tokenizer, row)
        check_ids(model, tokenizer, ids)
        if not 0 < len(ids) <= room:
            needed = f"{len(ids)} tokens, but the model's context has room for 1 to {room} and --max-new-tokens"
            raise SystemExit(f"prompt {str(row['prompt'])[:80]!r}: {needed}; leave such rows out")


def check_ids(model, tokenizer, ids: list[int]) -> None:
    """Refuse tokens that were added to the tokenizer and not to the model."""
    size = len(model.get_input_embeddings().weight)
    if unknown := [token for token in ids if token >= size]:
        name = tokenizer.convert_ids_to_tokens(unknown[0])
        raise SystemExit(f"the tokenizer's {name} is {unknown[0]}, but the embedding has {size} rows; resize it first")


def pad(sequences: list[list[int]], side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [N, longest] of N lists of ids, padded on the side "left" or "right".

    The mask comes from lengths: one made by comparing ids with the pad token deletes the stop token where the two are
    one (huggingface/trl#3091).
    """
    ids = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    padded = [pad_sequence(x, batch_first=True, padding_side=side) for x in (ids, [torch.ones_like(i) for i in ids])]
    return padded[0].to(device), padded[1].to(device)


def prompt_batch(tokenizer, rows: list[dict], device) -> tuple[torch.Tensor, torch.Tensor]:
    """prompt_ids and prompt_mask [N, P] of the rows' prompts, padded on the left."""
    return pad([prompt_tokens(tokenizer, row) for row in rows], "left", device)


def decode(tokenizer, ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[str], list[list[int]]]:
    """What the mask keeps of each row: texts without special tokens, and ids."""
    kept = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu() > 0)]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in kept], kept


GIVEN = ("prompts", "completions", "completion_ids")  # what a reward gets besides the data's columns
# one event loop for all asynchronous rewards, as a client belongs to one; in a thread, as a notebook runs its own
LOOP, THREAD = asyncio.new_event_loop(), ThreadPoolExecutor(1)


def load_function(name: str, rows: list[dict] = (), folder: str | Path = "", named_by: str = "--reward") -> Callable:
    """One of builtin_rewards.py, `package.module:function`, or `file.py:function`, the path relative to the folder.

    Refused if it takes what neither the rows' columns nor GIVEN have.
    """
    module, _, function = name.rpartition(":")
    file = Path(folder, module).resolve()
    with explained(f"{named_by} {name}: none of {', '.join(REWARDS)}, file.py:function, module:function"):
        if file.is_file():  # imported as from a script in its folder: its neighbours are found, and pickle finds it
            other = getattr(sys.modules.get(file.stem), "__file__", None)
            if file.stem in sys.stdlib_module_names or "site-packages" in str(other):
                raise ValueError("rename the file, as a module of this name is loaded already")
            if other != str(file):
                sys.modules.pop(file.stem, None)
            sys.path.insert(0, str(file.parent))
            importlib.invalidate_caches()
            module = file.stem
        loaded = REWARDS.get(name) or getattr(importlib.import_module(module), function)
        parameters = inspect.signature(loaded).parameters.values()
    columns = {column for row in rows for column in row} - {"prompt"}
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if rows and (missing := [x for x in needed if x not in (*GIVEN, *columns)]):
        given = ", ".join([*GIVEN, *sorted(columns)])
        raise SystemExit(f"{named_by} {name}: takes {', '.join(missing)}, but a reward is given, by name, {given}")
    if clash := columns & {*GIVEN}:
        raise SystemExit(f'--data: rename the column "{clash.pop()}", which is what each reward is given')
    return loaded


def call_rewards(functions: dict[str, Callable], rows: list[dict], texts: list[str], ids=None) -> dict[str, list]:
    """What each reward returns for the completions' texts and ids, given by name, as TRL does it."""
    # like TRL, a string is answered by a string and a list of messages by a message
    completions = [x if isinstance(row["prompt"], str) else turns_of(x, "assistant") for x, row in zip(texts, rows)]
    arguments = dict(zip(GIVEN, ([row["prompt"] for row in rows], completions, ids or [None] * len(rows))))
    columns = dict.fromkeys(column for row in rows for column in row if column != "prompt")
    arguments |= {column: [row.get(column) for row in rows] for column in columns}
    values = {}

    async def together(awaitables):
        return await asyncio.gather(*awaitables)

    try:
        for name, function in functions.items():
            # what a reward does to one of them reaches nobody else, not even another sample of the same row
            given = {key: [copy.deepcopy(part) for part in parts] for key, parts in arguments.items()}
            taken = inspect.signature(function).parameters
            everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
            values[name] = function(**{key: given[key] for key in given if everything or key in taken})
        if waiting := {name: value for name, value in values.items() if inspect.isawaitable(value)}:
            name = ", ".join(waiting)
            values |= zip(waiting, THREAD.submit(LOOP.run_until_complete, together(waiting.values())).result())
        for name in functions:
            values[name] = list(values[name])
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise SystemExit(f"reward {name}: raised {error!r} in {last.filename}, line {last.lineno}") from error
    for name in functions:
        if len(values[name]) != len(rows):
            raise SystemExit(f"reward {name}: returned {len(values[name])} values for {len(rows)} completions")
    return values


def to_floats(name: str, values: list, texts: list[str]) -> torch.Tensor:
    """What a reward returned as numbers [B], NaN for None."""
    expected = "expected a finite number, or None where there is no score"
    for value, text in zip(values, texts):
        with explained(f"reward {name}: returned {value!r} for the completion {text[:80]!r}; {expected}"):
            if value is not None and not math.isfinite(value):
                raise ValueError("no such number")
    return torch.tensor([math.nan if value is None else float(value) for value in values])


def load_reward(names: tuple[str, ...], weights: tuple[float, ...], rows: list[dict] = ()) -> Callable:
    """The weighted sum of rewards that TRL's GRPOTrainer would call; the rows are those that they will score.

    Returns score(rows, texts, completion_ids) -> rewards [B], {name: values [B]}. None, for a completion that a reward
    cannot score, counts for nothing; where none could, the sum is NaN and the row takes no part in the update.
    """
    if not names or isinstance(names, str):
        raise SystemExit("--reward: name at least one; the first measures the evaluations")
    if weights and len(weights) != len(names):
        raise SystemExit(f"--reward-weights: {len(weights)} weights for {len(names)} rewards")
    functions = {name.rpartition(":")[2]: load_function(name, rows) for name in names}
    if len(functions) < len(names):
        raise SystemExit(f"--reward {' '.join(names)}: a second reward of one name; rename one")
    if rows and "exact_answer" in names:  # refuses what it cannot read before a model is loaded
        call_rewards({"exact_answer": functions["exact_answer"]}, rows, [""] * len(rows))

    def score(rows: list[dict], texts: list[str], ids=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        returned = call_rewards(functions, rows, texts, ids)
        components = {name: to_floats(name, values, texts) for name, values in returned.items()}
        values = torch.stack(list(components.values()))  # [rewards, B]
        rewards = torch.tensor(weights or [1.0] * len(names)) @ values.nan_to_num()
        return rewards.where(~values.isnan().all(0), math.nan), components

    return score


@contextlib.contextmanager
def restored():
    """Decorates main: signal handlers and torch's random numbers are as before it, also after an error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)


class Run:
    """The output folder of a run (args.json, metrics.jsonl, samples.jsonl, checkpoint/, model/), its seeds, its bar.

    With several processes the first one writes the files and prints; each must call every method.
    """

    def __init__(self, args) -> None:
        self.args, self.name = args, Path(sys.modules[type(args).__module__].__file__).stem
        names = [args.output_dir or f"runs/{self.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"]  # one for each run
        if WORLD_SIZE > 1:
            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backends, timeout=timedelta(hours=1))  # the others wait where one writes or judges
            dist.broadcast_object_list(names)
        if RANK > 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows its number
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        self.dir = Path(names[0])
        self.checkpoint, self.model = self.dir / "checkpoint" / "state.pt", self.dir / "model"
        self.files = {name: self.dir / f"{name}.jsonl" for name in ("metrics", "samples")}
        self.start_time, self.done, self.stopping, self.times = time.perf_counter(), 0, False, {}
        self.bar, self.writer, self.shown = None, None, {}
        if args.resume and self.model.exists():
            raise SystemExit(f"--resume {self.dir}: has finished; its model is in {self.model}")
        written = [path for path in (self.model, self.files["metrics"]) if path.exists() and path.stat().st_size]
        if written and not args.resume:
            raise SystemExit(f"--output-dir {self.dir}: already holds a run; give another one, or --resume {self.dir}")
        transformers.set_seed(args.seed % 2**32)

    def start(self, **parts) -> None:
        """Make the folder, or load the checkpoint of --resume into the parts: pairs of a model and its optimizer."""
        self.parts, state = parts, None
        if self.args.resume and self.checkpoint.exists():  # without one the run begins again
            with explained(f"--resume {self.dir}: {self.checkpoint} cannot be read"):
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=WORLD_SIZE > 1)
            for name, (model, optimizer) in parts.items():
                model.state_dict()  # FSDP then shards again what a forward pass left gathered
                dcp.set_model_state_dict(model, state["parts"][name]["weights"], options=WHOLE)
                if moments := state["parts"][name]["moments"]:
                    dcp.set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
            self.done, self.start_time = state["step"], self.start_time - state["seconds"]
        if RANK > 0:
            return
        with explained(f"--output-dir {self.dir}: cannot be written", OSError):
            self.dir.mkdir(parents=True, exist_ok=True)
            if not self.args.resume:
                (self.dir / "args.json").write_text(json.dumps(asdict(self.args), indent=2, default=str) + "\n")
            for name, file in self.files.items():  # what was written after the checkpoint comes again
                file.touch()
                os.truncate(file, state["sizes"][name] if state else 0)
        with explained(f"--track {self.args.track}: install the package", ImportError):
            if self.args.track == "wandb":
                import wandb

                name = f"{self.dir.name}-{(self.dir / 'args.json').stat().st_mtime_ns}"  # stays, and is no other run's
                settings = {"resume": "allow", "config": asdict(self.args), "sync_tensorboard": True}
                wandb.init(dir=self.dir, name=self.dir.name, id=name, **settings)
            if self.args.track != "none":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.dir / "tensorboard"), purge_step=self.done + 1, flush_secs=10)

    def stop(self, number: int, frame) -> None:
        if self.stopping and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun and a scheduler may both send one
            raise KeyboardInterrupt
        if not self.stopping:
            tqdm.write("stopping after this step; once more stops at once, back to the last checkpoint")
        self.stopping = True

    def steps(self) -> Iterator[int]:
        """The steps that are left; Ctrl-C or a scheduler's SIGTERM ends the one under way, and save() the run.

        Each step has its own seed, so a resumed run draws what the uninterrupted one draws.
        """
        if threading.current_thread() is threading.main_thread():  # `restored` gives them back
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.stop)
        steps = {"total": self.args.num_steps, "initial": self.done, "disable": RANK > 0}
        with tqdm(**steps, desc=self.name, dynamic_ncols=True) as self.bar:
            for step in range(self.done + 1, self.args.num_steps + 1):
                transformers.set_seed((self.args.seed * 1_000_003 + step * 8191 + RANK) % 2**32)
                self.times, self.lap_start = {}, time.perf_counter()
                yield step

    def lap(self, name: str) -> float:
        """Log the seconds since the last lap as time/<name>; returns those since the step began."""
        self.times[f"time/{name}"] = time.perf_counter() - self.lap_start
        self.lap_start = time.perf_counter()
        return sum(self.times.values())

    def check_finite(self, step: int, norm: torch.Tensor) -> float:
        """The gradients' norm as a number; ends the run before they would ruin the weights."""
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            raise SystemExit(f"step {step}: the gradient is not finite; try a lower --learning-rate")
        return norm

    def log(self, step: int, metrics: dict) -> None:
        """Append a line to metrics.jsonl and show the main figures in the bar.

        A number is logged as it is. A tensor of no dimensions is this process's part of a sum over all processes; of
        other tensors the mean is logged, over all processes and without NaN.
        """
        tensors = {name: value.detach().cpu().double() for name, value in metrics.items() if hasattr(value, "detach")}
        sums = [value.nansum() if value.ndim else value for value in tensors.values()]
        counts = [(~value.isnan()).sum() if value.ndim else 1 / WORLD_SIZE for value in tensors.values()]
        sums, counts = (total(torch.tensor(x, dtype=torch.float64)) for x in (sums, counts))
        metrics = metrics | dict(zip(tensors, (sums / counts).tolist())) | self.times
        record = {"step": step, "time/total": time.perf_counter() - self.start_time, "memory/peak": peak_memory()}
        self.write("metrics", record | metrics)
        for name, value in metrics.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)
        if math.isnan(metrics.get("eval/accuracy", 0.0)):
            raise SystemExit("--reward: the first one scored no held-out completion: it returned None for each of them")
        if math.isnan(metrics.get("reward/mean", 0.0)):
            tqdm.write(f"step {step}: no reward could score any completion, so nothing was learned of them")
        shown = ("reward/mean", "loss/sft", "eval/accuracy", "kl/ref", "tokens_per_second")
        self.shown |= {name: f"{metrics[name]:.3g}" for name in shown if name in metrics}
        if self.bar:
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def log_samples(self, step: int, phase: str, tokenizer, rows: list[dict], texts: list[str], components: dict):
        """Append a completion of each row to samples.jsonl; the first three of an evaluation are printed, too."""
        for index, (row, completion) in enumerate(zip(rows, texts)):
            prompt = tokenizer.decode(prompt_tokens(tokenizer, row))  # what the model read, special tokens included
            scores = {name: values[index].item() for name, values in components.items()}
            self.write("samples", {"step": step, "phase": phase, "prompt": prompt, "completion": completion, **scores})
            if phase == "eval" and index < 3:
                rewards = " ".join(f"{name} {value:.3g}" for name, value in scores.items())
                tqdm.write(f"step {step:<5} {prompt[-60:]!r} -> {completion[-100:]!r} | {rewards}")

    def write(self, file: str, record: dict) -> None:
        if RANK == 0:
            record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            with self.files[file].open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")

    def save(self, step: int) -> None:
        """Every --save-every steps, and after a Ctrl-C, write all that an exact resume needs.

        A new file takes the place of the old one when it is whole and on the disk, so there is always a good one.
        """
        every, stopping = self.args.save_every, anywhere(self.stopping)
        if not stopping and (every == 0 or step % every):
            return
        state = {"step": step, "parts": {name: get_state(*part) for name, part in self.parts.items()}}
        state["seconds"] = time.perf_counter() - self.start_time
        if RANK == 0:
            state["sizes"] = {name: file.stat().st_size for name, file in self.files.items()}
            self.checkpoint.parent.mkdir(exist_ok=True)
            new = self.checkpoint.with_suffix(".new")
            with new.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.checkpoint)
        if stopping:
            if WORLD_SIZE > 1:
                dist.barrier()  # nobody leaves before it is written
            start = "python" if WORLD_SIZE == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            command = f"{start} {shlex.join([sys.argv[0], '--resume', self.dir.as_posix()])}"
            raise SystemExit(1 if RANK else f"stopped after step {step}; go on with: {command}")

    def finish(self, model, tokenizer) -> dict[str, float]:
        """Save the model, print the closing line, return the last value of each metric."""
        part, weights = self.dir / "model.part", get_state(model)["weights"]
        if RANK == 0:
            model.save_pretrained(part, state_dict=weights)
            tokenizer.save_pretrained(part)
            for file in model.processor_files:
                shutil.copy(file, part)
            os.replace(part, self.model)
        if WORLD_SIZE > 1:
            dist.barrier()  # nobody leaves before all is written
            dist.destroy_process_group()
            time.sleep(0.5)  # while gloo drops its last tensors, or it may abort at exit (pytorch/pytorch#190489)
        rows = [json.loads(line) for line in self.files["metrics"].read_text(encoding="utf-8").splitlines()]
        first, last = rows[0]["eval/accuracy"], {name: value for row in rows for name, value in row.items()}
        result = f"{first:.3f} -> {last['eval/accuracy']:.3f} in {last['time/total']:.0f} s"
        print(f"{self.name}: held-out accuracy {result}, model in {self.model}")
        return last


def get_state(model, optimizer=None) -> dict:
    """What is trained of a model, and its optimizer's state, whole and on the CPU of the first process."""
    used = [optimizer] if optimizer and optimizer.state else []  # the state is empty before the first update
    weights, moments = dcp.get_state_dict(model, used, options=WHOLE)
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {"weights": {name: tensor for name, tensor in weights.items() if name not in tied}, "moments": moments}


def peak_memory() -> float:
    """The most memory that this process had so far, in 10**9 bytes: the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
