"""What there is to call: the flags of every script, the targets and variables of the Makefile."""

import io
import re
import runpy
import sys
from contextlib import redirect_stdout
from functools import cache

from tests import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
TARGETS = re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, flags=re.M)
VARIABLES = re.search(r"^VARIABLES := (.*)$", MAKEFILE, flags=re.M)[1].split()


@cache
def help_of(script, word):
    """What `python SCRIPT [WORD] --help` prints, None if it fails; in this process."""
    argv, text = sys.argv, io.StringIO()
    sys.argv = [str(ROOT / script), *filter(None, [word]), "--help"]
    try:
        with redirect_stdout(text):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return None if end.code else text.getvalue()
    finally:
        sys.argv = argv
    return text.getvalue()


def flags_of(script, word):
    """The flags of a script, or of one of its subcommands; None for a word that is none."""
    text = help_of(script, word)
    if text is None or (word and text == help_of(script, None)):
        return None
    return set(re.findall(r"^--(\w+)", text, flags=re.M))


def with_file(words):
    """The words of a command, `-m tools.export` written as the file that it is, tools/export.py."""
    at = words.index("-m") if "-m" in words else None
    if at is None or not words[at + 1].startswith("tools."):
        return words
    return [*words[:at], words[at + 1].replace(".", "/") + ".py", *words[at + 2 :]]
