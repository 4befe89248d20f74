.DEFAULT_GOAL := help
.PHONY: help lint test test-slow demo bench

help: ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

lint: ## style and imports
	uv run ruff check . && uv run ruff format --check .

test: ## the tests, as CI runs them
	uv run pytest -n 2

test-slow: ## the long ones, which CI leaves out
	uv run pytest -m slow

demo: ## the demo: pool to leaderboard
	uv run pipeline/run.py --config configs/demo.yaml

bench: ## every hot path beside what a user would pick instead
	uv run benchmarks/run.py
