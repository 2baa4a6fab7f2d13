# The five commands of a day, in the environment that is active; .ci/run runs the same ones.

.PHONY: help setup lint types test docs

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | column -t -s :

setup:  ## install what development needs, and the hooks of git
	pip install -r requirements-dev.txt -e .
	pre-commit install

lint:  ## rules and format of the code
	ruff check .
	ruff format --check .

types:  ## pyright, basic
	pyright --project .  # a pyrightconfig.json in a folder above would come first

test:  ## all tests but the slow ones
	pytest

docs:  ## the site, into build/docs; a warning is an error
	sphinx-build --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"
