"""mypy's errors, held to a baseline that may only shrink: `python -m tests.type_errors [--shrink]`.

`tests/type_errors.json` holds file → number of errors that are borne. More of them, or any in a file without an entry,
are shown and fail; fewer fail until `--shrink` has lowered the entry, so that they cannot come back.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "tests" / "type_errors.json"


def type_errors(root: Path = ROOT) -> list[dict]:
    """What mypy says of the packages in pyproject.toml: file, line, message, code. RuntimeError if it cannot run."""
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--output", "json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 1) or done.stderr:
        raise RuntimeError(f"mypy ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    said = map(json.loads, done.stdout.splitlines())
    return [error for error in said if error["severity"] == "error"]


def differences(errors: list[dict], baseline: Mapping[str, int]) -> tuple[list[str], dict[str, int]]:
    """Lines that say which errors are not borne, and the lower counts of files that have fewer than the baseline."""
    counts = Counter(error["file"] for error in errors)
    beyond = {file: count for file, count in counts.items() if count > baseline.get(file, 0)}
    lines = [f"{e['file']}:{e['line']}: {e['message']}  [{e['code']}]" for e in errors if e["file"] in beyond]
    lines += [f"{file}: {count} errors, of which {baseline.get(file, 0)} are borne" for file, count in beyond.items()]
    return lines, {file: counts[file] for file, borne in baseline.items() if counts[file] < borne}


def shrunk(baseline: Mapping[str, int], fewer: Mapping[str, int]) -> dict[str, int]:
    lower = {**baseline, **fewer}
    return {file: count for file, count in sorted(lower.items()) if count}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.type_errors", description=__doc__.partition("\n")[0])
    parser.add_argument("--shrink", action="store_true", help="lower the baseline to what is found; never raises it")
    args = parser.parse_args(argv)
    baseline = json.loads(BASELINE.read_text())
    lines, fewer = differences(type_errors(), baseline)
    if args.shrink:
        BASELINE.write_text(json.dumps(shrunk(baseline, fewer), indent=1) + "\n")
    else:
        lines += [
            f"{file}: only {count} errors are left; lower the baseline by --shrink" for file, count in fewer.items()
        ]
    print(*lines, sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
