"""Text of files, as it reaches a terminal: nothing in it is obeyed, and it can always be written."""

import logging
import unicodedata

import pytest

from common.text import printable, shortened
from launch import evaluate
from launch.__main__ import main

SHOWN = {
    "\x1b[2J": r"\x1b[2J",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x9b2J": r"\x9b2J",
    "a\rb": r"a\rb",
    "\x08\x7f\0": r"\x08\x7f\x00",
    "a\u2028b\u2029": r"a\u2028b\u2029",
    "\udcff": r"\udcff",
    "a\nb\t": r"a\nb\t",
    "été 猫 🐈 no\u00a0break \\x1b": "été 猫 🐈 no\u00a0break \\x1b",
    "": "",
}


@pytest.mark.parametrize("text", SHOWN)
def test_what_a_terminal_would_obey_is_shown_as_escapes(text):
    assert printable(text) == SHOWN[text]
    assert printable(text, lines=True) == SHOWN[text].replace(r"\n", "\n")


def test_every_control_character_is_shown_as_an_escape():
    controls = [chr(i) for i in range(0x11000) if unicodedata.category(chr(i)) in ("Cc", "Cs", "Zl", "Zp")]
    assert len(controls) > 2000
    for character in controls:
        shown = printable(character)
        assert shown.isascii() and shown.isprintable() and eval(f"'{shown}'") == character


def test_names_are_shortened_and_printable():
    assert shortened(["a", "\x1b"], 2) == r"a, \x1b"
    assert shortened(("a", "b", "c"), 2) == "a, b, …" and shortened([], 2) == ""


HOSTILE = "a\x1b]0;b\x07\x9bc\udcff"
HARMLESS = r"a\x1b]0;b\x07\x9bc\udcff"


def test_errors_logs_and_results_reach_a_terminal_as_escapes(monkeypatch, capsys):
    handlers = []

    def says(argv):
        handlers[0].emit(logging.makeLogRecord({"msg": f"{HOSTILE}\nmore"}))
        raise ValueError(f"{HOSTILE} is wrong\nin two lines")

    monkeypatch.setattr(evaluate, "main", says)
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: handlers.extend(settings["handlers"]))
    assert main(["evaluate"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{HARMLESS}\nmore\nerror: {HARMLESS} is wrong\nin two lines\n")
    result = {"metrics": {"fid": 1.0}, "skipped": {"is": HOSTILE}, "notes": [HOSTILE], "tokenizer": HOSTILE}
    text = evaluate.as_text(result)
    assert text.count(HARMLESS) == 3 and text.replace("\n", "").isprintable()
