"""Write golden repositories: ``python -m tests.golden.write NAME...``. For what is new in the format, never for a test.

What is committed under ``v1`` are repositories whose manifests have version 1: they are read, and never written anew.
``v2`` is what is written today; a writer that gives other bytes writes another format.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from moc.store.local import LocalStore
from tests.golden.scenarios import SCENARIOS, expected

__all__ = ["FOLDERS", "PRESENT"]

FOLDERS = tuple(Path(__file__).parent / version for version in ("v1", "v2"))
PRESENT = FOLDERS[-1]


def main() -> None:
    for name in sys.argv[1:]:
        shutil.rmtree(PRESENT / name, ignore_errors=True)
        golden = SCENARIOS[name](LocalStore(PRESENT / name))
        contents = json.dumps(expected(golden), indent=1, ensure_ascii=False)
        (PRESENT / f"{name}.json").write_text(contents + "\n", encoding="utf-8")
        print(f"{name}: {sum(path.stat().st_size for path in (PRESENT / name).rglob('*') if path.is_file())} bytes")


if __name__ == "__main__":
    main()
