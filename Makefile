PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
EXTRAS := $(VENV)/.extras
JOBS   ?= 4

.PHONY: help setup extras fast demo lint fix test quick soak fuzz bench-compute coverage image-test wheel-test sbom site clean

help:                  ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(READY)        ## .venv with everything, exact versions, and this checkout in it

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Plinth needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

extras: $(EXTRAS)      ## what only some tests need: OpenVINO, MONAI, transformers, scikit-learn, tritonclient; exact versions

$(EXTRAS): $(READY) requirements-extras.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-extras.lock
	touch $(EXTRAS)

fast: setup            ## hot code compiled, where there is a C compiler (a minute); the source runs where it is newer
	$(BIN)/python -m plinth.compiled

demo: setup            ## the sample stream and the sample study, in under three minutes
	$(BIN)/plinth demo

lint: setup            ## style and types, nothing is changed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: setup             ## format, and mend what can be mended without thought
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unexport PYTHONDONTWRITEBYTECODE  # tests start Python a thousand times: compile once

QUICK := -m "not clock and not soak"
FAKE := tests/engine -m "not cpu and not clock and not slow and not soak"
CLOCK = -m clock $(shell grep -rl --include='test_*.py' 'mark\.clock' tests)
ALONE := echo "what failed beside others is run once more alone:" && OMP_NUM_THREADS=1 $(BIN)/pytest --last-failed --last-failed-no-failures none

test: export PLINTH_REQUIRE_EXTRAS = 1
test: extras           ## everything: style, types, tests
	$(MAKE) --jobs 2 lint quick
	export PLINTH_TEST_DEVICE=fake; OMP_NUM_THREADS=1 $(BIN)/pytest $(FAKE) -n $(JOBS) --dist loadfile || { test $$? = 1 && $(ALONE) $(FAKE); }
	$(BIN)/pytest $(CLOCK) || { test $$? = 1 && $(ALONE) $(CLOCK); }

quick: extras          ## what runs beside other things: the tests but those of time, kills and the fake device
	OMP_NUM_THREADS=1 $(BIN)/pytest $(QUICK) -n $(JOBS) --dist loadfile --no-loadscope-reorder || { test $$? = 1 && $(ALONE) $(QUICK); }

soak: extras           ## what make test leaves out: more kills, outages, memory and whole runs (ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak -n 2 --dist loadfile --ignore tests/deploy/test_image.py

fuzz: extras           ## new examples for every property, 500 requests for each route (an hour)
	HYPOTHESIS_PROFILE=fuzz OMP_NUM_THREADS=1 $(BIN)/pytest -m "hypothesis and not clock" -n $(JOBS) --timeout 3000
	PLINTH_FUZZ_CASES=500 $(BIN)/pytest tests/pipelines/uploads/test_openapi.py

bench-compute: extras  ## models and families on all backends, into docs/benchmarks.md (25 minutes; goes on if stopped)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compute.py --minutes 16 --results build/compute.json --write
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py --minutes 6 --results build/families.json --write

coverage: setup        ## lines the quick tests of engine and verticals run; fails below the floor
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/engine tests/verticals -m "not slow and not clock" -n $(JOBS) --cov --cov-report=term

image-test: extras     ## the container image: built, started, asked, and beside a Kafka (root, buildah; 20 minutes)
	$(BIN)/pytest tests/deploy/test_image.py -m soak --timeout 3000

wheel-test: setup      ## the wheel and all it needs, in an empty environment of PYTHON (downloads)
	PLINTH_FRESH_PYTHON=$$(command -v $(PYTHON)) $(BIN)/pytest tests/test_package.py --timeout 3000

sbom:                  ## build/plinth.cdx.json: what the container installs (CycloneDX), from its lock (downloads)
	$(PYTHON) -m venv build/sbom
	build/sbom/bin/pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
	cat deploy/requirements.txt deploy/torch.txt > build/sbom/all.txt
	build/sbom/bin/cyclonedx-py requirements build/sbom/all.txt --pyproject pyproject.toml --of JSON -o build/plinth.cdx.json

site: extras           ## the documentation as a site, strictly, in build/site; serve it by python -m http.server
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:                 ## remove what the others made
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .coverage
