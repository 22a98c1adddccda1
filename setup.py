"""Builds the CUDA extension `kernels._cuda` from csrc; metadata and pinned versions live in pyproject.toml.

    python setup.py build_ext --inplace         in an environment that has torch; one changed .cu is built, not all

Environment:
    LIGHTNINGDIT_CUDA=0         no extension, though it could be built
    LIGHTNINGDIT_CUDA_ARCHS     compute capabilities, such as "sm_80 sm_90a"; else those of the GPUs here, else sm_90a
    MAX_JOBS                    compilers at work at a time, else one for each core

nvcc is that of a CUDA toolkit or of the extra `nvcc`. Without it, or without torch (pip's isolated builds have none),
the package is pure Python, and this says so. A source that does not compile is an error.
"""

import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--threads=2"]  # two architectures at a time
#: Wheel → a file of it, below the folder that NVIDIA's wheels share.
WHEELS_BESIDE_NVCC = {
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-cccl": "include/nv/target",
}
CXX_FLAGS = ["-O2", "-std=c++17", "-fvisibility=hidden", "-DLDIT_MODULE=_cuda"]


def wheel_folder() -> Path | None:
    """Where NVIDIA's wheels, torch's among them, put CUDA: include, lib and, with nvidia-cuda-nvcc, bin."""
    spec = find_spec("nvidia")
    folders = [Path(place) / "cu13" for place in (spec.submodule_search_locations if spec else [])]
    return next((folder for folder in folders if folder.is_dir()), None)


def find_nvcc() -> Path | None:
    """From CUDA_HOME, the PATH, the usual place, or the wheel; in this order."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    programs = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    programs += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    if wheel := wheel_folder():
        programs.append(str(wheel / "bin" / "nvcc"))
    return next((Path(found) for found in map(shutil.which, programs) if found), None)


def why_not() -> str:
    """Why there will be no extension; empty if there will."""
    if os.environ.get("LIGHTNINGDIT_CUDA") == "0":
        return "LIGHTNINGDIT_CUDA is 0"
    if find_spec("torch") is None:
        return "torch is not installed in the environment that builds"
    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc"
    absent = absent_beside_wheel(nvcc)
    return f"{nvcc} is of a wheel and lacks {', '.join(absent)} beside it (the extra `nvcc` has all)" if absent else ""


def absent_beside_wheel(nvcc: Path) -> list[str]:
    """The wheels that nvidia-cuda-nvcc needs and that are not there; nothing for the nvcc of a toolkit."""
    home = nvcc.parent.parent
    if home != wheel_folder():
        return []
    return [name for name, file in WHEELS_BESIDE_NVCC.items() if not (home / file).is_file()]


def architectures(text: str | None) -> list[str]:
    """Compute capabilities as nvcc writes them, such as "90a"; raises ValueError for what is none."""
    if text is None:
        return present_architectures() or ["90a"]
    names = re.split(r"[\s,;]+", text.strip())
    for name in names:
        if not re.fullmatch(r"(sm_)?\d{2,3}[af]?", name):
            raise ValueError(f"LIGHTNINGDIT_CUDA_ARCHS is {text!r}; allowed: a list such as 'sm_80 sm_90a'")
    return [name.removeprefix("sm_") for name in names]


def present_architectures() -> list[str]:
    """Those of the GPUs here."""
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ["90a" if each == (9, 0) else "{}{}".format(*each) for each in sorted(found)]


def extension() -> Extension:
    import torch

    generate = [
        f"-gencode=arch=compute_{name},code=sm_{name}"
        for name in architectures(os.environ.get("LIGHTNINGDIT_CUDA_ARCHS"))
    ]
    wheel = wheel_folder()
    # The runtime that torch itself loads: its wheel has it without the name that -lcudart looks for.
    runtime = wheel / "lib" / "libcudart.so.13" if wheel else None
    link = [str(runtime)] if runtime and runtime.exists() else ["-lcudart"]
    return Extension(
        "kernels._cuda",
        sources=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.cu"))] + ["csrc/binding.cpp"],
        include_dirs=[str(Path(torch.__file__).parent / "include")],  # DLPack and pybind11
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS + generate},
        extra_link_args=link,
        language="c++",
    )


def build() -> dict:
    """The arguments of `setup` for the extension, or none."""
    if reason := why_not():
        print(f"lightningdit: no CUDA extension, because {reason}; the package is pure Python", file=sys.stderr)
        return {}
    os.environ["CUDA_HOME"] = str(find_nvcc().parent.parent)  # read when torch.utils.cpp_extension is imported
    if wheel := wheel_folder():  # looked through after nvcc's own headers, for what those lack
        os.environ["CPATH"] = os.pathsep.join(filter(None, [os.environ.get("CPATH"), str(wheel / "include")]))
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [extension()], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)}}


if __name__ == "__main__":
    setup(**build())
