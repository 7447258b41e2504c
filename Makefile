PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
JOBS   ?= 2

.PHONY: test fuzz demo setup clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Plinth needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

test: setup            ## everything: style, types, tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m "not clock" -n $(JOBS) --dist loadfile --no-loadscope-reorder
	$(VENV)/bin/pytest -m clock

fuzz: setup            ## requests made up from the API document, 500 for each route
	PLINTH_FUZZ_CASES=500 $(VENV)/bin/pytest tests/pipelines/uploads/test_openapi.py

demo: setup            ## the sample stream and the sample study, in under three minutes
	$(VENV)/bin/plinth demo

clean:
	rm -rf $(VENV) build *.egg-info
