import argparse
import sys
import tempfile
from pathlib import Path

from tests.full_disk import PROGRAMS, __doc__, faults, reasons


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.full_disk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="*", choices=[*PROGRAMS, []], default=PROGRAMS, metavar="PROGRAM")
    parser.add_argument("--every", type=int, default=1, help="try every N-th call (default: all)")
    arguments = parser.parse_args()
    if reasons():
        parser.exit(2, "; ".join(reasons()) + "\n")
    failed = 0
    for program in arguments.programs:
        with tempfile.TemporaryDirectory() as directory:
            tries, wrong = faults(program, Path(directory), arguments.every)
        for each in wrong:
            print(f"{program}, call {each['call']}: {each['wrong']}\n    {each['said']}")
        print(f"{program}: {len(tries)} calls that need room, {len(wrong)} wrong")
        failed += len(wrong)
    return int(failed > 0)


sys.exit(main())
