"""The table and the picture of `bench.vf_study`, from its rows: the same bytes for the same rows."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.measure.rows import Row, read
from bench.pages.markdown import table
from common.files import atomic_write, write_text

KIND = "vf_study"
#: Mark, line and grey of the seeds in a picture, in their order.
STYLES = (("o", "-", "0.0"), ("s", "--", "0.15"), ("^", ":", "0.3"), ("v", "-.", "0.45"), ("D", "-", "0.6"))
INTRODUCTION = """# Does alignment help?

Made by `python -m bench.vf_study` from the rows in `{rows}`; an edit of this page is lost. Two tokenizers
of a seed are trained, with the VF loss and without it (`loss.use_vf`), from the same initial weights, on the same
images in the same order and for the same steps; then a LightningDiT on the latents of each, and the same number of
images is sampled from the same noise.
"""
CAVEAT = """\
The stand-in for a foundation model is a classifier trained on these digits, with their labels: it knows more about
them than DINOv2 knows about ImageNet. The Fréchet distance is measured in the same network's features; that of 8 × 8
pixels, and the classifier that recognises samples, take no part in training. Images of 32 pixels and latents of four
channels are also a far easier task than 256 pixels and 32 channels: the published setting may come out differently.
"""


@dataclass(frozen=True)
class Figure:
    """One measured figure: its key in a row, its name, which way is better, and how it is written."""

    key: str
    title: str
    higher: bool
    form: str
    short: str


FIGURES = (
    Figure("psnr", "reconstructions of held-out images, PSNR in dB", True, ".2f", "PSNR (dB)"),
    Figure("ssim", "the same, SSIM", True, ".4f", "SSIM"),
    Figure("density_cv", "latents, coefficient of variation of the density", False, ".4f", "density CV"),
    Figure("gini", "latents, Gini coefficient of the density", False, ".4f", "Gini"),
    Figure("normalized_entropy", "latents, normalised entropy of the density", True, ".5f", "entropy"),
    Figure("frechet_distance", "samples, Fréchet distance", False, ".3f", "Fréchet distance"),
    Figure(
        "frechet_distance_of_pixels",
        "samples, Fréchet distance of 8 × 8 pixels",
        False,
        ".3f",
        "Fréchet distance of pixels",
    ),
    Figure("recognised", "samples recognised as their class", True, ".1%", "recognised"),
)


@dataclass(frozen=True)
class Pairs:
    """A figure's values by seed, without and with VF."""

    figure: Figure
    without: tuple[float, ...]
    aligned: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        """With less without, of each seed."""
        return tuple(a - b for a, b in zip(self.aligned, self.without, strict=True))

    @property
    def spread(self) -> float | None:
        """Standard deviation of the differences over seeds; None of a single one."""
        return stdev(self.differences) if len(self.differences) > 1 else None

    @property
    def better(self) -> int:
        """In how many seeds the value with VF is the better one."""
        return sum(d > 0 if self.figure.higher else d < 0 for d in self.differences)

    @property
    def worse(self) -> int:
        return sum(d < 0 if self.figure.higher else d > 0 for d in self.differences)


@dataclass(frozen=True)
class Study:
    """Rows of the same settings."""

    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        return self.rows[0]["study"]

    @property
    def title(self) -> str:
        images = self.rows[0]["settings"]["images"]
        return images.capitalize() if self.rows[0]["digits"] else f"`{images}`"

    @cached_property
    def arms(self) -> dict[tuple[int, bool], Row]:
        return {(row["seed"], row["use_vf"]): row for row in self.rows}

    @cached_property
    def seeds(self) -> list[int]:
        """Those that were measured both ways."""
        return sorted(seed for seed, use_vf in self.arms if use_vf and (seed, False) in self.arms)

    @cached_property
    def pairs(self) -> list[Pairs]:
        """Of every figure that all of these seeds have."""
        found = []
        for figure in FIGURES:
            values = [
                [self.arms[seed, use_vf]["figures"].get(figure.key) for seed in self.seeds] for use_vf in (False, True)
            ]
            if self.seeds and None not in values[0] + values[1]:
                found.append(Pairs(figure, *map(tuple, values)))
        return found


def studies(rows: Iterable[Row]) -> list[Study]:
    """Rows by study, those of each in the order of seeds; of rows with the same names the last one counts."""
    found: dict[str, dict[tuple, Row]] = {}
    for row in rows:
        found.setdefault(row["study"], {})[row["seed"], row["use_vf"]] = row
    return [Study(tuple(arms[name] for name in sorted(arms))) for arms in found.values()]


def load(path: Path) -> list[Study]:
    """The studies of a file of rows, of any device."""
    return studies(row for device in ("cpu", "cuda") for row in read(path, device) if row["kind"] == KIND)


def results_table(study: Study) -> str:
    """A line for each figure: mean and value of each seed, without and with VF, and their difference."""
    names = ", ".join(map(str, study.seeds))
    head = ["", "better", f"without VF (seeds {names})", "with VF", "with − without", "its spread", "better with VF"]
    lines = []
    for pair in study.pairs:
        form = pair.figure.form
        means = [
            f"{_text(fmean(values), form)} ({', '.join(_text(value, form) for value in values)})"
            for values in (pair.without, pair.aligned)
        ]
        spread = "–" if pair.spread is None else _text(pair.spread, form)
        difference = _text(fmean(pair.differences), f"+{form}")
        direction = "higher" if pair.figure.higher else "lower"
        seeds = f"{pair.better} of {len(study.seeds)} seeds"
        lines.append([pair.figure.title, direction, *means, difference, spread, seeds])
    return table(head, lines)


def _text(value: float, form: str) -> str:
    return format(value, form).replace("%", " %").replace("-", "−")


def verdict(study: Study) -> str:
    """What came out, figure by figure: better in every seed, worse in every seed, or neither."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for pair in study.pairs:
        count = len(study.seeds)
        kind = "better" if pair.better == count else "worse" if pair.worse == count else "undecided"
        groups[kind].append(pair.figure.short)
    seeds = f"all {len(study.seeds)} seeds" if len(study.seeds) > 1 else "the one seed"
    sentences = {
        "better": f"Better with VF in {seeds}",
        "worse": f"Worse with VF in {seeds}",
        "undecided": "Now better, now worse or equal",
    }
    return "\n".join(f"* {sentences[kind]}: {', '.join(names) or 'none'}." for kind, names in groups.items())


def described(study: Study) -> str:
    """What was trained, on what, and on which machine."""
    row = study.rows[0]
    settings, devices = row["settings"], sorted({_device(row) for row in study.rows})
    files = [f"{name} {_trained(run)}" for name, run in row["configs"].items()]
    versions = sorted({f"torch {r['torch']}, revision {_revision(r)}" for r in study.rows})
    return "\n".join(
        [
            f"* images: {settings['training_images']:,} to train on, {settings['heldout_images']:,} held out",
            *(f"* {text}" for text in files),
            f"* {row['samples']:,} samples; Fréchet distance to the held-out images in the features of: "
            f"{row['features']}" + _reference(study),
            f"* uniformity: {row['vectors']:,} latent vectors in a t-SNE plane, mean of {_draws(row['repeats'])}; the "
            "published figures are of 10,000 vectors, so these compare with one another only",
            f"* measured on {'; '.join(devices)}; {'; '.join(versions)}",
        ]
    )


def _trained(run: Row) -> str:
    """A run file, what was changed in it, and how long it was trained."""
    changed = any(override.startswith("train.max_steps=") for override in run["overrides"])
    remark = ": not the file's own number, at which the figures may compare otherwise" if changed else ""
    return f"`{' '.join([run['file'], *run['overrides']])}`, {run['steps']:,} steps of {run['batch']:,}{remark}"


def _device(row: Row) -> str:
    return row["gpu"] or f"a CPU ({row['cpu']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''})"


def _revision(row: Row) -> str:
    revision, dirty, _ = row["revision"].partition("-dirty")
    return f"{revision:.12}{dirty}"


def _draws(repeats: int) -> str:
    return f"{repeats} draws" if repeats > 1 else "one draw"


def _reference(study: Study) -> str:
    """The Fréchet distance of real images, where it was measured."""
    known = {row["figures"].get("frechet_distance_of_training_images") for row in study.rows} - {None}
    return f" (as many training images: {min(known):.3f})" if known else ""


def page(found: list[Study], rows: str, picture: str) -> str:
    """The page of a file of rows; picture: its name, beside the page."""
    parts = [INTRODUCTION.format(rows=rows)]
    for study in found:
        parts.append(f"## {study.title}\n")
        if not study.pairs:
            parts.append("No seed has been measured both with and without VF.\n")
            continue
        parts += [f"{described(study)}\n", f"{results_table(study)}\n", f"{verdict(study)}\n"]
        parts += [CAVEAT] if study.rows[0]["digits"] else []
    if any(study.pairs for study in found):
        parts.append(f"![every seed without and with VF, a line each]({picture})\n")
    return "\n".join(parts)


def rows_in(folder: Path) -> Path:
    """The file of rows of a folder."""
    return folder / f"{KIND}.jsonl"


def page_of(rows: Path) -> dict[Path, str]:
    """Path → content of the page beside a file of rows."""
    text, picture = rows.with_suffix(".md"), rows.with_suffix(".svg")
    return {text: page(load(rows), rows.name, picture.name)}


def draw(rows: Path) -> Path | None:
    """Write the picture beside a file of rows, if a seed was measured both ways → its path.

    Small panels, one for each figure of a study: a line for each seed from its value without VF to that with it. Seeds
    differ by mark and line, so that the picture can be read in grey.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    if not (found := [study for study in load(rows) if study.pairs]):
        return None
    columns = -(-max(len(study.pairs) for study in found) // 2)
    styles = dict(zip(sorted({seed for study in found for seed in study.seeds}), cycle(STYLES), strict=False))
    with matplotlib.rc_context({"svg.hashsalt": KIND, "svg.fonttype": "none", "font.size": 8}):
        canvas = Canvas(figsize=(2.3 * columns, 4.4 * len(found)), layout="constrained")
        grid = canvas.subplots(2 * len(found), columns, squeeze=False)
        legend: dict[str, Any] = {}
        for axes in grid.flat:
            axes.set_axis_off()
        for number, study in enumerate(found):
            for axes, pair in zip(grid[2 * number : 2 * number + 2].flat, study.pairs, strict=False):
                axes.set_axis_on()
                legend |= _panel(axes, pair, {seed: styles[seed] for seed in study.seeds})
            grid[2 * number, 0].set_ylabel(study.rows[0]["settings"]["images"])
        canvas.legend([*legend.values()], [*legend], loc="outside lower center", ncols=9)
        with atomic_write(rows.with_suffix(".svg")) as file:
            canvas.savefig(file, format="svg", metadata={"Date": None})
    return rows.with_suffix(".svg")


def _panel(axes, pair: Pairs, styles: dict[int, tuple[str, str, str]]) -> dict[str, Any]:
    """Draw one figure; styles: mark, line and grey of each seed → what is drawn, by its name in the legend."""
    scale = 100 if pair.figure.form.endswith("%") else 1
    drawn = {}
    for seed, without, aligned in zip(styles, pair.without, pair.aligned, strict=True):
        mark, line, grey = styles[seed]
        values = [scale * without, scale * aligned]
        (drawn[f"seed {seed}"],) = axes.plot([0, 1], values, marker=mark, ls=line, color=grey, lw=1, ms=5)
    means = [scale * fmean(pair.without), scale * fmean(pair.aligned)]
    (drawn["mean"],) = axes.plot([0, 1], means, ls="none", marker="_", ms=22, mew=2.5, color="black")
    axes.set_xticks([0, 1], ["without", "with VF"])
    axes.set_xlim(-0.4, 1.4)
    unit = ", %" if scale == 100 else ""
    axes.set_title(f"{pair.figure.short}{unit} ({'higher' if pair.figure.higher else 'lower'} is better)", fontsize=7)
    return drawn


def write(rows: Path) -> list[Path]:
    """Write the page and the picture of a file of rows beside it; their paths."""
    pages = page_of(rows)
    for path, text in pages.items():
        write_text(path, text)
    return [*pages, *filter(None, [draw(rows)])]
