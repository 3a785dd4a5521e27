"""The frame of the report page: its style, its few lines of script, and the policy that keeps it from the network."""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from stageflow.report.charts import esc

_LIGHT: Final = """--bg:#f6f6f4;--card:#fff;--ink:#1c1e21;--soft:#60656d;--line:#e2e2de;--faint:#efefec;--good:#1f7a4d;
--bad:#c0392b;--warn:#a86a00;--accent:#2b5fd0;--async:#7c5cd6;--thread:#2f7ed8;--process:#d9622b;--other:#6b7280;
--dask:#a8791a;--ray:#0e8f7e;--badbg:#fbe9e7;--goodbg:#e3f3ea;--warnbg:#fdf1da"""
_DARK: Final = """\
--bg:#131518;--card:#1b1e22;--ink:#e7e8ea;--soft:#9aa1ab;--line:#2d3138;--faint:#24282d;--good:#5cc794;
--bad:#ff8a7a;--warn:#e6b35c;--accent:#86aaff;--async:#a993f0;--thread:#6fb0f5;--process:#f2935f;--other:#a3abb8;
--dask:#e0b355;--ray:#4cc9b6;--badbg:#3b211f;--goodbg:#17332a;--warnbg:#3a2e17"""

STYLE: Final = (
    ":root{color-scheme:light dark;" + _LIGHT + "}"
    "@media(prefers-color-scheme:dark){:root:not([data-theme=light]){" + _DARK + "}}"
    ":root[data-theme=dark]{" + _DARK + "}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1320px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 12px;font-weight:650}
header{display:flex;gap:16px;justify-content:space-between;align-items:flex-start;flex-wrap:wrap}
.sub,.more,small{color:var(--soft)}
.sub{margin:4px 0 0;font-size:13px;overflow-wrap:anywhere}
.more{font-size:13px;margin:8px 0 0}
.state{display:flex;gap:12px;align-items:center}
.took{font-size:20px;font-variant-numeric:tabular-nums}
.pill{padding:3px 12px;border-radius:99px;font-weight:600;font-size:14px;background:var(--faint)}
.pill.completed{background:var(--goodbg);color:var(--good)}
.pill.failed{background:var(--badbg);color:var(--bad)}
.pill.cancelled{background:var(--warnbg);color:var(--warn)}
.pill.running::before{content:"";display:inline-block;width:8px;height:8px;border-radius:9px;background:var(--accent);
margin-right:7px}
.why{background:var(--badbg);color:var(--bad);padding:10px 14px;border-radius:8px;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:12em;overflow:auto;margin:16px 0 0}
.verdict{border-left:3px solid var(--accent);padding:4px 0 4px 16px;margin:22px 0}
.verdict p{margin:0;font-size:17px}
.verdict ul{margin:8px 0 0;padding-left:20px;color:var(--soft)}
.verdict b{color:var(--ink)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin-top:18px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;margin:0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.cards .bad dd{color:var(--bad)}
dt{color:var(--soft);font-size:12.5px}
dd{margin:0;font-size:19px;font-variant-numeric:tabular-nums}
dd small{display:block;font-size:12px}
.scroll{overflow-x:auto;margin:0 -20px;padding:0 20px}
svg.graph{display:block;margin:0 auto;font-family:inherit;max-width:none}
.graph .edge{fill:none;stroke:var(--soft);stroke-width:1.4;opacity:.65}
.graph .tip{fill:var(--soft)}
.graph .box{fill:var(--card);stroke:var(--line);stroke-width:1.2}
.graph .fail .box{stroke:var(--bad);fill:var(--badbg)}
.graph .some .box{stroke:var(--bad)}
.graph .skip,.graph .pending{opacity:.5}
.graph .skip .box,.graph .cancel .box{stroke-dasharray:4 3}
.graph .name{font-size:13.5px;font-weight:600;fill:var(--ink)}
.graph .sub{font-size:11px;fill:var(--soft)}
.graph .track{fill:var(--faint)}
.async{--c:var(--async)}.thread{--c:var(--thread)}.process{--c:var(--process)}.inline,.other{--c:var(--other)}
.dask{--c:var(--dask)}.ray{--c:var(--ray)}
.graph .stripe,.graph .bar,.strip rect{fill:var(--c,var(--other))}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:6px 6px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--soft);font-weight:500;font-size:12.5px;position:sticky;top:0;background:var(--card)}
.sortable thead th{cursor:pointer}
tbody th{font-weight:600;max-width:260px;overflow:hidden;text-overflow:ellipsis;position:sticky;left:0;
background:var(--card)}
tbody tr:last-child>*{border-bottom:0}
.n,thead th.n{text-align:right}
td.bad,td.fail{color:var(--bad);font-weight:600}
td.skip,td.cancel{color:var(--warn)}
.lane{border-left:3px solid var(--c,var(--other));padding-left:7px}
.waits{display:inline-flex;width:64px;height:8px;border-radius:4px;overflow:hidden;background:var(--faint);
margin-right:8px;vertical-align:middle}
.waits i{display:block;height:100%;background:var(--other)}
.waits .w-slot{background:var(--process)}.waits .w-upstream{background:var(--other)}
.waits .w-downstream{background:var(--thread)}.waits .w-bytes,.waits .w-memory{background:var(--bad)}
.waits .w-token,.waits .w-rate{background:var(--warn)}.waits .w-approval,.waits .w-retry{background:var(--async)}
.strips{display:grid;gap:3px}
.strips+.strips{margin-top:20px}
.row{display:grid;grid-template-columns:minmax(60px,150px) 1fr;gap:12px;align-items:center}
.row .label{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;font-size:13px;text-align:right;color:var(--soft)}
.strip{width:100%;height:22px;background:var(--faint);border-radius:4px}
.strip rect{opacity:.85}
.ticks{display:flex;justify-content:space-between;color:var(--soft);font-size:12px}
.plot{position:relative}
.plot svg{width:100%;height:150px;display:block;border-bottom:1px solid var(--line);border-top:1px dashed var(--line)}
.plot .top{color:var(--soft);font-size:12px}
.plot polyline{fill:none;stroke:var(--k,var(--accent));stroke-width:1.8;vector-effect:non-scaling-stroke;
stroke-linejoin:round}
.plot .limit{stroke:var(--bad);stroke-width:1.2;stroke-dasharray:5 4;vector-effect:non-scaling-stroke}
.keys{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin-top:6px}
.key{overflow-wrap:anywhere}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--k,var(--accent));
vertical-align:middle;margin-right:7px}
.rss,.line0{--k:var(--accent)}.live,.line1{--k:var(--process)}.limit{--k:var(--bad)}.line2{--k:var(--good)}
.line3{--k:var(--async)}.line4{--k:var(--warn)}.line5{--k:var(--other)}
details{border-bottom:1px solid var(--line);padding:8px 0}
details:last-child{border-bottom:0}
summary{cursor:pointer;overflow-wrap:anywhere}
summary code{color:var(--bad)}
summary .item{font-weight:400;color:var(--soft);margin-left:8px}
code,pre{font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
pre{background:var(--faint);border-radius:8px;padding:12px 14px;overflow-x:auto;margin:10px 0;max-height:30em}
.cmd{user-select:all}
.barcell{width:45%}
.barcell i{display:block;height:8px;border-radius:4px;background:var(--accent);min-width:2px}
.notes{list-style:none;margin:0;padding:0;font-size:14px}
.notes li{display:flex;gap:14px;padding:3px 0;overflow-wrap:anywhere}
.notes time{color:var(--soft);min-width:76px;text-align:right;flex:none}
.env{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:10px;margin:0}
.env dd{font-size:14px;overflow-wrap:anywhere}
footer{margin-top:24px;color:var(--soft);font-size:13px;display:flex;justify-content:space-between;gap:12px}
button{font:inherit;color:inherit;background:none;border:1px solid var(--line);border-radius:8px;padding:2px 10px;
cursor:pointer}
@media(max-width:640px){main{padding:18px 12px 40px}section{padding:14px}.scroll{margin:0 -14px;padding:0 14px}
h1{font-size:22px}.cards{grid-template-columns:repeat(2,1fr)}.row{grid-template-columns:76px 1fr;gap:8px}
.plot svg{height:120px}.slow td:last-child,.slow .barcell{display:none}tbody th{max-width:130px}}
@media print{body{background:#fff}section{break-inside:avoid}button{display:none}}
"""
)

SCRIPT: Final = """
document.addEventListener("click",function(e){
 var th=e.target.closest(".sortable thead th");
 if(th){var i=th.cellIndex,b=th.closest("table").tBodies[0],up=th.dataset.up!=="1";
  th.closest("tr").querySelectorAll("th").forEach(function(o){delete o.dataset.up});th.dataset.up=up?"1":"0";
  var key=function(r){var c=r.cells[i];return c.dataset.v!==undefined?parseFloat(c.dataset.v):c.textContent};
  Array.from(b.rows).sort(function(x,y){var p=key(x),q=key(y);
   return (p<q?-1:p>q?1:0)*(typeof p==="number"?-1:1)*(up?1:-1)}).forEach(function(r){b.appendChild(r)})}
 if(e.target.id==="theme"){var r=document.documentElement,
  dark=r.dataset.theme?r.dataset.theme==="dark":matchMedia("(prefers-color-scheme: dark)").matches;
  r.dataset.theme=dark?"light":"dark"}
});
"""


def document(title: str, body: str, *, script: str = SCRIPT, live: bool = False) -> str:
    """A complete page around `body`.

    Only its own style and script run; only the live page may connect, to its own server.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    connect = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{digest}'; connect-src {connect};"
        " base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><main><div id="body">\n{body}\n</div>'
        '<footer><span>Stageflow</span><button id="theme" type="button">light / dark</button></footer></main>'
        f"<script>{script}</script></body></html>\n"
    )
