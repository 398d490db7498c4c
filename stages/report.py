"""What the experiment came to, over all seeds: about a dozen figures, a table, and a page to look at.

Reads:  artifacts/train, adapt, quantize, compress, size_check, evaluate and certify (every seed),
        artifacts/tokens (validation stream, tokenizer.model, meta.json), records/published.yaml; for the head of the
        page also params.yaml as it is committed, or records/<report.record>.yaml
Writes: results/summary.json, report.md, and curve.csv, positions.csv, sizes.csv for `dvc plots`, which hold scores and
        bytes, are small and are committed; results/times.json, the ledger of time, and report.html, the page, which
        tell seconds too, so that git ignores them
Method: mean and sample deviation over seeds; Welch's test against a published record (reporting/comparison.py)
Source: the track's rules for budgets and for a new record. The published records have no such report.
"""

import json
from pathlib import Path

from fairway.params import load_params
from fairway.reporting import tables
from fairway.reporting.by_document import read_documents
from fairway.reporting.comparison import load_published
from fairway.reporting.facts import facts
from fairway.reporting.made import made
from fairway.reporting.page import page
from fairway.reporting.runs import collect
from fairway.reporting.tables import markdown, summarize, time_table, times, timing
from fairway.runtime.errors import no_arguments, run_stage
from fairway.runtime.files import require_file, write_atomic


def main() -> None:
    """Report on every seed and evaluator of params.yaml."""
    no_arguments("report")
    params = load_params("params.yaml")
    published = load_published(Path("records/published.yaml"))
    meta = json.loads(require_file(Path("artifacts/tokens/meta.json"), "python -m stages.tokenize").read_text())
    found = facts(
        collect(Path("artifacts"), params.seeds, list(params.evaluators)),
        published,
        meta,
        report=params.report,
        kept=params.average.kind,
        shipped=params.compress.evaluator,
    )
    reading = read_documents(Path("artifacts"), meta, params.seeds, found.shipped.name)
    head = made(params.submission.name, params.report.record)
    seconds = times(found) | {"ledger": time_table(found.runs)}
    results = Path("results")
    write_atomic(results / "summary.json", json.dumps(summarize(found), indent=2) + "\n")
    write_atomic(results / "times.json", json.dumps(seconds, indent=2) + "\n")
    write_atomic(results / "report.md", markdown(found))
    write_atomic(results / "report.html", page(found, meta, reading, head))
    write_atomic(results / "curve.csv", tables.curve(found))
    write_atomic(results / "positions.csv", tables.positions(found))
    write_atomic(results / "sizes.csv", tables.sizes(found))
    print(f"{markdown(found)}\n{timing(found)} The page to look at: {results / 'report.html'}")


if __name__ == "__main__":
    run_stage(main)
