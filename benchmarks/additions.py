"""reasoning-gym's basic_arithmetic as data and rewards: sums of two numbers of one or two digits.

python -m pip install reasoning-gym
python benchmarks/additions.py FOLDER           prompts are texts, for a base model
python benchmarks/additions.py FOLDER --chat    prompts are messages, for a model with a chat template

writes demonstrations.jsonl (64 rows), train.jsonl and test.jsonl (500 rows). No problem is in two of them. The messages
have a short system turn in place of the long one that some chat templates add.
"""

import json
import random
import sys
from pathlib import Path

import reasoning_gym


def problems(size, seed):
    settings = {"min_terms": 2, "max_terms": 2, "max_digits": 2, "operators": ["+"], "allow_negation": False}
    return reasoning_gym.create_dataset("basic_arithmetic", size=size, seed=seed, allow_parentheses=False, **settings)


SCORER = problems(1, 0)


def text_of(completion):
    return (completion if isinstance(completion, str) else completion[0]["content"]).strip()


def solved(completions, answer, metadata, **columns):
    """1.0 where reasoning-gym gives full marks; what it gives answers that contain the right one counts for nothing."""
    entries = [{"answer": a, "metadata": m} for a, m in zip(answer, metadata)]
    return [float(SCORER.score_answer(text_of(said), entry) == 1.0) for said, entry in zip(completions, entries)]


def form(completions, **columns):
    """1.0 where the completion is one whole number and nothing else."""
    return [float(text_of(said).isdecimal()) for said in completions]


def main(folder, chat):
    rows = {}  # by problem
    for entry in problems(8000, 1):
        problem, answer = entry["metadata"]["expression"] + " =", entry["answer"]
        turns = [{"role": "system", "content": "Calculate."}, {"role": "user", "content": problem}]
        texts = {"prompt": turns, "completion": answer} if chat else {"prompt": problem, "completion": f" {answer}"}
        rows[problem] = texts | {"answer": answer, "metadata": {"expression": problem}}
    rows = list(rows.values())
    random.Random(0).shuffle(rows)  # or the test would have most of the few problems with one digit, which come early
    splits = {"test": rows[:500], "demonstrations": rows[500:564], "train": rows[564:]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in split)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{len(split)} rows in {folder / name}.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--chat" in sys.argv[2:])
