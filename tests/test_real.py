"""benchmarks/real.py, small: data, warm-up, runs from it, table, completions and picture."""

import shutil
from pathlib import Path

from process import Script

REPO = Path(__file__).parent.parent
ONLY = ["sft", "random", "grpo", "ppo", "trpo", "dpo", "grape-no-std"]


def real(out, *more):
    command = ["benchmarks/real.py", "--quick", "--model", "models/arithmetic", "--output-dir", out, "--only", *ONLY]
    return Script([*command, *more], cwd=REPO).wait(timeout=400)


def test_one_command_trains_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "real"
    done = real(out)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in (out / "table.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["warm-up", *ONLY]
    assert [row[4] for row in rows] == ["none", "none", "8", "16", "16", "8", "none", "16"]  # completions
    assert all(0.1 < float(row[7]) < 10 for row in rows)  # GB of the process
    lines = (out / "completions.md").read_text().splitlines()
    assert "37 + 49 =" in lines[0] and [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["warm-up", *ONLY]
    assert (out / "curves.png").stat().st_size > 10_000
    train = set((out / "data" / "train.jsonl").read_text().splitlines())
    test = set((out / "data" / "test.jsonl").read_text().splitlines())
    assert len(test) == 500 and not test & train

    shutil.rmtree(out / "grpo" / "model")  # as if cut off before its end
    kept = (out / "ppo" / "model" / "config.json").stat().st_mtime_ns
    done = real(out)
    assert done.returncode == 0 and done.stdout.count("grpo: held-out exact_answer") == 1, done.stderr[-2000:]
    assert "ppo: held-out exact_answer" not in done.stdout
    assert (out / "ppo" / "model" / "config.json").stat().st_mtime_ns == kept

    done = real(out, "--num-steps", "9")
    assert done.returncode == 1 and "holds runs of other settings" in done.stderr
