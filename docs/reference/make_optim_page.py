"""Write the tables of docs/optim.md from the entry points: optimizers, schedules, names refused.

``python docs/reference/make_optim_page.py`` after an optimizer or a schedule has changed, with the
package installed again (entry points are read from its metadata). Only what stands between the
markers is written. ``tests/optim/test_docs_page.py`` compares.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "optim.md"
COUNTS = ("learning_rate", "num_warmup_steps", "num_training_steps")


def offers(group: str) -> dict[Any, list[str]]:
    """What this package registers in a group -> its names, the first one first."""
    found: dict[Any, list[str]] = {}
    for entry in sorted(distribution("kbtrain").entry_points, key=lambda entry: entry.name):
        if entry.group == group:
            found.setdefault(entry.load(), []).append(entry.name)
    for thing, names in found.items():
        # The name that is the class's own comes first, Transformers' names after it.
        names.sort(key=lambda name: (plain(name) != plain(thing.__name__), name))
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def plain(name: str) -> str:
    """A name without what names are written with."""
    return re.sub("[^a-z0-9]", "", name.lower())


def summary(thing: Any) -> str:
    """The first sentence of a docstring, as one line of a table."""
    text = inspect.cleandoc(thing.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    text = re.sub(r":math:`.*?`", "", text)
    text = re.sub(r"\s*:\s*\.?$", ".", re.sub(r"\s+", " ", text)).strip()
    return text.replace("|", "\\|")


def papers(thing: Any) -> str:
    """The papers a docstring links to."""
    links = re.findall(r"\[([^\]]+)\]\((https?://[^)]+)\)", thing.__doc__ or "")
    return ", ".join(f"[{' '.join(title.split())}]({url})" for title, url in links)


def own_arguments(thing: Any, common: tuple[str, ...]) -> str:
    """The arguments that not all have, with their defaults."""
    parameters = inspect.signature(thing).parameters.values()
    return ", ".join(
        f"`{p.name}`" if p.default is p.empty else f"`{p.name}={p.default!r}`"
        for p in parameters
        if p.name not in common and p.kind is not p.VAR_KEYWORD
    )


def optimizers() -> str:
    """The table of optimizers."""
    lines = ["| name | class | what it is | paper | other names |", "|---|---|---|---|---|"]
    for thing, names in offers("kbtrain.optimizers").items():
        own = thing.__module__.startswith("optim")
        what = summary(thing) if own else "Keras' own."
        name = f"optim.{thing.__name__}" if own else f"keras.optimizers.{thing.__name__}"
        others = ", ".join(f"`{other}`" for other in names[1:])
        paper = papers(thing) if own else ""
        lines.append(f"| `{names[0]}` | `{name}` | {what} | {paper} | {others} |")
    return "\n".join(lines)


def schedules() -> str:
    """The table of schedules."""
    lines = ["| name | class | what it is | its own arguments |", "|---|---|---|---|"]
    for thing, names in offers("kbtrain.schedules").items():
        shown = ", ".join(f"`{name}`" for name in names)
        lines.append(
            f"| {shown} | `optim.{thing.__name__}` | {summary(thing)} "
            f"| {own_arguments(thing, COUNTS)} |"
        )
    return "\n".join(lines)


def refused() -> str:
    """The table of names that are known and not offered."""
    lines = ["| name | why not, and what to use |", "|---|---|"]
    reasons: dict[str, list[str]] = {}
    for entry in sorted(distribution("kbtrain").entry_points, key=lambda entry: entry.name):
        if entry.group == "kbtrain.optimizers.refused":
            reasons.setdefault(entry.load(), []).append(f"`{entry.name}`")
    lines += [f"| {', '.join(names)} | {why} |" for why, names in reasons.items()]
    return "\n".join(lines)


def page() -> str:
    """The page with new tables."""
    text = PAGE.read_text(encoding="utf-8")
    tables = {"optimizers": optimizers(), "refused": refused(), "schedules": schedules()}
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = before + begin + "\n" + table + "\n\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print("wrote", PAGE)
