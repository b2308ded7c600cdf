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


def test_pages_have_their_lines():
    lines = {"README": 140, "CONTRIBUTING": 70, "docs/speed": 90, "docs/scaling": 120, "docs/correctness": 150}
    for page, most in lines.items():
        assert len((REPO / f"{page}.md").read_text().splitlines()) <= most, page


def test_gsm8ks_rows_become_messages_and_the_reward_reads_them():
    page = (REPO / "docs" / "using.md").read_text()
    (code,) = re.findall(r'^python -c "\n(.*?)" <', page, re.MULTILINE | re.DOTALL)
    line = json.dumps({"question": "How many?", "answer": "Half of 144.\n#### 72"})
    done = subprocess.run(["bash", "-c", f'python3 -c "\n{code}"'], input=line, capture_output=True, text=True)
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["prompt"][0]["role"] == "user" and row["prompt"][0]["content"].startswith("How many?\nThink")
    assert row["completion"] == [{"role": "assistant", "content": "Half of 144.\n#### 72"}]
    assert row["answer"] == "Half of 144.\n#### 72"

    scope = {}
    exec(
        re.search(r"^```python\n(def brevity.*?)^```", (REPO / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1],
        scope,
    )
    completions = [[{"role": "assistant", "content": text}] for text in ("72", "It is 72")]
    assert scope["brevity"](completions, ["72", "72"], prompts=[[], []]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "examples/README.md", *sorted(f"docs/{p.name}" for p in REPO.glob("docs/*.md"))],
)
def test_a_page_names_files_that_there_are(page):
    text = (REPO / page).read_text()
    for name in re.findall(r"\b(?:tests|benchmarks|examples|models|docs)/[\w./]*\w", text):
        assert (REPO / name).exists() or name == "docs/diffs.html", name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (REPO / page).parent.joinpath(link).exists(), link
