"""Python imports this module when it starts, in the programs that the tests run.

Keras imports scikit-learn and Matplotlib where it finds them: a second of every program. What it
wants them for, no test uses. A program that imports them by itself gets them.
"""

import sys

_LEFT_OUT = ("sklearn", "matplotlib")


class WithoutForKeras:
    """Among ``sys.meta_path``: to Keras, some packages are not installed."""

    def find_spec(self, name, path=None, target=None):
        """None: where a package is, others know."""
        if name in _LEFT_OUT:
            frame = sys._getframe(1)
            while frame is not None and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is not None and frame.f_globals.get("__name__", "").startswith("keras.src."):
                raise ImportError(f"{name} is left out of Keras in the tests")
        return None


sys.meta_path.insert(0, WithoutForKeras())
