"""What a sweep comes to: its settings ranked, as a table, as JSON, and the best one as a run file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import path_exists
from launch.config_files import SHIPPED, find_config
from launch.evaluation.figures import Figure
from launch.extends import KEY
from launch.sweeping.axes import Axis, Setting, shown
from launch.sweeping.finished import Finished
from launch.text_tables import markdown

_HASH = 12  # characters shown of a hash


@dataclass(frozen=True)
class Ranked:
    """A setting and what came of it. value: of the figure that ranks; None where it failed."""

    setting: Setting
    finished: Finished
    value: float | None


def rank(settings: Sequence[Setting], finished: Sequence[Finished], figure: Figure) -> list[Ranked]:
    """Best first; equals in the order of the product, failed settings last."""
    rows = [Ranked(s, f, f.figures.get(figure.name)) for s, f in zip(settings, finished, strict=True)]
    sign = 1 if figure.lower_is_better else -1
    return sorted(rows, key=lambda row: (row.value is None, sign * (row.value or 0.0)))


def table(ranked: Sequence[Ranked], axes: Sequence[Axis], figures: Sequence[Figure], facts: Mapping[str, Any]) -> str:
    """A page of Markdown: the settings, best first, with N, and the hashes beside and below."""
    first = figures[0]
    head = ["rank", *(axis.key for axis in axes), *(figure.name for figure in figures)]
    head += ["N", "calls", "guided", "images"]
    rows = [_row(number, row, axes, figures) for number, row in enumerate(ranked, start=1)]
    lines = [f"# {len(ranked)} settings by {first.name} ({first.direction})\n", markdown(head, rows, left=0), ""]
    lines += [f"* {row.setting.name}: no samples: {row.finished.failed}" for row in ranked if row.finished.failed]
    lines += [f"* {figure.name}: {figure.meaning}, {figure.direction}" for figure in figures]
    lines += ["* calls, guided: of the network for a sample, and those of them that ran its unguided half too"]
    lines += [f"* {name}: {value}" for name, value in _hashes(facts).items()]
    lines += [f"* {note}" for note in facts["notes"]]
    return "\n".join(lines) + "\n"


def _row(number: int, row: Ranked, axes: Sequence[Axis], figures: Sequence[Figure]) -> list[str]:
    done = row.finished
    values = [done.figures.get(figure.name) for figure in figures]
    return [
        str(number) if row.value is not None else "–",
        *(shown(row.setting.values[axis.key]) for axis in axes),
        *("–" if value is None else f"{value:.6g}" for value in values),
        f"{done.num_samples:,}",
        f"{done.nfe:g}",
        f"{done.guided_nfe:g}",
        done.images_sha256[:_HASH] or "–",
    ]


def _hashes(facts: Mapping[str, Any]) -> dict[str, str]:
    """What the samples and figures are of, each with its SHA-256."""
    found = {f"weights of the {name}": value for name, value in facts["hashes"].items()}
    for kind, features in facts["features"].items():
        found[f"{kind} features"] = ", ".join(map(str, features.values()))
    if "reference" in facts:
        found["reference"] = f"{facts['reference']['path']}, {facts['reference']['files_sha256']}"
    return found


def results(
    ranked: Sequence[Ranked], axes: Sequence[Axis], figures: Sequence[Figure], facts: Mapping[str, Any]
) -> dict:
    """The sweep as JSON: `metrics` and `settings` are the best setting's, as in a result of evaluate."""
    best, features = ranked[0], facts["features"]
    told = ("sample", "figures", "num_samples", "features")
    return {
        "metrics": best.finished.figures,
        "samples": facts["num_samples"],
        "samples_sha256": best.finished.images_sha256,
        "best": best.setting.values,
        "ranked_by": {"figure": figures[0].name, "lower_is_better": figures[0].lower_is_better},
        "axes": {f"sample.{axis.key}": list(axis.values) for axis in axes},
        "sweep": [_entry(row) for row in ranked],
        "settings": best.setting.sample.model_dump(mode="json"),
        "versions": best.finished.versions,
        "features": ", ".join(each["name"] for each in features.values()),
        "features_sha256": {kind: each.get("sha256", each.get("version")) for kind, each in features.items()},
        **{key: value for key, value in facts.items() if key not in told},
    }


def _entry(row: Ranked) -> dict:
    done = row.finished
    outcome = {"failed": done.failed} if done.failed else {"metrics": done.figures, "nfe": done.nfe}
    more = {} if done.failed else {"guided_nfe": done.guided_nfe, "samples_sha256": done.images_sha256}
    return {"values": row.setting.values, "key": row.setting.key, **outcome, **more}


def remarks(best: Ranked, figure: Figure, facts: Mapping[str, Any], count: int) -> list[str]:
    """What the best setting's run file says of itself in its comments."""
    hashes = ", ".join(f"{name} {value}" for name, value in facts["hashes"].items())
    return [
        f"The best of {count} settings by {figure.name} ({figure.direction}): {best.value:.6g} of "
        f"{facts['num_samples']:,} samples, {best.setting.name}.",
        f"Weights by SHA-256: {hashes}.",
    ]


def run_file(document: Mapping[str, Any], remarks: Sequence[str], *, extends: Path | None = None) -> str:
    """A run file that says `document`, beyond what it extends; its values as JSON, which reads the same everywhere."""
    comments = [f"# {remark}" for remark in remarks]
    if extends is not None:
        comments.append(f"{KEY}: {_json(str(extends) if _is_shipped(extends) else os.path.abspath(extends))}")
    return "\n".join([*comments, *_lines(document, ""), ""])


def _is_shipped(config: Path) -> bool:
    """Whether a mere name means a file of `launch/configs/`, as it then does beside any other file, too."""
    return find_config(config).parent == SHIPPED and not path_exists(config)


def _lines(document: Mapping[str, Any], indent: str) -> list[str]:
    found = []
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            found += [f"{indent}{key}:", *_lines(value, f"{indent}  ")]
        else:
            found.append(f"{indent}{key}: {_json(value)}")
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
