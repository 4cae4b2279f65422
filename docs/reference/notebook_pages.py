"""A hook of the build: each notebook of the documentation becomes a page, with its outputs.

nbconvert writes it as Markdown, so that it has the theme, the search and the links of other pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

SOURCE = "https://github.com/kbtrain/kbtrain/blob/main/docs/"


class NotebookFile(File):  # type: ignore[misc]
    """A notebook as a source of a page, as Markdown is one."""

    def is_documentation_page(self) -> bool:
        """True; MkDocs itself goes by the ending of the name."""
        return True


def on_files(files: Files, config: Any) -> Files:
    """Called with all files of the documentation, before any page is made."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            for made in pages(file, config):
                files.append(made)
    return files


def pages(file: File, config: Any) -> list[File]:
    """The page of a notebook, and its pictures."""
    path = Path(file.src_uri)
    text, resources = MarkdownExporter().from_filename(
        file.abs_src_path,
        resources={"unique_key": path.stem, "output_files_dir": path.stem},
    )
    title, rest = text.replace("![png]", "![What the cell draws]").strip().split("\n", 1)
    note = f"This page is [a notebook]({SOURCE}{file.src_uri}) as it was run."
    page = NotebookFile(
        file.src_uri, config["docs_dir"], config["site_dir"], config["use_directory_urls"]
    )
    page.content_string = f"{title}\n\n{note}\n{rest}\n"
    pictures = [
        File.generated(config, (path.parent / name).as_posix(), content=content)
        for name, content in resources["outputs"].items()
    ]
    return [page, *pictures]
