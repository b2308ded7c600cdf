"""docs/correctness.md and tests/mutations.py hold together with the code: the edits apply, the tests exist."""

import ast

import mutations
import pytest


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.trap)
def test_each_edit_applies_and_its_test_exists(mutation):
    text = (mutations.REPO / mutation.file).read_text()
    assert text.count(mutation.old) == 1 and mutation.new != mutation.old
    ast.parse(text.replace(mutation.old, mutation.new))  # red because it is wrong, not because it is no Python
    file, _, test = mutation.test.partition("::")
    tests = {
        node.name for node in ast.parse((mutations.REPO / "tests" / file).read_text()).body if hasattr(node, "name")
    }
    assert test.partition("[")[0] in tests


def test_the_page_has_the_table_in_which_each_trap_stands_once():
    assert mutations.START + mutations.table() + mutations.END in mutations.PAGE.read_text()
    traps = [trap for mutation in mutations.MUTATIONS for trap in mutation.trap.split(", ")]
    assert len(traps) == len(set(traps))
