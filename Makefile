# Every target sets up what it needs in .venv; a second call does not install again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A worker of the tests takes a gigabyte or two, so there are four at most.
ON_ALL_CORES := -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-browser test-slow torture fuzz mutants test-oldest test-newest coverage docs format bench evidence clean

# Two seeds, half a minute; .venv/bin/polyak demo runs all of them.
demo: $(VENV)/.demo
	$(BIN)/polyak demo --quick

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest $(ON_ALL_CORES)

# What make test does with the report where there is a browser; this says so where there is none.
test-browser: $(VENV)/.dev
	@command -v chromium || command -v chromium-browser || { echo "This needs chromium; on Debian: apt-get install chromium"; exit 1; }
	$(BIN)/python -m pytest tests/test_browser.py

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest $(ON_ALL_CORES) --hypothesis-profile=default -m hypothesis

# Faults and abuse by the hundred, of which `make test` runs some; the counts by family are written down.
torture: $(VENV)/.dev
	$(BIN)/python -m pytest $(ON_ALL_CORES) -m '' --torture-output benchmarks/results/torture.json tests/torture
	$(BIN)/python benchmarks/tables.py

# Every reader of files and saved states, with inputs that reach ever more of its code; what was found wrong lies in build/fuzz.
FUZZ_SECONDS ?= 120
fuzz: $(VENV)/.fuzz
	PYTHONPATH=tests $(BIN)/python -W ignore -m torture.fuzz --seconds $(FUZZ_SECONDS)

# Small faults put into the modules that count most, of which the tests must see nine in ten: an hour or two on one core.
mutants: $(VENV)/.mutants
	$(BIN)/python benchmarks/mutants.py
	$(BIN)/python benchmarks/tables.py

# The same tests where every dependency is the oldest that pyproject.toml allows, and where it is the newest there is.
test-oldest: .venv-oldest/.dev
	.venv-oldest/bin/python -m pytest $(ON_ALL_CORES)

test-newest: .venv-newest/.dev
	.venv-newest/bin/python -m pytest $(ON_ALL_CORES)

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest $(ON_ALL_CORES) --cov --cov-report=term-missing:skip-covered

# The documentation site, build/site/index.html; warnings are errors. mkdocs 2 has no plugins, so both stay where they are.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f website/mkdocs.yml

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/update_cost.py --output benchmarks/results/update_cost.json
	$(BIN)/python benchmarks/batchnorm_cost.py
	$(BIN)/python benchmarks/offline.py
	$(BIN)/python benchmarks/trajectory.py --output benchmarks/results/trajectory.json
	$(BIN)/python benchmarks/tables.py

# What averaging buys, rather than what it costs: some hours of training on two cores. The real tasks need apt-get and npm
# for their data, and go on where they were interrupted.
evidence: $(VENV)/.dev
	$(BIN)/polyak demo --output polyak-demo
	$(BIN)/polyak demo --task text --output polyak-demo
	cp polyak-demo/digits.json benchmarks/results/demo_digits.json
	cp polyak-demo/text.json benchmarks/results/demo_text.json
	$(BIN)/python benchmarks/effect.py --output benchmarks/results/effect.json
	$(BIN)/python benchmarks/no_harm.py --output benchmarks/results/no_harm.json
	$(BIN)/python benchmarks/preview.py --output benchmarks/results/preview.json
	$(BIN)/python benchmarks/valley.py --output benchmarks/results/valley.json
	$(BIN)/python benchmarks/fitted.py --output benchmarks/results/fitted.json
	$(BIN)/python benchmarks/posterior.py --output benchmarks/results/posterior.json
	$(BIN)/python benchmarks/quantised.py --output benchmarks/results/quantised.json
	$(BIN)/python benchmarks/fetch_data.py polyak-evidence/data
	$(BIN)/python benchmarks/real_tasks.py --data polyak-evidence/data --work polyak-evidence/runs \
		--output benchmarks/results/real_tasks.json
	$(BIN)/python benchmarks/real_figure.py
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist .pytest_cache .ruff_cache .hypothesis .coverage

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing polyak, torch and what the demo draws with into $(VENV): a few minutes, this once"
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[docs]'
	touch $@

# timm depends on torchvision, which has no build beside this torch; what is used of it and of PEFT does without the rest.
$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing polyak and everything that its tests hold it against into $(VENV): some minutes, this once"
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps timm peft
	touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(PIP) -e '.[fuzz]'
	touch $@

# Several gigabytes each: these torches come with CUDA.
.venv-oldest/.dev: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	grep -oE '[a-z0-9_-]+>=[0-9.]+' $< | sed 's/>=/==/' > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet -c .venv-oldest/oldest.txt -e '.[dev]'
	.venv-oldest/bin/python -m pip install --quiet --no-deps timm peft
	touch $@

.venv-newest/.dev: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade -e '.[dev]'
	.venv-newest/bin/python -m pip install --quiet --upgrade --no-deps timm peft
	touch $@

# Nor does mergekit's linear merge use most of what mergekit asks for.
$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps mergekit
	touch $@

$(VENV)/.mutants: $(VENV)/.dev
	$(PIP) -e '.[mutants]'
	touch $@
