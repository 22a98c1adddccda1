"""The cost of starting a program: packages that an import brings."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Packages that take a second or hundreds of modules to import, to be brought by what computes with them alone.
HEAVY = (
    "torch",
    "torch._dynamo",
    "torchvision",
    "triton",
    "deepspeed",
    "timm",
    "lpips",
    "torchdiffeq",
    "sklearn",
    "scipy",
    "matplotlib",
    "PIL",
    "tensorboard",
    "torch_fidelity",
    "nvidia.dali",
)

#: Statement → what of HEAVY it may bring.
COSTS = {
    "import kernels": {"torch"},
    "import lightningdit.model": {"torch"},
    "import vavae.model": {"torch"},
    "import launch.train": {"torch"},
    "import launch.training.engine": {"torch", "deepspeed"},
    "import sys; from launch.__main__ import main; main(['--help'])": set(),
}

LISTED = "import sys; print(*sys.modules, sep='\\n')"


def modules_after(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"{statement}\n{LISTED}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", COSTS)
def test_what_an_import_brings(statement):
    loaded = modules_after(statement)
    assert {name for name in HEAVY if name in loaded} <= COSTS[statement]
    assert not [name for name in loaded if name.startswith("kernels.") and name.endswith((".cases", ".expectations"))]


def test_what_is_brought_is_seen():
    loaded = modules_after("import PIL, launch")
    assert {"PIL", "launch"} <= loaded and "torch" not in loaded
