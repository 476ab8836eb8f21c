"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from moc.errors import UsageError
from moc.store.translate import translate_os_error

__all__ = ["publish_folder"]


@contextlib.contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that takes its name when the block ends, durably; on an error nothing is
    left behind.

    Raises: UsageError if `target` is there and is not an empty folder; StorageError for what the filesystem refuses.
    """
    target = Path(os.path.abspath(target))
    with _translated(target):
        _require_vacant(target)
        made = _make_parents(target)
        temporary = target.parent / f".{target.name}~{secrets.token_hex(4)}"
        try:
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            os.rename(temporary, target)
            for folder in {target.parent, *(path.parent for path in made)}:
                _sync(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # somebody else has begun to use it
                    folder.rmdir()
            raise


@contextlib.contextmanager
def _translated(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise translate_os_error(error, action="export", subject=f"path={target}") from error
    except RuntimeError as error:  # torch.save turns a failed write into one, and says which only in its cause
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise translate_os_error(cause, action="export", subject=f"path={target}") from error
        raise


def _require_vacant(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()) or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"export target is in use: path={target} allowed=a folder that is empty or does not exist")


def _make_parents(target: Path) -> list[Path]:
    """Create the folders above `target`; return those that were missing, outermost first."""
    missing = [folder for folder in reversed(target.parents) if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
