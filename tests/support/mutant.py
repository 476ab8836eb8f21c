"""A copy of the project with one line changed, in an environment whose every process imports the copy.

The environment borrows the installed packages through a path entry, so the import hook of an editable install, which
would lead back to the original, does not exist in it: not in the tests, nor in the agents and workers they start.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from moc import _native

__all__ = ["Copy", "Mutation"]

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("moc", "moc_train", "tests", "pyproject.toml")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "build")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One defect: `old` occurs exactly once in `file` and becomes `new`; then pytest on `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Copy:
    """Use as a context manager; the folder is gone afterwards."""

    def __enter__(self) -> Copy:
        self._folder = tempfile.TemporaryDirectory(prefix="moc-mutant-")
        self.root = Path(self._folder.name)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.root / name, ignore=_IGNORED)
            else:
                shutil.copy2(source, self.root / name)
        extension = _native.__file__
        assert extension is not None, "the extension module is a file"
        shutil.copy2(extension, self.root / "moc")
        self._make_environment()
        seen = self.python("-c", "import moc, moc._native; print(moc.__file__, moc._native.__file__)")
        assert seen.stdout.count(str(self.root)) == 2, f"the copy is not what is imported: {seen.stdout}{seen.stderr}"
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def apply(self, mutation: Mutation) -> None:
        """Change the file; fails unless the old text is there exactly once."""
        path = self.root / mutation.file
        text = path.read_text()
        assert text.count(mutation.old) == 1, f"{mutation.name}: {text.count(mutation.old)} places in {mutation.file}"
        path.write_text(text.replace(mutation.old, mutation.new))

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python in the copy and return how it went."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run(
            [self._python, *arguments],
            cwd=self.root,
            env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def pytest(self, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """Run these tests of the copy up to the first failure."""
        return self.python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *tests)

    def _make_environment(self) -> None:
        folder = self.root / ".venv"
        venv.create(folder, with_pip=False, symlinks=True)
        self._python = str(folder / "bin" / "python")
        packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        borrowed = [path for path in sys.path if path in site.getsitepackages() or path.endswith("site-packages")]
        (packages / "borrowed.pth").write_text("\n".join([str(self.root), *borrowed]) + "\n")
