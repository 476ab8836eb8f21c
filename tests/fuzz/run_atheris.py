"""Coverage-guided fuzzing of one parser: ``python -m tests.fuzz.run_atheris --seconds 60 TARGET``.

Needs the extra `fuzz`. A finding ends the run with its stack and leaves the input in ``crash-*``; a copy of what was
new is kept under ``--corpus``. Without TARGET the names are listed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["moc"]):
    from tests.fuzz.changes import changed_text
    from tests.fuzz.targets import TARGETS

INPUT_LIMIT_BYTES = 1 << 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=None, help="folder of inputs, kept between runs")
    args = parser.parse_args()
    if args.target is None:
        print("\n".join(TARGETS))
        return
    target = TARGETS[args.target]
    corpus: Path = args.corpus or Path(tempfile.mkdtemp(prefix="moc-fuzz-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(content)
    options = [f"-max_total_time={args.seconds}", f"-max_len={INPUT_LIMIT_BYTES}", "-rss_limit_mb=4096", "-timeout=20"]
    arguments = [sys.argv[0], *options, "-print_final_stats=1", str(corpus)]
    if target.is_json:
        atheris.Setup(arguments, target.check, custom_mutator=_change)
    else:
        atheris.Setup(arguments, target.check)
    atheris.Fuzz()


def _change(content: bytes, limit_bytes: int, seed: int) -> bytes:
    """Change a value of a JSON text, or, as often and where it is none, bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        try:
            return changed_text(chance.choice, content)[:limit_bytes]
        except (ValueError, RecursionError):
            pass  # no JSON any more
    changed: bytes = atheris.Mutate(content, len(content))
    return changed


if __name__ == "__main__":
    main()
