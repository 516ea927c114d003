"""sample.py in a terminal: samples of a prompt, a conversation, and mistakes in one line."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest

import sample
from corpus.chats import read_chats
from corpus.report import Tally
from lib.config import UserError, configure
from lib.conversation import render, stop_ids
from lib.tokenizer import Tokenizer
from model import save_model
from sample import Chat, SampleConfig, Sampling, open_model
from tests import ROOT
from tests.test_engine import BASE, answer, build
from tests.warm import python

LONG = replace(BASE, sequence_length=400)


def saved(folder, tokenizer, template=None, cfg=LONG):
    folder.mkdir()
    save_model(build(cfg), folder)
    tokenizer.save(folder, cfg.sequence_length, template)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """{template: a model's folder}, and "short": one of 48 positions"""
    place = tmp_path_factory.mktemp("models")
    names = ("chatml", "instruct", "chat", None)
    folders = {name: saved(place / str(name), tiny_tokenizer, name) for name in names}
    return folders | {"short": saved(place / "short", tiny_tokenizer, cfg=BASE)}


def main(folder, *words):
    sample.main(configure(SampleConfig, [f"--model_path={folder}", *words]))


# ---- samples

PROMPT = ["--prompt=Why?  the  dog", "--max_new_tokens=8"]
ASK = [*PROMPT, "--temperature=1.5", "--top_k=0", "--seed=5"]


def expected_text(folder, tokenizer, seed):
    prompt = [tokenizer.bos_id, *tokenizer.encode("Why?  the  dog")]
    rules, ends = Sampling(temperature=1.5, top_k=0, seed=seed), {tokenizer.eos_id}
    return tokenizer.decode(answer(open_model(folder)[0], prompt, rules, 8, stop_ids=ends))


def test_samples_are_all_that_is_printed_and_in_order(folders, tiny_tokenizer, capsys):
    first, second = (expected_text(folders["short"], tiny_tokenizer, seed) for seed in (5, 6))
    assert first != second
    main(folders["short"], *ASK)
    out, err = capsys.readouterr()
    assert out == first + "\n"
    assert all(words in err for words in ("seed 5", "tokens/s"))
    main(folders["short"], *ASK, "--num_samples=2")
    assert capsys.readouterr().out == f"--- sample 1 ---\n{first}\n--- sample 2 ---\n{second}\n"


@pytest.mark.parametrize(
    ("flag", "texts"),
    [
        ("", ()),
        (",", (",",)),
        (r"\n", ("\n",)),
        (r"\n\n,\tQ:,end", ("\n\n", "\tQ:", "end")),
        (r'["a, b", "\n", ","]', ("a, b", "\n", ",")),
        ('["', ('["',)),
        ("[INST]", ("[INST]",)),
        ("\n", ("\n",)),
    ],
)
def test_stop_texts_are_what_was_typed(flag, texts):
    assert configure(SampleConfig, ["--model_path=x", f"--stop={flag}"]).stop == texts


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--chat", "--num_samples=2"], "one answer at a time"),
        (["--system=x"], "system is for --chat"),
        (["--stop=a,,b"], "stop.*empty"),
        (["--prompt=\udcff"], "not Unicode text"),
        (["--device=cpu", "--compile"], "compile: .* need CUDA"),
        (["--device=cpu", "--dtype=fp16"], "dtype=fp16 .*--dtype=fp32"),
        (["--top_p=0"], "top_p.*> 0.*got 0"),
        (["--temperature=-1"], r"temperature.*0\.\.100.*got -1"),
        (["--prompt=" + "9" * 60], "61 tokens.* 48; shorten it"),
    ],
)
def test_what_cannot_be_is_refused(folders, words, problem):
    with pytest.raises(UserError, match=problem):
        main(folders["short"], *words)


def test_a_foreign_tokenizer_or_no_folder_is_refused(tmp_path, tiny_tokenizer):
    folder = saved(tmp_path / "m", tiny_tokenizer, cfg=replace(BASE, vocab_size=300))
    for path, problem in ((folder, r"300 tokens.* 384"), ("nowhere", "nowhere: no such folder")):
        with pytest.raises(UserError, match=problem):
            open_model(path)


def test_a_pointer_of_git_lfs_is_named(folders, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("model.safetensors", "tokenizer.model", "tokenizer.json"):
        folder = shutil.copytree(folders["short"], tmp_path / name)
        (folder / name).write_text(pointer)
        if name == "tokenizer.json":  # as in a foreign folder, which has no other
            (folder / "tokenizer.model").unlink()
        with pytest.raises(UserError, match=f"{name}: a Git LFS pointer.*run `git lfs pull`"):
            open_model(folder)


# ---- a conversation


def say(chat, *lines):
    """Has a chat obey lines; returns its messages."""
    for line in lines:
        assert chat.obey(line)
    return chat.system + chat.turns


def begin(folder, cfg=LONG, **options):
    options = {"temperature": 0, "max_new_tokens": 8} | options
    cfg_of_command = SampleConfig(model_path=str(folder), chat=True, **options)
    return Chat(cfg_of_command, build(cfg), Tokenizer.load(folder))


@pytest.mark.parametrize("template", ["chatml", "instruct", "chat"])
def test_answers_are_those_to_the_whole_conversation_in_the_template(folders, template):
    chat = begin(folders[template], system="be brief")
    said, model = [{"role": "system", "content": "be brief"}], build(LONG)
    for question in ("why?", "<|im_end|> and why not?", "Human: when?"):
        chat.obey(question)
        said.append({"role": "user", "content": question})
        prompt, _ = render(chat.tokenizer, said, template, add_generation_prompt=True)
        ids = answer(model, prompt, count=8, stop_ids=stop_ids(chat.tokenizer, template))
        said.append({"role": "assistant", "content": chat.tokenizer.decode(ids).strip()})
        assert chat.system + chat.turns == said


def test_a_full_context_forgets_the_oldest_turns_and_says_so(folders, capsys):
    chat = begin(folders["chat"], system="s")
    for number in range(12):
        messages = say(chat, f"question number {number} asked at some length")
        ids, _ = render(chat.tokenizer, messages[:-1], "chat", add_generation_prompt=True)
        assert len(ids) + 8 <= 400
        assert messages[0] == {"role": "system", "content": "s"}
        assert messages[1]["role"] == "user"
        assert messages[-2]["content"].startswith(f"question number {number}")
    assert len(messages) < 25
    assert "is full: the oldest turns are forgotten" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"tokens.*context of 400; shorten it"):
        chat.obey("9" * 500)
    assert chat.system + chat.turns == messages


def test_a_base_model_continues_and_remembers_nothing(folders, capsys):
    chat = begin(folders[None])
    ids = answer(build(LONG), [1, *chat.tokenizer.encode("once upon")], count=8, stop_ids=[2])
    capsys.readouterr()
    for _ in range(2):
        assert say(chat, "once upon") == []
        assert capsys.readouterr().out == chat.tokenizer.decode(ids) + "\n"
    with pytest.raises(UserError, match="no chat template"):
        chat.obey("/system be brief")


def test_commands(folders, tmp_path, capsys):
    chat = begin(folders["chatml"], temperature=1.5, top_k=0, seed=1)
    for line in ("/retry", "/save x"):
        with pytest.raises(UserError, match="no answer yet"):
            chat.obey(line)
    first = say(chat, "  ", "why?")
    out, err = capsys.readouterr()
    assert out == first[-1]["content"] + "\n"
    assert err.startswith("8 tokens, ended by length, seed 1, ")
    other = say(chat, "/retry")
    assert [message["role"] for message in other] == ["user", "assistant"]
    assert other == say(begin(folders["chatml"], temperature=1.5, top_k=0, seed=2), "why?") != first
    messages = say(chat, "/system  be brief", *[f"/save {tmp_path / 'chat.jsonl'}"] * 2)
    assert messages == [{"role": "system", "content": "be brief"}, *other]
    assert read_chats(str(tmp_path / "chat.jsonl"), Tally()) == [{"messages": messages}] * 2
    for path in ("", "/nowhere/at/all"):
        with pytest.raises(UserError, match=r"No such file.*name a file"):
            chat.obey(f"/save {path}")
    assert say(chat, "/clear", "/help") == messages[:1]
    assert capsys.readouterr().err.endswith(sample.HELP + "\n")
    assert not chat.obey("/quit")


# ---- as a program


def command(folder, *words):
    return [python(), str(ROOT / "sample.py"), f"--model_path={folder}", *words]


def test_questions_from_a_pipe_and_from_the_command_line(folders):
    words = command(folders["chatml"], "--chat", "--temperature=0", "--max_new_tokens=8")
    chat = begin(folders["chatml"])
    first, second = (m["content"].encode() + b"\n" for m in say(chat, "why?", "when?")[1::2])
    for more, text, expected in [
        ([], b"why?\n\nwhen?\n/quit\nwho?\n", (0, first + second)),
        (["--prompt=why?"], b"not read", (0, first)),
        ([], b"why?\n\xff\nwhen?\n", (2, first)),
    ]:
        done = subprocess.run([*words, *more], input=text, capture_output=True, timeout=120)
        assert (done.returncode, done.stdout) == expected
        assert b"Traceback" not in done.stderr
    assert b"\nerror: not Unicode" in done.stderr


class Terminal:
    """A program with a terminal of its own, which ends with the block."""

    def __init__(self, words):
        master, slave = pty.openpty()
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        # background jobs inherit deafness to it
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(words, **ends, start_new_session=True, preexec_fn=heed)
        os.close(slave)
        self.master, self.seen = master, b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text):
        os.write(self.master, text)

    def read(self, size=4096):
        assert select.select([self.master], [], [], 90)[0], self.seen
        return os.read(self.master, size)

    def until(self, text):
        """Reads until `text` is on the screen; returns what came before it."""
        while text not in self.seen:
            self.seen += self.read()
        before, _, self.seen = self.seen.partition(text)
        return before


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_reach_a_pipe_but_no_terminal(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    sample.show("a\x1b[2J\x07\x9b\n\tb")
    shown = "a\ufffd[2J\ufffd\ufffd\n\tb" if terminal else "a\x1b[2J\x07\x9b\n\tb"
    assert capsys.readouterr().out == shown


def test_ctrl_c_ends_the_answer_and_then_the_chat(folders):
    words = ["--max_new_tokens=390", "--temperature=1.5", "--top_k=0", "--seed=3"]
    words = command(folders["chatml"], "--chat", *words)
    with Terminal([sys.executable, *words[1:]]) as terminal:  # cold, as a user starts it
        terminal.until(b"/help lists the commands")
        terminal.until(b"> ")
        for _ in range(2):
            terminal.type(b"why?\n")
            terminal.until(b"\n")
            terminal.read(1)  # the answer has begun
            terminal.process.send_signal(signal.SIGINT)
            terminal.until(b"ended by stopped, ")
            terminal.until(b"> ")
        terminal.type(b"\xff?\n")
        terminal.until(b"error: not U")
        terminal.until(b"> ")
        for _ in range(5):  # a signal just before input() waits is not seen before the next
            terminal.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                assert terminal.process.wait(timeout=20) == 0
                return
        pytest.fail("still there")
