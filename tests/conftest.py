"""What every test needs: quiet frameworks. KERAS_BACKEND alone decides which one is tested."""

import os

# Read by TensorFlow and by JAX's compiler when they are imported, here and in subprocesses. Only
# fatal messages remain; an error of consequence is a Python exception, which this does not touch.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
