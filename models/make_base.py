"""Rebuild models/arithmetic, the base model that every script starts from by default: about four minutes on two cores.

    python models/make_base.py --output-dir models/arithmetic

A Llama of 0.8 M parameters whose tokens are bytes is trained by sft.py on sums that get every carry right in about a
third of the lines and forget them all in the rest (37 + 48 is 85 or 75), without the held-out problems, and stopped
before it knows even that for good. So it answers a third of the problems rightly, and more of them when sampled: the way
a pretrained model has half-learned a thing, for reinforcement learning to bring out.
"""

import json
import random
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
    num_steps: int = 1200
    """optimizer steps"""
    right_share: float = 0.3
    """share of the training lines that carry rightly"""
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
    for _ in range(12):  # different slips each time, or the model would learn them by heart
        for row in problems:
            a, b = map(int, row["prompt"].removeprefix("What is ").removesuffix("?").split(" + "))
            result = a + b if slips.random() < args.right_share else common.without_carry(a, b)
            lines.append({"prompt": row["prompt"], "completion": f" {result}"})
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(f"{folder}/untrained")
        tokenizer.save_pretrained(f"{folder}/untrained")
        for name, rows in (("train", lines), ("eval", held_out)):
            Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sft.main(
            sft.Args(
                model=f"{folder}/untrained",
                data=f"{folder}/train.jsonl",
                eval_data=f"{folder}/eval.jsonl",
                num_steps=args.num_steps,
                prompts_per_step=128,
                micro_batch_size=128,
                learning_rate=1.5e-3,
                warmup_steps=100,
                eval_every=100,
                eval_prompts=1000,
                seed=args.seed,
                output_dir=f"{folder}/run",
            )
        )
        model, tokenizer = common.load_model(f"{folder}/run/model", torch.device("cpu"))
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main(tyro.cli(Args))
