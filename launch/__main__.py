"""`python -m launch <program> …`, and the same under a launcher: `deepspeed --module launch <program> …`."""

import importlib
import os
import sys

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
    try:
        return importlib.import_module(f"launch.{argv[0]}").main(argv[1:])
    except (ValueError, FileNotFoundError) as e:
        if os.environ.get("LIGHTNINGDIT_TRACEBACK"):
            raise
        print(f"error: {e}\n(LIGHTNINGDIT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
