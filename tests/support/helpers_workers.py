"""Data sets that worker processes import: NumPy only, so that a process starts quickly."""

import os
import random

import numpy as np


class Noisy:
    """22 samples that draw from the global generators, and say which process made them."""

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return 22

    def __getitem__(self, index):
        if index == self.broken:
            self.code_of_the_user()
        return {
            "x": np.full(3, index, np.float32),
            "noise": [random.random(), np.random.random()],
            "process": os.getpid(),
        }

    def code_of_the_user(self):
        raise OSError("a broken file")


class Fatal(Noisy):
    """A sample that kills its process, as running out of memory does."""

    def code_of_the_user(self):
        os._exit(9)


class Pairs:
    """Inputs and targets of a regression."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        x = np.random.default_rng(index).normal(size=3).astype(np.float32)
        return x + np.float32(0.1 * np.random.normal()), x[:1]
