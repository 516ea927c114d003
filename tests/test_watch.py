"""The live page of running trainings: what it serves, and what a browser shows of it."""

import json
import shutil
import subprocess
import urllib.error
import urllib.request

import pytest

from tests import ROOT
from tests.test_log import write_run
from tests.warm import python

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def watched(tmp_path):
    """Yields (folder of two runs, the address that `train.py watch` prints)."""
    folder = tmp_path / "runs"
    write_run(folder / "a")
    write_run(folder / "<b>&", steps=400, dpo=True, seed=1)
    words = [python(), ROOT / "train.py", "watch", folder, "--port=0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        address, shows = server.stdout.readline().split(maxsplit=1)
        assert shows == f"shows {folder}\n"
        yield folder, address
        server.terminate()


def get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_it_serves_the_page_and_the_logs_as_they_are_and_nothing_else(watched):
    folder, address = watched
    assert get(address) == ("text/html", (ROOT / "web/watch.html").read_text())
    for _ in range(2):  # again, once there is more
        kind, body = get(f"{address}/runs")
        logs = {f"runs/{name}": folder / name / "metrics.jsonl" for name in ("<b>&", "a")}
        assert (kind, list(json.loads(body))) == ("application/json", list(logs))
        assert json.loads(body) == {name: path.read_text() for name, path in logs.items()}
        with open(folder / "a" / "metrics.jsonl", "a") as file:
            file.write('{"step": 201')
    for path, host in (("/runs/a", "localhost"), ("/../a", "localhost"), ("/runs", "evil.example")):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(address + path, Host=host)


def test_a_folder_or_a_port_that_cannot_be_is_one_line(watched, tmp_path):
    port = watched[1].rpartition(":")[2]
    for words in ([tmp_path / "none"], [tmp_path, f"--port={port}"], [tmp_path, "--port=99999"]):
        done = subprocess.run(
            [python(), ROOT / "train.py", "watch", *words], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith("error: ")


@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here")
def test_a_browser_draws_every_run_and_what_comes_meanwhile(watched):
    playwright = pytest.importorskip("playwright.sync_api")
    folder, address = watched
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, problems = browser.new_page(), []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if address not in r.url else None)
        page.goto(address)
        loss = page.locator("div", has_text="loss").first
        loss.wait_for()
        titles = page.locator("main h2").all_text_contents()
        assert titles[:4] == ["loss", "lr", "grad_norm", "tokens_per_second"]
        assert set(titles[4:]) == {"rewards/accuracies", "rewards/margins", "bits_per_byte"}
        lines = [line.get_attribute("points") for line in loss.locator("g >> polyline").all()]
        assert [len(points.split(",")) // 2 for points in lines] == [400, 400, 40, 200, 200, 20]
        x = [float(points.split(",")[-2]) for points in lines]
        assert x[0] == 2 * x[3] == 320  # a run half as long ends in the middle
        assert len({group.get_attribute("stroke") for group in loss.locator("g").all()}) == 2
        assert page.locator("section h2").all_text_contents() == ["runs/<b>&", "runs/a"]
        hostile = "<img src=x onerror=alert(1)> & more"
        with open(folder / "a" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 201, "val_loss": 1.5, "sample": hostile}) + "\n")
        page.get_by_text(f"sample: {hostile}").wait_for()
        assert "val_loss 1.5" in page.locator("section").text_content()
        assert problems == []
        browser.close()
