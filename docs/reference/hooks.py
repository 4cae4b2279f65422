"""Hooks of the build: equations become MathML, and names of the API links to their pages.

MathML is drawn by the browser itself, so that no script and no font has to be loaded for it.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
CODE = re.compile(r"<code>((?:kbtrain\.|optim\.)?\w+)</code>")
# No link inside of another one, nor in a heading.
NO_LINKS = re.compile(r"<(a|pre|h[1-6])\b.*?</\1>", re.DOTALL)


def api_pages(folder: Path) -> dict[str, str]:
    """The page of each public name.

    Args:
        folder: ``docs/api``.

    Returns:
        Full name -> name of the page that documents it.
    """
    return {
        name: page.stem
        for page in sorted(folder.glob("*.md"))
        for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
    }


def mathml(match: re.Match[str]) -> str:
    """An equation of pymdownx.arithmatex as MathML."""
    text, block = html.unescape(match[2]).strip(), match[1] == "div"
    if block and "&" in text:
        text = rf"\begin{{align*}}{text}\end{{align*}}"
    done: str = convert(text, display="block" if block else "inline")
    return done


def on_config(config: Any) -> Any:
    """The names are collected once."""
    pages = api_pages(Path(config["docs_dir"]) / "api")
    # Without its package a name is known if it is a class's: `names` and `get` are also words.
    short = {name.rpartition(".")[2]: name for name in pages}
    classes = {name: whole for name, whole in short.items() if name[0].isupper()}
    config["extra"] |= {"pages": pages, "names": classes | {name: name for name in pages}}
    return config


def on_page_content(content: str, page: Any, config: Any, **_: Any) -> str:
    """Called with the HTML of each page, without the theme around it."""
    # Title of the window and in the search: the heading, not the short form in the navigation.
    page.meta.setdefault("title", page.toc.items[0].title)
    content = EQUATION.sub(mathml, content)
    names, pages = config["extra"]["names"], config["extra"]["pages"]
    here, up = page.file.src_uri, "../" * page.file.src_uri.count("/")

    def linked(match: re.Match[str]) -> str:
        name = names.get(match[1])
        if name is None or here == f"api/{pages[name]}.md":
            return match[0]
        return f'<a href="{up}api/{pages[name]}.html#{name}">{match[0]}</a>'

    parts, end = [], 0
    for taboo in NO_LINKS.finditer(content):
        parts += [CODE.sub(linked, content[end : taboo.start()]), taboo[0]]
        end = taboo.end()
    return "".join([*parts, CODE.sub(linked, content[end:])])
