"""A real language model learns by each of the eight scripts, on the CPU of a laptop or on a GPU; not on Windows.

python -m pip install reasoning-gym matplotlib
python benchmarks/real.py
python benchmarks/real.py --model Qwen/Qwen2.5-0.5B-Instruct --output-dir runs/real-qwen --more "--micro-batch-size 32"
python benchmarks/real.py --peer trl        with TRL's trainers beside ours; needs benchmarks/requirements.txt

Makes the data (benchmarks/additions.py), warms the model up with sft.py on 64 demonstrations, and from that one start
trains the other seven on other prompts. Two controls: sft.py on the same demonstrations for longer, and
rejection_sampling.py on samples chosen without looking at the score. Finished runs are skipped; one that was cut off
continues from its last checkpoint. In the end it writes table.md, completions.md and curves.png of all finished runs,
and peers.png of TRL's; docs/results.md shows what came out, and which settings are wrong on purpose.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from defaults import COLORS
from transformers import AutoTokenizer

HERE = Path(__file__).parent
SAMPLED = "--data {data}/train.jsonl --prompts-per-step {prompts} --samples-per-prompt {samples} --micro-batch-size 256"
ADAM = "--learning-rate 2e-5 --warmup-steps 5"
RUNS = {  # name: script and flags, or another run and what it has besides; the first run is where the others start
    "warm-up": "sft --num-steps {warm_steps} --eval-every 4 --learning-rate 5e-5",
    "sft": "sft --data {data}/demonstrations.jsonl --prompts-per-step 32 --learning-rate 2e-5 {longer}",
    "random": "rejection_sampling --strategy random {few}",
    "rejection_sampling": f"rejection_sampling {SAMPLED} {ADAM}",
    "reinforce": f"reinforce {SAMPLED} {ADAM}",
    "grpo": f"grpo {SAMPLED} {ADAM} --beta 0",
    "ppo": f"ppo {SAMPLED} {ADAM} --beta 0 --value-learning-rate 5e-5 --num-epochs 1",
    "trpo": f"trpo {SAMPLED} --max-kl 0.08 --cg-iterations 2",
    "dpo": "dpo --data {data}/pairs.jsonl --prompts-per-step {prompts} --learning-rate 5e-6 --warmup-steps 5 "
    "--beta 0.5",
    "grape": f"grape {SAMPLED} {ADAM} --beta 0 --rubric {{rubric}} --critic-model {{model}}",
    "grape-no-confidence": "grape --confidence-scope none {few}",
    "grape-no-std": "grape --scale none",
    "grpo-too-fast": "grpo --learning-rate 2e-4 {few}",
    "grpo-too-often": "grpo --num-epochs 8 --num-minibatches 4 {few}",
    "dpo-too-loose": "dpo --beta 0.1",
    "reinforce-2": "reinforce --seed 2",
    "grpo-2": "grpo --seed 2",
    "ppo-2": "ppo --seed 2",
    "sft-2": "sft --seed 2",
    "dpo-2": "dpo --seed 2",
}
PEERS = [f"trl-{name}{seed}" for seed in ("", "-2") for name in ("sft", "dpo", "grpo", "reinforce")]  # by real_trl.py
BOTH = "sft trl-sft reinforce trl-reinforce grpo trl-grpo dpo trl-dpo"
PICTURES = {  # file: title: what along x, runs
    "curves.png": {
        "held-out accuracy, greedy": ("minutes", "sft random rejection_sampling reinforce grpo ppo trpo dpo grape"),
        "by completions sampled": ("completions", "random rejection_sampling reinforce grpo ppo trpo grape"),
        "wrong settings": ("steps", "grpo grpo-too-fast grpo-too-often dpo dpo-too-loose"),
    },
    "peers.png": {"held-out accuracy; dashed: TRL": ("steps", BOTH), "by minutes": ("minutes", BOTH)},
}


@dataclass
class Args:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # folder or hub id
    output_dir: Path = Path("runs/real")  # for data, runs, tables and pictures; of one setting each
    num_steps: int = 30  # steps of each run after the warm-up; of sft.py three times as many, as its steps are short
    only: tuple[str, ...] = ()  # names of runs; all of them without it
    peer: Literal["none", "trl"] = "none"  # also the same work by TRL's trainers, "trl-grpo" and the like
    more: str = ""  # further flags of every script, such as "--device cuda --micro-batch-size 32"
    quick: bool = False  # two small steps each, to see that everything runs


def flags_of(name: str) -> str:
    """The script of a run and its flags; a later flag counts where one is there twice."""
    first, _, more = (run := RUNS[name.removeprefix("trl-")]).partition(" ")
    return f"{flags_of(first)} {more}" if first in RUNS and run != RUNS[first] else run


def python(script: Path, *arguments) -> float:
    """Run a script; the most main memory that it had, in GB."""
    process = subprocess.Popen(list(map(str, [sys.executable, script, *arguments])))
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # at which the script ends its step and saves its run
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{script.name} ended with status {process.returncode}; the same command goes on from here")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def evaluations(rows: list[dict]) -> list[tuple[int, float]]:
    """(step, share of the held-out problems that are solved)."""
    return [(row["step"], row["eval/solved"]) for row in rows if "eval/solved" in row]


def minutes_of(rows: list[dict]) -> float:
    """Of a step: the mean, without evaluations. Ours become shorter as groups tie."""
    parts = [[row.get(f"time/{part}", 0) for part in ("rollout", "score", "update")] for row in rows if row["step"]]
    return statistics.mean(map(sum, parts)) / 60


def sequences_of(run: Path) -> int:
    """Sequences in a step of a run."""
    args = json.loads((run / "args.json").read_text(encoding="utf-8"))
    return args["prompts_per_step"] * args.get("samples_per_prompt", 1)


def table(out: Path, names: list[str], problems: int) -> str:
    lines = ["| run | before | after | best | completions | tokens | minutes | GB |", "|" + "---|" * 8]
    for name in names:
        rows = read(out / name / "metrics.jsonl")
        accuracy = [value for _, value in evaluations(rows)]
        error = (accuracy[-1] * (1 - accuracy[-1]) / problems) ** 0.5
        lengths = [row["completion/length"] for row in rows if "time/rollout" in row]
        sequences = sequences_of(out / name)
        drawn = f"{len(lengths) * sequences:,} | {sum(lengths) * sequences:,.0f}" if lengths else "none | none"
        result = f"{accuracy[0]:.3f} | {accuracy[-1]:.3f} ± {error:.3f} | {max(accuracy):.3f}"
        memory = max(row.get("memory/peak") or 0 for row in rows) or float((out / name / "memory").read_text())
        minutes = minutes_of(rows) * rows[-1]["step"]
        lines.append(f"| {name} | {result} | {drawn} | {minutes:.1f} | {memory:.1f} |")
    return "\n".join(lines) + "\n"


def completions(out: Path, names: list[str]) -> str:
    """What each run's model answers to three held-out problems before and after."""
    problems = [row["metadata"]["expression"] for row in read(out / "data" / "test.jsonl")[:3]]
    lines = [f"| run | {' | '.join(problems)} |", "|---|---|---|---|"]
    for name in names:
        rows = [row for row in read(out / name / "samples.jsonl") if row["phase"] == "eval"]
        last = [row for row in rows if row["step"] == rows[-1]["step"]]
        answers = [f"{first['completion']!r}, {then['completion']!r}" for first, then in zip(rows, last)]
        lines.append(f"| {name} | {' | '.join(answers[:3])} |")
    return "\n".join(lines) + "\n"


def draw(out: Path, names: list[str], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {"random": ":", "grpo-too-fast": "--", "grpo-too-often": ":", "dpo-too-loose": "--"}
    panels = PICTURES[file]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels), 4.2), constrained_layout=True)
    for axis, (title, (unit, runs)) in zip(axes, panels.items()):
        for name in [name for name in runs.split() if name in names]:
            rows = read(out / name / "metrics.jsonl")
            scale = {"minutes": minutes_of(rows), "completions": sequences_of(out / name), "steps": 1}[unit]
            points = [(step * scale, value) for step, value in evaluations(rows)]
            color, style = COLORS[flags_of(name).split()[0]], styles.get(name, "--" if name in PEERS else "-")
            axis.plot(*zip(*points), label=name, color=color, linestyle=style, marker="o", markersize=3)
        axis.set(title=title, xlabel=unit, ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(out / file, dpi=110)


def main(args: Args) -> None:
    known = [*RUNS, *PEERS]
    chosen = args.only or (known if args.peer == "trl" else RUNS)
    if unknown := {*chosen} - {*known}:
        raise SystemExit(f"--only: {', '.join(sorted(unknown))}: not among {', '.join(known)}")
    out, data = args.output_dir, args.output_dir / "data"
    prompts, samples, steps, problems = (4, 2, 2, 8) if args.quick else (32, 8, args.num_steps, 500)
    warm_steps, pairs, every = (2, 16, 1) if args.quick else (8, 768 * steps // 30, 10)
    places = {"data": data, "model": args.model, "rubric": HERE.parent / "examples" / "rubrics" / "additions.json"}
    longer = f"--num-steps {3 * steps} --eval-every {3 * every}"
    few = f"--num-steps {max(1, steps // 3)} --eval-every {max(1, every // 2)}"
    sizes = {"prompts": prompts, "samples": samples, "warm_steps": warm_steps, "longer": longer, "few": few}
    reward = ["--reward", f"{HERE / 'additions.py'}:solved", "--max-new-tokens", 6]
    evaluation = ["--eval-data", data / "test.jsonl", "--eval-prompts", problems, "--eval-every", every]

    settings = json.dumps(asdict(args) | {"output_dir": "", "only": "", "more": "", "peer": ""}, indent=2)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "settings.json").exists() and (out / "settings.json").read_text(encoding="utf-8") != settings:
        raise SystemExit(f"--output-dir {out}: holds runs of other settings, see its settings.json; give another one")
    (out / "settings.json").write_text(settings, encoding="utf-8")
    if not (data / "train.jsonl").exists():
        chat = ["--chat"] if AutoTokenizer.from_pretrained(args.model).chat_template else []
        python(HERE / "additions.py", data, *chat)
    failed = []
    for name in dict.fromkeys(["warm-up", *chosen]):
        run, start = out / name, args.model if name == "warm-up" else out / "warm-up" / "model"
        flags = flags_of(name).format(**sizes, **{place: shlex.quote(str(path)) for place, path in places.items()})
        script, *flags = shlex.split(flags)
        flags = ["--model", start, "--num-steps", steps, *reward, *evaluation, "--save-every", 5, *flags]
        if name in PEERS and not (run / "model").exists():  # nothing of it can be resumed
            shutil.rmtree(run, ignore_errors=True)
        flags = ["--resume", run] if (run / "args.json").exists() else [*flags, "--output-dir", run]
        command = [HERE / "real_trl.py", script] if name in PEERS else [HERE.parent / f"{script}.py"]
        try:
            if script == "dpo" and not (data / "pairs.jsonl").exists():  # of the start's own samples
                length = f"{HERE.parent / 'examples' / 'rewards.py'}:length"
                # two steps teach neither right answers nor when to stop
                scored = ["--reward", length, *reward[2:], "--truncated"] if args.quick else reward
                made = ["--model", start, "--data", data / "train.jsonl", "--output", data / "pairs.part", *scored]
                python(HERE / "pairs.py", *made, "--prompts", pairs, "--prompts-per-batch", prompts)
                (data / "pairs.part").rename(data / "pairs.jsonl")
            if not (run / "model").exists():
                memory = python(*command, *flags, *shlex.split(args.more))
                (run / "memory").write_text(f"{memory:.2f}")
            (run / "checkpoint" / "state.pt").unlink(missing_ok=True)  # three times as large as the model
        except SystemExit as error:  # such as too little memory: the others go on
            if name == "warm-up":
                raise
            failed.append(f"{name}: {error}")
    names = [name for name in known if (out / name / "model").exists()]
    (out / "table.md").write_text(table(out, names, problems), encoding="utf-8")
    (out / "completions.md").write_text(completions(out, names), encoding="utf-8")
    print((out / "table.md").read_text(encoding="utf-8"))
    for file in PICTURES if {*PEERS} & {*names} else ("curves.png",):
        draw(out, names, file)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
