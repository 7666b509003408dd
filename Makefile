# make demo | make test | make check | make bench | make graphs | make faults | make fuzz | make setup | make clean
# Each sets up .venv first if that is not done yet; afterwards nothing needs the network.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check bench graphs faults fuzz setup clean

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
	@$(BIN)/python tests/test_random_graphs.py $(GRAPHS)

KILLS ?= 50

# Commands killed, and without disk, permission, memory, at many moments: whole files, and the same result when they go on.
faults: $(READY)
	@$(BIN)/python tests/faults/campaign.py --kills $(KILLS)

# Spoiled files, recipes and images: each is read as what it is, or refused by name.
fuzz: $(READY)
	@$(BIN)/python tests/fuzz.py --out results/fuzz.json

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "quickspike needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.11")'
	@echo "setting up .venv (some minutes the first time: torch is large)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check]'
	@touch $(READY)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
