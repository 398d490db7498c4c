"""Resume points: everything that a killed run needs to go on as if it had not been killed.

A resume point is a safetensors file with the tensors of the run (weights, averages, momentum, moments) and latest.json,
which names that file and holds the rest. latest.json is written last, so that a run killed while it saves goes on from
the point before. A point carries the fingerprint of its experiment, code included, and a run with another fingerprint
ignores it.
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fairway.runtime.errors import UserError
from fairway.runtime.files import save_tensors, write_atomic


@contextmanager
def only_run(folder: Path, *, patience_s: float = 5.0) -> Iterator[None]:
    """Hold the lock of a resume folder inside the block, so that no second run of the same seed writes there.

    Waits up to `patience_s` for the lock, since the processes of a killed run may still be ending; the kernel frees
    their lock when they do. Raises UserError if another process holds it after that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".lock")
    give_up_at = time.monotonic() + patience_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up_at:
                    raise UserError(f"{path}: held by another training of this seed, which is still running") from None
                time.sleep(0.1)
        yield


class ResumePoints:
    """The resume folder of one run. Every process loads from it, and only the first one saves to it."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.latest = folder / "latest.json"

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the point behind a step, then delete the one before it. `state` must be fit for JSON."""
        path = self.folder / f"step_{step:08d}.safetensors"
        save_tensors(path, tensors)
        write_atomic(
            self.latest,
            json.dumps({"fingerprint": self.fingerprint, "tensors": path.name, "state": state}),
        )
        for old in self.folder.glob("*.safetensors"):
            if old != path:
                old.unlink()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors (on the CPU) and the state of the latest point, or None if this experiment has saved none.

        Raises UserError if the point's tensors are missing or damaged.
        """
        if not self.latest.is_file():
            return None
        point = json.loads(self.latest.read_text(encoding="utf-8"))
        if point["fingerprint"] != self.fingerprint:
            return None
        path = self.folder / point["tensors"]
        try:
            return load_file(path), point["state"]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not readable ({error}); remove {self.folder} to begin anew") from None
