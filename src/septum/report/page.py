"""A run as one self-contained HTML page: a lane per CPU, a slider over the steps, the locks held at each."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Final

from septum.core.trace import Event
from septum.report.holders import held_spans

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8886; --mark: #e8b10055; --bad: #d0392b; --dim: #888; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; } p { margin: .25rem 0 1rem; }
.bar { position: sticky; top: 0; background: Canvas; padding: .5rem 0; border-bottom: 1px solid var(--line); }
.bar input { width: 100%; } .held { font-family: ui-monospace, monospace; min-height: 1.5em; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font: 13px/1.5 ui-monospace, monospace; }
th, td { text-align: left; vertical-align: top; padding: .1rem .6rem; border-left: 1px solid var(--line); }
th:first-child, td:first-child { width: 4rem; text-align: right; color: var(--dim); border-left: 0; }
td { overflow-wrap: anywhere; } tr.now td { background: var(--mark); } tr.later td { opacity: .35; }
.violation { color: var(--bad); font-weight: 600; } .busy { color: var(--bad); }
"""
_SCRIPT: Final = """
const rows = [...document.querySelectorAll('tbody tr')], slider = document.getElementById('at');
const held = document.getElementById('held'), number = document.getElementById('number');
function show(at) {
  rows.forEach((row, i) => { row.className = i === at ? 'now' : i > at ? 'later' : ''; });
  const now = spans.filter(s => s.first <= at && (s.last === null || at < s.last));
  held.textContent = now.length ? 'held: ' + now.map(s => s.lock + ' by ' + s.task).join(', ') : 'no lock is held';
  number.textContent = rows.length ? 'event ' + (at + 1) + ' of ' + rows.length : 'no events';
  if (rows[at]) rows[at].scrollIntoView({ block: 'nearest' });
}
slider.addEventListener('input', () => show(+slider.value));
rows.forEach((row, i) => row.addEventListener('click', () => { slider.value = i; show(i); }));
show(+slider.value);
"""


def run_page(events: Sequence[Event], title: str, verdict: str) -> str:
    """The page. Needs no network; works with the slider, its arrow keys, or a click on an event."""
    cpus = sorted({event.cpu for event in events})
    tasks = {cpu: ", ".join(dict.fromkeys(e.task for e in events if e.cpu == cpu)) for cpu in cpus}
    head = "".join(f"<th>CPU {cpu}<br><small>{html.escape(tasks[cpu])}</small></th>" for cpu in cpus)
    body = "\n".join(_row(event, cpus) for event in events)
    spans = [{"lock": s.lock, "task": s.task, "first": s.first, "last": s.last} for s in held_spans(events)]
    data = json.dumps(spans).replace("<", "\\u003c")
    last = max(len(events) - 1, 0)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{html.escape(title)}</h1><p>{html.escape(verdict)}</p>
<div class="bar"><label for="at">Step through the run: <span id="number"></span></label>
<input id="at" type="range" min="0" max="{last}" value="{last}"><div class="held" id="held"></div></div>
<table><thead><tr><th>step</th>{head}</tr></thead><tbody>
{body}
</tbody></table><script>const spans = {data};{_SCRIPT}</script></body></html>
"""


def _row(event: Event, cpus: Sequence[int]) -> str:
    kind = "violation" if event.kind == "violation" else "busy" if event.text.startswith("!") else ""
    text = f'<span class="{kind}">{html.escape(event.text)}</span>'
    cells = "".join(f"<td>{text if cpu == event.cpu else ''}</td>" for cpu in cpus)
    return f"<tr><td>{event.step}</td>{cells}</tr>"
