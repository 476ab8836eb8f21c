"""Write the golden repositories: ``python -m tests.golden.write``. For a new version of the format, never for a test.

What is committed under ``v1`` is what format 1 is; a writer that gives other bytes writes another format.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from moc.store.local import LocalStore
from tests.golden.scenarios import SCENARIOS, expected

__all__ = ["FOLDER"]

FOLDER = Path(__file__).parent / "v1"


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, write in SCENARIOS.items():
        golden = write(LocalStore(FOLDER / name))
        contents = json.dumps(expected(golden), indent=1, ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(contents + "\n", encoding="utf-8")
        print(f"{name}: {sum(path.stat().st_size for path in (FOLDER / name).rglob('*') if path.is_file())} bytes")


if __name__ == "__main__":
    main()
