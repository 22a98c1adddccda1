"""The bench of saves, with a tiny network: both ways are timed by turns, and a long pause is a failure."""

import argparse

import pytest

from bench import save
from bench.save import Times


@pytest.mark.parametrize(("pauses", "status", "said"), [([0.3, 9.0, 0.4], 0, "4.0 % (at most"), ([1.1], 1, "MORE")])
def test_the_median_pause_is_compared_with_the_median_inline_save(tmp_path, monkeypatch, capsys, pauses, status, said):
    found = Times([10.0] * len(pauses), pauses, [12.0] * len(pauses))
    monkeypatch.setattr(save, "measure", lambda *_: found)
    options = argparse.Namespace(depth=1, width=64, rounds=len(pauses))
    assert save.compare(tmp_path, options) == status and said in capsys.readouterr().out


def test_both_ways_are_measured_and_nothing_is_left(tmp_path, capsys):
    assert save.main(["--rounds", "2", "--depth", "1", "--width", "64", "--directory", str(tmp_path)]) in (0, 1)
    said = capsys.readouterr().out
    assert said.count("inline") == 5 and "warm-up" in said and "0.2 M parameters" in said
    assert "pause / inline: " in said and not list(tmp_path.iterdir())


def test_a_wrong_width_is_refused(capsys):
    with pytest.raises(SystemExit):
        save.main(["--width", "100"])
    assert "--width 100 is no multiple of 64" in capsys.readouterr().err
