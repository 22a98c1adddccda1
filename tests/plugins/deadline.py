"""A pytest plugin for a limited time on a GPU: the most representative tests first, and none that begins when it is up.

    pytest -p tests.plugins.deadline --minutes 4 -m gpu …

Tests left out are skips with the reason "the time is up", not failures.
"""

import time

import pytest

from tests.plugins.op_parameters import op_parameters


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=float("inf"), help="start no test later than this")


def pytest_configure(config: pytest.Config) -> None:
    end = getattr(config, "workerinput", {}).get("end")  # in a process of pytest-xdist
    config.stash[END] = time.monotonic() + 60 * config.getoption("--minutes") if end is None else end


END = pytest.StashKey[float]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Give all processes of pytest-xdist the same end, also those that begin late in the place of one that died."""
    node.workerinput["end"] = node.config.stash[END]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not representative(item))


def representative(item: pytest.Item) -> bool:
    """Whether it has the parameters that `bench.ops --quick` measures: an op's representative case, in bfloat16."""
    from bench.ops import DTYPES, OpJob  # after the conftest, which sets how Triton is imported

    about = op_parameters(item)
    return about is not None and about.dtype in DTYPES and OpJob(*about).rank == 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() >= item.config.stash[END]:
        pytest.skip("the time is up")
