"""Run scripts with their defaults over several seeds, in turn: held-out accuracy before and after, and seconds.

python benchmarks/defaults.py
python benchmarks/defaults.py --scripts ppo grpo --seeds 1 2
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

REPO = Path(__file__).parent.parent


@dataclass
class Args:
    scripts: tuple[str, ...] = ("sft", "reinforce", "ppo", "grpo")
    """which scripts"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """which seeds"""
    flags: str = ""
    """further flags for every run"""


def main(args: Args) -> None:
    print("| script | held-out accuracy before | after, each seed | seconds, each seed |\n|---|---|---|---|")
    for script in args.scripts:
        accuracies, seconds = [], []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                flags = ["--seed", str(seed), "--output-dir", folder, *args.flags.split()]
                subprocess.run([sys.executable, REPO / f"{script}.py", *flags], check=True, capture_output=True)
                rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
            accuracies.append([row["eval/accuracy"] for row in rows if "eval/accuracy" in row])
            seconds.append(rows[-1]["time/total"])
        after = ", ".join(f"{accuracy[-1]:.3f}" for accuracy in accuracies)
        took = ", ".join(f"{s:.0f}" for s in seconds)
        print(f"| {script}.py | {accuracies[0][0]:.3f} | {after} | {took} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
