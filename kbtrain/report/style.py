"""The style sheet and the script of a report; both are part of the page."""

DATA = "kbtrain-runs"
"""Id of the element of a page that holds the records of its runs as JSON."""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --panel: #f6f7f9; --text: #1c2024; --soft: #5b6470; --rule: #dde1e6;
  --accent: #1f5fbf; --good: #18794e; --bad: #b3261e; --warn: #8a5a00; --mark: #eaf4ee;
  --c0: #3b6fb6; --c1: #c8553d; --c2: #2f8f6b; --c3: #8a5fb5; --c4: #b58a1f; --c5: #4a8fa8;
  --c6: #b54a86; --c7: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171a; --panel: #1d2126; --text: #e6e8eb; --soft: #a0a8b2; --rule: #343a41;
    --accent: #8ab4f8; --good: #6cc795; --bad: #ff8a80; --warn: #e3b341; --mark: #1d2f26;
    --c0: #7fa8e0; --c1: #ec8a72; --c2: #66c29c; --c3: #bc97e0; --c4: #d9b451; --c5: #7fc0d6;
    --c6: #e085b8; --c7: #a3abb5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { margin: 0 0 .6rem; }
small, .note, .sub { color: var(--soft); font-size: .87rem; font-weight: normal; }
a { color: var(--accent); }
.status { font-size: 1.05rem; font-weight: 600; margin: .4rem 0 1rem; }
.status::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .5em;
  border-radius: 50%; background: var(--soft); }
.completed::before { background: var(--good); } .failed::before { background: var(--bad); }
.stopped::before { background: var(--warn); } .running::before { background: var(--accent); }
.error { border-left: 3px solid var(--bad); padding: .4rem .8rem; background: var(--panel);
  white-space: pre-wrap; }
.answers { display: grid; grid-template-columns: 2fr 3fr; gap: .9rem; }
.answers > div { display: flex; flex-direction: column; gap: .9rem; }
.answers > div > section { flex: auto; }
.answers section, .chart { background: var(--panel); border-radius: 8px; padding: .9rem 1rem;
  min-width: 0; }
.answers h2 { margin: 0 0 .4rem; font-size: .95rem; color: var(--soft); }
.answers .value { font-size: 1.5rem; font-weight: 600; margin: 0 0 .3rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: .9rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.x { text-anchor: middle; } svg text.x.end { text-anchor: end; }
svg text.y { text-anchor: end; }
svg .grid { stroke: var(--rule); stroke-opacity: 1; }
svg .axis { stroke: var(--soft); stroke-opacity: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 6 4; } svg circle.dashed { stroke: none; }
svg .mark { stroke: var(--soft); stroke-width: 1.4; stroke-dasharray: 2 4; }
svg .mark.best { stroke: var(--good); stroke-dasharray: 5 3; }
.line.c0 { stroke: var(--c0); } .dot.c0 { fill: var(--c0); } .key.c0 { background: var(--c0); }
.line.c1 { stroke: var(--c1); } .dot.c1 { fill: var(--c1); } .key.c1 { background: var(--c1); }
.line.c2 { stroke: var(--c2); } .dot.c2 { fill: var(--c2); } .key.c2 { background: var(--c2); }
.line.c3 { stroke: var(--c3); } .dot.c3 { fill: var(--c3); } .key.c3 { background: var(--c3); }
.line.c4 { stroke: var(--c4); } .dot.c4 { fill: var(--c4); } .key.c4 { background: var(--c4); }
.line.c5 { stroke: var(--c5); } .dot.c5 { fill: var(--c5); } .key.c5 { background: var(--c5); }
.line.c6 { stroke: var(--c6); } .dot.c6 { fill: var(--c6); } .key.c6 { background: var(--c6); }
.line.c7 { stroke: var(--c7); } .dot.c7 { fill: var(--c7); } .key.c7 { background: var(--c7); }
figcaption ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  margin: .4rem 0 0; padding: 0; font-size: .85rem; color: var(--soft); }
.key { display: inline-block; width: 1.1rem; height: 3px; margin-right: .45rem;
  vertical-align: middle; }
.key.dashed { height: 0; background: none; border-top: 2px dashed; }
.key.mark { width: 0; height: .9rem; border-left: 2px dotted var(--soft); background: none; }
.key.mark.best { border-left: 2px dashed var(--good); }
.key.dashed.c0 { color: var(--c0); } .key.dashed.c1 { color: var(--c1); }
.key.dashed.c2 { color: var(--c2); } .key.dashed.c3 { color: var(--c3); }
.key.dashed.c4 { color: var(--c4); } .key.dashed.c5 { color: var(--c5); }
.key.dashed.c6 { color: var(--c6); } .key.dashed.c7 { color: var(--c7); }
.scroll { overflow-x: auto; } .long { max-height: 32rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: normal; }
tbody th { font-weight: normal; color: var(--soft); }
td { max-width: 34rem; overflow-wrap: anywhere; }
table.n td, table.n thead th + th { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
tr.best > * { background: var(--mark); } tr.best th, tr.best td { color: var(--text); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 0 2rem; } .columns > section { min-width: 0; }
.copybox { position: relative; }
pre { margin: 0 0 .5rem; padding: .6rem 4.2rem .6rem .8rem; background: var(--back);
  border: 1px solid var(--rule); border-radius: 6px; font: 13px/1.45 ui-monospace, monospace;
  white-space: pre-wrap; }
.copy { position: absolute; top: .35rem; right: .35rem; font: inherit; font-size: .8rem;
  padding: .1rem .5rem; border: 1px solid var(--rule); border-radius: 5px; background: var(--panel);
  color: var(--text); cursor: pointer; }
.bar { display: flex; height: 1.1rem; border-radius: 5px; overflow: hidden; margin-bottom: .5rem;
  background: var(--panel); }
.bar i { display: block; height: 100%; }
.fill0 { background: var(--c0); } .fill1 { background: var(--c1); }
.fill2 { background: var(--c4); }
.fill3 { background: var(--c2); } .fill4 { background: var(--c7); }
.section img { max-width: 100%; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) {
  body { padding: 1rem; } h1 { font-size: 1.3rem; }
  .answers { grid-template-columns: 1fr; }
  svg text { font-size: 19px; } svg text.y { font-size: 16px; }
}
@media print {
  :root { --back: #fff; --panel: #fff; --text: #000; --soft: #444; --rule: #ccc; }
  body { max-width: none; padding: 0; font-size: 11pt; } .copy { display: none; }
  .chart, .answers section, tr { break-inside: avoid; } .scroll { max-height: none; }
  .chart, .answers section { border: 1px solid var(--rule); }
}
"""

SCRIPT = """
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try { await navigator.clipboard.writeText(code.textContent); }
    catch {
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
"""
