"""Write the pages of measurements: the README's tables, and `bench/results/README.md` with its pictures; where
`bench.vf_study` has left rows, its page and picture too.

python -m bench.report            from the rows in bench/results/*.jsonl
python -m bench.report --check    write nothing; ends with 1 if one of the pages would change
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

from bench.measure.rows import ROOT
from bench.pages import alignment, comparison_tables, pictures, tables
from bench.pages.measured import Measured, load
from bench.pages.targets import missed

MARKER = re.compile(r"(<!-- bench:(\w+) -->\n)(?:.*?\n)?(<!-- /bench:\2 -->)", re.DOTALL)
NO_NOTE = "no explanation recorded"

INTRODUCTION = """# Measurements

Made by `python -m bench.report` from the rows in this folder, one file for each GPU.
Remarks on missed targets are from `notes/<target>.md`; an edit of this page is lost. The method and the format of rows
are in [bench](../README.md). Fractions are of a limit that was measured in the same run, ratios to another provider in
the same run; figures for more GPUs than were used are extrapolated.
"""


def filled(page: str, results: list[Measured]) -> str:
    """A page with a new table between each pair of `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`.

    Raises:
        ValueError: no table is called NAME, or a pair is not complete.
    """
    names = [match[2] for match in MARKER.finditer(page)]
    if len(re.findall(r"<!-- /?bench:", page)) != 2 * len(names):
        raise ValueError("a bench: marker lacks its other half")
    if unknown := set(names) - set(tables.BLOCKS):
        raise ValueError(f"no table is called {', '.join(sorted(unknown))}; known: {', '.join(tables.BLOCKS)}")
    return MARKER.sub(lambda match: match[1] + tables.BLOCKS[match[2]](results) + "\n" + match[3], page)


def page(results: list[Measured], notes: Path) -> str:
    """`bench/results/README.md`."""
    parts = [INTRODUCTION]
    if not results:
        parts.append("No GPU has been measured yet.\n")
    parts += [f"## Targets\n\n{tables.targets(results)}\n", f"## Ops\n\n{tables.ops(results)}\n"]
    parts += [part for gpu in results for part in _gpu(gpu, notes)]
    return "\n".join(parts)


def _gpu(gpu: Measured, notes: Path) -> list[str]:
    parts = [f"## {gpu.gpu}\n"]
    sections = [
        ("Committed", "baseline", tables.log),
        ("Ceilings of the run", "ceiling", tables.ceilings),
        ("Training steps", "step", comparison_tables.steps),
        ("Time of a step by kind of kernel", "step", comparison_tables.breakdown),
        ("Longest kernels of a step", "step", comparison_tables.longest),
        ("Matrix products of a step", "gemm", comparison_tables.products),
        ("Sampling", "sampling", comparison_tables.sampling),
        ("Tokenizer", "tokenizer", comparison_tables.tokenizer),
        ("Every case of every op", "op", tables.every_op),
        ("Other providers", "op", tables.every_peer),
        ("Latents loader", "data", comparison_tables.loaders),
        ("Images decoded for training", "images", comparison_tables.images),
        ("Not measured", "op", tables.lacking),
    ]
    if lost := missed(gpu):
        parts.append("### Targets missed\n")
        parts += [
            f"* **{target.metric}**, {target.text(value)} of {target.text(target.target)}: {note(notes, target.name)}\n"
            for target, value in lost.items()
        ]
    drawn = [f"![{title}]({name})\n" for name, title in pictures.names(gpu).items()]
    tabled = [f"### {title}\n\n{make(gpu)}\n" for title, kind, make in sections if gpu.of(kind)]
    return [*parts, *drawn, *tabled]


def note(notes: Path, name: str) -> str:
    path = notes / f"{name}.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else NO_NOTE


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Path → its content by the rows."""
    folder, readme = root / "bench" / "results", root / "README.md"
    results, study = load(folder), alignment.rows_in(folder)
    return {
        readme: filled(readme.read_text(encoding="utf-8"), results),
        folder / "README.md": page(results, folder / "notes"),
    } | (alignment.page_of(study) if study.exists() else {})


def stale(root: Path = ROOT) -> str:
    """Differences of the pages from their content by the rows; empty where there are none."""
    found: list[str] = []
    for path, want in pages(root).items():
        have = path.read_text(encoding="utf-8") if path.exists() else ""
        name = str(path.relative_to(root))
        found += difflib.unified_diff(have.splitlines(), want.splitlines(), name, "by the rows", lineterm="")
        if have != want and not found:
            found.append(f"{name} differs at the ends of its lines")
    return "\n".join(found)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, print differences")
    if parser.parse_args(argv).check:
        differences = stale(root)
        print(differences or "the pages agree with the rows")
        return int(bool(differences))
    for path, text in pages(root).items():
        path.write_text(text, encoding="utf-8")
        print(path)
    for gpu in load(root / "bench" / "results"):
        for path in pictures.draw(gpu, root / "bench" / "results"):
            print(path)
    if (study := alignment.rows_in(root / "bench" / "results")).exists():
        print(alignment.draw(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
