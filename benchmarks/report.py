"""Tables and plots of what the modules beside this one have saved, for the page `nbs/explains/03_benchmarks.ipynb`.

Nothing is measured here and no figure is typed in: what a page shows is what the JSON says. A ratio compares two figures of one
round, and the median over the rounds is shown."""
import io, json, re
from functools import cached_property
from pathlib import Path
import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from fh_saas.jobs.settings import Settings
from . import run, tenants as many

folder = Path(__file__).parent/'results'

class Text:
    "Markdown that a notebook shows"
    def __init__(self, text): self.text = text
    def __repr__(self): return self.text
    def _repr_markdown_(self): return self.text

class Plot:
    "A figure that a notebook shows as SVG, the same bytes each time"
    def __init__(self, fig, what): self.fig, self.what = fig, what
    def __repr__(self): return f'<plot: {self.what}>'
    @cached_property
    def svg(self):
        with mpl.rc_context({'svg.hashsalt': 'fh_saas', 'svg.fonttype': 'none'}): self.fig.savefig(out := io.StringIO(), format='svg', bbox_inches='tight', metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
        text = re.sub(r'<!--.*?-->', '', out.getvalue(), flags=re.S)
        text = re.sub(r'<[^>]+>', lambda tag: re.sub(r'(\.\d\d)\d+', r'\1', tag[0]), text)  # a hundredth of a point is enough
        return '\n'.join(l.strip() for l in text.splitlines() if l.strip()) + '\n'
    def _repr_svg_(self): return self.svg

def saved(name, place=None) -> dict: # `peers`, `tenants`, `mixed` or `pages`
    "A saved run; without results if there is no file"
    path = Path(place or folder)/f'{name}.json'
    return (json.loads(path.read_text()) if path.exists() else dict(machine={}, options={}, results={})) | dict(name=name)

def nothing(run, of=''): return Text(f'Nothing is saved in `benchmarks/results/{run["name"]}.json`{of and f" about {of}"}: run `make bench`, then `make report`.')

def grid(heads, rows, right=()) -> str:
    "A Markdown table; columns named in `right` are set to the right"
    cell = lambda c: str(c).replace('|', '\\|').replace('\n', ' ')
    lines = [heads, ['--:' if h in right else '---' for h in heads], *rows]
    return '\n'.join('| ' + ' | '.join(cell(c) for c in l) + ' |' for l in lines)

def shown(v, fmt): return '–' if v is None else format(v, fmt)


# pages

asked = dict(list='Jobs', failed='Jobs, `status:failed`', type='Jobs, `type:…`', search='Jobs, a word that nothing has', overview='Overview', job='A job', api_list='List of the API', status_poll='Poll of a status', progress_poll='Poll of a progress', api_status='Status of the API', own_route="The app's own route")

def pages(run):
    "Milliseconds of each page, and what open live pages take from the app"
    found = run['results']
    if not found: return Text('Nothing is saved in `benchmarks/results/pages.json`: run `python -m benchmarks.pages`, then `make report`.')
    times, live, busy = found['pages'], found['live'], found['busy']
    def each(k): return f"{sum(live[k])/len(live[k]):.0f}"
    return Text(f"""Over {times['jobs']:,} jobs, milliseconds of a request one after the other:

{grid(('page', 'p50', 'p95'), [(v, times[k]['p50'], times[k]['p95']) for k, v in asked.items()], ('p50', 'p95'))}

Answers per second of the app's own route: {each('without')} without, {each('with_pages')} with {live['pages']} open live pages. Ratio within a round, median of {len(live['without'])}: {live['ratio']:.2f}.

The app's own route, in milliseconds, while more jobs than it can run compute in its process:

{grid(('jobs', 'p50', 'p99'), [('none' if ms == '0' else f'of {ms} ms each', t['p50'], t['p99']) for ms, t in busy.items()], ('p50', 'p99'))}""")


# peers

names = {'raw-sqlite-full': 'raw sqlite3, FULL', 'raw-sqlite-normal': 'raw sqlite3, NORMAL', 'raw-postgres': 'raw psycopg', 'raw-redis': 'raw redis-py',
    'schema-sqlite-full': 'sqlite3 on our tables, FULL', 'schema-sqlite-normal': 'sqlite3 on our tables, NORMAL', 'schema-postgres': 'psycopg on our tables',
    'ours-full': 'fh_saas, SQLite FULL', 'ours-normal': 'fh_saas, SQLite NORMAL', 'ours-postgres': 'fh_saas, PostgreSQL',
    'ours-full-async': 'fh_saas, SQLite FULL, async route', 'ours-normal-async': 'fh_saas, SQLite NORMAL, async route', 'ours-postgres-async': 'fh_saas, PostgreSQL, async route',
    'ours-full-worker': 'fh_saas, SQLite FULL, worker elsewhere', 'ours-normal-worker': 'fh_saas, SQLite NORMAL, worker elsewhere', 'ours-postgres-worker': 'fh_saas, PostgreSQL, worker elsewhere',
    'huey': 'Huey, SQLite',
    'pgqueuer-async': 'pgqueuer, async tasks', 'procrastinate': 'Procrastinate', 'dbos-sqlite': 'DBOS, SQLite', 'dbos-postgres': 'DBOS, PostgreSQL',
    'saq': 'SAQ, Redis', 'saq-async': 'SAQ, async tasks', 'celery': 'Celery, Redis', 'celery-acks-late': 'Celery, acks late', 'dramatiq': 'Dramatiq, Redis',
    'fh-saas-0.9.14': 'fh-saas 0.9.14', 'starlette': 'Starlette BackgroundTask', 'starlette-async': 'Starlette BackgroundTask, async route'}

def name(key): return names.get(key, key)
def ours(key): return key.startswith('ours')
def bare(key): return key.startswith(('raw', 'schema'))

# class of durability, how its durability text is known, colour; the first that fits
classes = [('nothing is stored', r'^none', '#999999'), ('as Redis is configured', r'^Redis', '#E69F00'), ('survives a killed process', r'NORMAL', '#56B4E9'),
    ('survives a power cut', r'FULL|PostgreSQL', '#0072B2'), ('not known', '', '#CC79A7')]

def durable(r): return next((what, colour) for what, pattern, colour in classes if re.search(pattern, r.get('durability') or '?'))

def has(r, key='value'): return r.get('median', {}).get(key) is not None

def best_first(by_peer, key='value', less=False) -> list:
    "Peers with a figure, the best one first"
    return sorted((k for k in by_peer if has(by_peer[k], key)), key=lambda k: by_peer[k]['median'][key], reverse=not less)

def less_is_better(measure): return measure in ('latency', 'inside', 'crash')

def why(r) -> list:
    "Why a peer has no figure, or not one of each round"
    return list(dict.fromkeys(filter(None, [r.get('missing'), *r.get('failed', ()), *(f.get('note') for f in r['runs'] if f)])))

def table(run_, measure) -> Text:
    "What each peer reached, the best one first, and why others are not there"
    if not (by_peer := run_['results'].get(measure)): return nothing(run_, f'`{measure}`')
    cols, less = run.columns[measure], less_is_better(measure)
    there = best_first(by_peer, less=less)
    there += [k for k in by_peer if k not in there and any(by_peer[k]['runs'])]  # ran, but did not come to its end
    ratios = {k: [*by_peer[k].get('ratio', {}).values(), None, None][:2] for k in there}
    extra = [h for i, h in enumerate(('to raw', 'to our tables')) if any(r[i] is not None for r in ratios.values())]
    heads = ['peer', *(h for h, *_ in cols), *extra, 'durability', '']
    def row(k):
        r = by_peer[k]
        failed = len(r.get('failed', ()))
        remark = [f'{failed} of {len(r["runs"])} rounds failed' if failed else '', *why(r)]
        return [f'**{name(k)}**' if ours(k) else name(k), *(shown(r['median'].get(c), f) for _, c, f in cols),
            *(shown(x, '.2f') for x, _ in zip(ratios[k], extra)), durable(r)[0], '; '.join(filter(None, remark))]
    rows = [row(k) for k in there]
    if not any(r[-1] for r in rows): heads, rows = heads[:-1], [r[:-1] for r in rows]
    return Text('\n\n'.join(filter(None, [grid(heads, rows, [h for h, *_ in cols] + extra), absent(by_peer, there)])))

def absent(by_peer, there) -> str:
    "The peers without a figure, by reason"
    reasons = {}
    for k, r in by_peer.items():
        if k not in there: reasons.setdefault('; '.join(why(r)) or 'no reason was given', []).append((k, bool(r.get('failed'))))
    return '\n'.join(f"- Not there{' (failed)' if any(f for _, f in ks) else ''}: {' · '.join(name(k) for k, _ in ks)}. {reason[:1].upper()}{reason[1:]}." for reason, ks in reasons.items())

def moment(at) -> str: return at.replace('T', ' ').replace('+00:00', ' UTC')

def about(run_) -> Text:
    "When and on what a run was made"
    if not run_['results']: return nothing(run_)
    m, o = run_['machine'], run_['options']
    facts = dict(date=moment(m.get('date', '')), machine=f"{m.get('cpus')} cores, {m.get('processor')}, {m.get('system')}",
        **{k.replace('_', ' '): v for k, v in m.items() if k not in ('date', 'cpus', 'processor', 'system') and not str(v).startswith('not there')}, rounds=o.get('runs'), took=f"{run_.get('seconds', 0)/60:.0f} minutes")
    warning = 'This is a trial (`--quick`): few jobs and a single round. It shows that all works; its figures say little.' if o.get('quick') else '' if (o.get('runs') or 0) >= 3 else 'Fewer than three rounds: the figures say little.'
    earlier = {}
    for k, at in run_.get('taken', {}).items():
        if at != m.get('date'): earlier.setdefault(at, []).append(f'`{k}`')
    since = earlier and f"Kept from earlier runs, of the code of that time: {'; '.join(f'{moment(at)}: ' + ', '.join(ks) for at, ks in sorted(earlier.items()))}. The other measures as above."
    return Text('\n\n'.join(filter(None, [grid(list(facts), [facts.values()]), since, warning])))

def peers_of(run_) -> Text:
    "Who takes part: version, and what becomes of a submitted job"
    found = {}
    for by_peer in run_['results'].values():
        for k, r in by_peer.items():
            if r.get('durability') or r.get('failed'): found.setdefault(k, r)
    if not found: return nothing(run_)
    return Text(grid(['peer', 'version', 'durability', ''], [[f'**{name(k)}**' if ours(k) else name(k), r.get('version', ''), r.get('durability') or '; '.join(why(r)), r.get('peer_note', '')] for k, r in found.items()]))


# plots

def canvas(rows, cols=1, width=8.4, height=None, **kw):
    "A figure with room for so many lines"
    fig = Figure(figsize=(width, height or 0.9 + 0.27*rows), layout='constrained', facecolor='white')
    axes = fig.subplots(1, cols, squeeze=False, **kw)[0]
    for ax in axes:
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=9)
    return fig, axes

def plain(axis):
    "Numbers as people write them, and few of them"
    axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda v, _: f'{v:,.0f}' if v >= 1 or v == 0 else f'{v:g}'))
    axis.set_minor_locator(mpl.ticker.NullLocator())

def scale(ax, values, label):
    "The x axis: logarithmic if the values are far apart"
    values = [v for v in values if v]
    if values and max(values) > 20*min(values):
        ax.set_xscale('log')
        ax.set_xlim(min(values)/2, max(values)*2.2)
        label += ', logarithmic'
    else: ax.set_xlim(0, max(values, default=1)*1.18)
    plain(ax.xaxis)
    ax.set_xlabel(label, fontsize=9)

def lines(ax, keys):
    "One line for each peer; ours in bold"
    ax.set_yticks(range(len(keys)), [name(k) for k in keys])
    ax.set_ylim(len(keys) - 0.4, -0.6)
    for t, k in zip(ax.get_yticklabels(), keys): t.set_fontweight('bold' if ours(k) else 'normal')

def legend(fig, by_peer, keys, *more):
    "What the colours say"
    seen = {durable(by_peer[k]) for k in keys}
    patches = [Patch(facecolor=c, edgecolor=c, label=what) for what, _, c in reversed(classes) if (what, c) in seen]
    if any(map(bare, keys)): patches.append(Patch(facecolor='white', edgecolor='#444444', label='no job system: the limit'))
    fig.legend(handles=[*patches, *more], loc='outside upper left', ncols=5, columnspacing=1.2, handlelength=1.4, fontsize=8, frameon=False)

def bar(ax, y, k, r, v, label, key='value'):
    "One peer: the median as a bar, outlined for the bare databases, and each round as a dot"
    _, colour = durable(r)
    ax.barh(y, v, height=0.66, facecolor='white' if bare(k) else colour, edgecolor=colour, linewidth=1.2)
    if len(each := [f[key] for f in r['runs'] if f and f.get(key)]) > 1: ax.plot(each, [y]*len(each), '.', color='#222222', markersize=3)
    ax.annotate(label, (max([v, *each]), y), xytext=(4, 0), textcoords='offset points', va='center', fontsize=8)

def bars(run_, measure, also=None):
    "A rate, and with `also` a second figure beside it: `(key, label, format)`"
    by_peer = run_['results'].get(measure, {})
    if not (keys := best_first(by_peer)): return nothing(run_, f'`{measure}`')
    head, _, fmt = run.columns[measure][0]
    panels = [('value', head, fmt), *([also] if also else [])]
    fig, axes = canvas(len(keys), len(panels), sharey=True)
    for ax, (key, label, f) in zip(axes, panels):
        for y, k in enumerate(keys):
            if has(by_peer[k], key): bar(ax, y, k, by_peer[k], v := by_peer[k]['median'][key], format(v, f), key)
        lines(ax, keys)
        scale(ax, [x[key] for k in keys for x in by_peer[k]['runs'] if x and x.get(key)], label)
    legend(fig, by_peer, keys)
    return Plot(fig, f'{measure}, {head}')

def web(run_): return bars(run_, 'web', ('p99', 'p99 ms', ',.0f'))

def dumbbells(run_, measure):
    "Median and p99 of waits, joined"
    by_peer = run_['results'].get(measure, {})
    if not (keys := best_first(by_peer, 'p50', True)): return nothing(run_, f'`{measure}`')
    fig, [ax] = canvas(len(keys))
    for y, k in enumerate(keys): dumbbell(ax, y, by_peer[k]['median'], durable(by_peer[k])[1], bare(k))
    lines(ax, keys)
    scale(ax, [by_peer[k]['median'][q] for k in keys for q in ('p50', 'p99')], 'ms: the left end is the median, the right one p99')
    legend(fig, by_peer, keys)
    return Plot(fig, f'{measure}, p50 and p99')

def dumbbell(ax, y, m, colour, hollow=False):
    ax.plot([m['p50'], m['p99']], [y, y], color=colour, linewidth=2, alpha=0.5)
    ax.plot([m['p50'], m['p99']], [y, y], 'o', color=colour, markerfacecolor='white' if hollow else colour, markersize=6)
    for q, x, side in (('p50', -6, 'right'), ('p99', 6, 'left')): ax.annotate(f'{m[q]:.3g}', (m[q], y), xytext=(x, 0), textcoords='offset points', ha=side, va='center', fontsize=8)

def recovery(run_):
    "Seconds from a kill to the end of the last job; those who did not get there reach to the limit"
    by_peer, limit = run_['results'].get('crash', {}), run_['options'].get('crash_limit') or 40
    keys = best_first(by_peer, less=True)
    keys += (stuck := [k for k in by_peer if k not in keys and has(by_peer[k], 'lost')])
    if not keys: return nothing(run_, '`crash`')
    fig, [ax] = canvas(len(keys))
    for y, k in enumerate(keys):
        m = by_peer[k]['median']
        open_ = f"{m['lost']:.0f} jobs not back" if m.get('lost') else 'not all outcomes recorded'
        bar(ax, y, k, by_peer[k], m.get('value') or limit, open_ if k in stuck else ' · '.join(filter(None, [f"{m['value']:.1f}", m.get('twice') and f"{m['twice']:.0f} begun twice"])))
        if k in stuck: ax.patches[-1].set(alpha=0.3, hatch='///')
    lines(ax, keys)
    ax.set_xlim(0, limit*1.4)
    ax.set_xlabel(f'seconds from the kill until all jobs are done; hatched: not within {limit} s', fontsize=9)
    legend(fig, by_peer, keys)
    return Plot(fig, 'crash, seconds')


# many tenants

def kind(n): return n.split()[0].strip(',:')

def size(run_, n):
    "How many tenants a measurement had"
    return int(m[1].replace(',', '')) if (m := re.search(r'([\d,]+) tenants', n)) else run_['options'].get('tenants')

def of_kind(run_, what) -> dict: return {n: r for n, r in run_['results'].items() if kind(n) == what}

def tenants_table(run_, what) -> Text:
    "The rows of `drain`, `idle` or `noise`"
    if not (rows := of_kind(run_, what)): return nothing(run_, f'`{what}` of many tenants')
    cols = many.columns[what]
    def label(n): return f"{n.removeprefix('drain ').partition(';')[0].replace('ours', '**fh_saas**')}; {size(run_, n):,}" if what == 'drain' else n.removeprefix(f'{what}: ').removeprefix(f'{what}, ')
    if what == 'drain': rows = dict(sorted(rows.items(), key=lambda i: size(run_, i[0])))
    body = [[label(n), *(shown(r['median'].get(k), f) for _, k, f in cols), '; '.join(r['failed'])] for n, r in rows.items()]
    heads = ['who; tenants' if what == 'drain' else 'noise' if what == 'noise' else '', *(h for h, *_ in cols), '']
    if not any(b[-1] for b in body): heads, body = heads[:-1], [b[:-1] for b in body]
    return Text(grid(heads, body, [h for h, *_ in cols]))

def curve(ax, points, **kw):
    points = sorted((x, y) for x, y in points if x and y is not None)
    ax.plot(*zip(*points) if points else ([], []), marker='o', markersize=4, linewidth=1.6, **kw)

def over_tenants(ax, sizes, title):
    ax.set_xscale('log')
    ax.set_xticks(sizes)
    plain(ax.xaxis)
    ax.set_xlim(min(sizes)/1.8, max(sizes)*1.8)
    ax.set_title(title, fontsize=9, loc='left')
    ax.tick_params(labelsize=8)

def fleet(run_):
    "What idle tenants cost: processor, memory, files, and the latency of one of them"
    rows = {size(run_, n): r['median'] for n, r in of_kind(run_, 'idle').items() if has(r)}
    if not rows: return nothing(run_, 'idle tenants')
    fig, axes = canvas(1, 4, width=9.6, height=2.7)
    of = lambda key: [(n, m.get(key)) for n, m in rows.items()]
    for ax, title, keys, limit in zip(axes, ('% of one core', 'memory, MiB', 'open files', 'wait, ms'), (['value'], ['memory'], ['files'], ['p50', 'p99']), (1, None, 800, None)):
        for key, style in zip(keys, ('-', '--')): curve(ax, of(key), color='#0072B2', linestyle=style, label=key)
        if limit: ax.axhline(limit, color='#D55E00', linewidth=1, linestyle=':')
        over_tenants(ax, list(rows), title)
        ax.set_ylim(0, 1.15*max([limit or 0, *(m.get(k) or 0 for m in rows.values() for k in keys)]))
    axes[-1].legend(fontsize=8, frameon=False)
    fig.supxlabel('tenants; dotted: the target', fontsize=9)
    return Plot(fig, 'idle tenants')

def spread_out(run_):
    "The same number of jobs in more and more databases"
    rows = {n: r for n, r in of_kind(run_, 'drain').items() if has(r)}
    if not rows: return nothing(run_, 'jobs spread over tenants')
    fig, [ax] = canvas(1, height=3)
    for who, colour in (('ours', '#0072B2'), ('raw, opened for each visit', '#999999'), ('raw, held open', '#444444')):
        if points := [(size(run_, n), r['median']['value']) for n, r in rows.items() if who in n]:
            curve(ax, points, color=colour, label=who.replace('ours', 'fh_saas').replace('raw', 'raw sqlite3'))
    over_tenants(ax, sorted({size(run_, n) for n in rows}), 'jobs a second, logarithmic')
    ax.set_yscale('log')
    plain(ax.yaxis)
    ax.set_xlabel('tenants over which the jobs are spread', fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return Plot(fig, 'jobs spread over tenants')

def neighbour(run_):
    "Waits of a quiet tenant's jobs"
    rows = {n.removeprefix('noise: '): r['median'] for n, r in of_kind(run_, 'noise').items() if has(r)}
    if not rows: return nothing(run_, 'a noisy neighbour')
    fig, [ax] = canvas(len(rows), height=0.8 + 0.35*len(rows))
    for y, m in enumerate(rows.values()): dumbbell(ax, y, m, '#0072B2')
    lines(ax, list(rows))
    ax.set_ylabel('the noise')
    scale(ax, [m[q] for m in rows.values() for q in ('p50', 'p99')], 'ms that the quiet tenant waits: the left end is the median, the right one p99')
    return Plot(fig, 'a noisy neighbour')


# mixed loads

def mixed(run_):
    "Short jobs per second beside loads of another kind"
    if not run_['results']: return nothing(run_)
    rows = [(n, *(shown(r['median'][k], f) for k, f in (('value', ',.0f'), ('ratio', '.2f'))), '; '.join(r['failed'])) for n, r in run_['results'].items()]
    heads = ('beside the short jobs', 'jobs/s', 'to alone', '')
    return Text(grid(heads, rows, heads[1:3]) if any(r[-1] for r in rows) else grid(heads[:-1], [r[:-1] for r in rows], heads[1:3]))


# targets

def runs(run_, at):
    "The figures of each round: of `(measure, peer)`, or of the name of a measurement with many tenants"
    r = run_['results'].get(at[0], {}).get(at[1]) if isinstance(at, tuple) else run_['results'].get(at)
    return r['runs'] if r else []

def paired(run_, a, b, f, key='value'):
    "The median over the rounds of what `f` makes of the figures of `a` and of `b`"
    return run.median(f(x[key], y[key]) for x, y in zip(runs(run_, a), runs(run_, b)) if x and y and x.get(key) is not None and y.get(key))

def ratio(run_, a, b, key='value'): return paired(run_, a, b, lambda x, y: x/y, key)

def largest(run_, at, *keys): return max((f[k] for f in runs(run_, at) if f for k in keys if f.get(k) is not None), default=None)

def slowest(run_, at):
    "Seconds of the slowest round; endless if one did not come to its end"
    return max((float('inf') if f['value'] is None else f['value'] for f in runs(run_, at) if f), default=None)

def drained(run_, who, n): return next((x for x in of_kind(run_, 'drain') if who in x and size(run_, x) == n), 'drain')

levels = dict(FULL='full', NORMAL='normal')

def aims(p, t) -> list:
    "`(what, sign, limit, unit, {which: reached})` for each target, computed from the saved runs"
    def to(measure, other, key='value', other_measure=None, which=levels):
        return {l: ratio(p, (measure, f'ours-{x}'), (other_measure or measure, other.format(x)), key) for l, x in which.items()}
    pg = lambda other: {'PostgreSQL': ratio(p, ('drain', 'ours-postgres'), ('drain', other))}
    coroutines, elsewhere = ({l: f'{x}-{where}' for l, x in levels.items()} for where in ('async', 'worker'))
    raw, big, lease = 'raw-sqlite-{}', 'idle, 10,000 tenants', Settings().lease
    kinds = {l.removeprefix('jobs that '): f'noise: {l}' for l in ('jobs that wait 2 ms', 'jobs that compute 2 ms')}
    crash = {l: largest(p, ('crash', f'ours-{x}'), 'lost') for l, x in (levels | dict(PostgreSQL='postgres')).items()}
    back = {l: slowest(p, ('crash', f'ours-{x}')) for l, x in (levels | dict(PostgreSQL='postgres')).items()}
    same = to('submit', 'schema-sqlite-{}')
    return [
        ('Submit one by one, to sqlite3 doing the same insert into the same table', '≥', 0.8, '', dict(FULL=same['FULL'])),
        ('the same', '≥', 0.35, '', dict(NORMAL=same['NORMAL'])),
        ('Submit one by one, to sqlite3 inserting into a minimal table', '≥', 0.8, '', dict(FULL=to('submit', raw)['FULL'])),
        ('the same', '≥', 0.35, '', dict(NORMAL=to('submit', raw)['NORMAL'])),
        ('Submit in bulk, to raw bulk', '≥', 0.5, '', to('bulk', raw)),
        ('Drain, one process, to raw sqlite3 in batches of 100', '≥', 0.35, '', to('drain', raw)),
        ('Drain, one process, to raw psycopg in batches of 100', '≥', 0.65, '', pg('raw-postgres')),
        ('Drain, one process, to pgqueuer with the same tasks', '>', 1, '', pg('pgqueuer')),
        ('Drain, one process, to pgqueuer with async tasks', '>', 1, '', pg('pgqueuer-async')),
        ('Lone job from another process, p50, to raw sqlite3 polled each millisecond', '≤', 1.5, '', to('latency', raw, 'p50')),
        ('the same, p99', '≤', 3, '', to('latency', raw, 'p99')),
        ('Lone job in one process, p50, to our own from another process', '<', 1, '', to('inside', 'ours-{}', 'p50', 'latency')),
        ('the same, p99', '<', 1, '', to('inside', 'ours-{}', 'p99', 'latency')),
        ('A worker killed: jobs that did not come back', '≤', 0, '', crash),
        (f'A worker killed: all is done after its lease of {lease:g} s and 5 s', '≤', lease + 5, 's', back),
        ('Web route, requests a second, to a BackgroundTask that stores nothing', '≥', 1.3, '', to('web', 'starlette')),
        ('the same, p99', '≤', 1, '', to('web', 'starlette', 'p99')),
        ('Web route that is a coroutine, requests a second, to the same with a BackgroundTask', '≥', 1.3, '', to('web', 'starlette-async', which=coroutines)),
        ('the same, p99', '≤', 1, '', to('web', 'starlette-async', 'p99', which=coroutines)),
        ('Web route whose jobs a worker runs, requests a second, to a BackgroundTask that stores nothing', '≥', 1.3, '', to('web', 'starlette', which=elsewhere)),
        ('the same, p99', '≤', 1, '', to('web', 'starlette', 'p99', which=elsewhere)),
        ('Lone job among 10,000 idle tenants, p50, to a single tenant', '≤', 1.3, '', {'': ratio(t, big, 'idle, 1 tenants', 'p50')}),
        ('10,000 idle tenants, of one core', '<', 1, '%', {'': run.median(f['value'] for f in runs(t, big) if f)}),
        ('10,000 idle tenants, open files at most', '<', 800, '', {'': largest(t, big, 'files', 'files_after')}),
        ('Memory bounded: with 10,000 idle tenants, to 1,000', '≤', 1.25, '', {'': ratio(t, big, 'idle, 1,000 tenants', 'memory')}),
        ('10,000 jobs over 1,000 tenants, to raw sqlite3 that opens each file', '≥', 0.5, '', {'': ratio(t, drained(t, 'ours', 1000), drained(t, 'opened', 1000))}),
        ('the same, to raw sqlite3 over files held open', '≥', 0.25, '', {'': ratio(t, drained(t, 'ours', 1000), drained(t, 'held', 1000))}),
        ("Noisy neighbour: the quiet one's p99 grows by at most a task and 50 ms", '≤', 52, 'ms', {l: paired(t, n, 'noise: none', lambda x, y: x - y, 'p99') for l, n in kinds.items()}),
    ]

holds = {'≥': lambda v, l: v >= l, '≤': lambda v, l: v <= l, '>': lambda v, l: v > l, '<': lambda v, l: v < l}

def targets(peers, tenants) -> Text:
    "Each target, what the saved runs reached, and whether it is met"
    def row(what, sign, limit, unit, reached):
        number = lambda v: f'{v:.0f}' if v >= 100 else f'{v:.3g}'
        got = {l: v for l, v in reached.items() if v is not None}
        verdict = 'not measured' if not got else '**not met**' if not all(holds[sign](v, limit) for v in got.values()) else 'met' if len(got) == len(reached) else f"met; {', '.join(l for l in reached if l not in got)} not measured"
        return what, f'{sign} {limit:g} {unit}'.strip(), ' · '.join(f'{l} {number(v)} {unit}'.strip() for l, v in got.items()) or '–', verdict
    return Text(grid(['target', 'wanted', 'reached', ''], [row(*a) for a in aims(peers, tenants)], ('wanted',)))
