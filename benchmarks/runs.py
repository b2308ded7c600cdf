"""A table of runs: accuracy before and after, seconds, peak memory of the GPU (0 on a CPU).

python benchmarks/runs.py runs/sft-... runs/ppo-...
"""

import json
from pathlib import Path

import tyro


def main(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    print("| run | steps | before | after | best | seconds | GB |\n|---|---|---|---|---|---|---|")
    for run in runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        headline = next(name for name, value in rows[0].items() if name.startswith("eval/") and value is not None)
        accuracies = [row[headline] for row in rows if headline in row]
        measured = " | ".join(f"{value:.3f}" for value in (accuracies[0], accuracies[-1], max(accuracies)))
        memory = max(row.get("memory/peak", 0) for row in rows)
        print(f"| {run.name} | {rows[-1]['step']} | {measured} | {rows[-1]['time/total']:.0f} | {memory:.2f} |")


if __name__ == "__main__":
    tyro.cli(main)
