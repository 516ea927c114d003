"""Presets and flags in, one checked dataclass out.

    python train.py configs/tiny.json --n_layer=2 --learning_rate 1e-3 --no_compile

An option is declared once, as a field of a dataclass: its name is the flag, its annotation the
check, the comment beside or above it the line in --help. Presets (JSON) apply in the order given,
then flags.
"""

import difflib
import errno
import inspect
import json
import math
import os
import re
import sys
import textwrap
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class UserError(Exception):
    """A mistake that the user can mend; str() is one line: what, value, expected, remedy."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code  # of the program

    def __str__(self):
        return " ".join(super().__str__().splitlines())  # a quoted path may hold line breaks


def did_you_mean(word, choices, form="'{}'", cutoff=0.6):
    """Returns '; did you mean ...?' for an unknown word, or '' if no choice is spelled like it."""
    near = difflib.get_close_matches(word.lower().replace("-", "_"), choices, n=1, cutoff=cutoff)
    return f"; did you mean {form.format(near[0])}?" if near else ""


# each spelling of a number's type, and torch's name for it
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "f32": "float32"}
DTYPES |= {"f16": "float16"} | {name: name for name in DTYPES.values()}


def shown(value):
    """Returns a value for an error message: as JSON spells it, cut to fit a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def refusing(errors, problem, remedy="", exit_code=2):
    """Turns `errors` that files, disks and networks may cause into a UserError."""
    try:
        yield
    except errors as error:
        cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        text = f"{problem}: {cause:.500}{'; ' * bool(remedy)}{remedy}"
        raise UserError(text, exit_code) from None


# ---- options


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included unless open_low: `n: Annotated[int, Range(1, 512)] = 6`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value):
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high and abs(value) < math.inf  # false for NaN

    def __str__(self):
        low = f"> {self.low}" if self.open_low else f">= {self.low}"
        if self.high == math.inf:
            return "" if self.low == -math.inf else low
        return f"{low} and <= {self.high}" if self.open_low else f"{self.low}..{self.high}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]

NO_DEFAULT = MISSING
RENAMED = {"num_workers": "workers"}  # earlier names, which presets and flags may still use


@dataclass(frozen=True)
class Option:
    """The values a field takes. Programs check the contents of a `list` or `dict` themselves."""

    base: type
    limits: Range = Range()
    optional: bool = False
    choices: tuple = ()
    item: "Option | None" = None  # of a tuple
    words: bool = False  # may it be a text instead?
    default: Any = None  # or NO_DEFAULT; see options_of

    @property
    def default_text(self):
        """The default as a flag would give it."""
        if self.default is None or self.default is NO_DEFAULT:
            return "none" if self.default is None else "VALUE"
        values = self.default if self.item else [self.default]
        return ",".join(v if isinstance(v, str) else json.dumps(v) for v in values) or '""'

    def __str__(self):
        kind = "true|false" if self.base is bool else self.base.__name__
        name = "|".join(filter(None, map(str, self.choices))) or f"{kind} {self.limits}".rstrip()
        name = f"{self.item},..." if self.item else f"{name} or str" if self.words else name
        return f"{name} or none" if self.optional else name


def option_of(annotation):
    """Returns the Option that an annotation declares; an annotation no flag can carry is a bug."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return replace(option_of(args[0]), limits=args[1])
    if origin in (Union, UnionType):
        inner, *words = (arg for arg in args if arg is not NoneType)
        return replace(option_of(inner), optional=NoneType in args, words=words == [str])
    if origin is Literal:
        return Option(type(args[0]), choices=args)
    if origin is tuple:
        return Option(tuple, item=option_of(args[0]))  # the other is `...`
    base = origin or annotation
    assert base in (int, float, bool, str, list, dict), f"no flag can carry {annotation}"
    return Option(base)


def options_of(cls):
    """Returns {name: Option} of a dataclass's fields, defaults included."""
    hints, options = get_type_hints(cls, include_extras=True), {}
    for field in fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        options[field.name] = replace(option_of(hints[field.name]), default=default)
    return options


def accept(name, value, option, source):
    """Returns a JSON value as the type of its field; UserError with field, value and source."""
    if (value is None and option.optional) or (option.words and isinstance(value, str)):
        return value
    if option.base is tuple and isinstance(value, list):
        items = enumerate(value)
        return tuple(accept(f"{name}[{i}]", item, option.item, source) for i, item in items)
    if type(value) is float and option.base is int and value.is_integer() and abs(value) <= 2**53:
        value = int(value)  # 1e4 is a count; past 2**53 a float no longer says which
    if type(value) is int and option.base is float:
        value = float(str(value))  # as text: too large an int is then inf instead of an error
    if option.choices and isinstance(value, str) and value in DTYPES:
        same = (name for name in option.choices if DTYPES.get(name) == DTYPES[value])
        value = next(same, value)
    allowed = option.choices or (option.limits if option.base in (int, float) else [value])
    if type(value) is not option.base or value not in allowed:  # to Python True is an int
        expected = f"a list of {option.item}" if option.item else option
        raise UserError(f"{name} must be {expected}, got {shown(value)} ({source})")
    return value


# ---- the command line: presets, flags, --help


def parse_json(text, origin):
    """Returns parsed JSON, of a str or bytes; UserError names a mistake's place in `origin`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or beyond Python's limits
        raise UserError(f"{origin}: {error}") from None


def read_object(path):
    """Returns the JSON object in a file; UserError if there is none."""
    with refusing(OSError, path):
        values = parse_json(Path(path).read_bytes(), path)
    if not isinstance(values, dict):
        raise UserError(f'{path}: must be an object {{"key": value, ...}}, got {shown(values)}')
    return values


def read_preset(path, options, foreign_keys, program):
    """Returns a preset's checked values, without its comments: keys that begin with `_`.

    With foreign_keys, keys of other programs are passed over, unless one is a likely misspelling.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: not found; configs/ has the presets, as configs/tiny.json")
    preset, values = read_object(path), {}
    if not foreign_keys and preset.get("_program", program) != program:
        raise UserError(f"{path} is a preset for {preset['_program']}, not for {program}")
    for key, value in preset.items():
        key = RENAMED.get(key, key)
        if key in options:
            values[key] = accept(key, value, options[key], path)
        elif key[:1] != "_" and (not foreign_keys or did_you_mean(key, options, cutoff=0.85)):
            hint = did_you_mean(key, options) or "; --help lists them"
            raise UserError(f"{path}: unknown key {key!r}{hint}")
    return values


def from_text(text, option, flag):
    """Returns the JSON value of a flag's text; other text unchanged, which `accept` refuses."""
    if option.optional and text.lower() == "none":
        return None
    if option.base is tuple:
        with suppress(ValueError, RecursionError):  # a list in JSON: its texts may hold commas
            if isinstance(items := json.loads(text), list):
                return items
        parts = text.split(",") if text.strip(",") else [text] * bool(text)
        return [from_text(part, option.item, flag) for part in parts]
    if option.base is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if option.base in (list, dict):
        return parse_json(text, flag)
    for number in (int, float) if option.base in (int, float) else ():
        with suppress(ValueError):
            return number(re.sub("M$", "e6", re.sub("B$", "e9", text)))  # 300M, 1.5B
    return text


def read_flag(word, rest, options):
    """Returns (field, value) of a flag; a value that stands apart leaves the deque `rest`."""
    flag, equals, text = word.partition("=")
    names = {f"no_{name}": name for name, option in options.items() if option.base is bool}
    names |= {name: name for name in options}  # a field called no_something comes first
    written = RENAMED.get(flag.removeprefix("--"), flag.removeprefix("--"))
    if written not in names:
        hint = did_you_mean(written, names, "--{}") or "; --help lists them"
        raise UserError(f"unknown option {flag}{hint}")
    option = options[name := names[written]]
    if not equals and option.base is bool:
        text = rest.popleft() if rest and rest[0].lower() in ("true", "false") else "true"
    elif not equals:
        if not rest or rest[0].startswith("--"):  # a single dash may begin a negative number
            raise UserError(f"{flag} needs a value: {flag}={option.default_text}")
        text = rest.popleft()
    value = accept(name, from_text(text, option, flag), option, flag)
    return name, value if name == written else not value


def read_words(argv, options, positional):
    """Returns (paths of the presets in order, {name: value} of flags and of words without one)."""
    presets, flags, rest, positional = [], {}, deque(argv), deque(positional)
    while rest:
        word = rest.popleft()
        if positional and not word.startswith("-"):
            name = positional.popleft()
            while options[name].item and rest and not rest[0].startswith("-"):
                word += f",{rest.popleft()}"  # a tuple takes all that follow
            word = f"--{name}={word}"
        if word.startswith("-"):
            name, value = read_flag(word, rest, options)
            flags[name] = value  # of two the last counts, as of two presets
        elif word.endswith(".json"):
            presets.append(word)
        else:
            raise UserError(f"expected a preset (a .json file) or --key=value, got {word!r}")
    return presets, flags


def comments_of(cls):
    """Returns {field: comment} of `cls`, else of its bases: the comment beside a field or above."""
    helps = {}
    for owner in filter(is_dataclass, reversed(cls.__mro__)):
        above = []
        for line in textwrap.dedent(inspect.getsource(owner)).splitlines():
            code, _, comment = line.partition("  # ")
            if field := re.match(r"    (\w+): ", code):
                helps[field[1]] = comment or " ".join(above) or helps.get(field[1], "")
            above = [*above, comment] if comment and not code.strip() else []
    return helps


def usage(cls, options, argv, positional, doc):
    """Returns the text of --help: two paragraphs of the docstring `doc`, then a line per option."""
    path = Path(sys.argv[0])
    program = f"-m tools.{path.stem}" if path.parent.name == "tools" else path.name
    command = [] if argv == sys.argv[1:] else sys.argv[1:2]
    words = ["usage: python", program, *command, *map(str.upper, positional)]
    call = " ".join([*words, "[PRESET.json ...] [--key=value ...]"])
    helps, rows = comments_of(cls), [("option", "takes", "default", "")]
    for name, option in options.items():
        rows.append((f"--{name}", str(option), option.default_text, helps.get(name, "")))
    table = "\n".join("{:<31} {:<20} {:<14} {}".format(*row).rstrip() for row in rows)
    return "\n\n".join([call, *(doc or "").strip().split("\n\n")[:2], table])


# ---- for the programs


def configure(cls, argv=None, *, foreign_keys=False, words=False, doc=None):
    """Returns the dataclass `cls` made of presets in order, then flags (by default sys.argv's).

    foreign_keys: presets may hold keys of other programs. words: required fields may be given as
    words without a flag, in order. A mistake is a UserError; --help, which opens with `doc`, exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    options, values = options_of(cls), {}
    required = [name for name, option in options.items() if option.default is NO_DEFAULT]
    positional = required if words else []
    if "--help" in argv or "-h" in argv:
        print(usage(cls, options, argv, positional, doc), flush=True)
        raise SystemExit(0)
    presets, flags = read_words(argv, options, positional)
    for path in presets:
        values |= read_preset(path, options, foreign_keys, Path(inspect.getfile(cls)).name)
    values |= flags
    if missing := [name for name in required if values.get(name, "") == ""]:  # an unset variable
        raise UserError(f"required: {' '.join(f'--{name}=VALUE' for name in missing)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def narrow(cfg, cls):
    """Returns a `cls` of the fields it shares with `cfg`: the ModelConfig in a PretrainConfig."""
    names = {f.name for f in fields(cfg)} & {f.name for f in fields(cls)}
    return cls(**{name: getattr(cfg, name) for name in names})


def fsync(path):
    """Forces a file or folder to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        os.fsync(handle)
        os.close(handle)


def write_whole(path, content):
    """Writes bytes to a file, making its folder; a crash leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp-{path.name}")  # a rename is atomic in one folder
    try:
        part.write_bytes(content)
        fsync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_config(cfg, path, **comments):
    """Writes `cfg` as a preset from which an equal one is made."""
    text = json.dumps(asdict(cfg) | comments, indent=2, allow_nan=False) + "\n"
    write_whole(path, text.encode())


def run(main, cls, doc=None, **kw):
    """Calls `main(cfg)` with the result of `configure(cls, doc=doc, **kw)`; see exit_statuses."""
    with exit_statuses():
        main(configure(cls, doc=doc, **kw))


def dispatch(commands, argv, doc, default=None):
    """Runs the command that the first word names, of {word: (function, configuration class)}.

    default: such a pair, for other words; without it they are a mistake.
    """
    word, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if word in commands:
        function, config = commands[word]
        return run(function, config, inspect.getdoc(function), argv=rest, words=True)
    if default:
        return run(*default, doc, argv=argv)
    with exit_statuses():
        if word not in ("--help", "-h"):
            hint = did_you_mean(word, commands, "{}") or f"; expected {'|'.join(commands)}"
            raise UserError(f"unknown command {word!r}{hint}")
        print(inspect.cleandoc(doc), "", sep="\n")
        for name, (function, _) in commands.items():
            print(f"  {name:<18}{inspect.getdoc(function).splitlines()[0]}")


@contextmanager
def exit_statuses():
    """Ends a program without a traceback for what its user can mend.

    UserError prints `error: ...` and exits 2, or with its exit_code; Ctrl-C exits 130; a reader
    that closed our pipe (`| head`) 141; a full disk 2.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a `?` for what the terminal cannot show
    try:
        yield
        sys.stdout.flush()  # a closed pipe shows here, not while the interpreter shuts down
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        with suppress(OSError, ValueError):  # the flush at exit goes nowhere; stdout may be no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            sys.exit(141)
        path = error.filename or "stdout"
        print(f"error: {path}: no space left on the disk; free some", file=sys.stderr)
        sys.exit(2)
