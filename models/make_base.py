"""Make models/arithmetic: the sums that every script learns from by default, and the base model that it starts from.

    python models/make_base.py --output-dir models/arithmetic              # some minutes on two cores
    python models/make_base.py --output-dir models/arithmetic --data-only  # the sums alone

A Llama of 0.8 M parameters whose tokens are bytes, trained by sft.py in two stages, without the held-out problems:
first on right sums, then on lines that mostly forget the carry (37 + 48 is 75). Those that carry all the same and those
with nothing to carry, make a third of them right. It ends up like a pretrained model that has read many a wrong thing:
its most likely answer is right where there is nothing to carry, elsewhere the right one is within reach of sampling.
"""

import itertools
import json
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import sft

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass
class Args:
    output_dir: Path = Path("runs/base")  # folder for sums.jsonl and the checkpoint
    data_only: bool = False  # write sums.jsonl, train nothing
    stages: tuple[int, int] = (800, 400)  # optimizer steps on right sums, and on forgetful ones
    carry_share: float = 0.1  # share of the forgetful lines that carry all the same
    seed: int = 0  # of the initial weights, the slips and the order of the lines; sums.jsonl is always the same


def make_sums() -> list[dict]:
    """All sums of two numbers below 100, as prompts with answers, demonstrations and pairs.

    A rejected answer forgets the carry, as the base model mostly does (37 + 48 is "75"), or is off in one digit or two,
    as a coin decides: so a preference for the carry alone does not tell right from wrong.
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


def forgetful(problems: list[dict], args: Args) -> list[dict]:
    """Each problem four times, with different slips, or the model could learn them by heart."""
    slips, lines = random.Random(args.seed), []
    for row in problems * 4:
        a, b = map(int, row["prompt"].removeprefix("What is ").removesuffix("?").split(" + "))
        result = a + b if slips.random() < args.carry_share else without_carry(a, b)
        lines.append({"prompt": row["prompt"], "completion": f" {result}"})
    return lines


def write(rows: list[dict], file: Path) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so any text can be given to the model, and <|endoftext|> both to stop and to pad with."""
    vocab = {"<|endoftext|>": 0} | {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    stop = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=stop, pad_token=stop)


def main(args: Args) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    sums = write(make_sums(), args.output_dir / "sums.jsonl")
    if args.data_only:
        return
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    problems, held_out = common.load_data(sums, "", 1000, columns=())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        eval_data = write(held_out, folder / "eval.jsonl")
        path = str(folder / "untrained")
        LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        for name, rows, num_steps in zip(("right", "slips"), (problems, forgetful(problems, args)), args.stages):
            stage = sft.Args(model=path, data=write(rows, folder / f"{name}.jsonl"), eval_data=eval_data)
            stage.num_steps, stage.prompts_per_step, stage.micro_batch_size = num_steps, 128, 128
            stage.learning_rate, stage.warmup_steps, stage.eval_every = 1.5e-3, 100, 100
            stage.seed, stage.output_dir = args.seed, str(folder / name)
            sft.main(stage)
            path = str(folder / name / "model")
        shutil.copytree(path, args.output_dir, dirs_exist_ok=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
