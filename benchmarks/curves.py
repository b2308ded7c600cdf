"""Make the pictures of docs/<algorithm>.md: the default run of each script beside one that goes wrong.

python -m pip install matplotlib
python benchmarks/curves.py

Takes about ten minutes on two cores. The runs stay in runs/curves, and a run that is there is not made again.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import plot
import tyro

REPO = Path(__file__).parent.parent
FAILURES = {
    "sft": ("--learning-rate", "1e-2"),
    "rejection_sampling": ("--strategy", "random"),
    "reinforce": ("--learning-rate", "2e-3"),
    "trpo": ("--max-kl", "1"),
    "ppo": ("--learning-rate", "2e-3"),
    "grpo": ("--beta", "0", "--num-epochs", "8", "--num-minibatches", "4"),
    "dpo": ("--learning-rate", "1e-3"),
    "grape": ("--confidence-scope", "none"),
}


@dataclass
class Args:
    scripts: tyro.conf.Positional[tuple[str, ...]] = tuple(FAILURES)  # whose pictures
    runs: Path = REPO / "runs" / "curves"  # folder of the runs


def main(args: Args) -> None:
    for script in args.scripts:
        folders = [args.runs / script, args.runs / "-".join([script, *FAILURES[script]]).replace("---", "-")]
        for folder, flags in zip(folders, ((), FAILURES[script])):
            if not (folder / "model").exists():
                command = [sys.executable, f"{script}.py", *flags, "--output-dir", str(folder.resolve())]
                subprocess.run(command, cwd=REPO, check=True)
        labels = (f"{script}.py", " ".join([f"{script}.py", *FAILURES[script]]))
        plot.main(plot.Args(tuple(folders), labels, REPO / "docs" / "curves" / f"{script}.png"))


if __name__ == "__main__":
    main(tyro.cli(Args))
