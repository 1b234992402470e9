# The few commands of daily work. Everything runs in .venv, which is made from pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: test finetune lint format clean

test: $(STAMP)
	$(VENV)/bin/python -m pytest

# SmolLM2-135M with GraLoRA on Python's standard library, in minutes on a laptop's CPU
finetune: $(STAMP)
	$(VENV)/bin/gralora finetune --use_gralora --lora_target_modules all-linear --max_steps 40 --batch_size 4 \
		--max_seq_length 96 --val_set_size 32 --learning_rate 5e-4 --logging_steps 2 --output_dir outputs/finetune --verify

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) outputs build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
