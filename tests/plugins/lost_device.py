"""A pytest plugin for kernels that break the device for their process: later tests do not fail for it.

After an illegal access CUDA refuses every further call of a process. Under pytest-xdist that process ends here, and
another one takes the tests that are left; without, the run stops and names the test.
"""

import os
import sys

import pytest


def lost() -> str:
    """Why the device takes no more work from this process; empty if it does, or was never asked."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return ""


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    if why := lost():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # the test's report has been sent
        pytest.exit(f"{nodeid} lost the device: {why}", 1)
