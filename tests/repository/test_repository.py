"""Rules that hold for the repository as a whole: who imports whom, and what is left out."""

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

import kbtrain
import optim

pytestmark = pytest.mark.core

SOURCES = sorted([*ROOT.glob("kbtrain/**/*.py"), *ROOT.glob("optim/**/*.py")])
FRAMEWORKS = {"torch", "tensorflow", "jax", "jaxlib", "optax", "flax"}
BACKEND_FOLDERS = ("kbtrain/backends/", "optim/kernels/")
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for child in ast.iter_child_nodes(tree):
        if is_type_checking(child):
            continue
        yield child
        yield from runtime_nodes(child)


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all modules that ``tree`` imports, also inside functions and by string."""
    names: set[str] = set()
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func).rpartition(".")[2]:
            names |= {
                a.value for a in node.args if isinstance(a, ast.Constant) and type(a.value) is str
            }
    return names


def top_levels(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imported(tree)}


def framework_of(path: Path) -> str:
    """The framework that a file may import: the name of its folder below a backend folder."""
    for folder in BACKEND_FOLDERS:
        if relative(path).startswith(folder):
            return relative(path).removeprefix(folder).split("/")[0].removesuffix(".py")
    return ""


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def asks_for_backend(source: str) -> bool:
    """Whether code looks at which framework Keras runs on."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("backend.backend"):
            return True
        if isinstance(node, ast.Constant) and node.value == "KERAS_BACKEND":
            return True
    return False


def test_the_rules_below_look_at_something():
    assert len(SOURCES) > 20
    assert top_levels(ast.parse("def f():\n    from torch.nn import Module")) == {"torch"}
    assert top_levels(ast.parse("importlib.import_module('jax.numpy')")) == {"jax"}
    assert top_levels(ast.parse("if TYPE_CHECKING:\n    import torch")) == set()
    assert asks_for_backend("keras.backend.backend() == 'jax'")
    assert asks_for_backend("os.environ['KERAS_BACKEND']")
    assert not asks_for_backend("keras.backend.floatx()")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_framework_is_imported_in_its_own_backend_file_only(path):
    allowed = {framework_of(path)}
    if "jax" in allowed:
        allowed |= {"jaxlib"}
    assert top_levels(parse(path)) & FRAMEWORKS <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_the_backend_folders_ask_which_backend_it_is(path):
    # For another process, and for this one before Keras is imported.
    chooses = relative(path) in ("kbtrain/plan/process.py", "kbtrain/cli/train/backend.py")
    if not relative(path).startswith(BACKEND_FOLDERS) and not chooses:
        assert not asks_for_backend(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_the_two_packages_do_not_import_each_other(path):
    other = "optim" if relative(path).startswith("kbtrain/") else "kbtrain"
    assert other not in top_levels(parse(path))


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if relative(p).startswith("optim/")], ids=relative
)
def test_optim_needs_keras_and_numpy_only(path):
    own = {framework_of(path)} - {""}
    if path.stem == "plotting":  # imported when something is drawn, and not before
        assert "matplotlib" not in {
            alias.name
            for node in parse(path).body
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        own = {"matplotlib"}
    if framework_of(path) == "torch":  # comes with PyTorch, where it has GPUs
        own.add("triton")
    assert top_levels(parse(path)) <= {"keras", "numpy", "optim", *own, *sys.stdlib_module_names}


PRIVATE = ("keras.src", "jax._src", "jax.extend", "tensorflow.python", "torch._")
WITH_A_PLAIN_WAY = {
    "kbtrain/utils/packages/keras_private.py",
    "kbtrain/utils/packages/tensorflow_import.py",
    "kbtrain/checkpoint/keras_layout.py",
    "kbtrain/checkpoint/load_weights.py",
    "kbtrain/backends/whole_batch.py",
    "kbtrain/backends/jax/conv_layout.py",
    "kbtrain/backends/jax/target.py",
    "kbtrain/backends/tensorflow/device.py",
    "kbtrain/backends/tensorflow/flops.py",
    "kbtrain/backends/tensorflow/optimizer.py",
    "kbtrain/backends/tensorflow/processes.py",
    # The runner imports them when it records a step, and continues without them.
    "kbtrain/backends/torch/capture/step.py",
    "kbtrain/backends/torch/capture/keras_overrides.py",
    "kbtrain/backends/torch/capture/random.py",
    "kbtrain/backends/torch/capture/trace.py",
    "optim/kernels/jax/inplace_order.py",
    "optim/kernels/tensorflow/inplace_order.py",
    "optim/kernels/torch/__init__.py",
    "optim/core/precision.py",
}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_private_modules_are_imported_only_where_there_is_a_plain_way(path):
    if any(name.startswith(PRIVATE) for name in imported(parse(path))):
        assert relative(path) in WITH_A_PLAIN_WAY


def test_the_lowest_versions_are_those_of_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    chosen = ("jax", "cli", "tensorboard", "optuna", "grain", "examples")
    bounds = {}
    for requirement in [*project["dependencies"], *(r for e in chosen for r in extras[e])]:
        name, _, version = requirement.partition(",")[0].partition(">=")
        bounds[name] = version
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert bounds.keys() <= pins.keys()
    del bounds["ml_dtypes"]  # JAX, with which they are tried, asks for a newer one
    for name, bound in bounds.items():
        assert (pins[name] + ".").startswith(bound + "."), name


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_can_unpickle(path):
    assert not top_levels(parse(path)) & UNSAFE
    assert "allow_pickle=True" not in path.read_text(encoding="utf-8")


def test_imports_have_no_cycles():
    modules = {}
    for path in SOURCES:
        name = relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        modules[name] = path
    graph = {}
    for name, path in modules.items():
        wanted = {target for target in imported(parse(path)) if target in modules}
        # A package's __init__ gathers what its modules hold; they may name it ("from x import y").
        parts = name.split(".")
        graph[name] = wanted - {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("kbtrain.training.train_step") < order.index("kbtrain.trainer.trainer")
    assert order.index("kbtrain.training.loop") < order.index("kbtrain.trainer.trainer")


def functions_of(backend: str) -> dict[str, ast.FunctionDef | ast.ImportFrom]:
    """The functions that a backend's modules define, by name."""
    folder = ROOT / "kbtrain" / "backends"
    found = {}
    shared = [*folder.glob("*.py"), ROOT / "kbtrain" / "utils" / "packages" / "keras_private.py"]
    for path in [*(folder / backend).rglob("*.py"), *shared]:
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, node)
    return found


def test_each_backend_fulfils_the_protocol():
    wanted = {
        method.name: method
        for file, name in (("protocol", "Backend"), ("step_program", "CompilesAhead"))
        for node in parse(ROOT / f"kbtrain/backends/{file}.py").body
        if isinstance(node, ast.ClassDef) and node.name == name
        for method in node.body
        if isinstance(method, ast.FunctionDef)
    }
    assert len(wanted) > 30
    for backend in ("jax", "tensorflow", "torch"):
        names = exported_by(backend)
        assert {"name", "TAKES_STRINGS"} <= names
        functions = functions_of(backend)
        for name, method in wanted.items():
            assert name in names, f"{backend} has no {name}"
            assert_accepts(functions[name].args, method.args, f"{backend}.{name}")


def exported_by(backend: str) -> set[str]:
    """The names in a backend's own module."""
    names = set()
    for node in parse(ROOT / "kbtrain/backends" / backend / "__init__.py").body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def assert_accepts(own: ast.arguments, wanted: ast.arguments, what: str) -> None:
    """The arguments of the protocol come first, in its order; what is more has a default."""
    expected = [a.arg for a in wanted.args[1:]]
    given = [a.arg for a in own.args]
    assert given[: len(expected)] == expected, what
    assert len(own.defaults) >= len(wanted.defaults) + len(given) - len(expected), what
    assert (own.vararg is None) == (wanted.vararg is None), what


def loaded_after(code: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after ``code``."""
    program = f"{code}\nimport sys, json\nprint('modules', *sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    line = next(line for line in result.stdout.splitlines() if line.startswith("modules "))
    return set(line.split()[1:])


def test_trainer_loads_no_framework_that_keras_does_not_load():
    plain = loaded_after("import keras") & FRAMEWORKS
    ours = loaded_after("import kbtrain, optim\nkbtrain.Trainer\noptim.AdamW") & FRAMEWORKS
    assert plain, "Keras loads its backend"
    assert ours == plain


def test_import_kbtrain_loads_neither_keras_nor_a_framework():
    assert not loaded_after("import kbtrain") & {"keras", *FRAMEWORKS}


@pytest.mark.parametrize("package", [kbtrain, optim], ids=lambda p: p.__name__)
def test_public_names_exist_and_are_documented(package):
    assert list(package.__all__) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__doc__, name
        assert name in dir(package)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kbtrain.no_such_name


def test_every_file_states_the_same_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert kbtrain.__version__ == project["version"]
    assert f"\nversion: {kbtrain.__version__}\n" in citation
    # The newest section is what is not released yet, or the version itself.
    assert re.findall(r"^## \[(.+)\]", changelog, re.MULTILINE)[:2] == [
        "Unreleased",
        kbtrain.__version__,
    ]


def test_the_changelog_has_one_line_per_change_under_known_headings():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    body = lines[lines.index("## [Unreleased]") :]
    assert {line for line in body if line.startswith("### ")} <= {
        f"### {kind}" for kind in ("Added", "Changed", "Fixed", "Performance")
    }
    assert [line for line in body if line.startswith(" ")] == []


def folders_of_the_tree() -> set[str]:
    """The folders that CONTRIBUTING.md draws, as paths."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    drawn = text.partition("## The tree\n\n```text\n")[2].partition("```")[0]
    found, path = set(), []
    for line in drawn.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, purpose = line.strip().partition("/")
        assert purpose.strip(), f"{name} has no purpose"
        path = [*path[:depth], name]
        found.add("/".join(path))
    return found


def test_contributing_draws_every_folder_and_no_other():
    files = [path for top in ("kbtrain", "optim", "tests") for path in ROOT.glob(f"{top}/**/*.py")]
    folders = {p for path in files for p in path.relative_to(ROOT).parents}
    expected = {p.as_posix() for p in folders if p != Path()}
    assert folders_of_the_tree() - {"docs", "examples", "benchmarks"} == expected


def test_ci_runs_the_environments_of_tox():
    envs = re.search(r"^env_list = (.+)$", (ROOT / "tox.ini").read_text("utf-8"), re.MULTILINE)[1]
    names = re.sub(r"py311-\{(.+?)\}", lambda m: "py311-" + m[1].replace(",", ", py311-"), envs)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert sorted(re.findall(r"\{ env: ([\w-]+),", workflow)) == sorted(names.split(", "))


def test_packages_say_that_they_are_typed():
    for package in (kbtrain, optim):
        assert (Path(package.__file__).parent / "py.typed").exists()


def test_every_example_is_run_by_a_test():
    tests = (ROOT / "tests/integration/test_examples.py").read_text(encoding="utf-8")
    examples = sorted(path.name for path in ROOT.glob("examples/*.py"))
    assert examples
    assert [name for name in examples if f'"{name}"' not in tests] == []


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    needles = [os.sep + "work" + os.sep, os.sep + "tmp" + os.sep + "venvs"]
    files = [
        path
        for pattern in ("*.md", "*.toml", "*.ini", "*.yml", ".ci/run", "docs/**/*.md",
                        "kbtrain/**/*.py", "optim/**/*.py", "tests/**/*.py", "examples/*.py",
                        "benchmarks/**/*.py")
        for path in ROOT.glob(pattern)
    ]  # fmt: skip
    assert len(files) > 40
    found = [
        relative(path)
        for path in files
        if any(needle in path.read_text(encoding="utf-8") for needle in needles)
    ]
    assert found == []


WAITING = ("subprocess.run", "subprocess.check_output", "subprocess.check_call", "subprocess.call")


@pytest.mark.parametrize("folder", ["tests", "examples", "benchmarks", "docs", "kbtrain"])
def test_every_wait_for_another_process_has_a_limit(folder):
    """A child that hangs would hang the whole suite, without a word which test it was."""
    endless = [
        f"{relative(path)}:{node.lineno}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in WAITING
        and "timeout" not in {keyword.arg for keyword in node.keywords}
    ]
    assert endless == []
