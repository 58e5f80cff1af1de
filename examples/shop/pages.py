"What the shop shows besides the components of fh_saas. A child of a tag is escaped; nothing here is put together from text and tags."
from fasthtml.common import *
from shops import SHOPS

css = Style('''
:root { color-scheme: light dark; background: light-dark(#fff, #14181d); color: light-dark(#1c2128, #e6eaef); --line: light-dark(#ddd, #444); --soft: light-dark(#57606a, #a8b0ba) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem } a { color: light-dark(#0b5cad, #6cb2ff) }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2rem } nav a { margin-right: 1rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top; padding: .5rem .75rem .5rem 0; border-bottom: 1px solid var(--line) }
button { font: inherit; padding: .4rem .9rem } small { color: var(--soft) }
.tasks { display: grid; grid-template-columns: max-content 1fr; gap: .75rem 1rem; align-items: center }
@media (max-width: 40rem) { .tasks { grid-template-columns: 1fr; gap: .25rem } .tasks small { margin-bottom: .75rem } }''')

hdrs = charset, viewport, Script(src=htmxsrc.src), css

def page(title, *body, shop=None):
    "A whole page"
    links = (A(SHOPS[shop], href=f'/{shop}'), A("Products", href=f'/{shop}/products'), A("Dashboard", href=f'/jobs?tenant={shop}')) if shop else ''
    return Title(title), Nav(A("All shops", href='/'), links), Main(H1(title), *body)

def table(heads, rows): return Table(Thead(Tr(*map(Th, heads))), Tbody(*rows))
