"""The documentation, built strictly, and the built pages in a browser: `tox -e docs`.

Needs the extra `docs`, and for the browser Chromium; CONTRIBUTING.md says how to install both.
"""

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from urllib.parse import unquote

import pytest
from paths import ROOT

for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml", "nbconvert"):
    pytest.importorskip(package, reason="needs the extra `docs`: tox -e docs")

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = pytest.mark.neutral
in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium: apt-get install chromium"
)

# Opens every page in a frame, one after the other, and reports how wide it is at each width.
FRAMES = """<!doctype html><title>frames</title><body><script>
(async () => {
  const found = [];
  for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style = "border:0;height:900px;width:1280px";
    frame.src = page;
    await new Promise(done => { frame.onload = done; document.body.append(frame); });
    const root = frame.contentDocument.documentElement;
    for (const width of [1280, 390]) {
      frame.style.width = `${width}px`;
      await new Promise(done => setTimeout(done, 50));
      found.push([page, width, root.clientWidth, root.scrollWidth]);
    }
    frame.remove();
  }
  document.body.textContent = "MEASURED" + JSON.stringify(found) + "END";
})();
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """The HTML of each page, by its path."""
    return {
        path.relative_to(site).as_posix(): path.read_text("utf-8")
        for path in sorted(site.rglob("*.html"))
    }


def test_nothing_is_loaded_from_another_server(site, pages):
    loaded = re.compile(
        r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc="([^"]*)"|<link\b[^>]*\bhref="([^"]*)\""""
    )
    in_styles = re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""")
    for name, page in pages.items():
        for found in loaded.findall(page):
            assert not re.match("(?:https?:)?//", "".join(found)), (name, found)
    for style in site.rglob("*.css"):
        assert not in_styles.search(style.read_text("utf-8")), style
    assert len(pages) > 90


def test_every_link_within_the_site_leads_to_a_place(site, pages):
    """Also those that the build writes by itself, which its own check does not see."""
    places = {name: set(re.findall(r'\bid="([^"]+)"', page)) for name, page in pages.items()}
    for name, page in pages.items():
        if name == "404.html":
            continue
        for target in re.findall(r'<a\b[^>]*\bhref="([^"]*)"', page):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = unquote(html.unescape(target)).partition("#")
            file = ((site / name).parent / path).resolve() if path else site / name
            assert file.exists(), (name, target)
            if anchor and not anchor.startswith("__"):
                assert anchor in places[file.relative_to(site).as_posix()], (name, target)


def test_names_of_the_api_have_their_place_and_their_signature(pages):
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE):
            assert f'id="{name}"' in pages[f"api/{page.stem}.html"], name
    trainer = pages["api/trainer.html"]
    for part in ("Parameters:", "Returns:", "Raises:", "Examples:", "resume_from_checkpoint"):
        assert part in trainer
    link = '<a href="api/training-arguments.html#kbtrain.TrainingArguments">'
    assert f"{link}<code>TrainingArguments</code></a>" in pages["faq.html"]


def test_titles_say_what_is_in_the_page(pages):
    titles = [re.search("<title>(.*?)</title>", page)[1] for page in pages.values()]
    assert "Data: what can be passed, how it resumes, different lengths - kbtrain" in titles
    assert len(set(titles)) == len(pages)


def test_docstrings_are_read_as_markdown(pages):
    for name, page in pages.items():
        text = re.sub(r"<(script|pre|code|style)\b.*?</\1>", "", page, flags=re.DOTALL)
        assert not re.search(r":math:|\.\. math::|arithmatex|\$\$|>`_", text), name
    assert pages["api/optimizers-adam.html"].count("<math") > 30


def browse(folder, *options):
    """Run Chromium without a window; returns what it printed and what its console said."""
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={folder / 'profile'}", *options,
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


class Served:
    """A server of a folder, which is a proxy at the same time: every address that is asked for."""

    def __init__(self, folder):
        asked = self.asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                if self.path.startswith("http"):
                    asked.append(self.path)
                    self.send_error(404)
                else:
                    super().do_GET()

            def do_CONNECT(self):
                asked.append(self.path)
                self.send_error(404)

            def log_message(self, *given):
                pass

        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=folder)
        )
        self.address = f"127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def elsewhere(asked):
    """Without what the browser asks for by itself."""
    return [url for url in asked if not re.search(r"google(apis)?\.com|gvt1\.com", url)]


@in_a_browser
@pytest.mark.slow
def test_every_page_fits_and_asks_no_other_server(tmp_path, site, pages):
    shutil.copytree(site, tmp_path / "site")
    names = sorted(pages)
    (tmp_path / "site" / "frames.html").write_text(FRAMES.replace("PAGES", json.dumps(names)))
    with Served(tmp_path / "site") as served:
        printed, console = browse(
            tmp_path, f"--proxy-server={served.address}", "--window-size=1400,1000",
            "--hide-scrollbars", "--virtual-time-budget=100000",
            "--dump-dom", f"http://{served.address}/frames.html",
        )  # fmt: skip
    assert console == []
    assert elsewhere(served.asked) == []
    measured = json.loads(re.search(r"MEASURED(.*)END", printed)[1])
    assert [(name, width) for name, width, *_ in measured] == [
        (name, width) for name in names for width in (1280, 390)
    ]
    # In a frame of that width nothing is wider; a phone would scroll sideways.
    assert [found for found in measured if not found[1] == found[2] == found[3]] == []


@in_a_browser
@pytest.mark.slow
def test_search_works_in_a_folder(tmp_path, site):
    with Served(site) as served:
        printed, console = browse(
            tmp_path, f"--proxy-server={served.address}", "--virtual-time-budget=20000",
            "--dump-dom", f"{(site / 'index.html').as_uri()}?q=warmup_steps",
        )  # fmt: skip
    assert console == []
    assert elsewhere(served.asked) == []
    assert len(re.findall('<li class="md-search-result__item"', printed)) > 3
    assert re.search(r'href="[^"]*api/training-arguments\.html[^"]*#warmup_steps"', printed)
