"""Serves a model over HTTP: OpenAI's routes, /generate, and a chat page.

    python server.py --model_path=checkpoints/sft --host=127.0.0.1 --port=8000

Made for its owner's machine and network, not for the open internet: no TLS, no accounts; put a proxy in front
for that. Any address other than this machine's own needs a key, from the environment variable
MINI_LLM_API_KEY or a file (--api_key_file), which clients send as "Authorization: Bearer KEY".
"""

import base64
import hashlib
import hmac
import ipaddress
import itertools
import json
import os
import re
import secrets
import signal
import socket
import socketserver
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple
from urllib.parse import unquote

from api import Api, ApiError
from lib.config import PositiveFloat, PositiveInt, Range, UserError, parse_json, run
from model import model_folder
from sample import open_model
from scheduler import FIRST_TOKEN, Scheduler, say
from wire import Gone, Refused, Wire

CONNECTIONS = 256  # answered at the same time
TURNED_AWAY = 64  # connections beyond that are told 503; still more wait in the system's queue
DEPTH = 32  # of lists and objects in a body
GRACE_SECONDS = 4  # for answers under way when the server is told to stop
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
PAGE = Path(__file__).with_name("web") / "chat.html"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Which model to serve, and to whom."""

    model_path: str  # a model folder
    host: str = "127.0.0.1"  # address to listen on; any but this machine's own needs an API key
    port: Annotated[int, Range(0, 65535)] = 8000  # 0 = a free one, which is printed
    api_key_file: str = ""  # file with the key clients must send; or set MINI_LLM_API_KEY
    allowed_hosts: tuple[
        str, ...
    ] = ()  # names by which clients may call it, beside localhost: box.lan
    allowed_origins: tuple[
        str, ...
    ] = ()  # web pages of others that may ask, as http://localhost:3000
    model_name: str = ""  # the name clients ask for; by default the folder's
    # answers written at the same time; each holds a KV cache
    slots: Annotated[int, Range(1, 256)] = 8
    queue: PositiveInt = 64  # requests that may wait for a slot; more are told 429
    # a request's time in queue and making; then it ends as it is
    request_seconds: PositiveFloat = 300.0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    # fp32 on a CPU, bf16 on a GPU that has it; int8 (CPU) is a fourth of the memory, faster, and a little off
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"

    def __post_init__(self):
        for name in self.allowed_hosts:
            match = HOST.fullmatch(name)
            if not match or match[2]:
                raise ValueError(
                    f"allowed_hosts: {name!r} is not a host's name; write it bare, as box.lan"
                )
        for origin in self.allowed_origins:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(
                    f"allowed_origins: {origin!r} is not a page's origin, as http://localhost:3000"
                )


# ----------------------------------------------------------------------------------------------
# Answers


NOTHING = MappingProxyType({})


class Text(NamedTuple):
    """An answer that is not JSON."""

    kind: str
    text: str
    headers: Mapping[str, str]


def health(server, path):
    """Open to all: whether there is a model to ask, and which."""
    return {"status": "ok", "model": server.api.name, "context_length": server.api.context}


def chat_page(server, path):
    """The chat page, the only file that is served, read when the server starts."""
    if server.page is None:
        raise ApiError(404, "this copy of the code has no chat page (chat.html)", code="not_found")
    policy = {"Content-Security-Policy": page_policy(server.page)}
    return Text("text/html; charset=utf-8", server.page, policy)


def metrics(server, path):
    """Counters in Prometheus' text format."""
    return Text("text/plain; version=0.0.4; charset=utf-8", server.metrics(), NOTHING)


def models(server, path):
    """The one model there is, in a list."""
    return server.api.models()


def model(server, path):
    """The model, if that is its name."""
    name = unquote(path).removeprefix("/v1/models/")
    if name != server.api.name:
        raise server.api.not_served(name)
    return server.api.card()


def tokenizer_info(server, path):
    """For lm-eval, where it has no tokenizer of its own."""
    return server.api.tokenizer_info()


GET = {
    "/": chat_page,
    "/health": health,
    "/metrics": metrics,
    "/tokenizer_info": tokenizer_info,
    "/v1/models": models,
}
POST = {
    "/generate": Api.generate,
    "/tokenize": Api.tokenize,
    "/detokenize": Api.detokenize,
    "/v1/chat/completions": Api.chat,
    "/v1/completions": Api.completions,
}
OPEN = {"/", "/health"}  # without a key: the page holds no secret, and asks for the key itself

SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def page_policy(page):
    """Returns the Content-Security-Policy under which only the page's own <script>s and <style>s run."""

    def hashes(tag):
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S)
        digests = [
            base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks
        ]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def event(fields):
    """Returns a server-sent event. In ASCII: some clients take U+2028 and its like for line breaks."""
    return f"data: {json.dumps(fields, separators=(',', ':'))}\n\n".encode()


# ----------------------------------------------------------------------------------------------
# The server


class Server(socketserver.ThreadingTCPServer):
    """Listens, and answers each connection in a thread. `api` is None until the model is loaded."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"

    def __init__(self, cfg, key):
        self.cfg, self.key, self.api, self.stopping = cfg, key, None, False
        self.address_family, address = resolve(cfg.host, cfg.port)
        self.outside = not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        if self.outside and not key:
            raise UserError(
                f"host={cfg.host} is open to others, and there is no API key: set the environment variable "
                "MINI_LLM_API_KEY or give --api_key_file, or listen on --host=127.0.0.1"
            )
        self.names = {
            "localhost",
            "127.0.0.1",
            "::1",
            cfg.host.lower(),
            *map(str.lower, cfg.allowed_hosts),
        }
        self.page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else None
        self.lock, self.active, self.requests = threading.Lock(), 0, Counter()
        self.places = threading.Semaphore(CONNECTIONS + TURNED_AWAY)
        try:
            super().__init__(address, None)
        except OSError as problem:
            why = f"host={cfg.host} port={cfg.port}: cannot listen there: {problem.strerror}"
            raise UserError(f"{why}; choose another port, or --port=0 for a free one") from None

    @property
    def url(self):
        host = f"[{self.cfg.host}]" if ":" in self.cfg.host else self.cfg.host
        return f"http://{host}:{self.server_address[1]}"

    def stop(self):
        """Begins to stop, on a signal: no more connections, and the scheduler ends. Asked twice: at once."""
        if (
            self.api is None
        ):  # the model is being loaded, which may take minutes, and nobody waits for a word
            os._exit(0)
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        threading.Thread(
            target=self._stop, daemon=True
        ).start()  # a signal's handler must not wait for locks

    def _stop(self):
        self.shutdown()
        self.socket.setblocking(False)
        with suppress(OSError):  # whoever is in the system's queue already is told, not reset
            while True:
                self.process_request(*self.get_request())
        self.server_close()
        if self.api.scheduler.seated:
            say(f"stopping; answers under way have {GRACE_SECONDS} seconds\n")
        self.api.scheduler.close(GRACE_SECONDS)

    # ---- connections

    def process_request(self, request, client_address):
        while not self.places.acquire(timeout=0.2):
            if self.stopping:
                return self.shutdown_request(request)
        with self.lock:
            self.active += 1
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no more threads to give
            self._leave(request)

    def _leave(self, connection):
        connection.close()
        with self.lock:
            self.active -= 1
        self.places.release()

    def process_request_thread(self, request, client_address):
        wire = None
        try:
            wire = Wire(request)
            self._exchange(wire, client_address[0])
        except OSError:
            pass  # gone before a word
        finally:
            self._leave(wire or request)

    def _exchange(self, wire, peer):
        """One request and its answer, counted and logged, whatever they are."""
        begun, visit = time.monotonic(), Visit()
        try:
            status = self._respond(wire, visit)
        except Gone:
            return
        except OSError:
            status = 499  # the client hung up, or did not read
        with self.lock:
            self.requests[visit.route, status] += 1
        what = f"{visit.head.method} {visit.head.path[:80]}" if visit.head else "-"
        why = f" ({visit.reason})" if visit.reason else ""
        line = f"{time.strftime('%H:%M:%S')} {peer} {what} {status} {time.monotonic() - begun:.3f} s{why}\n"
        say(line)

    def _respond(self, wire, visit):
        """Answers a request; returns the status. Raises Gone or OSError if there is nobody to answer."""
        try:
            answer = self._answer(wire, visit)
            if isinstance(answer, Iterator):
                return self._stream(wire, visit, answer)
            return self._send(wire, visit, 200, answer)
        except (Gone, OSError):
            raise
        except ApiError as problem:
            error = problem
        except Refused as problem:
            error = ApiError(problem.status, str(problem))
        except (
            Exception
        ):  # the boundary: whatever it was, the client is answered and the server lives on
            error = internal_error()
        visit.reason = error.reason()
        return self._send(wire, visit, error.status, error.fields(), error.headers)

    def _send(self, wire, visit, status, answer, more=NOTHING):
        if not isinstance(answer, Text):
            answer = Text("application/json", json.dumps(answer, ensure_ascii=False), more)
        body = answer.text.encode("utf-8", "replace")
        headers = {"Content-Type": answer.kind, "Content-Length": len(body)}
        headers |= SECURITY | visit.headers | dict(answer.headers)
        wire.send(status, headers, b"" if visit.head and visit.head.method == "HEAD" else body)
        return status

    def _stream(self, wire, visit, answer):
        """Sends an answer as server-sent events; a failure on the way is the last of them."""
        first = next(answer)  # what fails before there is a token still gets a status of its own
        try:
            wire.send(
                200, {"Content-Type": "text/event-stream; charset=utf-8"} | SECURITY | visit.headers
            )
            wire.send_more(event(first))
            for fields in answer:
                wire.send_more(event(fields))
            wire.send_more(b"data: [DONE]\n\n")
        except OSError:
            raise
        except Exception as problem:
            error = problem if isinstance(problem, ApiError) else internal_error()
            visit.reason = error.reason()
            wire.send_more(event(error.fields()))
        finally:
            answer.close()
        return 200

    # ---- gates and routes

    def _answer(self, wire, visit):
        visit.head = head = wire.read_head()
        if self.active > CONNECTIONS:
            raise ApiError(
                503, "too many connections; try again in a moment", headers={"Retry-After": "1"}
            )
        self._check_host(head)
        self._check_origin(head, visit)
        visit.route, table = self._route(head.path)
        if head.method == "OPTIONS" and visit.headers:
            return Text("text/plain", "", NOTHING)
        if head.method not in table:
            allowed = ", ".join(table)
            raise ApiError(405, f"{visit.route} takes {allowed}", headers={"Allow": allowed})
        if visit.route not in OPEN:
            self._check_key(head)
        if self.api is None and visit.route != "/":
            raise ApiError(
                503, "the model is being loaded", code="loading", headers={"Retry-After": "1"}
            )
        if head.method == "POST":
            return table["POST"](self.api, read_json(wire, head), wire.gone)
        if head.headers.get("content-length", "0") != "0" or "transfer-encoding" in head.headers:
            raise ApiError(400, "a GET with a body")
        return table["GET"](self, head.path)

    def _check_host(self, head):
        """A page that rebinds its own name to this address (DNS rebinding) still sends its own name."""
        match = HOST.fullmatch(head.headers.get("host", ""))
        name = match[1].strip("[]").lower() if match else ""
        if name in self.names or (self.outside and is_address(name)):
            return
        if "host" not in head.headers:
            raise ApiError(400, "the Host header is missing")
        raise ApiError(403, "this server does not go by that Host; name it with --allowed_hosts")

    def _check_origin(self, head, visit):
        """Other web pages must not use the browser of somebody who may ask."""
        origin = head.headers.get("origin")
        if origin in (
            None,
            *(f"{scheme}://{head.headers['host']}" for scheme in ("http", "https")),
        ):
            return
        if origin not in self.cfg.allowed_origins:
            raise ApiError(403, "this Origin may not ask; name it with --allowed_origins")
        visit.headers = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": "authorization, content-type",
            "Cross-Origin-Resource-Policy": "cross-origin",
            "Vary": "Origin",
        }

    def _check_key(self, head):
        scheme, _, key = head.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self.key.encode())
        if self.key and not (right and scheme.lower() == "bearer"):
            message = "a wrong API key, or none: send 'Authorization: Bearer KEY'"
            raise ApiError(
                401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    def _route(self, path):
        """Returns the route's name and {method: function}; ApiError 404 for any other path."""
        if path.startswith("/v1/models/"):
            return "/v1/models/{model}", dict.fromkeys(("GET", "HEAD"), model)
        if path in GET:
            return path, dict.fromkeys(("GET", "HEAD"), GET[path])
        if path in POST:
            return path, {"POST": POST[path]}
        raise ApiError(404, f"there is no {path[:80]} here", code="not_found")

    def metrics(self):
        """Returns what is counted, in Prometheus' text format."""
        scheduler, lines = self.api.scheduler, []

        def put(name, kind, meaning, values):
            lines.extend([f"# HELP mini_llm_{name} {meaning}", f"# TYPE mini_llm_{name} {kind}"])
            lines.extend(f"mini_llm_{name}{labels} {value}" for labels, value in values)

        with self.lock:
            requests = sorted(self.requests.items())
        labelled = [
            (f'{{route="{route}",status="{status}"}}', n) for (route, status), n in requests
        ]
        tokens = [
            ('{kind="prompt"}', scheduler.prompt_tokens),
            ('{kind="new"}', scheduler.new_tokens),
        ]
        sums = itertools.accumulate(scheduler.first_tokens)
        buckets = [(f'_bucket{{le="{le}"}}', n) for le, n in zip((*FIRST_TOKEN, "+Inf"), sums)]
        buckets += [("_sum", scheduler.first_seconds), ("_count", buckets[-1][1])]
        put("requests_total", "counter", "Requests answered, by route and HTTP status.", labelled)
        put("tokens_total", "counter", "Tokens read (prompt) and written (new).", tokens)
        put("steps_total", "counter", "Decoding steps.", [("", scheduler.steps)])
        put("queue_length", "gauge", "Rows that wait for a slot.", [("", len(scheduler.waiting))])
        put("batch_size", "gauge", "Rows being decoded.", [("", len(scheduler.seated))])
        put("connections", "gauge", "Open connections.", [("", self.active)])
        put(
            "first_token_seconds",
            "histogram",
            "From a request's arrival to its first token.",
            buckets,
        )
        return "\n".join(lines) + "\n"


class Visit:
    """What is known of a request so far: Head, route, headers that its answer needs, why it is refused."""

    def __init__(self):
        self.head, self.route, self.headers, self.reason = None, "other", {}, None


def read_json(wire, head):
    """Returns the fields of a JSON body; ApiError or Refused for anything else."""
    kind, _, charset = head.headers.get("content-type", "").lower().partition(";")
    if kind.strip() != "application/json" or charset.strip().replace('"', "") not in (
        "",
        "charset=utf-8",
    ):
        raise ApiError(415, "the body must be JSON: send 'Content-Type: application/json'")
    body = wire.read_body(head.headers)
    try:
        fields = parse_json(body.decode("utf-8"), "body")
    except (UnicodeDecodeError, UserError) as problem:
        raise ApiError(400, f"not JSON: {problem}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(
            400, 'the body must be a JSON object, {"field": value, ...}', code="invalid_json"
        )
    level = [fields]
    for _ in range(DEPTH):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    if level:
        raise ApiError(400, f"lists and objects nested more than {DEPTH} deep", code="invalid_json")
    return fields


def internal_error():
    """Writes the traceback to stderr under a number; returns an ApiError that gives only the number."""
    number = secrets.token_hex(4)
    say(f"error {number}: {traceback.format_exc()}")
    return ApiError(
        500, f"internal error {number}; the server's log tells more", code="internal_error"
    )


def is_address(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def resolve(host, port):
    """Returns (family, address) to listen on; UserError for a name that has none."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(
            f"host={host}: no such address; expected one of this machine, as 127.0.0.1"
        ) from None
    return family, address


def read_key(cfg):
    """Returns the API key, empty for none. UserError for one that no header could carry, or too short."""
    source, key = "MINI_LLM_API_KEY", os.environ.get("MINI_LLM_API_KEY")
    if cfg.api_key_file:
        source = f"api_key_file={cfg.api_key_file}"
        try:
            key = Path(cfg.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"{source}: cannot be read ({problem})") from None
    if key is not None and not re.fullmatch("[!-~]{8,200}", key):
        raise UserError(
            f"{source}: a key is 8 to 200 letters, digits and signs, no spaces; got {len(key)}"
        )
    return key or ""


def name_of(folder):
    """Returns what to call a model folder: its name, or its training's if that says more."""
    folder = model_folder(folder).resolve()
    general = folder.name == "final" or re.fullmatch(r"step_\d+", folder.name)
    return folder.parent.name if general else folder.name


def main(cfg):
    with Server(cfg, read_key(cfg)) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.stop())
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        patience = threading.Timer(2, say, [f"loading {cfg.model_path}\n"])
        patience.daemon = True
        patience.start()
        model, tokenizer = open_model(cfg.model_path, cfg.device, cfg.dtype)
        patience.cancel()
        if tokenizer.template is None:
            say(f"{tokenizer.without_template(cfg.model_path)}\n")
        scheduler = Scheduler(model, cfg.slots, cfg.queue)
        server.api = Api(
            scheduler, tokenizer, cfg.model_name or name_of(cfg.model_path), cfg.request_seconds
        )
        print(summary(server, model), flush=True)
        scheduler.run()  # in this thread, which loaded the model: with a second one OpenMP would spin less
        end = time.monotonic() + 0.5
        while server.active and time.monotonic() < end:  # last words are being sent
            time.sleep(0.01)


def summary(server, model):
    weight, size = model.lm_head.weight, sum(p.numel() for p in model.parameters())
    what = (
        f"{server.api.name}, {size / 1e6:.1f}M parameters, template {server.api.template or 'none'}"
    )
    where = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    return f"{server.url}  {what}; {where}, context {server.api.context}, {server.cfg.slots} slots"


if __name__ == "__main__":
    run(main, ServerConfig, __doc__)
    os._exit(0)  # slow clients may hold threads still, and Python takes seconds to take torch apart
