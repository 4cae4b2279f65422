"""Compare built packages with the repository: ``check_packages.py FOLDER`` of a wheel and an sdist.

The source distribution holds every file that git knows and nothing else; the wheel every file of
the two packages.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# What building adds.
BUILT = ("PKG-INFO", "setup.cfg", "kbtrain.egg-info/")
PACKAGES = ("kbtrain/", "optim/")


def main(folder: Path) -> int:
    """Print each file that is missing or too many; 1 if there is one."""
    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, check=True, timeout=60
    )
    known = set(listed.stdout.splitlines())
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(source) as archive:
        members = [member.name for member in archive.getmembers() if member.isfile()]
        found = {name.partition("/")[2] for name in members}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if name.startswith(PACKAGES)}
    packages = {name for name in known if name.startswith(PACKAGES)}
    problems = [
        *(f"{source.name} lacks {name}" for name in sorted(known - found)),
        *(f"{source.name} has {n}" for n in sorted(found - known) if not n.startswith(BUILT)),
        *(f"{wheel.name} lacks {name}" for name in sorted(packages - installed)),
        *(f"{wheel.name} has {name}" for name in sorted(installed - packages)),
    ]
    print("\n".join(problems) or f"{len(found)} and {len(installed)} files, as in the repository")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
