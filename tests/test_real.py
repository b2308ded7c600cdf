"""benchmarks/real.py, small: data, warm-up, one run of each script from it, table, completions and picture."""

import shutil
from pathlib import Path

from process import run_python

REPO = Path(__file__).parent.parent


def test_one_command_trains_by_each_script_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "real"
    only = ["sft", "random", "rejection_sampling", "reinforce", "grpo", "ppo", "trpo", "dpo", "grape-no-std"]
    command = "benchmarks/real.py", "--quick", "--model", "models/arithmetic", "--output-dir", out, "--only", *only
    done = run_python(*map(str, command), cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["warm-up", *only]
    assert [line.split(" | ")[4] for line in lines[2:]] == ["none", "none", "8", *["16"] * 4, "8", "none", "16"]
    lines = (out / "completions.md").read_text().splitlines()
    assert "37 + 49 =" in lines[0] and [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["warm-up", *only]
    assert (out / "curves.png").stat().st_size > 10_000
    train = set((out / "data" / "train.jsonl").read_text().splitlines())
    test = set((out / "data" / "test.jsonl").read_text().splitlines())
    assert len(test) == 500 and not test & train

    shutil.rmtree(out / "grpo" / "model")  # as if cut off before its end
    shutil.rmtree(out / "grpo" / "checkpoint", ignore_errors=True)
    kept = (out / "reinforce" / "model" / "config.json").stat().st_mtime_ns
    done = run_python(*map(str, command), cwd=REPO)
    assert done.returncode == 0 and done.stdout.count("grpo: held-out accuracy") == 1, done.stderr[-2000:]
    assert "reinforce: held-out accuracy" not in done.stdout
    assert (out / "reinforce" / "model" / "config.json").stat().st_mtime_ns == kept

    done = run_python(*map(str, command), "--num-steps", "9", cwd=REPO)
    assert done.returncode == 1 and "holds runs of other settings" in done.stderr
