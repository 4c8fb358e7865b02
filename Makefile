# The commands a person and CI share. Ten-line recipes; everything else is `kilotok`.
PYTHON ?= python3
VENV   ?= .venv
SPEC   ?= specs/tiny-llama4-cpu.yaml
BIN    := $(VENV)/bin

.PHONY: demo test check bench install clean

install: $(VENV)/installed
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (about two minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check torch -c constraints.txt 2>$(VENV)/pip.log || { tail -5 $(VENV)/pip.log; exit 1; }
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt 2>>$(VENV)/pip.log || { tail -5 $(VENV)/pip.log; exit 1; }
	@touch $@

demo: install
	@$(BIN)/kilotok run $(SPEC); code=$$?; $(BIN)/kilotok drain $(SPEC); exit $$code

test: install
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

check: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy specs tasks flows engine_plugins

bench: install
	$(BIN)/python -m tasks.validate.selftest --users 1 64
	$(BIN)/python -m engine_plugins.native.bench --acceptance 2.5 --users 1 16 \
	  --bundle $$(ls -td .kilotok/store/artifacts/build_engine/*/ | head -1) # of the last `make demo`

clean:
	rm -rf $(VENV) .kilotok
