"""Files to begin a task of one's own with: a config, rows, a verifier and its test, which work as they are."""

from __future__ import annotations

import keyword
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from selfroute.errors import TaskError


def write_starter(name: str, folder: Path) -> list[Path]:
    """Write the files of a task `name` into a folder, which is made where there is none; nothing is overwritten.

    Raises:
        TaskError: a file is there already, or the name cannot be that of a module.
    """
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise TaskError(f"{name!r} cannot be the name of a Python file: give letters, digits and _, such as my_task")
    texts = {
        folder / file.name.replace("NAME", name).removesuffix(".txt"): file.read_text(encoding="utf-8")
        for file in sorted((resources.files("selfroute") / "starter").iterdir(), key=lambda file: file.name)
    }
    there = [str(file) for file in texts if file.exists()]
    if there:
        raise TaskError(f"{', '.join(there)}: already there, and left alone; give another name, or --out")
    if find_spec(name) is not None:
        raise TaskError(f"there is a Python module {name} already, which would be imported in place of yours")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            with file.open("x", encoding="utf-8") as made:
                made.write(text.replace("NAME", name))
    except OSError as error:
        raise TaskError(f"cannot write into {folder}: {error}") from error
    return list(texts)
