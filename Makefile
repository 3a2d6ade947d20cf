# The two commands of the README: `make demo` and `make test`. Both set up what they need in .venv, once.
#
#   PYTHON=python3.12     which Python makes the environment
#   TORCH="torch==2.13.0" which torch to install there (by default what pip finds; any from 2.11 on)
#   VENV=DIR              where the environment lies; one that exists and has torch is used as it is

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
RUNS ?= runs/demo

BIN := $(VENV)/bin
SYNTHFAST := $(BIN)/synthfast
NATIVE := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test soak bench setup clean
.DEFAULT_GOAL := demo

# The main job on the embedded data, as a user would type it: sample digits, train on them alone, test on real ones.
demo: $(VENV)/.installed
	@rm -rf $(RUNS)
	$(SYNTHFAST) sample --n 4000 --out $(RUNS)/samples
	$(SYNTHFAST) shards ls $(RUNS)/samples
	$(SYNTHFAST) train classifier --synthetic $(RUNS)/samples --fraction 1 --steps 400 --out $(RUNS)/classifier
	$(SYNTHFAST) score accuracy --classifier $(RUNS)/classifier --dataset digits:test --out $(RUNS)/accuracy.json
	@echo "The classifier saw no real image. The first samples: $(RUNS)/samples/preview.png"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

# Twenty kills of every command where `make test` makes three, and twenty times as many damaged files.
soak: $(VENV)/.installed-test
	SYNTHFAST_SOAK=20 $(BIN)/python -m pytest tests/faults/test_kills.py tests/faults/fuzzing

bench: $(VENV)/.installed-test
	$(BIN)/python -m bench

setup: $(VENV)/.installed-test

# The package is built against the torch that is installed, so torch comes first and the build is not isolated.
$(VENV)/.installed: $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing torch into $(VENV) (a few minutes)"; \
		$(BIN)/python -m pip install --quiet $(TORCH); }
	@echo "building synthfast"
	@$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja pybind11 numpy
	@$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	@touch $@

# The extra "test" of pyproject.toml, read from the installed package so that the native code is not built twice.
EXTRA_TEST := import importlib.metadata as m, sys; \
	print(*[r.split(";")[0] for r in m.requires("synthfast") if "test" in r.partition("extra ==")[2] \
	and ("Linux" not in r or sys.platform == "linux")], sep="\n")

$(VENV)/.installed-test: $(VENV)/.installed
	@$(BIN)/python -c '$(EXTRA_TEST)' | xargs -d '\n' $(BIN)/python -m pip install --quiet
	@# Peers that the tests compare with, without their requirements: they pin old versions of what is here already.
	@$(BIN)/python -m pip install --quiet --no-deps "robustbench==1.1.1" "torchattacks==3.5.1"
	@touch $@

clean:
	rm -rf build synthfast/*.so synthfast.egg-info $(VENV)/.installed $(VENV)/.installed-test
