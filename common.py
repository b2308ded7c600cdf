"""What every script needs and no algorithm owns: processes, models, data, rewards and the bookkeeping of a run."""

import asyncio
import copy
import difflib
import hashlib
import json
import math
import os
import pkgutil
import re
import runpy
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# Threads spin while they wait for each other, which starves them once a core has other work: docs/speed.md
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import torch.distributed as dist
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`past_key_values` is deprecated")  # transformers before 5.24 do not know `cache`
transformers.utils.logging.get_logger("transformers.utils.generic").setLevel("ERROR")  # which says so, too
torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients may be NaN (pytorch/pytorch#196678, huggingface/trl#7181)
for kind in (DynamicLayer, DynamicSlidingWindowLayer):  # keys in the dtype of values: autocast leaves them in float32
    update = kind.update
    kind.update = lambda self, k, v, *x, update=update, **y: update(self, k.to(v.dtype), v, *x, **y)
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
if WORLD_SIZE > 1 and torch.cuda.is_available():  # before a reward file puts a model on the first GPU
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
if RANK > 0:  # the first process speaks for all
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
SHOWN = {  # figures of a step that the terminal shows, and their labels
    "reward/mean": "reward", "reward/margin": "train margin", "loss/sft": "train loss", "loss/dpo": "train loss",
    "kl/ref": "kl", "completion/length": "length", "completion/truncated": "cut off",
}  # fmt: skip
ADVICE = {  # said once, when one of these metrics is 1
    "unscored": "no reward could score any completion, so nothing is learned from this step; look into samples.jsonl",
    "completion/truncated": "every completion was cut off; raise --max-new-tokens, or the model never ends",
    "eval/truncated": "every held-out completion was cut off; raise --max-new-tokens, or the model never ends",
    "group/zero_std": "each prompt's completions scored alike: easier or harder prompts, or more --samples-per-prompt",
}


def usage(doc: str) -> str:
    """What --help shows of a script's docstring: its first paragraph and its commands."""
    return "\n\n".join(text for text in doc.split("\n\n") if doc.startswith(text) or text.startswith("    python"))


def check_args(args):
    """The flags, device and dtype chosen, or refused where they cannot work; with --resume those of that run."""
    if args.resume:
        given = {name: value for name, value in vars(args).items() if value != getattr(type(args), name)}
        if fixed := given.keys() - {"resume", "output_dir", "device", "micro_batch_size", "num_steps"}:
            raise SystemExit(f"--resume {args.resume}: goes on with that run's own settings; leave out {sorted(fixed)}")
        stored = json.loads(Path(args.resume, "args.json").read_text())
        args = replace(args, **stored | given | {"output_dir": args.resume})
    positive = "prompts_per_step samples_per_prompt micro_batch_size max_new_tokens num_epochs num_minibatches "
    positive += "oversample eval_every eval_prompts temperature learning_rate value_learning_rate max_grad_norm"
    for name in positive.split():
        if (value := getattr(args, name, None)) is not None and not value > 0:  # refuses NaN, too
            raise SystemExit(f"--{name.replace('_', '-')}: {value}, but it must be more than 0")
    if args.prompts_per_step % (WORLD_SIZE * getattr(args, "num_minibatches", 1)):
        raise SystemExit("--prompts-per-step: must be a multiple of the processes times --num-minibatches")
    if args.device == "auto":
        args = replace(args, device=str(torch.accelerator.current_accelerator(check_available=True) or "cpu"))
    if args.dtype == "auto":
        bfloat16 = args.device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        args = replace(args, dtype="bfloat16" if bfloat16 else "float32")
    return args


def autocast(args) -> torch.autocast:
    """For forward passes. Weights stay float32: AdamW on bfloat16 ones loses RL-sized steps (NVIDIA-NeMo/RL#2322)."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def decay(args, step: int) -> float:
    """Factor of a step's learning rate: rises to 1 over --warmup-steps, then falls linearly towards 0, or stays."""
    left = (args.num_steps + 1 - step) / max(1, args.num_steps - args.warmup_steps)
    return min(1.0, step / max(1, args.warmup_steps), left if args.lr_schedule == "linear" else 1.0)


def total(value: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum of a tensor over all processes; op names another reduction."""
    value = value.clone()
    if WORLD_SIZE > 1:
        dist.all_reduce(value, op)
    return value


def gather(items: list) -> list:
    """The items of all processes, in their order."""
    lists = [items] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def sum_gradients(model) -> None:
    """Add up the gradients of all processes: each has the whole model, and divides its losses by what all have."""
    for weight in [weight for weight in model.parameters() if weight.requires_grad and WORLD_SIZE > 1]:
        weight.grad = total(torch.zeros_like(weight) if weight.grad is None else weight.grad)


def load_model(path: str, device, args=None):
    """A causal LM in float32 and its tokenizer, from a folder or a hub id; given args, with LoRA and checkpointing. It
    stays in eval mode: with dropout a completion's log-probs would not come out the same twice (arXiv 2403.17031)."""
    tokenizer, folders = transformers.AutoTokenizer.from_pretrained(path), [path]  # a model, then adapters
    while (file := Path(folders[0], "adapter_config.json")).exists():
        folders.insert(0, json.loads(file.read_text())["base_model_name_or_path"])
    loading = {"dtype": torch.float32, "output_loading_info": True}  # without dtype the checkpoint's, often bfloat16
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folders[0], **loading)
    if (missing := sorted(report["missing_keys"])) or hasattr(model.config, "quantization_config"):
        raise SystemExit(f"{path}: its weights are quantized, or would start at random: {missing[:3]}")
    for adapters in folders[1:]:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapters).merge_and_unload().requires_grad_()
    config = model.config.get_text_config()
    config.output_router_logits = False  # they are for a loss of their own
    rope = getattr(config, "rope_parameters", None) or {}
    model.context_length = getattr(config, "max_position_embeddings", None) or math.inf
    if rope.get("rope_type") in ("longrope", "dynamic"):  # beyond it a batch's longest row changes all its rows
        model.context_length = rope.get("original_max_position_embeddings", model.context_length)
    # cut off logits that no token has: training raises them until one is sampled (vllm-project/vllm#13175)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits[..., :vocab_size])

    # what ends a completion, by the model, the tokenizer and the chat template, which may differ (trl#7039)
    eos = model.generation_config.eos_token_id
    stop_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        text = render(tokenizer, {"prompt": [{"role": "user", "content": "WORDS"}]}, "WORDS")
        ids, end = (tokenizer(x, add_special_tokens=False).input_ids for x in (text, text.rpartition("WORDS")[2]))
        if max(ids) >= len(model.get_input_embeddings().weight):
            raise SystemExit(f"{tokenizer.convert_ids_to_tokens(max(ids))}: not in the embedding; resize that first")
        stop_ids |= {*[token for token in end if token in tokenizer.added_tokens_decoder][:1]}
    if not stop_ids:
        raise SystemExit(f"{path}: no stop token; set eos_token_id in its generation_config.json")
    model.generation_config.eos_token_id = sorted(stop_ids)

    # a token that is read with the KV cache must get the logits that it gets without
    ids, rows = torch.tensor([[0, 1, 0], [1, 0, 0]]), torch.tensor([1, 0, 1])
    try:
        with torch.no_grad():
            own = logits_of(model, model.base_model(input_ids=ids).last_hidden_state[rows, -1:])
            cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values
            cache.reorder_cache(rows)
            mask = torch.ones_like(ids[rows])
            read = model(input_ids=ids[rows, 2:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(read, own, rtol=1e-3, atol=1e-3 * float(own.abs().max()))
    except (AttributeError, RuntimeError, AssertionError) as error:
        raise SystemExit(f"{path}: its KV cache, or common.logits_of, makes other logits; not supported") from error
    # gradients may flow through a prompt's cache, but not through recurrent states
    model.shares_prompts = {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}

    model.trunk = partial(torch.nn.Module.__call__, model.base_model)  # the pass without the head, no submodule
    if args and args.lora_rank:
        import peft

        # an alpha that does not grow with the rank lets one learning rate fit all ranks (thinkingmachines.ai/blog/lora)
        lora = peft.LoraConfig(r=args.lora_rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model.adapters = (peft.get_peft_model(model, lora),)  # freezes all else (arXiv 2106.09685); no submodule
        if args.dtype == "bfloat16" and len(folders) == 1:  # once, not in each pass; finish() merges in float32
            for module in [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]:
                module.to(torch.bfloat16)
            head = model.get_output_embeddings()  # a copy, as the embedding that may share its weight stays float32
            head.weight = torch.nn.Parameter(head.weight.to(torch.bfloat16), requires_grad=False)
    if args and args.gradient_checkpointing:
        model.shares_prompts = False  # the cache would be written twice
        for block in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model.to(device), tokenizer


def load_reference(args, model):
    """The model that the training starts from; with --lora-rank the trained one, its adapters off: no second copy."""
    if not args.lora_rank:
        return load_model(args.model, model.device)[0]
    from peft.helpers import rescale_adapter_scale

    reference = copy.copy(model)  # of the same weights
    reference.trunk = rescale_adapter_scale(model, 0.0)(model.trunk)  # disable_adapter() would also end their training
    return reference


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [.., V] of some of the trunk's hidden states [.., H], as the model's own pass makes them."""
    config, logits = model.config.get_text_config(), model.get_output_embeddings()(hidden)
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere's; then Falcon-H1's and Granite's
    scale *= getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
    logits = logits if scale == 1.0 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def read_rows(source: str, columns: tuple[str, ...], prepare=None, splits=("train",)) -> list[dict]:
    """Rows of a .jsonl file, or of the first of the splits that a data set has, a folder or a hub id."""
    if source.endswith(".jsonl"):
        lines = filter(str.strip, Path(source).read_text("utf-8-sig").split("\n"))  # sig: Excel's mark at the start
        rows = json.loads("[" + ",\n".join(lines) + "]")  # so that an error names the line
    else:
        import datasets

        found = datasets.load_dataset(*([source] if Path(source).is_dir() else source.split(":")))  # id:configuration
        if not (split := [split for split in splits if split in found]):
            raise SystemExit(f"--eval-data {source}: has no split {' or '.join(splits)}; name other rows")
        text = json.dumps(found[split[0]].to_list(), default=str)  # None where a row has no such key
        rows = json.loads(text, object_hook=lambda row: {key: value for key, value in row.items() if value is not None})
    for number, row in enumerate(rows):
        try:
            turns = [row.get(x) for x in ("prompt", "completion", "chosen", "rejected", "messages")]
            for turn in [turn for x in turns if isinstance(x, list) for turn in x]:
                parts = turn.get("content") or ""
                turn["content"] = parts if isinstance(parts, str) else "".join(part["text"] for part in parts)
                if turn["role"] not in ("system", "tool") and not (parts or turn.get("tool_calls")):
                    raise ValueError(f"a message without content: {turn!r:.100}")
            rows[number] = row = prepare(row) if prepare else row
            if empty := [column for column in columns if not row.get(column)]:
                raise ValueError(f'no "{empty[0]}": it has {", ".join(row)}, the script takes {", ".join(columns)}')
        except ValueError as error:
            raise SystemExit(f"{source}, row {number + 1}: {error}") from error
    return rows


def load_data(source: str, eval_source: str, eval_prompts: int, columns: tuple, prepare=None) -> tuple[list, list]:
    """Rows to train on, and this process's part of those held out: of eval_source, or else a tenth of the prompts."""
    rows = read_rows(source, columns, prepare)
    if eval_source:
        splits = ("test", "validation") if eval_source == source else ("test", "validation", "train")
        held_out = read_rows(eval_source, ("prompt",), prepare, splits)[:eval_prompts]
        trained = {"".join(str(row["prompt"]).split()) for row in rows}
        if shared := sum("".join(str(row["prompt"]).split()) in trained for row in held_out):
            print(f"{shared} of {len(held_out)} prompts of {eval_source} are trained on, as {source} has them too")
    else:  # chosen by hash, so that they are the same in each run
        digests = [hashlib.md5(json.dumps(row["prompt"], default=str).encode()).hexdigest() for row in rows]
        by_digest = dict(zip(digests, rows))
        chosen = sorted(by_digest)[: max(1, len(by_digest) // 10)]
        held_out = [by_digest[digest] for digest in chosen[:eval_prompts]]
        rows = [row for digest, row in zip(digests, rows) if digest > chosen[-1]]
    if not rows or len(held_out) < WORLD_SIZE:
        raise SystemExit(f"{eval_source or source}: too few rows to train on some and hold some out")
    columns = dict.fromkeys(name for row in rows + held_out for name in row)  # a reward gets all, in each batch
    return [columns | row for row in rows], [columns | row for row in held_out[RANK::WORLD_SIZE]]


def take_batch(rows: list, step: int, args) -> list:
    """This process's rows of a step (from 1): epoch after epoch, each in an order that seed and epoch determine."""
    count = args.prompts_per_step // WORLD_SIZE
    first = (step - 1) * args.prompts_per_step + RANK * count
    epochs = range(first // len(rows), (first + count - 1) // len(rows) + 1)
    generators = [torch.Generator().manual_seed(args.seed * 1_000_003 + epoch) for epoch in epochs]
    orders = torch.cat([torch.randperm(len(rows), generator=generator) for generator in generators]).tolist()
    return [rows[index] for index in orders[first % len(rows) :][:count]]


def eval_batches(rows: list, args) -> list[list]:
    """The rows in batches that sample no more completions at once than a step does."""
    size = args.prompts_per_step // WORLD_SIZE * getattr(args, "samples_per_prompt", 1)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def text_of(message: str | list[dict]) -> str:
    return message if isinstance(message, str) else "\n".join(turn["content"] for turn in message)


def render(tokenizer, row: dict, answer: str | list[dict] | None = None) -> str:
    """A row's prompt, and an answer if there is one, as the model reads them: a text as it stands, as in TRL; messages
    by the chat template, which must write what each turn says. An assistant's turn that ends a prompt goes on."""
    turns, tools = row["prompt"], row.get("tools") or None
    if isinstance(turns, str):
        return turns + text_of(answer or "")
    continued = turns[-1]["role"] == "assistant"
    settings = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    if answer:
        turn = answer[0] if isinstance(answer, list) else {"role": "assistant", "content": answer}
        joined = turn | {"content": turns[-1]["content"] + turn["content"]}
        turns = [*turns[:-1], joined] if continued else [*turns, turn]
    else:
        settings |= {"add_generation_prompt": not continued, "continue_final_message": continued}
    text = tokenizer.apply_chat_template(turns, tokenize=False, **settings | (row.get("chat_template_kwargs") or {}))
    letters = partial(re.sub, r"\\[nrtbf]|\\u[0-9a-f]{4}|\W", "")  # a template may trim words, or write them as JSON
    written = rest = letters(text)
    for turn in turns:
        moves = turn["role"] in ("system", "developer")  # some templates put it into another turn
        calls = [call.get("function", call)["name"] for call in turn.get("tool_calls") or ()]
        for words in map(letters, [turn["content"].rpartition("</think>")[2], *calls]):
            if words not in (written if moves else rest):
                raise SystemExit(f"prompt {str(turns)[:80]}: the chat template leaves out {str(turn)[:200]}")
            rest = rest if moves else rest[rest.find(words) + len(words) :]
    return text


def prompt_tokens(tokenizer, row: dict) -> list[int]:
    """Token ids of a row's prompt. Where a chat template or the text itself wrote BOS none is added (open-r1#462)."""
    text, bos = render(tokenizer, row), tokenizer.bos_token
    plain = isinstance(row["prompt"], str) and not (bos and text.startswith(bos))
    ids = tokenizer(text, add_special_tokens=plain).input_ids
    ended = ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)  # by add_eos_token
    return ids[:-1] if ended else ids


def completion_tokens(tokenizer, row: dict, completion: str | list[dict], stop_ids: list[int]) -> list[int]:
    """Token ids of a demonstrated completion as the policy itself would have sampled them, a stop token last: the first
    one behind its own words, else EOS."""
    start, text = render(tokenizer, row), render(tokenizer, row, completion)
    stops = dict(zip(tokenizer.convert_ids_to_tokens(stop_ids), stop_ids))
    answer, turns = text[len(start) :], completion if isinstance(completion, str) else completion[:1]
    words = text_of(turns).strip()
    for stop in stops if isinstance(row["prompt"], str) else ():  # a text may have its stop token already
        words = words.removesuffix(stop)
    if words not in answer or not text.startswith(start):
        raise SystemExit(f"prompt {start[-80:]!r}: the chat template does not write its answer as it is")
    end = answer.find(words) + len(words)
    behind = re.compile("|".join(map(re.escape, sorted(stops, key=len, reverse=True)))).search(answer, end)
    end, stop = (behind.start(), behind.group()) if behind else (len(answer), tokenizer.eos_token)
    # the tokens after the prompt's; where the two would merge, those after a line break; where that merges, too, those
    # of the answer alone: some tokenizers put a space before a text (huggingface/trl#2209)
    for before in (start, "\n", ""):
        head, ids = (tokenizer(x, add_special_tokens=False).input_ids for x in (before, before + answer[:end]))
        if ids[: len(head)] == head:
            break
    return [*ids[len(head) :], stops.get(stop, stop_ids[0])]


def check_prompts(model, tokenizer, rows: list[dict], max_new_tokens: int) -> None:
    """Refuse prompts that the model cannot read, or that leave no room for a completion."""
    if tokenizer.chat_template and any(isinstance(row["prompt"], str) for row in rows):
        print('the prompts are texts: no chat template is applied; for one give [{"role": "user", "content": "..."}]')
    room = model.context_length - max_new_tokens
    for row in rows:
        if not 0 < (length := len(prompt_tokens(tokenizer, row))) <= room:
            needed = f"{length} tokens, but the model's context has room for 1 to {room} and --max-new-tokens"
            raise SystemExit(f"prompt {str(row['prompt'])[:80]!r}: {needed}; leave such rows out")


def pad(sequences: list[list[int]], side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [N, longest] of N lists of ids, padded on the side "left" or "right". The mask is of lengths:
    comparing ids with the pad token would delete the stop token where the two are one (huggingface/trl#3091)."""
    padded = partial(pad_sequence, batch_first=True, padding_side=side)
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return padded(rows).to(device), padded([torch.ones_like(row) for row in rows]).to(device)


def prompt_batch(tokenizer, rows: list[dict], device) -> tuple[torch.Tensor, torch.Tensor]:
    """prompt_ids and prompt_mask [N, P] of the rows' prompts, padded on the left."""
    return pad([prompt_tokens(tokenizer, row) for row in rows], "left", device)


def collate(prompts: list[list[int]], completions: list[list[int]], device) -> tuple[torch.Tensor, ...]:
    """prompt_ids, prompt_mask [N, P], completion_ids, completion_mask [N G, T]; a prompt's completions are adjacent."""
    completion_ids, completion_mask = pad(completions, "right", device)
    return *pad(prompts, "left", device), completion_ids, completion_mask.float()


def micro_batches(batch: tuple[torch.Tensor, ...], prompts: torch.Tensor, size: int):
    """For some prompts [n] of a batch, by length: rows [b] of their completions, and the inputs of token_logprobs.
    A micro-batch is as many whole prompts as have up to `size` completions, or else a slice of one prompt's."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch
    G, prompts = len(completion_ids) // len(prompt_ids), prompts.to(prompt_ids.device)
    longest = completion_mask.sum(1).view(-1, G).amax(1)  # [N]
    for some in prompts[longest[prompts].argsort(stable=True)].split(max(1, size // G)):
        first = int(prompt_mask[some].argmax(1).min())  # the columns before it are padding
        read = prompt_ids[some, first:], prompt_mask[some, first:]
        for rows in (some[:, None] * G + torch.arange(G, device=some.device)).flatten().split(size):
            yield rows, (*read, completion_ids[rows], completion_mask[rows])


def without_ties(prompts: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Those of the prompts [n] whose advantages, of [N, G], are not all 0; the others have no policy gradient."""
    tied = (advantages.cpu()[prompts.cpu()] == 0).all(1)
    return prompts[:1] if tied.all() else prompts[~tied]  # one at least: each process has the same metrics


def decode(tokenizer, ids, mask, logprobs=None, step: int = 0) -> tuple[list[str], list[list[int]]]:
    """What the mask keeps of each row of a rollout: texts without special tokens, and ids."""
    if logprobs is not None and not logprobs.isfinite().all():  # of NaN the sampler draws the last token id
        raise FloatingPointError(f"step {step}: logits that are not finite, in the rollout or the evaluation")
    kept = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu() > 0)]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in kept], kept


def final_answer(text: str) -> str:
    """What is in the last \\boxed{} or <answer>, or follows "####", whichever comes last; else all; without <think>."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    tagged = re.findall(r"<answer>([^<]*(?:<(?!/?answer>)[^<]*)*)</answer>", text)
    boxed = re.findall(r"^\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", text[text.rfind("\\boxed") :])
    marked = re.findall(r"####[ \t]*([^\s#][^\n]*)", text)
    found = {"<answer>": tagged, "\\boxed": boxed, "####": marked}
    return max(((text.rfind(mark), x[-1]) for mark, x in found.items() if x), default=(0, text))[1].strip()


def to_number(text: str) -> Decimal | None:
    """The number that a text is, with its currency, percent sign or brackets; None if it is not one plain number."""
    text = re.sub(r"\\[()\[\]!,]|\\?[$%]|[€£¥₹]", "", text.replace("\u2212", "-").replace("{,}", ",")).strip()
    around = "*_`'\"" if re.match(r"[(\[{].*,", text) else "*_`'\"()[]{}"  # (1,234) is a pair
    text = text.strip(around).rstrip(".,;").strip(around)
    plain = re.fullmatch(r"[-+]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?(?:[eE][-+]?\d{1,3})?", text)
    return Decimal(text.replace(",", "")) if plain else None


def exact_answer(completions: list, **columns: list) -> list[float | None]:
    """1.0 where the completion's final answer is that of the column "answer", or else "completion" or "chosen": as a
    number if it is a plain one, else as a text. A number may also end the last line, behind "is", ":" or "="."""
    scores, names = [], [name for name in ("answer", "completion", "chosen") if name in columns]
    for truth, completion in zip(columns[names[0] if names else "answer"], completions):
        truth = truth[0]["content"] if isinstance(truth, list) and truth and isinstance(truth[0], dict) else truth
        if isinstance(truth, bool) or not isinstance(truth, str | int | float | None):
            raise ValueError(f"exact_answer: the answer must be a text or a number, not {truth!r:.80}")
        wanted, said = final_answer("" if truth is None else str(truth)), final_answer(text_of(completion))
        number, right = to_number(wanted), said.rstrip(".") == wanted.rstrip(".")
        if number is not None:
            parts = re.split(r"\bis:?\s|[A-Za-z*]:\s|^[^A-Za-z<>=]*(?<![!/~])=", said.rpartition("\n")[2])
            right = len(parts) < 3 and to_number(parts[-1]) == number
        prose = names[0] != "answer" and wanted == str(truth).strip() and len(wanted.split()) > 3  # a demonstration's
        scores.append(float(right) if wanted and truth == truth and not prose else None)  # NaN is unequal to itself
    return scores


def load_function(name: str, folder: str | Path = ""):
    """A reward of this file, `package.module:function`, or `file.py:function`, the path relative to the folder."""
    module, _, function = name.rpartition(":")
    try:
        if module.endswith(".py"):
            file = Path(folder, module).resolve()
            sys.path.insert(0, str(file.parent))  # its neighbours are found, as by a script
            found = SimpleNamespace(**runpy.run_path(str(file)))
        else:
            found = pkgutil.resolve_name(module or __name__)
    except SystemExit as error:  # of an exit(), which would end the run as if all were well
        raise RuntimeError(f"{module} called exit({error.code!r})") from error
    if not hasattr(found, function):  # not vars(): trl.rewards loads a name when it is asked for
        nearest = difflib.get_close_matches(function, dir(found), 1, 0.0)[0]
        raise SystemExit(f"{name}: not found; the nearest is {nearest}; give exact_answer or file.py:function")
    return getattr(found, function)


def call_reward(name: str, function, rows: list[dict], texts: list[str], ids=None) -> list:
    """What a reward returns, a value for each completion. As by TRL it is called by name with prompts, completions,
    completion_ids and each column of the data; what it changes of them reaches nobody else."""
    arguments = {column: [copy.deepcopy(row[column]) for row in rows] for column in rows[0]}
    arguments |= {"prompts": arguments.pop("prompt"), "completion_ids": copy.deepcopy(ids) or [None] * len(rows)}
    replies = [[{"role": "assistant", "content": text}] for text in texts]  # to messages, a text to a text
    arguments["completions"] = [x if isinstance(row["prompt"], str) else y for row, x, y in zip(rows, texts, replies)]
    try:
        values = function(**arguments)
        values = list(asyncio.run(values) if hasattr(values, "__await__") else values)
    except SystemExit as error:
        raise RuntimeError(f"reward {name} called exit({error.code!r})") from error
    if len(values) != len(rows):
        raise SystemExit(f"reward {name}: returned {len(values)} values for {len(rows)} completions")
    return values


def load_reward(names: tuple[str, ...], weights: tuple[float, ...] = ()):
    """score(rows, texts, completion_ids) -> rewards [B], the weighted sums of the rewards, {name: values [B]}. None,
    for a completion that a reward cannot score, counts for nothing; where none could, the sum is NaN."""
    functions = {name.rpartition(":")[2]: load_function(name) for name in names}
    ours = ("mean", "loss", "pairs", "margin", "truncated", "step", "phase", "prompt", "completion")  # logged, too
    if not names or len(functions.keys() - ours) < len(names) or len(weights) not in (0, len(names)):
        raise SystemExit(f"--reward {names}: needs different names, none of {ours}, and as many --reward-weights")

    def score(rows: list[dict], texts: list[str], ids=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        components = {}
        for name, function in functions.items():
            values = call_reward(name, function, rows, texts, ids)
            if bad := [value for value in values if value is not None and not math.isfinite(value)]:
                raise SystemExit(f"reward {name}: returned {bad[0]!r}, not a finite number, nor None for no score")
            components[name] = torch.tensor([math.nan if value is None else float(value) for value in values])
        values = torch.stack(list(components.values()))  # [rewards, B]
        rewards = sum(weight * scores for weight, scores in zip(weights or [1.0] * len(names), values.nan_to_num()))
        return rewards.where(~values.isnan().all(0), math.nan), components

    return score


class Run:
    """A run's folder (args.json, metrics.jsonl, samples.jsonl, checkpoint/, model/), its seeds and its progress bar.
    With several processes the first one writes and prints; each must call every method."""

    def __init__(self, args) -> None:
        if WORLD_SIZE > 1:
            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backends, timeout=timedelta(hours=1))  # the others wait where one writes or judges
        self.args, self.name = args, Path(sys.modules[type(args).__module__].__file__).stem
        self.dir = Path(gather([args.output_dir or f"runs/{self.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"])[0])
        self.checkpoint, self.model = self.dir / "checkpoint" / "state.pt", self.dir / "model"
        self.done, self.stopping, self.start_time = 0, False, time.perf_counter()
        self.headline, self.samples, self.times, self.advice = [], "", {}, ADVICE.copy()
        transformers.set_seed(args.seed % 2**32)
        self.dir.mkdir(parents=True, exist_ok=True)
        own = {name: self.dir / f"{name}.jsonl" if RANK == 0 else os.devnull for name in ("metrics", "samples")}
        self.files = {name: open(path, "a", encoding="utf-8") for name, path in own.items()}  # noqa: SIM115
        if RANK > 0:
            return
        if os.name == "posix":  # the folder is this run's own for as long as the process lives
            import fcntl

            fcntl.lockf(self.files["metrics"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (self.model.exists() and not self.checkpoint.exists()) or (self.files["metrics"].tell() and not args.resume):
            raise SystemExit(f"--output-dir {self.dir}: holds a run; give another one, or --resume from its checkpoint")
        (self.dir / "args.new").write_text(json.dumps(asdict(args), indent=2))
        os.replace(self.dir / "args.new", self.dir / "args.json")

    def start(self, rows: list, held_out: list, **parts) -> None:
        """Say what is trained on what; load the checkpoint of --resume into the parts, pairs of model and optimizer."""
        self.parts, sizes, args = parts, dict.fromkeys(self.files, 0), self.args
        weights, count = list(parts["model"][0].parameters()), sum(gather([len(held_out)]))
        whole = sum(weight.numel() for weight in weights) / 1e6
        trained = sum(weight.numel() for weight in weights if weight.requires_grad) / 1e6
        epoch = len(rows) / args.prompts_per_step / (getattr(args, "oversample", None) or 1)
        print(f"model  {args.model}: trains {trained:.4g} M of {whole:.4g} M parameters; {args.device}, {args.dtype}")
        print(f"rows   {len(rows)} to train on, {count} held out; {args.num_steps} steps, {epoch:.1f} to an epoch")
        print(f"run    {self.dir}")
        if not rows:
            raise SystemExit("no row is left to train on: all are beyond --max-length, empty, or equal pairs")
        if trained == whole > 50 and getattr(args, "learning_rate", 0) == getattr(type(args), "learning_rate", None):
            print(f"--learning-rate {args.learning_rate} suits the embedded model; this one may need 1e-5 or less")
        if count < 20:
            print(f"{count} held-out rows: too few to tell much; give others by --eval-data, or more --eval-prompts")
        if args.resume and self.checkpoint.exists():  # without one the run begins again
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=WORLD_SIZE > 1)
            for name, (model, optimizer) in parts.items():
                model.load_state_dict(state["parts"][name]["weights"], strict=False)
                if optimizer:
                    optimizer.load_state_dict(state["parts"][name]["moments"])
            self.done, sizes, self.start_time = state["step"], state["sizes"], self.start_time - state["seconds"]
        for name, file in self.files.items() if RANK == 0 else ():
            file.truncate(sizes[name])  # what was written after the checkpoint comes again
        if args.track == "wandb" and RANK == 0:
            import wandb

            wandb.init(dir=self.dir, name=self.dir.name, config=asdict(args))
        left, bar = range(self.done + 1, args.num_steps + 1), {"initial": self.done, "total": args.num_steps}
        bar["bar_format"] = "{desc} {bar} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(left, desc=self.name, dynamic_ncols=True, disable=True if RANK else None, **bar)

    def steps(self):
        """The steps that are left, each with its own seed, so that a resumed run draws what an unbroken one draws.
        Ctrl-C or a scheduler's SIGTERM ends the one under way, and save() the run."""

        def stop(number, frame):
            if self.stopping and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun and a scheduler may both send one
                raise KeyboardInterrupt
            self.stopping = True

        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        handlers = {number: signal.signal(number, stop) for number in numbers}
        try:
            for step in self.bar:
                transformers.set_seed((self.args.seed * 1_000_003 + step * 8191 + RANK) % 2**32)
                self.times, self.lap_start = {}, time.perf_counter()
                yield step
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def lap(self, name: str) -> float:
        """Log the seconds since the last lap as time/<name>; returns those since the step began."""
        self.times[f"time/{name}"] = time.perf_counter() - self.lap_start
        self.lap_start = time.perf_counter()
        return sum(self.times.values())

    def log(self, step: int, metrics: dict) -> None:
        """Append a line to metrics.jsonl and show its main figures: numbers as they are, 0-dim tensors summed over all
        processes, the mean of others, without NaN."""
        tensors = {name: value.detach().cpu().double() for name, value in metrics.items() if hasattr(value, "detach")}
        sums = [value.nansum() if value.ndim else value for value in tensors.values()]
        counts = [(~value.isnan()).sum() if value.ndim else 1 / WORLD_SIZE for value in tensors.values()]  # 1 in all
        sums, counts = (total(torch.tensor(x, dtype=torch.float64)) for x in (sums, counts))
        metrics = metrics | dict(zip(tensors, (sums / counts).tolist())) | self.times
        if self.args.device.startswith("cuda"):
            metrics["memory/peak"] = torch.cuda.max_memory_allocated(self.args.device) / 1e9
        self.write("metrics", {"step": step, "time/total": time.perf_counter() - self.start_time} | metrics)
        if self.args.track == "wandb" and RANK == 0:
            sys.modules["wandb"].log(metrics, step=step)
        held_out = {name[5:]: x for name, x in metrics.items() if name.startswith("eval/") and not math.isnan(x)}
        if "eval/truncated" in metrics and held_out.keys() <= {"truncated"}:
            raise SystemExit("--reward: none scored a held-out completion; exact_answer needs a column answer")
        shown = [(label, metrics[name]) for name, label in SHOWN.items() if name in metrics]
        if held_out:
            self.headline, figures = [*held_out.items()][:1], [*held_out.items(), *shown]
            line = "".join(f"  {name} {x:.{3 if abs(x) < 10 else 0}f}" for name, x in figures)
            tqdm.write(f"step {step}{line}  {time.perf_counter() - self.start_time:.0f} s{self.samples}")
            sys.stdout.flush()  # into a log file
        flags = metrics | {"unscored": float(math.isnan(metrics.get("reward/mean", 0.0)))}
        for name in [name for name in self.advice if flags.get(name) == 1.0]:
            tqdm.write(f"step {step}: {self.advice.pop(name)}")
        bar = [*((name[:5], x) for name, x in self.headline), *((label.split()[-1][:6], x) for label, x in shown)]
        bar = [f"{name} {x:.2f}".replace(" 0.", " .") for name, x in bar if name not in ("length", "off")]
        self.bar.set_postfix_str(" ".join([*bar, f"{metrics.get('tokens_per_second', 0):.0f} tok/s"]), refresh=False)

    def log_samples(self, step: int, phase: str, tokenizer, rows: list[dict], texts: list[str], components: dict):
        """Append the completions to samples.jsonl; log() prints one of an evaluation, three of the first and last."""
        self.samples, printed = "", 0 if phase == "train" else 3 if step in (0, self.args.num_steps) else 1
        for index, (row, completion) in enumerate(zip(rows, texts)):
            prompt = tokenizer.decode(prompt_tokens(tokenizer, row))  # what the model read, special tokens included
            scores = {name: values[index].item() for name, values in components.items()}
            self.write("samples", {"step": step, "phase": phase, "prompt": prompt, "completion": completion, **scores})
            if index < printed:
                turns = row["prompt"]
                question = turns if isinstance(turns, str) else text_of([x for x in turns if x["role"] == "user"][-1:])
                short = [x if len(x) <= 150 else f"{x[:70]} ... {x[-70:]}" for x in (repr(question), repr(completion))]
                rewards = " ".join(f"{name} {value:.3g}" for name, value in scores.items() if not math.isnan(value))
                self.samples += f"\n    {short[0]} -> {short[1]} | {rewards}".rstrip("| ")

    def write(self, name: str, record: dict) -> None:
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        print(json.dumps(record, ensure_ascii=False), file=self.files[name], flush=True)

    def save(self, step: int) -> None:
        """Every --save-every steps, at the end and after a Ctrl-C, write all that an exact resume needs."""
        every, stopping = self.args.save_every, any(gather([self.stopping]))
        if not stopping and (every == 0 or (step % every and step < self.args.num_steps)):
            return
        if RANK == 0:
            state = {"step": step, "seconds": time.perf_counter() - self.start_time, "parts": {}}
            state["sizes"] = {name: file.seek(0, os.SEEK_END) for name, file in self.files.items()}
            for name, (model, optimizer) in self.parts.items():
                weights = {key: weight.data for key, weight in model.named_parameters() if weight.requires_grad}
                state["parts"][name] = {"weights": weights, "moments": optimizer and optimizer.state_dict()}
            self.checkpoint.parent.mkdir(exist_ok=True)
            with self.checkpoint.with_suffix(".new").open("wb") as file:
                torch.save(state, file)
                os.fsync(file.fileno())
            os.replace(file.name, self.checkpoint)  # only now that it is whole and on the disk
        if stopping:
            gather([])  # nobody leaves before it is written
            start = "python" if WORLD_SIZE == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            command = f"{start} {sys.argv[0]} --resume '{self.dir.as_posix()}'"
            raise SystemExit(1 if RANK else f"stopped after step {step}; go on with: {command}")

    def finish(self, model, tokenizer) -> dict[str, float]:
        """Save the model, or its adapters, print the closing line, return the last value of each metric."""
        part, adapted = self.dir / "model.part", bool(self.args.lora_rank)
        if RANK == 0:
            tokenizer.save_pretrained(part)
            if adapted and Path(self.args.model, "adapter_config.json").exists():  # peft would load only one of the two
                adapted, model = False, model.adapters[0].merge_and_unload()
            if adapted:
                model.adapters[0].save_pretrained(part, save_embedding_layers=False)
            else:
                own, model.generation_config = model.generation_config, transformers.GenerationConfig()
                model.save_pretrained(part)
                own.to_json_file(part / "generation_config.json")  # not checked, as some in use would be refused
            for file in Path(model.name_or_path).glob("*processor_config.json"):  # of a model that sees or hears
                shutil.copy(file, part)
            shutil.rmtree(self.model, ignore_errors=True)  # that of a run which more --num-steps continued
            os.replace(part, self.model)
        if WORLD_SIZE > 1:
            dist.barrier()  # nobody leaves before all is written
            dist.destroy_process_group()
            time.sleep(0.5)  # while gloo drops its last tensors, or it may abort at exit (pytorch/pytorch#190489)
        rows = [json.loads(line) for line in (self.dir / "metrics.jsonl").open(encoding="utf-8")]
        headline = next(name for name in rows[0] if name.startswith("eval/") and rows[0][name] is not None)
        evaluations = [(row[headline], row["step"]) for row in rows if row.get(headline) is not None]
        (first, _), (last, _) = evaluations[0], evaluations[-1]
        best, step = min(evaluations) if headline == "eval/loss" else max(evaluations)
        peak = f" ({best:.3f} at step {step})" if best != last else ""
        load = " (adapters: --model or peft.AutoPeftModelForCausalLM loads them)" if adapted else ""
        result = f"{first:.3f} -> {last:.3f}{peak} in {rows[-1]['time/total']:.0f} s"
        print(f"{self.name}: held-out {headline[5:]} {result}, model in {self.model}{load}")
        return {name: value for row in rows for name, value in row.items()}
