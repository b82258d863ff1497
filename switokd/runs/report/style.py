"""The look of the report's page: light and dark, wide and narrow, printed.

Not covered: the colours of a figure as a file (`figures.py`).
"""

CSS = """
:root {
  --ink: #111111; --soft: #55595f; --paper: #ffffff; --panel: #f6f7f8; --line: #d5d8dc;
  --hatch: #777777; --grid: #d8d8d8; --gap: #1f5fa8; --threshold: #c0392b; --paused: #e3a72f;
  --not-better: #e9e9e9; --green: #2e7d4f; --violet: #8e5ea2; --ochre: #b8860b; --stone: #4d4d4d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8eaed; --soft: #a9afb7; --paper: #15181c; --panel: #1e2228; --line: #3a4048;
    --hatch: #a0a0a0; --grid: #33383f; --gap: #7db4f0; --threshold: #ff8a7a; --paused: #8a6410;
    --not-better: #3a4048; --green: #74c796; --violet: #c79be0; --ochre: #e0b040;
    --stone: #b8b8b8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 58rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
main.several { max-width: 75rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.15rem; margin: 2.2rem 0 .7rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: .5rem 0; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
.columns {
  display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
}
figure { margin: 0; max-width: 38rem; }
figure svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; min-width: min(24rem, 100%); }
caption { text-align: left; color: var(--soft); padding: .2rem 0 .4rem; font-size: .875rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; vertical-align: top; }
tr > :last-child { padding-right: .2rem; }
thead th { border-bottom: 2px solid var(--line); white-space: nowrap; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody th { font-weight: 500; }
tr:has(.number) > * { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code { font: .85em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .2rem 0; }
:focus-visible { outline: 2px solid var(--gap); outline-offset: 2px; }
.caption { margin: .6rem 0 .25rem; font-size: .9rem; }
.bar { display: flex; height: 1.4rem; max-width: 46rem; border: 1px solid var(--soft); }
.bar i { flex-basis: 0; min-width: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0; }
.legend { font-size: .9rem; }
.legend i {
  display: inline-block; width: 1.6rem; height: .85rem; margin-right: .4rem;
  border: 1px solid var(--soft); vertical-align: -.08rem;
}
.part0 { background: var(--gap); }
.part1 {
  background: repeating-linear-gradient(45deg, var(--threshold) 0 3px, var(--paper) 3px 6px);
}
.part2 { background: var(--not-better); }
.part3 { background: repeating-linear-gradient(-45deg, var(--ink) 0 2px, var(--paused) 2px 6px); }
footer { margin-top: 3rem; color: var(--soft); font-size: .875rem; }
@media print { details { display: none; } section { break-inside: avoid; } }
"""
