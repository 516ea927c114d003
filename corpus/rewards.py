"""Questions whose answers a program can check, and what an answer to them is worth.

A row is a question as SFT reads it, with "check" as in the sample tasks or "answer": a number or a
text, or GSM8K's solution with the number behind "####".
"""

import math
import re
import runpy
from decimal import Decimal

from corpus.chats import to_chat
from corpus.samples import passes
from corpus.sources import BadRow, usable_rows
from lib.config import UserError, refusing
from lib.conversation import render

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def right(prompt, text, row):
    """Returns whether `text` is right by the row's check, or equals its answer.

    What stands behind "####" counts, if it is there. A number is compared with the last one in
    `text`. Raises one of UNCHECKABLE for a row that has neither.
    """
    if row.get("check"):
        return passes(row["check"], text)
    answer = row["answer"]
    if not isinstance(answer, str | int | float):
        raise TypeError(f"answer must be text or a number, got {answer!r:.60}")
    given, expected = (s.rpartition("####")[2].strip(" \n$.") for s in (text, str(answer)))
    if not NUMBER.fullmatch(expected):
        return passes({"kind": "exact", "answer": expected}, given)
    number, *numbers = (Decimal(n.replace(",", "")) for n in (expected, *NUMBER.findall(given)))
    return numbers[-1:] == [number]


UNCHECKABLE = AssertionError, AttributeError, KeyError, TypeError


def read_questions(path, tally, tokenizer, checked):
    """Returns [{"prompt", "ids", "row", "where", "checkable"}, ...] of a file.

    The prompt, messages, is all before the last answer, which may be missing; ids are the prompt's
    in the tokenizer's template. `checked` refuses rows that `right` can say nothing about.
    """

    def convert(row):
        rule, messages, *_ = to_chat({"response": "-"} | row if isinstance(row, dict) else row)
        prompt, checkable = messages[:-1], True
        try:
            right(prompt, "", row)
        except UNCHECKABLE:
            checkable = False
        if checked and not checkable:
            remedy = 'add "check" or "answer", or use --reward=FILE.py:FUNCTION'
            raise BadRow("nothing-to-check", f"nothing checks an answer; {remedy}")
        try:
            ids, _ = render(tokenizer, prompt, tokenizer.template, add_generation_prompt=True)
        except UserError as error:  # as "conversation roles must alternate"
            raise BadRow("refused-by-template", str(error)) from None
        return rule, {"prompt": prompt, "ids": ids, "row": row, "checkable": checkable}

    return [q | {"where": where} for where, _, q in usable_rows(path, convert, tally)]


def load_reward(name):
    """Returns the function that is called `right`, or FILE.py:FUNCTION."""
    path, _, function = name.rpartition(":")
    with refusing(Exception, f"reward {name!r} does not load", "name right, or FILE.py:FUNCTION"):
        return right if name == "right" else runpy.run_path(path)[function]


def reward_of(name, function, text, question):
    """Returns what a function says of an answer; UserError, with the row, if that is no number."""
    where = f"reward {name}: {question['where']}, answer {text!r:.60}"
    with refusing(Exception, where, "mend the function"):
        value = function(question["prompt"], text, question["row"])
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {value!r:.60}")
    return float(value)
