"""The rewards that have a name, and a file to copy for your own: `--reward my_rewards.py:my_reward`.

A reward gets by name what it asks for, as in TRL's GRPOTrainer: prompts, completions, completion_ids (token ids) and
each column of the data, one value for each completion. A completion is a text, or a list of one message where the
prompt is a list of messages. It returns a number for each completion, None where it has none.
"""

import re
import threading
from decimal import Decimal


def text_of(message: str | list[dict]) -> str:
    return message if isinstance(message, str) else "\n".join(turn["content"] for turn in message)


def after_thoughts(text: str) -> str:
    return text.rpartition("</think>")[2].partition("<think>")[0]


def final_answer(text: str) -> str:
    """What follows the last "####", or else is in the last \\boxed{} or <answer>, or else all; without <think>."""
    text = after_thoughts(text)
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}(?![\s\S]*\\boxed)", text)
    marked = re.findall(r"####[ \t]*([^\s#][^\n]*)", text)
    return [text, *tagged, *boxed, *marked][-1].strip()


def to_number(text: str) -> Decimal | None:
    """The number that a text is, with its currency, percent sign or brackets; None if it is not one plain number."""
    text = text.replace("\u2212", "-").replace("{,}", ",")
    text = re.sub(r"\\[()\[\]!,]|\\?[$%]|[€£¥₹]", "", text).strip()
    around = "*_`'\"" if re.match(r"[(\[{].*,", text) else "*_`'\"()[]{}"  # (1,234) is a pair
    text = text.strip(around).rstrip(".,;").strip(around)
    plain = re.fullmatch(r"[-+]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?(?:[eE][-+]?\d{1,3})?", text)
    return Decimal(text.replace(",", "")) if plain else None


def exact_answer(prompts: list, completions: list, **columns: list) -> list[float | None]:
    """1.0 where the completion's final answer is that of the column "answer", or else "completion" or "chosen".

    They are compared as numbers where the true one is a plain number, else as texts. A number may also end the last
    line, behind "is", ":" or the "=" of a sum; for one elsewhere in a sentence there is the reward math.
    """
    truths = [columns[name] for name in ("answer", "completion", "chosen") if name in columns]
    if not truths:
        raise SystemExit('--reward exact_answer: the data has no column "answer"; add it or choose another reward')
    scores = []
    for prompt, completion, *given in zip(prompts, completions, *truths):
        truth = next((truth for truth in given if truth is not None), "")
        truth = text_of(truth) if isinstance(truth, list) and truth and isinstance(truth[0], dict) else truth
        if isinstance(truth, bool) or not isinstance(truth, str | int | float):
            raise SystemExit(f"prompt {str(prompt)[:80]!r}: exact_answer takes a text or a number, not {truth!r:.80}")
        wanted, said = final_answer(str(truth)), final_answer(text_of(completion))
        number, right = to_number(wanted), said.rstrip(".") == wanted.rstrip(".")
        if number is not None:
            parts = re.split(r"\bis:?\s|[A-Za-z*]:\s|^[^A-Za-z<>=]*=", said.rpartition("\n")[2])
            right = len(parts) < 3 and to_number(parts[-1]) == number
        scores.append(float(right) if wanted and truth == truth else None)  # NaN, a missing value, is unequal to itself
    return scores


def math_reward(completions: list, answer: list, **columns: list) -> list[float | None]:
    """1.0 where math-verify finds the completion equal to the answer; None where it cannot read the answer."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise SystemExit("--reward math: needs `pip install math-verify`") from error
    limit = 5 if threading.current_thread() is threading.main_thread() else None  # seconds, by a signal
    wanted = (final_answer(str(truth)).strip("$") for truth in answer)
    golds = [parse(f"\\boxed{{{truth}}}", parsing_timeout=limit) for truth in wanted]  # as a whole, not its last part
    said = [parse(after_thoughts(text_of(completion)), parsing_timeout=limit) for completion in completions]
    return [float(verify(gold, x, timeout_seconds=limit)) if gold else None for gold, x in zip(golds, said)]


def format_reward(completions: list, **columns: list) -> list[float]:
    """1.0 where the completion's last line is a number and nothing else, with "####" before it or not."""
    lines = [text_of(completion).strip().rpartition("\n")[2] for completion in completions]
    return [float(re.fullmatch(r"(?:#### ?)?-?\d[\d,]*(?:\.\d+)?", line) is not None) for line in lines]


def length_reward(completions: list, **columns: list) -> list[float]:
    """Minus the completion's length in thousands of characters."""
    return [-len(text_of(completion)) / 1000 for completion in completions]


REWARDS = {"exact_answer": exact_answer, "math": math_reward, "format": format_reward, "length": length_reward}
