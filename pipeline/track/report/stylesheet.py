"""How the pages look: one style sheet, light and dark, from 390 px to 1,600 px.

Series take the colours of Okabe and Ito (2008), which people with any kind of colour blindness tell apart; yellow, too
faint on white, is left out. Against a dark page they are lightened.
"""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --mat: #f5f6f8; --rule: #e0e3e8; --ink: #1c1f24; --faint: #626975; --link: #0072b2;
  --good: #00755a; --bad: #b34700; --busy: #0072b2; --tint: 0, 114, 178;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b5568f; --s4: #c98a00; --s5: #3c9bd6; --s6: #555b66;
    --s7: #7a5cc9;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --mat: #1d2127; --rule: #333942; --ink: #e8eaee; --faint: #a2a9b5; --link: #6cb8ec;
  --good: #4fc79f; --bad: #ff9a4d; --busy: #6cb8ec; --tint: 86, 180, 233;
  --s0: #56b4e9; --s1: #f58a3c; --s2: #2fc79a; --s3: #e09ac0; --s4: #f0b429; --s5: #9fd4f5; --s6: #b5bbc6;
    --s7: #ab95f0;
} }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(0.9rem, 2.5vw, 2.5rem) 4rem; max-width: 1560px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif;
  overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; font-weight: 650; }
h2 { margin: 2.6rem 0 0.4rem; font-size: 1.25rem; font-weight: 650; }
h3 { margin: 1.2rem 0 0.4rem; font-size: 1rem; font-weight: 600; }
p { margin: 0.4rem 0; } a { color: var(--link); }
small, .about, .note, .absent, figcaption, .legend, .xlabel { color: var(--faint); }
.about { max-width: 75ch; margin-bottom: 0.9rem; }
.absent { padding: 0.8rem 1rem; background: var(--mat); border-radius: 6px; }
.faults { padding: 0.6rem 1rem; border-left: 3px solid var(--bad); background: var(--mat); margin: 1rem 0; }
.faults ul { margin: 0; padding-left: 1.1rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 1.2rem 0 0; font-size: 0.93rem; }
nav a { text-decoration: none; }
header .title { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; align-items: center; }
.status { padding: 0.1rem 0.65rem; border-radius: 1rem; border: 1.5px solid; font-size: 0.86rem; font-weight: 600; }
.status.finished { color: var(--good); } .status.failed, .status.silent { color: var(--bad); }
.status.running, .status.killed { color: var(--busy); } .status.unknown { color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0.7rem; margin: 1.2rem 0; }
.tile { background: var(--mat); border-radius: 8px; padding: 0.65rem 0.9rem; min-width: 0; }
.tile span { display: block; color: var(--faint); font-size: 0.84rem; }
.tile strong { display: block; font-size: 1.3rem; font-weight: 620; line-height: 1.3; }
.tile small { display: block; font-size: 0.8rem; line-height: 1.35; }
data, .ys, .xs, .lane-name, .tile strong { font-variant-numeric: tabular-nums; }
pre { background: var(--mat); border-radius: 6px; padding: 0.8rem 1rem; overflow-x: auto; white-space: pre-wrap;
  margin: 0.5rem 0;
  font: 0.84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { margin: 0.6rem 0; } summary { cursor: pointer; color: var(--link); }
.columns { columns: 17rem; column-gap: 2rem; font-size: 0.84rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.89rem; min-width: min(100%, 36rem); }
td, th { text-align: left; padding: 0.28rem 1.6rem 0.28rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--faint); font-weight: 500; white-space: nowrap; }
td data, td code { white-space: nowrap; }
.best { font-weight: 700; color: var(--good); }
dl { margin: 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 0 2.5rem; }
dl div { display: grid; grid-template-columns: 9.5rem 1fr; gap: 0.8rem; padding: 0.28rem 0;
  border-bottom: 1px solid var(--rule); }
dt { color: var(--faint); } dd { margin: 0; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 1.4rem 2rem; }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 255px), 1fr)); }
.charts.small .area { height: 110px; }
figure { margin: 0; min-width: 0; } .chart figcaption { font-size: 0.86rem; margin-bottom: 0.25rem; }
.chart figcaption strong { color: var(--ink); font-weight: 600; font-size: 0.95rem; margin-right: 0.2rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0 0 0.25rem; padding: 0;
  font-size: 0.82rem; }
.swatch { display: inline-block; width: 1.1rem; height: 0; border-top: 3px solid; vertical-align: middle;
  margin-right: 0.35rem; }
.swatch.dashed { border-top-style: dashed; }
.plot { display: grid; grid-template-columns: 3.6rem 1fr; padding: 0.5rem 0.9rem 0 0; }
.ys { position: relative; }
.ys span { position: absolute; right: 0.45rem; transform: translateY(50%); line-height: 1; }
.ys, .xs { font-size: 0.76rem; color: var(--faint); white-space: nowrap; overflow-wrap: normal; }
.xs { position: relative; height: 1.25rem; margin: 0 0.9rem 0 3.6rem; }
.xs span { position: absolute; transform: translateX(-50%); top: 0.2rem; }
.xlabel { font-size: 0.78rem; text-align: center; margin-left: 3.6rem; }
.note { font-size: 0.78rem; margin: 0.15rem 0 0; }
.area { height: 190px; border-bottom: 1px solid var(--faint); }
svg { display: block; width: 100%; height: 100%; overflow-x: visible; overflow-y: clip; }
svg path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { stroke-width: 1.8; }
.line.thin { stroke-width: 1.2; opacity: 0.7; }
.dashed { stroke-dasharray: 6 4; } .dot { stroke-width: 5.5; stroke-linecap: round; }
svg .band { opacity: 0.25; stroke: none; } .mark { stroke-width: 1.3; stroke-dasharray: 3 3; }
.mark.start { stroke: var(--faint); } .mark.rollback { stroke: var(--bad); }
.s0 { stroke: var(--s0); border-color: var(--s0); } .s1 { stroke: var(--s1); border-color: var(--s1); }
.s2 { stroke: var(--s2); border-color: var(--s2); } .s3 { stroke: var(--s3); border-color: var(--s3); }
.s4 { stroke: var(--s4); border-color: var(--s4); } .s5 { stroke: var(--s5); border-color: var(--s5); }
.s6 { stroke: var(--s6); border-color: var(--s6); } .s7 { stroke: var(--s7); border-color: var(--s7); }
svg .band.s0 { fill: var(--s0); }
svg .band.s1 { fill: var(--s1); }
svg .band.s2 { fill: var(--s2); }
svg .band.s3 { fill: var(--s3); }
svg .band.s4 { fill: var(--s4); }
svg .band.s5 { fill: var(--s5); }
svg .band.s6 { fill: var(--s6); }
svg .band.s7 { fill: var(--s7); }
.shares { display: flex; height: 1.9rem; border-radius: 5px; overflow: hidden; margin: 0.6rem 0; }
.shares i, .key { background: var(--c); }
.key { display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 2px; margin-right: 0.5rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1.5rem 2.5rem;
  align-items: start; }
.timeline { display: grid; grid-template-columns: 11rem 1fr; gap: 0.25rem 0.8rem; align-items: center;
  font-size: 0.84rem; }
.lane { position: relative; height: 1.5rem; background: var(--mat); border-radius: 3px; }
.axis .xs, .axis .xlabel { margin: 0; }
.timeline { padding-right: 0.9rem; }
.lane span { position: absolute; top: 0.22rem; bottom: 0.22rem; width: 4px; margin-left: -2px; border-radius: 2px;
  background: var(--s6); }
.lane.skip span, .lane.rollback span, .lane.quarantine span { background: var(--s1); }
.lane.spike span { background: var(--s4); }
.lane.evaluation span { background: var(--s0); }
.lane.checkpoint span { background: var(--s5); }
.lane.version span { background: var(--s2); }
.progress { position: relative; height: 90px; border-bottom: 1px solid var(--faint); }
.progress .top { position: absolute; top: 0; left: 0.2rem; color: var(--faint); font-size: 0.76rem; }
.matrix { min-width: 0; max-width: 100%; font-size: 0.82rem; }
.matrix th, .matrix td { border: 0; padding: 0.22rem 0.3rem; }
.matrix td { text-align: center; min-width: 1.3rem; font-variant-numeric: tabular-nums; }
.matrix th[scope=col] { text-align: center; }
.matrix tbody th { max-width: 8rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  overflow-wrap: normal; }
.matrix td.part { background: rgba(var(--tint), calc(0.75 * var(--share))); }
.matrix td.full { background: var(--s0); color: var(--paper); font-weight: 600; }
.table td:first-child { min-width: 5.5rem; }
.results th:first-child, .results td:first-child { position: sticky; left: 0; background: var(--paper); }
.nought { color: var(--rule); } .corner { font-size: 0.74rem; white-space: nowrap; }
.matrix-picture { width: 100%; max-width: 620px; image-rendering: pixelated; border: 1px solid var(--rule);
  display: block; }
.insides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 600px), 1fr));
  gap: 1.6rem 2.5rem; }
.inside { display: grid; grid-template-columns: repeat(var(--tiles), minmax(0, var(--tile, 112px))); gap: 0.5rem;
  align-content: start; }
.picture-about { grid-column: 1 / -1; margin: 0; }
.inside figcaption { font-size: 0.78rem; text-align: center; line-height: 1.3; }
.map { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 4px; display: block; }
.map.whole { aspect-ratio: auto; }
.scene .inside + .inside { margin-top: 0.6rem; } .scene .inside:has(+ .inside) { --tile: 190px; }
.findings .inside:has(+ .inside) { --tile: 340px; }
.sheet { max-width: 100%; border-radius: 6px; }
footer { margin-top: 3rem; color: var(--faint); font-size: 0.84rem; border-top: 1px solid var(--rule);
  padding-top: 0.8rem; }
@media (max-width: 640px) {
  .timeline { grid-template-columns: 1fr; }
  .timeline .lane-name { margin-top: 0.35rem; }
  .timeline .lane-name:empty { display: none; }
  dl div { grid-template-columns: 7.5rem 1fr; } td, th { padding-right: 0.5rem; } table { font-size: 0.82rem; }
  .matrix th, .matrix td { padding: 0.15rem 0.1rem; min-width: 0; font-size: 0.74rem; }
  .matrix tbody th { max-width: 4.5rem; }
  .events td:first-child, .events th:first-child { min-width: 5.2rem; }
}
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""
