"""One model, many askers: the loop that owns the model, and the queue in front of it.

A `Call` is what one client asks, its `Job`s the rows that the engine decodes for it. Calls wait in order of
arrival; before every step free slots are filled, and whoever went away or ran out of time is dropped. The
askers are threads of their own: they hand in a call and read its pieces, and touch neither model nor engine.
"""

import queue
import secrets
import select
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from sample import Engine, Reply, ending, token_logprobs

PACE = 0.02  # seconds between two pieces of a stream, at least
FIRST_TOKEN = (
    0.01,
    0.03,
    0.1,
    0.3,
    1,
    3,
    10,
    30,
    100,
)  # seconds: upper bounds of the histogram's buckets
SAYING = threading.Lock()


def say(text):
    """Writes to stderr in one piece, or drops the text where a pipe is full: answers wait for no reader."""
    with SAYING, suppress(OSError):
        with suppress(OSError, ValueError):  # no file, or Windows, where select knows sockets only
            if not select.select([], [sys.stderr], [], 0)[1]:
                return
        sys.stderr.write(text)


class Full(Exception):
    """The queue has no room for a call, or a call's time was up before a slot came free."""


class Closed(Exception):
    """The server is stopping: it takes no call, and gives up those that wait."""


class Failed(Exception):
    """The model failed on a call. str() is the number under which stderr tells why."""


class Token(NamedTuple):
    """An id, where in the row's text it begins, and what the engine says of its likelihood, or None."""

    start: int
    id: int
    likely: tuple | None


class Piece(NamedTuple):
    """What became certain of one row: more text, the tokens it came in, and at the end why it ended."""

    index: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None


class Job:
    """One row of a call: what the engine is asked, and what becomes certain of its answer.

    `stop`: texts before which the answer ends. `ends`: ids at which it does, where those are to be among its
    tokens (the engine's own `stop_ids` are not). `trim`: white space around the answer is the template's, not
    the text's. `score`: first, how likely the prompt is, with this many alternatives a token: `scored`.
    """

    def __init__(self, request, tokenizer, stop=(), ends=(), trim=False, score=None, index=0):
        self.request, self.ends, self.index = request, ends, index
        self.score, self.scored = score, None
        self.begun = time.monotonic()
        self.reply = Reply(tokenizer, stop, trim)
        self.held, self.text, self.tokens = (
            [],
            "",
            [],
        )  # tokens not yet certain; what is and was not told yet

    @property
    def ready(self):
        """Whether it may be decoded: not if it has yet to be scored, or that was all."""
        return not self.request.finish and (self.score is None or self.scored is not None)

    def push(self, id):
        """Takes the request's newest id."""
        start = self.reply.shown + len(self.reply.held)
        self.held.append(
            Token(start, id, self.request.logprobs[-1] if self.request.logprobs else None)
        )
        self._settle(self.reply.push(id))
        if self.reply.stopped or id in self.ends:
            self.request.finish = "stop"

    def end(self):
        """Settles what is left, once no more ids come; returns the last Piece."""
        self._settle(self.reply.end(), last=True)
        return self.tell()

    def tell(self):
        """Returns the Piece of what became certain since the last one, None for nothing."""
        if not (self.text or self.tokens or self.request.finish):
            return None
        piece = Piece(self.index, self.text, tuple(self.tokens), self.request.finish)
        self.text, self.tokens = "", []
        return piece

    def _settle(self, text, last=False):
        """Tokens wait until all of their text is certain; in the end some may have been cut off with it."""
        self.text += text
        reply = self.reply
        if last or not (reply.held or reply.stopped):
            self.tokens += [t for t in self.held if not reply.cut or t.start < reply.shown]
            self.held = []


@dataclass(eq=False)
class Call:
    """One client's rows. `gone()` says whether the client has hung up; `deadline` is of time.monotonic()."""

    jobs: list[Job]
    gone: Callable[[], bool]
    deadline: float
    stream: bool = False  # whether pieces are wanted as they come, or each row as one
    cancelled: bool = False
    inbox: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    ended: threading.Event = field(default_factory=threading.Event)  # a row of it has

    def tell(self, piece):
        """Puts a Piece, or what befell the call, before its asker."""
        self.inbox.put(piece)
        if isinstance(piece, Exception) or piece.finish:
            self.ended.set()

    def verdict(self):
        """Returns why the call should end before its time, None if it should not."""
        if self.cancelled or self.gone():
            return "gone"
        return "time" if time.monotonic() > self.deadline else None

    def pieces(self):
        """Yields the Pieces as they come until every row has ended; raises what befell the call.

        Those of one row that have piled up are one, and they may pile up for PACE seconds: each asker that
        wakes takes time from the model. Whoever stops reading early cancels the call.
        """
        rows, left = {}, len(self.jobs)
        try:
            while left:
                news = [self._next()]
                while not self.inbox.empty():
                    news.append(self._next())
                rows.clear()
                for piece in news:
                    old = rows.get(piece.index, Piece(piece.index))
                    text, tokens = old.text + piece.text, old.tokens + piece.tokens
                    rows[piece.index] = Piece(piece.index, text, tokens, piece.finish)
                    left -= piece.finish is not None
                yield from rows.values()
                self.ended.wait(PACE if left else 0)
        finally:
            self.cancelled = True

    def _next(self):
        piece = self.inbox.get()
        if isinstance(piece, Exception):
            raise piece
        return piece


class Scheduler:
    """Runs calls on one model, in the thread that calls `run`. `queue`: how many rows may wait for a slot.

    What it counts is for anyone to read: `steps`, `prompt_tokens`, `new_tokens`, `first_tokens` (by bucket of
    FIRST_TOKEN, the last without bound) and `first_seconds`, their sum.
    """

    def __init__(self, model, slots, queue):
        self.model, self.room = model, queue
        self.engine = Engine(model, slots)
        self.waiting, self.seated = deque(), {}  # of (call, job); slot -> (call, job)
        self.changed = threading.Condition()
        self.last = None  # when the server stops: the time after which no row goes on
        self.failure = None  # the newest Failed
        self.steps = self.prompt_tokens = self.new_tokens = self.first_seconds = 0
        self.first_tokens = [0] * (len(FIRST_TOKEN) + 1)

    def submit(self, call):
        """Puts a call's rows into the queue, all or none. Raises Full or Closed."""
        with self.changed:
            if self.last is not None:
                raise Closed
            if len(self.waiting) + len(call.jobs) > self.room:
                raise Full
            self.waiting.extend((call, job) for job in call.jobs)
            self.changed.notify()

    def close(self, grace):
        """Takes no more calls, gives up those that wait, ends the rest within `grace` seconds, then `run`."""
        with self.changed:
            self.last = time.monotonic() + grace
            self.changed.notify()

    def run(self):
        """Works until closed."""
        while self._work_to_do():
            try:
                self._drop()
                self._score()
                self._seat()
                self._step()
            except Exception:  # the boundary: one call's failure must not take the server with it
                self._fail()

    def _work_to_do(self):
        with self.changed:
            while not (self.waiting or self.seated or self.last is not None):
                self.changed.wait(1)  # not for ever: on Windows a signal is heard only in between
            return bool(self.waiting or self.seated)

    def _drop(self):
        """Ends the rows of calls whose client is gone or whose time is up; when stopping, all in the end."""
        with self.changed:
            waiting = list(self.waiting)
        rows = waiting + list(self.seated.values())
        verdicts = {call: call.verdict() for call in {call for call, _ in rows}}
        late = self.last is not None and time.monotonic() > self.last
        for call, job in rows:
            job.request.finish = (
                job.request.finish or verdicts[call] or ("shutdown" if late else None)
            )
        for call, job in waiting:
            if self.last is not None and not job.request.finish:
                job.request.finish = "shutdown"
            if job.request.finish:
                call.tell(self._last_word(job))
        with self.changed:
            self.waiting = deque(row for row in self.waiting if not row[1].request.finish)
        self._leave()

    def _last_word(self, job):
        """What is to be said of a row that ended while it waited."""
        early = {"time": Full(), "shutdown": Closed(), "error": self.failure}
        return early.get(job.request.finish) or job.end()

    def _score(self):
        """Scores the prompt of the oldest row that waits, if it wants that: one between two steps."""
        with self.changed:
            _, job = self.waiting[0] if self.waiting else (None, None)
        if job is None or job.score is None or job.scored is not None:
            return
        with ending([job.request]):
            job.scored = next(token_logprobs(self.model, [job.request.prompt], job.score))
        if job.request.max_new_tokens == 0:
            self.prompt_tokens += len(job.request.prompt)
            job.request.finish = "length"

    def _seat(self):
        """Gives free slots to the oldest rows that are ready."""
        rows, free = (
            [],
            [slot for slot, request in enumerate(self.engine.requests) if request.finish],
        )
        with self.changed:
            while len(rows) < len(free) and self.waiting and self.waiting[0][1].ready:
                rows.append(self.waiting.popleft())
        if rows:
            self.seated |= dict(zip(free, rows))  # before the next line, which may fail
            slots = self.engine.join([job.request for _, job in rows])
            assert slots == free[: len(rows)]
            self.prompt_tokens += sum(len(job.request.prompt) for _, job in rows)

    def _step(self):
        for ids in self.engine.advance() if self.seated else ():
            self.steps += 1
            for slot, (call, job) in self.seated.items():
                if ids[slot] is not None:
                    self._count(job)
                    job.push(ids[slot])
                    if call.stream and not job.request.finish and (piece := job.tell()):
                        call.tell(piece)
        self._leave()

    def _count(self, job):
        self.new_tokens += 1
        if len(job.request.ids) == 1:
            seconds = time.monotonic() - job.begun
            self.first_seconds += seconds
            self.first_tokens[bisect_left(FIRST_TOKEN, seconds)] += 1

    def _leave(self):
        """Lets go of the rows that have ended, with their last words."""
        for slot, (call, job) in list(self.seated.items()):
            if job.request.finish:
                del self.seated[slot]
                call.tell(self.failure if job.request.finish == "error" else job.end())

    def _fail(self):
        """Tells stderr what happened, and under which number the rows it ended are told."""
        self.failure = Failed(secrets.token_hex(4))
        say(f"error {self.failure} in the model: {traceback.format_exc()}")
        with self.changed:
            rows = [*self.waiting, *self.seated.values()]
        if not any(job.request.finish == "error" for _, job in rows):
            for _, job in self.seated.values():  # no row's own failure, so whose is unknown
                job.request.finish = "error"
