"""Draw one or several runs into one picture: the held-out figure, reward, loss, KL, entropy and more, over steps.

python -m pip install matplotlib
python benchmarks/plot.py runs/ppo-...                 writes runs/ppo-.../plot.png
python benchmarks/plot.py runs/ppo-... runs/grpo-...   both in one picture, in the first one's folder

A thin line is what metrics.jsonl has, the thick one its mean over a tenth of the run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {  # the first six that the runs have are drawn
    "reward/mean": "mean reward of the samples",
    "completion/calls": "share of completions that call",
    "loss/sft": "loss, per target token",
    "eval/loss": "held-out loss",
    "loss/dpo": "loss, per pair",
    "reward/margin": "implicit reward, chosen - rejected",
    "logps/chosen": "log-probability of chosen completions",
    "logps/rejected": "log-probability of rejected ones",
    "kl/ref": "KL to the starting model, per token",
    "policy/entropy": "entropy, per token",
    "completion/length": "completion length, tokens",
    "group/zero_std": "prompts whose samples all score the same",
    "grad_norm": "gradient norm",
    "tokens_per_second": "completion tokens per second",
}
COLOURS = ("#0b6e99", "#d1495b", "#66a182", "#8d6a9f", "#e09f3e", "#555555")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # output folders of runs
    labels: tuple[str, ...] = ()  # a name for each; its folder's without it
    output: Path | None = None  # the picture; plot.png in the first run's folder without it


def smooth(values: list[float], width: int) -> list[float]:
    """Means over as many values before and after each as there are, up to half the width."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def main(args: Args) -> None:
    for run in args.runs:
        if not (run / "metrics.jsonl").is_file():
            raise SystemExit(f"{run}: not the folder of a run")
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in args.runs]
    held_out = ([name for name in run[0] if name.startswith("eval/") and run[0][name] is not None] for run in rows)
    headlines = dict.fromkeys(names[0] for names in held_out)  # what the closing line shows
    titles = {name: f"held-out {name[5:]}" for name in headlines} | PANELS
    panels = [name for name in titles if any(row.get(name) is not None for run in rows for row in run)][:6]
    plt.rcParams |= {"font.family": "sans-serif", "font.size": 9, "axes.edgecolor": "#999999", "text.color": "#222222"}
    plt.rcParams |= {"xtick.color": "#666666", "ytick.color": "#666666", "axes.labelcolor": "#666666"}
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.4), constrained_layout=True)
    for axis, name in zip(axes.flat, panels):
        for run, label, colour in zip(rows, args.labels or [run.name for run in args.runs], COLOURS * len(rows)):
            points = [(row["step"], row[name]) for row in run if row.get(name) is not None]
            if not points:
                continue
            steps, values = zip(*points)
            if name in headlines:
                axis.plot(steps, values, "o-", color=colour, linewidth=1.8, markersize=3, clip_on=False, label=label)
            else:
                axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
                axis.plot(steps, smooth(values, len(values) // 10), color=colour, linewidth=1.8, label=label)
        axis.set_title(titles[name], loc="left", fontsize=10)
        if axis.dataLim.ymin >= 0:
            axis.set_ylim(0, 1 if name in headlines and 0.5 < axis.dataLim.ymax <= 1 else 1.05 * axis.dataLim.ymax or 1)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0)
        axis.set_xlabel("step")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
    output = args.output or args.runs[0] / "plot.png"
    figure.savefig(output, dpi=110)
    print(output)


if __name__ == "__main__":
    main(tyro.cli(Args))
