# Two commands from a fresh clone: `make serve` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8090
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: serve test setup check format hub demo bench torture fuzz bench-claims demo-train mutants-train clean

serve: .venv/mirror.stamp          ## run the mirror (HOST=0.0.0.0 for a LAN, ARGS="--cache-dir …")
	$(BIN)/nearhub serve --host $(HOST) --port $(PORT) $(ARGS)

test: .venv/test.stamp             ## the whole test suite (ARGS="-k …"), in JOBS=2 processes
	$(BIN)/python -m tests.clients.old_client
	$(BIN)/python -m tests.demo.models
	$(BIN)/python -m tests.faults.cache_tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

setup: .venv/test.stamp            ## everything: mirror, trainer (torch), Xet, tests
	$(PIP) -e '.[train,xet,test]'

check: .venv/test.stamp            ## style, types, import directions; under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/proxy/test_layers.py

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hub: .venv/test.stamp              ## the stand-in Hub alone
	$(BIN)/python -m tests.hub $(ARGS)

demo: .venv/test.stamp             ## two real models through the mirror, without the Internet
	$(BIN)/python -m tests.demo

demo-train: .venv/test.stamp       ## the trainer on four real bases, through a mirror, without the Internet
	$(BIN)/python -m pytest -s tests/trainer/test_end_to_end.py --durations=0

bench-claims: .venv/test.stamp     ## LoRA beside full fine-tuning: memory, steps to equal loss; three seeds, some minutes
	$(BIN)/python -m tests.trainer.claims

mutants-train: .venv/test.stamp    ## break each of the trainer's promises in a copy; a test has to go red
	$(BIN)/python -m tests.trainer.mutants

bench: .venv/test.stamp            ## the figures, side by side (ARGS="--only warm head --size 256 --rounds 3")
	$(BIN)/python -m tests.bench $(ARGS)

torture: .venv/test.stamp          ## kill -9 and power cuts for a long time (ARGS="--minutes 60"; needs root)
	$(BIN)/python -m tests.faults.torture $(ARGS)

fuzz: .venv/test.stamp             ## fuzz what reads other people's bytes (ARGS="--minutes 30 --only target ranges")
	$(BIN)/python -m tests.faults.fuzz $(ARGS)

clean:
	rm -rf .venv .venvs .cache build *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nearhub needs Python 3.11 or later: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv

.venv/mirror.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e .
	@touch $@

# gguf alone: it is there to read one file, and nothing of it goes over a network.
.venv/test.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[test]'
	$(PIP) --no-deps gguf
	@touch $@ .venv/mirror.stamp
