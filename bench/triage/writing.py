"""Files that others read while they are written."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, told: dict[str, Any]) -> None:
    """The object as JSON, whole at every moment."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)
