"""What the experiment came to: a dozen figures, a table, a picture.

reads   artifacts/train, artifacts/size_check, artifacts/evaluate (every seed), artifacts/tokens/meta.json
writes  results/summary.json, report.md, report.png, curve.csv (small, committed)
"""

import json
from pathlib import Path

from stages.errors import run_stage
from stages.files import require_file, write_atomic
from stages.params import load_params
from stages.report.figure import figure
from stages.report.runs import collect
from stages.report.summary import summarize
from stages.report.table import markdown


def main() -> None:
    params = load_params("params.yaml")
    meta = json.loads(require_file(Path("artifacts/tokens/meta.json"), "python -m stages.tokenize").read_text())
    compressors = {name: 8 * size / meta["val_text_bytes"] for name, size in meta["compressed_val_bytes"].items()}
    runs = collect(Path("artifacts"), params.seeds, list(params.evaluators))
    summary = summarize(runs, compressors)

    results = Path("results")
    write_atomic(results / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomic(results / "report.md", markdown(runs, compressors, summary))
    write_atomic(results / "report.png", figure(runs, compressors))
    rows = [f"{run.seed},{step},{bpb:.6f}\n" for run in runs for step, bpb in run.curve]
    write_atomic(results / "curve.csv", "seed,step,val_bpb\n" + "".join(rows))
    print((results / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_stage(main)
