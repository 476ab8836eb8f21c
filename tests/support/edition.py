"""Another version of moc, to run trainers and agents of: a copy of the package that says another version.

    python tests/support/edition.py FOLDER PROGRAM [ARGUMENT ...]

runs a program of the copy in FOLDER, whatever else is installed.
"""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

__all__ = ["make_edition"]

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("crash/worker.py", "crash/agent_worker.py", "support/plain.py", "support/kill.py", "support/edition.py")


def make_edition(folder: Path, *, version: str) -> Path:
    """Copy the package and the workers of the crash tests into `folder`."""
    import moc._native

    shutil.copytree(ROOT / "moc", folder / "moc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(str(moc._native.__file__), folder / "moc")
    for name in PROGRAMS:
        (folder / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    first = folder / "moc/__init__.py"
    text, count = re.subn(r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"', first.read_text())
    assert count == 1
    first.write_text(text)
    return folder


def main() -> None:
    folder, program, *arguments = sys.argv[1:]
    # An editable installation may answer for the package before the path is looked at.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
    sys.path[:0] = [folder]
    sys.argv = [program, *arguments]
    runpy.run_path(f"{folder}/tests/{program}", run_name="__main__")


if __name__ == "__main__":
    main()
