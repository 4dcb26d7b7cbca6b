# Thin: every command is a script in scripts/ that does its own set-up.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo demo-clean test lint install migrations bench docs package clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: ## Build, start a throwaway server in .demo/ and take the tour (REPO=path for another repository)
	@scripts/demo.sh

demo-clean: ## Stop the demo's server and remove .demo/
	@scripts/demo-clean.sh

test: ## Run everything on PostgreSQL 15 and, where it is found, 17 (PG="15 17 18" chooses)
	@scripts/test.sh

lint: ## Check format, clippy, docs and the rules for SQL
	@scripts/lint.sh

install: ## Build and install the extension into the server of PG_CONFIG=… (root may be needed)
	@scripts/setup.sh build && scripts/server.sh install

migrations: ## Write the plain install as migrations into DEST=…/supabase/migrations
	@test -n "$(DEST)" || { echo 'usage: make migrations DEST=path/to/supabase/migrations' >&2; exit 2; }
	@scripts/migrations.sh "$(DEST)"

bench: ## Measure; rewrites benches/README.md (PART='append fold' chooses, QUICK=1 is short)
	@scripts/bench.sh

docs: ## Rewrite docs/api.md from the comments in the database
	@scripts/docs.sh

package: ## Make an installable package with cargo-pgrx (PG=17 chooses) under target/package/
	@scripts/package.sh

clean: ## Remove what was built, private servers included
	@scripts/server.sh remove
	rm -rf target
