"""Make preference pairs for dpo.py of a model's own samples: of a prompt a completion that scored most, and one least.

python benchmarks/pairs.py --model runs/sft-.../model --data train.jsonl --output pairs.jsonl
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import rejection_sampling as rs

import tyro
from tqdm import tqdm


@dataclass
class Args:
    model: str  # whose samples they are
    data: str  # as of the scripts; the tenth that they hold out is left out
    output: Path  # .jsonl file of the rows with chosen and rejected
    reward: tuple[str, ...] = ("exact_answer",)  # as of the scripts
    prompts: int = 4000  # to sample from, at most; those whose samples all score the same make no pair
    prompts_per_batch: int = 32  # sampled at a time
    samples_per_prompt: int = 8  # completions of each
    max_new_tokens: int = 256  # tokens in a completion
    temperature: float = 1.0  # of the samples
    truncated: bool = False  # take cut-off samples, too, which dpo.py would end with a stop token that they lack
    seed: int = 1  # of the samples and of the choice among equals
    device: str = "auto"  # auto is CUDA, else MPS, else the CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of forward passes; auto is bfloat16 on CUDA, else float32


def main(args: Args) -> None:
    rows, _ = common.load_data(args.data, "", 1, columns=("prompt",))
    score = common.load_reward(args.reward, ())
    flags = common.check_args(rs.Args(device=args.device, dtype=args.dtype))
    device, autocast = flags.device, common.autocast(flags)
    model, tokenizer = common.load_model(args.model, device)
    common.transformers.set_seed(args.seed)
    random.shuffle(rows)
    rows = rows[: args.prompts]
    common.check_prompts(model, tokenizer, rows, args.max_new_tokens)
    G, pairs = args.samples_per_prompt, 0
    sampling = {"samples_per_prompt": G, "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    with args.output.open("w", encoding="utf-8") as file:
        for start in tqdm(range(0, len(rows), args.prompts_per_batch), desc="pairs"):
            batch = rows[start : start + args.prompts_per_batch]
            prompts = common.prompt_batch(tokenizer, batch, device)
            with autocast:
                completion_ids, completion_mask, _, truncated = rs.rollout(model, *prompts, **sampling)
            texts, ids = common.decode(tokenizer, completion_ids, completion_mask)
            rewards, _ = score([row for row in batch for _ in range(G)], texts, ids)
            rewards[truncated.cpu() & (not args.truncated)] = float("nan")
            for number, (row, scores) in enumerate(zip(batch, rewards.view(-1, G).tolist())):
                said = zip(scores, texts[number * G :])
                ranked = sorted((value, random.random(), text) for value, text in said if value == value)  # without NaN
                if ranked and ranked[0][0] < ranked[-1][0] and ranked[0][2] and ranked[-1][2]:
                    pair = {name: value for name, value in row.items() if value is not None}
                    pair |= {"chosen": ranked[-1][2], "rejected": ranked[0][2]}
                    file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                    pairs += 1
    print(f"{pairs} pairs of {len(rows)} prompts in {args.output}")
    if not pairs:
        raise SystemExit("no prompt had both a better and a worse completion")


if __name__ == "__main__":
    main(tyro.cli(Args))
