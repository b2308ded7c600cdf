"""The scripts share code by copies: this tells where copies have drifted, and carries one script's to all the others.

python tests/copies.py            tell
python tests/copies.py grpo.py    write grpo.py's copies into the other scripts
"""

import ast
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent
SCRIPTS = ("sft", "rejection_sampling", "reinforce", "trpo", "ppo", "grpo", "dpo", "grape")

# What has one name and is not one text: the scripts that share a version of their own, and why. A script that stands
# nowhere here must have the text that all others without an entry have.
DIFFERENT = {
    "Args": {(script,): "shared fields first, the algorithm's own last" for script in SCRIPTS},
    "main": {(script,): "the loop of the algorithm" for script in SCRIPTS},
    "tokenize": {("sft",): "demonstrations; longer ones are dropped", ("dpo",): "pairs; longer ones are cut off"},
    "evaluate": {("sft",): "the loss of demonstrations, too", ("dpo",): "pairs, too"},
    "compute_advantages": {("grpo", "grape"): "scaled by the group's deviation; the others have baselines"},
    "policy_loss": {
        ("reinforce",): "one update for each rollout, so no ratio",
        ("trpo",): "a ratio, bounded by the line search instead of a clip",
        ("ppo",): "the clipped ratio with an advantage for each token",
        ("grpo",): "the clipped ratio with an advantage for each completion, and its variants",
        ("grape",): "the first of grpo.py's variants alone",
    },
}


def pieces(text: str) -> dict[str, tuple[int, int]]:
    """First and last line, from 0 and exclusive, of each function and class at the top level, decorators included."""
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {
        node.name: (min([node, *node.decorator_list], key=lambda n: n.lineno).lineno - 1, node.end_lineno)
        for node in nodes
    }


def twins(name: str, script: str) -> tuple[str, ...]:
    """The scripts whose version of this piece is the script's, itself included."""
    own = [group for group in DIFFERENT.get(name, {}) if script in group]
    elsewhere = {other for group in DIFFERENT.get(name, {}) for other in group}
    return own[0] if own else tuple(other for other in SCRIPTS if other not in elsewhere)


def drifted(texts: dict[str, str]) -> list[str]:
    """A line for each piece of a script that is not the text of its first twin."""
    found, first = [], {}
    for script, text in texts.items():
        lines = text.splitlines()
        for name, (start, end) in pieces(text).items():
            key = (name, twins(name, script))
            holder, version = first.setdefault(key, (script, lines[start:end]))
            if version != lines[start:end]:
                found.append(f"{script}.py: {name} is not that of {holder}.py")
    return found


def carry(source: str, texts: dict[str, str]) -> dict[str, str]:
    """The texts with the source's pieces in place of their twins."""
    lines = texts[source].splitlines()
    result = dict(texts)
    for name, (start, end) in pieces(texts[source]).items():
        for script in twins(name, source):
            spans = pieces(result[script])
            if name in spans:
                other = result[script].splitlines()
                other[spans[name][0] : spans[name][1]] = lines[start:end]
                result[script] = "\n".join(other) + "\n"
    return result


def read() -> dict[str, str]:
    return {script: (REPO / f"{script}.py").read_text() for script in SCRIPTS}


if __name__ == "__main__":
    before = read()
    if len(sys.argv) > 1:
        for script, text in carry(Path(sys.argv[1]).stem, before).items():
            if text != before[script]:
                (REPO / f"{script}.py").write_text(text)
                print(f"{script}.py: changed")
    sys.exit("\n".join(drifted(read())) or None)
