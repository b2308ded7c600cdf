"""Situations that users of other projects reported, each as the kind that it is one of."""

import contextlib
import json
import re
from itertools import product

import common
import dpo
import grape
import grpo
import sft

import pytest
import torch
from conftest import CHAT_TEMPLATE, random_model
from process import run_python
from test_data import CPU, END, SMALL, folder_of, turn, write
from test_scripts import REPO, read_jsonl

# Chat templates after those of well-known families, and the token that ends an answer.
OPENING = "{% if add_generation_prompt %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}" + OPENING
CHATML += "<|im_start|>assistant\n{% if think is false %}<think></think>{% endif %}{% endif %}"
TRIMMED = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
TRIMMED += OPENING + "<assistant>\n\n{% endif %}"
MERGED = "{% set system = messages[0].content if messages[0].role == 'system' %}"  # it goes into the first user turn
MERGED += "{% for m in messages if m.role != 'system' %}<start>{{ m.role }}\n{{ system if system and loop.first }}"
MERGED += "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + OPENING + "<start>assistant\n{% endif %}"
PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
PHI += OPENING + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
CHANNELS = "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
CHANNELS += "<|message|>{{ m.content }}{{ '<|return|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}"
CHANNELS += OPENING + "<|start|>assistant{% endif %}"  # only the beginning of an answer's head
ENDS = {CHATML: "<|im_end|>", TRIMMED: "<|eot_id|>", MERGED: "<end_of_turn>", PHI: "<|end|>", CHANNELS: "<|return|>"}
ENDS |= {CHAT_TEMPLATE: END}
ASK = [turn("user", "2 + 2?")]


def load(tmp_path, tokenizer, template=None):
    """A model whose configuration calls token 7 an end, and none of its template's."""
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": list(ENDS.values())[:5]})
    tokenizer.chat_template = template
    return common.load_model(str(folder_of(tmp_path, tokenizer, random_model("llama", stop_ids=(7,)))), CPU)


@pytest.mark.parametrize("template", ENDS, ids=list(ENDS.values()))
def test_a_demonstration_ends_behind_its_own_words_and_never_within(template, tmp_path, tokenizer):
    model, tokenizer = load(tmp_path, tokenizer, template)
    end, stop_ids = ENDS[template], model.generation_config.eos_token_id
    assert stop_ids == sorted({0, 7, tokenizer.convert_tokens_to_ids(end)})  # where a rollout stops, too
    head = "<|channel|>final<|message|>" if template == CHANNELS else ""
    for answer in ("4", f"say {end} and go on", f"quote {end}", f"{END} or {end}{end}", "4 + 4 + 4"):
        row = {"prompt": ASK}
        for form in (answer, [turn("assistant", answer)]):
            ids = common.completion_tokens(tokenizer, row, form, stop_ids)
            assert tokenizer.decode(ids) == head + answer + end and ids[-1] in stop_ids
        row = {"prompt": common.render(tokenizer, row)}  # rendered beforehand: a text, whose end comes once as well
        assert common.prompt_tokens(tokenizer, row) == common.prompt_tokens(tokenizer, {"prompt": ASK})
        for behind in ("", "\n"):
            assert common.completion_tokens(tokenizer, row, head + answer + end + behind, stop_ids) == ids


TEXTS = (" 4", " 4\n", f" 4{END}", f" 4{END} \n", f"a{END}b{END}", f"{END} opens it", f" texts end in {END} there")


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_text_is_learned_whole_and_ends_once(template, tmp_path, tokenizer):
    model, tokenizer = load(tmp_path, tokenizer, template)
    for text in TEXTS:
        ids = common.completion_tokens(tokenizer, {"prompt": "2 + 2?"}, text, model.generation_config.eos_token_id)
        assert tokenizer.decode(ids) == (text.rstrip() if text.rstrip().endswith(END) else text + END)


WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}
CALL = turn("assistant", "", tool_calls=[WEATHER])
LOST = [(turn("tool", "17 degrees"), "m.role != 'tool'"), (CALL, "not m.tool_calls")]
LOST += [(turn("system", "In French."), "m.role != 'system' or loop.first")]
LOST += [(turn("assistant", "Hello"), "m.role != 'assistant' or loop.last")]
REFUSED = pytest.raises(SystemExit, match="the chat template leaves out")
EACH = "{{ tools | tojson }}{% for m in messages %}{% if WRITTEN %}<{{ m.role }}>"
EACH += "{{ CONTENT }}{% for c in m.tool_calls %}<call>{{ c.function.name }}{% endfor %}{% if m.role == 'assistant' %}"
EACH += END + "{% endif %}{% endif %}{% endfor %}" + OPENING + "<assistant>{% endif %}"


def each(written="true", content="m.content"):
    return EACH.replace("WRITTEN", written).replace("CONTENT", content)


@pytest.mark.parametrize(("lost", "written"), LOST)
def test_a_turn_that_the_template_leaves_out_is_refused(lost, written, tokenizer):
    row = {"prompt": [turn("system", "Be kind."), *ASK, lost, turn("user", "So?")], "tools": [WEATHER]}
    for template, refused in ((each(), contextlib.nullcontext()), (each(written), REFUSED)):
        tokenizer.chat_template = template
        with refused:
            common.prompt_tokens(tokenizer, row)
        with refused:
            common.completion_tokens(tokenizer, row, "A", [0])
    if lost is CALL:
        with REFUSED:
            common.completion_tokens(tokenizer, {"prompt": ASK, "tools": [WEATHER]}, [CALL], [0])


@pytest.mark.parametrize("content", ["m.content | trim", "m.content | tojson", "m.content.split('</think>')[-1]", None])
def test_what_a_template_writes_in_its_own_way_is_not_left_out(content, tokenizer):
    tokenizer.chat_template = each(content=content) if content else MERGED
    thought = turn("assistant", "<think>\nHm, 2 and 2.\n</think>\n\nIt is 4. ")
    result = turn("tool", ' {"degrees": 17,\r\n\t"of": "Ü C:\\\\temp"} ')
    row = {"prompt": [turn("system", " Be kind.\n"), turn("user", " 2 + 2?\n\nNow. "), thought, result, *ASK]}
    assert "Be kind." in common.render(tokenizer, row)
    assert common.completion_tokens(tokenizer, row, "It", [0])


def test_turns_of_weight_0_are_read_and_not_learned(tmp_path, tokenizer):
    model, tokenizer = load(tmp_path, tokenizer, CHATML)
    model.context_length = 512
    bad, last, good = (turn("assistant", text, weight=int(text == "4")) for text in "574")
    again = turn("user", "Sure?")

    def learned(**row):
        examples = sft.tokenize(model, tokenizer, [sft.to_demonstration(row)], sft.Args())
        return [tuple(map(tokenizer.decode, example)) for example in examples]

    expected = [(common.render(tokenizer, {"prompt": [*ASK, bad, again]}), "4<|im_end|>")]
    assert "5" in expected[0][0]
    assert learned(messages=[*ASK, bad, again, good]) == expected
    assert learned(prompt=ASK, completion=[bad, again, good, again, last]) == expected
    for turns, message in (([*ASK, bad], "completion"), ([*ASK, turn("assistant", "4", weight=0.5)], '"weight"')):
        with pytest.raises(SystemExit, match=f"row 1: .*{message}"):
            common.read_rows(write(tmp_path / "d.jsonl", {"messages": turns}), ("completion",), sft.to_demonstration)


def test_several_turns_are_evaluated_by_the_first_answer():
    talk = [*ASK, turn("assistant", "4"), turn("user", "And doubled?"), turn("assistant", "8")]
    row = sft.to_demonstration({"messages": talk})
    assert common.load_reward(("exact_answer",), ())([row] * 3, ["4", "8", "4\n8"])[0].tolist() == [1, 0, 0]


def test_arguments_of_a_call_stay_as_the_row_has_them(tmp_path, tokenizer):
    """Some templates take an object, some a text."""
    tokenizer.chat_template = each().replace("{{ c.function.name }}", "add {{ c.function.arguments is string }}")
    for arguments in ({"a": 2}, '{"a": 2}'):
        call = turn("assistant", "", tool_calls=[{"function": {"name": "add", "arguments": arguments}}])
        data = write(tmp_path / "d.jsonl", {"messages": [*ASK, call]})
        (row,) = common.read_rows(data, ("prompt", "completion"), sft.to_demonstration)
        ids = common.completion_tokens(tokenizer, row, row["completion"], [0])
        assert tokenizer.decode(ids) == f"<call>add {isinstance(arguments, str)}{END}"


def test_the_saved_model_is_served_as_the_first_one_was(tmp_path, tokenizer):
    """transformers refuses to save these settings, as a temperature needs do_sample."""
    folder, saved = folder_of(tmp_path, tokenizer), tmp_path / "run" / "model"
    config = {"temperature": 0.6, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(config))
    sft.main(sft.Args(model=str(folder), output_dir=str(tmp_path / "run"), **SMALL))
    written = json.loads((saved / "generation_config.json").read_text())
    assert {name: written[name] for name in config} == config | {"eos_token_id": [0, 2]}
    assert common.load_model(str(saved), CPU)[0].generation_config.eos_token_id == [0, 2]


def test_a_folder_is_one_runs_before_a_model_is_loaded(tmp_path, monkeypatch):
    """Another process that begins or resumes there ends while this one still loads its model."""
    folder, others, load_model = str(tmp_path / "run"), [], common.load_model

    def load_while_another_starts(*args, **settings):
        others.append(run_python(REPO / "sft.py", *flags, folder, "--num-steps", 2, cwd=REPO))
        return load_model(*args, **settings)

    monkeypatch.setattr(common, "load_model", load_while_another_starts)
    flags = ["--output-dir"]
    sft.main(sft.Args(output_dir=folder, save_every=1, **SMALL))
    flags = ["--resume"]
    sft.main(sft.Args(resume=folder, num_steps=2))
    assert [other.returncode for other in others] == [1, 1]
    assert all(re.search("BlockingIOError|--output-dir", other.stderr) for other in others)
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def test_what_is_evaluated_is_not_what_is_trained(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def prompts(name, source="both"):
        folders = [str(tmp_path / folder) for folder in (source, name)]
        return {row["prompt"] for row in common.load_data(*folders, 100, ("prompt",))[1]}

    for name, splits in {"both": ("train", "test"), "checked": ("train", "validation"), "one": ("train",)}.items():
        (tmp_path / name).mkdir()
        for split in splits:
            write(tmp_path / name / f"{split}.jsonl", *({"prompt": f"{name} {split} {i}"} for i in range(4)))
    assert prompts("both") == {f"both test {i}" for i in range(4)}
    assert prompts("checked", "checked") == {f"checked validation {i}" for i in range(4)}
    assert prompts("one") == {f"one train {i}" for i in range(4)}  # which --data has not
    with pytest.raises(SystemExit, match="has no split test or validation"):
        prompts("one", "one")
    assert "trained on" not in capsys.readouterr().out
    write(tmp_path / "again.jsonl", {"prompt": "both  train 2"}, {"prompt": "new"}, {"prompt": "both train 3\n"})
    prompts("again.jsonl")
    assert "2 of 3 prompts" in capsys.readouterr().out


EXITS = {"called": "def judge(completions, **columns):\n    exit(0)\n", "imported": "raise SystemExit(0)\n"}
EXITS["awaited"] = "async " + EXITS["called"]


@pytest.mark.parametrize(("when", "module"), [*product(EXITS, [False]), ("imported", True)])
def test_exit_in_a_reward_is_an_error(when, module, tmp_path, monkeypatch):
    (tmp_path / "judge_that_exits.py").write_text(EXITS[when])
    monkeypatch.syspath_prepend(tmp_path)
    name = "judge_that_exits:judge" if module else f"{tmp_path}/judge_that_exits.py:judge"
    with pytest.raises(RuntimeError, match=r"exit\(0\)"):
        grpo.main(grpo.Args(reward=(name,), output_dir=str(tmp_path / "run"), **SMALL))


def test_a_critics_question_is_a_message_in_the_rows_own_mode(tmp_path, tokenizer, monkeypatch):
    model, tokenizer = load(tmp_path, tokenizer, CHATML)
    torch.nn.init.zeros_(model.lm_head.weight)  # yes and no are equally likely
    model.context_length, asked, prompt_batch = 200, [], common.prompt_batch

    def spy(tokenizer, rows, device):
        asked.extend(common.render(tokenizer, row) for row in rows)
        return prompt_batch(tokenizer, rows, device)

    monkeypatch.setattr(common, "prompt_batch", spy)
    rows = [{"prompt": ASK, "chat_template_kwargs": {"think": False}}, {"prompt": "1?"}, {"prompt": "long " * 40}]
    answers = grape.ask_critic(model, tokenizer, "Is it right?", rows, ["4", "5", "6"], batch_size=2)  # [2, B]
    assert all(text.startswith("<|im_start|>user\nQuestion: ") for text in asked)
    assert [text.partition("assistant\n")[2] for text in asked][:2] == ["<think></think>", ""]
    assert answers[:, :2].tolist() == [[0.5, 0.5], [0, 0]] and answers[:, 2].isnan().all()


def test_a_question_too_long_for_the_critic_ends_no_run(tmp_path):
    item = {"name": "asked", "weight": 1, "question": "Is it right? " * 80}
    (tmp_path / "r.json").write_text(json.dumps({"category": "a", "items": [item]}))
    metrics = grape.main(grape.Args(rubric=(str(tmp_path / "r.json"),), output_dir=str(tmp_path / "run"), **SMALL))
    assert metrics["step"] == 1 and metrics["reward/asked"] is None


@pytest.mark.parametrize(("steps", "warmup"), [(20, 0), (20, 2), (20, 10), (20, 20), (20, 40)])
def test_a_warm_up_reaches_the_rate(steps, warmup):
    rates = [common.decay(sft.Args(num_steps=steps, warmup_steps=warmup), step) for step in range(1, steps + 1)]
    top = min(warmup, steps)
    assert rates[:top] == pytest.approx([(i + 1) / warmup for i in range(top)]) and max(rates) <= 1
    assert rates[top:] == pytest.approx([(steps - i) / (steps - warmup) for i in range(top, steps)])


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "linear"])
def test_a_stretched_context_is_used_to_its_original_length(kind, tmp_path, tokenizer):
    """Beyond it the longest row of a batch picks the rotary factors of all."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4} if kind == "longrope" else {}
    folder = folder_of(tmp_path, tokenizer, random_model("llama", rope_parameters=rope))
    model, tokenizer = common.load_model(str(folder), CPU)
    assert model.context_length == (64 if kind == "linear" else 16)
    common.check_prompts(model, tokenizer, [{"prompt": "12345678"}], 8)
    rows = [{"prompt": "1234", "completion": n * "5", "chosen": n * "5", "rejected": n * "6"} for n in (11, 40)]
    lengths = {len(p + c) for p, c in sft.tokenize(model, tokenizer, rows, sft.Args())}
    pairs = dpo.tokenize(model, tokenizer, rows, dpo.Args())
    assert max(lengths) == max(len(p + c) for p, (c, _) in pairs) == (45 if kind == "linear" else 16)
    if kind != "linear":
        with pytest.raises(SystemExit, match="the model's context has room for 1 to 8"):
            common.check_prompts(model, tokenizer, [{"prompt": "123456789"}], 8)
