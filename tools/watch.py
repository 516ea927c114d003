"""A live page of running trainings, from their metrics.jsonl: curves and the latest texts."""

import json
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lib.config import NonNegativeInt, refusing


@dataclass(frozen=True)
class WatchConfig:
    """What to show, and where."""

    folder: str  # the output folder of a run, or one with several runs in it
    port: NonNegativeInt = 8010  # of 127.0.0.1; 0 = a free one


class Watcher(BaseHTTPRequestHandler):
    """Answers `/` with the page and `/runs` with {name: text of metrics.jsonl}."""

    log_message = lambda *words: None  # no line for each request

    def do_GET(self):
        folder, host = self.server.folder, self.headers.get("Host", "").partition(":")[0]
        if host not in ("127.0.0.1", "localhost") or self.path not in ("/", "/runs"):
            return self.send_error(404)  # also to a web page elsewhere whose name leads here
        if self.path == "/":
            page = Path(__file__).parents[1] / "web/watch.html"
            kind, body = "text/html", page.read_text(encoding="utf-8")
        else:
            texts = {  # a line, and a character in it, may still be written
                str(path.parent.relative_to(folder.parent)): path.read_text("utf-8", "replace")
                for path in sorted(folder.rglob("metrics.jsonl"))
            }
            kind, body = "application/json", json.dumps(texts)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())


def watch(cfg):
    """Show running trainings in the browser: python train.py watch FOLDER"""
    with refusing((OSError, OverflowError), f"{cfg.folder}, port {cfg.port}", "choose others"):
        server = ThreadingHTTPServer(("127.0.0.1", cfg.port), Watcher)
        server.folder = Path(cfg.folder).resolve(strict=True)
    print(f"http://127.0.0.1:{server.server_port} shows {cfg.folder}", flush=True)
    server.serve_forever()
