"""A build backend of a few lines, for packages that tests install: no network, no build tools.

``pip`` runs it in the folder of a package (``build-backend = "helpers_plugin"``). It knows modules
in that folder and the entry points of its ``pyproject.toml``.
"""

import tomllib
import zipfile
from pathlib import Path


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Write a wheel of the package in the current folder; returns its name."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    label = f"{project['name'].replace('-', '_')}-{project['version']}"
    info = f"{label}.dist-info"
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    files = {path.name: path.read_text(encoding="utf-8") for path in Path().glob("*.py")}
    files.pop(Path(__file__).name)
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = "\n".join(groups)
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = f"{label}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel
