"What the shop shows. A child of a tag is escaped; nothing here is put together from text and tags."
import json
from fasthtml.common import *
from fh_saas.db_host import shown
from shops import SHOPS

FINISHED = 'completed', 'completed_with_warnings', 'failed', 'cancelled'

css = Style('''
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --soft: light-dark(#666, #aaa) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2rem } nav a { margin-right: 1rem }
table { border-collapse: collapse; width: 100% } th { font-weight: 600 }
th, td { text-align: left; vertical-align: top; padding: .5rem .75rem .5rem 0; border-bottom: 1px solid var(--line) }
th { white-space: nowrap } td:last-child { overflow-wrap: anywhere }
button { font: inherit; padding: .4rem .9rem }
form.start { display: grid; grid-template-columns: max-content 1fr; gap: .5rem 1rem; align-items: center }
pre { overflow: auto; padding: .75rem; border: 1px solid var(--line); border-radius: .4rem }
progress { width: 8rem } small { color: var(--soft) } .completed { color: light-dark(#18703a, #6fcf97) }
.completed_with_warnings { color: light-dark(#8a5a00, #f2c94c) } .failed { color: light-dark(#b3261e, #ff8a80) }''')

# Without the network there is no htmx; then the page loads itself again while a part of it would like to be replaced.
reload = Script("setInterval(() => { if (!window.htmx && document.querySelector('[hx-trigger]')) location.reload() }, 3000)")
hdrs = charset, viewport, Script(src=htmxsrc.src, defer=True), css, reload

def page(title, *body, shop=None, live=False):
    "A whole page; one with a `live` part comes again by itself where there is no JavaScript"
    links = (A(SHOPS[shop], href=f'/{shop}'), A("Products", href=f'/{shop}/products')) if shop else ''
    refresh = Noscript(Meta(http_equiv='refresh', content='3')) if live else ''
    return Title(title), Main(Nav(A("All shops", href='/'), links), H1(title), *body, refresh)

def live(url, *jobs, **kw):
    "Attributes of a part that replaces itself until all its jobs are finished"
    return {} if all(j.status in FINISHED for j in jobs) else dict(hx_get=url, hx_trigger='every 2s', hx_swap='outerHTML', **kw)

def table(heads, rows): return Table(Thead(Tr(*map(Th, heads))), Tbody(*rows))

def pretty(s):
    "JSON text as one reads it; other text as it is"
    try: return json.dumps(json.loads(s), indent=2, ensure_ascii=False)
    except (TypeError, ValueError): return s or ''

def outcome(job):
    "The result or the error in one line"
    try: res = json.loads(job.result or 'null')
    except ValueError: res = job.result
    if isinstance(res, dict): return ', '.join(f'{k} {v:,}' if isinstance(v, int) else f'{k} {v}' for k, v in res.items())
    return job.error_message or ('' if res is None else str(res)[:200])

def progress(job):
    if job.status in FINISHED or not job.progress_message and job.progress_percent is None: return ''
    return Progress(value=job.progress_percent or 0, max=100), Br(), Small(f'{job.progress_percent or 0}% {job.progress_message or ""}')

def attempts(job):
    "Failed attempts, and when the next one comes"
    failed = f'{job.retry_count} of {job.max_retries} failed' if job.retry_count else ''
    return failed, Small(f' next try {clock(job.run_at)}') if failed and job.status == 'pending' and job.run_at else ''

def clock(ts): return f'{shown(ts)[11:19]}Z' if ts else ''

def row(shop, job):
    "A job in the table of its shop"
    url = f'/{shop}/jobs/{job.id}'
    return Tr(Td(A(job.job_type, href=url)), Td(job.status.replace('_', ' '), cls=job.status), Td(progress(job)), Td(attempts(job)),
        Td(clock(job.created_at)), Td(clock(job.completed_at)), Td(outcome(job)), id=f'job-{job.id}', **live(f'{url}/row', job))

def facts(job):
    known = dict(status=job.status.replace('_', ' '), triggered_by=job.triggered_by, created=shown(job.created_at), started=shown(job.started_at),
        completed=shown(job.completed_at), error=job.error_message)
    if job.retry_count: known['attempts'] = attempts(job)
    return Dl(*[o for k, v in known.items() if v for o in (Dt(Small(k.replace('_', ' '))), Dd(v, id=k))])

def tries_table(tries):
    cells = [(a['number'], clock(a['started_at']), clock(a['ended_at']), a['outcome'], a['error'] or '') for a in tries]
    return H2("Attempts"), table(['', 'Start', 'End', 'Outcome', 'Error'], [Tr(*map(Td, c)) for c in cells])

def warnings_table(warnings, most=100):
    return H2("Warnings"), P(f"{min(most, len(warnings))} of {len(warnings)}"), table(['Where', 'What'],
        [Tr(Td(o['item'] or ''), Td(o['message'])) for o in warnings[:most]])

def job_page(shop, job, tries, logs):
    "All there is to know about one job; of its warnings, those of the last attempt"
    warnings = [o for o in logs if o['level'] == 'warning' and o['attempt'] == job.attempt]
    texts = [(H2(k.title()), Pre(pretty(v), id=k)) for k in ('payload', 'result', 'details') if (v := getattr(job, k))]
    return page(job.job_type, Div(progress(job), facts(job), *texts, tries_table(tries) if tries else '', warnings_table(warnings) if warnings else '',
        (H2("Traceback of the last failure"), Pre(job.error_log, id='traceback')) if job.error_log else '',
        id='job', **live(f'/{shop}/jobs/{job.id}', job, hx_select='#job')), shop=shop, live=job.status not in FINISHED)
