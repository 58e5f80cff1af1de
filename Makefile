# `make demo` and `make test` do all the set-up by themselves, on a machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml settings.ini setup.py

.PHONY: demo test bench report soak export dist clean

demo: .venv/demo
	@$(BIN)/python examples/shop/main.py

test: .venv/test .venv/npm
	$(BIN)/python tools/check_exports.py
	$(BIN)/nbdev-test
	$(BIN)/python -m pytest -n 5 --dist worksteal

bench: .venv/bench  ## measurements side by side with peers; never a part of the tests
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.tenants
	$(BIN)/python -m benchmarks.mixed
	$(BIN)/python -m benchmarks.pages

report: .venv/test  ## the page of the benchmarks, made anew from the saved results
	$(BIN)/nbdev-test --save nbs/explains/03_benchmarks.ipynb
	$(BIN)/nbdev-clean --fname nbs/explains/03_benchmarks.ipynb

soak: .venv/test  ## the long variants of the fault tests
	$(BIN)/python -m pytest -o faulthandler_timeout=0 tests/soak_*.py

export: .venv/test  ## after editing notebooks: modules, outputs, README, llms.txt
	$(BIN)/nbdev-export
	$(BIN)/nbdev-test --save
	$(BIN)/nbdev-clean
	$(BIN)/python tools/check_exports.py --write

dist: .venv/test  ## wheel and sdist, each installed into an empty environment
	$(BIN)/python tools/check_dist.py

clean:
	rm -rf .venv build dist *.egg-info _docs _proc

.venv/python: 
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fh_saas needs Python 3.11 or newer; this is `$(PYTHON) --version`. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/demo: .venv/python $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[demo]'
	@touch $@

.venv/test: .venv/python $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev,test,demo,postgres]'
	@touch $@ .venv/demo

.venv/npm: tests/browser/package.json | .venv/python  ## what the tests in a browser serve to it
	@command -v npm >/dev/null || { echo 'There is no npm: the tests in a browser are skipped.'; exit 0; }; \
	mkdir -p $@ && cp $< $@ && npm install --prefix $@ --no-package-lock --no-audit --no-fund --ignore-scripts --loglevel=error && touch $@ || { rm -rf $@; exit 1; }

.venv/bench: .venv/test
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'
	@touch $@
