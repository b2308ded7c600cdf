"""A table of runs: accuracy before and after, seconds, peak memory.

python benchmarks/runs.py runs/sft-... runs/ppo-...
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """output folders of runs"""


def main(args: Args) -> None:
    print("| run | steps | before | after | best | seconds | GB |\n|---|---|---|---|---|---|---|")
    for run in args.runs:
        metrics = run / "metrics.jsonl"
        if not metrics.is_file() or not metrics.stat().st_size:
            raise SystemExit(f"{run}: not the folder of a run that has measured anything")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
        measured = " | ".join(f"{value:.3f}" for value in (accuracies[0], accuracies[-1], max(accuracies)))
        memory = max(row["memory/peak"] for row in rows)
        print(f"| {run.name} | {rows[-1]['step']} | {measured} | {rows[-1]['time/total']:.0f} | {memory:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
