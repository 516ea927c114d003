"""Configuration as its users meet it: presets, flags, the sentence of every error, and --help."""

import ast
import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib import config
from lib.config import (
    Fraction,
    PositiveFloat,
    Range,
    UserError,
    comments_of,
    configure,
    dispatch,
    save_config,
)
from lib.runtime import choose_dtype
from tests import ROOT


@dataclass(frozen=True)
class Shape:
    """Stands for a model's config."""

    n_layer: Annotated[int, Range(1, 512)] = 6  # transformer blocks
    d_model: int = 256  # width; a "#" in a comment is kept
    dropout: Fraction = 0.0
    # what RoPE is stretched by,
    # if at all
    rope_scaling: dict | None = None

    def __post_init__(self):
        if self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd; choose an even one")


@dataclass(frozen=True)
class Training(Shape):
    """Stands for a script's config: everything a field can be."""

    learning_rate: PositiveFloat = 3e-4  # peak of the schedule
    dropout: Fraction = 0.1
    max_minutes: float | None = None  # time box
    offset: int = 0  # may be negative
    compile: bool = True  # torch.compile
    no_flash_attn: bool = False  # a knob that is itself called no_something
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where
    heads: Literal[1, 2, 4] = 1
    data_path: tuple[str, ...] = ()  # one or several
    weights: tuple[PositiveFloat, ...] = (1.0,)
    sizes: tuple[int, ...] = ()
    title: str = "#1"  # not the default's "#"
    note: str | None = None
    mixture: list = field(default_factory=list)


@dataclass(frozen=True)
class Needy:
    model_path: str
    steps: int = 1


def read(*argv, cls=Training, **kw):
    return configure(cls, list(argv), **kw)


def error_of(*argv, cls=Training, **kw):
    with pytest.raises(UserError) as caught:
        configure(cls, list(argv), **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def attempt(*argv):
    """Returns (configuration, None) or (None, error message)."""
    try:
        return read(*argv), None
    except UserError as error:
        return None, str(error)


def help_of(capsys, cls, *argv, **kw):
    """Returns what --help prints, and {flag: its line with single spaces}."""
    with pytest.raises(SystemExit) as caught:
        read(*argv, "--help", cls=cls, **kw)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("--")]
    return text, {flag: " ".join(rest.split()) for flag, rest in lines}


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Returns a function that writes text, bytes or an object to a preset in the folder."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()

    def write(content, name="configs/my.json"):
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


# ---- what is accepted


def test_presets_in_order_then_flags_then_defaults(preset):
    one = preset({"n_layer": 2, "d_model": 64, "offset": 1}, "one.json")
    two = preset({"d_model": 32, "offset": 2}, "two.json")
    cfg = read("--offset=3", one, two)
    assert (cfg.n_layer, cfg.d_model, cfg.offset, cfg.learning_rate) == (2, 32, 3, 3e-4)
    assert read(two, one).d_model == 64


SPELLINGS = {
    "float32": "fp32 f32 float32",
    "float16": "fp16 f16 float16",
    "bfloat16": "bf16 bfloat16",
}
WITH_DTYPE = ("train.PretrainConfig", "sample.SampleConfig", "server.ServerConfig")
WITH_DTYPE += ("eval.EvalConfig", "tools.export.ExportConfig")


@pytest.mark.parametrize("name", WITH_DTYPE)
def test_a_dtype_is_the_same_however_it_is_spelled(name):
    module, _, name = name.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    options = config.options_of(cls)
    required = [f"--{n}=x" for n, o in options.items() if o.default is config.NO_DEFAULT]
    for dtype, spellings in SPELLINGS.items():
        for spelling in spellings.split():
            chosen = read(*required, f"--dtype={spelling}", cls=cls).dtype
            device = torch.device("cuda")
            assert choose_dtype(chosen, device) == (getattr(torch, dtype), "as asked")
            assert chosen in options["dtype"].choices
    assert "dtype must be" in error_of(*required, "--dtype=fp8", cls=cls)


FLAGS = r"""
--n_layer=2 | 2
--n_layer 2 | 2
--n_layer=1 --n_layer 2 | 2
--d_model=1e4 | 10000
--d_model=1_000 | 1000
--d_model=2M | 2000000
--d_model=0.5B | 500000000
--learning_rate=1M | 1e6
--offset -1 | -1
--learning_rate 1e-3 | 1e-3
--dropout=1 | 1.0
--max_minutes=none | None
--compile | True
--compile=false | False
--compile false | False
--no_compile | False
--no_compile=false | True
--no_flash_attn | True
--no_no_flash_attn | False
--device=cpu | 'cpu'
--heads=4 | 4
--data_path=a,b/c | ('a', 'b/c')
--data_path= | ()
--weights=1,0.5 | (1.0, 0.5)
--sizes -1,2 | (-1, 2)
--title=a=b=c | 'a=b=c'
--title '- item' | '- item'
--title= | ''
--title=none | 'none'
--note=none | None
'--rope_scaling={"factor": 2}' | {'factor': 2}
--mixture '[{"name": "a"}]' | [{'name': 'a'}]
"""


@pytest.mark.parametrize("case", FLAGS.strip().splitlines())
def test_a_flag_reaches_its_field_in_its_type(case):
    words, _, value = case.rpartition(" | ")
    name = re.match(r"'?--(no_(?!flash))?(\w+)", words)[2]
    got, value = getattr(read(*shlex.split(words)), name), ast.literal_eval(value)
    assert (got, type(got)) == (value, type(value))


PRESETS = """
{"d_model": 1e4} | 10000
{"learning_rate": 1} | 1.0
{"max_minutes": null} | None
{"compile": false} | False
{"data_path": ["a,b"]} | ("a,b",)
{"weights": [1, 2.5]} | (1.0, 2.5)
{"note": "none"} | "none"
{"rope_scaling": {"_kept": 1}} | {"_kept": 1}
"""


@pytest.mark.parametrize("case", PRESETS.strip().splitlines())
def test_a_presets_value_reaches_its_field_in_its_type(preset, case):
    content, _, value = case.partition(" | ")
    (name,) = json.loads(content)
    got, value = getattr(read(preset(content)), name), ast.literal_eval(value)
    assert (got, type(got)) == (value, type(value))


def test_comments_byte_order_mark_and_crlf_in_a_preset(preset):
    assert read(preset(b'\xef\xbb\xbf{"_why": "small",\r\n "n_layer": 2}')).n_layer == 2


def test_a_preset_for_another_program_is_refused_by_its_name(preset):
    path = preset({"_program": "other.py", "n_layer": 2, "beta": 0.1})
    assert error_of(path) == "configs/my.json is a preset for other.py, not for test_config.py"
    assert read(path, cls=Shape, foreign_keys=True).n_layer == 2
    assert read(preset({"_program": "test_config.py", "n_layer": 3})).n_layer == 3


# ---- the messages


WRONG_FLAGS = """
--n_layers=2 | unknown option --n_layers; did you mean --n_layer?
--n-layer=2 | unknown option --n-layer; did you mean --n_layer?
--no_compil | unknown option --no_compil; did you mean --no_compile?
--zzz | unknown option --zzz; --help lists them
--learning_rate | --learning_rate needs a value: --learning_rate=0.0003
--learning_rate --compile | --learning_rate needs a value: --learning_rate=0.0003
n_layer=2 | expected a preset (a .json file) or --key=value, got 'n_layer=2'
--n_layer=0 | n_layer must be int 1..512, got 0 (--n_layer)
--n_layer=1e9 | n_layer must be int 1..512, got 1000000000 (--n_layer)
--n_layer=1.5 | n_layer must be int 1..512, got 1.5 (--n_layer)
--d_model=1e300 | d_model must be int, got 1e+300 (--d_model)
--n_layer=abc | n_layer must be int 1..512, got "abc" (--n_layer)
--n_layer=xM | n_layer must be int 1..512, got "xM" (--n_layer)
--n_layer=M | n_layer must be int 1..512, got "M" (--n_layer)
--learning_rate=nan | learning_rate must be float > 0, got NaN (--learning_rate)
--learning_rate inf | learning_rate must be float > 0, got Infinity (--learning_rate)
--learning_rate=0 | learning_rate must be float > 0, got 0.0 (--learning_rate)
--dropout=1.1 | dropout must be float 0..1, got 1.1 (--dropout)
--max_minutes=-inf | max_minutes must be float or none, got -Infinity (--max_minutes)
--compile=yes | compile must be true|false, got "yes" (--compile)
--device=gpu | device must be auto|cpu|cuda, got "gpu" (--device)
--heads=3 | heads must be 1|2|4, got 3 (--heads)
--weights=1,x | weights[1] must be float > 0, got "x" (--weights)
'--rope_scaling=[1]' | rope_scaling must be dict or none, got [1] (--rope_scaling)
'--mixture=[1 2]' | --mixture: Expecting ',' delimiter: line 1 column 4 (char 3)
--d_model=7 | d_model 7 is odd; choose an even one
"""


@pytest.mark.parametrize("case", WRONG_FLAGS.strip().splitlines())
def test_a_wrong_flag_is_one_line(case):
    words, _, message = case.partition(" | ")
    assert error_of(*shlex.split(words)) == message


WRONG_PRESETS = """
{"n_layers": 2} | PATH: unknown key 'n_layers'; did you mean 'n_layer'?
{"zzz": 2} | PATH: unknown key 'zzz'; --help lists them
{"n_layer": "6"} | n_layer must be int 1..512, got "6" (PATH)
{"n_layer": true} | n_layer must be int 1..512, got true (PATH)
{"n_layer": null} | n_layer must be int 1..512, got null (PATH)
{"learning_rate": "1e-3"} | learning_rate must be float > 0, got "1e-3" (PATH)
{"compile": 1} | compile must be true|false, got 1 (PATH)
{"title": 3} | title must be str, got 3 (PATH)
{"heads": true} | heads must be 1|2|4, got true (PATH)
{"data_path": "a"} | data_path must be a list of str, got "a" (PATH)
{"data_path": ["a", 1]} | data_path[1] must be str, got 1 (PATH)
{"learning_rate": 1e999} | learning_rate must be float > 0, got Infinity (PATH)
{"learning_rate": NaN} | learning_rate must be float > 0, got NaN (PATH)
{"n_layer": 1 "d_model": 2} | PATH: Expecting ',' delimiter: line 1 column 15 (char 14)
[1, 2] | PATH: must be an object {"key": value, ...}, got [1, 2]
"""


@pytest.mark.parametrize("case", WRONG_PRESETS.strip().splitlines())
def test_a_wrong_preset_is_told_in_this_sentence(preset, case):
    content, _, message = case.partition(" | ")
    assert error_of(preset(content)) == message.replace("PATH", "configs/my.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "configs/my.json: Expecting value"),
        (
            b'{"title": "\xff"}',
            "configs/my.json: 'utf-8' codec can't decode byte 0xff in position 11",
        ),
        ("[" * 100_000, "configs/my.json: maximum recursion depth exceeded"),
        ('{"d_model": ' + "9" * 9999 + "}", "configs/my.json: Exceeds the limit"),
        ('{"learning_rate": ' + "9" * 999 + "}", "learning_rate must be float > 0, got Infinity"),
    ],
    ids=range(5),
)
def test_a_hostile_preset_is_one_line(preset, content, message):
    assert error_of(preset(content)).startswith(message)


def test_a_missing_preset_names_the_folder_of_presets():
    assert error_of("tiny.json").startswith("tiny.json: not found; configs/ has the presets")


def test_a_preset_that_cannot_be_read(preset):
    Path("folder.json").mkdir()
    assert error_of("folder.json").startswith("folder.json: Is a directory")


def test_a_long_or_many_lined_value_stays_one_short_line():
    assert len(error_of("--n_layer=" + "x\n" * 500)) < 130
    assert "a b" in error_of("a\nb.json")


def test_a_field_without_default_is_required(preset):
    assert error_of(cls=Needy) == "required: --model_path=VALUE"
    assert error_of("--model_path", cls=Needy) == "--model_path needs a value: --model_path=VALUE"
    assert error_of("--model_path=", cls=Needy) == "required: --model_path=VALUE"
    assert read("--model_path=x", cls=Needy) == Needy("x")
    assert read(preset({"model_path": "x"}), cls=Needy) == Needy("x")


# ---- keys of other programs


def test_foreign_keys_are_passed_over_but_misspellings_are_not(preset):
    path = preset({"n_layer": 2, "learning_rate": 1e-3, "device": "cpu", "_why": 1})
    again = preset({"learning_rate": 1e-4}, "again.json")
    assert read(path, again, cls=Shape, foreign_keys=True) == Shape(n_layer=2)
    for key in ("n_layers", "n-layer", "nlayer", "N_layer", "d_modell", "droput"):
        sentence = error_of(preset({key: 2}), cls=Shape, foreign_keys=True)
        assert sentence.startswith(f"configs/my.json: unknown key '{key}'; did you mean '")


# ---- round trips


def test_a_saved_config_is_a_preset_that_gives_its_equal(tmp_path):
    path = str(tmp_path / "run.json")
    words = ["--data_path=a,ü\udcff", "--sizes=1,2", "--note=none", "--offset=-3"]
    cfg = read(*words, '--rope_scaling={"factor": 2}')
    save_config(cfg, path)
    assert read(path) == cfg
    assert os.listdir(tmp_path) == ["run.json"]
    save_config(read("--n_layer=9"), path)
    assert read(path).n_layer == 9


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def crash(*_):
        raise OSError("disk full")

    path = tmp_path / "run.json"
    save_config(Training(), path)
    with pytest.raises(ValueError, match="JSON compliant"):
        save_config(Training(learning_rate=math.inf), path)
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        save_config(Training(n_layer=9), path)
    assert read(str(path)) == Training()
    assert list(tmp_path.iterdir()) == [path]


numbers = st.floats(allow_nan=False, allow_infinity=False)
quick = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


scalars = st.none() | st.booleans() | numbers | st.integers() | st.text(max_size=5)
values = st.recursive(scalars, st.lists, max_leaves=4)
keys = st.sampled_from([f.name for f in dataclasses.fields(Training)])


@quick
@given(st.dictionaries(keys, values, max_size=3))
def test_any_preset_gives_a_config_that_saves_or_one_line(tmp_path, content):
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    cfg, sentence = attempt(str(path))
    if cfg is None:
        assert len(sentence.splitlines()) == 1
    else:
        save_config(cfg, path)
        assert read(str(path)) == cfg


# ---- help


def test_help_names_type_default_and_comment_of_every_field(capsys):
    doc = "What it is.\n\nHow it is run.\n\nWhat nobody asked."
    text, rows = help_of(capsys, Training, "missing.json", doc=doc)
    assert "\n\nWhat it is.\n\nHow it is run.\n\noption" in text
    assert "nobody" not in text
    assert list(rows) == [f"--{f.name}" for f in dataclasses.fields(Training)]
    expected = {
        "--n_layer": "int 1..512 6 transformer blocks",
        "--d_model": 'int 256 width; a "#" in a comment is kept',
        "--dropout": "float 0..1 0.1",
        "--rope_scaling": "dict or none none what RoPE is stretched by, if at all",
        "--learning_rate": "float > 0 0.0003 peak of the schedule",
        "--max_minutes": "float or none none time box",
        "--compile": "true|false true torch.compile",
        "--device": "auto|cpu|cuda auto where",
        "--data_path": 'str,... "" one or several',
        "--weights": "float > 0,... 1.0",
        "--title": 'str #1 not the default\'s "#"',
        "--mixture": "list []",
    }
    assert {flag: rows[flag] for flag in expected} == expected


def test_every_option_of_every_command_has_its_line_in_help():
    files = [p.relative_to(ROOT) for f in ("", "corpus", "tools") for p in (ROOT / f).glob("*.py")]
    modules = [importlib.import_module(".".join(path.with_suffix("").parts)) for path in files]
    classes = {c for module in modules for name, c in vars(module).items() if name[-6:] == "Config"}
    assert len(classes) > 12
    silent = {
        f"{cls.__name__}.{f.name}"
        for cls in classes
        for f in dataclasses.fields(cls)
        if f.init and not comments_of(cls).get(f.name)
    }
    assert silent == set()


# ---- a program: exit statuses and commands

SCRIPT = '''"""A script."""
import sys
from dataclasses import dataclass
from lib.config import UserError, run

@dataclass
class Config:
    act: str = "print"  # what to do

def main(cfg):
    if cfg.act == "interrupt":
        raise KeyboardInterrupt
    if cfg.act == "exit":
        raise SystemExit(7)
    if cfg.act == "late":
        raise UserError("data is missing:\\nmake data")
    if cfg.act == "flood":
        for _ in range(100_000):
            print("x" * 50)
    if cfg.act == "bug":
        raise RuntimeError("a programmer's")
    print(cfg.act)

if __name__ == "__main__":
    run(main, Config, __doc__)
'''


@pytest.fixture
def script(tmp_path):
    """Returns a function that starts a script ending in `run`, with the given words."""
    (tmp_path / "script.py").write_text(SCRIPT)
    # an empty PYTHONUNBUFFERED is off: buffers are the hard case
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}

    def start(*words, stdout=subprocess.PIPE, **variables):
        command = [sys.executable, str(tmp_path / "script.py"), *words]
        return subprocess.Popen(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env | variables
        )

    return start


@pytest.mark.parametrize(
    ("word", "code", "out", "err"),
    [
        ("--act=hello", 0, "hello\n", ""),
        ("--atc=hello", 2, "", "error: unknown option --atc; did you mean --act?\n"),
        (
            "nowhere.json",
            2,
            "",
            "error: nowhere.json: not found; configs/ has the presets, as configs/tiny.json\n",
        ),
        ("--act=late", 2, "", "error: data is missing: make data\n"),
        ("--act=interrupt", 130, "", ""),
        ("--act=exit", 7, "", ""),
    ],
)
def test_run_prints_one_line_and_exits(script, word, code, out, err):
    process = script(word)
    assert process.communicate(timeout=60) == (out, err)
    assert process.returncode == code


def test_run_lets_bugs_show(script):
    process = script("--act=bug")
    assert "Traceback" in process.communicate(timeout=60)[1]
    assert process.returncode == 1


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="a closed pipe is another error there")
@pytest.mark.parametrize("word", ["--act=hello", "--act=flood", "--help"])
def test_run_is_quiet_when_its_reader_has_left(script, word):
    reading, writing = os.pipe()
    os.close(reading)
    process = script(word, stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


@dataclass(frozen=True)
class Two:
    one: str
    other: str
    size: int = 1


CALLS = ["a.json B --size=3", "--size 3 a.json B", "a.json --other B --size 3"]


@pytest.mark.parametrize("words", CALLS)
def test_a_command_takes_its_required_fields_as_words_or_flags(words):
    seen = []

    def same(cfg):
        """Compares two."""
        seen.append(cfg)

    dispatch({"same": (same, Two)}, ["same", *words.split()], "Commands.")
    assert seen == [Two("a.json", "B", 3)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sane", "unknown command 'sane'; did you mean same?"),
        ("x", "unknown command 'x'; expected same"),
        ("same A", "required: --other=VALUE"),
        ("same A B C", "expected a preset (a .json file) or --key=value, got 'C'"),
    ],
)
def test_a_command_that_is_mistaken_exits_2_with_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        dispatch({"same": (print, Two)}, words.split(), "Commands.")
    assert (caught.value.code, *capsys.readouterr()) == (2, "", f"error: {message}\n")


def test_characters_that_a_terminal_lacks_become_question_marks(script):
    process = script("--act=größe", PYTHONIOENCODING="ascii")
    assert process.communicate(timeout=60) == ("gr??e\n", "")
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout_is_one_line(script):
    with open("/dev/full", "w") as full:
        process = script("--act=hello", stdout=full)
    assert (
        process.communicate(timeout=60)[1]
        == "error: stdout: no space left on the disk; free some\n"
    )
    assert process.returncode == 2
