"""Pre-train a mixture-of-experts language model.

    deepspeed moc_train/pretrain.py
    torchrun --nproc-per-node 2 moc_train/pretrain.py --config examples/configs/main_job.yaml training.steps=50

Settings and their defaults: `pretrain.py --print-config`.
"""

import os
import sys
from pathlib import Path

if not __package__:  # run as a file: its folder must not be searched for modules, the repository's root must be
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder] + [str(folder.parent)]

from moc_train.config import ConfigError, resolve
from moc_train.launch import prepare_environment, read_place
from moc_train.options import parse_arguments

USAGE_EXIT = 2


def main() -> int:
    """Return the exit code of a run with this process's arguments and environment."""
    place = read_place(os.environ)
    try:
        config = parse_arguments(sys.argv[1:])
        resolve(config, place.world_size)
    except ConfigError as e:
        if place.rank == 0:
            print(f"pretrain.py: {e}", file=sys.stderr)
        return USAGE_EXIT
    prepare_environment(os.environ, place, deterministic=config.training.deterministic)

    from moc_train.data.corpus import CorpusError
    from moc_train.training import finish, run  # imports torch: after the settings are known to be good

    try:
        loss = run(config, place)
    except (ConfigError, CorpusError) as e:
        print(f"pretrain.py: {e}", file=sys.stderr)
        return USAGE_EXIT
    finish(loss, place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
