"""The report and the submission: figures over seeds, budgets, comparison with published records, charts, the page."""
