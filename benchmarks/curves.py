"""Make the pictures of docs/curves.md and docs/<algorithm>.md: a script's default run beside one that goes wrong.

python -m pip install matplotlib
python benchmarks/curves.py

Takes about twelve minutes on two cores. The runs stay in runs/curves, and a run that is there is not made again.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import plot
import tyro

REPO = Path(__file__).parent.parent
LONG = "grpo --reward exact_answer examples/rewards.py:length --reward-weights 1 -1000 --beta 0 --max-new-tokens 24"
FAILURES = {  # picture: a script and the flags by which it goes wrong
    "sft": "sft --learning-rate 1e-2",
    "rejection_sampling": "rejection_sampling --strategy random",
    "reinforce": "reinforce --learning-rate 2e-3",
    "trpo": "trpo --max-kl 1",
    "ppo": "ppo --learning-rate 2e-3",
    "grpo": "grpo --beta 0 --num-epochs 8 --num-minibatches 4",
    "dpo": "dpo --learning-rate 1e-3",
    "grape": "grape --confidence-scope none",
    "cut_off": "grpo --max-new-tokens 2",
    "length": LONG,
}


@dataclass
class Args:
    pictures: tyro.conf.Positional[tuple[str, ...]] = tuple(FAILURES)  # which of them
    runs: Path = REPO / "runs" / "curves"  # folder of the runs


def main(args: Args) -> None:
    for picture in args.pictures:
        script, *flags = FAILURES[picture].split()
        folders = [args.runs / script, args.runs / f"{picture}-failure"]
        for folder, own in zip(folders, ([], flags)):
            if not (folder / "model").exists():
                command = [sys.executable, f"{script}.py", *own, "--output-dir", str(folder.resolve())]
                subprocess.run(command, cwd=REPO, check=True)
        labels = (f"{script}.py", " ".join([f"{script}.py", *flags]))
        plot.main(plot.Args(tuple(folders), labels, REPO / "docs" / "curves" / f"{picture}.png"))


if __name__ == "__main__":
    main(tyro.cli(Args))
