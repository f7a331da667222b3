"""The page's style sheet: one column, system fonts, light and dark, and fit to print."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfcfa; --card: #ffffff; --ink: #1d2126; --soft: #5d6670; --line: #e3e1dc; --accent: #0072b2;
  --set: #0072b2; --random: #c77d00; --full: #5d6670; --other: #00805a;
  --random-target: #a94f7d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e8e6e1; --soft: #9aa4ae; --line: #30363c; --accent: #56b4e9;
    --set: #56b4e9; --random: #e69f00; --full: #aab2ba; --other: #2bbd8c;
    --random-target: #df9cc2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 3.5rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 54rem; margin: 0 auto; }
header { margin-bottom: 2.5rem; }
.kind { margin: 0 0 .6rem; color: var(--soft); font-size: .875rem; letter-spacing: .02em; }
h1 { margin: 0; font-size: clamp(1.45rem, 3.6vw, 2.05rem); line-height: 1.28; font-weight: 640;
  letter-spacing: -.015em; text-wrap: balance; }
section { margin-top: 3rem; }
h2 { margin: 0 0 .9rem; font-size: 1.08rem; font-weight: 640; }
p { margin: .7rem 0; }
.quiet { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
.card + .quiet { margin-bottom: 1.4rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.25rem 1.4rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: .82rem; white-space: nowrap; }
th, td { padding: .45rem 1.1rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
th.right, td.right { text-align: right; }
td.excludes { font-weight: 640; color: var(--accent); }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; }
.stats div { border-top: 2px solid var(--line); padding-top: .6rem; }
.stats div.whole { border-top-color: var(--accent); }
.stats b { display: block; font-size: 1.3rem; font-weight: 640; font-variant-numeric: tabular-nums; }
.stats span { color: var(--soft); font-size: .86rem; }
.images { display: grid; grid-template-columns: minmax(2rem, max-content) 1fr; gap: .6rem 1.1rem;
  align-items: center; }
.images .name { color: var(--soft); font-size: .88rem; max-width: 11rem; overflow-wrap: anywhere; }
.images img, .label img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; }
.labels { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.5rem 2rem; }
.label { display: grid; grid-template-columns: 64px 1fr; gap: 1rem; align-items: start; }
.bar { display: grid; grid-template-columns: 1fr 3.6rem; gap: 0 .5rem; font-size: .84rem; line-height: 1.35;
  margin-bottom: .3rem; }
.bar .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar .share { text-align: right; color: var(--soft); font-variant-numeric: tabular-nums; }
.document { margin-bottom: 1rem; overflow-wrap: anywhere; }
.document p { margin: 0; white-space: pre-line; }
.document p.quiet { margin-bottom: .4rem; }
.bar i { grid-column: 1 / 3; height: 4px; border-radius: 2px; background: var(--line); overflow: hidden; }
.bar i::before { content: ""; display: block; height: 100%; width: var(--share); background: var(--accent); }
pre { margin: 0; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.5rem; margin: 0;
  font-size: .88rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2rem; }
details { border-top: 1px solid var(--line); padding: .8rem 0; }
details:last-child { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 560; }
details > :not(summary) { margin-top: .9rem; }
.plot { display: block; width: 100%; min-width: 34rem; height: auto; fill: var(--ink); font-size: 13px; }
.plot .student { font-weight: 640; }
.plot .tick { fill: var(--soft); text-anchor: middle; font-size: 12px; }
.plot .number { text-anchor: end; font-variant-numeric: tabular-nums; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .interval { stroke: var(--mark); stroke-width: 3; stroke-linecap: round; opacity: .55; }
.plot .seed { stroke: var(--mark); stroke-width: 1.25; opacity: .6; }
.plot .mark { fill: var(--mark); stroke: var(--card); stroke-width: 1.5; }
.plot .arm-set { --mark: var(--set); font-weight: 560; }
.plot .arm-random { --mark: var(--random); }
.plot .arm-random_target { --mark: var(--random-target); }
.plot .arm-full { --mark: var(--full); }
.plot .arm-other { --mark: var(--other); }
@media print {
  body { padding: 0; background: none; }
  section { break-inside: avoid; }
}
""".strip()
