"""Experiments beside each other and beside the published records, on one page.

Reads:  params.yaml, results/ and, of two versions, artifacts/tokens and artifacts/evaluate: of the workspace, of the
        commit, and of every experiment that `dvc exp show` lists; records/published.yaml
Writes: results/compare.html, which git ignores
Method: figures and training curves from results/; two versions document by document, with Student's paired test
        (reporting/comparison.py)
Usage:  python -m stages.compare [FIRST SECOND]     (names on the page; if there are none, the workspace and the newest
        experiment with other scores)
"""

import sys
from pathlib import Path

from fairway.reporting.compare_page import compare_page
from fairway.reporting.comparison import load_published
from fairway.reporting.stored_experiments import experiments, pair
from fairway.runtime.errors import UserError, run_stage
from fairway.runtime.files import write_atomic

PAGE = Path("results/compare.html")


def main() -> None:
    """Compare all there is, and two versions document by document."""
    wanted = sys.argv[1:]
    if len(wanted) not in (0, 2):
        raise UserError(f"usage: python -m stages.compare [FIRST SECOND]; found: {' '.join(wanted)}")
    published = load_published(Path("records/published.yaml"))
    found = experiments()
    compared = pair(found.rows, wanted)
    write_atomic(PAGE, compare_page(found, compared, published))
    print(f"{len(found.rows)} versions beside {len(published.records)} published records")
    for line in compared.missing:
        print(line)
    print(f"The page to look at: {PAGE}")


if __name__ == "__main__":
    run_stage(main)
