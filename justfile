# Short forms of the commands in CONTRIBUTING.md, for an environment set up as it says. `just` lists them.

default:
    @just --list

# The core on one backend, in two minutes on two cores: just core torch
core backend="jax":
    KERAS_BACKEND={{ backend }} OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3 pytest -q -n 2 -m core

# The fast tests of one backend, or some of them: just test torch tests/integration/test_resume.py
test backend="jax" *args:
    KERAS_BACKEND={{ backend }} OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3 \
        pytest -q -m "not slow and not cross" {{ args }}

# Style, types, imports and spelling
lint:
    tox -e lint

# The documentation, built strictly
docs:
    tox -e docs

# Write the generated pages of docs/ anew
pages:
    python docs/reference/make_table.py
    python docs/reference/make_optim_page.py
    python docs/reference/make_arguments.py

# Everything that CI runs
all:
    tox
