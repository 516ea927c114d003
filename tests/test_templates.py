"""A folder's own chat template: ids and masks as transformers', and no text makes a control id."""

import json
import os
import random
import re
import shutil
import sys
from functools import cache
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch

from corpus.inspect import InspectConfig, inspect
from dpo import make_pairs
from lib.chat_template import ChatTemplate, learned_spans
from lib.config import UserError
from lib.conversation import find_template, render, render_prompt, stop_ids
from lib.tokenizer import Tokenizer
from lib.tokenizer_json import hugging_face_json
from sample import Chat, SampleConfig, open_model
from server import Api
from tests.conftest import byte_level, sentencepiece_model, write_rows
from tests.runs import refused
from tests.runs import train_to_end as trained

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")

ANSWER = "{% generation %}{{ m['content'] }}END{% endgeneration %}"
STYLES = {  # as six families of models have them; END stands for the end of a turn
    "chatml": """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' %}ANSWER{% else %}{{ m['content'] + 'END' }}{% endif %}
{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama3": """{{- bos_token }}
{%- for m in messages %}
    {%- set content = m['content'] | trim %}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ content ~ 'END' }}{% endgeneration -%}
    {%- else %}{{ content ~ 'END' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
""",
    "mistral": """{{ bos_token }}{% if messages[0].role == 'system' %}
{% set system, rest = messages[0].content ~ '\n\n', messages[1:] %}
{% else %}{% set system, rest = '', messages %}{% endif %}
{% for m in rest %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must take turns: user, assistant, user') }}{% endif %}
{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + m.content.strip() + eos_token }}{% endgeneration %}
{%- endif %}{% endfor %}""",
    "gemma": """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}END{% endgeneration %}
{%- else %}{{ m.content | trim }}END{% endif %}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""",
    "zephyr": """{% for m in messages %}{{ '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' %}ANSWER{% else %}{{ m.content + eos_token }}{% endif %}{{ '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
    "thinking": """{% set ns = namespace(last=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}
{% if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ answer }}
{%- else %}{{ m.content }}{% endif %}END
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
}
SPECIALS = {  # bos, eos, end of turn, and others
    "chatml": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "llama3": ("<|begin|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
               "<|end_header_id|>"),
    "mistral": ("<s>", "</s>", "</s>", "[INST]", "[/INST]"),
    "gemma": ("<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>"),
    "zephyr": ("<s>", "</s>", "</s>"),
    "thinking": ("<|endoftext|>", "<|im_end|>", "<|im_end|>", "<|im_start|>"),
}  # fmt: skip
KINDS = ("byte_level", "prefixed", "tokenizer_model")
each_style = pytest.mark.parametrize("style", STYLES)
each_kind = pytest.mark.parametrize("kind", KINDS)

TALKS = [
    [("system", "Be brief. "), ("user", "Why?\n"), ("assistant", " (Because) it is so.\n\n")],
    [("user", "  \u4e2d\u6587 \U0001f600?"), ("assistant", "\n- yes\n- 1\u25812"),
     ("user", "And <b> then </b>"), ("assistant", "<think>\nhm\n</think>\n\nNothing more")],
    [("user", "a"), ("assistant", "b"), ("user", "[c]\ufdd0"), ("assistant", "\ud7ff \ufdd1")],
    [("user", "<think>"), ("assistant", "x</think>y")],
]  # fmt: skip
TALKS = [[{"role": role, "content": content} for role, content in talk] for talk in TALKS]
ASKED = [{"role": "user", "content": "Which way?"}]


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def source(style, tags=True):
    text = STYLES[style].replace("ANSWER", ANSWER).replace("END", SPECIALS[style][2])
    plain = re.sub(r" generation(?= -?%)", " if true", text).replace("endgeneration", "endif")
    return text if tags else plain


@cache
def with_thoughts(*specials):
    bpe = byte_level(topics["assert"].splitlines(), list(specials), 500)
    bpe.add_tokens([library.AddedToken(text, special=False) for text in ("<think>", "</think>")])
    return bpe


@pytest.fixture(scope="module")
def sentence_pieces(tmp_path_factory):
    """The folder of a tokenizer.model of Llama's kind."""
    folder = tmp_path_factory.mktemp("pieces")
    model = sentencepiece_model(topics["assert"].splitlines(), vocab_size=400)
    (folder / "tokenizer.model").write_bytes(model)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, sentence_pieces):
    """folder_of(style, kind, tags) makes the tokenizer of a downloaded folder."""

    @cache
    def make(style, kind="byte_level", tags=False):
        folder = tmp_path_factory.mktemp(style)
        bos, eos, *others = SPECIALS[style]
        specials = dict.fromkeys((bos, eos, *others))
        if kind == "byte_level":
            json_tokenizer = with_thoughts(*specials)
        else:
            pieces = Tokenizer.load(sentence_pieces)
            json_tokenizer = library.Tokenizer.from_str(json.dumps(hugging_face_json(pieces)))
            json_tokenizer.add_special_tokens(list(specials))
        roles = {"bos_token": bos, "eos_token": eos, "chat_template": source(style, tags)}
        other = transformers.PreTrainedTokenizerFast(tokenizer_object=json_tokenizer, **roles)
        other.save_pretrained(folder)
        if kind == "tokenizer_model":  # for us; its JSON, which transformers reads, is elsewhere
            (folder / "tokenizer.model").write_bytes(pieces.model)
            added = {id: {"content": str(t)} for id, t in other.added_tokens_decoder.items()}
            write_json(folder / "tokenizer_config.json", roles | {"added_tokens_decoder": added})
            (folder / "tokenizer.json").rename(folder / "elsewhere.json")
        return folder

    return make


@cache
def both(folder):
    """Returns (our Tokenizer, transformers') of a folder."""
    other = transformers.AutoTokenizer
    if (elsewhere := folder / "elsewhere.json").exists():
        config = json.loads((folder / "tokenizer_config.json").read_text())
        roles = {name: config[name] for name in ("bos_token", "eos_token", "chat_template")}
        other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(elsewhere), **roles)
        return Tokenizer.load(folder), other
    return Tokenizer.load(folder), other.from_pretrained(folder)


def accepted(style, kind="byte_level"):
    """The conversations that a style takes; a tokenizer.model alone tells U+2581 from a space."""
    talks = [talk for talk in TALKS if style != "gemma" or talk[0]["role"] != "system"]
    other = "_" if kind == "tokenizer_model" else "\u2581"
    return [[m | {"content": m["content"].replace("\u2581", other)} for m in t] for t in talks]


def theirs(other, talk, **more):
    out = other.apply_chat_template(talk, return_dict=True, **more)
    return out["input_ids"], out.get("assistant_masks")


# ---- ids, masks, ends


@each_kind
@each_style
def test_ids_and_masks_are_those_of_transformers(folder_of, style, kind):
    """Without {% generation %}, answers are found by rendering; the oracle reads the blocks."""
    marked, plain = (both(folder_of(style, kind, tags)) for tags in (True, False))
    for tokenizer, other in (marked, plain):
        assert tokenizer.file == ("tokenizer.model" if kind == KINDS[2] else "tokenizer.json")
        assert tokenizer.template == "jinja"
        for talk in accepted(style, kind):
            opened, _ = render(tokenizer, talk, "jinja", add_generation_prompt=True)
            assert opened == theirs(other, talk, add_generation_prompt=True)[0]
            ids, mask = render(tokenizer, talk, "jinja")
            expected = theirs(marked[1], talk, return_assistant_tokens_mask=True)
            assert ids == expected[0]
            assert style == "thinking" or (any(mask) and mask == expected[1])


@each_kind
@each_style
def test_a_begun_answer_is_continued_as_by_transformers(folder_of, style, kind):
    tokenizer, other = both(folder_of(style, kind))
    for content in ("North, then", "[", "10"):
        talk = [*ASKED, {"role": "assistant", "content": content}]
        assert (
            render_prompt(tokenizer, talk, "jinja")
            == (theirs(other, talk, continue_final_message=True)[0])
        )


def test_a_template_that_rewrites_earlier_turns_trains_the_last_answer(folder_of):
    tokenizer, _ = both(folder_of("thinking"))
    ids, mask = render(tokenizer, TALKS[1], "jinja")
    learned = tokenizer.decode([id for id, m in zip(ids, mask) if m], controls=True)
    assert learned == "<think>\n\n</think>\n\nNothing more<|im_end|>"


@pytest.mark.parametrize("tags", [True, False])
@each_style
def test_an_answer_of_weight_0_is_context(folder_of, style, tags):
    tokenizer, _ = both(folder_of(style, tags=tags))
    ids, mask = render(tokenizer, TALKS[1], "jinja")
    between = len(render(tokenizer, TALKS[1][:3], "jinja")[0])  # the first answer ends before
    for index, expected in ((1, [0] * between + mask[between:]), (3, mask[:between])):
        talk = [m | {"weight": 0} if n == index else m for n, m in enumerate(TALKS[1])]
        assert render(tokenizer, talk, "jinja") == (
            ids,
            expected + [0] * (len(ids) - len(expected)),
        )
    with pytest.raises(UserError, match="marks 1 spans in 2 answers"):
        learned_spans([(0, 1)], talk)


@each_style
def test_every_end_ends_an_answer(folder_of, tmp_path, style):
    tokenizer, other = both(folder_of(style))
    shutil.copytree(folder_of(style), tmp_path, dirs_exist_ok=True)
    eos, end = other.convert_tokens_to_ids(list(SPECIALS[style][1:3]))
    assert stop_ids(tokenizer, "jinja") == sorted({eos, end})
    for more in (7, [7, eos]):
        write_json(tmp_path / "generation_config.json", {"eos_token_id": more})
        again = Tokenizer.load(tmp_path)
        assert stop_ids(again, "jinja") == sorted({7, eos, end})
        assert stop_ids(again, None) == sorted({7, eos})


# ---- no text makes a control id


@each_style
def test_no_text_makes_a_control_id(folder_of, style):
    """20,000 strings in all: the number of each control id is that of harmless texts."""
    tokenizer, other = both(folder_of(style, tags=True))
    rng, specials = random.Random(style), [*SPECIALS[style], "</think>", "<think>"]
    halves = [s[:n] for s in specials for n in range(1, len(s))]
    halves += [s[n:] for s in specials for n in range(1, len(s))]
    parts = [*specials, *halves, *halves, " ", "\n", "a", "\ufdd0", "\ufdd1", "\ufdd2"]

    def hostile():
        text = "".join(rng.choices(parts, k=rng.randint(1, 5)))
        text = text.rpartition("</think>")[2] if style == "thinking" else text
        return text if text.strip() else "<"

    def counts(contents):
        roles = ("user", "assistant")
        talk = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
        ids, mask = render(tokenizer, talk, "jinja")
        assert style == "thinking" or tokenizer.decode(ids, controls=True) == (
            other.apply_chat_template(talk, tokenize=False)
        )
        return [ids.count(id) for id in tokenizer.controls.values()], sum(mask) > 0

    size = 6 if style == "thinking" else 40  # whose answers are found by rendering
    harmless = counts(["a"] * size)
    for _ in range(3_360 // size):
        assert counts([hostile() for _ in range(size)]) == harmless


def test_a_template_completes_no_control_token_on_both_sides(folder_of):
    template = own_template(folder_of, "<{{ messages[-1].content }}>")
    tokenizer = both(folder_of("llama3"))[0]
    ids, _ = template.render(tokenizer, [{"role": "user", "content": " |eot_id| "}])
    assert tokenizer.decode(ids) == "< |eot_id| >"
    ids, _ = template.render(tokenizer, [{"role": "user", "content": "|eot_id|"}])
    assert tokenizer.decode(ids) == "<|eot_id|>"


def test_spaces_that_a_control_token_swallows(tmp_path):
    """As Phi-3's: `rstrip` takes the line break after it, `lstrip` the space before it."""
    added = [library.AddedToken("<end>", rstrip=True), library.AddedToken("<user>", lstrip=True)]
    bpe = library.Tokenizer.from_str(with_thoughts("<s>", "</s>").to_str())
    bpe.add_special_tokens(added)
    text = "{% for m in messages %} <user>\n{{ m.content }}<end> \n{% endfor %}"
    roles = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": text}
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    other.save_pretrained(tmp_path)
    for talk in (TALKS[0], TALKS[1]):
        assert render(Tokenizer.load(tmp_path), talk, "jinja")[0] == theirs(other, talk)[0]


# ---- where a template comes from, and where it goes


def test_the_file_goes_before_the_configuration_and_default_before_other_names(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("zephyr"), tmp_path, dirs_exist_ok=True)
    file = (folder / "chat_template.jinja").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    expected = render(Tokenizer.load(tmp_path), ASKED, "jinja")
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    for template in ("y", named):
        write_json(tmp_path / "tokenizer_config.json", config | {"chat_template": template})
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.decode(render(tokenizer, ASKED, "jinja")[0]) == "y"
    (tmp_path / "chat_template.jinja").write_bytes(file)
    assert render(Tokenizer.load(tmp_path), ASKED, "jinja") == expected
    write_json(tmp_path / "tokenizer_config.json", config | {"prompt_template": "instruct"})
    assert Tokenizer.load(tmp_path).template == "instruct"
    for template in ({"rag": "x"}, [{"name": "rag"}], 7):
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        write_json(tmp_path / "tokenizer_config.json", config | {"chat_template": template})
        with pytest.raises(UserError, match="none named default"):
            stop_ids(Tokenizer.load(tmp_path), "jinja")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8"):
        Tokenizer.load(tmp_path)


@each_kind
@each_style
def test_a_saved_folder_renders_the_same_here_and_in_transformers(folder_of, tmp_path, style, kind):
    tokenizer, _ = both(folder_of(style, kind))
    tokenizer.save(tmp_path, 512)
    back, other = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (back.template, stop_ids(back, "jinja")) == ("jinja", stop_ids(tokenizer, "jinja"))
    for talk in accepted(style, kind):
        expected = render(tokenizer, talk, "jinja")
        assert render(back, talk, "jinja") == expected
        assert theirs(other, talk)[0] == expected[0]


# ---- what is refused


def own_template(folder_of, text):
    return ChatTemplate(both(folder_of("llama3"))[0], text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}", "is not Jinja"),
        ("{{ messages | nothing }}", "is not Jinja"),
        ("{{ raise_exception('No, thanks') }}", "refuses this conversation: No, thanks$"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ messages[9].content }}", "fails: .*has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__'.*unsafe"),
        ("{{ messages.append(1) }}", "fails: .*unsafe"),
        ("{{ raise_exception.__globals__.os }}", "fails: .*unsafe"),
        ("{{ 'x' * 9999999999 }}", r"fails: 1 \* 9999999999 is too large"),
        ("{{ 9 ** 999999999 }}", r"fails: 9 \*\* 999999999 is too large"),
        ("{% for i in range(9999999) %}{% endfor %}", "fails: Range too big"),
        ("{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
         "takes longer than 1 s"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "fails: maximum recursion"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_work_is_one_line(folder_of, text, message):
    trace = sys.gettrace()
    with pytest.raises(UserError, match=message) as caught:
        own_template(folder_of, text)
    assert "\n" not in str(caught.value)
    assert sys.gettrace() is trace


def test_a_template_that_does_not_fit_its_tokenizer_says_so(folder_of):
    template = own_template(folder_of, "{{ bos_token }}{{ cls_token }}{{ messages[-1].content }}")
    (note,) = template.notes
    assert "no control token" in note
    tokenizer = both(folder_of("llama3"))[0]
    assert template.render(tokenizer, ASKED)[0][0] == tokenizer.bos_id
    assert own_template(folder_of, source("llama3")).notes == []


# ---- the programs


@pytest.fixture(scope="module")
def downloaded(folder_of, tmp_path_factory):
    """downloaded(style): a small random Llama as transformers saves it, with its tokenizer."""

    @cache
    def make(style):
        folder = tmp_path_factory.mktemp("downloaded")
        other = both(folder_of(style))[1]
        other.save_pretrained(folder)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= {"vocab_size": len(other), "max_position_embeddings": 256}
        ids = {"bos_token_id": other.bos_token_id, "eos_token_id": other.eos_token_id}
        torch.manual_seed(3)
        config = transformers.LlamaConfig(**shape, **ids, initializer_range=0.3)
        model = transformers.LlamaForCausalLM(config)
        model.generation_config.eos_token_id = [other.eos_token_id, 7]
        model.save_pretrained(folder)
        return folder

    return make


def greedy_of_transformers(folder, talk, count=12):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = transformers.AutoTokenizer.from_pretrained(folder)
    more = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    asked = other.apply_chat_template(talk, **more)
    made = model.generate(**asked, max_new_tokens=count, do_sample=False)[0].tolist()
    made, ends = made[asked["input_ids"].shape[1] :], model.generation_config.eos_token_id
    made = made[:-1] if made[-1] in ends else made
    return other.decode(made, skip_special_tokens=True).strip()


def greedy_of_ours(folder, talk, count=12):
    cfg = SampleConfig(model_path=str(folder), chat=True, temperature=0.0, max_new_tokens=count)
    chat = Chat(cfg, *open_model(folder))
    chat.ask(talk[-1]["content"], talk[:-1])
    return chat.turns[-1]["content"] if chat.turns else ""


ROWS = [{"messages": talk} for talk in TALKS] + [
    {"prompt": f"what is {n}?", "response": f"<think>\nhm\n</think>\n\nit is {n}"} for n in range(9)
]


@pytest.mark.parametrize("style", ["chatml", "thinking", "gemma"])
def test_sft_trains_in_the_folders_own_template_and_keeps_it(downloaded, tmp_path, capsys, style):
    rows, base = write_rows(tmp_path / "rows.jsonl", ROWS), downloaded(style)
    knobs = {"program": "sft", "model_path": base, "dataset_path": rows, "max_steps": 2}
    trained(tmp_path / "sft", **knobs, save_steps=2, eval_steps=2)
    tokenizer, other = both(tmp_path / "sft" / "final")
    assert tokenizer.template == "jinja"
    assert find_template(tokenizer, "jinja").source == source(style, tags=False)
    for talk in accepted(style):
        assert render(tokenizer, talk, "jinja") == render(both(base)[0], talk, "jinja")
        assert render(tokenizer, talk, "jinja")[0] == theirs(other, talk)[0]
    ends = json.loads((tmp_path / "sft/final/generation_config.json").read_text())["eos_token_id"]
    assert ends == stop_ids(both(base)[0], "jinja")
    line = refused(tmp_path / "other", **knobs, prompt_template="chatml")
    assert "was trained in 'jinja' and knows no other template" in line


def test_sft_says_what_the_template_refuses_and_what_it_leaves_out(downloaded, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    knobs = {"program": "sft", "dataset_path": rows}
    system = write_rows(tmp_path / "system.jsonl", [ROWS[0]] * 3)
    more = {"model_path": downloaded("gemma"), "dataset_path": system}
    line = refused(tmp_path / "a", **knobs | more)
    assert line.endswith("refuses this conversation: System role not supported")
    inspect(InspectConfig(str(rows), tokenizer_path=str(downloaded("gemma"))))
    said = capsys.readouterr().out
    assert "1 dropped: the model's own chat template refuses" in said
    inspect(InspectConfig(str(rows), tokenizer_path=str(downloaded("thinking"))))
    said = capsys.readouterr().out
    assert "2 train their last answer only" in said
    assert "as jinja" in said


def test_a_pair_trains_the_answers_after_its_prompt(folder_of):
    tokenizer, other = both(folder_of("llama3", tags=True))
    pair = {"prompt": TALKS[1][:3], "chosen": TALKS[1][3:], "rejected": TALKS[0][2:]}
    said = []
    rows = [pair, pair | {"prompt": TALKS[0][:2]}]
    first, _ = make_pairs(rows, "here", tokenizer, "jinja", 256, said.append)
    for side, (ids, mask) in ((pair["chosen"], first.chosen), (pair["rejected"], first.rejected)):
        assert ids.tolist() == theirs(other, pair["prompt"] + side)[0]
        answer = tokenizer.decode(ids[mask == 1].tolist(), controls=True)
        assert answer == f"{side[0]['content'].strip()}<|eot_id|>"
    strict, _ = both(folder_of("gemma"))
    (only,) = make_pairs(rows, "here", strict, "jinja", 256, said.append)
    assert only.chosen[1].any()
    assert "1 dropped: the model's own chat template refuses this conversation: System" in said[1]


def test_an_adapters_folder_keeps_the_ends_of_its_base(downloaded, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    knobs = {"program": "sft", "model_path": downloaded("llama3"), "dataset_path": rows}
    trained(tmp_path / "sft", **knobs, merge=False, max_steps=2, save_steps=2, eval_steps=2)
    adapter = Tokenizer.load(tmp_path / "sft" / "final")
    assert stop_ids(adapter, "jinja") == stop_ids(both(downloaded("llama3"))[0], "jinja")
    assert 7 in stop_ids(adapter, "jinja")


@pytest.mark.parametrize("style", STYLES)
def test_a_chat_answers_as_transformers_does(downloaded, style):
    for talk in (ASKED, [*TALKS[1], *ASKED]):
        folder = downloaded(style)
        assert greedy_of_ours(folder, talk) == greedy_of_transformers(folder, talk)


def test_the_server_asks_in_the_folders_own_template(folder_of):
    tokenizer, other = both(folder_of("gemma", tags=True))
    api = Api(SimpleNamespace(engine=SimpleNamespace(limit=256)), tokenizer, "gemma", 1)
    tokens = api.tokenize({"messages": ASKED}, None)["tokens"]
    assert tokens == theirs(other, ASKED, add_generation_prompt=True)[0]
    with pytest.raises(UserError, match="System role not supported"):
        api.tokenize({"messages": [TALKS[0][0], *ASKED]}, None)
    plain = api.tokenizer_info()["chat_template"]
    assert "generation %" not in plain
    other.chat_template = plain
    assert theirs(other, TALKS[1])[0] == render(tokenizer, TALKS[1], "jinja")[0]
