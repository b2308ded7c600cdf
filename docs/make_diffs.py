"""Write docs/diffs.html: any two of the scripts next to each other, line by line, with what differs marked.

python docs/make_diffs.py

The lines are aligned here, so that tests can hold the alignment to what it promises; diffs_template.html only draws it.
"""

import ast
import json
import keyword
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, combinations, groupby
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent
SCRIPTS = ("sft", "rejection_sampling", "reinforce", "trpo", "ppo", "grpo", "dpo", "grape")
LADDER = (  # from each algorithm to the next that builds on it
    ("sft", "rejection_sampling"),
    ("rejection_sampling", "reinforce"),
    ("reinforce", "trpo"),
    ("reinforce", "ppo"),
    ("reinforce", "grpo"),
    ("ppo", "grpo"),
    ("grpo", "grape"),
    ("sft", "dpo"),
)
FIRST = ("reinforce", "grpo")  # what the page opens on

ALIKE = 0.5  # two lines that share less of their characters are not versions of one line
CONTEXT = 3  # equal lines that stay in sight on each side of a difference
LEAST_FOLD = 6  # fewer lines than this are shown rather than folded

# Not tokenize: it cuts f-strings up from Python 3.12 on.
STRING = r"""[bBfFrRuU]{0,2}(?:"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
SYNTAX = re.compile(
    r'(?P<comment>#[^\n]*)|(?P<doc>[rR]?"""(?:\\.|[^\\])*?""")'
    rf"|(?P<string>{STRING})|(?:(?<=def )|(?<=class ))(?P<name>\w+)|(?P<keyword>(?:{'|'.join(keyword.kwlist)})\b)|\w+",
    re.DOTALL,
)


def align(left: Sequence[str], right: Sequence[str], score: Callable[[str, str], float]) -> list[tuple[int, int]]:
    """Pairs of positions, ascending in both sequences, whose scores add up to the most; a score of 0 makes no pair.

    Pairs without a gap between them count a little more, so that what is equal stays together and gaps open where they
    are easiest to read, behind a blank. The starts of both sequences count as a pair, and so do their ends.
    """
    bonds = [1.0 if item.strip() else 0.5 for item in left]
    # the most that can follow from two positions on, and the most with these two as a pair; 0 where they make none
    best = [[1.0] * (len(right) + 1) for _ in range(len(left) + 1)]
    paired = [[score(a, b) for b in right] + [0.0] for a in left] + [[0.0] * len(right) + [1.0]]
    for i in reversed(range(len(left))):
        for j in reversed(range(len(right))):
            if paired[i][j]:
                after = paired[i + 1][j + 1]
                paired[i][j] += max(best[i + 1][j + 1], after + bonds[i] if after else 0.0)
            best[i][j] = max(paired[i][j], best[i + 1][j], best[i][j + 1])
    pairs, i, j, bond = [], 0, 0, 1.0
    while i < len(left) and j < len(right):
        if paired[i][j] and paired[i][j] + bond >= best[i][j]:
            pairs.append((i, j))
            i, j, bond = i + 1, j + 1, bonds[i]
        elif best[i][j] == best[i + 1][j]:
            i, bond = i + 1, 0.0
        else:
            j, bond = j + 1, 0.0
    return pairs


@cache
def words(line: str) -> list[str]:
    """A line cut into what is compared as a whole: words, numbers, levels of indentation, other characters."""
    return re.findall(r"\d+(?:\.\d+)*(?:e-?\d+)?|\w+| {4}|\s+|[^\w\s]", line)


@cache
def content(line: str) -> Counter:
    """How many characters a line owes to each of its words, white space aside."""
    counts = Counter(words(line))
    return Counter({word: len(word) * count for word, count in counts.items() if not word.isspace()})


@cache
def likeness(left: str, right: str) -> float:
    """The characters in the words that two lines share, times the part of the lines that they make up."""
    if left == right:
        return len(left.strip()) + 1  # one for the end of the line, so that blank lines go together too
    left_content, right_content = content(left), content(right)
    shared = (left_content & right_content).total()
    part = 2 * shared / max(1, left_content.total() + right_content.total())
    return shared * part if part >= ALIKE else 0.0


def equal(left: str, right: str) -> int:
    """The length of two equal words."""
    return len(left) if left == right else 0


class Piece(NamedTuple):
    """A function or class at the top level, by lines from 0: its decorators, its `def`, and what comes after it."""

    name: str
    start: int
    definition: int
    end: int


def split(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n")


@cache
def pieces(text: str) -> list[Piece]:
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    starts = [min([node, *node.decorator_list], key=lambda n: n.lineno).lineno for node in nodes]
    return [Piece(node.name, start - 1, node.lineno - 1, node.end_lineno) for node, start in zip(nodes, starts)]


def rows(left: str, right: str) -> list[tuple[int | None, int | None]]:
    """All lines of two scripts, from 0, those that go together in one row; functions of one name begin in one row.

    Such functions, where they come in one order, cut both scripts into parts that are aligned part by part. A line
    without a partner, None, stands between its neighbours: the left script's before the right one's.
    """
    left_lines, right_lines = split(left), split(right)
    left_pieces, right_pieces = pieces(left), pieces(right)
    both = align([piece.name for piece in left_pieces], [piece.name for piece in right_pieces], equal)
    definitions = [(left_pieces[a].definition, right_pieces[b].definition) for a, b in both]
    ends = [(left_pieces[a].end, right_pieces[b].end) for a, b in both]
    last = (len(left_lines), len(right_lines))

    pairs = list(definitions)
    starts = sorted([(0, 0), *ends, *((i + 1, j + 1) for i, j in definitions)])
    for (i, j), (i_end, j_end) in zip(starts, sorted([*definitions, *ends, last])):
        pairs += [(i + a, j + b) for a, b in align(left_lines[i:i_end], right_lines[j:j_end], likeness)]

    result, i, j = [], 0, 0
    for a, b in [*sorted(pairs), last]:
        result += [(k, None) for k in range(i, a)] + [(None, k) for k in range(j, b)] + [(a, b)]
        i, j = a + 1, b + 1
    return result[:-1]


def marks(left: str, right: str) -> list[list[tuple[int, int]]]:
    """The words of each of two lines that the other has not, as characters [start, end); without them both are equal.

    White space between two marked words is marked with them: a phrase is easier to read than its words.
    """
    sides = words(left), words(right)
    pairs = align(*sides, equal)
    marked = [set(range(len(side))) - set(places) for side, places in zip(sides, list(zip(*pairs)) or ((), ()))]
    for pair in pairs:
        if sides[0][pair[0]].isspace() and any({at - 1, at + 1} <= alone for at, alone in zip(pair, marked)):
            for at, alone in zip(pair, marked):
                alone.add(at)
    bounds = [list(accumulate(map(len, side), initial=0)) for side in sides]
    return [[(at[k], at[k + 1]) for k in sorted(alone)] for at, alone in zip(bounds, marked)]


def stretches(left: str, right: str) -> list[dict]:
    """The rows as the page draws them, by turns: an `equal` stretch of so many lines, or the `parts` of a difference.

    A part is `changed`, the marks of a line that both scripts have in versions of their own; `only`, how many lines the
    left script has and the right one has not, and the reverse; or `equal`, blank lines, which end no difference.
    """
    left_lines, right_lines = split(left), split(right)

    def kind(row: tuple[int | None, int | None]) -> str:
        if None in row:
            return "only"
        return "equal" if left_lines[row[0]] == right_lines[row[1]] else "changed"

    runs = [(name, list(run)) for name, run in groupby(rows(left, right), kind)]
    result = []
    for at, (name, run) in enumerate(runs):
        at_start, at_end = at == 0, at == len(runs) - 1
        if name == "equal" and (at_start or at_end or any(left_lines[i] for i, _ in run)):
            first, end = 0 if at_start else CONTEXT, len(run) - (0 if at_end else CONTEXT)
            result.append({"equal": len(run)})
            if end - first >= LEAST_FOLD:
                result[-1]["fold"] = [first, end, names(left, run[first][0], run[end - 1][0] + 1)]
            continue
        if at_start or "parts" not in result[-1]:
            result.append({"parts": []})
        if name == "changed":
            parts = [{"changed": marks(left_lines[i], right_lines[j])} for i, j in run]
        elif name == "only":
            missing = sum(j is None for _, j in run)
            parts = [{"only": [missing, len(run) - missing]}]
        else:
            parts = [{"equal": len(run)}]
        result[-1]["parts"] += parts
    return result


def names(text: str, start: int, end: int) -> str:
    """The functions and classes that have some of these lines."""
    return ", ".join(piece.name for piece in pieces(text) if piece.start < end and start < piece.end)


def coloured(text: str) -> list[list]:
    """Each line with the spans [start, end, kind] of its comments, strings, keywords and the names it defines."""
    lines = [[line, []] for line in split(text)]
    starts = list(accumulate((len(line) + 1 for line, _ in lines), initial=0))
    for match in SYNTAX.finditer(text):
        if match.lastgroup:
            number = bisect(starts, match.start()) - 1
            at = match.start() - starts[number]
            for line in match.group().split("\n"):  # docstrings have several
                lines[number][1] += [[at, at + len(line), match.lastgroup]] if line else []
                number, at = number + 1, 0
    return lines


def page(texts: dict[str, str]) -> str:
    """The whole page for scripts by name: the template with the data in it, which no text can break out of."""
    data = {
        "scripts": {name: coloured(text) for name, text in texts.items()},
        "docstrings": {name: ast.parse(text).body[0].end_lineno for name, text in texts.items()},  # where they end
        "pairs": {f"{a}~{b}": stretches(texts[a], texts[b]) for a, b in combinations(texts, 2)},
        "ladder": LADDER,
        "first": FIRST,
    }
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (DOCS / "diffs_template.html").read_text(encoding="utf-8").replace("{{data}}", embedded)


def read() -> dict[str, str]:
    return {name: (DOCS.parent / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}


if __name__ == "__main__":
    output = DOCS / "diffs.html"
    output.write_text(page(read()), encoding="utf-8")
    print(output)
