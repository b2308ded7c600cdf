"""Draw one or several runs into one picture: accuracy, reward, KL, entropy, length and speed, over steps.

pip install -r benchmarks/requirements.txt
python benchmarks/plot.py runs/ppo-... runs/grpo-... --output docs/run.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "eval/accuracy": "held-out accuracy, greedy",
    "reward/mean": "mean reward of the samples",
    "kl/ref": "KL to the starting model, per token",
    "policy/entropy": "entropy, per token",
    "completion/length": "completion length, tokens",
    "tokens_per_second": "completion tokens per second",
}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """output folders of runs"""
    output: Path = Path("runs.png")
    """the picture"""


def main(args: Args) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), sharex=True, constrained_layout=True)
    for run in args.runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for axis, (name, title) in zip(axes.flat, PANELS.items()):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                marker = "o" if name == "eval/accuracy" else None
                axis.plot(*zip(*points), label=run.name, marker=marker, markersize=4, linewidth=1.6)
            axis.set_title(title, fontsize=10, loc="left")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].set_ylim(0, 1)
    if len(args.runs) > 1:
        axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(args.output, dpi=130)
    print(args.output)


if __name__ == "__main__":
    main(tyro.cli(Args))
