"""Small files to try alignment with, made here and offline: `python data.py create_sample_datasets`.

    data/samples/  sft_train.jsonl  sft_val.jsonl   {"prompt", "response", "check", "kind"}
                   dpo_train.jsonl  dpo_val.jsonl   {"prompt", "chosen", "rejected", "check", "kind", "about"}

The tasks are short enough for a model of a few million parameters, and each row carries the `check` by which
a program scores an answer to it: `passes(check, answer)`. Where a task can be put in several ways, its other
ways may stand in training: the held-out files ask for what was taught, in words that were not. No prompt
stands in two of the files. Everything is a function of the seed and, where a task is about Python, of this
Python's own documentation.
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
class SampleConfig:
    """Where the samples go, and which they are."""

    output_dir: str = "data/samples"  # four .jsonl files are written here
    seed: NonNegativeInt = 42  # of the choice and the order of the tasks


class Task(NamedTuple):
    """A question, its answer, the check of an answer, and answers that come near it but are wrong."""

    prompt: str
    answer: str
    check: dict
    wrong: list


# ---- is an answer right?


def passes(check, answer):
    """Is `answer` right by `check`, {"kind": ..., "answer": ...}? Space around it and a last period are free.

    Kinds: "exact", the very text; "word", letter case aside; "number", whatever holds this number and no
    other; "overlap", a text with the check's `share` of the words of "answer", not twice as long.
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
    wanted, found = (re.findall(r"\w+", text.lower()) for text in (right, given))
    shared = (Counter(wanted) & Counter(found)).total()
    return len(found) < 2 * len(wanted) and shared >= check["share"] * len(wanted)


def exact(prompt, answer, *wrong):
    return Task(prompt, answer, {"kind": "exact", "answer": answer}, list(wrong))


def word(prompt, answer, *wrong):
    return Task(prompt, answer, {"kind": "word", "answer": answer}, list(wrong))


def number(prompt, value):
    near = [str(value + step) for step in (1, -1, 2, 10) if value + step >= 0]
    return Task(prompt, str(value), {"kind": "number", "answer": str(value)}, near)


# ---- words

WORDS = """
    apple bread bird boat book box bridge bus cake cat chair clock cloud coat corn cow cup dog door dress drum
    duck egg farm fire fish flag floor flower fork frog fruit game garden gift girl glass goat gold grass hand
    hat hill horse house ice jam key king kite lake lamp leaf lemon letter lion map milk mirror money moon
    mouse music nest night nose ocean orange paper pen piano pig pilot plant plate pond queen rabbit rain ring
    river road rock roof rope rose salt sand school sea seed sheep ship shirt shoe silver snow soap sock song
    soup spoon star stone storm street sugar summer sun table tea tent tiger tooth tower town train tree truck
    village wall watch water whale wheel wind window winter wolf wood"""
OPPOSITES = """
    hot cold, big small, up down, left right, fast slow, day night, open closed, full empty, wet dry,
    light dark, happy sad, old young, rich poor, long short, hard soft, loud quiet, early late, strong weak,
    clean dirty, high low, near far, thick thin, wide narrow, true false, first last, inside outside,
    above below, before after, always never, cheap expensive, safe dangerous, heavy light, sweet sour,
    begin end, buy sell, push pull, win lose, give take, love hate, laugh cry, arrive leave, remember forget,
    alive dead, brave afraid, easy difficult, deep shallow, new old, good bad"""
PLURALS = """
    cat cats, dog dogs, book books, tree trees, bus buses, box boxes, dish dishes, church churches,
    glass glasses, baby babies, city cities, story stories, lady ladies, boy boys, key keys, leaf leaves,
    wolf wolves, knife knives, wife wives, shelf shelves, man men, woman women, child children, foot feet,
    tooth teeth, goose geese, mouse mice, ox oxen, person people, potato potatoes, tomato tomatoes,
    hero heroes, sheep sheep, fish fish, day days, party parties, watch watches, fox foxes, half halves,
    life lives, toy toys, berry berries, bench benches, kiss kisses"""
PAST = """
    go went, see saw, eat ate, run ran, come came, give gave, take took, make made, buy bought, think thought,
    bring brought, write wrote, read read, sing sang, swim swam, drink drank, drive drove, fly flew,
    grow grew, know knew, speak spoke, break broke, sleep slept, keep kept, feel felt, leave left, lose lost,
    meet met, find found, tell told, sell sold, stand stood, win won, walk walked, play played,
    jump jumped, ask asked, open opened, carry carried, stop stopped"""
KINDS = {
    "an animal": "dog cat horse cow sheep goat lion tiger wolf fox mouse rabbit frog whale duck eagle",
    "a plant": "lily oak grass tulip cactus fern daisy moss ivy clover pine bamboo",
    "a colour": "red blue green yellow black white brown grey pink purple",
    "a food": "bread cheese soup rice butter cake pasta honey jam toast",
    "a vehicle": "car bus truck train bicycle boat tram taxi",
    "a tool": "hammer saw drill spade screwdriver rake axe",
}
FACTS = {
    "what colour is grass?": "green",
    "what colour is snow?": "white",
    "what colour is coal?": "black",
    "what colour is a ripe banana?": "yellow",
    "what colour is the sky on a clear day?": "blue",
    "what colour is blood?": "red",
    "what does a cow give us to drink?": "milk",
    "what do bees make?": "honey",
    "what do hens lay?": "eggs",
    "what is frozen water called?": "ice",
    "what falls from clouds when it is warm?": "rain",
    "what do we call a young dog?": "puppy",
    "what do we call a young cat?": "kitten",
    "what do we call a young sheep?": "lamb",
    "what do we call a young cow?": "calf",
    "which season comes after winter?": "spring",
    "which season comes after spring?": "summer",
    "which season comes after summer?": "autumn",
    "which season comes after autumn?": "winter",
    "which day comes after Monday?": "Tuesday",
    "which day comes after Tuesday?": "Wednesday",
    "which day comes after Wednesday?": "Thursday",
    "which day comes after Thursday?": "Friday",
    "which day comes after Friday?": "Saturday",
    "which day comes after Saturday?": "Sunday",
    "which day comes after Sunday?": "Monday",
    "which month comes after January?": "February",
    "which month comes after March?": "April",
    "which month comes after May?": "June",
    "which month comes after July?": "August",
    "which month comes after November?": "December",
    "what do you use to see?": "eyes",
    "what do you use to hear?": "ears",
    "what do you use to smell?": "nose",
    "where do fish live?": "water",
    "what is the opposite of north?": "south",
    "what is the opposite of east?": "west",
    "what shape has three sides?": "triangle",
    "what star gives us light by day?": "sun",
    "what shines in the sky at night?": "moon",
    "what do you wear on your feet?": "shoes",
    "what do you wear on your head?": "hat",
    "what do you open a lock with?": "key",
    "what animal barks?": "dog",
    "what animal says meow?": "cat",
}


def table(text):
    """The pairs of words in a table as above."""
    return [tuple(pair.split()) for pair in text.split(",")]


# ---- kinds of tasks: generators of every task of a kind, each put in several ways


def ways(*forms):
    """Make a function that puts one question in each of these forms."""
    return lambda *values: [form.format(*values) for form in forms]


def addition(rng):
    put = ways("What is {} plus {}?", "Add {} and {}.", "{} + {} = ?")
    return (number(prompt, a + b) for a, b in product(range(13), repeat=2) for prompt in put(a, b))


def subtraction(rng):
    put = ways(
        "What is {} minus {}?", "{} - {} = ?", "Start with {} and take away {}. What is left?"
    )
    pairs = ((a, b) for a, b in product(range(19), repeat=2) if a >= b)
    return (number(prompt, a - b) for a, b in pairs for prompt in put(a, b))


def multiplication(rng):
    put = ways("What is {} times {}?", "Multiply {} by {}.", "{} x {} = ?")
    return (number(prompt, a * b) for a, b in product(range(11), repeat=2) for prompt in put(a, b))


def neighbours(rng):
    after = ways(
        "What number comes right after {}?", "Count on by one from {}.", "Which number follows {}?"
    )
    before = ways("What number comes right before {}?", "Count back by one from {}.")
    for value in range(1, 80):
        yield from (number(prompt, value + 1) for prompt in after(value))
        yield from (number(prompt, value - 1) for prompt in before(value))


def comparison(rng):
    put = ways("Is {} greater than {}? Answer yes or no.", "Yes or no: is {} more than {}?")
    for a, b in product(range(0, 31, 2), repeat=2):
        a, b = a + b % 3, b + a % 2
        right, wrong = ("Yes", "No") if a > b else ("No", "Yes")
        yield from (word(prompt, right, wrong) for prompt in put(a, b))


def length(rng):
    put = ways(
        "How many letters are in the word {}?",
        "Count the letters of {}.",
        "How many letters does {} have?",
    )
    return (number(prompt, len(w)) for w in WORDS.split() for prompt in put(w))


def capitals(rng):
    put = ways(
        "Write {} in capital letters.", "Put the word {} in upper case.", "Turn {} into capitals."
    )
    return (exact(prompt, w.upper(), w, w.title()) for w in WORDS.split() for prompt in put(w))


def small_letters(rng):
    put = ways(
        "Write {} in small letters.",
        "Put the word {} in lower case.",
        "Turn {} into small letters.",
    )
    return (
        exact(prompt, w, w.upper(), w.title()) for w in WORDS.split() for prompt in put(w.upper())
    )


def backwards(rng):
    put = ways("Reverse the word {}.", "Write {} backwards.", "Spell {} from the end to the start.")
    return (exact(prompt, w[::-1], w, w[-1] + w[:-1]) for w in WORDS.split() for prompt in put(w))


def spelling(rng):
    put = ways(
        "Spell the word {}.", "Write {} letter by letter.", "Put a space between the letters of {}."
    )
    return (
        exact(prompt, " ".join(w), w, " ".join(w[:-1])) for w in WORDS.split() for prompt in put(w)
    )


def first_letter(rng):
    put = ways(
        "What is the first letter of {}?",
        "With which letter does {} begin?",
        "Name the first letter of {}.",
    )
    return (word(prompt, w[0], w[-1], w[1]) for w in WORDS.split() for prompt in put(w))


def last_letter(rng):
    put = ways(
        "What is the last letter of {}?",
        "With which letter does {} end?",
        "Name the last letter of {}.",
    )
    return (word(prompt, w[-1], w[0], w[-2]) for w in WORDS.split() for prompt in put(w))


def has_letter(rng):
    put = ways(
        "Is there a letter {} in the word {}? Answer yes or no.", "Yes or no: is {} a letter of {}?"
    )
    for w in WORDS.split():
        absent = [letter for letter in "aeioustrln" if letter not in w]
        for letter, right, wrong in (
            (rng.choice(w), "Yes", "No"),
            (rng.choice(absent), "No", "Yes"),
        ):
            yield from (word(prompt, right, wrong) for prompt in put(letter, w))


def sorting(rng):
    put = ways(
        "Put these words in alphabetical order: {}, {}, {}.",
        "Sort these words from A to Z: {}, {}, {}.",
    )
    for _ in range(MOST):
        words = rng.sample(WORDS.split(), 3)
        right = ", ".join(sorted(words))
        wrong = ", ".join(sorted(words, reverse=True)), ", ".join(sorted(words)[1:])
        yield exact(rng.choice(put(*words)), right, *wrong)


def repetition(rng):
    put = ways("Say {} {}.", "Write the word {} {}.", "Repeat {} {}.")
    for w, (times, said) in product(
        WORDS.split(), ((2, "twice"), (3, "three times"), (4, "four times"))
    ):
        right, more = " ".join([w] * times), " ".join([w] * (times + 1))
        yield exact(rng.choice(put(w, said)), right, more, w)


def opposites(rng):
    put = ways(
        "What is the opposite of {}?",
        "Give the opposite of the word {}.",
        "Which word is the opposite of {}?",
    )
    pairs = table(OPPOSITES)
    meant = Counter(chain.from_iterable(pairs))  # a word that stands twice has no one opposite
    for one, other in chain(pairs, (pair[::-1] for pair in pairs)):
        if meant[one] == 1:
            yield from (word(prompt, other, one) for prompt in put(one))


def plurals(rng):
    put = ways("What is the plural of {}?", "One {}, two what?", "Give the plural of the word {}.")
    for one, many in table(PLURALS):
        yield from (word(prompt, many, one + "es", one + "s", one) for prompt in put(one))


def past_tense(rng):
    put = ways(
        "What is the past tense of {}?",
        "Today I {}. What did I do yesterday?",
        "Give the past tense of {}.",
    )
    for now, past in table(PAST):
        yield from (word(prompt, past, now + "ed", now) for prompt in put(now))


def categories(rng):
    put = ways(
        "Does the word {} name {} or {}?",
        "The word {}: is it {} or {}?",
        "Which one is {}: {} or {}?",
    )
    for kind, names in KINDS.items():
        for name in names.split():
            other = rng.choice([k for k in KINDS if k != kind])
            first, second = rng.sample((kind, other), 2)
            yield from (word(prompt, kind, other) for prompt in put(name, first, second))


def one_word(rng):
    put = ways("Answer in one word: {}", "In a single word, {}", "One word only, please: {}")
    for question, answer in FACTS.items():
        yield from (word(prompt, answer) for prompt in put(question))


# What Python's functions do, in the words of their own documentation

MODULES = """
    argparse array base64 bisect calendar cmath code codecs collections colorsys configparser contextlib copy
    csv datetime decimal difflib dis email fileinput filecmp fnmatch fractions functools getpass gettext glob
    graphlib gzip heapq html imaplib inspect io ipaddress itertools json keyword linecache locale logging
    mailbox math mimetypes operator os pathlib pickle pkgutil platform plistlib pprint queue quopri random re
    reprlib sched secrets shelve shlex shutil signal site socket sqlite3 stat statistics string struct
    subprocess sys tarfile tempfile textwrap threading time timeit token tokenize trace traceback turtle types
    typing unittest urllib uuid warnings wave weakref zipfile"""
BUILTINS = (str, list, dict, set, tuple, bytes, int, float)
COMPILED = ("math", "itertools", "operator", "time")
SUMMARY = re.compile(r"[A-Z][a-z]+( [A-Za-z0-9'(),/-]+){2,14}\.")  # one plain line


def python_functions(rng):
    put = ways("What does {} do?", "Explain {} in one sentence.", "In Python, what is {} for?")
    found = sorted(summaries().items())
    chosen = rng.sample(found, min(len(found), MOST // 3))
    for name, summary in chosen:
        check = {"kind": "overlap", "answer": summary, "share": 0.6}
        others = [other for _, other in rng.sample(chosen, min(3, len(chosen)))]
        yield from (Task(prompt, summary, check, others) for prompt in put(name))


@cache
def summaries():
    """{name: the one line that opens its documentation} of this Python's public functions and methods."""
    found = {}
    for name, text in chain(compiled_documentation(), module_documentation()):
        summary = text.strip().split("\n\n")[0]
        if SUMMARY.fullmatch(summary) and "_" not in (name[0], name.rpartition(".")[2][0]):
            found[name] = summary
    return found


def compiled_documentation():
    """(name, documentation) of what Python has no source text of."""
    for owner in chain(BUILTINS, map(importlib.import_module, COMPILED)):
        for name, thing in vars(owner).items():
            if callable(thing) or isinstance(thing, classmethod | staticmethod):
                yield f"{owner.__name__}.{name}", thing.__doc__ or ""


def module_documentation():
    """(name, documentation) of the functions and methods of some well-known modules."""
    for module in MODULES.split():
        path = Path(sysconfig.get_path("stdlib")) / module
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file():
            continue  # not in this version of Python, or compiled
        tree = ast.parse(path.read_bytes())
        for node in [
            tree,
            *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"),
        ]:
            title = module if node is tree else f"{module}.{node.name}"
            for piece in docstrings(node, "", f"{title}."):
                name, _, text = piece.partition("\n\n")
                if name:
                    yield name, text


GENERATORS = (
    addition,
    subtraction,
    multiplication,
    neighbours,
    comparison,
    length,
    capitals,
    small_letters,
    backwards,
    spelling,
    first_letter,
    last_letter,
    has_letter,
    sorting,
    repetition,
    opposites,
    plurals,
    past_tense,
    categories,
    one_word,
    python_functions,
)


# ---- what is wrong with a rejected answer

FILLERS = (
    "There is a lot more to say about this.",
    "Let me also tell you about something else.",
    "Many people ask me this, and I always enjoy the question.",
    "By the way, the weather has been strange this week.",
    "I could go on, and so I will.",
    "This reminds me of a long story.",
    "As I said before, it is like that, and it will stay like that.",
    "Of course one could see it in another way as well.",
)
RUDE = (
    "{}, as even a fool would know.",
    "What a stupid question. {}.",
    "Have you never been to school? {}.",
    "{}. Now stop wasting my time.",
    "Seriously? {}. Think before you ask.",
    "{}, obviously. Use your head next time.",
)
EVASIVE = (
    "That is hard to say.",
    "I would rather not answer that.",
    "It depends on how you look at it.",
    "Who knows? Maybe someone else can help you.",
    "Please ask me something different.",
)
ABOUT = ("correctness", "rambling", "rudeness", "evasion")
WEIGHTS = (45, 25, 18, 12)  # per cent of the pairs


def rejected(task, about, others, rng):
    """An answer worse than the task's own in the respect `about`; `others` are answers to other tasks."""
    bare = task.answer.removesuffix(".")
    if about == "correctness":
        near = [text for text in task.wrong if not passes(task.check, text)]
        return rng.choice(near or [text for text in others if not passes(task.check, text)])
    if about == "rambling" and rng.random() < 0.3:
        return " ".join([task.answer] * rng.randint(3, 6))
    if about == "rambling":
        return f"{bare}. {' '.join(rng.sample(FILLERS, rng.randint(1, 3)))}"
    return rng.choice(RUDE).format(bare) if about == "rudeness" else rng.choice(EVASIVE)


# ---- the files


def create(cfg):
    """Write small files to try alignment with, or find them there; never over other contents.

    python data.py create_sample_datasets [--output_dir=data/samples] [--seed=42]
    """
    files = {f"{name}.jsonl": to_jsonl(rows) for name, rows in make_rows(cfg.seed).items()}
    folder = Path(cfg.output_dir)
    try:
        present = {name for name in files if (folder / name).exists()}
        for name in sorted(present):
            if (folder / name).read_bytes() != files[name]:
                there = f"{folder / name}: exists, with other contents"
                raise UserError(f"{there}; name another --output_dir, or delete it")
        for name in sorted(files.keys() - present):
            write_whole(folder / name, files[name])
    except OSError as error:
        why = f"cannot be written ({error.strerror}); name another --output_dir"
        raise UserError(f"{folder}: {why}") from None
    for name, content in files.items():
        note = "  (was there)" if name in present else ""
        print(f"{folder / name}{content.count(10):>8,} rows{note}")


def make_rows(seed):
    """Return {"sft_train": rows, ...} for each of FILES."""
    files, used = {name: [] for name in FILES}, set()
    for generate in GENERATORS:
        rng = random.Random(
            f"{seed} {generate.__name__}"
        )  # its own, so that no kind depends on another
        tasks = {task.prompt: task for task in generate(rng) if task.prompt not in used}
        used |= tasks.keys()
        tasks = list(tasks.values())
        rng.shuffle(tasks)
        tasks = tasks[:MOST]
        others, start = [task.answer for task in tasks], 0
        for name, end in zip(FILES, ends(len(tasks)), strict=True):
            for task in tasks[start:end]:
                row = sft_row if name.startswith("sft") else dpo_row
                files[name].append(row(task, generate.__name__, others, rng))
            start = end
    for name, rows in files.items():
        random.Random(f"{seed} {name}").shuffle(rows)
    return files


def ends(count):
    """Where the parts of `count` tasks end that go to each of FILES."""
    return [round(count * sum(SHARES[: number + 1])) for number in range(len(SHARES))]


def sft_row(task, kind, others, rng):
    return {"prompt": task.prompt, "response": task.answer, "check": task.check, "kind": kind}


def dpo_row(task, kind, others, rng):
    about = rng.choices(ABOUT, WEIGHTS)[0]
    answers = {"chosen": task.answer, "rejected": rejected(task, about, others, rng)}
    return {"prompt": task.prompt, **answers, "check": task.check, "kind": kind, "about": about}


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
