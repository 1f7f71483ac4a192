# One command for each thing people do here. Everything that is built goes below $CARGO_TARGET_DIR (default: target);
# nothing else is written outside it, except the Debian packages that `test` and `demo` install.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
CARGO ?= cargo
# rustup's place, for a root shell that was not logged in to.
export PATH := $(HOME)/.cargo/bin:$(PATH)
export CARGO_TERM_PROGRESS_WHEN ?= never
DEMO = $${CARGO_TARGET_DIR:-target}/debug/examples/demo

.PHONY: help check fix test demo demo-stop bench soak deb

help:
	@echo 'make check      the house rules: format, lints, pure floors, tidy, licences; writes nothing'
	@echo 'make fix        format, apply what clippy can, write the golden help texts and the made parts of docs/ anew'
	@echo 'make test       set up, then all tests (root: network namespaces, real PostgreSQL and BIND)'
	@echo 'make demo       set up, then a failover of two real PostgreSQL nodes on this machine; KEEP=1 leaves it running'
	@echo 'make demo-stop  end what KEEP=1 left running'
	@echo 'make deb        the Debian package, in $${CARGO_TARGET_DIR:-target}/debian'
	@echo 'make soak-sim   the model with two deviations and 10,000 simulated schedules (a quarter of an hour)'
	@echo 'make soak       soak-sim, then for hours: races, crash points, power-offs, switchovers, randomized runs, bad weather; SOAK="power-off --rounds 3" runs one'
	@echo 'make bench      portcullis beside pgbouncer, HAProxy and pgpool-II on one PostgreSQL (half an hour); BENCH=quick: 3 minutes'

check:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --quiet --all-targets -- -D warnings
	$(CARGO) check --lib --no-default-features --locked --quiet
	$(CARGO) test --locked --quiet --test tidy
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny --locked check bans licenses sources; \
	else \
		echo 'check: cargo-deny is not installed, so licences and sources are not checked (cargo install cargo-deny --locked)'; \
	fi

fix:
	$(CARGO) clippy --locked --fix --allow-dirty --allow-staged --all-targets
	$(CARGO) fmt
	UPDATE_GOLDEN=1 $(CARGO) test --locked --quiet --test tidy -- help_texts_are_the_golden_ones the_book

test:
	packaging/setup.sh
	CARGO="$(CARGO)" tests/run.sh

demo: build-demo
	$(DEMO) $(if $(KEEP),--keep)

demo-stop: build-demo
	$(DEMO) --stop

.PHONY: build-demo
build-demo:
	packaging/setup.sh
	$(CARGO) build --locked --quiet --bin portcullis --example demo

# The program optimised as a release is, with the names of its functions; the bench itself measures nothing of its own
# speed and builds faster without.
bench:
	packaging/bench.sh
	$(CARGO) build --locked --quiet --profile measure --bin portcullis
	$(CARGO) build --locked --quiet --example bench
	target=$${CARGO_TARGET_DIR:-target}; LAB_PROGRAM=$$target/measure/portcullis $$target/debug/examples/bench $(BENCH)

soak: $(if $(SOAK),,soak-sim)
	packaging/setup.sh
	$(CARGO) build --locked --quiet --bin portcullis --example soak
	$${CARGO_TARGET_DIR:-target}/debug/examples/soak $(SOAK)
	$(if $(SOAK),,LAB_GUIDES=3 $(CARGO) test --locked --test lab guide_is_followed)

# The model with two deviations and 10,000 schedules of ten minutes, in virtual time: `soak` is an optimised build.
.PHONY: soak-sim
soak-sim:
	PORTCULLIS_MODEL_DEVIATIONS=2 PORTCULLIS_MODEL_SAMPLE=500 PORTCULLIS_SEEDS=10000 PORTCULLIS_SIM_SECONDS=600 \
		$(CARGO) test --locked --profile soak --lib --no-default-features -- --nocapture --test-threads 1 \
		no_history_with_so_many_deviations random_schedules_break_no_rule

deb:
	packaging/setup.sh deb
	$(CARGO) build --locked --release --bin portcullis
	packaging/deb.sh
