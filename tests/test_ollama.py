"""The Modelfile beside a GGUF file: parsed as Ollama's grammar has it, its template run."""

import json
import re

import pytest

from lib.conversation import TEMPLATES, render
from lib.tokenizer import IM_END, Tokenizer
from tests.test_export import TALKS, export, make
from tests.test_tokenizer import named

jinja2 = pytest.importorskip("jinja2")
INSTRUCTION = re.compile(r'#.*\n|([A-Z]+) (?:"""((?s:.*?))"""|(.*))\n')
# of Go's text/template: what our templates use, and what Jinja has for it
ACTIONS = {
    r"range \$i, \$_ := \.Messages": "{% for m in messages %}",
    r"if \$i": "{% if loop.index0 %}",
    r'if eq \.Role "(\w+)"': r"{% if m.role == '\1' %}",
    r'else if eq \.Role "(\w+)"': r"{% elif m.role == '\1' %}",
    r"\.Content": "{{ m.content }}",
}


def instructions(path):
    """Returns [(instruction, its text), ...] of a Modelfile without its comments."""
    text, at, found = path.read_text("utf-8"), 0, []
    while at < len(text):
        match = INSTRUCTION.match(text, at)
        at, found = match.end(), [*found, (match[1], match[2] or match[3])]
    return [pair for pair in found if pair[0]]


def run_go(template, messages):
    """Returns the text of a Go template, which is translated action by action."""
    parts, open_blocks = re.split(r"\{\{ (.*?) \}\}", template), []
    for at in range(1, len(parts), 2):
        action = parts[at]
        if action == "end":
            parts[at] = f"{{% end{open_blocks.pop()} %}}"
            continue
        (pattern,) = (pattern for pattern in ACTIONS if re.fullmatch(pattern, action))
        parts[at] = re.sub(pattern, ACTIONS[pattern], action)
        if action.startswith(("if", "range")):
            open_blocks.append("if" if action.startswith("if") else "for")
    settings = {"keep_trailing_newline": True}
    return jinja2.Environment(**settings).from_string("".join(parts)).render(messages=messages)


@pytest.mark.parametrize("template", TEMPLATES)
def test_ollama_gets_the_template_the_stops_and_the_context(tiny_tokenizer, tmp_path, template):
    own = make(tmp_path / "own", tiny_tokenizer, template)
    file = export(own, tmp_path / "sft.gguf", "gguf")
    found = instructions(tmp_path / "sft.Modelfile")
    ends = ["</s>", IM_END] if template.startswith("chatml") else ["</s>"]
    parameters = [*(f'stop "{end}"' for end in ends), "num_ctx 128"]
    assert [text for name, text in found if name == "PARAMETER"] == parameters
    found = dict(found)
    assert (file.parent / found["FROM"]).resolve() == file.resolve()
    for talk in TALKS:
        ids, _ = render(tiny_tokenizer, talk, template, add_generation_prompt=True)
        shown = run_go(found["TEMPLATE"], talk)
        assert f"<s>{shown}" == named(tiny_tokenizer, ids)  # llama.cpp adds BOS


def test_a_base_model_continues_texts(tiny_tokenizer, tmp_path):
    own = make(tmp_path / "own", tiny_tokenizer, template=None)
    export(own, tmp_path / "base.gguf", "gguf")
    assert ("TEMPLATE", "{{ .Prompt }}") in instructions(tmp_path / "base.Modelfile")


TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
)
LAST = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = f"{{% for m in messages %}}{TURN}{{% endfor %}}{LAST}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize(
    ("source", "template", "system"),
    [
        (CHATML, True, None),
        (DEFAULT + CHATML, True, "Be kind."),
        (REFUSING + CHATML, False, None),
        (CHATML.replace("<|im_end|>\n", "<|im_end|>"), False, None),
    ],
)
def test_a_template_of_a_folder_is_written_where_it_is_chatml(
    tiny_tokenizer, tmp_path, source, template, system
):
    own = make(tmp_path / "own", tiny_tokenizer, template=None)
    path = own / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) | {"chat_template": source}
    del config["tokenizer_model_sha256"]
    path.write_text(json.dumps(config), "utf-8")
    export(own, tmp_path / "x.gguf", "gguf")
    found = dict(instructions(tmp_path / "x.Modelfile"))
    assert ("TEMPLATE" in found, found.get("SYSTEM")) == (template, system)
    if template:
        tokenizer = Tokenizer.load(own)
        for talk in TALKS[-2:]:  # with a system message
            ids, _ = render(tokenizer, talk, tokenizer.template, add_generation_prompt=True)
            assert run_go(found["TEMPLATE"], talk) == named(tokenizer, ids)
