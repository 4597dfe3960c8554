# Tasks for contributors: `just` lists them. Set up with `pip install -e ".[dev]"`.

_default:
    @just --list

# Check lint and format
lint:
    ruff check .
    ruff format --check .

# Check types: the package, the benchmarks, packages/metal-emulator
types:
    mypy

# Run all tests
test *args:
    python -m pytest {{ args }}

# Run all tests but the slow ones
test-fast *args:
    python -m pytest -m "not slow" {{ args }}

# Run the tests of the Metal kernels
test-kernels *args:
    python -m pytest -m kernels {{ args }}

# Measure speed and memory on this machine
bench *args:
    python -m mlx_rgemma.benchmark {{ args }}

# Build the documentation into build/site (needs the extra `docs`)
docs:
    mkdocs build --strict --site-dir build/site
