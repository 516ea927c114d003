"""Small files to try alignment with, made offline: `python data.py create_sample_datasets`.

    sft_train.jsonl  sft_val.jsonl   {"prompt", "response", "check", "kind"}
    dpo_train.jsonl  dpo_val.jsonl   {"prompt", "chosen", "rejected", "check", "kind", "about"}

The tasks are short enough for a model of a few million parameters, and each row carries the
`check` by which a program scores an answer to it: `passes(check, answer)`. No prompt stands in two
of the files, but a task can be put in several ways, and its other ways may stand in training: the
held-out files ask for what was taught, in words that were not. Everything is a function of the
seed and, where a task is about Python, of this Python's own documentation.
"""

import ast
import importlib
import json
import random
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from corpus.sources import docstrings
from lib.config import NonNegativeInt, UserError, write_whole

FILES = ("sft_train", "sft_val", "dpo_train", "dpo_val")
SHARES = (0.68, 0.08, 0.21, 0.03)  # of each kind of task, over FILES
MOST = 440  # tasks of one kind


@dataclass(frozen=True)
class SampleFilesConfig:
    """Where the samples go, and which they are."""

    output_dir: str = "data/samples"  # four .jsonl files are written here
    seed: NonNegativeInt = 42  # of the choice and the order of the tasks


# ---- is an answer right?


def passes(check, answer):
    """Returns whether `answer` is right by `check`, {"kind": ..., "answer": ...}.

    Space around the answer and a last period are free. Kinds: "exact", the very text; "word",
    letter case aside; "number", any text with this number and no other; "overlap", a text with the
    check's `share` of the words of "answer", not twice as long.
    """
    kind, right = check["kind"], check["answer"]
    given = answer.strip().removesuffix(".").strip("\"'` ")
    if kind == "exact":
        return given == right
    if kind == "word":
        return given.lower() == right.lower()
    if kind == "number":
        return re.findall(r"\d+", given) == [right] and not re.search(r"[-.,]\d", given)
    assert kind == "overlap", f"no such check: {kind}"
    expected, present = (re.findall(r"\w+", text.lower()) for text in (right, given))
    shared = (Counter(expected) & Counter(present)).total()
    return len(present) < 2 * len(expected) and shared >= check["share"] * len(expected)


class Answer(NamedTuple):
    """The answer to a task, its check, and texts that come near it but are wrong."""

    text: str
    check: dict
    wrong: list


def exact(text, *wrong):
    return Answer(text, {"kind": "exact", "answer": text}, list(wrong))


def word(text, *wrong):
    return Answer(text, {"kind": "word", "answer": text}, list(wrong))


def number(value):
    near = [str(value + step) for step in (1, -1, 2, 10) if value + step >= 0]
    return Answer(str(value), {"kind": "number", "answer": str(value)}, near)


# ---- words, the forms of questions, the phrases of rejected answers

TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
WORDS = TABLES["words"]


# ---- kinds of tasks: generators of (values, Answer); TABLES["forms"] has their questions


def word_task(answer_to, change=str):
    """Returns a generator of a task about change(w) for each w of WORDS."""
    return lambda rng: (((change(w),), answer_to(w)) for w in WORDS)


def neighbours(rng):
    after = "What number comes right after", "Count on by one from", "Which number follows"
    before = "What number comes right before", "Count back by one from"
    for value in range(1, 80):
        for form in (*after, *before):
            mark = "." if form.startswith("Count") else "?"
            yield (form, value, mark), number(value + (1 if form in after else -1))


def comparison(rng):
    for a, b in product(range(0, 31, 2), repeat=2):
        a, b = a + b % 3, b + a % 2
        yield (a, b), word(*(("Yes", "No") if a > b else ("No", "Yes")))


def has_letter(rng):
    for w in WORDS:
        present = rng.choice(w)
        absent = rng.choice([letter for letter in "aeioustrln" if letter not in w])
        yield from (((present, w), word("Yes", "No")), ((absent, w), word("No", "Yes")))


def word_order(rng):
    forms = "Put these words in alphabetical order", "Sort these words from A to Z"
    for _ in range(MOST):
        words = rng.sample(WORDS, 3)
        right, last_first = sorted(words), sorted(words, reverse=True)
        answer = exact(*map(", ".join, (right, last_first, right[1:])))
        yield (rng.choice(forms), ", ".join(words)), answer


def repeated_words(rng):
    times = {2: "twice", 3: "three times", 4: "four times"}
    for w, (count, name) in product(WORDS, times.items()):
        answer = exact(" ".join([w] * count), " ".join([w] * (count + 1)), w)
        yield (rng.choice(("Say", "Write the word", "Repeat")), w, name), answer


def opposites(rng):
    pairs = TABLES["opposites"]
    uses = Counter(chain.from_iterable(pairs))  # a word that stands twice has two opposites
    for given, opposite in chain(pairs, (pair[::-1] for pair in pairs)):
        if uses[given] == 1:
            yield (given,), word(opposite, given)


def plurals(rng):
    return (((w,), word(many, w + "es", w + "s", w)) for w, many in TABLES["plurals"])


def past_tense(rng):
    return (((verb,), word(past, verb + "ed", verb)) for verb, past in TABLES["past_tense"])


def categories(rng):
    for right, names in TABLES["categories"].items():
        for name in names:
            wrong = rng.choice([other for other in TABLES["categories"] if other != right])
            yield (name, *rng.sample((right, wrong), 2)), word(right, wrong)


def facts(rng):
    return (((question,), word(answer)) for question, answer in TABLES["facts"])


def python_functions(rng):
    functions = sorted(summaries().items())
    chosen = rng.sample(functions, min(len(functions), MOST // 3))
    for name, summary in chosen:
        check = {"kind": "overlap", "answer": summary, "share": 0.6}
        wrong = [other for _, other in rng.sample(chosen, min(3, len(chosen)))]
        yield (name,), Answer(summary, check, wrong)


TASKS = {  # their order counts
    "addition": lambda rng: (((a, b), number(a + b)) for a, b in product(range(13), repeat=2)),
    "subtraction": lambda rng: (
        ((a, b), number(a - b)) for a, b in product(range(19), repeat=2) if a >= b
    ),
    "multiplication": lambda rng: (
        ((a, b), number(a * b)) for a, b in product(range(11), repeat=2)
    ),
    "neighbours": neighbours,
    "comparison": comparison,
    "length": word_task(lambda w: number(len(w))),
    "capitals": word_task(lambda w: exact(w.upper(), w, w.title())),
    "small_letters": word_task(lambda w: exact(w, w.upper(), w.title()), str.upper),
    "backwards": word_task(lambda w: exact(w[::-1], w, w[-1] + w[:-1])),
    "spelling": word_task(lambda w: exact(" ".join(w), w, " ".join(w[:-1]))),
    "first_letter": word_task(lambda w: word(w[0], w[-1], w[1])),
    "last_letter": word_task(lambda w: word(w[-1], w[0], w[-2])),
    "has_letter": has_letter,
    "sorting": word_order,
    "repetition": repeated_words,
    "opposites": opposites,
    "plurals": plurals,
    "past_tense": past_tense,
    "categories": categories,
    "one_word": facts,
    "python_functions": python_functions,
}


def all_tasks(kind, rng):
    """Yields (prompt, Answer) of every task of a kind, in each form of its question."""
    for values, answer in TASKS[kind](rng):
        yield from ((form.format(*values), answer) for form in TABLES["forms"][kind])


# ---- what Python's functions do, in the words of their own documentation

BUILTINS = (str, list, dict, set, tuple, bytes, int, float)
COMPILED = ("math", "itertools", "operator", "time")
SUMMARY = re.compile(r"[A-Z][a-z]+( [A-Za-z0-9'(),/-]+){2,14}\.")  # one plain line


@cache
def summaries():
    """Returns {name: the first line of its documentation} of Python's public functions."""
    lines = {}
    for name, text in chain(compiled_documentation(), module_documentation()):
        summary = text.strip().split("\n\n")[0]
        if SUMMARY.fullmatch(summary) and "_" not in (name[0], name.rpartition(".")[2][0]):
            lines[name] = summary
    return lines


def compiled_documentation():
    """Yields (name, documentation) of functions of which Python has no source text."""
    for owner in chain(BUILTINS, map(importlib.import_module, COMPILED)):
        for name, thing in vars(owner).items():
            if callable(thing) or isinstance(thing, classmethod | staticmethod):
                yield f"{owner.__name__}.{name}", thing.__doc__ or ""


def module_documentation():
    """Yields (name, documentation) of the functions and methods of some well-known modules."""
    for module in TABLES["modules"]:
        path = Path(sysconfig.get_path("stdlib")) / module
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file():
            continue  # not in this version of Python, or compiled
        tree = ast.parse(path.read_bytes())
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
        for node in [tree, *classes]:
            title = module if node is tree else f"{module}.{node.name}"
            for text in docstrings(node, "", f"{title}."):
                name, _, documentation = text.partition("\n\n")
                if name:
                    yield name, documentation


# ---- what is wrong with a rejected answer

FLAWS = {"correctness": 45, "rambling": 25, "rudeness": 18, "evasion": 12}  # per cent of the pairs


def rejected(answer, flaw, others, rng):
    """Returns a text worse than `answer` by `flaw`; `others` are the answers to other tasks."""
    bare = answer.text.removesuffix(".")
    if flaw == "correctness":
        near = [text for text in answer.wrong if not passes(answer.check, text)]
        return rng.choice(near or [text for text in others if not passes(answer.check, text)])
    if flaw == "rambling" and rng.random() < 0.3:
        return " ".join([answer.text] * rng.randint(3, 6))
    if flaw == "rambling":
        return f"{bare}. {' '.join(rng.sample(TABLES['fillers'], rng.randint(1, 3)))}"
    phrase = rng.choice(TABLES["rude" if flaw == "rudeness" else "evasive"])
    return phrase.format(bare)


# ---- the files


def create_sample_datasets(cfg):
    """Write small files to try alignment with, or find them there; never over other contents.

    python data.py create_sample_datasets [--output_dir=data/samples] [--seed=42]
    """
    folder = Path(cfg.output_dir)
    files = {folder / f"{name}.jsonl": to_jsonl(rows) for name, rows in make_rows(cfg.seed).items()}
    try:
        present = {path for path in files if path.exists()}
        for path in sorted(present):
            if path.read_bytes() != files[path]:
                raise UserError(
                    f"{path}: exists, with other contents; name another --output_dir, or delete it"
                )
        for path in sorted(files.keys() - present):
            write_whole(path, files[path])
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); name another --output_dir"
        raise UserError(f"{folder}: {reason}") from None
    for path, content in files.items():
        note = "  (was there)" if path in present else ""
        print(f"{path}{content.count(10):>8,} rows{note}")


def make_rows(seed):
    """Returns {"sft_train": rows, ...} for each of FILES."""
    files, used = {name: [] for name in FILES}, set()
    for kind in TASKS:
        rng = random.Random(f"{seed} {kind}")  # one for each, so that no kind depends on another
        tasks = {prompt: answer for prompt, answer in all_tasks(kind, rng) if prompt not in used}
        used |= tasks.keys()
        tasks = list(tasks.items())
        rng.shuffle(tasks)
        tasks = tasks[:MOST]
        others, start = [answer.text for _, answer in tasks], 0
        for number, name in enumerate(FILES, start=1):
            end = round(len(tasks) * sum(SHARES[:number]))
            make = sft_row if name.startswith("sft") else dpo_row
            files[name] += [make(kind, *task, others, rng) for task in tasks[start:end]]
            start = end
    for name, rows in files.items():
        random.Random(f"{seed} {name}").shuffle(rows)
    return files


def sft_row(kind, prompt, answer, others, rng):
    return {"prompt": prompt, "response": answer.text, "check": answer.check, "kind": kind}


def dpo_row(kind, prompt, answer, others, rng):
    flaw = rng.choices([*FLAWS], [*FLAWS.values()])[0]
    texts = {"chosen": answer.text, "rejected": rejected(answer, flaw, others, rng)}
    return {"prompt": prompt, **texts, "check": answer.check, "kind": kind, "about": flaw}


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
