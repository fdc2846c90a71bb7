"""The style sheet of the page: one column on a phone, two where there is room, both themes, and paper."""

from __future__ import annotations

from patchkit.report._palette import DARK, LIGHT, css_variables

_LAYOUT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;
overflow-wrap:break-word}
header,nav,main,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:15px;font-weight:600;color:var(--soft);margin:0 0 8px}
.headline{font-size:22px;line-height:1.34;font-weight:600;letter-spacing:-.01em;max-width:42em;margin:0 0 8px}
h2{font-size:18px;line-height:1.3;margin:0 0 4px;letter-spacing:-.005em}
h3{font-size:14px;line-height:1.35;margin:0 0 8px}
p{margin:0 0 10px;max-width:46em}
.note{color:var(--soft);font-size:13.5px}
.warn{border-left:3px solid var(--chosen);padding-left:10px}
nav{padding-top:8px;padding-bottom:2px;font-size:13.5px;display:flex;flex-wrap:wrap;gap:2px 16px}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
a{color:var(--s0);text-underline-offset:3px;text-decoration-thickness:1px}
:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
section{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:18px 20px 16px;margin:14px 0}
footer{padding-bottom:36px;color:var(--soft);font-size:13px}
code,pre,.tok{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.92em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));gap:10px;margin:14px 0 4px}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:9px 12px}
.tile b{display:block;font-size:22px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.tile.main{border-color:var(--s0);border-width:2px;padding:8px 11px}
.tile>span{color:var(--soft);font-size:13px;line-height:1.3;display:block}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:6px 28px;align-items:start}
.small{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,270px),1fr));gap:6px 20px}
.beside{display:flex;flex-wrap:wrap;gap:0 32px;align-items:flex-start}
.beside>figure{max-width:100%}
.beside>div{flex:1 1 300px;padding-top:10px}
.pair>*,.small>*,.cards>*{min-width:0}
"""

_TABLES = """
.scroll{overflow-x:auto;max-width:100%;margin:8px 0}
.scroll.t{container-type:inline-size}
table{border-collapse:collapse;font-size:13.5px;line-height:1.35;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:13.5px;padding:0 0 7px}
caption span{display:block;position:sticky;left:0;width:min(44em,100cqi)}
th,td{padding:4px 10px;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;border-bottom:1px solid var(--line)}
thead th{max-width:10em}
tbody th,tfoot th{font-weight:600;position:sticky;left:0;z-index:1;background:var(--panel)}
td .names{display:block;min-width:14em}
.n{text-align:right}
td.n{white-space:nowrap}
.groups th{text-align:center;padding-bottom:2px;border-left:10px solid var(--panel)}
.groups td{border:0}
td.h{background:rgb(var(--t)/var(--a));min-width:5.2em;border:2px solid var(--panel)}
td.own{outline:2px solid var(--chosen);outline-offset:-3px}
td.key{font-weight:700}
tr.mine>*{background:linear-gradient(rgb(var(--heat-rgb)/.12),rgb(var(--heat-rgb)/.12)),var(--panel)}
tr.mine>td.h{background:linear-gradient(rgb(var(--t)/var(--a)),rgb(var(--t)/var(--a))),var(--panel)}
tfoot th,tfoot td{font-weight:700;border-top:2px solid var(--line);border-bottom:0}
small{font-size:12px;color:var(--soft);font-weight:400}
"""

_PARTS = """
.fig{margin:8px 0}
.fig svg{display:block;max-width:100%;height:auto}
.fig svg *{stroke-linejoin:round;stroke-linecap:butt}
.fig.wide svg{max-width:none;margin:-6px 0 0 -14px}
.fig svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif!important}
figcaption{color:var(--soft);font-size:13.5px;max-width:46em}
.names code,.none,.nb{white-space:nowrap}
.edge{display:inline-block;max-width:100%}
.names{line-height:1.9}
.names code{border:1px solid var(--line);border-radius:4px;padding:1px 5px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:10px;margin:10px 0}
.card{border:1px solid var(--line);border-radius:6px;padding:10px 12px}
.stack{display:grid;gap:10px;margin:10px 0}
.stack>*{min-width:0}
.prompt{display:grid;grid-template-columns:5.2em minmax(0,1fr);gap:8px;margin:0 0 7px;align-items:start}
.who{color:var(--soft);font-size:13px;padding-top:2px}
.toks{display:flex;flex-wrap:wrap;gap:3px;align-items:flex-start}
.tok{display:inline-block;border:1px solid var(--grid);border-radius:4px;padding:1px 5px;max-width:100%}
.tok mark{background:none;color:inherit;font-weight:700;text-decoration:underline;
text-decoration-thickness:2px;text-underline-offset:3px}
.tok.patched,.tok.query{outline:2px solid var(--chosen);border-color:transparent}
.tok small{font-family:system-ui,"Liberation Sans",sans-serif;display:block;line-height:1.2;text-align:center}
.tok.patched small{color:var(--chosen);font-weight:600}
.tok.w{background:rgb(var(--heat-rgb)/var(--a));text-align:center}
.tok.w small{color:var(--ink);min-height:1.2em;font-size:11.5px}
.yes{color:var(--good);font-weight:600}
.no{color:var(--chosen);font-weight:600}
dl{margin:8px 0}
dl>div{display:grid;grid-template-columns:minmax(7em,11em) minmax(0,1fr);gap:4px 14px;
padding:4px 0;border-bottom:1px solid var(--grid)}
dl>div:last-child{border-bottom:0}
dt{color:var(--soft)}
dd{margin:0}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(7em,1fr));gap:4px 12px;margin:8px 0 0}
.answers>div{display:block;border:0;padding:0}
.answers dt{font-size:12.5px;line-height:1.3}
.answers dd code{font-weight:700;font-size:15px;margin-right:5px}
.answers small{white-space:nowrap}
.answers small.yes{color:var(--good)}
.answers small.no{color:var(--chosen)}
pre{margin:8px 0;padding:10px 12px;border:1px solid var(--line);border-radius:6px;background:var(--paper);
overflow-x:auto;user-select:all;-webkit-user-select:all}
ul{margin:6px 0;padding-left:1.2em}
details{margin:4px 0}
summary{cursor:pointer;color:var(--s0)}
details code{line-height:1.9}
"""

_NARROW = """
@media (max-width:600px){
header,nav,main,footer{padding-left:12px;padding-right:12px}
header{padding-top:18px}
.headline{font-size:19px}
section{padding:14px 12px 12px}
th,td{padding:4px 7px}
.tiles{grid-template-columns:repeat(3,1fr);gap:6px}
.tile{padding:7px 8px}
.tile.main{padding:6px 7px}
.tile b{font-size:18px}
.tile>span{font-size:12px}
.prompt{grid-template-columns:1fr;gap:2px}
tbody th,tfoot th{max-width:9.5em}
dl>div{grid-template-columns:1fr;gap:0}
}
@media print{nav{display:none}section{break-inside:avoid;border:0;padding:8px 0}.scroll{overflow:visible}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""


def style_sheet() -> str:
    """The whole style sheet; nothing in it loads anything."""
    themes = (
        f":root{{color-scheme:light dark;{css_variables(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{css_variables(DARK)}}}}}"
    )
    return (themes + _LAYOUT + _TABLES + _PARTS + _NARROW).strip()
