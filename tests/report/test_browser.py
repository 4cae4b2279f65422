"""Pages opened in a real browser: no error in its console, no request, nothing cut off.

Skipped without Chromium: CONTRIBUTING.md says how to install it.
"""

import http.server
import re
import shutil
import subprocess
import threading

import pytest
from helpers_report import run_record

from kbtrain.report.comparison import render_comparison
from kbtrain.report.page import render

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.neutral,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium"),
]

MEASURE = """
<script>addEventListener("load", () => {
  const root = document.documentElement;
  const small = [...document.querySelectorAll("svg text, p, td, th, li")].filter(
    e => e.getBoundingClientRect().width && parseFloat(getComputedStyle(e).fontSize) < 10);
  console.log("MEASURED " + JSON.stringify(
    [root.scrollWidth, root.clientWidth, document.querySelectorAll("svg").length,
     small.length, getComputedStyle(document.body).backgroundColor]));
});</script>
"""


def browse(folder, page, *options):
    """Open a page; returns what the browser logged, and the addresses it asked a proxy for."""
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_CONNECT = do_GET

        def log_message(self, *given):
            pass

    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [
                BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                "--disable-background-networking", "--disable-component-update", "--no-first-run",
                f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000",
                f"--proxy-server=127.0.0.1:{server.server_port}",
                f"--screenshot={folder / 'screen.png'}", *options, path.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


def measurable(page):
    """The page with a script that measures it, which its own policy would not let run."""
    return without_policy(page).replace("</body>", MEASURE + "</body>")


def without_policy(page):
    return re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)


def pages():
    record = run_record()
    record.add_section("Own", '<img alt="" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">')
    wide = run_record("another")
    wide.facts = {**wide.facts, "output_dir": "/a/very/long/path" * 12}
    return {"one": render(record), "several": render_comparison([record, wide, run_record("c")])}


@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_browser_has_nothing_to_complain_about_and_loads_nothing(tmp_path, kind):
    console, asked = browse(tmp_path, pages()[kind], "--window-size=1280,2000")
    assert console == []
    assert [address for address in asked if "page" in address or "cdn" in address] == []
    assert (tmp_path / "screen.png").stat().st_size > 20_000


@pytest.mark.parametrize("kind", ["one", "several"])
def test_it_fits_on_a_phone(tmp_path, kind):
    console, _ = browse(tmp_path, measurable(pages()[kind]), "--window-size=390,2000")
    (line,) = [line for line in console if "MEASURED" in line]
    scroll, client, pictures, small = map(
        int, re.search(r"\[(\d+),(\d+),(\d+),(\d+)", line).groups()
    )
    assert scroll == client
    assert client <= 500
    assert pictures >= 4
    assert small == 0


def test_the_policy_stops_what_a_section_would_load(tmp_path):
    record = run_record()
    record.add_section("Own", '<img alt="" src="http://example.invalid/cdn.png">')
    page = render(record)
    console, asked = browse(tmp_path, page)
    assert [address for address in asked if "cdn" in address] == []
    assert any("Content Security Policy" in line for line in console)
    _, asked = browse(tmp_path, without_policy(page))
    assert [address for address in asked if "cdn" in address] != []
