"""Rewards as TRL calls them, and what exact_answer and examples/rewards.py hold to be right."""

import json
import sys
import threading
import time
import types
from pathlib import Path

import common
import grpo

import numpy as np
import pytest
import torch
from test_data import CPU, turn
from test_scripts import REPO

PAIRS = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text().splitlines()]
ROWS = [{"prompt": "What is 37 + 48?", "answer": "85", "completion": " 85"}] * 2
TEXTS, IDS = [" 85", " 75"], [[1, 2, 0], [1, 3, 0]]
EXAMPLES = f"{REPO}/examples/rewards.py"


def own(tmp_path, text, name="mine"):
    (tmp_path / f"{name}.py").write_text(text)
    return f"{tmp_path}/{name}.py"


def scores_of(name, rows=ROWS, texts=TEXTS, ids=IDS):
    return common.load_reward((name,), ())(rows, texts, ids)[0].tolist()


def test_exact_answer_of_cases_from_public_reports():
    """Each row names its source; "0 or 1" are right answers in a form that may be missed, never wrong ones."""
    assert len(PAIRS) == 361 and sum(row["right"] == 0 for row in PAIRS) == 200
    for row in PAIRS:
        got = common.exact_answer([row["completion"]], answer=[row["truth"]])[0]
        assert got == row["right"] or row["right"] == "0 or 1", row


@pytest.mark.parametrize(
    ("truth", "said", "score"),
    [
        (0, " 0", 1),
        (0.0, "0", 1),
        (1e-05, "0.00001", 1),
        (1e16, "10000000000000000", 1),
        (85.0, "85", 1),
        ("", "", None),
        (None, "5", None),
        (float("nan"), "5", None),
        ("so 3 + 4 = 7", "7", 0),  # a sentence is a text
        ("#### 1,200.50", "#### 1200.5", 1),
        ("42", "<think>#### 42", 0),  # cut off in its thoughts
        ("42", "<think>41 or 42</think>so 41", 0),
        ("42", "#### 42\n####", 1),
        ("42", "#### Step 1: Add\n37 + 5\n\nSo \\boxed{42}.", 1),  # a heading
        ("42", "#### Answer\n<answer>42</answer>", 1),
        ("42", "\\boxed{41}, no\n#### 42", 1),
        ("42", r"\boxed{42}, no, \boxed{4", 0),
        ("5", "x<=5", 0),
        ("4", "5 != 4", 0),
        ("6", "a=5,b=6", 0),
        ("85", "37+48=85", 1),
        ("5", "$2+3=5$", 1),
        ("5", "3x=5", 0),
        ("85", "The sum is 85.", 1),
        ("85", "The sum is: 80 or 85", 0),
        ("5", "it comes to $5 and that is it", 0),  # right, but in the midst of a sentence
        ("18", "6 is 3 times 2. It is 18", 0),
        ("5", "Answer: - 5", 0),
        ("5", "3 : 5", 0),
        ("5", "4 divided by 5", 0),
        ("5", "10 \u00b7 5", 0),
        ("5", "5 \\pi", 0),
        ("5", "5 thousands", 0),
        ("5", "x = 4, y = 5", 0),
        ("5", "x is 4 and y is 5", 0),
        ("72", "Sold in all: **72**", 1),
        ("Paris", "Paris.", 1),
        ("Paris", "Rome", 0),
    ],
)
def test_exact_answer(truth, said, score):
    assert common.exact_answer([said], answer=[truth]) == [score]


def test_what_exact_answer_takes_for_the_truth():
    columns = {"answer": ["7"], "completion": ["8"], "chosen": [[turn("assistant", "9"), turn("user", "10")]]}
    for truth in ("7", "8", "9"):
        assert [common.exact_answer([said], **columns)[0] for said in ("7", "8", "9")] == [x == truth for x in "789"]
        del columns[next(iter(columns))]
    for said, score in (("so it is, I say", None), ("so it is", 0.0), ("#### so", 1.0), (" 18", 0.0)):
        assert common.exact_answer(["so"], completion=[said]) == [score]  # a demonstration in free text is no answer
    for nothing in ([18, 18.0], True, {"a": 1}):
        with pytest.raises(ValueError, match="must be a text or a number"):
            common.exact_answer(["18"], answer=[nothing])


def test_rewards_add_up_by_their_weights():
    rows, texts = [{"prompt": "q", "answer": "72"}] * 4, ["48 + 24\n#### 72", "72", "the answer is 72.", "#### 71"]
    names = ("exact_answer", f"{EXAMPLES}:format", f"{EXAMPLES}:length")
    rewards, components = common.load_reward(names, (1.0, 0.5, 0.0))(rows, texts)
    assert components["exact_answer"].tolist() == [1, 1, 1, 0] and components["format"].tolist() == [1, 1, 0, 1]
    assert components["length"].tolist() == pytest.approx([-len(text) / 1000 for text in texts])
    assert rewards.tolist() == [1.5, 1.5, 1.0, 0.5]
    tied, _ = common.load_reward(names, (3, 7, 1))(rows[:1] * 37, texts[:1] * 37)
    assert (tied == tied[0]).all()  # whole numbers as weights; equal to the last bit


LOOPS = ["9", "1.", "-", ",", "#### ", "\\boxed{", "\\boxed{5} ", "a=", "1a ", "5 ", "5 and ", "<<5", "a1+", "$ ", "\n"]
LOOPS += ["<think>", "<answer>", "<answer>5</answer>"]


@pytest.mark.parametrize("text", LOOPS)
def test_rewards_survive_what_a_policy_repeats(text):
    start, names, n = time.perf_counter(), ("exact_answer", f"{EXAMPLES}:format", f"{EXAMPLES}:length"), 10_000
    for hostile in (text * n, text * n + " 5", text * n + "= 5", "5 " + text * n):
        rewards, _ = common.load_reward(names, ())([{"prompt": "q", "answer": "12"}], [hostile])
        assert rewards.isfinite().all()
    assert time.perf_counter() - start < 3


FORMS = """
import functools
def completions_alone(completions, **kwargs):
    return [float(text.strip() == "85") for text in completions]
def other_order(answer, completions, prompts, **kwargs):
    return [float(text.strip() == truth) for text, truth in zip(completions, answer)]
def all_by_name(**kwargs):
    assert kwargs.keys() == {"prompts", "completions", "completion_ids", "answer", "completion"}
    return other_order(**kwargs)
def of_ids(*, completion_ids, **kwargs):
    return [float(ids[1] == 2) for ids in completion_ids]
class Judge:
    def __call__(self, completions, answer, **kwargs):
        return other_order(answer, completions, None)
judge, part = Judge(), functools.partial(other_order)
async def later(completions, answer, **kwargs):
    return other_order(answer, completions, None)
class Later:
    async def __call__(self, **kwargs):
        return await later(**kwargs)
later_object = Later()
def iterator(completions, **kwargs):
    yield from completions_alone(completions)
"""


@pytest.mark.parametrize(
    "name",
    ["completions_alone", "other_order", "all_by_name", "of_ids", "judge", "part", "later", "later_object", "iterator"],
)
def test_a_reward_is_called_by_keyword_whatever_it_is(name, tmp_path):
    assert scores_of(own(tmp_path, FORMS) + f":{name}") == [1.0, 0.0]


def test_a_reward_is_found_as_a_file_with_neighbours_or_in_a_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = types.ModuleType("judges_of_mine")
    module.long = lambda completions, **columns: [float(len(text)) for text in completions]
    monkeypatch.setitem(sys.modules, "judges_of_mine", module)
    module.__getattr__ = {"lazy": module.long}.__getitem__  # as trl.rewards loads a name when it is asked for
    assert scores_of("judges_of_mine:long") == scores_of("judges_of_mine:lazy") == [3.0, 3.0]
    own(tmp_path, "def right(text):\n    return float(text == ' 85')\n", "beside_me")
    text = "from beside_me import right\ndef judge(completions, **columns):\n    return map(right, completions)\n"
    assert scores_of(own(tmp_path, text) + ":judge") == [1.0, 0.0]
    (other := tmp_path / "other").mkdir()
    assert scores_of(own(other, "def judge(**columns):\n    return [5.0, 6.0]\n") + ":judge") == [5, 6]
    assert common.load_function("mine.py:judge", other)() == [5.0, 6.0]  # as a rubric names it, beside itself


def test_messages_are_answered_by_messages_and_none_scores_nothing(monkeypatch):
    def judge(prompts, completions, colour, **columns):
        assert prompts[0] == [turn("user", "q")] and completions[0] == [turn("assistant", "a")]
        return [2.0 if one == "red" else None for one in colour]

    monkeypatch.setattr(common, "judge", judge, raising=False)
    rows = [{"prompt": [turn("user", "q")], "colour": one} for one in ("red", None)]
    rewards, components = common.load_reward(("judge",), (0.5,))(rows, ["a", "b"])
    assert rewards[0] == 1.0 and rewards[1].isnan() and components["judge"][0] == 2.0
    sure = common.load_reward(("judge", "exact_answer"), ())([row | {"answer": "b"} for row in rows], ["a", "b"])[0]
    assert sure.tolist() == [2.0, 1.0]  # what one cannot score counts for nothing in the sum


def test_numbers_of_any_library(monkeypatch):
    values = [np.float32(0.5), np.int64(2), np.bool_(True), torch.tensor(0.25), True, 3]
    for returned in (values, np.array(values, float), torch.tensor(np.array(values, float)), tuple(values)):
        monkeypatch.setattr(common, "r", lambda value=returned, **columns: value, raising=False)
        assert scores_of("r", ROWS * 3, TEXTS * 3, IDS * 3) == [0.5, 2.0, 1.0, 0.25, 1.0, 3.0]


def test_a_reward_changes_nobodys_data(monkeypatch):
    def greedy(prompts, completions, completion_ids, tags, **columns):
        for prompt, completion, ids, tag in zip(prompts, completions, completion_ids, tags):
            assert len(prompt) == 1 and len(tag) == 1
            prompt.append(completion.pop())
            tag.append("seen")
            ids.clear()
        return [1.0] * len(prompts)

    for name in ("first", "second"):
        monkeypatch.setattr(common, name, greedy, raising=False)
    row, ids = {"prompt": [turn("user", "q")], "tags": ["t"]}, [[1], [2]]
    score = common.load_reward(("first", "second"), ())
    for _ in range(2):  # two samples of one prompt, two rewards, twice
        assert score([row, row], ["a", "b"], ids)[0].tolist() == [2.0, 2.0]
    assert row == {"prompt": [turn("user", "q")], "tags": ["t"]} and ids == [[1], [2]]


def test_what_a_run_hands_to_a_reward(tmp_path, monkeypatch):
    """The sampled tokens, the stop token last, without padding; in the main thread, as math-verify stops by a signal,
    which no other gets; without autocast, which would change a reward model's scores."""
    seen, tokenizer = [], common.load_model("models/arithmetic", CPU)[1]

    def judge(prompts, completions, completion_ids, **columns):
        for text, ids in zip(completions, completion_ids):
            assert text == tokenizer.decode(ids, skip_special_tokens=True) and 0 < len(ids) <= 8
            assert 0 not in ids[:-1]
        assert threading.current_thread() is threading.main_thread()
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32
        seen.append(len(prompts))
        return [1.0] * len(prompts)

    monkeypatch.setattr(common, "judge", judge, raising=False)
    small = {"num_steps": 1, "prompts_per_step": 4, "samples_per_prompt": 4, "eval_prompts": 3, "temperature": 3.0}
    grpo.main(grpo.Args(reward=("judge",), output_dir=str(tmp_path / "run"), dtype="bfloat16", **small))
    assert seen == [3, 16, 3]


def test_trls_own_rewards_give_trls_own_scores(tmp_path):
    """The scores are those of TRL's tests/test_rewards.py."""
    pytest.importorskip("trl", reason="trl is in benchmarks/requirements.txt")

    def chat(*texts, **columns):
        rows = [{"prompt": [turn("user", "q")]} for _ in texts]
        for name, values in columns.items():
            rows = [row | {name: value} for row, value in zip(rows, values)]
        return rows, list(texts)

    good = "<think>This is my reasoning.</think>This is my answer."
    bad = "This<think>is my reasoning.</think>\nThis is my answer."
    assert scores_of("trl.rewards:think_format_reward", *chat(good, bad), [[1], [2]]) == [1.0, 0.0]
    texts = [r"\boxed{\frac{63}{400}}", r"\boxed{\frac{64}{400}}", "Answer is forty two."]
    solutions = [r"\frac{63}{400}", r"\frac{63}{400}", "Answer is forty two."]
    right, wrong, unread = scores_of("trl.rewards:accuracy_reward", *chat(*texts, solution=solutions), [[1]] * 3)
    assert (right, wrong) == (1.0, 0.0) and unread != unread
    soft = own(tmp_path, "import trl.rewards\nsoft = trl.rewards.get_soft_overlong_punishment(100, 20)\n", "soft")
    ids = [[1] * 50, [1] * 110, [1] * 90]
    assert scores_of(f"{soft}:soft", *chat("", "", ""), ids) == pytest.approx([0, -1, -0.5], abs=1e-4)


def test_math_verify_knows_equal_answers():
    pytest.importorskip("math_verify")
    pairs = [
        (r"\frac{63}{400}", r"so \boxed{\frac{63}{400}}", 1),
        ("1/2", "it is 0.5", 1),
        ("forty two", r"\boxed{43}", 0),
        ("(4, 3)", "(3, 4)", 0),
        (r"2\sqrt{3}", r"\boxed{2}", 0),  # not the part of it that can be read without its frame
        (r"2\sqrt{3}", r"\boxed{2\sqrt{3}}", 1),
        (r"$x^2+1$", r"\boxed{1+x^2}", 1),
        ("... #### 42", "so 42", 1),
        ("42", r"<think>maybe \boxed{42}", 0),
        ("42", r"<think>\boxed{42}</think>so 43", 0),
    ]
    rows = [{"prompt": "q", "answer": truth} for truth, _, _ in pairs]
    got = scores_of(f"{EXAMPLES}:math", rows, [said for _, said, _ in pairs], [[]] * len(pairs))
    assert got == [right for _, _, right in pairs]
