"""The parts of `benchmarks/gpu_run.py`."""
