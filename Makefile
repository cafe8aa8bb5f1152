# Every target does all the set-up that it needs, on a machine with Python >= 3.11 and nothing else.

PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Nothing here needs a model hub
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test fuzz test-slow test-lowest lint audit docs benchmark quality quality-smoke clean

demo: $(VENV)/.installed ## the main job on data and a model made on the spot
	$(VENV)/bin/trl-dmpo demo

test: $(VENV)/.test $(VENV)/.benchmark ## all tests that take seconds, on all cores
	$(VENV)/bin/python -m pytest -n auto -m "not slow"

test-slow: $(VENV)/.test ## those that take minutes: the whole demo, the built wheel, a real model where there is one
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto -m slow

fuzz: $(VENV)/.fuzz ## 100,000 rows of any kind; about half an hour on two cores. What atheris finds is kept in .fuzz
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz.fuzz_files 40000 .fuzz/files
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz.fuzz_rows 60000 .fuzz/rows

test-lowest: $(LOWEST)/.test ## the tests against the lowest supported versions
	TRITON_INTERPRET=1 $(LOWEST)/bin/python -m pytest -n auto -m "not slow" --ignore tests/benchmarks

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

audit: $(VENV)/.test $(VENV)/.benchmark $(VENV)/.audit ## licences, and known vulnerabilities that a newer version mends
	$(VENV)/bin/python .ci/audit.py

docs: $(VENV)/.docs ## the site, in site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

benchmark: $(VENV)/.installed ## cost of a training step; about half an hour on two cores
	$(VENV)/bin/python benchmarks/step_cost.py --output benchmarks/step_cost.json

PRESETS := sequence negatives disliked few_shot cross_domain candidates candidates_small explain

quality: $(VENV)/.benchmark ## all experiments of docs/results.md; hours on two cores. What is done is kept in quality-work/
	$(VENV)/bin/python -m benchmarks.quality $(PRESETS) --jobs 2

quality-smoke: $(VENV)/.benchmark ## each experiment from end to end, on made-up data with models of a few weights
	rm -rf quality-work/smoke
	$(VENV)/bin/python -m benchmarks.quality $(PRESETS) --tiny --jobs 2 --work quality-work/smoke \
		--output quality-work/smoke/results --pages quality-work/smoke/pages

clean:
	rm -rf $(VENV) $(LOWEST) site dist quality-work

# torch comes first and alone: a build that is there already must not be replaced by what another package would pull
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test $(VENV)/.benchmark $(VENV)/.fuzz $(VENV)/.lint $(VENV)/.docs $(VENV)/.audit: $(VENV)/.%: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --group $*
	touch $@

$(LOWEST)/.test: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt torch triton
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable . --group test
	touch $@
