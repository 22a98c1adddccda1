"""One atomic writer: no package writes a file, or gives one its name, but through `common.files`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "kernels", "launch", "lightningdit", "vavae")
#: Calls that write to a path they are given, or give a file its name.
IN_PLACE = {
    "write_text",
    "write_bytes",
    "open",
    "os.replace",
    "os.rename",
    "rename",
    "shutil.copy",
    "shutil.copyfile",
    "shutil.copy2",
    "shutil.move",
    "symlink_to",
    "fdopen",
    "mkstemp",
    "tofile",
    "os.link",
}
#: Calls that also write to an open file: allowed inside `with atomic_write(…)`.
INSIDE = {"save", "savez", "savez_compressed", "save_file", "savefig", "dump", "ZipFile"}
#: File → what it may call nevertheless, and why.
ALLOWED = {
    "common/files.py": {"open", "os.replace", "os.rename", "os.link"},  # the writer
    "kernels/testing/emulation.py": {"open"},  # a lock
    "launch/training/checkpoint.py": {"os.replace"},  # whole directories, of files written atomically
    "launch/digits_demo/foundation.py": {"save"},  # FoundationModel's own, by write_tensors
    "launch/__main__.py": {"open", "fdopen"},  # the null device, for standard streams that are closed too
    "launch/digits_demo/dataset.py": {
        "save"
    },  # 1,797 images that a manifest of their checksums, written last, makes valid
    "launch/training/writers.py": {"open"},  # a log that grows
    "launch/evaluation/npz_file.py": {"open"},  # a member of an archive that is written atomically
    "launch/gallery_page/media.py": {"save"},  # into memory
    "launch/runtime/run_lock.py": {"open"},  # held open as long as the run lives
}


def writes(tree: ast.Module) -> set[str]:
    """Names of calls in a file that may write, without those inside `with atomic_write(…)` that write to its file."""
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any("atomic_write(" in ast.unparse(item.context_expr) for item in node.items):
            guarded |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        whole = ast.unparse(node.func)
        name = whole if whole in IN_PLACE else whole.split(".")[-1]
        if name == "open" and not _for_writing(node):
            continue
        if whole in ("write_text", "save", "checkpoint.save", "self.saver.save"):
            continue  # of common.files, launch.training.checkpoint and launch.training.saving
        if name in ("rename", "dump", "save") and not node.args:
            continue  # a trainer's, a model's
        inside = name in INSIDE or whole == "archive.open"
        if (name in IN_PLACE and not inside) or (inside and id(node) not in guarded and not _reads(node)):
            found.add(name)
    return found


def _for_writing(call: ast.Call) -> bool:
    """Whether a call of `open` has a mode that writes, or one that cannot be told."""
    texts = [a for a in (*call.args, *(k.value for k in call.keywords if k.arg == "mode"))]
    modes = [a.value for a in texts if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    computed = ast.unparse(call.func) == "open" and any(isinstance(a, ast.JoinedStr) for a in texts[1:])
    flags = any("O_CREAT" in ast.unparse(a) or "O_WRONLY" in ast.unparse(a) for a in call.args)
    return computed or flags or any(set("wax+") & set(mode) and len(mode) <= 3 for mode in modes)


def _reads(call: ast.Call) -> bool:
    """Whether a ZipFile is opened for reading."""
    return ast.unparse(call.func).endswith("ZipFile") and not any(
        isinstance(a, ast.Constant) and a.value in ("w", "a", "x") for a in call.args
    )


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_nothing_else_writes_files():
    found = {str(path.relative_to(ROOT)): writes(ast.parse(path.read_text())) for path in sources()}
    wrong = {path: names - ALLOWED.get(path, set()) for path, names in found.items()}
    assert found and not {path: names for path, names in wrong.items() if names}


@pytest.mark.parametrize(
    "statement, name",
    [
        ("path.write_text('x')", "write_text"),
        ("open(path, 'w').write('x')", "open"),
        ("path.open('ab')", "open"),
        ("torch.save(x, path)", "save"),
        ("os.replace(a, b)", "os.replace"),
        ("a.rename(b)", "rename"),
        ("np.savez(path, x=x)", "savez"),
        ("image.save(path)", "save"),
        ("os.open(p, os.O_WRONLY | os.O_CREAT)", "open"),
        ("zipfile.ZipFile(path, 'w')", "ZipFile"),
        ("shutil.copy(a, b)", "shutil.copy"),
        ("json.dump(x, f)", "dump"),
    ],
)
def test_a_writer_is_seen(statement, name):
    assert writes(ast.parse(statement)) == {name}


@pytest.mark.parametrize(
    "statement",
    [
        "with atomic_write(path) as f:\n    torch.save(x, f)",
        "with atomic_write(p) as f, zipfile.ZipFile(f, 'w') as z:\n    z",
        "open(path, 'rb').read()",
        "x.copy()",
        "zipfile.ZipFile(path)",
        "trainer.save()",
        "open(f'{path}')",
        "Image.open(path, formats=['PNG'])",
        "x.copy(y)",
        "write_text(path, 'x')",
    ],
)
def test_what_is_no_writer_is_let_through(statement):
    assert not writes(ast.parse(statement))
