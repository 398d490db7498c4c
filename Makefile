# make repro   the whole pipeline on params.yaml; with DATA=path on text of your own, which params.yaml then names, and
#              COLUMN=name if its key or column is not `text`
# make record RECORD=r1172 GPUS=4   params.yaml from records/ for so many GPUs, and the whole pipeline on it
# make compare experiments of dvc exp beside each other and beside published records; OF="a b" names two of them
# make test    every fast test (CPU)
# make test-long, make test-gpu   the tests that take minutes, and those that need a GPU
# make lint    style and types
# make test-browser  both pages in Chromium, installed by apt where it is missing
# make pack FILE=notes.md, make unpack FILE=notes.md.fwz   any text packed by model.bin, and back
# make sample PROMPT='The database'   what model.bin writes behind that
# make doctor  what this machine has and lacks for each record
# make dag     the pipeline as a graph, in Mermaid's notation
# make clean   deletes data/ and artifacts/; DVC's cache keeps what it has
# make help    these lines
.PHONY: help repro record compare test test-long test-gpu test-browser lint doctor dag pack unpack sample clean
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# The text of a variable as one word of the shell: neither $5 nor an apostrophe in it means anything.
as_given = '$(subst ','\'',$(value $(1)))'

repro: .venv/installed
	@git rev-parse --git-dir > /dev/null 2>&1 || grep -qs no_scm .dvc/config .dvc/config.local || { \
	  echo 'error: not a git repository: do `git init`, or `dvc config --local core.no_scm true` without git' >&2; exit 1; }
	$(if $(value DATA),python -m stages.use_data $(call as_given,DATA) $(if $(value COLUMN),$(call as_given,COLUMN)))
	$(if $(value DATA),dvc repro --force --single-item fetch)
	dvc repro

record: .venv/installed
	python -m stages.use_record $(call as_given,RECORD) $(call as_given,GPUS)
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

pack unpack: .venv/installed
	python -m fairway.zip $@ $(call as_given,FILE) $(if $(value OUT),$(call as_given,OUT))

sample: .venv/installed
	python -m fairway.sample $(call as_given,PROMPT)

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

help:
	@sed -n '/^[^#]/q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

clean:
	rm -rf data artifacts
