"""`python -m launch <program> …`, and the same under a launcher: `deepspeed --module launch <program> …`."""

import importlib
import logging
import os
import sys

from launch import packages

PROGRAMS = {
    "train": "train a tokenizer or a LightningDiT: train vavae|lightningdit CONFIG [key=value …] [--dry-run]",
    "extract": "encode an image folder into latents: extract CONFIG [key=value …]",
    "sample": "generate images: sample CONFIG [key=value …]",
    "evaluate": "measure samples or reconstructions",
    "export": "write weights as safetensors + JSON and as a published .pt",
    "quickstart": "every stage on handwritten digits, in minutes",
    "doctor": "what this machine has, and which backend each op would use",
}


def main(argv: list[str]) -> int:
    """Run one program; returns the exit status. A user's mistake is one line, not a traceback."""
    argv = [a for a in argv if not a.startswith("--local_rank")]  # launchers add it; LOCAL_RANK says the same
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m launch PROGRAM …\n")
        print("\n".join(f"  {name:<11}{text}" for name, text in PROGRAMS.items()))
        return 0 if argv else 2
    if argv[0] not in PROGRAMS:
        print(f"error: unknown program {argv[0]!r}; programs: {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    if argv[0] != "doctor" and (foreign := packages.strangers()):  # the doctor says more
        print(f"error: {next(iter(foreign.values()))}", file=sys.stderr)
        return 2
    _speak()
    try:
        return importlib.import_module(f"launch.{argv[0]}").main(argv[1:])
    except (ValueError, OSError, RuntimeError) as e:
        if os.environ.get("LIGHTNINGDIT_TRACEBACK") or not _is_for_the_user(e):
            raise
        print(f"error: {_message(e)}\n(LIGHTNINGDIT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2


def _speak() -> None:
    """Let the main process's packages say what they chose and left out; the others only warn."""
    logging.basicConfig(format="%(message)s")
    level = logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING
    for package in ("kernels", "lightningdit", "vavae", "launch"):
        logging.getLogger(package).setLevel(level)


def _message(error: Exception) -> str:
    from pydantic import ValidationError

    from common.sections import describe

    return describe(error) if isinstance(error, ValidationError) else str(error)


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message says it all; other RuntimeErrors are faults, and their traceback is wanted."""
    from kernels import BackendUnavailable
    from launch.optimizer import NonFinite

    return not isinstance(error, RuntimeError) or isinstance(error, BackendUnavailable | NonFinite)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if "launch.engine" in sys.modules:
        sys.modules["launch.engine"].stop_processes()
    sys.exit(status)
