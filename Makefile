# Every target makes its own environment in .venv from a bare Python >= 3.11; nothing else has to be installed.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; break; fi; done)
BIN := .venv/bin
TEST_JOBS ?= 2
READY := .venv/.ready

.PHONY: help setup quickstart test test-oldest test-recipes test-slow lint format docs pictures site bench bench-forgetting bench-fold \
	bench-precision bench-overhead bench-estimates bench-allocations bench-gpu clean

help:
	@echo "make quickstart   the whole loop on the embedded model, CPU, minutes"
	@echo "make test         the tests"
	@echo "make test-oldest  the tests with the oldest versions that are allowed, in .venv-oldest (OLDEST_PYTHON=python3.12)"
	@echo "make setup        the environment in .venv, with the pinned versions"
	@echo "make lint         format check, linter, type check"
	@echo "make format       put the format right"
	@echo "make pictures     the report's pictures in docs/figures, from a quickstart (needs Chromium)"
	@echo "make docs         regenerate the recipe reference, docs/recipe.md"
	@echo "make site         the documentation as a site, in site/"
	@echo "make bench        the benchmark on real text (BAM_LORA_BENCH_DATA=folder with data/ and models/)"
	@echo "make bench-forgetting  learning against forgetting, ours and its rivals (HOURS=6 JOBS=1; SUBSET=quick: half an hour)"
	@echo "make bench-fold   folding adapters: cp, bam-lora, PEFT, mergekit, axolotl (ROUNDS=5; LARGE=1: also an 8 B model)"
	@echo "make bench-precision   what is left of the deltas after many folds, ours and three others"
	@echo "make bench-overhead   the loop beside plain SFTTrainer, on 8 M and 100 M (ROUNDS=5; FULL=1: hours)"
	@echo "make bench-estimates  what check estimates of memory and disk against whole runs, 8 M to 500 M"
	@echo "make bench-allocations  what a step allocates on a GPU at 8 B, counted without one (needs a C++ compiler, torch for CPUs)"
	@echo "make bench-gpu    an 8 B model on consumer cards: memory, speed beside TRL, fold (MINUTES=30; needs a GPU)"
	@echo "make test-recipes every pair of a base, a goal and a language of the recipes, four minutes"
	@echo "make test-slow    the tests that take minutes"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "error: Python >= 3.11 not found; install it or set PYTHON=/path/to/python"; exit 1; fi
	@echo "setting up .venv with $(PYTHON) (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

quickstart: $(READY)
	@$(BIN)/bam-lora quickstart

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(TEST_JOBS) --dist loadfile

# An environment of its own, pinned for one Python; where pip takes torch with CUDA, it is a download of 3 GB.
OLDEST_PYTHON ?= python3.12
OLDEST := .venv-oldest
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@if ! $(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then \
		echo "error: constraints-oldest.txt is for Python 3.12; $(OLDEST_PYTHON) is not: set OLDEST_PYTHON=/path/to/python3.12"; exit 1; fi
	@echo "setting up $(OLDEST) with $(OLDEST_PYTHON) (a few minutes the first time)"
	@$(OLDEST_PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[test]'
	@touch $@

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -m "not slow and not gpu" -n $(TEST_JOBS) --dist loadfile

test-recipes: $(READY)
	$(BIN)/python -m pytest -m slow -n $(TEST_JOBS) tests/test_recipes_run.py -k every_pair

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pictures: quickstart
	$(BIN)/python tests/make_report_pictures.py quickstart

docs: $(READY)
	$(BIN)/python -m bam_lora.recipe_reference

site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/real_text/run.py

HOURS ?= 6
JOBS ?= 1
bench-forgetting: $(READY)
	$(BIN)/python benchmarks/forgetting/run.py --hours $(HOURS) --jobs $(JOBS) $(if $(SUBSET),--subset $(SUBSET))

ROUNDS ?= 5
bench-fold: $(READY)
	$(BIN)/python benchmarks/fold/run.py --rounds $(ROUNDS) $(if $(LARGE),--large)

bench-precision: $(READY)
	$(BIN)/python benchmarks/precision/run.py

bench-overhead: $(READY)
	$(BIN)/python benchmarks/overhead/run.py --rounds $(ROUNDS) $(if $(FULL),--full)

bench-estimates: $(READY)
	$(BIN)/python benchmarks/estimates/run.py

bench-allocations: $(READY)
	$(BIN)/python benchmarks/allocations/run.py

MINUTES ?= 30
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu/run.py --minutes $(MINUTES)

clean:
	rm -rf .venv .venv-oldest quickstart site
