# make demo and make test work on a fresh machine with Python >= 3.10, a C++ compiler and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS ?= benchmarks/results
INPUTS ?= runs/quality-inputs
MINUTES ?= 9
TORCH_VERSION ?= 2.13.0
# Without an NVIDIA driver the CPU build of torch is a tenth of the download.
CPU_INDEX := https://download.pytorch.org/whl/cpu
STAMP := $(VENV)/.installed

.PHONY: demo test test-cpp test-python test-demo lint format docs bench gpu gpu-sweep gpu-quality clean

demo: $(STAMP)
	$(BIN)/plum run --preset demo --output runs/demo

test: lint test-cpp test-python test-demo

test-cpp: $(STAMP)
	$(BIN)/cmake -S . -B build -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" \
		-DPLUM_PYTHON=OFF -DPLUM_CUDA=OFF -DPLUM_TESTS=ON -DPLUM_WERROR=ON -DPLUM_SANITIZE=ON >/dev/null
	$(BIN)/cmake --build build
	$(BIN)/ctest --test-dir build --output-on-failure

test-python: $(STAMP)
	$(BIN)/python -m pytest tests -n auto --dist loadfile

# The demo from nothing; its generator must beat both baselines.
test-demo: $(STAMP)
	rm -rf runs/test-demo
	$(BIN)/plum run --preset demo --output runs/test-demo
	$(BIN)/python -c 'import json; \
		recall = {k: v["recall@10"] for k, v in json.load(open("runs/test-demo/metrics.json")).items()}; \
		assert recall["generator"] > max(recall["popularity"], recall["item_knn"]), recall'
	$(BIN)/plum recommend --run runs/test-demo --history "$$($(BIN)/python -c \
		'import polars; print(",".join(polars.read_parquet("runs/test-demo/data/items.parquet")["item_id"][:3]))')"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')

# The site in site/, with warnings as errors and without a network.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Small sizes in under ten minutes; FULL=1 for the sizes that figures are quoted from. Peers that
# are not installed are named in the report.
bench: $(STAMP)
	$(BIN)/python -c "import faiss, gin, lightning, marisa_trie, sklearn, superkmeans, threadpoolctl, \
		vector_quantize_pytorch, xgrammar" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet -e ".[bench]"
	mkdir -p $(RESULTS)
	$(BIN)/plum bench $(if $(FULL),--full) --output $(RESULTS)/cpu.json

# One call on a GPU machine without a network: build, GPU tests, compute-sanitizer, benchmarks.
# GPU_BUILD=0 takes the build that is there, CPU=1 adds the CPU benchmarks.
gpu:
	$(PYTHON) benchmarks/gpu_run.py $(RESULTS) --minutes $(MINUTES) \
		$(if $(filter 0,$(GPU_BUILD)),--no-build) $(if $(CPU),--cpu)

# The configurations of one Triton kernel on a GPU: KERNEL=trie_beam_step or residual_quantize.
KERNEL ?= trie_beam_step
gpu-sweep:
	$(PYTHON) -m benchmarks.sweep_gpu $(KERNEL) $(RESULTS)/sweep-$(KERNEL).json --minutes $(MINUTES)

# Recommendation quality on a GPU machine without a network, from what
# `python -m benchmarks.quality.recommendation prepare` wrote elsewhere.
gpu-quality:
	$(PYTHON) -m benchmarks.quality.recommendation run --preset gpu --inputs $(INPUTS) \
		--results $(RESULTS) --parallel 5 --minutes $(MINUTES)

# The editable install is redone when what it builds from has changed.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || \
		if command -v nvidia-smi >/dev/null; then \
			$(BIN)/python -m pip install "torch>=2.11"; \
		else \
			$(BIN)/python -m pip install "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
			$(BIN)/python -m pip install "torch==$(TORCH_VERSION)" --index-url $(CPU_INDEX); \
		fi
	$(BIN)/python -m pip install --quiet -e ".[pipeline,minilm,lora,triton,test,lint,build,docs]"
	touch $@

clean:
	rm -rf build dist runs .venv plum/*.so *.egg-info
