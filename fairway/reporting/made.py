"""What made a report: the run's name, when it was, and which of its settings differ from those it goes back to."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fairway.reporting.versions import Change, Version, changes
from fairway.runtime.errors import UserError


@dataclass(frozen=True)
class Made:
    """The head of the page. `experiment` is the name that `dvc exp run` gave the run, None outside of it.

    `against` says what the settings were compared with, None where there is neither a record nor a commit.
    """

    name: str
    experiment: str | None
    at: datetime
    against: str | None
    changes: list[Change]


def made(name: str, record: str | None) -> Made:
    """What makes a report here and now, of the run that submission.name calls `name`.

    Its settings are compared with the file records/<record>.yaml if params.yaml names a record that has one, otherwise
    with the params.yaml that is committed. In an experiment that is the commit it goes back to.
    """
    here, path = Version("the workspace", None), f"records/{record}.yaml"
    committed = Version("git", os.environ.get("DVC_EXP_BASELINE_REV", "HEAD"))
    try:
        if record and Path(path).is_file():
            against, before = path, here.settings(path)
        else:
            against, before = f"params.yaml of commit {committed.commit()}", committed.settings()
        found = changes(before, here.settings())
    except UserError:
        against, found = None, []
    return Made(name, os.environ.get("DVC_EXP_NAME"), datetime.now(UTC), against, found)
