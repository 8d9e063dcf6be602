"""The benchmark suite: what `make benchmark` measures, and how. `run.py` beside this folder starts it."""
