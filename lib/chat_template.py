"""A chat template, Jinja by anybody, rendered to ids as transformers does; and ours as Jinja.

It runs in jinja2's sandbox, for a second at most. Its text is cut at the spellings of control
tokens, and no content brings one: a character that occurs nowhere else stands inside each spelling
in a content, and at its ends where the template's text could complete one, until the cuts are made.
"""

import json
import re
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import accumulate, compress, count, islice

import jinja2
import numpy as np
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from lib.config import UserError, refusing
from lib.conversation import ROLES, is_learned, shared_length
from lib.tokenizer import SPECIALS
from lib.tokenizer_json import special_tokens

SECONDS = 1.0  # the longest time for one conversation
LARGEST = 1_000_000  # of a product, or of a text that is repeated
BRACKETS = "generation brackets"  # the variable, which no template can name, of two characters
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
ONE_TURN = [{"role": "user", "content": "Quartz?"}, {"role": "assistant", "content": "Feldspar."}]


class Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: puts its text, which is learned, in brackets."""

    tags = frozenset(["generation"])

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("bracket", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def bracket(self, context, caller):
        opening, closing = context.resolve(BRACKETS)
        return opening + caller() + closing


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' dialect, without access to Python, and without products that fill memory."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self):
        extensions = [Generation, ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        self.globals["raise_exception"] = refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def call_binop(self, context, operator, left, right):
        a, b = (len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right))
        if a * b > LARGEST or (operator == "**" and b > 64):
            raise SecurityError(f"{a} {operator} {b} is too large")
        return super().call_binop(context, operator, left, right)


def refuse(message):
    raise jinja2.TemplateError(message)


@contextmanager
def time_limit(seconds):
    """Raises TimeoutError in a template that runs longer, whatever it loops over."""
    end, before, events = time.thread_time() + seconds, sys.gettrace(), count()

    def trace(frame, event, arg):
        if next(events) % 64 == 0 and time.thread_time() > end:  # the clock is slow to read
            raise TimeoutError(f"it takes longer than {seconds:g} s")
        return trace if frame.f_code.co_filename == "<template>" else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def learned_spans(spans, messages):
    """Returns the spans of {% generation %} blocks without those of answers of weight 0."""
    learned = [is_learned(message) for message in messages if message["role"] == "assistant"]
    if all(learned):
        return spans
    if len(spans) != len(learned):
        blocks = f"marks {len(spans)} spans in {len(learned)} answers"
        raise UserError(f"the model's own chat template {blocks}: which has weight 0?")
    return list(compress(spans, learned))


class ChatTemplate:
    """The Jinja `source`, or that named "default" of a folder's list, for a tokenizer.

    UserError if it is no Jinja. `end` is the id that it writes after an answer, or None.
    """

    def __init__(self, tokenizer, source):
        if isinstance(source, list):
            source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
        if not isinstance(source, str):
            problem = "its folder names a chat template and has none, or none named default"
            raise UserError(f"{tokenizer.source}: {problem}")
        self.source, self.controls = source, tokenizer.controls
        self.special_tokens = special_tokens(tokenizer)
        # the compiler computes constants, which may fail in every way
        with refusing(Exception, f"{tokenizer.source}: its folder's chat template is not Jinja"):
            self._template = Sandbox().from_string(source)
        self._set_patterns(tokenizer.added)
        _, _, after = self._write(ONE_TURN, "  ").rpartition(ONE_TURN[-1]["content"])
        end = self._specials.search(after)
        self.end = end and self._id(end[0])

    def _set_patterns(self, added):
        symbols = sorted(filter(None, self.controls), key=len, reverse=True)  # the longest wins
        space = lambda symbol, flag: r"\s*" if added.get(symbol, {}).get(flag) else ""
        spaced = [space(s, "lstrip") + re.escape(s) + space(s, "rstrip") for s in symbols]
        self._specials = re.compile(f"({'|'.join(spaced)})")
        self._turn_end = re.compile(rf"(?:{'|'.join(map(re.escape, symbols))})(\s+)\Z")
        self._starts = tuple({s[:n] for s in symbols for n in range(1, len(s))})
        self._ends = tuple({s[n:] for s in symbols for n in range(1, len(s))})

    def _id(self, special):
        return self.controls[special if special in self.controls else special.strip()]

    @property
    def notes(self):
        """Sentences on where template and tokenizer do not fit."""
        note = "the chat template ends an answer with no control token of this tokenizer"
        return [note] if self.end is None else []

    def plain_text(self):
        """Returns the source for programs that know no {% generation %}, a tag of transformers."""
        plain = lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}"
        return GENERATION.sub(plain, self.source)

    def render(self, tokenizer, messages, add_generation_prompt=False):
        """Returns (ids, mask), see lib.conversation.render. UserError if the template refuses.

        The mask is that of {% generation %} blocks, else of the answers as `_answers` finds them.
        """
        used = "".join([self.source, *self.controls, *(m["content"] for m in messages)])
        free = (letter for letter in map(chr, count(0xFDD0)) if letter not in used)
        escape, *brackets = islice(free, 3)  # noncharacters, unless they are in use
        messages = [m | {"content": self._escaped(m["content"], escape)} for m in messages]
        text = self._write(messages, brackets, add_generation_prompt)
        if GENERATION.search(self.source):
            pieces = re.split("|".join(brackets), text)  # each second one is learned
            text, ends = "".join(pieces), list(accumulate(map(len, pieces)))
            spans = learned_spans(list(zip(ends[::2], ends[1::2])), messages)
        else:
            spans = self._answers(messages, text, brackets)
        return self._encode(tokenizer, text, spans, escape)

    def _escaped(self, content, escape):
        """Returns a content with no control token, and no part for the template to complete."""
        for symbol in filter(None, self.controls):
            while symbol in content:  # they may overlap
                content = content.replace(symbol, symbol[0] + escape + symbol[1:])
        body = content.strip()  # a template may trim it
        inside = any(body in symbol for symbol in self.controls)
        before = escape if inside or body.startswith(self._ends) else ""
        after = escape if inside or body.endswith(self._starts) else ""
        return content.replace(body, before + body + after, 1)

    def _write(self, messages, brackets, add_generation_prompt=False):
        """Returns messages as the template's text."""
        variables = {"messages": messages, "tools": None, "documents": None, BRACKETS: brackets}
        variables |= {"add_generation_prompt": add_generation_prompt, **self.special_tokens}
        try:
            with time_limit(SECONDS):
                return self._template.render(variables)
        except Exception as error:  # a template can fail in every way
            verb = "refuses this conversation" if type(error) is jinja2.TemplateError else "fails"
            problem = f"{verb}: {str(error) or type(error).__name__}"
            raise UserError(f"the model's own chat template {problem}") from None

    def _answers(self, messages, text, brackets):
        """Returns the spans of the answers in `text`, by rendering what leads to each.

        A template that writes a turn otherwise once another follows, as those of thinking models
        do, gives the span of the last answer only. White space after its last token is left out.
        """
        spans, holds = [], True
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opening = self._write(messages[:index], brackets, True) if index else ""
            closing = self._write(messages[: index + 1], brackets)
            holds = holds and text.startswith(closing)
            start, end = (shared_length(part, text) for part in (opening, closing))
            space = self._turn_end.search(text, start, end)
            span = (start, space.start(1) if space else end)
            spans.append(span if is_learned(message) else None)
        return list(filter(None, spans if holds else spans[-1:]))

    def _encode(self, tokenizer, text, spans, escape):
        """Returns (ids, mask) of a rendered text: 1 for tokens with a character in a span."""
        spans = [[end - text.count(escape, 0, end) for end in span] for span in spans]
        ids, mask, at = [], [], 0  # positions do not count escapes
        for number, part in enumerate(self._specials.split(text)):
            plain = part.replace(escape, "")
            if number % 2:
                new, starts, ends = [self._id(part)], np.zeros(1), np.array([len(part)])
            elif plain:
                new, starts, ends = tokenizer.encode_spans(plain, begins=not ids)
            else:
                continue
            learned = np.zeros(len(new), int)
            for a, b in spans:
                learned |= (starts < b - at) & (ends > a - at)
            ids += new
            mask += learned.tolist()
            at += len(plain)
        return ids, mask


def jinja(template, bos=True):
    """Returns one of our templates as Jinja, which raises for what `render` refuses."""

    def put(text):
        if text == SPECIALS["eos"]:
            return "{{ eos_token }}"
        return f"{{{{ {json.dumps(text)} }}}}" if text else ""

    def raises(problem):
        return f"{{{{ raise_exception({json.dumps(problem)}) }}}}"

    def message(role):
        head = template.heads[role].rstrip(" ")  # the space is the model's to write
        space = template.heads[role][len(head) :]
        body = f"{put(space)}{{{{ content | trim }}}}{put(template.ends[role])}"
        if role == "assistant":
            body = f"{{% generation %}}{body}{{% endgeneration %}}"
        return f"{{% elif message['role'] == '{role}' %}}{put(head)}{body}"

    unknown = raises(f"role must be one of {', '.join(ROLES)}")
    return (
        f"{'{{ bos_token }}' if bos else ''}{{% for message in messages %}}"
        f"{{% if not loop.first %}}{put(template.between)}{{% endif %}}"
        "{% set content = message['content'] %}"
        "{% if content is not string or not content | trim %}"
        f"{raises('content must be text that is not empty')}"
        f"{''.join(map(message, ROLES))}{{% else %}}{unknown}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{put(template.prompt)}{{% endif %}}"
    )
