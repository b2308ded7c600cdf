"""A calculator as tools.py's environment, sums of three digits, and demonstrations that call it now and then.

    python examples/calculator.py

writes into runs/calculator/ demonstrations.jsonl, on which sft.py warms up, and train.jsonl, validation.jsonl and
test.jsonl for tools.py; no two of the files share a sum. A completion with a call, "|" being the stop token: the model
writes " 347 + 285|", the calculator "=632" and a line break, the model "|".

    What is 347 + 285? 347 + 285|=632
    |
"""

import json
import random
import re
from pathlib import Path


class Calculator:
    """Answers a sum of integers with its value; anything else ends the completion."""

    def respond(self, row: dict, text: str) -> str | None:
        written = text.rpartition("\n")[2]  # by the model since the last answer, which ended its line
        if not re.fullmatch(r" *-?\d{1,20}( *[+-] *\d{1,20})+ *", written):
            return None
        terms = re.findall(r"[+-]?\d+", written.replace(" ", ""))
        return f"={sum(map(int, terms))}\n"


def main(folder: Path = Path("runs/calculator"), stop: str = "<|endoftext|>") -> None:
    """Always the same rows; the stop token is that of models/arithmetic."""
    sums = [(a, b) for a in range(100, 500) for b in range(100, 500)]
    random.Random(0).shuffle(sums)
    rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums]
    calls = [f" {a} + {b}" for a, b in sums[:500]]
    demonstrations = [{"prompt": row["prompt"], "completion": call} for row, call in zip(rows, calls)]
    for row, call in list(zip(rows, calls))[::8]:  # only what the model itself writes is learned: here the end
        answered = f"{row['prompt']}{call}{stop}={row['answer']}\n"
        demonstrations.append({"prompt": answered, "completion": stop})
    for row in rows[500:1000]:  # no call: so the model does either, and these sums it cannot do
        demonstrations.append({"prompt": row["prompt"], "completion": f" {row['answer']}"})
    parts = {"validation": rows[1000:1500], "test": rows[1500:2000], "train": rows[2000:12000]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (parts | {"demonstrations": demonstrations}).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


if __name__ == "__main__":
    main()
