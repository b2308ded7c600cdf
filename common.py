"""What every script needs and no algorithm owns: model loading, data, reward stubs, the bookkeeping of a run.

A mistake that a user can make ends in SystemExit with one line: what is wrong, where, and how to mend it.
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

# Threads spin while they wait for each other, which starves them once a core has other work: benchmarks/openmp.py
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()

Row = dict  # one line of data: "prompt" and any further columns


def bundled(path: str) -> str:
    """The path of a file or folder that comes with the scripts, for a relative path that does not exist here."""
    beside = Path(__file__).parent / path
    return str(beside) if beside.exists() and not Path(path).exists() else path


def load_model(path: str, device: torch.device, named_by: str = "--model"):
    """A causal LM in float32, and its tokenizer, from a checkpoint folder or a hub id.

    Settled here once, so that no script has to think of it:
    - dropout is 0: the log-probs of one completion must come out the same twice (arXiv 2403.17031, detail 5);
    - `generation_config.eos_token_id` becomes the list of all ids that end a completion, the model's and the
      tokenizer's, which differ for Qwen2.5 base (huggingface/trl#7039 shows what comes of knowing only one);
    - logits of a padded vocabulary that no token owns are cut off, for the sampler and the log-probs alike: training
      raises them until one is sampled (vllm-project/vllm#13175).
    """
    path = bundled(path)
    try:
        config = AutoConfig.from_pretrained(path)
        for part in (config, config.get_text_config()):
            for name, value in vars(part).items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # without dtype the checkpoint's own would be loaded, often bfloat16 (huggingface/transformers#42805)
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"{named_by} {path}: not the folder or hub id of a causal language model ({reason})") from None
    eos = model.generation_config.eos_token_id
    stop_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not stop_ids:
        raise SystemExit(f"{named_by} {path}: no stop token; set eos_token_id in its generation_config.json")
    # a new one: with the checkpoint's own sampling fields kept, saving could be refused after the training
    model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(stop_ids), pad_token_id=min(stop_ids))
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits[..., :vocab_size])
    model = model.to(device).eval()
    with torch.no_grad():
        probe = torch.tensor([sorted(stop_ids)], device=device)
        logits = logits_of(model, model.base_model(input_ids=probe).last_hidden_state)
        if not torch.allclose(logits, model(input_ids=probe).logits, atol=1e-3, rtol=1e-3):
            raise SystemExit(
                f"{named_by} {path}: it scales its logits in a way that common.logits_of lacks; add it there"
            )
    return model, tokenizer


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [.., V] of the trunk's hidden states [.., H], as the model's own forward pass has them: load_model checks.

    So logits can be made of some positions at a time, and of none that nobody asks for.
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    scale, scaling = getattr(config, "logit_scale", None) or 1.0, getattr(config, "logits_scaling", 1.0)
    logits = logits * scale / scaling  # Cohere's, Granite's
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
        with open(source, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except json.JSONDecodeError as error:
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
            if not isinstance(row, dict) or not row.get(column) or not isinstance(row[column], str | list):
                raise SystemExit(f'{source}, row {number}: "{column}" is missing or empty, or no text and no messages')
    return rows


def load_data(source: str, eval_source: str, eval_prompts: int, columns: tuple[str, ...]) -> tuple[list, list]:
    """Rows to train on, which must have the columns, and at most `eval_prompts` rows held out.

    Without an `eval_source` a tenth of the prompts is held out, chosen by hash, so that it is the same in each run.
    """
    rows = read_rows(source, columns)
    if eval_source:
        return rows, read_rows(eval_source, ("prompt",))[:eval_prompts]
    digests = [hashlib.md5(json.dumps(row["prompt"]).encode()).hexdigest() for row in rows]
    by_digest = dict(sorted(zip(digests, rows), key=lambda item: item[0]))
    if len(by_digest) < 2:
        raise SystemExit(f"--data {source}: one prompt only, so none can be held out; add rows or give --eval-data")
    held_out = dict(list(by_digest.items())[: max(1, len(by_digest) // 10)])
    train_rows = [row for digest, row in zip(digests, rows) if digest not in held_out]
    return train_rows, list(held_out.values())[:eval_prompts]


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
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)


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
        raise SystemExit('--reward exact_answer: the data has no column "answer"; add it or choose another reward')
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
    loaded = runpy.run_path(str(Path(folder, file))).get(function)
    if loaded is None:
        raise SystemExit(f"{named_by} {name}: {file} has no function {function}")
    return loaded


def call_reward(name: str, function: Callable, rows: list[Row], texts: list[str]) -> list:
    """What a reward function returns for the rows' prompts and the completions' texts, given as TRL gives them."""
    prompts = [row["prompt"] for row in rows]
    # like TRL, a string is answered by a string and a list of messages by a message
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    completions = [text if isinstance(prompt, str) else turn for prompt, text, turn in zip(prompts, texts, turns)]
    columns = dict.fromkeys(column for row in rows for column in row if column != "prompt")
    values = function(prompts, completions, **{column: [row.get(column) for row in rows] for column in columns})
    if len(values) != len(rows):
        raise SystemExit(f"reward {name}: returned {len(values)} values for {len(rows)} completions")
    return values


def call_verifier(name: str, function: Callable, rows: list[Row], texts: list[str]) -> torch.Tensor:
    """Scores and confidences [2, B] by a reward function that returns pairs of them, or scores of confidence 1."""
    values = call_reward(name, function, rows, texts)
    pairs = [value if isinstance(value, tuple | list) else (value, 1.0) for value in values]
    for pair in pairs:
        if len(pair) != 2 or (pair[0] is not None and not 0 <= pair[1] <= 1):
            raise SystemExit(f"verifier {name}: returned {pair}, not a score or (score, confidence from 0 to 1)")
    return torch.tensor([[float("nan") if value is None else float(value) for value in pair] for pair in pairs]).T


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
            components[name] = torch.tensor([float("nan") if value is None else float(value) for value in values])
            total += weight * components[name].nan_to_num()
            scored += ~components[name].isnan()
        return total.where(scored > 0, float("nan")), components

    return score


def load_rubrics(paths: tuple[str, ...]) -> dict[str, list[dict]]:
    """{category: items} of rubric files, grape.py's; the function stands in place of the name of an item's verifier."""
    if not paths:
        raise SystemExit("--rubric: name at least one file")
    rubrics = {}
    for path in map(bundled, paths):
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
                item["verifier"] = load_function(item["verifier"], Path(path).parent, f"--rubric {path}, verifier")
        rubrics[category] = items
    return rubrics


POSITIVE = ("prompts_per_step", "samples_per_prompt", "micro_batch_size", "max_new_tokens", "temperature", "eval_every")
POSITIVE += ("eval_prompts", "num_epochs", "num_minibatches", "fisher_samples", "max_kl")


class Run:
    """The output folder of a run (args.json, metrics.jsonl, samples.jsonl, model/), its seed and its progress bar."""

    def __init__(self, args) -> None:
        for name in POSITIVE:
            if getattr(args, name, 1) <= 0:
                raise SystemExit(f"--{name.replace('_', '-')}: {getattr(args, name)}, but it must be more than 0")
        self.name = Path(sys.modules[type(args).__module__].__file__).stem
        self.dir = Path(args.output_dir or f"runs/{self.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (self.dir / "metrics.jsonl").exists() and (self.dir / "metrics.jsonl").stat().st_size:
            raise SystemExit(f"--output-dir {self.dir}: already holds a run; give another folder or remove it")
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        files = {name: self.dir / f"{name}.jsonl" for name in ("metrics", "samples")}
        self.files = {name: file.open("w", encoding="utf-8") for name, file in files.items()}
        torch.manual_seed(args.seed)
        self.start = time.perf_counter()
        self.last, self.accuracies = {}, []
        self.bar = tqdm(total=args.num_steps, desc=self.name, dynamic_ncols=True)

    def write(self, file: str, record: dict) -> None:
        unwritable = (math.inf, -math.inf)  # and NaN, which JSON has not either
        record = {name: None if value != value or value in unwritable else value for name, value in record.items()}
        self.files[file].write(json.dumps(record, ensure_ascii=False) + "\n")
        self.files[file].flush()

    def log(self, step: int, metrics: dict) -> None:
        """Append a line to metrics.jsonl and show the main figures in the bar."""
        metrics = {name: float(value) for name, value in metrics.items()}
        self.write("metrics", {"step": step, "time/total": time.perf_counter() - self.start, **metrics})
        self.last |= metrics
        self.accuracies += [metrics["eval/accuracy"]] if "eval/accuracy" in metrics else []
        shown = ("reward/mean", "loss/sft", "eval/accuracy", "kl/ref", "tokens_per_second")
        self.bar.set_postfix({name: f"{self.last[name]:.3g}" for name in shown if name in self.last}, refresh=False)
        self.bar.update(step - self.bar.n)

    def log_samples(self, step: int, phase: str, prompts: list[str], completions: list[str], components: dict) -> None:
        """Append as many completions as there are prompts to samples.jsonl, each with every reward component."""
        for index, (prompt, completion) in enumerate(zip(prompts, completions)):
            scores = {name: values[index].item() for name, values in components.items()}
            self.write("samples", {"step": step, "phase": phase, "prompt": prompt, "completion": completion, **scores})

    def finish(self, model, tokenizer) -> dict[str, float]:
        """Save the model, print the closing line, return the last value of each metric."""
        self.bar.close()
        model.save_pretrained(self.dir / "model")
        tokenizer.save_pretrained(self.dir / "model")
        for file in self.files.values():
            file.close()
        accuracy = " -> ".join(f"{self.accuracies[i]:.3f}" for i in (0, -1)) if self.accuracies else "not measured"
        seconds = time.perf_counter() - self.start
        print(f"{self.name}: held-out accuracy {accuracy} in {seconds:.0f} s, model in {self.dir / 'model'}")
        return self.last
