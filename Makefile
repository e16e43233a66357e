# What a contributor runs. `make setup` makes .venv; without one, the environment that is active is used.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup test lint campaign example

setup:  ## .venv with everything that tests need
	python3 -m venv .venv
	pip install -r requirements-dev.txt

test:  ## the default suite
	pytest

lint:  ## style, types, shell scripts, spelling
	ruff check .
	ruff format --check .
	mypy
	shellcheck .ci/run $$(git ls-files '*.sh')
	codespell

campaign:  ## the long tables, then the integration tests on the oldest transformers that works
	pytest -m campaign
	tests/on_transformers.sh 5.17.0

example:  ## train the embedded example
	bash train/train.sh
