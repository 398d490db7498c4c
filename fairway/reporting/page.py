"""The report as one HTML page that needs nothing else: no network, no script, no second file."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fairway.reporting.audits import audits
from fairway.reporting.charts import charts, hue, ladder_bars, ladder_range, stage_times, time_bars
from fairway.reporting.facts import Facts
from fairway.reporting.plot import signed
from fairway.reporting.significance import MARGIN_NATS, SIGNIFICANCE, spread
from fairway.reporting.tables import size_parts


def page(facts: Facts, meta: dict[str, Any]) -> str:
    """HTML of the report; `meta` is the tokens' meta.json. Every text is escaped by the template engine."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals |= {"hue": hue, "signed": signed, "spread": spread}
    return templates.get_template("report.html").render(
        facts=facts,
        runs=facts.runs,
        charts=charts(facts),
        ladder=ladder_bars(facts.rungs),
        ladder_range=ladder_range(facts.rungs),
        times=time_bars(facts),
        stage_times=stage_times(facts.runs),
        audits=audits(facts.runs, facts.scores),
        parts=[size_parts(run.size) for run in facts.runs],
        size=facts.runs[0].size,
        meta=meta,
        margin_nats=MARGIN_NATS,
        significance=SIGNIFICANCE,
    )
