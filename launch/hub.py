"""Weights from and to the Hugging Face hub, by the package huggingface_hub (the extra `hub`).

A reference is `hf://OWNER/NAME[@REVISION][/FILE]`, and stands where a path of weights does: `ckpt_path`,
`vae.ckpt_path`, the SOURCE of `export`. Without that prefix nothing is ever looked for on the
net. Of a repository JSON and safetensors are taken, no code and no pickled file; what was downloaded before is taken
from the package's cache, and nothing else where HF_HUB_OFFLINE=1.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from common.files import DownloadError, path_exists
from common.tensors import weights_file
from launch.config_files import ConfigError
from launch.pipelines import TOKENIZER, is_pipeline

log = logging.getLogger(__name__)

FORM = "hf://OWNER/NAME[@REVISION][/FILE]"
TAKEN = ("*.json", "*.safetensors")
_BEGIN = re.compile(r"hf:/+")  # a Path has one of the two slashes
_REPOSITORY = r"[\w.-]+/[\w.-]+"
_REFERENCE = re.compile(rf"hf:/+(?P<repository>{_REPOSITORY})(@(?P<revision>[^/@]+))?(/(?P<file>.+))?")
_INSTALL = "pip install 'lightningdit[hub]'"


@dataclass(frozen=True)
class Reference:
    """A repository of the hub at a revision (None: its main branch), or one file of it."""

    repository: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"hf://{self.repository}{at}" + ("" if self.file is None else f"/{self.file}")

    @classmethod
    def read(cls, text: str) -> "Reference":
        """Raises ConfigError for what is not of the form."""
        found = _REFERENCE.fullmatch(text)
        if found is None or ".." in text.split("/"):
            raise ConfigError(f"{text!r} is no reference to the hub: {FORM} is wanted")
        return cls(**found.groupdict())


def is_reference(path: str | Path) -> bool:
    return _BEGIN.match(str(path)) is not None


def local_copy(path: str | Path) -> Path:
    """The path itself, or where the files of a reference are on this machine, downloaded if need be.

    Raises:
        ConfigError: no such repository, revision or file, no access, or the package is not installed.
        DownloadError: the hub cannot be reached, and the cache has not what is wanted.
    """
    if is_reference(path):
        return download(Reference.read(str(path)))
    path = Path(path)
    looks_like_one = re.fullmatch(_REPOSITORY, str(path)) and not path_exists(path.parent)
    if looks_like_one:
        raise ConfigError(f"{path} does not exist; if a repository of the hub is meant, write hf://{path}")
    return path


def tokenizer_copy(path: str | Path) -> Path:
    """As `local_copy`; of a pipeline of diffusers the folder of its tokenizer."""
    found = local_copy(path)
    return found / TOKENIZER if is_pipeline(found) else found


def download(reference: Reference) -> Path:
    """A file of a repository, or the weights in it: a folder of diffusers, or the only safetensors file there is.

    Raises as `local_copy`, and ConfigError where several files could be meant.
    """
    hub, wanted = _package(), list(TAKEN)
    if reference.file is not None:
        beside = str(Path(reference.file).with_suffix(".json"))  # what describes an export's tensors
        wanted = [_escaped(reference.file), _escaped(beside)]
    with _explained(str(reference)):
        folder = Path(hub.snapshot_download(reference.repository, revision=reference.revision, allow_patterns=wanted))
    log.info("%s: taken from %s", reference, folder)
    if reference.file is None:
        return _weights_in(folder, reference)
    if not (path := folder / reference.file).is_file():
        raise ConfigError(f"{reference}: the repository has no file {reference.file}")
    return path


def _escaped(name: str) -> str:
    """A file's name as a pattern that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _weights_in(folder: Path, reference: Reference) -> Path:
    if is_pipeline(folder) or weights_file(folder).is_file():
        return folder
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))
    if len(files) == 1:
        return folder / files[0]
    held = f"holds {', '.join(files[:5])}{' …' * (len(files) > 5)}: name one, {reference}/FILE" if files else "has none"
    raise ConfigError(f"{reference}: one safetensors file is wanted, and the repository {held}")


def require_upload(repository: str) -> None:
    """Raise ConfigError, before the long work, where the package is not installed or this is no repository's name."""
    _package()
    from huggingface_hub import errors, utils  # no attributes of the package until they are imported

    if not re.fullmatch(_REPOSITORY, repository):
        raise ConfigError(f"--push {repository!r}: OWNER/NAME is wanted, the name of a repository on the hub")
    try:
        utils.validate_repo_id(repository)
    except errors.HFValidationError as e:
        raise ConfigError(f"--push {repository}: {e}") from None


def upload(files: Mapping[str, Path], repository: str, *, private: bool, revision: str | None, message: str) -> str:
    """Put files (path in the repository → path) on the hub in one commit → its address.

    The repository and the branch `revision` are made where they are not there; `private` is of one that is made.
    Raises as `local_copy`.
    """
    hub = _package()
    operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
    log.info("%d files go to the hub: %s", len(operations), repository)
    with _explained(f"--push {repository}"):
        api = hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        made = api.create_commit(repository, operations, commit_message=message, revision=revision)
    return str(made.commit_url)


def _package() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(f"the hub needs the package huggingface_hub: {_INSTALL}") from None
    return huggingface_hub


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say in one line, naming `what`, why the hub gives or takes nothing."""
    from huggingface_hub import errors

    reasons: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, "access to it has to be asked for on its page, and a token of who has it is needed"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private and this token may not see it"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.LocalTokenNotFoundError, "a token is needed: `hf auth login`, or HF_TOKEN"),
        (errors.EntryNotFoundError, "it has no such file"),
        (errors.HFValidationError, "that is no name of a repository"),
    ]
    try:
        yield
    except Exception as e:
        if isinstance(e, errors.LocalEntryNotFoundError | errors.IncompleteSnapshotError):
            raise DownloadError(
                f"{what}: the hub cannot be reached, or HF_HUB_OFFLINE is set, and the cache does not have all of it "
                f"({_first_line(e.__cause__ or e)})"
            ) from e
        for kind, reason in reasons:
            if isinstance(e, kind):
                raise ConfigError(f"{what}: {reason}") from e
        status = _status(e)
        if status in (401, 403):
            raise ConfigError(f"{what}: no access ({status}): `hf auth login` with a token that has it") from e
        if isinstance(e, errors.HfHubHTTPError | OSError) or type(e).__module__.startswith("http"):
            raise DownloadError(f"{what}: {_first_line(e)}") from e
        raise


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
