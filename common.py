"""What every script needs and no algorithm owns: processes, models, data, rewards and the bookkeeping of a run.

What a user can get wrong ends in SystemExit with one line: what is wrong, where, and how to mend it.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import MethodType

# Threads spin while they wait for each other, which starves them once a core has other work: benchmarks/openmp.py
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

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

transformers.utils.logging.disable_progress_bar()

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
if WORLD_SIZE > 1 and torch.cuda.is_available():  # before a reward file puts a model on the first GPU
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())

POSITIVE = "prompts_per_step samples_per_prompt micro_batch_size max_new_tokens max_length temperature learning_rate "
POSITIVE += "value_learning_rate max_grad_norm eval_every eval_prompts num_epochs num_minibatches max_kl "
POSITIVE += "fisher_samples cg_iterations"


def check_args(args):
    """The flags, refused where they cannot work; with --resume those of that run.

    Only --device and --micro-batch-size may then be given anew: they change a result by its last digits at most.
    """
    if args.resume:
        own, stored = vars(args), {}
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads(Path(args.resume, "args.json").read_text())
        if stored.keys() != own.keys():
            raise SystemExit(f"--resume {args.resume}: not the folder of a run of this script")
        stored = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        stored |= {"resume": args.resume, "output_dir": args.resume}
        given = {name for name in own if own[name] not in (stored[name], getattr(type(args), name))}
        if fixed := [name for name in own if name in given - {"device", "micro_batch_size"}]:
            flags = " ".join(f"--{name.replace('_', '-')}" for name in fixed)
            raise SystemExit(f"--resume {args.resume}: goes on with that run's own settings; leave out {flags}")
        args = type(args)(**stored | {name: own[name] for name in given})
    for name in POSITIVE.split():
        if not getattr(args, name, 1) > 0:  # as NaN is not
            raise SystemExit(f"--{name.replace('_', '-')}: {getattr(args, name)}, but it must be more than 0")
    if args.prompts_per_step % WORLD_SIZE:
        raise SystemExit(f"--prompts-per-step: {args.prompts_per_step} do not divide among {WORLD_SIZE} processes")
    for package in {"tensorboard": ("tensorboard",), "wandb": ("wandb", "tensorboard")}.get(args.track, ()):
        if not importlib.util.find_spec(package):
            raise SystemExit(f"--track {args.track}: needs `pip install {package}`")
    return args


def pick_device(args) -> torch.device:
    """The device of --device; auto is CUDA, else MPS, else the CPU."""
    mps, cuda = torch.backends.mps.is_available() and WORLD_SIZE == 1, torch.cuda.is_available()
    device = args.device if args.device != "auto" else "cuda" if cuda else "mps" if mps else "cpu"
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if cuda and device != "cpu" and processes > 1 and (":" in device or processes > gpus):
        raise SystemExit(f"--device {device}: {processes} processes need --device cuda and a GPU each, of {gpus} here")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {device}: {str(error).splitlines()[0]}") from None


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        # without dtype the checkpoint's own would be loaded, often bfloat16 (huggingface/transformers#42805)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()
    except Exception as error:  # a missing folder, another kind of model, a truncated file, ...
        reason = (str(error) or repr(error)).splitlines()[0]
        raise SystemExit(f"{named_by} {path}: not the folder or hub id of a causal language model ({reason})") from None
    eos, vocab_size = model.generation_config.eos_token_id, max(tokenizer.get_vocab().values()) + 1
    stop_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not stop_ids:
        raise SystemExit(f"{named_by} {path}: no stop token; set eos_token_id in its generation_config.json")
    # a new one: with the checkpoint's own sampling fields kept, saving could be refused after the training
    model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(stop_ids), pad_token_id=min(stop_ids))
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits[..., :vocab_size])
    ids = torch.tensor([[min(stop_ids), 0]])
    with torch.no_grad():
        first = model(input_ids=ids[:, :1], use_cache=True)
        cached = hasattr(getattr(first, "past_key_values", None), "reorder_cache")
        logits = logits_of(model, model.base_model(input_ids=ids).last_hidden_state)
        if not cached or not torch.allclose(first.logits, logits[:, :1], atol=1e-3, rtol=1e-3):
            kind = "no causal language model with a KV cache, or one whose logits common.logits_of does not make"
            raise SystemExit(f"{named_by} {path}: {kind}")
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
    if WORLD_SIZE > 1 and sharded:
        shard(model, device)
        register_fsdp_forward_method(model, "trunk")
    return model.to(device), tokenizer


def add_adapters(model, args) -> None:
    """Freeze the model and give each of its linear layers but the head a trainable LoRA adapter (arXiv 2106.09685)."""
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise SystemExit("--lora-rank: needs `pip install peft`") from None
    # an alpha that does not grow with the rank lets one learning rate fit all ranks (thinkingmachines.ai/blog/lora)
    settings = {"lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    try:
        model.add_adapter(LoraConfig(r=args.lora_rank, **settings))
    except ValueError as error:  # a layer that peft cannot adapt
        raise SystemExit(f"--lora-rank: {str(error).splitlines()[0]}") from None
    with autocast(args):  # which keeps the casts of trained weights, but makes those of frozen ones in each pass anew
        kind = pick_device(args).type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    for layer in model.modules():
        if dtype and isinstance(layer, BaseTunerLayer):
            layer.base_layer.to(dtype)


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
    kinds = getattr(trunk.config, "layer_types", None) or ()
    return not getattr(trunk, "recomputes", False) and not {"linear_attention", "hybrid"} & set(kinds)


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


def read_rows(source: str, columns: tuple[str, ...]) -> list[dict]:
    """Rows of `arithmetic`, of a .jsonl file or of a hub data set's train split (`id` or `id:configuration`)."""
    if source == "arithmetic":
        return arithmetic()
    if Path(source).is_file():
        rows = []
        for number, line in enumerate(Path(source).read_bytes().splitlines(), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:  # no JSON, or no UTF-8
                raise SystemExit(f"{source}, line {number}: not JSON ({error})") from None
    elif source.endswith((".jsonl", ".json")):
        raise SystemExit(f"--data {source}: no such file")
    else:
        try:
            import datasets
        except ImportError:
            raise SystemExit(f"--data {source}: no such file; a hub data set needs `pip install datasets`") from None
        name, _, configuration = source.partition(":")
        try:
            rows = list(datasets.load_dataset(name, configuration or None, split="train"))
        except (OSError, ValueError) as error:
            raise SystemExit(f"--data {source}: {str(error).splitlines()[0]}") from None
    if not rows:
        raise SystemExit(f"--data {source}: has no rows")
    for number, row in enumerate(rows, 1):
        for column in columns:
            value = row.get(column) if isinstance(row, dict) else None
            turns = value if isinstance(value, list) else [{"role": "user", "content": value}]
            texts = [turn.get("role") and turn.get("content") if isinstance(turn, dict) else None for turn in turns]
            if not texts or not all(text and isinstance(text, str) for text in texts):
                needed = "a text or messages with role and content"
                raise SystemExit(f'{source}, row {number}: "{column}" is missing or empty, or not {needed}')
    return rows


def load_data(source: str, eval_source: str, eval_prompts: int, columns: tuple[str, ...]) -> tuple[list, list]:
    """Rows to train on, which must have the columns, and at most `eval_prompts` rows held out.

    Without an `eval_source` a tenth of the prompts is held out, chosen by hash, so that it is the same in each run.
    """
    rows = read_rows(source, columns)
    if eval_source:
        held_out = read_rows(eval_source, ("prompt",))
    else:
        digests = [hashlib.md5(json.dumps(row["prompt"]).encode()).hexdigest() for row in rows]
        by_digest = dict(sorted(zip(digests, rows), key=lambda item: item[0]))
        if len(by_digest) < 2:
            raise SystemExit(f"--data {source}: one prompt only, so none can be held out; add rows or give --eval-data")
        chosen = dict(list(by_digest.items())[: max(1, len(by_digest) // 10)])
        held_out = list(chosen.values())
        rows = [row for digest, row in zip(digests, rows) if digest not in chosen]
    held_out = held_out[:eval_prompts]
    if len(held_out) < WORLD_SIZE:
        raise SystemExit(f"{eval_source or source}: {len(held_out)} held-out prompts for {WORLD_SIZE} processes")
    return rows, held_out


def take_batch(rows: list, step: int, args) -> list:
    """This process's rows of a step (from 1): epoch after epoch, each in an order that seed and epoch determine."""
    orders, batch = {}, []
    for position in range((step - 1) * args.prompts_per_step, step * args.prompts_per_step):
        epoch, index = divmod(position, len(rows))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(len(rows), generator=generator).tolist()
        batch.append(rows[orders[epoch][index]])
    return share(batch)


def text_of(message: str | list[dict]) -> str:
    return message if isinstance(message, str) else "\n".join(turn["content"] for turn in message)


def render(tokenizer, prompt: str | list[dict], answer: str | None = None) -> str:
    """The prompt, and its answer if given, as the model reads it; a chat template makes a string prompt a user turn."""
    if not tokenizer.chat_template and not isinstance(prompt, str):
        raise SystemExit("the data holds chat messages but the tokenizer has no chat template; give string prompts")
    if not tokenizer.chat_template:
        return prompt + (answer or "")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = messages if answer is None else [*messages, {"role": "assistant", "content": answer}]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    except Exception as error:  # whatever a template may raise
        raise SystemExit(f"prompt {str(prompt)[:80]!r}: the chat template refuses it ({error!r})") from None


def prompt_tokens(tokenizer, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt. A chat template writes its own BOS, so none is added (huggingface/open-r1#462)."""
    return tokenizer(render(tokenizer, prompt), add_special_tokens=not tokenizer.chat_template).input_ids


def completion_tokens(tokenizer, prompt: str | list[dict], completion: str | list[dict], stop_ids: list) -> list[int]:
    """Token ids of a demonstrated completion, its stop token last: the ids that the policy itself would have sampled.

    Prompt and completion are tokenised apart, so the prompt's ids are those of a rollout, whatever the completion
    begins with (huggingface/trl#2209). The stop token is the one with which the chat template ends a turn, if it does.
    """
    start, text = render(tokenizer, prompt), render(tokenizer, prompt, text_of(completion))
    if not text.startswith(start):
        raise SystemExit("the chat template writes an answered prompt unlike an open one: no completion to train on")
    ids = tokenizer(text[len(start) :], add_special_tokens=False).input_ids
    stops = [index for index, token in enumerate(ids) if token in stop_ids]
    return ids[: stops[-1] + 1] if stops else [*ids, tokenizer.eos_token_id]


def context_length(model) -> float:
    """Tokens that the model can read; infinite for relative positions."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_prompts(model, tokenizer, rows: list[dict], max_new_tokens: int) -> None:
    """Refuse prompts that the model cannot read, or that leave no room for a completion."""
    room = context_length(model) - max_new_tokens
    for row in rows:
        length = len(prompt_tokens(tokenizer, row["prompt"]))
        if not 0 < length <= room:
            needed = f"{length} tokens, but the model's context has room for 1 to {room} and --max-new-tokens"
            raise SystemExit(f"prompt {str(row['prompt'])[:80]!r}: {needed}; leave such rows out")


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
    return pad([prompt_tokens(tokenizer, row["prompt"]) for row in rows], "left", device)


def decode(tokenizer, ids: torch.Tensor, mask: torch.Tensor, *, special: bool = False) -> list[str]:
    """Texts of what the mask keeps of each row, without special tokens unless asked for."""
    kept = [row[keep] for row, keep in zip(ids.cpu(), mask.cpu() > 0)]
    return [tokenizer.decode(row, skip_special_tokens=not special) for row in kept]


def find_number(text: str) -> Decimal | None:
    """The number after "####", else the last one in the text; None without."""
    _, marker, tail = text.rpartition("####")
    numbers = re.findall(r"(?:(?<!\d)-)?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", tail))
    return Decimal(numbers[0 if marker else -1]) if numbers else None


def exact_answer(prompts: list, completions: list, **columns: list) -> list[float | None]:
    """1.0 where the completion's number is that of the column "answer", or else "completion" or "chosen".

    A truth without a number must be met word for word.
    """
    truths = next((columns[name] for name in ("answer", "completion", "chosen") if name in columns), None)
    if truths is None:
        raise SystemExit('--reward exact_answer: the data has no column "answer"; add it or choose another reward')
    scores = []
    for text, truth in zip(map(text_of, completions), truths):
        truth = text_of(truth) if isinstance(truth, list) else str(truth) if truth is not None else None
        number = find_number(truth or "")
        right = text.strip() == (truth or "").strip() if number is None else find_number(text) == number
        scores.append(None if truth is None else float(right))
    return scores


def format_reward(prompts: list, completions: list, **columns: list) -> list[float | None]:
    """1.0 where the completion's last line is a number and nothing else, with "####" before it or not."""
    lines = [text_of(completion).strip().rpartition("\n")[2] for completion in completions]
    return [float(re.fullmatch(r"(?:#### ?)?-?[\d,]+(?:\.\d+)?", line) is not None) for line in lines]


def length_reward(prompts: list, completions: list, **columns: list) -> list[float | None]:
    """Minus the completion's length in thousands of characters."""
    return [-len(text_of(completion)) / 1000 for completion in completions]


REWARDS = {"exact_answer": exact_answer, "format": format_reward, "length": length_reward}


def load_function(name: str, folder: str | Path = "", named_by: str = "--reward") -> Callable:
    """A reward function: one of REWARDS, or `file.py:function`, the file's path relative to the folder."""
    file, _, function = name.rpartition(":")
    if name in REWARDS:
        return REWARDS[name]
    if not Path(folder, file).is_file():
        raise SystemExit(f"{named_by} {name}: neither one of {', '.join(REWARDS)} nor an existing file.py:function")
    try:
        loaded = runpy.run_path(str(Path(folder, file))).get(function)
    except Exception as error:
        raise SystemExit(f"{named_by} {name}: {file} does not import: {error!r}") from error
    if loaded is None:
        raise SystemExit(f"{named_by} {name}: {file} has no function {function}")
    return loaded


def call_reward(name: str, function: Callable, rows: list[dict], texts: list[str]) -> list:
    """What a reward function returns for the rows' prompts and the completions' texts, given as TRL gives them."""
    prompts = [row["prompt"] for row in rows]
    # like TRL, a string is answered by a string and a list of messages by a message
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    completions = [text if isinstance(prompt, str) else turn for prompt, text, turn in zip(prompts, texts, turns)]
    columns = dict.fromkeys(column for row in rows for column in row if column != "prompt")
    try:
        with contextlib.ExitStack() as stack:
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps")):  # in evaluations it is on
                stack.enter_context(torch.autocast(kind, enabled=False))  # and must not change a reward model's scores
            values = list(function(prompts, completions, **{name: [row.get(name) for row in rows] for name in columns}))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise SystemExit(f"reward {name}: raised {error!r} in {last.filename}, line {last.lineno}") from error
    if len(values) != len(rows):
        raise SystemExit(f"reward {name}: returned {len(values)} values for {len(rows)} completions")
    return values


def to_floats(name: str, values: list, texts: list[str]) -> torch.Tensor:
    """What a reward function returned as numbers [B], NaN for None."""
    for value, text in zip(values, texts):
        try:
            finite = value is None or math.isfinite(value)
        except (TypeError, OverflowError):
            finite = False
        if not finite:
            expected = "expected a finite number, or None where there is no score"
            raise SystemExit(f"reward {name}: returned {value!r} for the completion {text[:80]!r}; {expected}")
    return torch.tensor([math.nan if value is None else float(value) for value in values])


def load_reward(names: tuple[str, ...], weights: tuple[float, ...]) -> Callable:
    """The weighted sum of rewards, each a name in REWARDS or `file.py:function` with TRL's signature,
    `reward(prompts, completions, **columns) -> list[float | None]`.

    Returns score(rows, completions) -> rewards [B], {name: values [B]}. None, for a completion that a function cannot
    score, counts for nothing; where no function could, the reward is NaN and the row takes no part in the update.
    """
    if not names:
        raise SystemExit("--reward: name at least one, the first measures the evaluations")
    if weights and len(weights) != len(names):
        raise SystemExit(f"--reward-weights: {len(weights)} weights for {len(names)} rewards")
    functions = {name.rpartition(":")[2]: load_function(name) for name in names}
    if len(functions) < len(names):
        raise SystemExit(f"--reward {' '.join(names)}: a second reward of one name; rename one")

    def score(rows: list[dict], texts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        calls = ((name, call_reward(name, function, rows, texts)) for name, function in functions.items())
        components = {name: to_floats(name, values, texts) for name, values in calls}
        values = torch.stack(list(components.values()))  # [rewards, B]
        rewards = torch.tensor(weights or [1.0] * len(names)) @ values.nan_to_num()
        return rewards.where(~values.isnan().all(0), math.nan), components

    return score


class Run:
    """The output folder of a run (args.json, metrics.jsonl, samples.jsonl, checkpoint/, model/), its seeds, its bar.

    With several processes the first one writes the files and prints; each must call every method.
    """

    def __init__(self, args) -> None:
        self.args, self.name = args, Path(sys.modules[type(args).__module__].__file__).stem
        names = [args.output_dir or f"runs/{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"]
        if WORLD_SIZE > 1:
            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backends, timeout=timedelta(hours=1))  # the others wait where one writes or judges
            dist.broadcast_object_list(names)
        if RANK > 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
            try:
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=WORLD_SIZE > 1)
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise SystemExit(f"--resume {self.dir}: {self.checkpoint} cannot be read ({reason})") from None
            for name, (model, optimizer) in parts.items():
                set_state(model, optimizer, state["parts"][name])
            self.done, self.start_time = state["step"], self.start_time - state["seconds"]
        if RANK > 0:
            return
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if not self.args.resume:
                (self.dir / "args.json").write_text(json.dumps(asdict(self.args), indent=2) + "\n")
            for name, file in self.files.items():  # what was written after the checkpoint comes again
                file.touch()
                os.truncate(file, state["sizes"][name] if state else 0)
        except OSError as error:
            raise SystemExit(f"--output-dir {self.dir}: cannot be written ({error})") from None
        if self.args.track == "wandb":
            import wandb

            name = f"{self.dir.name}-{(self.dir / 'args.json').stat().st_mtime_ns}"  # stays, and is no other run's
            settings = {"resume": "allow", "config": asdict(self.args), "sync_tensorboard": True}
            wandb.init(dir=self.dir, name=self.dir.name, id=name, **settings)
        if self.args.track != "none":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(
                str(self.dir / "tensorboard"), purge_step=self.done + (self.done > 0), flush_secs=10
            )

    def stop(self, number: int, frame) -> None:
        if self.stopping and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun and a scheduler may both send one
            raise KeyboardInterrupt
        if not self.stopping:
            tqdm.write("stopping after this step; once more stops at once, back to the last checkpoint")
        self.stopping = True

    @contextlib.contextmanager
    def signals(self):
        """Within, Ctrl-C or a scheduler's SIGTERM only asks to stop; afterwards, also by an error, all is as before."""
        handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def steps(self) -> Iterator[int]:
        """The steps that are left; Ctrl-C ends the one under way, and save() the run. An error in one ends this, too.

        Each step has its own seed, so a resumed run draws what the uninterrupted one draws.
        """
        steps = {"total": self.args.num_steps, "initial": self.done, "disable": RANK > 0}
        with self.signals(), tqdm(**steps, desc=self.name, dynamic_ncols=True) as self.bar:
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

    def log_samples(self, step: int, phase: str, prompts: list[str], completions: list[str], components: dict) -> None:
        """Append a completion of each prompt to samples.jsonl; the first three of an evaluation are printed, too."""
        for index, (prompt, completion) in enumerate(zip(prompts, completions)):
            scores = {name: values[index].item() for name, values in components.items()}
            self.write("samples", {"step": step, "phase": phase, "prompt": prompt, "completion": completion, **scores})
            if phase == "eval" and index < 3:  # what a model says may hold characters that a terminal would obey
                question, answer = ("".join(c if c.isprintable() else " " for c in x) for x in (prompt, completion))
                rewards = " ".join(f"{name} {value:.3g}" for name, value in scores.items())
                tqdm.write(f"step {step:<5} {question[-60:]} | {answer[-100:]} | {rewards}")

    def write(self, file: str, record: dict) -> None:
        if RANK == 0:
            numbers = {
                name: None if value != value or value in (math.inf, -math.inf) else value
                for name, value in record.items()
            }
            with self.files[file].open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(numbers, ensure_ascii=False) + "\n")

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
        part = self.dir / "model.part"
        with self.signals():
            weights = get_state(model)["weights"]
            if RANK == 0:
                model.save_pretrained(part, state_dict=weights)
                tokenizer.save_pretrained(part)
                os.replace(part, self.model)
        if WORLD_SIZE > 1:
            dist.barrier()  # nobody leaves before all is written
            dist.destroy_process_group()
            time.sleep(0.5)  # while gloo drops its last tensors, or it may abort at exit (pytorch/pytorch#190489)
        rows = [json.loads(line) for line in self.files["metrics"].read_text(encoding="utf-8").splitlines()]
        first, last = rows[0]["eval/accuracy"], {name: value for row in rows for name, value in row.items()}
        seconds = time.perf_counter() - self.start_time
        accuracy = f"{first:.3f} -> {last['eval/accuracy']:.3f}"
        print(f"{self.name}: held-out accuracy {accuracy} in {seconds:.0f} s, model in {self.model}")
        return last


WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def get_state(model, optimizer=None) -> dict:
    """What is trained of a model, and its optimizer's state, whole and on the CPU of the first process."""
    weights = dcp.get_model_state_dict(model, options=WHOLE)
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    state = {"weights": {name: tensor for name, tensor in weights.items() if name not in tied}}
    if optimizer and optimizer.state:  # it is empty before the first update
        state["moments"] = dcp.get_optimizer_state_dict(model, optimizer, options=WHOLE)
    return state


def set_state(model, optimizer, state: dict) -> None:
    model.state_dict()  # FSDP then shards again what a forward pass left gathered
    dcp.set_model_state_dict(model, state["weights"], options=WHOLE)
    if "moments" in state:
        dcp.set_optimizer_state_dict(model, optimizer, state["moments"], options=WHOLE)


def peak_memory() -> float:
    """The most memory that this process had so far, in 10**9 bytes: the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
