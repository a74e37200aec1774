"""The look of the report: one column of sections, cards in a grid, light or dark as the reader's system asks."""

STYLE = """
:root { color-scheme: light dark; --ground: #f7f7f5; --card: #ffffff; --ink: #1c1d1f; --muted: #6b6f76; --grid: #e3e4e6;
  --blue: #1f6fb5; --orange: #c8560a; --green: #12805c; --violet: #8a4fb8; --right: #1a9c5b; --wrong: #d43d35; --caution: #b26a00; }
@media (prefers-color-scheme: dark) { :root { --ground: #141517; --card: #1c1e21; --ink: #e6e7e9; --muted: #979ca5; --grid: #33363b;
  --blue: #6cb4ee; --orange: #f2994a; --green: #4cc38a; --violet: #c08ae6; --right: #3ccb7f; --wrong: #ff6b61; --caution: #e8a33d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; }
header p { flex-basis: 100%; margin: 0; color: var(--muted); overflow-wrap: anywhere; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 12px; letter-spacing: -0.005em; }
h3 { font-size: 13px; margin: 0 0 6px; font-weight: 600; }
.state { font-size: 12px; padding: 1px 9px; border-radius: 99px; border: 1px solid currentColor; }
.good { color: var(--green); } .caution { color: var(--caution); }
.note { color: var(--muted); margin: -8px 0 12px; }
.card, .tiles div { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 16px; margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin: 24px 0 0; }
dt { font-size: 13px; color: var(--muted); }
dd { margin: 0; font-size: 12.5px; color: var(--muted); font-variant-numeric: tabular-nums; }
dt + dd { font-size: 29px; line-height: 1.25; font-weight: 600; color: var(--ink); letter-spacing: -0.02em; }
aside { border-left: 3px solid var(--caution); padding: 2px 0 2px 14px; margin: 20px 0 0; }
aside ul { margin: 0; padding-left: 18px; } aside summary { cursor: pointer; }
code { font: 12px ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 12px; }
section > .card, section > .grid { margin-top: 12px; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figcaption, .card p { color: var(--muted); font-size: 12.5px; margin: 6px 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; color: var(--muted); }
.numbers { width: 100%; } .numbers td, .numbers th { padding: 7px 0; border-bottom: 1px solid var(--grid); text-align: right; }
.numbers th:first-child { text-align: left; } .numbers tr:last-child > * { border-bottom: 0; color: var(--ink); font-weight: 600; }
.pairs { width: 100%; font-size: 13px; } .pairs th, .pairs td { padding: 2.5px 0; vertical-align: top; }
.pairs th { padding-right: 14px; width: 52%; } .pairs td { overflow-wrap: anywhere; } .none { color: var(--muted); }
.columns { columns: 3 320px; column-gap: 12px; } .columns .card { break-inside: avoid; margin-bottom: 12px; }
.two { columns: 2 380px; column-gap: 40px; } .two tr { break-inside: avoid; }
.scroll { overflow-x: auto; } .fit { width: fit-content; max-width: 100%; }
.pictures th { font-size: 12px; text-align: center; padding-bottom: 4px; } .pictures td { padding: 3px; text-align: center; }
.pictures img { display: block; width: 104px; height: 104px; border-radius: 4px; } .pixels { image-rendering: pixelated; }
.sheet div { width: 92px; } .sheet img { width: 92px; height: 92px; border: 4px solid transparent; border-radius: 7px; }
.sheet small { display: block; font-size: 11px; line-height: 1.35; color: var(--muted);
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.sheet .right img { border-color: var(--right); } .sheet .wrong img { border-color: var(--wrong); } .sheet .query { padding-right: 20px; }
@media print { body { background: none; } .card { break-inside: avoid; } }
"""
