"""All measures of all peers, interleaved: round after round, measure after measure, peer after peer, each in processes of its own.

    python -m benchmarks.run --only submit,drain --peers raw,ours,huey --runs 3

Ratios are taken within a round, to the raw side of the same round, and their median is shown."""
import argparse, datetime, json, os, platform, shutil, signal, sqlite3, statistics, subprocess, sys, tempfile, time, traceback
from pathlib import Path
from .measures import measures
from .peers import peers

here = Path(__file__).parent

def launch(args, limit):
    "What a process of its own says; it is ended after `limit` seconds, with all it has started"
    place = Path(tempfile.mkdtemp(prefix='fh_bench_'))
    env = os.environ | dict(BENCH_PLACE=str(place), PYTHONPATH=os.pathsep.join(filter(None, [str(here.parent), os.environ.get('PYTHONPATH')])))
    with (place/'stderr').open('w') as err:
        proc = subprocess.Popen([sys.executable, '-m', *args], env=env, cwd=here.parent, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True)
    try: out, _ = proc.communicate(timeout=limit)
    except subprocess.TimeoutExpired: out = None
    finally:
        try: os.killpg(proc.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        proc.wait()
        if os.environ.get('BENCH_VERBOSE'): sys.stderr.write((place/'stderr').read_text()[-4000:])
        shutil.rmtree(place, ignore_errors=True)
    if out is None: clean_up(place.name)
    return json.loads(out.splitlines()[-1]) if out else dict(figure=None, failed=f'not within {limit} s' if out is None else 'the process ended without a figure')

def answer(figure):
    "Say what `launch` waits for, `figure()` or why there is none, and end; threads that still run are not waited for"
    try: out = dict(figure=figure())
    except Exception as e:
        traceback.print_exc()
        out = dict(figure=None, failed=f'{type(e).__name__}: {e}'.splitlines()[0])
    print(json.dumps(out), flush=True)
    os._exit(0)

def clean_up(name):
    "What a process that was ended has left on the server"
    from .peers.base import OnPostgres
    for database in (name, f't_{name}_db', f'host_{name}'):
        try: OnPostgres._admin(None, f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
        except Exception: pass

def machine():
    "What the figures were taken on"
    m = dict(date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'), cpus=os.cpu_count(), processor=platform.machine(), system=platform.system(),
        python=platform.python_version(), sqlite=sqlite3.sqlite_version)
    from .peers.base import postgres_url, redis_url
    try:
        import psycopg
        with psycopg.connect(postgres_url, connect_timeout=3) as conn: m['postgresql'] = conn.execute('SHOW server_version').fetchone()[0].split()[0]
    except Exception as e: m['postgresql'] = f'not there: {type(e).__name__}'
    try:
        import redis
        client = redis.Redis.from_url(redis_url)
        m['redis'] = client.info('server')['redis_version']
        m['redis_appendonly'] = client.config_get('appendonly').get('appendonly')
    except Exception as e: m['redis'] = f'not there: {type(e).__name__}'
    return m

def median(values):
    v = [x for x in values if x is not None]
    return statistics.median(v) if v else None

def ratios(by_peer, key, beside=None):
    "To each raw side: the median of the ratios of the rounds; `beside`: the raw side's measure, where it is another"
    own, by_peer = by_peer[key], by_peer if beside is None else beside
    out = {}
    for raw in own.get('raws') or ():
        pairs = zip(own['runs'], by_peer.get(raw, {}).get('runs', ()))
        found = [a['value']/b['value'] for a, b in pairs if a and b and a.get('value') and b.get('value')]
        if found: out[raw] = median(found)
    return out

def summary(results):
    for measure, by_peer in results.items():
        for key, r in by_peer.items():
            figures = [f for f in r['runs'] if f]
            r['median'] = {k: median(f.get(k) for f in figures) for k in dict.fromkeys(k for f in figures for k, v in f.items() if isinstance(v, (int, float)) and not isinstance(v, bool))}
            r['ratio'] = ratios(by_peer, key, results.get('latency', {}) if measure == 'inside' else None)
    return results

# heading, key of the median, format
columns = dict(
    submit=[('jobs/s', 'value', ',.0f')], bulk=[('jobs/s', 'value', ',.0f')], drain=[('jobs/s', 'value', ',.0f')], drain2=[('jobs/s', 'value', ',.0f')],
    latency=[('p50 ms', 'p50', '.2f'), ('p99 ms', 'p99', '.1f')], inside=[('p50 ms', 'p50', '.2f'), ('p99 ms', 'p99', '.1f')], crash=[('not back', 'lost', '.0f'), ('twice', 'twice', '.0f'), ('seconds', 'value', '.1f')],
    web=[('requests/s', 'value', ',.0f'), ('p99 ms', 'p99', '.0f'), ('behind s', 'behind', '.1f')])

def show(measure, by_peer):
    cols = columns[measure]
    print(f'\n{measure}: {measures[measure].__doc__}')
    print(f'{"":22}' + ''.join(f'{h:>12}' for h, *_ in cols) + f'{"ratio":>9}{"to schema":>11}  remarks')
    for key, r in by_peer.items():
        m, ratio = r['median'], list(r['ratio'].values()) + [None, None]
        cells = ''.join(f'{m[k]:>12{f}}' if m.get(k) is not None else f'{"-":>12}' for _, k, f in cols)
        remark = '; '.join(dict.fromkeys(filter(None, [r.get('missing') and f"n/a: {r['missing']}", *(f'FAILED: {x}' for x in r['failed']), *(f.get('note') for f in r['runs'] if f)])))
        print(f'{key:22}{cells}{ratio[0]:>9.2f}' if ratio[0] else f'{key:22}{cells}{"":9}', f'{ratio[1]:>10.2f}' if ratio[1] else ' '*10, f' {remark}')

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.run', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default=','.join(measures), help=f'of {", ".join(measures)}')
    p.add_argument('--peers', default='', help=f'beginnings of names, of {", ".join(peers)}')
    p.add_argument('--runs', type=int, default=3, help='rounds')
    p.add_argument('--jobs', type=int, default=10_000, help='to drain; slow peers get a part of it, submits one by one a quarter')
    p.add_argument('--seconds', type=int, default=5, help='of load on a web route')
    p.add_argument('--limit', type=int, default=120, help='seconds for one measurement')
    p.add_argument('--crash-limit', type=int, default=40, help='seconds until all jobs must have ended after a crash')
    p.add_argument('--quick', action='store_true', help='one round, few jobs: to see that all works')
    p.add_argument('--save', type=Path, default=here/'results'/'peers.json', help='where the figures go, as JSON')
    p.add_argument('--add', action='store_true', help='keep the measures of the saved file that are not taken now')
    a = p.parse_args()
    if a.quick: a.runs, a.jobs, a.seconds = 1, 2000, 2
    chosen, wanted = a.only.split(','), [k for k in peers if any(map(k.startswith, a.peers.split(',')))]
    if unknown := set(chosen) - set(measures): p.error(f'no measure {", ".join(unknown)}')
    options = dict(jobs=a.jobs, seconds=a.seconds, limit=a.limit - 20, crash_limit=a.crash_limit)
    results = {m: {k: dict(runs=[], failed=[]) for k in wanted} for m in chosen}
    began = time.time()
    try:
        for n in range(a.runs):
            for m in chosen:
                for k in wanted:
                    got, r = launch(['benchmarks.child', 'measure', k, m, json.dumps(options)], a.limit), results[m][k]
                    r['runs'].append(got.pop('figure', None))
                    if failed := got.pop('failed', None): r['failed'].append(failed)
                    r.update(got)
                    value = (r['runs'][-1] or {}).get('value')
                    print(f'{time.time()-began:6.0f} s  round {n+1}  {m:8} {k:22}', f'{value:,.2f}' if value else failed or r.get('missing') or r['runs'][-1], flush=True)
    except KeyboardInterrupt: print('\nstopped; what was measured so far:')
    m = machine()
    saved = json.loads(a.save.read_text()) if a.add and a.save.exists() else dict(machine={}, results={}, seconds=0)
    earlier = saved.get('taken') or dict.fromkeys(saved['results'], saved['machine'].get('date'))
    found, taken = saved['results'] | results, earlier | dict.fromkeys(chosen, m['date'])
    results = summary({k: found[k] for k in measures if k in found})
    for k in chosen: show(k, results[k])
    print('\nDurability:')
    for k in wanted:
        if d := next((results[m][k].get('durability') for m in chosen if results[m][k].get('durability')), None): print(f'{k:22} {d}')
    a.save.parent.mkdir(parents=True, exist_ok=True)
    a.save.write_text(json.dumps(dict(machine=m, options=vars(a) | dict(save=str(a.save.name)), seconds=round(saved['seconds'] + time.time() - began), taken=taken, results=results), indent=1)+'\n')
    print(f'\n{a.save}')

if __name__ == '__main__': main()
