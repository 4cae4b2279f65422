"""Stand-ins for packages of trackers: the calls their documentation describes, remembered.

``tests/trackers/test_real_packages.py`` runs the packages themselves, in the environment that
has them.
"""

import types


class Run:
    """What a stand-in remembers of one run."""

    def __init__(self, **kwargs):
        self.opened = kwargs
        self.rows = []
        self.params = {}
        self.finished = None
        self.id = self.name = kwargs.get("id") or kwargs.get("name") or f"run-{id(self)}"
        self.config = types.SimpleNamespace(update=lambda values, **_: self.params.update(values))
        self.info = types.SimpleNamespace(run_id=self.id)

    def values(self):
        return {(step, name): value for row, step in self.rows for name, value in row.items()}


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.run, self.runs = None, []

    def init(self, *, project, name, config, dir, id, resume):
        assert self.run is None
        run = Run(project=project, name=name, config=config, dir=dir, id=id, resume=resume)
        run.params = dict(config)
        run.define_metric = lambda name, step_metric=None, step_sync=None: None
        run.log = lambda row: run.rows.append((dict(row), row["train/global_step"]))
        run.finish = lambda exit_code=0: self._finish(run, exit_code == 0)
        self.run = run
        self.runs.append(run)
        return run

    def _finish(self, run, completed):
        assert self.run is run
        run.finished, self.run = completed, None


class FakeMlflow(types.ModuleType):
    def __init__(self):
        super().__init__("mlflow")
        self.active, self.runs, self.experiment = None, [], None

    def active_run(self):
        return self.active

    def set_experiment(self, name):
        self.experiment = name

    def start_run(self, run_id=None, run_name=None):
        assert self.active is None
        self.active = Run(id=run_id, name=run_name, project=self.experiment)
        self.runs.append(self.active)
        return self.active

    def log_params(self, params):
        assert len(params) <= 100
        assert all(isinstance(v, str) and len(v) <= 500 for v in params.values())
        assert not set(params) & set(self.active.params)
        self.active.params |= params

    def log_metrics(self, metrics, step):
        self.active.rows.append((metrics, step))

    def end_run(self, status="FINISHED"):
        self.active.finished, self.active = status == "FINISHED", None


class FakeTrackio(types.ModuleType):
    def __init__(self):
        super().__init__("trackio")
        self.runs = []

    def init(self, project, name=None, config=None, resume="never", embed=True):
        run = Run(project=project, name=name, config=config, resume=resume)
        run.params = dict(config)
        run.log = lambda metrics, step: run.rows.append((dict(metrics), step))
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


class FakeComet(types.ModuleType):
    def __init__(self):
        super().__init__("comet_ml")
        self.runs, self.running = [], None

    def get_running_experiment(self):
        return self.running

    def ExperimentConfig(self, **settings):  # noqa: N802
        return settings

    def start(self, project_name=None, experiment_key=None, mode=None, experiment_config=None):
        assert (mode == "get") == (experiment_key is not None)
        assert self.running is None or self.running.ended
        name = (experiment_config or {}).get("name")
        run = self.running = Run(project=project_name, name=name, id=experiment_key)
        run.ended, run.get_key = False, lambda: run.id
        run.log_parameters = run.params.update
        run.log_metrics = lambda values, step: run.rows.append((dict(values), step))
        run.end = lambda: (setattr(run, "finished", True), setattr(run, "ended", True))
        self.runs.append(run)
        return run


class FakeSwanLab(types.ModuleType):
    def __init__(self):
        super().__init__("swanlab")
        self.runs = []

    def init(self, *, project, name, config, log_dir, id, resume):
        assert (resume == "allow") == (id is not None)
        run = Run(project=project, name=name, config=config, id=id)
        run.params = dict(config)
        run.log = lambda values, step: run.rows.append((dict(values), step))
        run.finish = lambda state: setattr(run, "finished", state == "success")
        self.runs.append(run)
        return run


FAKES = {"comet_ml": FakeComet, "swanlab": FakeSwanLab} | {
    "wandb": FakeWandb,
    "mlflow": FakeMlflow,
    "trackio": FakeTrackio,
}
