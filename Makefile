# make demo | make test | make check | make bench | make graphs | make faults | make fuzz | make setup | make clean
# make coverage | make mutants: what the tests run, and what they notice
# make oldest | make newest | make packages | make audit: other versions and packages, which need the network
# Each sets up .venv first if that is not done yet; afterwards nothing needs the network.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check bench graphs faults fuzz coverage mutants setup clean oldest newest packages audit

demo: $(READY)
	@$(BIN)/quickspike demo

test: $(READY)
	@$(BIN)/python -m pytest

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# The short forms, beside what the long ones gave.
SHORT := results/bench/short

bench: $(READY)
	@$(BIN)/python bench/engines.py --models vgg16 resnet20 --steps 1 4 --repetitions 5 --out $(SHORT)/engines.json
	@$(BIN)/python bench/tuning_step.py --steps 2 --repetitions 3 --out $(SHORT)/tuning_step.json
	@$(BIN)/python bench/scaling.py --only steps depth calibration --repetitions 3 --out $(SHORT)/scaling.json
	@$(BIN)/python bench/startup.py --out $(SHORT)/startup.json

GRAPHS ?= 500

# Random networks, always the same ones: each converts rightly or is refused by name.
graphs: $(READY)
	@$(BIN)/python tests/test_random_graphs.py $(GRAPHS) results/random_graphs.json

KILLS ?= 50

# Commands killed, and without disk, permission, memory, at many moments: whole files, and the same result when they go on.
faults: $(READY)
	@$(BIN)/python tests/faults/campaign.py --kills $(KILLS)

# Spoiled files, recipes and images: each is read as what it is, or refused by name.
fuzz: $(READY)
	@$(BIN)/python tests/fuzz.py --out results/fuzz.json

# Lines of src that the tests run; numba, triton and other processes run some that are not seen.
coverage: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check pytest-cov
	@$(BIN)/python -m pytest --cov=quickspike --cov-report=term-missing:skip-covered --cov-fail-under=95

MUTANTS ?= 300

# Small changes of what matters most, drawn: how many does a test notice?
mutants: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check mutmut
	@$(BIN)/python tests/mutants.py --number $(MUTANTS) --out results/mutants.json

# All tests with the oldest versions that pyproject.toml allows, on the oldest Python, and with the newest that pip finds.
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= $(PYTHON)

oldest:
	@$(OLDEST_PYTHON) -m venv --clear .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	@.venv-oldest/bin/python -m pytest

newest:
	@$(NEWEST_PYTHON) -m venv --clear .venv-newest
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[test]'
	@.venv-newest/bin/python -m pytest

# A source package, a wheel made from it, and the demo from that wheel with nothing but the base dependencies.
packages: $(READY)
	@rm -rf dist build
	@$(BIN)/python -m build --outdir dist
	@$(PYTHON) -m venv --clear .venv-wheel
	@.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	@cd dist && ../.venv-wheel/bin/quickspike demo --out demo

# Known weaknesses of everything that the tests ran with.
audit: $(READY)
	@$(PYTHON) -m venv --clear .venv-audit
	@.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	@.venv-audit/bin/pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" --skip-editable --strict

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "quickspike needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.11")'
	@echo "setting up .venv (some minutes the first time: torch is large)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check]'
	@touch $(READY)

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-wheel .venv-audit build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
