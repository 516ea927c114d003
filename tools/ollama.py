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
    lines = [f"FROM ./{name}"]
    if template is None:
        lines += ["# the model has no chat template and continues a text", quoted("{{ .Prompt }}")]
    elif template in TEMPLATES:
        lines.append(quoted(go_template(TEMPLATES[template], tokenizer.pieces[tokenizer.eos_id])))
    elif (system := chatml_system(tokenizer)) is not None:
        lines.append(quoted(go_template(TEMPLATES["chatml"], "")))
        lines += [f'SYSTEM """{system}"""'] if system else []
    else:
        lines.append("# no TEMPLATE: Ollama takes the chat template in the GGUF, if it knows it")
    ends = [tokenizer.pieces[id] for id in stop_ids(tokenizer, template)]
    lines += [f'PARAMETER stop "{end}"' for end in ends]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}", ""])


def quoted(template):
    return f'TEMPLATE """{template}"""'


PROBE = [("system", "One"), ("user", "Two?"), ("assistant", "Three"), ("user", "Four?")]
PROBE = [{"role": role, "content": content} for role, content in PROBE]


def chatml_system(tokenizer):
    """Returns the system message of a folder's own template where that is chatml, "" for none.

    Returns None for another template. It is known by what it writes.
    """

    def extra(talk):
        turns = [f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in talk]
        chatml = "".join([*turns, f"{IM_START}assistant\n"])
        ids, _ = render(tokenizer, talk, tokenizer.template, add_generation_prompt=True)
        shown = tokenizer.decode(ids[len(tokenizer.opening) :], controls=True)
        return shown.removesuffix(chatml) if shown.endswith(chatml) else None

    head, end = f"{IM_START}system\n", f"{IM_END}\n"
    try:
        if extra(PROBE) != "":
            return None
        system = extra(PROBE[1:])
    except UserError:  # some refuse a system message
        return None
    if not system:
        return system
    inside = system.removeprefix(head).removesuffix(end)
    return inside if system == head + inside + end else None


def go_template(shape, eos):
    """Returns a Template in Go's text/template; Ollama ends it where the answer begins."""
    turns = [
        f'if eq .Role "{r}" }}}}{shape.heads[r]}{{{{ .Content }}}}{shape.ends[r]}' for r in ROLES
    ]
    body = "{{ " + "{{ else ".join(turns) + "{{ end }}"
    opening = shape.between + shape.heads["assistant"].rstrip(" ")
    between = f"{{{{ if $i }}}}{shape.between}{{{{ end }}}}"
    text = f"{{{{ range $i, $_ := .Messages }}}}{between}{body}{{{{ end }}}}{opening}"
    return text.replace(SPECIALS["eos"], eos)
