"""Ollama's Modelfile, which stands beside a GGUF file.

    ollama create sft -f exported/sft.Modelfile

llama.cpp puts BOS before a prompt as the GGUF says, so no template writes it. Texts in <> are read
as control tokens there, in contents too.
"""

from lib.config import UserError
from lib.conversation import ROLES, TEMPLATES, render, stop_ids
from lib.tokenizer import IM_END, IM_START, SPECIALS


def modelfile(name, tokenizer, context):
    """Returns the Modelfile of the GGUF file `name`; context: its positions."""
    template = tokenizer.template
    lines, text = [f"FROM ./{name}"], None
    if template is None:
        lines.append("# the model has no chat template and continues a text")
        text = "{{ .Prompt }}"
    elif template in TEMPLATES:
        text = go_template(TEMPLATES[template], tokenizer.pieces[tokenizer.eos_id])
    elif (system := chatml_system(tokenizer)) is None:
        lines.append("# no TEMPLATE: Ollama takes the chat template in the GGUF, if it knows it")
    else:
        text = go_template(TEMPLATES["chatml"], "")
        lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'TEMPLATE """{text}"""'] if text else []
    ends = [tokenizer.pieces[id] for id in stop_ids(tokenizer, template)]
    lines += [f'PARAMETER stop "{end}"' for end in ends]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}", ""])


PROBE = [("system", "One"), ("user", "Two?"), ("assistant", "Three"), ("user", "Four?")]
PROBE = [{"role": role, "content": content} for role, content in PROBE]


def chatml_system(tokenizer):
    """Returns the system message of a folder's own template where that is chatml, "" for none.

    Returns None for another template. It is known by what it writes.
    """

    def text(template, *talk):
        ids, _ = render(tokenizer, talk, template, add_generation_prompt=True)
        return tokenizer.decode(ids, controls=True)

    own, (_, *rest) = tokenizer.template, PROBE
    try:
        if text(own, *PROBE) != text("chatml", *PROBE):
            return None
        shown = text(own, *rest)
        if shown == text("chatml", *rest):
            return ""
        system = shown.partition(f"{IM_START}system\n")[2].partition(IM_END)[0]
        given = {"role": "system", "content": system}
        return system if shown == text("chatml", given, *rest) else None
    except UserError:  # it lacks the markers, or refuses a system message
        return None


def go_template(shape, eos):
    """Returns a Template in Go's text/template; Ollama ends it where the answer begins."""
    turn = 'if eq .Role "{}" }}}}{}{{{{ .Content }}}}{}'
    turns = [turn.format(role, shape.heads[role], shape.ends[role]) for role in ROLES]
    body = "{{ " + "{{ else ".join(turns) + "{{ end }}"
    between = f"{{{{ if $i }}}}{shape.between}{{{{ end }}}}"
    text = f"{{{{ range $i, $_ := .Messages }}}}{between}{body}{{{{ end }}}}{shape.prompt}"
    return text.replace(SPECIALS["eos"], eos)
