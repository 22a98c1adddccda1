"""A pytest plugin for a limited time on a GPU: the most representative tests first, and none that begins when it is up.

    pytest -p tests.plugins.deadline --minutes 4 -m gpu …

Tests left out are skips with the reason "the time is up", not failures: they say nothing.
"""

import time

import pytest

from tests.plugins.items import subject


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=float("inf"), help="start no test later than this")


def pytest_configure(config: pytest.Config) -> None:
    told = getattr(config, "workerinput", {}).get("end")  # in a process of pytest-xdist
    config.stash[END] = time.monotonic() + 60 * config.getoption("--minutes") if told is None else told


END = pytest.StashKey[float]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """All processes of pytest-xdist have the same end, those too that begin late, in the place of one that died."""
    node.workerinput["end"] = node.config.stash[END]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not representative(item))


def representative(item: pytest.Item) -> bool:
    """Whether it is about what `bench.ops --quick` measures: the representative case of an op, in bfloat16."""
    from bench.ops import DTYPES, OpJob  # not before the conftest of the tests, which says how Triton is to be imported

    about = subject(item)
    return about is not None and about.dtype in DTYPES and OpJob(*about).rank == 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() >= item.config.stash[END]:
        pytest.skip("the time is up")
