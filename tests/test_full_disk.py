"""A full disk: some of the calls of every program; `python -m tests.full_disk` tries all."""

import pytest

from tests import full_disk


@pytest.mark.skipif(bool(full_disk.reasons()), reason="; ".join(full_disk.reasons()))
@pytest.mark.parametrize(("program", "every"), [("train", 25), ("extract", 9), ("sample", 17)])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, program, every):
    tries, wrong = full_disk.faults(program, tmp_path, every)
    assert len(tries) >= 3 and not wrong, wrong
