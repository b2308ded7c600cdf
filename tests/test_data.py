"""What users bring as data, tokenizers and models works as they mean it, or ends in one line before any work."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import builtin_rewards
import common
import dpo
import grpo
import sft

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, random_model
from safetensors.torch import load_file, save_file
from test_scripts import REPO

CPU = torch.device("cpu")
SMALL = {"num_steps": 1, "prompts_per_step": 2, "eval_prompts": 2}
TOOLS = "{% if tools %}<tools>{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}{% endif %}"
TOOLS += "{% if style %}<{{ style }}>{% endif %}" + CHAT_TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}{% endif %}"
)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def write(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return str(path)


def rows_of(path, module=None):
    prepare = {sft: sft.to_demonstration, dpo: dpo.to_pair}.get(module)
    columns = {sft: ("prompt", "completion"), dpo: ("prompt", "chosen", "rejected")}.get(module, ("prompt",))
    return common.read_rows(path, columns, prepare)


@pytest.fixture
def chat(tokenizer):
    tokenizer.chat_template = TOOLS
    return tokenizer


def said(tokenizer, row):
    """What sft.py would train of a row: each prompt and its target, as texts."""
    pairs = []
    for part, answer in sft.assistant_turns(sft.to_demonstration(row)):
        prompt = common.prompt_tokens(tokenizer, part)
        pairs.append((prompt, common.completion_tokens(tokenizer, part, answer, [0])))
    return [tuple(map(tokenizer.decode, pair)) for pair in pairs]


END = "<|endoftext|>"
A, B = [turn("assistant", "A")], [turn("assistant", "B")]


def test_every_turn_of_the_assistant_is_learned_and_no_other(chat):
    talk = [turn("system", "s"), turn("user", "a"), turn("assistant", "A"), turn("user", "b"), turn("assistant", "B")]
    first = "<system>s<user>a<assistant>"
    expected = [(first, f"A{END}"), (f"{first}A{END}\n<user>b<assistant>", f"B{END}")]
    assert said(chat, {"messages": talk}) == expected
    assert said(chat, {"prompt": talk[:2], "completion": talk[2:]}) == expected
    assert said(chat, {"prompt": "a", "completion": None, "messages": talk}) == expected  # as ultrachat has both
    assert said(chat, {"prompt": "a", "completion": talk[2:]})[1] == (
        f"<user>a<assistant>A{END}\n<user>b<assistant>",
        f"B{END}",
    )
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    tools = [turn("user", "a"), turn("assistant", "", tool_calls=call), turn("tool", "2"), turn("assistant", "two")]
    calls = said(chat, {"messages": tools})
    assert [target for _, target in calls] == [f"<call>add{END}", f"two{END}"]
    assert calls[1][0].endswith("<tool>2<assistant>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [turn("user", "a")]}, 'row 2: "completion" is missing or empty'),
        (
            {"prompt": "a", "completion": [turn("user", "a"), turn("assistant", "b")]},
            'row 2: "completion" is user, assistant: it must begin',
        ),
        ({"messages": [turn("user", "a"), *A, *B]}, 'row 2: "completion" is assistant, assistant'),
        ({"prompt": "a", "completion": [turn("assistant", "", tool_calls=[])]}, "row 2: neither a text nor messages"),
        ({"prompt": "a", "completion": [turn("assistant", "")]}, "row 2: neither a text nor messages with role"),
        ({"prompt": "a", "completion": [{"from": "gpt", "value": "b"}]}, "row 2: neither a text nor messages"),
        ({"prompt": "a", "completion": 85}, "row 2: neither a text nor messages with role and content: 85"),
        ({"text": "a b"}, 'row 2: "prompt" is missing or empty'),
        ({"prompt": [turn("user", [{"type": "image"}])], "completion": "b"}, "row 2: neither a text nor messages"),
    ],
)
def test_demonstrations_that_are_none_are_refused_by_row(row, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        rows_of(write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, row), sft)


def pair(row):
    return tuple(dpo.to_pair(row)[name] for name in ("prompt", "chosen", "rejected"))


ASKED = [turn("user", "a"), turn("assistant", "x"), turn("user", "b")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": " A", "rejected": " B"}, ("a", " A", " B")),
        ({"prompt": "a", "chosen": "aA", "rejected": "aB"}, ("a", "aA", "aB")),  # a word may be chance, a sentence not
        ({"prompt": "What is a?", "chosen": "What is a? A", "rejected": "What is a? B"}, ("What is a?", " A", " B")),
        (
            {"prompt": "你好吗\uff1f", "chosen": "你好吗\uff1f好", "rejected": "你好吗\uff1f不"},
            ("你好吗\uff1f", "好", "不"),
        ),
        ({"prompt": ASKED, "chosen": A, "rejected": B}, (ASKED, A, B)),
        ({"chosen": ASKED + A, "rejected": ASKED + B}, (ASKED, A, B)),
        ({"prompt": ASKED, "chosen": ASKED + A, "rejected": ASKED + B}, (ASKED, A, B)),
        ({"prompt": "b", "chosen": [turn("user", "b"), *A], "rejected": [turn("user", "b"), *B]}, ("b", A, B)),
        ({"prompt": "a", "chosen": "A", "rejected": B}, ("a", A, B)),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: I say A", "rejected": "\n\nHuman: a\n\nAssistant: I say B"},
            ("\n\nHuman: a\n\nAssistant:", " I say A", " I say B"),
        ),
    ],
)
def test_pairs_with_the_prompt_apart_or_within(row, expected):
    assert pair(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "The sky is blue", "rejected": "The sky is red"}, '"prompt" is missing or empty'),
        (
            {"chosen": ASKED + A, "rejected": [*ASKED, *A, turn("user", "c"), *B]},
            '"chosen" is not one answer|"rejected"',
        ),
        (
            {"prompt": "other", "chosen": ASKED + A, "rejected": ASKED + B},
            '"chosen" is not one answer of the assistant',
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: A",
                "rejected": "\n\nHuman: a\n\nAssistant: B",
            },
            '"chosen" is not one answer',
        ),
        (
            {"prompt": "a", "chosen": A, "rejected": [turn("user", "B")]},
            '"rejected" is not one answer of the assistant',
        ),
    ],
)
def test_pairs_that_are_none_are_refused_by_row(row, message, tmp_path):
    with pytest.raises(SystemExit, match=f"row 1: ({message})"):
        rows_of(write(tmp_path / "d.jsonl", row), dpo)


def test_what_a_chat_prompt_becomes(chat):
    def read(**row):
        return chat.decode(common.prompt_tokens(chat, row))

    tool = {"type": "function", "function": {"name": "add"}}
    ask = [turn("user", "a")]
    assert read(prompt="a") == read(prompt=ask) == read(prompt=ask, tools=[]) == "<user>a<assistant>"
    with_tool = '<tools>{"name": "add"}<user>a<assistant>'
    assert read(prompt=ask, tools=[tool]) == read(prompt=ask, tools=json.dumps([tool])) == with_tool
    assert read(prompt=ask, tools=[tool | {"other": None}]) == with_tool  # Arrow fills in what another row has
    assert read(prompt=ask, chat_template_kwargs={"style": "short"}) == "<short><user>a<assistant>"
    assert read(prompt=[*ask, turn("assistant", "I say ")]) == "<user>a<assistant>I say "  # begun, so it goes on
    done = [*ask, turn("assistant", "I say ")], "A"
    assert chat.decode(common.completion_tokens(chat, *done, [0])) == f"A{END}"
    for rendered in ("<system>s<user>a<assistant>", "<user>a<assistant><think>"):
        assert read(prompt=rendered) == rendered
        assert chat.decode(common.completion_tokens(chat, rendered, "A", [0])) == f"A{END}"
    for asked in ("does <assistant> mean me?", f"what is {END}?"):
        assert read(prompt=asked) == f"<user>{asked}<assistant>"
    assert read(prompt=ask, chat_template_kwargs={"style": None}) == "<user>a<assistant>"
    call = [{"function": {"name": "add", "arguments": '{"a": 1}'}}]  # OpenAI's form, which templates would quote twice
    assert common.to_turns([turn("assistant", None, tool_calls=call)])[0]["tool_calls"][0]["function"] == {
        "name": "add",
        "arguments": {"a": 1},
    }
    parts = common.to_turns([turn("user", [{"type": "text", "text": "a"}], name=None), turn("system", "")])
    assert parts == [turn("user", "a"), turn("system", "")]


def test_a_template_that_rewrites_an_answer_is_refused(chat):
    chat.chat_template = CHAT_TEMPLATE.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")
    with pytest.raises(SystemExit, match="prompt '<user>a<assistant>': the chat template does not write its answer"):
        common.completion_tokens(chat, "a", "<think>b</think>c", [0])
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    for lost in ({"tool_calls": [call]}, {"reasoning_content": "hm"}):
        with pytest.raises(SystemExit, match="does not write its answer"):
            common.completion_tokens(chat, "a", [turn("assistant", "A", **lost)], [0])


def test_a_rendered_prompt_gets_the_bos_and_the_stop_that_its_template_writes(tokenizer):
    """As Gemma's: the end of a turn is not EOS, and users strip BOS, as most tokenizers add it."""
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<eot>"]})
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE.replace(END, "<eot>")
    for rendered in ("<bos><user>a<assistant>", "<user>a<assistant>"):
        ids = common.prompt_tokens(tokenizer, rendered)
        assert ids == common.prompt_tokens(tokenizer, "a") and tokenizer.decode(ids).startswith("<bos><user>")
        stop = tokenizer.convert_tokens_to_ids("<eot>")
        target = common.completion_tokens(tokenizer, rendered, "A", [0, stop])
        assert target == common.completion_tokens(tokenizer, "a", "A", [0, stop]) and target[-1] == stop


GOOD = {"prompt": "a", "answer": "1"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "d.jsonl",
            b'\xef\xbb\xbf{"prompt": "a", "answer": "1"}\r\n\r\n{"prompt": "\xc3\xa9\xe2\x80\xa8x", "answer": "2"}\r\n',
        ),
        ("d.json", '\ufeff[{"prompt": "a", "answer": "1"},\n {"prompt": "é\u2028x", "answer": "2"}]'.encode()),
        ("d.txt", '{"prompt": "a", "answer": "1"}\n{"prompt": "é\u2028x", "answer": "2"}'.encode()),
    ],
)
def test_files_of_other_systems(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert rows_of(str(tmp_path / name)) == [GOOD, {"prompt": "é\u2028x", "answer": "2"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "answer": NaN}', "d.jsonl, row 2: Out of range float values"),
        (b'{"prompt": "a \\ud83d"}', "d.jsonl, row 2: .*surrogates not allowed"),
        (b'{"prompt": "a', "d.jsonl: Unterminated string starting at: line 2"),
        (b'{"prompt": "\xff"}', "d.jsonl: 'utf-8' codec"),
        (b'"text"', "d.jsonl, row 2: 'str' object has no attribute"),
    ],
)
def test_rows_that_no_tokenizer_or_log_could_take(line, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as caught:
        rows_of(write(tmp_path / "d.jsonl", GOOD, line))
    assert "\n" not in caught.value.code


def test_tables_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    tool = {"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}
    rows = [
        {"prompt": [turn("user", "a")], "tools": [tool], "answer": 1},
        {"prompt": [turn("assistant", None, tool_calls=[{"id": "x"}]), turn("user", "b")], "tools": [], "answer": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    read = rows_of(str(tmp_path / "d.parquet"))
    assert [row["prompt"] for row in read] == [
        [turn("user", "a")],
        [turn("assistant", "", tool_calls=[{"id": "x"}]), turn("user", "b")],
    ]
    assert [row["answer"] for row in read] == [1, None]
    (tmp_path / "d.csv").write_text('prompt,answer\n"a, b",85\nc,\n', encoding="utf-8-sig")
    read = rows_of(str(tmp_path / "d.csv"))
    assert [row["prompt"] for row in read] == ["a, b", "c"]
    assert builtin_rewards.exact_answer(["q"] * 2, ["85", "85"], answer=[row["answer"] for row in read]) == [1.0, None]
    with pytest.raises(SystemExit, match=r"missing\.csv: "):
        rows_of(str(tmp_path / "missing.csv"))


def test_data_that_needs_datasets_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (write(tmp_path / "d.csv", b"prompt"), "openai/gsm8k:main"):
        with pytest.raises(SystemExit, match="needs `pip install datasets`"):
            rows_of(source)


@pytest.fixture
def sentencepiece():
    """As Llama 2's: a token for each character, merges, and a space put before each text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    characters = "\u2581\nabcdefghijklmnopqrstuvwxyz0123456789+=:"
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *characters, "\u2581y", "\u2581a", "=4"])}
    backend = Tokenizer(models.BPE(vocab, [("\u2581", "y"), ("\u2581", "a"), ("=", "4")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("2+2:", "4 apples", ["4", "\u2581a", *"pples"]),  # no space that the data has not
        ("2+2=", "4", ["4"]),  # "=4" is one token, which no rollout could sample after "="
        ("say ", "yes", [*"yes"]),  # nor "\u2581y" after "\u2581"
        ("say", " yes", ["\u2581y", *"es"]),
    ],
)
def test_targets_are_what_a_rollout_could_sample(sentencepiece, prompt, completion, tokens):
    start = common.prompt_tokens(sentencepiece, prompt)
    ids = common.completion_tokens(sentencepiece, prompt, completion, [1])
    assert sentencepiece.convert_ids_to_tokens(ids) == [*tokens, "</s>"]
    assert sentencepiece.decode(start + ids[:-1]) == prompt + completion


def test_a_tokenizer_that_ends_each_text_ends_no_prompt(tokenizer):
    from tokenizers.processors import TemplateProcessing

    plain = common.prompt_tokens(tokenizer, "hi")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    assert tokenizer("hi").input_ids[-1] == 0
    assert common.prompt_tokens(tokenizer, "hi") == plain


def test_a_tokenizer_without_end_of_sequence_learns_the_models(tokenizer):
    tokenizer.eos_token = None
    assert common.completion_tokens(tokenizer, "hi", " yes", [7])[-1] == 7


def folder_of(tmp_path, tokenizer, model=None):
    folder = tmp_path / "m"
    (model or random_model("llama")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("module", [sft, dpo, grpo])
def test_tokens_beyond_the_embedding_are_refused_before_any_work(module, tmp_path, tokenizer):
    tokenizer.add_tokens([f"<x{i}>" for i in range(60)] + ["<bot>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = folder_of(tmp_path, tokenizer)
    rows = [{"prompt": p, "completion": "<bot>", "chosen": "<bot>", "rejected": "c", "answer": "1"} for p in ("a", "b")]
    if module is grpo:
        rows = [row | {"prompt": f"<bot>{row['prompt']}"} for row in rows]
    data = write(tmp_path / "d.jsonl", *rows)
    args = module.Args(model=str(folder), data=data, output_dir=str(tmp_path / "run"), **SMALL)
    with pytest.raises(SystemExit, match="the tokenizer's <bot> is 317, but the embedding has 300 rows"):
        module.main(args)
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, tokenizer):
    folder = folder_of(tmp_path, tokenizer)
    weights = load_file(folder / "model.safetensors")

    def refused(new):
        save_file(new, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(SystemExit) as caught:
            common.load_model(str(folder), CPU)
        return caught.value.code

    message = refused({f"_orig_mod.{name}": tensor for name, tensor in weights.items()})
    assert "'missing_keys': ['lm_head.weight'" in message and "'unexpected_keys': ['_orig_mod.lm_head.wei" in message
    name = "model.layers.1.mlp.down_proj.weight"
    assert f"'missing_keys': ['{name}']" in refused({key: tensor for key, tensor in weights.items() if key != name})
    assert "'mismatched_keys': " in (message := refused(weights | {name: weights[name][:, :-1].contiguous()}))
    assert name in message
    assert "'unexpected_keys': ['value_head']" in refused(weights | {"value_head": torch.ones(1)})
    buffers = {"model.layers.0.attn.masked_bias": torch.ones(1), "model.layers.0.attn.bias": torch.ones(1)}
    save_file(weights | buffers, folder / "model.safetensors", {"format": "pt"})  # as old GPT-2 files have them
    common.load_model(str(folder), CPU)


def test_a_missing_bias_is_no_old_buffer(tmp_path, tokenizer):
    """GPT-2's c_attn.bias is a weight; attn.bias was a mask."""
    folder = folder_of(tmp_path, tokenizer, random_model("gpt2"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("c_attn.bias"))
    rest = {key: tensor for key, tensor in weights.items() if key != name}
    save_file(rest | {"transformer.h.0.attn.bias": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=name.removeprefix("transformer.")):
        common.load_model(str(folder), CPU)


def test_code_in_a_models_folder_is_neither_run_nor_asked_about(tmp_path, tokenizer, monkeypatch):
    folder = folder_of(tmp_path, tokenizer)
    (folder / "evil.py").write_text("raise RuntimeError('ran')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    with pytest.raises(SystemExit, match="not the folder or hub id of a causal language model"):
        common.load_model(str(folder), CPU)


def test_quantized_weights_are_refused(tmp_path, tokenizer):
    folder = folder_of(tmp_path, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"--model .*(bitsandbytes|quantized)"):
        common.load_model(str(folder), CPU)


SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "eos_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def test_a_mixture_of_experts_trains_as_a_plain_model(tmp_path, tokenizer):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
    folder = folder_of(tmp_path, tokenizer, transformers.MixtralForCausalLM(config))
    args = grpo.Args(model=str(folder), samples_per_prompt=2, output_dir=str(tmp_path / "run"), **SMALL)
    grpo.main(args)


def test_a_model_that_sees_is_saved_with_its_processors_files(tmp_path, tokenizer):
    text = SIZES | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"boi_token_index": 290, "eoi_token_index": 291, "image_token_index": 292, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    folder = folder_of(tmp_path, tokenizer, transformers.Gemma3ForConditionalGeneration(config))
    files = {
        "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
        "processor_config.json": "{}",
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    sft.main(sft.Args(model=str(folder), output_dir=str(tmp_path / "run"), **SMALL))
    saved = tmp_path / "run" / "model"
    assert {name: (saved / name).read_text() for name in files} == files
    assert load_file(saved / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_runs_of_one_moment_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {common.Run(sft.Args()).dir for _ in range(50)}
    assert len(folders) == 50


def test_a_console_that_lacks_a_character_ends_no_run(tmp_path):
    rows = [{"prompt": f"計算: {i} + {i} = ? 🙂", "answer": "41"} for i in range(4)]
    data, out = write(tmp_path / "d.jsonl", *rows), str(tmp_path / "run")
    flags = ["--data", data, "--output-dir", out, "--num-steps", "1", "--samples-per-prompt", "2"]
    command = [sys.executable, "grpo.py", *flags, "--prompts-per-step", "2"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert "\\u8a08" in done.stdout
    assert (Path(out) / "model").exists()


def test_main_leaves_signals_and_random_numbers_as_they_were_also_from_a_thread(tmp_path, monkeypatch):
    def broken(prompts, completions):
        if len(prompts) > SMALL["eval_prompts"]:  # in a step
            raise ValueError("the judge is down")
        return [0.0] * len(prompts)

    monkeypatch.setitem(common.REWARDS, "broken", broken)
    small = SMALL | {"samples_per_prompt": 2, "save_every": 0}
    before, state = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], torch.random.get_rng_state()
    with pytest.raises(SystemExit, match="the judge is down") as kept:  # as a notebook keeps the last traceback
        grpo.main(grpo.Args(reward=("exact_answer", "broken"), output_dir=str(tmp_path / "broken"), **small))
    assert kept.tb and [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    results = []

    def work():
        results.append(grpo.main(grpo.Args(output_dir=str(tmp_path / "thread"), **small)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results and results[0]["step"] == 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert torch.equal(torch.random.get_rng_state(), state) and not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
