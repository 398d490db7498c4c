# make repro   the whole pipeline on params.yaml; with DATA=path on text of your own, which params.yaml then names
# make compare experiments of dvc exp beside each other and beside published records; OF="a b" names two of them
# make test    every fast test (CPU)
# make lint    style and types
# make test-browser  both pages in Chromium, installed by apt where it is missing
# make doctor  what this machine has and lacks for each record
# make dag     the pipeline as a graph, in Mermaid's notation
.PHONY: repro compare test test-long test-gpu test-browser lint doctor dag clean
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

repro: .venv/installed
	$(if $(DATA),python -m stages.use_data '$(DATA)')
	$(if $(DATA),dvc repro --force --single-item fetch)
	dvc repro

compare: .venv/installed
	$(strip python -m stages.compare $(OF))

test: .venv/installed lint
	pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: .venv/installed
	pytest -m long

test-gpu:
	$(PYTHON) -m pytest -m gpu

test-browser: .venv/browser
	pytest -m browser tests/test_report_browser.py

lint: .venv/installed
	ruff check .
	ruff format --check .
	mypy

doctor: .venv/installed
	python -m stages.doctor

dag: .venv/installed
	@dvc dag --mermaid --collapse-foreach-matrix

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/browser: .venv/installed
	command -v chromedriver > /dev/null || apt-get install --yes --no-install-recommends chromium chromium-driver
	.venv/bin/pip install --quiet --disable-pip-version-check selenium==4.51.0 axe-core-python==0.1.0
	touch $@

clean:
	rm -rf data artifacts
