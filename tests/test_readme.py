"""What README.md claims, and that all pages name what exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))

import defaults  # noqa: E402
import peers  # noqa: E402


def test_the_table_is_that_of_the_stored_runs():
    results = json.loads(defaults.RESULTS.read_text())
    assert defaults.START + defaults.table(results) + defaults.END in (REPO / "README.md").read_text()
    assert all(len(results["runs"][name]) == 3 for name in defaults.RUNS)


def test_a_run_is_reduced_to_its_evaluations(tmp_path, monkeypatch):
    """table() and run() on a run made up by hand: completions are steps times prompts times samples."""

    def pretend(command, **settings):
        folder = Path(command[command.index("--output-dir") + 1])
        steps = [{"step": 0, "time/total": 1.234, "eval/exact_answer": 0.25}, {"step": 1, "time/total": 2.0}]
        steps += [{"step": 2, "time/total": 3.0, "eval/exact_answer": 0.75}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        (folder / "args.json").write_text(json.dumps({"prompts_per_step": 3, "samples_per_prompt": 4}))

    monkeypatch.setattr(defaults.subprocess, "run", pretend)
    got = defaults.run(["grpo"], 7)
    assert got == {"seed": 7, "samples": [0, 24], "seconds": [1.23, 3.0], "accuracy": [0.25, 0.75]}
    assert defaults.run(["dpo"], 7)["samples"] == [0, 12]
    runs = {"sft": [got, got | {"accuracy": [0.25, 0.5], "seconds": [1.0, 4.0]}]}
    line = defaults.table({"machine": "here", "runs": runs}).splitlines()[2]
    assert line == "| [sft.py](sft.py) | log-likelihood of demonstrations | 0.25 | 0.50 to 0.75 | 3 to 4 |"


def test_the_stored_runs_show_what_is_claimed():
    runs = json.loads(defaults.RESULTS.read_text())["runs"]
    least = dict.fromkeys(["trpo", "rejection_sampling", "dpo"], 0.8)
    for name in ("sft", "rejection_sampling", "reinforce", "trpo", "ppo", "grpo", "dpo", "grape"):
        assert all(run["accuracy"][0] <= 0.35 for run in runs[name]), name
        assert all(run["accuracy"][-1] >= least.get(name, 0.9) for run in runs[name]), name
        assert all(run["seconds"][-1] <= (180 if name == "trpo" else 120) for run in runs[name]), name
    # confidence weighting and selection buy something: the runs without them all end lower
    for name, control in (("grape", "grape, unweighted"), ("rejection_sampling", "rejection_sampling, random")):
        assert max(run["accuracy"][-1] for run in runs[control]) < min(run["accuracy"][-1] for run in runs[name])


def test_the_table_against_trl_is_that_of_the_stored_rounds():
    results = json.loads(peers.RESULTS.read_text())
    assert peers.START + peers.table(results) in (REPO / "README.md").read_text()
    assert results["runs"].keys() == peers.PEERS.keys() and all(len(r) >= 3 for r in results["runs"].values())
    assert "trl 1.16.0" in results["machine"]


def test_a_row_against_trl_by_hand():
    """Medians of each, and of the ratios of runs that stand next to each other."""
    ours = {"seconds": 0.2, "rollout": 0.05, "update": 0.15, "memory": 400.4, "first_step": 3.0, "accuracy": 0.5}
    rounds = [
        {"ours": ours | {"seconds": own}, "trl": ours | {"seconds": theirs, "memory": 600}}
        for own, theirs in ((0.1, 0.3), (0.2, 0.5), (0.3, 0.6))
    ]
    row = peers.table({"runs": {"grpo": rounds}}).splitlines()[2]
    assert row == (
        "| grpo against GRPO | 0.200 | 0.050 + 0.150 | 0.500 | **2.5x** | 400 / 600 | 3.0 / 3.0 | 0.50 / 0.50 |"
    )


def test_pages_have_their_lines():
    lines = {"README": 150, "CONTRIBUTING": 70, "docs/speed": 90, "docs/scaling": 120, "docs/correctness": 150}
    for page, most in lines.items():
        assert len((REPO / f"{page}.md").read_text().splitlines()) <= most, page


def test_gsm8ks_rows_become_messages_and_the_reward_reads_them():
    page = (REPO / "README.md").read_text()
    (code,) = re.findall(r'^python -c "\n(.*?)" <', page, re.MULTILINE | re.DOTALL)
    line = json.dumps({"question": "How many?", "answer": "Half of 144.\n#### 72"})
    done = subprocess.run(["bash", "-c", f'python3 -c "\n{code}"'], input=line, capture_output=True, text=True)
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["prompt"][0]["role"] == "user" and row["prompt"][0]["content"].startswith("How many?\nThink")
    assert row["completion"] == [{"role": "assistant", "content": "Half of 144.\n#### 72"}]
    assert row["answer"] == "Half of 144.\n#### 72"

    scope = {}
    exec(re.search(r"^```python\n(def brevity.*?)^```", page, re.MULTILINE | re.DOTALL)[1], scope)
    completions = [[{"role": "assistant", "content": text}] for text in ("72", "It is 72")]
    assert scope["brevity"](completions, ["72", "72"], prompts=[[], []]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in REPO.glob("docs/*.md"))]
)
def test_a_page_names_files_that_there_are(page):
    text = (REPO / page).read_text()
    for name in re.findall(r"\b(?:tests|benchmarks|examples|models|docs)/[\w./]*\w", text):
        assert (REPO / name).exists() or name == "docs/diffs.html", name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (REPO / page).parent.joinpath(link).exists(), link
