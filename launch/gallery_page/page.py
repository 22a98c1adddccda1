"""The page as text: what was found in directories, in the templates and scripts of `assets`."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from common.text import printable
from launch.comparison.curves import short_names
from launch.config_files import ConfigError
from launch.gallery_page import curves, media
from launch.gallery_page.configs import config_tables
from launch.gallery_page.provenance import RunOnPage, as_date, data_time, events, facts_table, ops_table, read_run
from launch.gallery_page.results import MOST_RESULTS, facts_of, result_tables
from launch.gallery_page.sources import Sources, find_sources
from launch.gallery_page.viewers import other_pictures, samples_view, training_views

#: In the first lines of every page: by it a page is known again.
MARK = '<meta name="generator" content="lightningdit gallery">'
_STYLES = ("page.css",)
_SCRIPTS = ("theme.js", "viewer.js", "charts.js")
#: Pictures of the programs that the page shows in another way.
_REDUNDANT = {"samples.png", "losses.png"}


def build(directories: Sequence[Path]) -> str:
    """The page of runs, samples and results at and below the directories; equal for equal files.

    What cannot be read is named on the page. Raises ConfigError where there is nothing to show.
    """
    sources = find_sources(directories)
    if not (sources.runs or sources.samples or sources.results):
        raise ConfigError(f"no run, samples or results at or below {', '.join(map(str, directories))}")
    names = _names(sources, directories)
    runs = {names[path]: read_run(path, sources.left_out) for path in sources.runs}
    return render(_content(directories, sources, names, runs))


def _content(directories, sources: Sources, names, runs: Mapping[str, RunOnPage]) -> dict[str, Any]:
    embedder = media.Embedder()
    samples = samples_view(sources, names, embedder)
    training = training_views({name: run.path for name, run in runs.items()}, embedder, sources.left_out)
    kept = [path for path in sources.pictures if path.name not in _REDUNDANT]
    pictures = other_pictures(kept, names, embedder, sources.left_out)
    for item in samples["tracks"][0]["items"] if samples else ():
        item["facts"] = facts_of(item["facts"])
    dates = [time for run in runs.values() if (time := data_time(run)) is not None]
    drawn = curves.curves({name: run.rows for name, run in runs.items()})
    return {
        "title": ", ".join(short_names(directories)),
        "date": as_date(max(dates, default=None)),
        "runs": runs,
        "samples": samples,
        "training": training,
        "pictures": pictures,
        "curves": drawn if drawn["charts"] else None,
        "results": result_tables({names[path]: result for path, result in sources.results.items()}),
        "results_left": max(len(sources.results) - MOST_RESULTS, 0),
        "configs": config_tables({name: (run.summary.kind, run.state.get("config")) for name, run in runs.items()}),
        "ops": ops_table(runs),
        "provenance": facts_table(runs) if runs else None,
        "events": {name: events(run) for name, run in runs.items()},
        "left_out": sorted((_below(path, directories), why) for path, why in sources.left_out.items()),
        "remarks": {"curves": curves.REMARK, "pictures": media.REMARK},
    }


def _names(sources: Sources, directories: Sequence[Path]) -> dict[Path, str]:
    """Path → what the page calls it: as it lies below the given directory, whose own name stands before it where there
    are several."""
    paths = [*sources.runs, *sources.samples, *sources.results, *sources.pictures]
    return {path: _below(path, directories) for path in paths}


def _below(path: Path, directories: Sequence[Path]) -> str:
    for directory, name in zip(directories, short_names(directories), strict=True):
        if path == directory:
            return name
        if path.is_relative_to(directory):
            inside = str(path.relative_to(directory))
            return inside if len(directories) == 1 else f"{name}/{inside}"
    return str(path)


def render(content: Mapping[str, Any]) -> str:
    """The templates with this content: all text that is no template of ours is escaped."""
    environment = Environment(
        loader=PackageLoader("launch.gallery_page", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, lines=True) if type(value) is str else value,
    )
    return environment.get_template("page.html").render(
        **content,
        mark=Markup(MARK),
        style=_asset(*_STYLES),
        script=_asset(*_SCRIPTS),
        plotly=Markup(get_plotlyjs()) if content["curves"] else "",
    )


def _asset(*names: str) -> Markup:
    folder = files("launch.gallery_page") / "assets"
    return Markup("\n".join((folder / name).read_text("utf-8") for name in names))
