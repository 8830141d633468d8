"""Where wandb and TensorBoard keep their files during a run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def trackers_in(folder: Path) -> Iterator[None]:
    """Point trackers that Trainer starts at `folder`, unless the user's environment points elsewhere.

    Both take their folder from the environment only; it is put back afterwards, and a wandb run is finished, so
    that the next run in this process has its own.
    """
    ours = {"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"), "WANDB_DIR": str(folder)}
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
        if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
            sys.modules["wandb"].finish()
