"""chat.py: questions reach the model in its template, a full context forgets, Ctrl-C ends one answer."""

import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch

from corpus.chats import read_chats
from corpus.sources import Tally
from lib.config import UserError, configure
from lib.tokenizer import Tokenizer, render, stop_ids
from model import save_model
from sample import Chat, Reply, SampleConfig, Sampling, obey
from tests import ROOT
from tests.test_engine import BASE, GREEDY, answer, build
from tests.warm import python

LONG = replace(BASE, sequence_length=400)


def saved(folder, tokenizer, template, cfg=LONG):
    folder.mkdir()
    save_model(build(cfg), folder)
    tokenizer.save(folder, cfg.sequence_length, template)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """{template: a model's folder}"""
    names = ("chatml", "instruct", "chat", None)
    return {name: saved(tmp_path_factory.mktemp("m") / "x", tiny_tokenizer, name) for name in names}


def begin(folder, cfg=LONG, sampling=GREEDY, count=8, **kw):
    return Chat(build(cfg), Tokenizer.load(folder), sampling, count, **kw)


@pytest.mark.parametrize("template", ["chatml", "instruct", "chat"])
def test_answers_are_those_to_the_whole_conversation_in_the_template(folders, template):
    chat = begin(folders[template], system="be brief")
    said = [{"role": "system", "content": "be brief"}]
    for question in ("why?", "<|im_end|> and why not?", "Human: when?"):
        chat.ask(question)
        said.append({"role": "user", "content": question})
        prompt, _ = render(chat.tokenizer, said, template, add_generation_prompt=True)
        ids = answer(chat.model, prompt, count=8, stop_ids=stop_ids(chat.tokenizer, template))
        said.append({"role": "assistant", "content": chat.tokenizer.decode(ids).strip()})
        assert chat.messages == said


def test_what_is_printed_is_the_answer_and_how_it_ended(folders, capsys):
    chat = begin(folders["chatml"])
    chat.ask("why?")
    out, err = capsys.readouterr()
    assert out == chat.messages[-1]["content"] + "\n"
    prompt, _ = render(chat.tokenizer, chat.messages[:1], "chatml", add_generation_prompt=True)
    assert err.startswith("(cut at max_new_tokens=8, 8 tokens, ")
    assert err.endswith(f"context {len(prompt) + 8} of 400)\n")


def test_a_stop_text_ends_an_answer(folders, capsys):
    chat = begin(folders["chatml"])
    chat.ask("why?")
    whole = chat.messages[-1]["content"]
    other = begin(folders["chatml"], stop=(whole[2:4],))
    other.ask("why?")
    assert other.messages[-1]["content"] == whole[: whole.index(whole[2:4])].rstrip()


def test_a_full_context_forgets_the_oldest_turns_and_says_so(tmp_path, tiny_tokenizer, capsys):
    chat = begin(saved(tmp_path / "m", tiny_tokenizer, "chat"), system="s")
    for number in range(12):
        chat.ask(f"question number {number} asked at some length")
        ids, _ = render(chat.tokenizer, chat.messages[:-1], "chat", add_generation_prompt=True)
        assert len(ids) + 8 <= 400
        assert chat.messages[0] == {"role": "system", "content": "s"}
        assert chat.messages[1]["role"] == "user"
        assert chat.messages[-2]["content"].startswith(f"question number {number}")
    assert len(chat.messages) < 25
    assert "forgot the oldest turn)" in capsys.readouterr().err


def test_a_question_without_room_is_refused_and_nothing_forgotten(folders):
    chat = begin(folders["chatml"])
    chat.ask("why?")
    before = list(chat.messages)
    with pytest.raises(UserError, match=r"tokens.*context of 400; shorten it"):
        chat.ask("9" * 500)
    assert chat.messages == before
    chat.ask("why not?")
    assert len(chat.messages) == 4


def test_a_base_model_continues_and_remembers_nothing(folders, capsys):
    chat = begin(folders[None])
    for _ in range(2):
        chat.ask("once upon")
        ids = answer(chat.model, [1, *chat.tokenizer.encode("once upon")], count=8, stop_ids=[2])
        assert capsys.readouterr().out == chat.tokenizer.decode(ids) + "\n"
        assert chat.messages == [{"role": "user", "content": "once upon"}]
        obey(chat, "/retry")
        assert capsys.readouterr().out == chat.tokenizer.decode(ids) + "\n"
    with pytest.raises(UserError, match="no chat template"):
        obey(chat, "/system be brief")


def test_a_question_without_an_answer_is_asked_again_or_forgotten(folders):
    chat = begin(folders["chatml"])
    chat.ask("why?")
    answered, first = list(chat.messages), chat.messages[-1]["content"]
    obey(chat, "/clear")
    chat.stop = (first[0],)
    chat.ask("why?")
    chat.ask("why?")
    assert chat.messages == answered[:1]
    chat.stop = ()
    obey(chat, "/retry")
    assert chat.messages == answered


def test_retry_asks_again_with_another_seed(folders):
    chat = begin(folders["chatml"], sampling=Sampling(temperature=1.5, top_k=0, seed=1))
    chat.ask("why?")
    first = chat.messages[-1]["content"]
    obey(chat, "/retry")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[-1]["content"] != first
    again = begin(folders["chatml"], sampling=Sampling(temperature=1.5, top_k=0, seed=2))
    again.ask("why?")
    assert again.messages == chat.messages


def test_a_retry_without_room_loses_nothing(folders):
    chat = begin(folders["chatml"])
    chat.ask("why?")
    obey(chat, "/system " + "9" * 500)
    before = list(chat.messages)
    with pytest.raises(UserError, match=r"context of 400; shorten it"):
        obey(chat, "/retry")
    assert chat.messages == before


def test_commands(folders, tmp_path, capsys):
    chat = begin(folders["chatml"])
    for line, problem in [("/retry", "no question"), ("/foo", "/help lists"), ("/save", "name a file"),
                          ("/save x", "nothing has been answered")]:  # fmt: skip
        with pytest.raises(UserError, match=problem):
            obey(chat, line)
    assert obey(chat, "  ")
    assert obey(chat, "  //clear is a word")
    assert chat.messages[0]["content"] == "  /clear is a word"
    obey(chat, "/clear")
    assert obey(chat, "//clear is a word")
    assert chat.messages[0]["content"] == "/clear is a word"
    obey(chat, "/system  be brief")
    for _ in range(2):
        obey(chat, f"/save {tmp_path / 'chat.jsonl'}")
    assert read_chats(str(tmp_path / "chat.jsonl"), Tally()) == [{"messages": chat.messages}] * 2
    with pytest.raises(UserError, match="No such file"):
        obey(chat, "/save /nowhere/at/all")
    obey(chat, "/clear")
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    capsys.readouterr()
    obey(chat, "/system")
    obey(chat, "/help")
    err = capsys.readouterr().err
    assert err.startswith("be brief\n/help")
    assert not obey(chat, "/quit")


@pytest.mark.parametrize("text", ["", " ", "\n a  b \n", "ab", " \n a \n\n b c \n"])
def test_white_space_around_a_text_in_pieces(text, tiny_tokenizer):
    reply = Reply(tiny_tokenizer, trim=True)
    ids = [id for character in text for id in tiny_tokenizer.encode(character)]
    assert "".join(map(reply.push, ids)) + reply.end() == text.strip()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--chat", "--num_samples=2"], "one answer at a time"),
        (["--system=x"], "system is for --chat"),
    ],
)
def test_what_does_not_go_together_is_refused(words, problem):
    with pytest.raises(UserError, match=problem):
        configure(SampleConfig, ["--model_path=x", *words])


# ---- as a program


def command(folder, *words):
    return [python(), str(ROOT / "sample.py"), "--chat", f"--model_path={folder}", *words]


def test_questions_from_a_pipe_and_from_the_command_line(folders):
    def run(words, text):
        return subprocess.run(
            command(folders["chatml"], "--temperature=0", "--max_new_tokens=8", *words),
            input=text,
            capture_output=True,
            timeout=120,
        )

    chat = begin(folders["chatml"])
    chat.ask("why?")
    chat.ask("when?")
    answers = [
        message["content"].encode() for message in chat.messages if message["role"] == "assistant"
    ]
    done = run([], b"why?\n\nwhen?\n/quit\nwho?\n")
    assert (done.returncode, done.stdout) == (0, b"".join(text + b"\n" for text in answers))
    done = run(["--prompt=why?"], b"not read")
    assert (done.returncode, done.stdout) == (0, answers[0] + b"\n")
    done = run([], b"why?\n\xff\n")
    assert done.returncode == 2
    assert b"\nerror: " in done.stderr
    assert b"not U" in done.stderr
    assert b"Traceback" not in done.stderr


class Terminal:
    """A program with a terminal of its own, which ends with the block."""

    def __init__(self, words):
        master, slave = pty.openpty()
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        heed = partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        )  # background jobs inherit deafness to it
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


def test_control_characters_reach_a_pipe_but_no_terminal(tmp_path, tiny_tokenizer):
    """The model writes ESC and BEL only: of two opposite rows of the head one has the largest logit."""
    model = build(replace(LONG, tie_word_embeddings=False))
    with torch.no_grad():
        row = 99 * torch.randn(32)
        model.lm_head.weight[[6 + 0x1B, 6 + 0x07]] = torch.stack([row, -row])
    save_model(model, tmp_path)
    tiny_tokenizer.save(tmp_path, LONG.sequence_length, "chatml")
    for chat in (["--chat"], []):
        words = [
            python(),
            str(ROOT / "sample.py"),
            *chat,
            f"--model_path={tmp_path}",
            "--temperature=0",
        ]
        words += ["--max_new_tokens=9", "--prompt=why?"]
        raw = subprocess.run(words, capture_output=True, timeout=120).stdout
        assert len(raw) == 10
        assert set(raw) - {0x0A} <= {0x1B, 0x07}
        with Terminal(words) as terminal:
            shown = terminal.until(b" tokens/s")
        assert (
            raw.translate(None, b"\n")
            .replace(b"\x1b", "\u241b".encode())
            .replace(b"\x07", "\u2407".encode())
            in shown
        )
        assert not {0x1B, 0x07} & set(shown)


def test_ctrl_c_ends_the_answer_and_then_the_chat(folders):
    words = command(
        folders["chatml"], "--max_new_tokens=390", "--temperature=1.5", "--top_k=0", "--seed=3"
    )
    with Terminal([sys.executable, *words[1:]]) as terminal:  # cold, as a user starts it
        terminal.until(b"/help lists the commands")
        terminal.until(b"> ")
        for _ in range(2):
            terminal.type(b"why?\n")
            terminal.until(b"\n")
            terminal.read(1)  # the answer has begun
            terminal.process.send_signal(signal.SIGINT)
            terminal.until(b"(stopped, ")
            terminal.until(b"> ")
        for line, problem in ((b"/nonsense\n", b"no such command"), (b"\xff?\n", b"not U")):
            terminal.type(line)
            terminal.until(b"error: ")
            terminal.until(problem)
            terminal.until(b"> ")
        for _ in range(5):  # one that comes just before input() waits is not seen before the next
            terminal.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                assert terminal.process.wait(timeout=20) == 0
                return
        pytest.fail("still there")
