"""docs/make_diffs.py: its alignment keeps every line, and a browser shows what it should."""

import ast
import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

import make_diffs

TEXTS = make_diffs.read()
PAIRS = [*itertools.combinations(TEXTS, 2), *(pair[::-1] for pair in make_diffs.LADDER)]
CHROME = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)


@pytest.mark.parametrize("left, right", PAIRS)
def test_every_line_has_its_row_and_what_is_not_marked_is_equal(left, right):
    rows, lines = make_diffs.rows(TEXTS[left], TEXTS[right]), [make_diffs.split(TEXTS[name]) for name in (left, right)]
    for side in (0, 1):
        assert [row[side] for row in rows if row[side] is not None] == list(range(len(lines[side])))
    for i, j in (row for row in rows if None not in row):
        marked = make_diffs.marks(lines[0][i], lines[1][j])
        assert without(lines[0][i], marked[0]) == without(lines[1][j], marked[1])


def without(line: str, spans: list) -> str:
    return "".join(c for at, c in enumerate(line) if not any(start <= at < end for start, end in spans))


def test_what_is_similar_goes_together_and_a_new_function_stands_alone():
    left = "def a():\n    total = sum(rewards)\n    return total\n\n\ndef c(one, two):\n    return 3\n"
    right = left.replace("total = sum(rewards)", "print()\n    total = sum(scores)")
    right = right.replace("def c(one, two)", "def b(one, two):\n    return 3\n\n\ndef c()")
    rows = [(0, 0), (None, 1), (1, 2), (2, 3), (3, 4), (4, 5), *((None, k) for k in range(6, 10)), (5, 10), (6, 11)]
    assert make_diffs.rows(left, right) == rows


def first_of_code(left: str, right: str) -> list:
    """The side and the number of the first line behind the docstrings that differs."""
    ends = [ast.parse(text).body[0].end_lineno for text in (left, right)]
    lines = [make_diffs.split(text) for text in (left, right)]
    rows = [row for row in make_diffs.rows(left, right) if None in row or lines[0][row[0]] != lines[1][row[1]]]
    code = [(side, at) for row in rows for side, at in enumerate(row) if at is not None and at >= ends[side]]
    return [("left", "right")[code[0][0]], code[0][1] + 1]


def ask(folder: Path, texts: dict[str, str], script: str, size: str):
    """What a script returns in the page, in Chromium without a window. $$ finds texts."""
    if not CHROME:
        pytest.skip("no browser: apt-get install --no-install-recommends chromium")
    find = "const $$ = (css) => [...document.querySelectorAll(css)].map((node) => node.textContent);"
    script = f"<script>{find} document.body.textContent = JSON.stringify((() => {{ {script} }})())</script>"
    page = folder / "diffs.html"
    page.write_text(make_diffs.page(texts).replace("</body>", script + "</body>"), encoding="utf-8")
    options = f"--headless --no-sandbox --disable-gpu --window-size={size} --user-data-dir={folder} --dump-dom".split()
    dumped = subprocess.run([CHROME, *options, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", dumped, re.DOTALL)[1]))


@pytest.mark.parametrize("size, pairs", [("1400,900", PAIRS), ("500,900", make_diffs.LADDER)])
def test_a_pair_is_whole_opens_at_code_and_fits_the_screen(tmp_path, size, pairs):
    pairs = [[a, b, *first_of_code(TEXTS[a], TEXTS[b])] for a, b in pairs]
    script = f"""return {json.dumps(pairs)}.map(([left, right, side, number]) => {{
        go(left, right);
        const top = document.querySelector(`.${{side}}.line[data-number="${{number}}"]`).getBoundingClientRect().top;
        const opens = top > document.querySelector(".bar").getBoundingClientRect().bottom && top < innerHeight / 2;
        const fits = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
        return [$$(".left.line").join(""), $$(".right.line").join(""), opens, fits];
    }})"""
    for (left, right, *_), seen in zip(pairs, ask(tmp_path, TEXTS, script, size), strict=True):
        assert seen == [TEXTS[left], TEXTS[right], True, True], (left, right)
