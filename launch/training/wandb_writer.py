"""A run's log in Weights & Biases: rows, events and pictures, offline where WANDB_MODE says so or no server answers.

What wandb cannot send it keeps below the run's directory, for `wandb sync`. Nothing that goes wrong with it ends
training: it is said once, and training goes on without.
"""

import importlib.util
import io
import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import open_regular, path_exists, write_text
from launch.config_files import ConfigError
from launch.training.writers import Row, numbers

logger = logging.getLogger(__name__)
RUN_ID = "wandb_run_id"  # the file of the run's directory that holds it
START_SECONDS, END_SECONDS = 30, 60  # that a server may take: to answer at the start, for what is left at the end


def require_wandb(project: str | None) -> None:
    """Raise ConfigError where `train.wandb` names a project and the package is not installed."""
    found = project and importlib.util.find_spec("wandb")
    # A folder `wandb`, such as it leaves where it ran, can be imported too, and holds nothing.
    if project and (not found or found.origin is None):
        raise ConfigError(
            f"train.wandb is {project!r}, but the package wandb is not installed: "
            "pip install 'lightningdit[wandb]', or set train.wandb to null"
        )


class WandbWriter:
    """The log of one run in a project, which later starts of the run go on with.

    Args:
        directory: of the run; wandb's files are made in it.
        name: the run's, for people.
        config: the run file.
    """

    def __init__(self, directory: Path, project: str, name: str, config: Mapping[str, Any]):
        self._run: Any = None
        try:
            self._start(directory, {"project": project, "name": name, "config": dict(config)})
        except Exception as e:  # also of a package that is half there, or refuses these settings
            _warn_of_start(e, "this start of the run has no log there")
        self._broken = self._run is None
        # Steps that are made again after a resume come again: wandb's own count of calls only grows.
        self._try(lambda: self._run.define_metric("*", step_metric="step"))

    def _start(self, directory: Path, asked: dict[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        settings = {"console": "off", "silent": True, "init_timeout": START_SECONDS, "finish_timeout": END_SECONDS}
        asked |= {"id": _run_id(directory), "dir": str(directory), "resume": "allow"}
        asked["settings"] = wandb.Settings(**settings)
        try:
            with _without_terminal():
                self._run = wandb.init(**asked)
        except Exception as e:
            _warn_of_start(e, f"its log is kept in {directory / 'wandb'}, and `wandb sync` sends it")
            wandb.teardown()  # its service holds the id for the start that has failed
            self._run = wandb.init(**asked, mode="offline")

    def write_row(self, row: Row) -> None:
        self._log(numbers(row) | {"step": row["step"]})

    def write_event(self, event: Row) -> None:
        self._log(dict(event))

    def write_picture(self, name: str, step: int, path: Path) -> None:
        self._try(lambda: self._run.log({"step": step, name: self._image(str(path))}))

    def close(self) -> None:
        self._try(lambda: self._run.finish())

    def _log(self, values: dict[str, Any]) -> None:
        self._try(lambda: self._run.log(values))

    def _try(self, call: Callable[[], Any]) -> None:
        """Whatever wandb raises, such as for a service of its own that was killed, is said once."""
        if self._broken:
            return
        try:
            call()
        except Exception as e:
            self._broken = True
            logger.warning("wandb failed (%s: %s): the rest of this run is not in its log", type(e).__name__, e)


def _warn_of_start(e: Exception, instead: str) -> None:
    logger.warning("wandb does not start (%s): %s", str(e).partition("\n")[0], instead)


@contextmanager
def _without_terminal() -> Iterator[None]:
    """Where it finds one and no key, wandb asks for that, and training would wait for an answer."""
    found, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = found


def _run_id(directory: Path) -> str:
    """The id of the run, from its first start on."""
    path = directory / RUN_ID
    if not path_exists(path):
        write_text(path, secrets.token_hex(8) + "\n")
    with open_regular(path) as file:
        return file.read().decode().strip()
