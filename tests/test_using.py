"""docs/using.md: every example runs, in the order of the page, in a folder that holds what it says one needs."""

import re
import shlex
import shutil
import subprocess

from process import run_python
from test_scripts import REPO


def test_every_example_of_the_page_runs(tmp_path):
    page = (REPO / "docs" / "using.md").read_text()
    blocks = re.findall(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 10
    for path in ("common.py", "sft.py", "reinforce.py", "ppo.py", "grpo.py", "dpo.py"):
        shutil.copy(REPO / path, tmp_path)
    for path in ("models/arithmetic", "examples"):
        shutil.copytree(REPO / path, tmp_path / path)
    for language, file, text in blocks:
        if file:
            (tmp_path / file).write_text(text)
            continue
        commands = [["-c", text]] if language == "python" else map(shlex.split, text.splitlines())
        for command in commands:
            if command[0] in ("-c", "python"):
                done = run_python(*command[command[0] == "python" :], cwd=tmp_path)
            else:
                done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, (text, done.stderr[-2000:])
        if "print" in text:
            assert done.stdout.strip(), text
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"grpo.py", "common.py"}
    assert len(list((tmp_path / "runs").glob("*/model"))) == 8
