# make repro   the whole pipeline on params.yaml
# make test    every fast test (CPU)
# make lint    style and types
.PHONY: repro test test-long test-gpu lint clean
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

repro: .venv/installed
	dvc repro

test: .venv/installed lint
	pytest -n 2 --dist loadfile

test-long: .venv/installed
	pytest -m long

test-gpu:
	$(PYTHON) -m pytest -m gpu

lint: .venv/installed
	ruff check .
	ruff format --check .
	mypy

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf data artifacts
