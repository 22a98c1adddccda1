"""The form of a model card: README.md with front matter as the hub reads it, use, figures, training, provenance."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.files import FileError, read_json
from common.text import printable
from launch.config import ConfigError
from launch.training.checkpoint import Checkpoint

CARD = "README.md"  # of a folder, or a repository
NOT_STATED = "not stated"
_SEARCHED = 2**20  # bytes of a JSON file that a search beside a run reads: results are smaller
#: Folders before a name, of an absolute path in text; no address on the net, whose / follow a colon or a word.
_FOLDERS = re.compile(r"(?<![\w.:/-])~?/(?:[^\s/'\"]+/)+")
_PRIVATE = {
    "output_dir",
    "exp_name",
    "ckpt",
    "weight_init",
    "wandb",
    "perceptual_weights",
}  # paths and names of whoever trained


@dataclass(frozen=True)
class Result:
    """What `evaluate` wrote: figures by name, and the facts beside them."""

    path: Path
    facts: Mapping[str, Any]

    def hash_of(self, model: str) -> str | None:
        hashes = self.facts.get("hashes")
        found = hashes.get(model) if isinstance(hashes, Mapping) else None
        return found if isinstance(found, str) else None

    def foreign(self, hashes: Mapping[str, str]) -> str | None:
        """What says that these are no figures of networks with these hashes; None where nothing does.

        hashes: network ("model", "tokenizer") → `vavae.weights.fingerprint`; without "model" reconstructions are
        wanted, or latents, with it samples.
        """
        of_samples = _is_count(self.facts.get("samples")) or self.hash_of("model") is not None
        if of_samples != ("model" in hashes):
            made, wanted = ("samples", "a tokenizer alone") if of_samples else ("a tokenizer alone", "samples")
            return f"are figures of {made}, not of {wanted}"
        for network, sha256 in hashes.items():
            if (stated := self.hash_of(network)) not in (None, sha256):
                other = f"other weights (SHA-256 of the {network}'s {stated})"
                return f"are figures of {other} than those to export ({sha256})"
        return None

    def rows(self) -> list[list[str]]:
        """A row of text for each figure."""
        facts = self.facts
        count = facts.get("samples", facts.get("images"))
        said = [self._said(key) for key in ("solver", "guidance", "dtype", "features")]
        counted = f"{count:,}" if isinstance(count, int) else NOT_STATED
        return [[name, f"{value:.6g}", counted, *said, self._reference()] for name, value in facts["metrics"].items()]

    def _said(self, key: str) -> str:
        value = self.facts.get(key, NOT_STATED)
        return _without_folders(value if isinstance(value, str) else json.dumps(value))

    def notes(self) -> list[str]:
        notes = self.facts.get("notes")
        return [_without_folders(str(note)) for note in notes] if isinstance(notes, list) else []

    def _reference(self) -> str:
        known = self.facts.get("reference")
        if not isinstance(known, Mapping):
            return NOT_STATED
        return f"{Path(str(known.get('path'))).name}, SHA-256 {str(known.get('sha256', NOT_STATED))[:12]}"


def read_results(paths: Iterable[Path], hashes: Mapping[str, str]) -> list[Result]:
    """Results that `evaluate` wrote; raises ConfigError for other files and for figures of others: `Result.foreign`."""
    found = []
    for path in paths:
        content = read_json(path)
        if not _is_result(content):
            raise ConfigError(
                f"--results {path} is no result of evaluate: it lacks metrics, or the number of samples or images"
            )
        result = Result(path, content)
        if (why := result.foreign(hashes)) is not None:
            raise ConfigError(f"--results {path} {why}")
        found.append(result)
    return found


def results_beside(source: Checkpoint | Path, hashes: Mapping[str, str]) -> list[Result]:
    """The results in a run's directory, or beside a weights file, that state that they are of these weights.

    hashes: the network that a result has to name, then others that it may.
    """
    named = next(iter(hashes))
    folder = source.path.parent.parent if isinstance(source, Checkpoint) else source.parent
    found = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            content = read_json(path) if path.stat().st_size < _SEARCHED else None
        except (FileError, OSError):
            continue  # others' files
        if content is None or not _is_result(content):
            continue
        result = Result(path, content)
        if result.hash_of(named) == hashes[named] and result.foreign(hashes) is None:
            found.append(result)
    return found


def figures_of(results: Sequence[Path], beside: Checkpoint | Path | None, hashes: Mapping[str, str]) -> list[Result]:
    """The results that are named, else those that lie beside the weights; see `read_results`."""
    if results or beside is None:
        return read_results(results, hashes)
    return results_beside(beside, hashes)


def _is_result(content: Any) -> bool:
    """Figures, and of how many samples or images they are."""
    if not isinstance(content, Mapping) or not isinstance(metrics := content.get("metrics"), Mapping):
        return False
    counted = any(_is_count(content.get(key)) for key in ("samples", "images"))
    return counted and all(type(value) in (int, float) for value in metrics.values())


def _without_folders(text: str) -> str:
    """Paths in a text by their last name: a card goes to others, and tells no folder of this machine."""
    return _FOLDERS.sub("", text)


def _is_count(value: Any) -> bool:
    return type(value) is int


@dataclass(frozen=True)
class Card:
    """What a model card says. use: Markdown. training, provenance: what → value."""

    title: str
    library: str
    intro: str
    use: str
    results: Sequence[Result] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    pipeline_tag: str | None = None
    tags: Sequence[str] = ()

    def __str__(self) -> str:
        parts = [self._front_matter(), f"# {self.title}", self.intro, "## Use", self.use, "## Figures", self._figures()]
        for title, facts in (("Training", self.training), ("Provenance", self.provenance)):
            if facts:
                rows = [[what, value if isinstance(value, str) else json.dumps(value)] for what, value in facts.items()]
                parts += [f"## {title}", _table(["", ""], rows)]
        return "\n\n".join(parts) + "\n"

    def _front_matter(self) -> str:
        entries: dict[str, Any] = {"library_name": self.library, "pipeline_tag": self.pipeline_tag}
        entries |= {"license": self.license, "tags": list(self.tags)}
        kept = {key: value for key, value in entries.items() if value}
        return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---"

    def _figures(self) -> str:
        if not self.results:
            return "None have been measured for this card."
        head = ["figure", "value", "N", "solver", "guidance", "dtype", "features", "reference"]
        text = _table(head, [row for result in self.results for row in result.rows()])
        notes = [note for result in self.results for note in result.notes()]
        return "\n".join([text, *("", *(f"* {_cell(note)}" for note in dict.fromkeys(notes)))]).rstrip()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text of files as a cell of Markdown: one line, nothing of it markup."""
    return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", printable(text))


def checked_license(text: str) -> str:
    """Raises ConfigError for what is no identifier of a licence on the hub, such as apache-2.0."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise ConfigError(f"--license {text!r}: an identifier in lower case is wanted, such as apache-2.0 or mit")
    return text


def training_facts(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """How weights were trained, by a checkpoint's description, without paths of whoever trained them."""
    if state is None:
        return {}
    step, batch = state["step"], state["global_batch_size"]
    facts: dict[str, Any] = {
        "steps": f"{step:,}",
        "images seen": f"{step * batch:,} ({batch:,} a step, of {state['num_samples']:,})",
        "seed": state["seed"],
    }
    for section in ("model", "transport", "optimizer", "loss", "train"):
        content = {key: value for key, value in (state["config"].get(section) or {}).items() if key not in _PRIVATE}
        if content:
            said = (f"{key} {json.dumps(value)}" for key, value in content.items() if value is not None)
            facts[section] = ", ".join(said)
    return facts
