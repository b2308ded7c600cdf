"""What every script needs and no algorithm owns: model loading, several processes, data, reward stubs, bookkeeping.

A mistake that a user can make ends in SystemExit with one line: what is wrong, where, and how to mend it.
"""

import contextlib
import errno
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

# Threads spin while they wait for each other, which starves them once a core has other work: benchmarks/openmp.py
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
GPUS = torch.cuda.device_count()  # of this machine
if WORLD_SIZE > 1 and GPUS:  # before a reward puts a model on one
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % GPUS)

Row = dict  # one line of data: "prompt" and any further columns
bars = []  # of runs that are under way
sharded = []  # models and heads that are split among the processes


def fail(message: str) -> NoReturn:
    """End in one line, beneath the progress bar and not in the middle of it."""
    for bar in bars:
        bar.close()
    raise SystemExit(message)


def bundled(path: str) -> str:
    """The path of a file or folder that comes with the scripts, for a relative path that does not exist here."""
    beside = Path(__file__).parent / path
    return str(beside) if beside.exists() and not Path(path).exists() else path


def mean(value):
    """The mean over the processes of a number or tensor that each of them has; with one process the value itself.

    Gradients, and what Run.log gets, are averaged over the processes too. So a sum that each process divides by the
    mean of all counts comes out as if one process had done the whole batch. Such a mean is 1 / WORLD_SIZE where one
    process has 1 and the others 0: against a division by 0 it is clamped at 1e-3, not at 1.
    """
    if WORLD_SIZE == 1:
        return value
    total = torch.as_tensor(value).clone()
    dist.all_reduce(total)
    return total / WORLD_SIZE


def nanmean(values: torch.Tensor) -> torch.Tensor:
    """The mean, over all processes, of the values that are not NaN."""
    return mean(values.nansum()) / mean((~values.isnan()).sum().to(values.dtype))


def largest(value):
    """The largest, over the processes, of a number or of each element of a tensor that all of them have."""
    if WORLD_SIZE == 1:
        return value
    result = torch.as_tensor(value).clone()
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result if isinstance(value, torch.Tensor) else result.item()


def anywhere(condition: bool) -> bool:
    """Whether it holds on one process at least: sharded models need all processes to run the same passes."""
    return bool(largest(int(condition)))


def share(rows: list) -> list:
    """The rows of this process: of equal number, if that divides."""
    return rows[len(rows) * RANK // WORLD_SIZE : len(rows) * (RANK + 1) // WORLD_SIZE]


def gather(items: list) -> list:
    """The items of all processes, in their order."""
    lists = [items] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(lists, items)
    return list(itertools.chain(*lists))


@cache
def device_mesh(kind: str):
    return dist.init_device_mesh(kind, (WORLD_SIZE,))


def shard(module, device: torch.device) -> None:
    """Split a module's parameters, gradients and optimizer state among the processes, if several, by torch's FSDP2.

    Layer by layer whole parameters are gathered for a forward or backward pass and let go after it; embeddings and head
    stay whole from the forward pass to the end of the backward pass, so that logits can be made chunk by chunk.
    """
    if WORLD_SIZE == 1:
        return
    from torch.distributed.fsdp import fully_shard  # takes as long as torch itself
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in reversed(layers):  # inner ones first
        fully_shard(layer, mesh=device_mesh(device.type))
    for layer, following in itertools.pairwise(layers):  # is gathered meanwhile: FSDP only does that from the root on
        layer.set_modules_to_forward_prefetch([following])
    fully_shard(module, mesh=device_mesh(device.type), reshard_after_forward=False)
    sharded.append(module)


@contextlib.contextmanager
def whole(model):
    """Gather a sharded model's parameters once, for passes in which each process goes its own way; then let them go."""
    for module in sharded:  # of which some are gathered still: a reference, which no backward pass lets go
        module.reshard()
    parts = [module for module in model.modules() if hasattr(module, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not parts[0], recurse=False)
        part.reshard()


def add_adapters(model, rank: int, device: torch.device, autocast) -> None:
    """Freeze the model and give each of its linear layers but the head a trainable LoRA adapter (arXiv 2106.09685)."""
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise SystemExit("--lora-rank: needs `pip install peft`") from None
    # an alpha that does not grow with the rank lets one learning rate fit all ranks (thinkingmachines.ai/blog/lora);
    # dropout would make log-probs differ from pass to pass, as in load_model
    settings = {"lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    try:
        model.add_adapter(LoraConfig(r=rank, **settings))
    except ValueError as error:  # a layer that peft cannot adapt
        raise SystemExit(f"--lora-rank: {str(error).splitlines()[0]}") from None
    with autocast:
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    for layer in model.modules():
        if dtype and isinstance(layer, BaseTunerLayer):
            layer.base_layer.to(dtype)  # autocast would do so in each pass anew: it remembers only what is trained


class WithoutAdapters:
    """A model, or a module of it, run with the model's adapters off: what the training started from, for free."""

    def __init__(self, model, module=None) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model, self.module = model, module or model
        self.layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    @property
    def base_model(self):
        return WithoutAdapters(self.model, self.model.base_model)

    def __call__(self, **inputs):
        for layer in self.layers:
            layer._disable_adapters = True  # peft's own way also ends their training, for good where FSDP shards them
        try:
            return self.module(**inputs)
        finally:
            for layer in self.layers:
                layer._disable_adapters = False


def load_reference(args, model, device: torch.device):
    """The model that the training starts from; with --lora-rank that is the trained one without its adapters."""
    return WithoutAdapters(model) if args.lora_rank else load_model(args.model, device)[0]


def load_model(
    path: str,
    device: torch.device,
    *,
    lora_rank: int = 0,
    gradient_checkpointing: bool = False,
    autocast: torch.autocast | None = None,
    replicated: bool = False,
    named_by: str = "--model",
):
    """A causal LM in float32, and its tokenizer, from a checkpoint folder or a hub id.

    Of several processes each holds a share, unless it is replicated. What LoRA freezes has the dtype of the autocast.

    Settled here once, so that no script has to think of it:
    - dropout is 0: the log-probs of one completion must come out the same twice (arXiv 2403.17031, detail 5);
    - `generation_config.eos_token_id` becomes the list of all ids that end a completion, the model's and the
      tokenizer's, which differ for Qwen2.5 base (huggingface/trl#7039 shows what comes of knowing only one);
    - logits of a padded vocabulary that no token owns are cut off, for the sampler and the log-probs alike: training
      raises them until one is sampled (vllm-project/vllm#13175).
    """
    path, autocast = bundled(path), autocast or contextlib.nullcontext()
    if Path(path, "adapter_config.json").exists():
        raise SystemExit(f"{named_by} {path}: holds adapters, not a model; give that run --merge-adapters")
    try:
        config = AutoConfig.from_pretrained(path)
        for part in (config, config.get_text_config()):
            for name, value in vars(part).items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # without dtype the checkpoint's own would be loaded, often bfloat16 (huggingface/transformers#42805)
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # a missing folder, another kind of model, a truncated file, ...
        reason = (str(error) or repr(error)).splitlines()[0]
        raise SystemExit(f"{named_by} {path}: not the folder or hub id of a causal language model ({reason})") from None
    eos = model.generation_config.eos_token_id
    stop_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not stop_ids:
        raise SystemExit(f"{named_by} {path}: no stop token; set eos_token_id in its generation_config.json")
    # a new one: with the checkpoint's own sampling fields kept, saving could be refused after the training
    model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(stop_ids), pad_token_id=min(stop_ids))
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits[..., :vocab_size])
    with torch.no_grad():
        probe, same = torch.tensor([[min(stop_ids), 0]]), partial(torch.allclose, atol=1e-3, rtol=1e-3)
        inputs = {"input_ids": probe, "attention_mask": torch.ones_like(probe)}
        output = model.eval()(**inputs, use_cache=True)
        if not same(output.logits[:, :1], model(**{name: x[:, :1] for name, x in inputs.items()}).logits):
            raise SystemExit(
                f"{named_by} {path}: no causal language model; what it says of a token depends on later ones"
            )
        if not hasattr(getattr(output, "past_key_values", None), "reorder_cache"):
            raise SystemExit(f"{named_by} {path}: has no KV cache, which sampling needs")
        if not same(output.logits, logits_of(model, model.base_model(**inputs).last_hidden_state)):
            raise SystemExit(f"{named_by} {path}: it scales its logits as common.logits_of does not; add it there")
    if lora_rank:
        add_adapters(model, lora_rank, device, autocast)
    if gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its old name
        try:
            enable({"use_reentrant": False})
        except ValueError:
            raise SystemExit(f"--gradient-checkpointing: {named_by} {path} has none; leave it out") from None
        model.base_model.gradient_checkpointing = True  # OPT has it a level below; hidden_states looks for it here

        def set_mode(trunk, inputs):
            # it needs train mode, in which a KV cache is dropped without a word (huggingface/transformers#36051), so no
            # rollout may run in that mode
            trunk.train(torch.is_grad_enabled())

        model.base_model.register_forward_pre_hook(set_mode)
    if not replicated:
        shard(model, device)
    model.to(device)
    if model in sharded:

        def unshard(trunk, inputs):  # passes begin at the trunk, and FSDP's at the model
            model.unshard()

        model.base_model.register_forward_pre_hook(unshard)
        with torch.no_grad(), autocast:
            model(**{name: x.to(device) for name, x in inputs.items()})  # FSDP's first pass must begin at the model
        model.reshard()
    return model, tokenizer


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [.., V] of the trunk's hidden states [.., H], as the model's own forward pass has them: load_model checks.

    So logits can be made of some positions at a time, and of none that nobody asks for.
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere's; then Falcon-H1's and Granite's
    scale *= getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
    logits = logits if scale == 1.0 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def arithmetic() -> list[Row]:
    """The built-in task: all sums of two numbers below 100, as prompts with answers, demonstrations and pairs.

    Every other rejected answer forgets the carry, as the base model in models/arithmetic mostly does (37 + 48 is "75");
    the rest is off in one digit or two, so that a preference for the carry alone does not tell right from wrong.
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


def read_rows(source: str, columns: tuple[str, ...]) -> list[Row]:
    """Rows of `arithmetic`, of a .jsonl file or of a hub data set's train split (`id` or `id:configuration`)."""
    if source == "arithmetic":
        return arithmetic()
    if Path(source).is_file():
        rows = []
        with open(source, "rb") as file:
            for number, line in enumerate(file, 1):
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
            if not isinstance(row, dict) or not is_text(row.get(column)):
                needed = "a text or messages with role and content"
                raise SystemExit(f'{source}, row {number}: "{column}" is missing or empty, or not {needed}')
    return rows


def is_text(value) -> bool:
    """Whether this is a text or a list of chat messages, and not empty."""
    if isinstance(value, list):
        texts = [turn.get("role") and turn.get("content") if isinstance(turn, dict) else None for turn in value]
        return bool(texts) and all(text and isinstance(text, str) for text in texts)
    return isinstance(value, str) and value != ""


def load_data(source: str, eval_source: str, eval_prompts: int, columns: tuple[str, ...]) -> tuple[list, list]:
    """Rows to train on, which must have the columns, and at most `eval_prompts` rows held out.

    Without an `eval_source` a tenth of the prompts is held out, chosen by hash, so that it is the same in each run.
    """
    rows = read_rows(source, columns)
    if eval_source:
        return rows, enough(read_rows(eval_source, ("prompt",))[:eval_prompts], eval_source)
    digests = [hashlib.md5(json.dumps(row["prompt"]).encode()).hexdigest() for row in rows]
    by_digest = dict(sorted(zip(digests, rows), key=lambda item: item[0]))
    if len(by_digest) < 2:
        raise SystemExit(f"--data {source}: one prompt only, so none can be held out; add rows or give --eval-data")
    held_out = dict(list(by_digest.items())[: max(1, len(by_digest) // 10)])
    train_rows = [row for digest, row in zip(digests, rows) if digest not in held_out]
    return train_rows, enough(list(held_out.values())[:eval_prompts], source)


def enough(rows: list[Row], source: str) -> list[Row]:
    """The held-out rows, if there is one for each process."""
    if len(rows) < WORLD_SIZE:
        raise SystemExit(f"{source}: {len(rows)} held-out prompts for {WORLD_SIZE} processes; each needs one at least")
    return rows


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
    start, whole = render(tokenizer, prompt), render(tokenizer, prompt, text_of(completion))
    if not whole.startswith(start):
        raise SystemExit("the chat template writes an answered prompt unlike an open one: no completion to train on")
    ids = tokenizer(whole[len(start) :], add_special_tokens=False).input_ids
    stops = [index for index, token in enumerate(ids) if token in stop_ids]
    return ids[: stops[-1] + 1] if stops else [*ids, tokenizer.eos_token_id]


def context_length(model) -> float:
    """Tokens that the model can read, which is no number of it where positions are relative to each other only."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_prompts(model, tokenizer, rows: list[Row], max_new_tokens: int) -> None:
    """Refuse, before any work is done, prompts that the model cannot read, or that leave no room for a completion."""
    room = context_length(model) - max_new_tokens
    for row in rows:
        length = len(prompt_tokens(tokenizer, row["prompt"]))
        if not 0 < length <= room:
            needed = f"{length} tokens, but the model's context has room for 1 to {room} and --max-new-tokens"
            raise SystemExit(f"prompt {str(row['prompt'])[:80]!r}: {needed}; leave such rows out")


def find_number(text: str) -> str | None:
    """The number after "####", else the last one in the text, in one spelling: "1,200.50" is "1200.5"; None without.

    Nothing is converted, so a hostile completion of a million digits costs no more than reading it.
    """
    _, marker, tail = text.rpartition("####")
    numbers = re.findall(r"(?:(?<!\d)-)?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", tail))
    if not numbers:
        return None
    number = numbers[0 if marker else -1]
    whole, _, fraction = number.lstrip("-").partition(".")
    spelled = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}".rstrip(".")
    return f"-{spelled}" if number.startswith("-") and spelled != "0" else spelled


def exact_answer(prompts: list, completions: list, **columns: list) -> list[float | None]:
    """1.0 where the completion's number is that of the column "answer", or else "completion" or "chosen".

    A truth without a number must be met word for word.
    """
    truths = next((columns[name] for name in ("answer", "completion", "chosen") if name in columns), None)
    if truths is None:
        fail('--reward exact_answer: the data has no column "answer"; add it or choose another reward')
    scores = []
    for text, truth in zip(map(text_of, completions), truths):
        truth = text_of(truth) if isinstance(truth, list) else truth and str(truth)
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
        raise SystemExit(f"{named_by} {name}: {file} does not import: {describe(error)}") from error
    if loaded is None:
        raise SystemExit(f"{named_by} {name}: {file} has no function {function}")
    return loaded


def describe(error: Exception) -> str:
    """The error and where it arose, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error!r} in {last.filename}, line {last.lineno}"


def call_reward(name: str, function: Callable, rows: list[Row], texts: list[str]) -> list:
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
        fail(f"reward {name}: raised {describe(error)}")
    if len(values) != len(rows):
        fail(f"reward {name}: returned {len(values)} values for {len(rows)} completions")
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
            fail(f"reward {name}: returned {value!r} for the completion {text[:80]!r}; {expected}")
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

    def score(rows: list[Row], texts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, scored, components = torch.zeros(len(rows)), torch.zeros(len(rows)), {}
        for weight, (name, function) in zip(weights or [1.0] * len(names), functions.items()):
            values = call_reward(name, function, rows, texts)
            components[name] = to_floats(name, values, texts)
            total += weight * components[name].nan_to_num()
            scored += ~components[name].isnan()
        return total.where(scored > 0, float("nan")), components

    return score


BOUNDS = [  # of flags, wherever a script has one of that name
    (
        "more than 0",
        lambda value: value > 0,
        "prompts_per_step samples_per_prompt micro_batch_size max_new_tokens max_length temperature learning_rate "
        "value_learning_rate max_grad_norm eval_every eval_prompts num_epochs num_minibatches max_kl fisher_samples "
        "cg_iterations",
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        "num_steps warmup_steps save_every beta clip_range value_clip_range clip_low clip_high target_kl "
        "overlong_buffer damping cg_tolerance max_backtracks simpo_gamma lora_rank",
    ),
    ("from 0 to 1", lambda value: 0 <= value <= 1, "gamma gae_lambda"),
    ("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32, "seed"),
]


def check_args(args):
    """The flags, refused where no script can work with them; with --resume they become those of that run.

    Only --device and --micro-batch-size may then be others, as they change no result but its last digits.
    """
    if args.resume:
        file, own = Path(args.resume, "args.json"), {field.name: getattr(args, field.name) for field in fields(args)}
        try:
            stored = json.loads(file.read_text())
        except (OSError, ValueError):
            stored = {}
        if stored.keys() != own.keys():
            raise SystemExit(f"--resume {args.resume}: not the folder of a run of this script")
        stored = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        stored |= {"resume": args.resume, "output_dir": args.resume}
        changed = {name for name in own if own[name] not in (stored[name], getattr(type(args), name))}
        movable = changed & {"device", "micro_batch_size"}  # where and how it is computed, not what
        stored |= {name: own[name] for name in movable}
        given = [name for name in own if name in changed - movable]
        if given:
            flags = " ".join(f"--{name.replace('_', '-')}" for name in given)
            raise SystemExit(f"--resume {args.resume}: goes on with that run's own settings; leave out {flags}")
        args = type(args)(**stored)
    for bound, holds, names in BOUNDS:
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not holds(value):
                raise SystemExit(f"--{name.replace('_', '-')}: {value}, but it must be {bound}")
    if args.prompts_per_step % WORLD_SIZE:
        raise SystemExit(f"--prompts-per-step: {args.prompts_per_step} do not divide among {WORLD_SIZE} processes")
    if WORLD_SIZE > 1 and ":" in args.device:
        kind = args.device.partition(":")[0]
        raise SystemExit(f"--device {args.device}: each process has a GPU of its own; give --device {kind}")
    if args.device != "cpu" and 0 < GPUS < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise SystemExit(f"--nproc-per-node: more processes than the {GPUS} GPUs; lower it, or give --device cpu")
    if args.merge_adapters and not args.lora_rank:
        raise SystemExit("--merge-adapters: there are none without --lora-rank")
    if args.track != "none" and not importlib.util.find_spec(args.track):
        raise SystemExit(f"--track {args.track}: needs `pip install {args.track}`")
    return args


def explain(kind: type, error: BaseException, trace) -> None:
    """An exception hook: one line where a traceback would tell less, as the fault is not in the code."""
    for bar in bars:
        bar.close()
    told = f"{error!r} {error.__context__!r}"  # torch.save and safetensors have errors of their own
    if kind is torch.OutOfMemoryError:
        tell = "lower --micro-batch-size for the update (--resume takes it too), --prompts-per-step for the rollout"
        print(f"out of GPU memory: {tell} ({str(error).splitlines()[0]})", file=sys.stderr)
    elif any(os.strerror(number) in told for number in (errno.ENOSPC, errno.EDQUOT)):
        print(f"no space left on the disk ({told[-200:]}); free some and go on with --resume", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def open_tracker(track: str, folder: Path, steps_done: int) -> Callable[[int, dict], None]:
    """A function that sends a step's metrics to tensorboard or wandb, and files to the run's own folder."""
    if track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1, flush_secs=10)
        return lambda step, metrics: [writer.add_scalar(*metric, step) for metric in metrics.items()]
    if track == "wandb":
        import wandb

        settings = folder / "args.json"
        name = f"{folder.name}-{settings.stat().st_mtime_ns}"  # the same after a resume, and no other run's
        run = wandb.init(dir=folder, name=folder.name, id=name, resume="allow", config=json.loads(settings.read_text()))
        return lambda step, metrics: run.log(metrics, step=step)
    return lambda step, metrics: None


class Run:
    """The output folder of a run (args.json, metrics.jsonl, samples.jsonl, checkpoint/, model/), its seed, its bar.

    Of several processes the first one writes the files and talks; each calls every method, as they ask one another.
    """

    def __init__(self, args) -> None:
        self.name = Path(sys.modules[type(args).__module__].__file__).stem
        names = [args.output_dir or f"runs/{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"]
        if WORLD_SIZE > 1:
            backends = "cpu:gloo,cuda:nccl" if GPUS else "gloo"
            dist.init_process_group(backends, timeout=timedelta(hours=1))  # the others wait where one writes or judges
            dist.broadcast_object_list(names)
        if RANK > 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self.dir = Path(names[0])
        self.args, self.stopping, self.checkpoint = args, False, self.dir / "checkpoint" / "state.pt"
        self.paths, model = {name: self.dir / f"{name}.jsonl" for name in ("metrics", "samples")}, self.dir / "model"
        if args.resume and model.exists():
            raise SystemExit(f"--resume {self.dir}: has finished; its model is in {model}")
        if args.resume and not self.checkpoint.exists():
            raise SystemExit(f"--resume {self.dir}: was stopped before it first saved; remove it and start anew")
        held = (model, self.checkpoint, self.paths["metrics"])
        if not args.resume and any(path.exists() and path.stat().st_size for path in held):
            raise SystemExit(f"--output-dir {self.dir}: already holds a run; give another one, or --resume {self.dir}")
        self.start_time, self.last, self.accuracies = time.perf_counter(), {}, []
        sys.excepthook = explain
        transformers.set_seed(args.seed)

    def start(self, parts: dict) -> int:
        """Make the folder; or, with --resume, load its checkpoint into the parts: anything with load_state_dict.

        Returns the steps that are done, 0 for a new run. From here on Ctrl-C, or a scheduler's SIGTERM, ends the step
        that is under way and saves.
        """
        args, done, self.files, self.track = self.args, 0, {}, lambda step, metrics: None
        if RANK > 0:
            transformers.set_seed(args.seed + RANK)  # each samples on its own; what is the same for all is loaded now
        try:
            if RANK == 0:
                self.dir.mkdir(parents=True, exist_ok=True)
                if not args.resume:
                    (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
                mode = "r+" if args.resume else "w"
                self.files = {name: path.open(mode, encoding="utf-8") for name, path in self.paths.items()}
        except OSError as error:
            raise SystemExit(f"--output-dir {self.dir}: cannot be written ({error})") from None
        if args.resume:
            try:
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=WORLD_SIZE > 1)
            except Exception as error:  # a damaged file ends in one of several
                reason = str(error).splitlines()[0]
                raise SystemExit(f"--resume {self.dir}: {self.checkpoint} cannot be read ({reason})") from None
            for name, part in parts.items():
                set_whole_state(part, state["parts"][name])
            for name, file in self.files.items():  # what the killed process wrote after it saved will be written again
                file.seek(state["sizes"][name])
                file.truncate()
            done, self.last, self.accuracies = state["step"], state["last"], state["accuracies"]
            self.start_time -= state["seconds"]
            if len(state["random"]) > RANK:  # there may be more processes now than there were
                set_random_states(state["random"][RANK])
        if RANK == 0:
            self.track = open_tracker(args.track, self.dir, done)
        self.bar = tqdm(total=args.num_steps, initial=done, desc=self.name, dynamic_ncols=True, disable=RANK > 0)
        bars.append(self.bar)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        return done

    def stop(self, number: int, frame) -> None:
        known, self.stopping = self.stopping, True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, signal.SIG_DFL)
            self.bar.write("stopping after this step; once more to stop at once, back to the last checkpoint")
        elif not known:  # torchrun and a scheduler may both send the same signal
            self.bar.write("stopping after this step")

    def save(self, step: int, parts: dict) -> None:
        """Every --save-every steps, and after a Ctrl-C, write all that an exact resume needs.

        A new file takes the place of the old one when it is whole and on the disk, so there is always a good one.
        """
        every, stopping = self.args.save_every, anywhere(self.stopping)
        if not stopping and (every == 0 or step % every):
            return
        drawn = [random_states()]
        if WORLD_SIZE > 1:
            drawn *= WORLD_SIZE
            dist.all_gather_object(drawn, random_states())
        state = {"step": step, "parts": {name: whole_state(part) for name, part in parts.items()}, "random": drawn}
        state |= {"last": self.last, "accuracies": self.accuracies, "seconds": time.perf_counter() - self.start_time}
        state |= {"sizes": {name: file.tell() for name, file in self.files.items()}}
        if RANK == 0:
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
            if RANK > 0:  # the first one tells
                sys.exit(1)
            start = "python" if WORLD_SIZE == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            fail(f"stopped after step {step}; go on with: {start} {sys.argv[0]} --resume {self.dir}")

    def check_finite(self, step: int, stats: dict, batch: tuple) -> None:
        """Stop before an optimizer step that would ruin the weights, and keep the batch for a look."""
        if bad := [name for name, value in averages(stats).items() if not math.isfinite(value)]:
            file = self.dir / ("batch.pt" if WORLD_SIZE == 1 else f"batch-{RANK}.pt")
            torch.save(batch, file)
            held = f"prompt_ids, prompt_mask, completion_ids, completion_mask are in {file}, for torch.load"
            fail(f"step {step}: {' and '.join(bad)} not finite; {held}; try a lower --learning-rate")

    def write(self, file: str, record: dict) -> None:
        if RANK > 0:
            return
        unwritable = (math.inf, -math.inf)  # and NaN, which JSON has not either
        record = {name: None if value != value or value in unwritable else value for name, value in record.items()}
        self.files[file].write(json.dumps(record, ensure_ascii=False) + "\n")
        self.files[file].flush()

    def log(self, step: int, metrics: dict) -> None:
        """Append a line to metrics.jsonl and show the main figures in the bar."""
        metrics = averages(metrics)
        resources = {"time/total": time.perf_counter() - self.start_time, "memory/peak": peak_memory()}
        self.write("metrics", {"step": step, **resources, **metrics})
        self.track(step, metrics)
        if math.isnan(metrics.get("eval/accuracy", 0.0)):
            fail("--reward: the first one scored no held-out completion: it returned None for each of them")
        if math.isnan(metrics.get("reward/mean", 0.0)):
            self.bar.write(f"step {step}: no reward could score any completion, so nothing was learned of them")
        self.last |= metrics
        self.accuracies += [metrics["eval/accuracy"]] if "eval/accuracy" in metrics else []
        shown = ("reward/mean", "loss/sft", "eval/accuracy", "kl/ref", "tokens_per_second")
        self.bar.set_postfix({name: f"{self.last[name]:.3g}" for name in shown if name in self.last}, refresh=False)
        self.bar.update(step - self.bar.n)

    def log_samples(self, step: int, phase: str, prompts: list[str], completions: list[str], components: dict) -> None:
        """Append as many completions as there are prompts to samples.jsonl, each with every reward component.

        The first three of an evaluation are also shown on the terminal, green where the first reward is above 0.
        """
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for index, (prompt, completion) in enumerate(zip(prompts, completions)):
            scores = {name: values[index].item() for name, values in components.items()}
            self.write("samples", {"step": step, "phase": phase, "prompt": prompt, "completion": completion, **scores})
            if phase == "eval" and index < 3:
                # a model may say what a terminal would obey
                asked, answered = (
                    "".join(c if c.isprintable() else " " for c in text) for text in (prompt, completion)
                )
                told = " ".join(f"{name} {value:.3g}" for name, value in scores.items())
                told = f"\033[{32 if next(iter(scores.values())) > 0 else 31}m{told}\033[0m" if colour else told
                self.bar.write(f"step {step:<5} {asked[-60:]} | {answered[-100:]} | {told}")

    def finish(self, model, tokenizer) -> dict[str, float]:
        """Save the model, print the closing line, return the last value of each metric."""
        self.bar.close()
        done, part, state = self.dir / "model", self.dir / "model.part", whole_state(model)
        if RANK == 0:
            model.save_pretrained(part, state_dict=state)
            if self.args.merge_adapters:
                from peft import PeftModel

                path = bundled(self.args.model)
                base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
                merged = PeftModel.from_pretrained(base, part).merge_and_unload()
                merged.generation_config = model.generation_config
                shutil.rmtree(part)
                merged.save_pretrained(part)
            tokenizer.save_pretrained(part)
            os.replace(part, done)
        for file in self.files.values():
            file.close()
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(number, handler)
        accuracy = " -> ".join(f"{self.accuracies[i]:.3f}" for i in (0, -1)) if self.accuracies else "not measured"
        seconds = time.perf_counter() - self.start_time
        print(f"{self.name}: held-out accuracy {accuracy} in {seconds:.0f} s, model in {done}")
        if WORLD_SIZE > 1:
            dist.barrier()  # nobody leaves before all is written
            dist.destroy_process_group()
            time.sleep(0.5)  # while gloo drops its last tensors, or it may abort at exit (pytorch/pytorch#190489)
        return self.last


def peak_memory() -> float:
    """The most memory that this process had so far, in 10**9 bytes: the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if not importlib.util.find_spec("resource"):  # on Windows
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def averages(metrics: dict) -> dict[str, float]:
    """The numbers, averaged over the processes."""
    values = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in metrics.values()]
    means = mean(torch.tensor([float(value) for value in values], dtype=torch.float64))
    return dict(zip(metrics, means.tolist()))


def whole_state(part) -> dict:
    """state_dict(), without what adapters leave frozen; sharded tensors are gathered, for the first process alone."""
    wholes = {}  # so that tied weights stay one

    def gathered(value):
        if isinstance(value, dict):
            return {name: gathered(item) for name, item in value.items()}
        if not hasattr(value, "full_tensor"):
            return value.detach() if isinstance(value, torch.Tensor) else value
        if id(value) not in wholes:
            whole = value.detach().full_tensor()
            wholes[id(value)] = whole.cpu() if RANK == 0 else None
        return wholes[id(value)]

    if not isinstance(part, torch.nn.Module):
        return gathered(part.state_dict())
    parameters = dict(part.named_parameters(remove_duplicate=False))
    adapted = any("lora_" in name for name in parameters)
    frozen = {name for name, p in parameters.items() if adapted and not p.requires_grad}
    return gathered({name: v for name, v in part.state_dict(keep_vars=True).items() if name not in frozen})


def set_whole_state(part, state: dict) -> None:
    """load_state_dict() with what whole_state returned, of which sharded parts take their shards."""

    def split(value, like):
        if not hasattr(like, "full_tensor") or value.shape != like.shape:
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    if isinstance(part, torch.nn.Module):
        own = part.state_dict()
        part.load_state_dict(own | {name: split(value, own[name]) for name, value in state.items()})
    else:
        owners = [parameter for group in part.param_groups for parameter in group["params"]]
        slots = {
            index: {name: split(value, owners[index]) for name, value in slot.items()}
            for index, slot in state["state"].items()
        }
        part.load_state_dict(state | {"state": slots})


def random_states() -> dict:
    """Of every generator that a script or a reward may draw from, in types that torch.load takes with weights_only."""
    name, keys, *rest = numpy.random.get_state()
    states = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return states | ({"device": torch.get_device_module().get_rng_state()} if torch.accelerator.is_available() else {})


def set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "device" in states and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(states["device"])
