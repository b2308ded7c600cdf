"""Run all scripts with their defaults over three seeds: the table and the picture in README.md. About 20 minutes.

    pip install -r benchmarks/requirements.txt
    python benchmarks/defaults.py                    # run, write benchmarks/defaults.json, docs/defaults.png, README.md
    python benchmarks/defaults.py --runs ppo grape   # only these again, beside what is in defaults.json
    python benchmarks/defaults.py --runs             # nothing: only write table and picture anew

The machine should have nothing else to do. Two controls are run too: grape.py without its confidences, and
rejection_sampling.py that keeps completions at random.
"""

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

REPO = Path(__file__).parent.parent
RESULTS = REPO / "benchmarks" / "defaults.json"
PICTURE = REPO / "docs" / "defaults.png"
START, END = "<!-- benchmarks/defaults.py writes from here -->\n", "<!-- to here -->\n"
COLORS = {  # of a script in every picture; told apart by the colour-blind, too (Okabe and Ito; Tol's indigo)
    "sft": "#000000", "rejection_sampling": "#e69f00", "reinforce": "#56b4e9", "trpo": "#009e73", "ppo": "#d55e00",
    "grpo": "#0072b2", "dpo": "#cc79a7", "grape": "#332288",
}  # fmt: skip
RUNS = {  # name: script and flags, what it is; a control has more than one word, and no curve
    "sft": (["sft"], "log-likelihood of demonstrations"),
    "rejection_sampling": (["rejection_sampling"], "fine-tune on the best of one's own samples"),
    "reinforce": (["reinforce"], "policy gradient; baseline none, mean or leave-one-out"),
    "trpo": (["trpo"], "natural gradient within an exact KL bound"),
    "ppo": (["ppo"], "clipped updates, value model, GAE, KL in the reward"),
    "grpo": (["grpo"], "group-relative advantages; GRPO, DAPO, Dr. GRPO, GSPO, CISPO"),
    "dpo": (["dpo"], "preference pairs; sigmoid, IPO, hinge, robust, SPPO, SimPO"),
    "grape": (["grape"], "rubrics of verifiers and critics, weighted by confidence"),
    "grape, unweighted": (["grape", "--confidence-scope", "none"], "control: the noisy critic counts in full"),
    "rejection_sampling, random": (["rejection_sampling", "--strategy", "random"], "control: no selection"),
}


@dataclass
class Args:
    runs: tuple[str, ...] = tuple(RUNS)  # which of the runs
    seeds: tuple[int, ...] = (1, 2, 3)  # which seeds


def run(command: list[str], seed: int) -> dict:
    """The evaluations of one run: completions sampled, or shown by the data; seconds; held-out accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*command[1:], "--seed", str(seed), "--output-dir", folder]
        subprocess.run([sys.executable, f"{command[0]}.py", *flags], cwd=REPO, check=True, capture_output=True)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        args = json.loads(Path(folder, "args.json").read_text())
    rows = [row for row in rows if "eval/exact_answer" in row]
    per_step = args["prompts_per_step"] * {"sft": 1, "dpo": 2}.get(command[0], args.get("samples_per_prompt"))
    return {
        "seed": seed,
        "samples": [row["step"] * per_step for row in rows],
        "seconds": [round(row["time/total"], 2) for row in rows],
        "accuracy": [round(row["eval/exact_answer"], 4) for row in rows],
    }


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    return f"{torch.get_num_threads()} threads on {cpu}, {versions}"


def table(results: dict) -> str:
    """The README's table, each figure the lowest and the highest of the seeds."""

    def span(values: list[float], digits: int) -> str:
        low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
        return low if low == high else f"{low} to {high}"

    lines = ["| script | what it is | before | after | seconds |", "|---|---|---|---|---|"]
    for name, (command, what) in RUNS.items():
        runs = results["runs"].get(name, [])
        if runs:
            title = f"[{name}.py]({name}.py)" if name in COLORS else f"`{' '.join([f'{command[0]}.py', *command[1:]])}`"
            before, after = ([run["accuracy"][i] for run in runs] for i in (0, -1))
            seconds = span([run["seconds"][-1] for run in runs], 0)
            lines.append(f"| {title} | {what} | {span(before, 2)} | {span(after, 2)} | {seconds} |")
    count = len(results["runs"]["sft"])
    note = f"Held-out accuracy and seconds, evaluations included, of {count} seeds: lowest to highest. "
    return "\n".join(lines) + f"\n\n{note}{results['machine']}.\n"


def draw(results: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, constrained_layout=True)
    for axis, x, title in zip(axes, ("samples", "seconds"), ("completions sampled (sft, dpo: shown)", "seconds")):
        for name, color in COLORS.items():
            runs = results["runs"].get(name, [])
            if runs:
                xs = [sum(values) / len(values) for values in zip(*(run[x] for run in runs))]
                accuracies = list(zip(*(run["accuracy"] for run in runs)))
                axis.fill_between(
                    xs, [min(a) for a in accuracies], [max(a) for a in accuracies], color=color, alpha=0.15, lw=0
                )
                axis.plot(xs, [sum(a) / len(a) for a in accuracies], color=color, label=f"{name}.py", lw=1.8)
        axis.set_xlabel(title)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0.25, 1)
    axes[0].set_title("held-out accuracy, greedy; mean and range of three seeds", fontsize=10, loc="left")
    axes[1].legend(fontsize=9, frameon=False, loc="lower right")
    figure.savefig(PICTURE, dpi=130)


def main(args: Args) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine(), "runs": {}}
    for seed in args.seeds:  # seed by seed, so that what slows the machine for a while does not hit one script alone
        for name in args.runs:
            if seed == args.seeds[0]:
                results["runs"][name] = []
            results["runs"][name].append(run(RUNS[name][0], seed))
            last = results["runs"][name][-1]
            print(f"{name}, seed {seed}: {last['accuracy'][-1]:.3f} in {last['seconds'][-1]:.0f} s", flush=True)
    if args.runs:
        results["machine"] = machine()
        RESULTS.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    draw(results)
    readme = (REPO / "README.md").read_text()
    before, rest = readme.split(START)
    (REPO / "README.md").write_text(before + START + table(results) + END + rest.split(END)[1])
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args))
