"""What users bring as data, tokenizers and models works as they mean it."""

import json
from types import SimpleNamespace

import common
import dpo
import grpo
import sft
import trpo

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, random_model
from safetensors.torch import load_file
from test_scripts import FEW
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

CPU = torch.device("cpu")
SMALL = {"num_steps": 1, "prompts_per_step": 2, "eval_prompts": 2, "data": FEW}
END = "<|endoftext|>"
TOOLS = "{% if tools %}<tools>{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}{% endif %}"
TOOLS += "{% if style %}<{{ style }}>{% endif %}" + CHAT_TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}{% endif %}"
)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path, module=None):
    prepare = {sft: sft.to_demonstration, dpo: dpo.to_pair}.get(module)
    columns = {sft: ("prompt", "completion"), dpo: ("prompt", "chosen", "rejected")}.get(module, ("prompt",))
    return common.read_rows(path, columns, prepare)


def folder_of(tmp_path, tokenizer, model=None):
    folder = tmp_path / "m"
    (model or random_model("llama")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(tokenizer):
    tokenizer.chat_template = TOOLS
    return tokenizer


def said(tokenizer, row):
    """What sft.py would train of a row: each prompt and its target, as texts."""
    model = SimpleNamespace(context_length=1000, generation_config=SimpleNamespace(eos_token_id=[0]))
    examples = sft.tokenize(model, tokenizer, [sft.to_demonstration(row)], sft.Args())
    return [tuple(map(tokenizer.decode, example)) for example in examples]


A, B = [turn("assistant", "A")], [turn("assistant", "B")]


def test_every_turn_of_the_assistant_is_learned_and_no_other(chat):
    talk = [turn("system", "s"), turn("user", "a"), *A, turn("user", "b"), *B]
    first = "<system>s<user>a<assistant>"
    expected = [(first, f"A{END}"), (f"{first}A{END}\n<user>b<assistant>", f"B{END}")]
    assert said(chat, {"messages": talk}) == expected
    assert said(chat, {"prompt": talk[:2], "completion": talk[2:]}) == expected
    assert said(chat, {"prompt": "a", "completion": None, "messages": talk}) == expected  # as ultrachat has both
    second = (f"<user>a<assistant>A{END}\n<user>b<assistant>", f"B{END}")
    assert said(chat, {"prompt": "a", "completion": talk[2:]})[1] == second
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    tools = [turn("user", "a"), turn("assistant", "", tool_calls=call), turn("tool", "2"), turn("assistant", "two")]
    calls = said(chat, {"messages": tools})
    assert [target for _, target in calls] == [f"<call>add{END}", f"two{END}"]
    assert calls[1][0].endswith("<tool>2<assistant>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [turn("user", "a")]}, 'no "completion": it has .*, the script takes prompt, completion'),
        ({"messages": [turn("user", "a"), *A, *B]}, "two answers of the assistant in turn"),
        ({"prompt": [turn("user", "a"), *A], "completion": [*A, turn("user", "b"), *B]}, "two answers of"),
        ({"prompt": "a", "completion": [turn("assistant", "", tool_calls=[])]}, "a message without content"),
        ({"prompt": "a", "completion": [turn("assistant", "")]}, "a message without content"),
        ({"text": "a b"}, 'no "prompt": it has text, the script takes prompt, completion'),
    ],
)
def test_demonstrations_that_are_none_are_refused_by_row(row, message, tmp_path):
    with pytest.raises(SystemExit, match=f"row 2: .*{message}"):
        rows_of(write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, row), sft)


ASKED = [turn("user", "a"), turn("assistant", "x"), turn("user", "b")]
HH = "\n\nHuman: a\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": " A", "rejected": " B"}, ("a", " A", " B")),
        ({"prompt": "a", "chosen": "aA", "rejected": "aB"}, ("a", "aA", "aB")),  # a word may be chance, a sentence not
        ({"prompt": "What is a?", "chosen": "What is a? A", "rejected": "What is a? B"}, ("What is a?", " A", " B")),
        ({"prompt": "吗\uff1f", "chosen": "吗\uff1f好", "rejected": "吗\uff1f不"}, ("吗\uff1f", "好", "不")),
        ({"prompt": ASKED, "chosen": A, "rejected": B}, (ASKED, A, B)),
        ({"chosen": ASKED + A, "rejected": ASKED + B}, (ASKED, A, B)),
        ({"chosen": ASKED + A, "rejected": ASKED + A}, (ASKED, A, A)),  # equal, which tokenize drops
        ({"prompt": ASKED, "chosen": ASKED + A, "rejected": ASKED + B}, (ASKED, A, B)),
        ({"prompt": "b", "chosen": [ASKED[2], *A], "rejected": [ASKED[2], *B]}, (ASKED[2:], A, B)),
        ({"chosen": f"{HH} I say A", "rejected": f"{HH} I say B"}, (HH, " I say A", " I say B")),
    ],
)
def test_pairs_with_the_prompt_apart_or_within(row, expected):
    assert tuple(dpo.to_pair(row)[name] for name in ("prompt", "chosen", "rejected")) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "The sky is blue", "rejected": "The sky is red"}, 'no "prompt": it has chosen, rejected, prompt'),
        ({"chosen": ASKED + A, "rejected": [*ASKED, *A, turn("user", "c"), *B]}, "not one assistant turn"),
        ({"prompt": "other", "chosen": ASKED + A, "rejected": ASKED + B}, "not one assistant turn"),
        ({"chosen": f"{HH} x\n\nHuman: b\n\nAssistant: A", "rejected": f"{HH} B"}, "not one assistant turn"),
        ({"prompt": "a", "chosen": A, "rejected": [turn("user", "B")]}, "not one assistant turn"),
    ],
)
def test_pairs_that_are_none_are_refused_by_row(row, message, tmp_path):
    with pytest.raises(SystemExit, match=f"row 1: ({message})"):
        rows_of(write(tmp_path / "d.jsonl", row), dpo)


def test_what_a_prompt_becomes(chat):
    def read(**row):
        return chat.decode(common.prompt_tokens(chat, row))

    tool = {"type": "function", "function": {"name": "add"}}
    ask = [turn("user", "a")]
    for text in ("a", "<system>s<user>a<assistant>", f"what is {END}?"):  # a text is what it is, whatever the template
        assert read(prompt=text, tools=[tool]) == text
    assert read(prompt=ask) == read(prompt=ask, tools=[]) == "<user>a<assistant>"
    with_tool = '<tools>{"name": "add"}<user>a<assistant>'
    assert read(prompt=ask, tools=[tool]) == read(prompt=ask, tools=json.dumps([tool])) == with_tool
    assert read(prompt=ask, chat_template_kwargs={"style": "short"}) == "<short><user>a<assistant>"
    assert read(prompt=[*ask, turn("assistant", "I say ")]) == "<user>a<assistant>I say "  # begun, so it goes on
    begun = {"prompt": [*ask, turn("assistant", "I say ")]}
    assert chat.decode(common.completion_tokens(chat, begun, "A", [0])) == f"A{END}"
    assert all(type(token) is int for token in common.prompt_tokens(chat, begun))  # no BatchEncoding of tensors
    with pytest.raises(ValueError, match="chat template"):  # transformers says it by itself
        chat.chat_template = None
        read(prompt=ask)


def test_messages_of_text_parts_and_of_calls_without_content(tmp_path):
    call = turn("assistant", None, tool_calls=[{"id": "x"}])
    prompt = [turn("system", None), turn("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), call]
    rows = rows_of(write(tmp_path / "d.jsonl", {"prompt": [*prompt, {"role": "tool"}]}))
    assert [message["content"] for message in rows[0]["prompt"]] == ["", "ab", "", ""]


def test_an_answer_that_the_template_rewrites_is_refused(chat):
    chat.chat_template = CHAT_TEMPLATE.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")
    with pytest.raises(SystemExit, match="prompt '<user>a<assistant>': the chat template does not write its answer"):
        common.completion_tokens(chat, {"prompt": [turn("user", "a")]}, "<think>b</think>c", [0])


def test_bos_comes_once(tokenizer):
    """Whether the tokenizer adds it, the chat template writes it or the text has it; a completion has none."""
    bos, ask = END, {"prompt": [turn("user", "hi")]}
    tokenizer.bos_token = bos
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    for text in ("hi", f"{bos}hi"):
        assert tokenizer.decode(common.prompt_tokens(tokenizer, {"prompt": text})) == f"{bos}hi"
        assert tokenizer.decode(common.completion_tokens(tokenizer, {"prompt": text}, " yes", [0])) == f" yes{END}"
    tokenizer.chat_template = bos + CHAT_TEMPLATE
    assert tokenizer.decode(common.prompt_tokens(tokenizer, ask)) == f"{bos}<user>hi<assistant>"
    assert tokenizer.decode(common.completion_tokens(tokenizer, ask, "yes", [0])) == f"yes{END}"


def test_a_tokenizer_that_ends_each_text_ends_no_prompt(tokenizer):
    plain = common.prompt_tokens(tokenizer, {"prompt": "hi"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    assert tokenizer("hi").input_ids[-1] == 0
    assert common.prompt_tokens(tokenizer, {"prompt": "hi"}) == plain


def test_a_tokenizer_without_end_of_sequence_learns_the_models(tokenizer):
    tokenizer.eos_token = None
    assert common.completion_tokens(tokenizer, {"prompt": "hi"}, " yes", [7])[-1] == 7


@pytest.fixture
def sentencepiece():
    """As Llama 2's: a token for each character, merges, and a space put before each text."""
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
    start = common.prompt_tokens(sentencepiece, {"prompt": prompt})
    ids = common.completion_tokens(sentencepiece, {"prompt": prompt}, completion, [1])
    assert sentencepiece.convert_ids_to_tokens(ids) == [*tokens, "</s>"]
    assert sentencepiece.decode(start + ids[:-1]) == prompt + completion


def test_files_of_other_systems(tmp_path):
    text = (
        b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "\xc3\xa9\xe2\x80\xa8x"}\r\n'  # a mark, a separator in a text
    )
    (tmp_path / "d.jsonl").write_bytes(text)
    assert rows_of(str(tmp_path / "d.jsonl")) == [{"prompt": "a"}, {"prompt": "é\u2028x"}]


def test_tables_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    tools = [
        {"function": {"name": "add", "parameters": {"a": 1}}},
        {"function": {"name": "now", "description": "time"}},
    ]
    call = turn("assistant", None, tool_calls=[{"id": "x"}])
    rows = [
        {"prompt": [turn("user", "a")], "tools": tools, "answer": 1},
        {"prompt": [call, turn("user", "b")], "tools": [], "answer": None},
    ]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    train, held_out = common.load_data(str(tmp_path / "set"), "", 9, ("prompt",))
    read = sorted(train + held_out, key=lambda row: len(row["prompt"]))
    assert [row["prompt"] for row in read] == [[turn("user", "a")], [call | {"content": ""}, turn("user", "b")]]
    assert [row["tools"] for row in read] == [tools, []]  # without Arrow's null, which it puts where a key is missing
    assert [row["answer"] for row in read] == [1, None]
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "d.csv").write_text('prompt,answer\n"a, b",85\nc,\n', encoding="utf-8-sig")
    read = rows_of(str(tmp_path / "table"))
    assert [row["prompt"] for row in read] == ["a, b", "c"]
    assert common.exact_answer(["85", "85"], answer=[row.get("answer") for row in read]) == [1.0, None]


SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "eos_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def test_a_mixture_of_experts_trains_as_a_plain_model(tmp_path, tokenizer):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
    folder = folder_of(tmp_path, tokenizer, transformers.MixtralForCausalLM(config))
    grpo.main(grpo.Args(model=str(folder), samples_per_prompt=2, output_dir=str(tmp_path / "run"), **SMALL))


def test_a_model_that_sees_trains_on_texts_and_is_saved_with_its_processors_files(tmp_path, tokenizer):
    text = SIZES | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"boi_token_index": 290, "eoi_token_index": 291, "image_token_index": 292, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    folder = folder_of(tmp_path, tokenizer, transformers.Gemma3ForConditionalGeneration(config))
    files = {"preprocessor_config.json": '{"image_processor_type": "x"}', "processor_config.json": "{}"}
    for name, content in files.items():
        (folder / name).write_text(content)
    sft.main(sft.Args(model=str(folder), output_dir=str(tmp_path / "run"), **SMALL))
    saved = tmp_path / "run" / "model"
    assert {name: (saved / name).read_text() for name in files} == files
    assert load_file(saved / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    args = trpo.Args(model=str(folder), reward=("test_runs:draw",), output_dir=str(tmp_path / "trpo"), **SMALL)
    assert trpo.main(args)["kl/predicted"] > 0  # the tower has no gradient, and is still
