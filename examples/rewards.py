"""Rewards to use, and to copy for your own: `--reward examples/rewards.py:math`.

A reward is called by name with prompts, completions, completion_ids (token ids) and each column of the data, one value
for each completion, as by TRL's GRPOTrainer. A completion is a text, or a list of one message where the prompt is a
list of messages. It returns a number for each completion, None where it has none.
"""

import re
import threading

from common import final_answer, text_of


def math(completions: list, answer: list, **columns: list) -> list[float | None]:
    """1.0 where math-verify (`pip install math-verify`) finds the completion equal to the answer; None where it cannot
    read the answer."""
    from math_verify import parse, verify

    limit = 5 if threading.current_thread() is threading.main_thread() else None  # seconds, by a signal
    golds = [f"\\boxed{{{final_answer(str(truth)).strip('$')}}}" for truth in answer]  # as a whole, not its last part
    said = [text_of(x).rpartition("</think>")[2].partition("<think>")[0] for x in completions]  # without thoughts
    golds, said = ([parse(text, parsing_timeout=limit) for text in texts] for texts in (golds, said))
    return [float(verify(gold, x, timeout_seconds=limit)) if gold else None for gold, x in zip(golds, said)]


def format(completions: list, **columns: list) -> list[float]:
    """1.0 where the completion's last line is a number and nothing else, with "####" before it or not."""
    lines = [text_of(completion).strip().rpartition("\n")[2] for completion in completions]
    return [float(re.fullmatch(r"(?:#### ?)?-?\d[\d,]*(?:\.\d+)?", line) is not None) for line in lines]


def length(completions: list, **columns: list) -> list[float]:
    """Minus the completion's length in thousands of characters."""
    return [-len(text_of(completion)) / 1000 for completion in completions]
