"""Presets and flags in, one checked dataclass out.

    python train.py configs/tiny.json --n_layer=2 --learning_rate 1e-3 --no_compile

A knob is declared once, as a field of a dataclass: its name is its flag, its annotation its check, its
trailing comment its line in --help. Presets (JSON) apply in the order given, then flags; a mistake in either
is told in the same words, on one line. This room knows no knob of any other room, and guesses nothing.
"""

import ast
import difflib
import errno
import inspect
import io
import json
import math
import os
import sys
import textwrap
import tokenize
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

# ---- mistakes


class UserError(Exception):
    """A mistake its user can mend; str() is one line: what, the value, what was expected, the remedy."""

    exit_code = 2  # what `run` ends the process with

    def __str__(self):
        return " ".join(
            super().__str__().splitlines()
        )  # one line, whatever path or message was quoted in it


def closest(word, choices, cutoff=0.6):
    """Return the choice spelled most like `word` (case aside, `-` like `_`), or None where none is near."""
    plain = {choice.lower().replace("-", "_"): choice for choice in choices}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), plain, n=1, cutoff=cutoff)
    return plain[near[0]] if near else None


def did_you_mean(word, choices, form="'{}'"):
    """Return how an error about an unknown `word` ends: '; did you mean ...?', or '' if no choice is near.

    Near is what is spelled alike, or the only choice with this word in it: num_train_epochs for epochs.
    """
    holding = [
        choice for choice in choices if len(word) > 3 and word.lower() in choice.lower().split("_")
    ]
    near = closest(word, choices) or (holding[0] if len(holding) == 1 else None)
    return f"; did you mean {form.format(near)}?" if near else ""


def shown(value):
    """Render a value for an error: as JSON spells it, strings called strings, cut to fit a line."""
    text = str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"string {text}" if isinstance(value, str) else text


# ---- what an annotation allows


@dataclass(frozen=True)
class Range:
    """Bound a number, ends included unless `open_low`: `n_layer: Annotated[int, Range(1, 512)] = 6`."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def __contains__(self, value):
        finite = -math.inf < value < math.inf  # false for NaN, as every comparison with it
        above = self.low is None or value > self.low or (value == self.low and not self.open_low)
        return finite and above and (self.high is None or value <= self.high)

    def __str__(self):
        if None not in (self.low, self.high) and not self.open_low:
            return f"{self.low}..{self.high}"
        ends = [(">" if self.open_low else ">=", self.low), ("<=", self.high)]
        return " and ".join(f"{sign} {end}" for sign, end in ends if end is not None)


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]

NOUNS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
NOUNS |= {tuple: "a list", list: "a JSON list", dict: "a JSON object"}
REQUIRED = (
    object()
)  # the default of a field that has none; MISSING cannot stand as a default itself


@dataclass(frozen=True)
class Knob:
    """What a field takes. The inside of a `list` or `dict` is checked by the room that declares it."""

    base: type
    limits: Range = Range()
    optional: bool = False
    choices: tuple = ()
    item: "Knob | None" = None  # of a tuple
    default: Any = REQUIRED

    def __str__(self):
        kind = "true|false" if self.base is bool else self.base.__name__
        name = "|".join(filter(None, map(str, self.choices))) or kind
        name = f"{self.item},..." if self.item else f"{name} {self.limits}".rstrip()
        return f"{name} or none" if self.optional else name


def knob_of(annotation):
    """Read an annotation; one that no flag can carry is the programmer's mistake and fails an assert."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = next((extra for extra in args[1:] if isinstance(extra, Range)), Range())
        return replace(knob_of(args[0]), limits=limits)
    if origin in (Union, UnionType):
        inner = [arg for arg in args if arg is not NoneType]
        assert len(inner) == 1, f"X | None is the only union understood, not {annotation}"
        return replace(knob_of(inner[0]), optional=True)
    if origin is Literal:
        return Knob(type(args[0]), choices=args)
    if origin is tuple:
        assert args[1:] == (...,), f"tuple[X, ...] is the only tuple understood, not {annotation}"
        return Knob(tuple, item=knob_of(args[0]))
    base = origin or annotation
    assert base in NOUNS.keys() - {tuple}, f"no flag can carry {annotation}"
    return Knob(base)


def knobs_of(cls):
    """Return {name: Knob} of a dataclass's fields, defaults included."""
    hints, knobs = get_type_hints(cls, include_extras=True), {}
    for field in fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = REQUIRED if default is MISSING else default
        if field.init:
            knobs[field.name] = replace(knob_of(hints[field.name]), default=default)
    return knobs


def accept(name, value, knob, source):
    """Return a JSON value as the type its field declares; UserError names the field, value and source."""

    def refuse(expected):
        none = " or none (null in JSON)" if knob.optional else ""
        raise UserError(f"{name} must be {expected}{none}, got {shown(value)} ({source})")

    if value is None and knob.optional:
        return None
    if knob.choices:  # compared with their types, or true would pass for 1
        if (type(value), value) not in [(type(choice), choice) for choice in knob.choices]:
            refuse("one of " + ", ".join(str(choice) or "''" for choice in knob.choices))
        return value
    if knob.base is tuple and isinstance(value, list):
        return tuple(
            accept(f"{name}[{i}]", entry, knob.item, source) for i, entry in enumerate(value)
        )
    if knob.base is int and isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)  # 1e4 is a fair way to write a count; past 2**53 it no longer says which
    if knob.base is float and type(value) is int:
        value = float(
            str(value)
        )  # as text: float() of too large an int overflows, of a text it is inf
    if (
        type(value) is not knob.base
    ):  # not isinstance: to Python True is an int, to a user it is not
        refuse(NOUNS[knob.base])
    if knob.base in (int, float) and value not in knob.limits:
        limits = str(knob.limits)
        refuse(limits if ".." in limits else f"{NOUNS[knob.base]} {limits}".rstrip())
    return value


# ---- presets


def parse_json(text, origin):
    """Parse JSON, no key twice, no NaN or Infinity; UserError says where in `origin`, a file or flag."""

    def unique(pairs):
        values = {}
        for key, value in pairs:
            if key in values:
                raise UserError(f"{origin}: key {key!r} stands twice; keep one")
            values[key] = value
        return values

    def refuse(word):
        raise UserError(f"{origin}: {word} is not JSON; write a finite number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        message = error.msg.replace("Expecting", "expected")
        where = f"{origin} line {error.lineno} column {error.colno}"
        raise UserError(f"{where}: {message[0].lower()}{message[1:]}") from None
    except (
        ValueError,
        RecursionError,
    ):  # Python's own caps: thousands of digits, thousands of brackets
        raise UserError(
            f"{origin}: a number is too long, or lists are nested too deep, to be read"
        ) from None


def read_object(path, form='{"key": value, ...}'):
    """Read the JSON object in a file; a byte order mark, which some editors leave, is skipped.

    `form` is what an error says of the object that was expected.
    """
    try:
        values = parse_json(Path(path).read_text(encoding="utf-8-sig"), path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found{elsewhere(str(path))}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path}: byte {byte:#04x} at offset {error.start}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be an object {form}, got {shown(values)}")
    return values


def elsewhere(path):
    """Return the hint for a preset that is not there: one spelled nearly so, or one under configs/."""
    name = path.replace("\\", "/").rpartition("/")[
        2
    ]  # a Windows path on another system names its file still
    near = closest(Path(path).stem, [sibling.stem for sibling in Path(path).parent.glob("*.json")])
    if near:
        return f"; did you mean {Path(path).with_name(near + '.json')}?"
    shipped = (
        Path(sys.argv[0]).parent / "configs"
    )  # beside the program, wherever it was called from
    found = next((p for p in sorted(shipped.rglob("*.json")) if p.name == name), None)
    return f"; did you mean {found}?" if found else ""


def read_preset(path, knobs, foreign, cls):
    """Return a preset's checked values; other rooms' keys go to the list `foreign`, if there is one.

    A key very near to one of ours is misspelled, not another room's: passed over, it would silently be lost.
    A preset may say which program it is for, in its key `_program`; `cls` is declared in that program's file.
    """
    given, values = read_object(path), {}
    program = given.get("_program")
    if program and foreign is None and program != (own := Path(inspect.getfile(cls)).name):
        raise UserError(f"{path} is a preset for {program}, not for {own}")
    for key, value in given.items():
        if key in knobs:
            values[key] = accept(key, value, knobs[key], path)
        elif key.startswith("_"):
            continue  # a comment: JSON has no other
        elif foreign is not None and not closest(key, knobs, cutoff=0.85):
            foreign.append(key)
        else:
            raise UserError(
                f"{path}: unknown key {key!r}{did_you_mean(key, knobs) or '; --help lists them'}"
            )
    return values


# ---- flags


def from_text(text, knob, flag):
    """Return the JSON value a flag's text stands for; other text is left as it is, for `accept` to refuse."""
    if knob.optional and text.lower() == "none":
        return None
    if knob.choices:
        return next((choice for choice in knob.choices if str(choice) == text), text)
    if knob.base is tuple:
        return [from_text(part, knob.item, flag) for part in text.split(",")] if text else []
    if knob.base is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if knob.base in (list, dict):
        return parse_json(text, flag)
    for number in (int, float) if knob.base in (int, float) else ():
        with suppress(ValueError):
            return number(text)
    return text


def to_text(value):
    """Return the text a flag would take for this value, for --help and examples."""
    if value is REQUIRED:
        return "VALUE"
    if isinstance(value, tuple):
        return ",".join(map(to_text, value)) or '""'
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value) or '""'


def read_flag(word, rest, knobs):
    """Return the field an option sets and its value, taken from the deque `rest` if it stands apart."""
    flag, equals, text = word.partition("=")
    negations = {f"no_{name}": name for name, knob in knobs.items() if knob.base is bool}
    name = flag.removeprefix("--")
    off = (
        name not in knobs and name in negations
    )  # a field may itself be called no_something: it comes first
    if not (off or name in knobs):
        hint = did_you_mean(name, [*knobs, *negations], "--{}") or "; --help lists them"
        raise UserError(f"unknown option {flag}{hint}")
    if off and equals:
        raise UserError(f"{flag} takes no value; write {flag} or --{negations[name]}")
    name = negations[name] if off else name
    if not equals and knobs[name].base is bool:
        apart = not off and rest and rest[0].lower() in ("true", "false")
        text = rest.popleft() if apart else str(not off)
    elif not equals:
        if not rest or rest[0].startswith("--"):  # one dash may be a negative number's
            raise UserError(f"{flag} needs a value: {flag}={to_text(knobs[name].default)}")
        text = rest.popleft()
    return name, accept(name, from_text(text, knobs[name], flag), knobs[name], flag)


def read_words(argv, knobs, places=()):
    """Sort a command line into the paths of its presets, in order, and {name: value} of its flags.

    The first words that are no flags are the values of the fields `places`; presets come after them.
    """
    presets, flags, rest, places = [], {}, deque(argv), deque(places)
    while rest:
        word = rest.popleft()
        if places and not word.startswith("-"):
            word = f"--{places.popleft()}={word}"
        if word.startswith("-"):
            name, value = read_flag(word, rest, knobs)
            if name in flags:
                raise UserError(
                    f"{word.partition('=')[0]}: {name} is given twice as an option; keep one"
                )
            flags[name] = value
        elif word.endswith(".json"):
            presets.append(word)
        else:
            hint = f"; did you mean --{word}?" if word.partition("=")[0] in knobs else ""
            raise UserError(f"expected a preset (a .json file) or --key=value, got {word!r}{hint}")
    return presets, flags


# ---- help


def comments_of(cls):
    """Return {field: comment} from the source of `cls` and its bases, each in its own module.

    A field's comment stands beside it, else right above it; redeclared without one, it keeps its base's.
    """
    found = {}
    for owner in reversed(cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):
            continue  # built in, or typed at a prompt: no source, no comments
        tokens = tokenize.generate_tokens(
            io.StringIO(source).readline
        )  # a search for "#" would find strings
        comments = {
            at[0]: text.lstrip("# ") for kind, text, at, *_ in tokens if kind == tokenize.COMMENT
        }
        lines = source.splitlines()
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                name = node.target.id
                found[name] = comment_of(node, comments, lines) or found.get(name, "")
    return found


def comment_of(node, comments, lines):
    """Return the comment on a field's own lines, else what stands on the lines right above it."""
    beside = [
        comments[line] for line in range(node.lineno, node.end_lineno + 1) if line in comments
    ]
    first = node.lineno
    while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return " ".join(beside or [comments[line] for line in range(first, node.lineno)])


def program():
    """Returns what stands after `python` on the command line: train.py, or -m tools.export."""
    path = Path(sys.argv[0])
    return f"-m tools.{path.stem}" if path.parent.name == "tools" else path.name


def usage(cls, knobs, argv, places, doc):
    """Return what --help prints: two paragraphs of the docstring `doc`, then a line for every field."""
    helps, rows = comments_of(cls), [("option", "takes", "default", "")]
    rows += [
        (f"--{name}", str(k), to_text(k.default), helps.get(name, "")) for name, k in knobs.items()
    ]
    widths = [min(28, max(map(len, column))) for column in zip(*rows, strict=True)][:3] + [0]
    table = (
        "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows) if knobs else ""
    )
    subcommand = [] if argv == sys.argv[1:] else sys.argv[1:2]
    options = ["[PRESET.json ...]", "[--key=value ...]"] if knobs else []
    call = " ".join([f"usage: python {program()}", *subcommand, *map(str.upper, places), *options])
    about = (doc or "").strip().split("\n\n")[:2]
    return "\n\n".join(filter(None, [call, *about, table]))


# ---- what the other rooms call


def configure(cls, argv=None, *, foreign_keys=False, places=(), doc=None):
    """Build the dataclass `cls` from presets in order, then flags (by default those of this process).

    With `foreign_keys` presets may hold keys of other rooms; the result then carries their names, a tuple, in
    its attribute `foreign_keys`, which is no field. `places` names the fields that may be given as words
    without a flag, in their order. Raises UserError for any mistake, `__post_init__`'s ValueError among them,
    and SystemExit after --help, which opens with `doc`.
    """
    argv = sys.argv[1:] if argv is None else argv
    knobs = knobs_of(cls)
    if "--help" in argv or "-h" in argv:
        print(usage(cls, knobs, argv, places, doc), flush=True)
        raise SystemExit(0)
    values, foreign = {}, [] if foreign_keys else None
    presets, flags = read_words(argv, knobs, places)
    for path in presets:
        values |= read_preset(path, knobs, foreign, cls)
    values |= flags
    needed = [name for name, knob in knobs.items() if knob.default is REQUIRED]
    if lacking := [
        name for name in needed if values.get(name, "") == ""
    ]:  # "": of a shell's unset variable
        verb = "is" if len(lacking) == 1 else "are"
        told = " ".join(f"--{name}=VALUE" for name in lacking)
        raise UserError(f"{' and '.join(lacking)} {verb} required: {told}")
    try:
        cfg = cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from error
    if foreign_keys:
        object.__setattr__(
            cfg, "foreign_keys", tuple(dict.fromkeys(foreign))
        )  # frozen, but nobody's yet
    return cfg


def narrow(cfg, cls):
    """Build a `cls` from the same-named fields of `cfg`: the ModelConfig within a TrainConfig."""
    names = {field.name for field in fields(cfg)} & {
        field.name for field in fields(cls) if field.init
    }
    return cls(**{name: getattr(cfg, name) for name in names})


def write_whole(path, content):
    """Write bytes to a file, in a folder made if need be; a crash leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # in the same folder: there a rename is atomic
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_config(cfg, path):
    """Write the resolved `cfg` as a preset that gives its equal, whole or not at all."""
    values = {field.name: getattr(cfg, field.name) for field in fields(cfg) if field.init}
    write_whole(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def run(main, cls, doc=None, **kw):
    """Call `main(cfg)` on what `configure(cls, doc=doc, **kw)` gives, with a command's manners."""
    with manners():
        main(configure(cls, doc=doc, **kw))


def dispatch(commands, argv, doc):
    """Run the one of `commands`, {word: (function, configuration)}, that the first word names.

    Fields without a default may be given as words without a flag, in their order, as in `same A B`.
    """
    word, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if word in commands:
        function, config = commands[word]
        places = [name for name, knob in knobs_of(config).items() if knob.default is REQUIRED]
        run(function, config, inspect.cleandoc(function.__doc__), argv=rest, places=places)
        return
    with manners():
        if word not in ("--help", "-h"):
            near = closest(word, commands)
            hint = f"did you mean {near}?" if near else f"expected one of {', '.join(commands)}"
            raise UserError(f"unknown command {word!r}; {hint}")
        print(inspect.cleandoc(doc), "", sep="\n")
        for name, (function, _) in commands.items():
            print(f"  {name:<18}{inspect.cleandoc(function.__doc__).splitlines()[0]}")


@contextmanager
def manners():
    """How a command ends: a UserError prints `error: ...` and exits 2, or with a status of its own.

    Ctrl-C exits 130, a reader gone from our pipe (`| head`) 141, as shells count, both without a traceback.
    What the terminal has no character for becomes a question mark, and a closed stdout swallows what it is
    given: neither is worth a run.
    """
    if sys.stdout is None:  # `>&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    if os.name == "nt":  # where a pipe or a file would be written in the local code page
        for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
            if not stream.isatty():
                stream.reconfigure(encoding="utf-8")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()  # so that a closed pipe shows here, not while the interpreter shuts down
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        discard_stdout()
        sys.exit(141)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        discard_stdout()  # it may be what is full
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {where}no space left on the disk; free some and start again", file=sys.stderr
        )
        sys.exit(2)


def discard_stdout():
    """Send what stdout still holds nowhere: the flush at exit needs a place to go."""
    with suppress(OSError, ValueError):  # no file behind it: nothing to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
