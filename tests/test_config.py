"""Configuration as its users meet it: presets, flags, the sentence of every error, and --help."""

import dataclasses
import importlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lib.config import (
    Fraction,
    PositiveFloat,
    Range,
    UserError,
    comments_of,
    configure,
    did_you_mean,
    dispatch,
    narrow,
    run,
    save_config,
)
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


def attempt(*argv):
    """Return the config and None, or None and the error's sentence."""
    try:
        return read(*argv), None
    except UserError as error:
        return None, str(error)


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


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Return a function that writes text, bytes or an object to a preset in the working folder."""
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


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--n_layer=2"], "n_layer", 2),
        (["--n_layer", "2"], "n_layer", 2),
        (["--d_model=1e4"], "d_model", 10000),
        (["--d_model=1_000"], "d_model", 1000),
        (["--offset", "-1"], "offset", -1),
        (["--offset=-1"], "offset", -1),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--dropout=0"], "dropout", 0.0),
        (["--dropout=1"], "dropout", 1.0),
        (["--max_minutes=2.5"], "max_minutes", 2.5),
        (["--max_minutes=none"], "max_minutes", None),
        (["--compile"], "compile", True),
        (["--compile=false"], "compile", False),
        (["--compile", "false"], "compile", False),
        (["--compile=True"], "compile", True),
        (["--no_compile"], "compile", False),
        (["--no_flash_attn"], "no_flash_attn", True),
        (["--no_no_flash_attn"], "no_flash_attn", False),
        (["--device=cpu"], "device", "cpu"),
        (["--heads=4"], "heads", 4),
        (["--data_path=a,b/c"], "data_path", ("a", "b/c")),
        (["--data_path="], "data_path", ()),
        (["--weights=1,0.5"], "weights", (1.0, 0.5)),
        (["--sizes", "-1,2"], "sizes", (-1, 2)),
        (["--title=a=b=c"], "title", "a=b=c"),
        (["--title", "a=b"], "title", "a=b"),
        (["--title", "- item"], "title", "- item"),
        (["--title=--n_layer=3"], "title", "--n_layer=3"),
        (["--title="], "title", ""),
        (["--title=none"], "title", "none"),
        (["--note=none"], "note", None),
        (['--rope_scaling={"factor": 2}'], "rope_scaling", {"factor": 2}),
        (["--rope_scaling=none"], "rope_scaling", None),
        (["--mixture", '[{"name": "a"}]'], "mixture", [{"name": "a"}]),
    ],
)
def test_a_flag_reaches_its_field_in_its_type(words, name, value):
    got = getattr(read(*words), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("n_layer", "4", 4),
        ("d_model", "1e4", 10000),
        ("learning_rate", "1", 1.0),
        ("max_minutes", "null", None),
        ("compile", "false", False),
        ("data_path", '["a,b"]', ("a,b",)),
        ("weights", "[1, 2.5]", (1.0, 2.5)),
        ("note", '"none"', "none"),
        ("rope_scaling", '{"_kept": 1}', {"_kept": 1}),
    ],
)
def test_a_presets_value_reaches_its_field_in_its_type(preset, name, written, value):
    got = getattr(read(preset(f'{{"{name}": {written}}}')), name)
    assert got == value
    assert type(got) is type(value)


def test_a_bool_flag_leaves_the_preset_behind_it(preset):
    cfg = read(
        "--no_compile", preset({"n_layer": 2}), "--no_flash_attn", preset({"d_model": 8}, "b.json")
    )
    assert (cfg.compile, cfg.n_layer, cfg.no_flash_attn, cfg.d_model) == (False, 2, True, 8)


def test_a_field_called_no_something_comes_before_the_negation():
    @dataclass
    class Both:
        cache: bool = True
        no_cache: bool = False

    assert read("--no_cache", cls=Both) == Both(cache=True, no_cache=True)


def test_comments_byte_order_mark_and_crlf_in_a_preset(preset):
    assert read(preset(b'\xef\xbb\xbf{"_why": "small",\r\n "n_layer": 2}')).n_layer == 2


def test_a_preset_for_another_program_is_refused_by_its_name(preset):
    path = preset({"_program": "other.py", "n_layer": 2, "beta": 0.1})
    assert error_of(path) == "configs/my.json is a preset for other.py, not for test_config.py"
    assert read(path, cls=Shape, foreign_keys=True).n_layer == 2
    assert read(preset({"_program": "test_config.py", "n_layer": 3})).n_layer == 3


# ---- the sentences


WRONG_FLAGS = """
--n_layers=2 | unknown option --n_layers; did you mean --n_layer?
--n-layer=2 | unknown option --n-layer; did you mean --n_layer?
-n_layer=2 | unknown option -n_layer; did you mean --n_layer?
--no_compil | unknown option --no_compil; did you mean --no_compile?
--no_n_layer | unknown option --no_n_layer; did you mean --n_layer?
--zzz | unknown option --zzz; --help lists them
-- | unknown option --; --help lists them
--learning_rate | --learning_rate needs a value: --learning_rate=0.0003
--learning_rate --compile | --learning_rate needs a value: --learning_rate=0.0003
--data_path | --data_path needs a value: --data_path=""
--no_compile=true | --no_compile takes no value; write --no_compile or --compile
--n_layer=1 --n_layer 2 | --n_layer: n_layer is given twice as an option; keep one
--compile --no_compile | --no_compile: compile is given twice as an option; keep one
n_layer=2 | \
expected a preset (a .json file) or --key=value, got 'n_layer=2'; did you mean --n_layer=2?
tiny | expected a preset (a .json file) or --key=value, got 'tiny'
--n_layer=0 | n_layer must be 1..512, got 0 (--n_layer)
--n_layer=513 | n_layer must be 1..512, got 513 (--n_layer)
--n_layer=1e9 | n_layer must be 1..512, got 1000000000 (--n_layer)
--n_layer=1.5 | n_layer must be an integer, got 1.5 (--n_layer)
--d_model=1e300 | d_model must be an integer, got 1e+300 (--d_model)
--n_layer=abc | n_layer must be an integer, got string "abc" (--n_layer)
--n_layer=none | n_layer must be an integer, got string "none" (--n_layer)
--learning_rate=nan | learning_rate must be a finite number > 0, got nan (--learning_rate)
--learning_rate inf | learning_rate must be a finite number > 0, got inf (--learning_rate)
--learning_rate=-1 | learning_rate must be a finite number > 0, got -1.0 (--learning_rate)
--learning_rate=0 | learning_rate must be a finite number > 0, got 0.0 (--learning_rate)
--dropout=1.1 | dropout must be 0..1, got 1.1 (--dropout)
--max_minutes=-inf | \
max_minutes must be a finite number or none (null in JSON), got -inf (--max_minutes)
--compile=yes | compile must be true or false, got string "yes" (--compile)
--device=gpu | device must be one of auto, cpu, cuda, got string "gpu" (--device)
--heads=3 | heads must be one of 1, 2, 4, got string "3" (--heads)
--weights=1,x | weights[1] must be a finite number, got string "x" (--weights)
--weights=1,0 | weights[1] must be a finite number > 0, got 0.0 (--weights)
'--rope_scaling=[1]' | \
rope_scaling must be a JSON object or none (null in JSON), got [1] (--rope_scaling)
'--mixture={}' | mixture must be a JSON list, got {} (--mixture)
'--mixture=[1 2]' | --mixture line 1 column 4: expected ',' delimiter
--d_model=7 | d_model 7 is odd; choose an even one
"""


@pytest.mark.parametrize("case", WRONG_FLAGS.strip().splitlines())
def test_a_wrong_flag_is_told_in_this_sentence(case):
    words, _, sentence = case.partition(" | ")
    assert error_of(*shlex.split(words)) == sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"n_layers": 2}, "configs/my.json: unknown key 'n_layers'; did you mean 'n_layer'?"),
        ({"n-layer": 2}, "configs/my.json: unknown key 'n-layer'; did you mean 'n_layer'?"),
        ({"zzz": 2}, "configs/my.json: unknown key 'zzz'; --help lists them"),
        ({"n_layer": "6"}, 'n_layer must be an integer, got string "6" (configs/my.json)'),
        ({"n_layer": True}, "n_layer must be an integer, got true (configs/my.json)"),
        ({"n_layer": None}, "n_layer must be an integer, got null (configs/my.json)"),
        ({"n_layer": 0}, "n_layer must be 1..512, got 0 (configs/my.json)"),
        ({"n_layer": [6]}, "n_layer must be an integer, got [6] (configs/my.json)"),
        (
            {"learning_rate": "1e-3"},
            'learning_rate must be a finite number, got string "1e-3" (configs/my.json)',
        ),
        (
            {"learning_rate": False},
            "learning_rate must be a finite number, got false (configs/my.json)",
        ),
        ({"compile": 1}, "compile must be true or false, got 1 (configs/my.json)"),
        ({"compile": "true"}, 'compile must be true or false, got string "true" (configs/my.json)'),
        ({"title": 3}, "title must be a string, got 3 (configs/my.json)"),
        ({"heads": True}, "heads must be one of 1, 2, 4, got true (configs/my.json)"),
        ({"data_path": "a"}, 'data_path must be a list, got string "a" (configs/my.json)'),
        ({"data_path": ["a", 1]}, "data_path[1] must be a string, got 1 (configs/my.json)"),
        ({"d_model": 7}, "d_model 7 is odd; choose an even one"),
        (
            '{"learning_rate": 1e999}',
            "learning_rate must be a finite number > 0, got inf (configs/my.json)",
        ),
        ('{"learning_rate": NaN}', "configs/my.json: NaN is not JSON; write a finite number"),
        ('{"_x": -Infinity}', "configs/my.json: -Infinity is not JSON; write a finite number"),
        ('{"n_layer": 1, "n_layer": 2}', "configs/my.json: key 'n_layer' stands twice; keep one"),
        (
            '{"n_layer": 1\n "d_model": 2}',
            "configs/my.json line 2 column 2: expected ',' delimiter",
        ),
        ("", "configs/my.json line 1 column 1: expected value"),
        ("{} {}", "configs/my.json line 1 column 4: extra data"),
        ("[1, 2]", 'configs/my.json: must be an object {"key": value, ...}, got [1, 2]'),
        (b'{"title": "\xff"}', "configs/my.json: byte 0xff at offset 11: not UTF-8"),
        (
            "[" * 100_000,
            "configs/my.json: a number is too long, or lists are nested too deep",
        ),
        (
            '{"d_model": ' + "9" * 9999 + "}",
            "configs/my.json: a number is too long, or lists are nested too deep",
        ),
        (
            '{"learning_rate": ' + "9" * 999 + "}",
            "learning_rate must be a finite number > 0, got inf (configs/my.json)",
        ),
    ],
    ids=range(29),
)
def test_a_wrong_preset_is_told_in_this_sentence(preset, content, sentence):
    assert error_of(preset(content)) == sentence


def test_a_missing_preset_names_its_neighbour(preset, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program/here.py"])  # whose own configs/ are asked as well
    preset({}, "configs/tiny.json")
    preset({}, "configs/dpo.json")
    assert (
        error_of("configs/tine.json")
        == f"configs/tine.json: not found; did you mean {Path('configs/tiny.json')}?"
    )
    assert error_of("configs/qqqq.json") == "configs/qqqq.json: not found"
    assert error_of("nowhere/tiny.json") == "nowhere/tiny.json: not found"


def test_a_preset_that_cannot_be_read(preset):
    Path("folder.json").mkdir()
    assert error_of("folder.json").startswith("folder.json: cannot be read: ")


def test_a_long_or_many_lined_value_stays_one_short_line():
    assert len(error_of("--n_layer=" + "x\n" * 500)) < 130
    assert "a b" in error_of("a\nb.json")


def test_a_field_without_default_is_required(preset):
    assert error_of(cls=Needy) == "model_path is required: --model_path=VALUE"
    assert error_of("--model_path", cls=Needy) == "--model_path needs a value: --model_path=VALUE"
    assert error_of("--model_path=", cls=Needy) == "model_path is required: --model_path=VALUE"
    assert read("--model_path=x", cls=Needy) == Needy("x")
    assert read(preset({"model_path": "x"}), cls=Needy) == Needy("x")


def test_a_derived_field_is_no_knob(tmp_path):
    @dataclass
    class Derived:
        width: int = 2
        double: int = field(init=False, default=0)

        def __post_init__(self):
            self.double = 2 * self.width

    assert error_of("--double=1", cls=Derived) == "unknown option --double; --help lists them"
    save_config(read("--width=3", cls=Derived), tmp_path / "run.json")
    assert read(str(tmp_path / "run.json"), cls=Derived).double == 6
    assert narrow(Derived(4), Derived).double == 8


def test_open_and_one_sided_ranges():
    @dataclass
    class Bounds:
        share: Annotated[float, Range(0, 1, open_low=True)] = 1.0
        few: Annotated[int, Range(high=3)] = 1

    assert read("--share=1", "--few=-9", cls=Bounds) == Bounds(1.0, -9)
    assert (
        error_of("--share=0", cls=Bounds)
        == "share must be a finite number > 0 and <= 1, got 0.0 (--share)"
    )
    assert error_of("--few=4", cls=Bounds) == "few must be an integer <= 3, got 4 (--few)"


def test_the_nearest_name_is_suggested():
    assert did_you_mean("chatm", ["chatml", "instruct"]) == "; did you mean 'chatml'?"
    assert (
        did_you_mean("epochs", ["num_train_epochs", "seed"]) == "; did you mean 'num_train_epochs'?"
    )
    assert did_you_mean("N-Layer", ["n_layer"], "--{}") == "; did you mean --n_layer?"
    assert did_you_mean("pile_cc", ["PILE-CC"]) == "; did you mean 'PILE-CC'?"
    assert did_you_mean("zzz", ["chatml", "instruct"]) == did_you_mean("zzz", []) == ""


@pytest.mark.parametrize("annotation", [int | str, complex, tuple[int, int], tuple, set])
def test_an_annotation_no_flag_can_carry_is_the_programmers_mistake(annotation):
    cls = dataclasses.make_dataclass("Odd", [("x", annotation, None)])
    with pytest.raises(AssertionError):
        read(cls=cls)


# ---- keys of other rooms


def test_foreign_keys_are_collected_but_misspellings_are_not(preset):
    path = preset({"n_layer": 2, "learning_rate": 1e-3, "device": "cpu", "_why": 1})
    again = preset({"learning_rate": 1e-4}, "again.json")
    cfg = read(path, again, cls=Shape, foreign_keys=True)
    assert cfg == Shape(n_layer=2)
    assert cfg.foreign_keys == ("learning_rate", "device")
    assert read(cls=Shape, foreign_keys=True).foreign_keys == ()
    for key in ("n_layers", "n-layer", "nlayer", "N_layer", "d_modell", "droput"):
        sentence = error_of(preset({key: 2}), cls=Shape, foreign_keys=True)
        assert sentence.startswith(f"configs/my.json: unknown key '{key}'; did you mean '")


def test_foreign_keys_are_errors_without_asking_and_on_flags(preset):
    path = preset({"device": "cpu"})
    assert error_of(path, cls=Shape) == "configs/my.json: unknown key 'device'; --help lists them"
    assert (
        error_of("--device=cpu", cls=Shape, foreign_keys=True)
        == "unknown option --device; --help lists them"
    )


# ---- round trips


def test_a_saved_config_is_a_preset_that_gives_its_equal(tmp_path):
    path = str(tmp_path / "run.json")
    cfg = read(
        "--data_path=a,ü\udcff",
        "--sizes=1,2",
        '--rope_scaling={"factor": 2}',
        "--note=none",
        "--offset=-3",
    )
    save_config(cfg, path)
    assert read(path) == cfg
    assert os.listdir(tmp_path) == ["run.json"]
    save_config(read("--n_layer=9"), path)
    assert read(path).n_layer == 9


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    save_config(Training(), path)
    with pytest.raises(ValueError, match="JSON compliant"):
        save_config(Training(learning_rate=math.inf), path)
    assert read(str(path)) == Training()


def test_narrow_takes_the_fields_both_have():
    assert narrow(read("--n_layer=3", "--d_model=8", "--offset=5"), Shape) == Shape(
        n_layer=3, d_model=8, dropout=0.1
    )
    assert narrow(Shape(n_layer=3), Training) == Training(n_layer=3, dropout=0.0)


texts = st.text(max_size=20).filter(lambda text: not text.startswith("--"))
numbers = st.floats(allow_nan=False, allow_infinity=False)
quick = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(st.integers(), numbers, texts, st.booleans(), st.booleans())
def test_any_value_survives_its_flag(offset, minutes, title, compiled, apart):
    flags = {"offset": offset, "max_minutes": minutes, "title": title}
    words = [
        word
        for key, value in flags.items()
        for word in ([f"--{key}", str(value)] if apart else [f"--{key}={value}"])
    ]
    assume("-h" not in words)
    cfg = read(*words, "--compile" if compiled else "--no_compile")
    assert (cfg.offset, cfg.max_minutes, cfg.title, cfg.compile) == (
        offset,
        minutes,
        title,
        compiled,
    )


@quick
@given(
    st.text(max_size=12)
    | numbers.map(str)
    | st.sampled_from(["1e4", "-0", "0x10", "1__0", " 7 ", "٣", "nan", "1e400"])
)
def test_an_integer_is_what_python_calls_one_or_a_whole_float(text):
    try:
        expected = float(text)
    except ValueError:
        expected = math.nan
    cfg, sentence = attempt(f"--offset={text}")
    if cfg is None:
        assert sentence.startswith("offset must be an integer, got ")
        assert not expected.is_integer() or abs(expected) > 2**53
    else:
        assert type(cfg.offset) is int
        assert cfg.offset == expected or cfg.offset == int(text)


@quick
@given(
    st.lists(
        st.sampled_from(
            ["--", "-", "=", "n_layer", "no_", "compile", "1", ",", "{", "none", "x", "\n"]
        )
        | texts
    )
)
def test_any_word_gives_a_config_or_one_line(pieces):
    word = "".join(pieces).replace("\0", "")
    assume(word != "-h")
    cfg, sentence = attempt(word)
    assert isinstance(cfg, Training) or len(sentence.splitlines()) == 1


values = st.recursive(
    st.none() | st.booleans() | numbers | st.integers() | st.text(max_size=5),
    st.lists,
    max_leaves=4,
)


@quick
@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(Training)]), values, max_size=3
    )
)
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


def test_help_names_type_default_and_comment_of_every_field(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        read("missing.json", "--help", doc="What it is.\n\nHow it is run.\n\nWhat nobody asked.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "\n\nWhat it is.\n\nHow it is run.\n\noption" in text
    assert "nobody" not in text
    rows = {
        line.split()[0]: " ".join(line.split()[1:])
        for line in text.splitlines()
        if line.startswith("--")
    }
    assert list(rows) == [f"--{f.name}" for f in dataclasses.fields(Training)]
    assert rows["--n_layer"] == "int 1..512 6 transformer blocks"
    assert rows["--d_model"] == 'int 256 width; a "#" in a comment is kept'
    assert rows["--dropout"] == "float 0..1 0.1"
    assert rows["--rope_scaling"] == "dict or none none what RoPE is stretched by, if at all"
    assert rows["--learning_rate"] == "float > 0 0.0003 peak of the schedule"
    assert rows["--max_minutes"] == "float or none none time box"
    assert rows["--compile"] == "true|false true torch.compile"
    assert rows["--device"] == "auto|cpu|cuda auto where"
    assert rows["--data_path"] == 'str,... "" one or several'
    assert rows["--weights"] == "float > 0,... 1.0"
    assert rows["--title"] == 'str #1 not the default\'s "#"'
    assert rows["--mixture"] == "list []"


def test_help_reads_comments_of_a_base_in_its_own_module(tmp_path, monkeypatch, capsys):
    head = "from dataclasses import dataclass\n"
    (tmp_path / "base_room.py").write_text(
        head + "@dataclass\nclass Base:\n    x: int = 1  # said by the base\n"
    )
    (tmp_path / "leaf_room.py").write_text(
        head + "from base_room import Base\n"
        "@dataclass\nclass Leaf(Base):\n    x: int = 2\n    y: int = 3  # by the leaf\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    leaf = __import__("leaf_room").Leaf
    with pytest.raises(SystemExit):
        read("-h", cls=leaf)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["--x", "int", "2", "said", "by", "the", "base"] in lines
    assert ["--y", "int", "3", "by", "the", "leaf"] in lines


def test_help_finds_the_comment_of_a_wrapped_field(capsys):
    @dataclass
    class Wrapped:
        width: Annotated[int, Range(1, 512)] | None = (
            None  # a formatter puts it here, inside the parentheses, where a line would be too long
        )
        height: int = 1

    with pytest.raises(SystemExit):
        read("--help", cls=Wrapped)
    lines = capsys.readouterr().out.splitlines()
    assert "a formatter puts it here, inside the parentheses" in lines[-2]
    assert lines[-1].split() == ["--height", "int", "1"]


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


def test_help_without_source_goes_without_comments(capsys):
    with pytest.raises(SystemExit):
        read("--help", cls=dataclasses.make_dataclass("Typed", [("x", int, 1)]))
    assert "--x" in capsys.readouterr().out


# ---- a script's last line

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
    """Return a function that starts a script ending in `run`, with the given words."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "",
    }  # empty is off: buffers are the hard case

    def start(*words, stdout=subprocess.PIPE):
        command = [sys.executable, str(tmp_path / "script.py"), *words]
        return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env)

    return start


@pytest.mark.parametrize(
    ("word", "code", "out", "err"),
    [
        ("--act=hello", 0, "hello\n", ""),
        ("--atc=hello", 2, "", "error: unknown option --atc; did you mean --act?\n"),
        ("nowhere.json", 2, "", "error: nowhere.json: not found\n"),
        ("--act=late", 2, "", "error: data is missing: make data\n"),
        ("--act=interrupt", 130, "", ""),
        ("--act=exit", 7, "", ""),
    ],
)
def test_run_prints_one_line_and_exits(script, word, code, out, err):
    process = script(word)
    assert process.communicate(timeout=60) == (out, err)
    assert process.returncode == code


def test_run_shows_help_and_lets_bugs_show(script):
    out, err = script("--help").communicate(timeout=60)
    assert out.startswith("usage: python script.py ")
    assert "A script." in out
    assert "what to do" in out
    assert err == ""
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


@pytest.mark.parametrize(
    "words",
    [
        "a.json B --size=3",
        "--size 3 a.json B",
        "a.json --size 3 B",
        "--one a.json --other B --size 3",
        "a.json --other B --size 3",
    ],
)
def test_a_command_takes_its_required_fields_as_words_or_flags(words):
    seen = []

    def same(cfg):
        """Compares two."""
        seen.append(cfg)

    dispatch({"same": (same, Two)}, ["same", *words.split()], "Commands.")
    assert seen == [Two("a.json", "B", 3)]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("sane", 2, "error: unknown command 'sane'; did you mean same?\n"),
        ("x", 2, "error: unknown command 'x'; expected one of same\n"),
        ("same A", 2, "error: other is required: --other=VALUE\n"),
        ("same A B C", 2, "error: expected a preset (a .json file) or --key=value, got 'C'\n"),
    ],
)
def test_a_command_that_is_mistaken_exits_2_with_one_line(words, code, told, capsys):
    with pytest.raises(SystemExit) as caught:
        dispatch({"same": (print, Two)}, words.split(), "Commands.")
    assert (caught.value.code, *capsys.readouterr()) == (code, "", told)


def test_help_of_a_command_says_how_that_one_is_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool.py", "same", "--help"])
    with pytest.raises(SystemExit):
        dispatch({"same": (print, Two)}, sys.argv[1:], "Commands.")
    assert capsys.readouterr().out.startswith(
        "usage: python tool.py same ONE OTHER [PRESET.json ...] "
    )


def test_run_passes_foreign_keys_on(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"device": "cpu"}')
    seen = []
    run(seen.append, Shape, argv=[str(path)], foreign_keys=True)
    assert seen[0].foreign_keys == ("device",)


def test_a_terminal_without_the_letters_or_no_stdout_at_all_is_no_traceback(tmp_path):
    script = tmp_path / "say.py"
    script.write_text(PROGRAM.replace("BODY", "print('größe')"))
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=ascii_only, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "gr??e\n", "")
    if os.name == "posix":
        command = f'"{sys.executable}" "{script}" >&-'
        done = subprocess.run(command, shell=True, env=ascii_only, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    script = tmp_path / "say.py"
    script.write_text(PROGRAM.replace("BODY", "print('hello')"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, script], env=environment, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr == b"error: no space left on the disk; free some and start again\n"


def test_a_preset_named_without_its_folder_or_with_backslashes_is_found(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "wee.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    for name in ("wee.json", "configs\\wee.json", "elsewhere/wee.json"):
        assert (
            error_of(name)
            == f"{name}: not found; did you mean {tmp_path / 'configs' / 'wee.json'}?"
        )


PROGRAM = """
from dataclasses import dataclass
from lib.config import run

@dataclass
class Config:
    size: int = 1

def main(cfg):
    BODY

run(main, Config)
"""
