"""A run under Ray Train on two nodes, in which a worker may be killed.

``python ray_program.py TRAINER FOLDER [KILLED]``: TRAINER is torch, jax or tensorflow. The worker
of rank 1 kills itself at update KILLED of the first attempt; Ray starts both again.
"""

import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig


def train(config):
    """The training function: what a script without Ray would have, and how the worker ends."""
    import keras
    import numpy as np

    from kbtrain import Trainer, TrainerCallback, TrainingArguments
    from kbtrain.utils.processes import current

    folder = Path(config["folder"])
    group = current()

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            with (folder / f"begun.{group.rank}").open("a") as file:
                print(state.global_step, group.size, os.getpid(), file=file)

        def on_step_end(self, args, state, control, **kwargs):
            first = not (folder / "killed").exists()
            if group.rank == 1 and state.global_step == config["killed"] and first:
                (folder / "killed").touch()
                os.kill(os.getpid(), 9)

    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dropout(0.2, seed=5),
            keras.layers.Dense(2),
        ]
    )
    x = np.random.default_rng(1).normal(size=(25, 4)).astype("float32")
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=12,
        per_device_train_batch_size=8,
        split_batches=True,
        learning_rate=0.05,
        logging_steps=4,
        save_steps=4,
        save_strategy="steps",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model, args, train_dataset=(x, np.tanh(x[:, :2] * x[:, 1:3])), loss="mse",
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(resume_from_checkpoint="auto")
    weights = {str(i): keras.ops.convert_to_numpy(v.value) for i, v in enumerate(model.variables)}
    np.savez(folder / f"weights.{group.rank}.npz", **weights)


def main():
    kind, folder, killed = sys.argv[1], Path(sys.argv[2]), int((*sys.argv, 0)[3])
    names = ("KERAS_BACKEND", "OMP_NUM_THREADS", "TF_CPP_MIN_LOG_LEVEL", "PYTHONPATH")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    if kind == "torch":
        from ray.train.torch import TorchTrainer as RayTrainer
    elif kind == "jax":
        from ray.train.v2.jax import JaxTrainer as RayTrainer
    else:
        from ray.train.tensorflow import TensorflowTrainer as RayTrainer
    node = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    ray.init(address=cluster.address, logging_level="warning", log_to_driver=False)
    try:
        RayTrainer(
            train,
            train_loop_config={"folder": str(folder), "killed": killed},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                storage_path=str(folder / "storage"),
                failure_config=FailureConfig(max_failures=1),
                worker_runtime_env={"env_vars": variables},
            ),
        ).fit()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
