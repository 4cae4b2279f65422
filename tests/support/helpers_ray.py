"""Runs under Ray Train, on a cluster of two nodes on this machine with a worker each.

``python helpers_ray.py TRAINER TASK``: the run of ``helpers_moving``; TRAINER is torch, jax or
tensorflow. ``python helpers_ray.py SCRIPT FOLDER``: the ``main`` of a script.
"""

import json
import os
import runpy
import sys
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig

VARIABLES = ("KERAS_BACKEND", "OMP_NUM_THREADS", "PYTHONPATH")


def train(task):
    """The training function: nothing in it is for Ray."""
    import helpers_moving

    helpers_moving.train(**task)


def trainer_class(name):
    """Ray's trainer for a framework."""
    if name == "torch":
        from ray.train.torch import TorchTrainer

        return TorchTrainer
    if name == "tensorflow":
        from ray.train.tensorflow import TensorflowTrainer

        return TensorflowTrainer
    from ray.train.v2.jax import JaxTrainer

    return JaxTrainer


@contextmanager
def two_nodes():
    """A cluster, and this program connected to it."""
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        variables = {name: os.environ[name] for name in VARIABLES}
        ray.init(
            address=cluster.address,
            logging_level="warning",
            log_to_driver=False,
            runtime_env={"env_vars": variables},
        )
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def fit(name, task):
    """Train on both nodes; a failure is forgiven once."""
    trainer_class(name)(
        train,
        train_loop_config=task,
        scaling_config=ScalingConfig(
            num_workers=2, resources_per_worker={"CPU": 1}, placement_strategy="STRICT_SPREAD"
        ),
        run_config=RunConfig(
            storage_path=f"{task['folder']}/ray", failure_config=FailureConfig(max_failures=1)
        ),
    ).fit()


if __name__ == "__main__":
    first, second = sys.argv[1:]
    with two_nodes():
        if first.endswith(".py"):
            runpy.run_path(first)["main"](second)
        else:
            fit(first, json.loads(second))
