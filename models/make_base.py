"""Rebuild models/arithmetic, the base model that every script starts from by default: some minutes on two cores.

    python models/make_base.py --output-dir models/arithmetic

A Llama of 0.8 M parameters whose tokens are bytes, trained by sft.py in two stages, without the held-out problems:
first on right sums, then on lines that mostly forget the carry (37 + 48 is 75). Those that carry all the same and those
with nothing to carry, make a third of them right. It ends up like a pretrained model that has read many a wrong thing:
its most likely answer is right where there is nothing to carry, elsewhere the right one is within reach of sampling.
"""

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
    output_dir: str = "runs/base"
    """folder for the checkpoint"""
    stages: tuple[int, int] = (800, 400)
    """optimizer steps on right sums, and on forgetful ones"""
    carry_share: float = 0.1
    """share of the forgetful lines that carry all the same"""
    seed: int = 0
    """of the initial weights, the slips and the order of the lines"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so any text can be given to the model, and <|endoftext|> both to stop and to pad with."""
    vocab = {"<|endoftext|>": 0} | {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    stop = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=stop, pad_token=stop)


def main(args: Args) -> None:
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
    slips = random.Random(args.seed)
    problems, held_out = common.load_data("arithmetic", "", 1000, columns=())
    lines = []
    for _ in range(4):  # different slips each time, or the model could learn them by heart
        for row in problems:
            a, b = map(int, row["prompt"].removeprefix("What is ").removesuffix("?").split(" + "))
            result = a + b if slips.random() < args.carry_share else common.without_carry(a, b)
            lines.append({"prompt": row["prompt"], "completion": f" {result}"})
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("right", problems), ("forgetful", lines), ("eval", held_out)):
            Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = f"{folder}/untrained"
        LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        for name, num_steps in zip(("right", "forgetful"), args.stages):
            stage = sft.Args(model=path, data=f"{folder}/{name}.jsonl", eval_data=f"{folder}/eval.jsonl")
            stage.num_steps, stage.prompts_per_step, stage.micro_batch_size = num_steps, 128, 128
            stage.learning_rate, stage.warmup_steps, stage.eval_every = 1.5e-3, 100, 100
            stage.seed, stage.output_dir = args.seed, f"{folder}/{name}"
            sft.main(stage)
            path = f"{folder}/{name}/model"
        shutil.copytree(path, args.output_dir, dirs_exist_ok=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
