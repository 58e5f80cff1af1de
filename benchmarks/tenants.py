"""Many tenants, each with a SQLite file of its own, and one runner process that may open 1,024 files.

    python -m benchmarks.tenants --only drain,idle,noise --sizes 1,100,1000,10000

`drain`: 10,000 no-op jobs, ten in each of 1,000 databases (and in 1, 100 and 10,000), from the start of the first to the last
result stored; beside it what `sqlite3` alone does, that opens each file, claims and finishes its ten in two transactions and
closes it, and the same over files that are held open. `idle`: one runner over n tenants that have nothing to do: its CPU time in 20 s, its memory
and open files, and the latency of the lone jobs that another process submits for one of them. `noise`: one tenant has
50,000 jobs of 2 ms in its queue; how long a job waits that another tenant submits each second. The same with sixty tenants that
have as many among them: more than a process takes on at a time."""
import argparse, json, os, random, resource, sqlite3, subprocess, sys, time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from .measures import Worker, Wrong, check, spread, wait_for
from .run import answer, here, launch, machine, median
from .tasks import said

place = lambda: Path(os.environ['BENCH_PLACE'])

def fleet(n):
    from .peers.ours import Fleet
    return Fleet(place(), n)

def built(n):
    "Made in another process: one that reads a database's file as a file gives up the locks that SQLite holds on it there"
    subprocess.run([sys.executable, '-m', 'benchmarks.tenants', 'build', str(n)], check=True)
    return fleet(n)

class Runner(Worker):
    "A runner over n tenants, in a process that may open 1,024 files"
    def __init__(self, n):
        few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        self.proc = subprocess.Popen([sys.executable, '-m', 'benchmarks.tenants', 'work', str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=few)
        self.ready().go()

    def __enter__(self): return self
    def __exit__(self, *args): self.kill()

    def files(self): return len(os.listdir(f'/proc/{self.proc.pid}/fd'))
    def cpu(self):
        "Seconds of CPU time so far, as its own clock has it: the ticks of /proc/PID/stat are too coarse for what hardly runs"
        return time.clock_gettime(~self.proc.pid << 3 | 2)  # clock_getcpuclockid(3) of Linux
    def memory(self, what='VmRSS'):
        "MiB"
        return int(next(l for l in Path(f'/proc/{self.proc.pid}/status').read_text().splitlines() if l.startswith(what)).split()[1]) / 1024

    def settle(self, limit=180):
        "Seconds until it has seen its tenants: three seconds in a row with less than a tenth of a core; None if that never came"
        start, quiet = time.monotonic(), 0
        while quiet < 3:
            if time.monotonic() - start > limit: return None
            before = self.cpu()
            time.sleep(1)
            quiet = quiet + 1 if self.cpu() - before < 0.1 else 0
        return time.monotonic() - start - 3


def span(fl, jobs):
    "Seconds from the first job's start to the last result's commit, when all `jobs` are done"
    from fh_saas.db_host import seconds
    done, last = 0, ''
    for i in range(fl.n):
        with closing(sqlite3.connect(fl.path(i), timeout=10)) as conn:
            n, at = conn.execute("SELECT count(*), max(completed_at) FROM tenant_jobs WHERE status = 'completed' AND result IS NOT NULL").fetchone()
            done, last = done + n, max(last, at or '')
    check('jobs done', done, jobs)
    return seconds(last) - min(at for _, at in said('began'))

def filled(o):
    fl = built(o.tenants)
    for i in range(o.tenants): fl.submit_many(i, 'count', range(o.each))
    return fl

def counted(): return (place()/'count').stat().st_size if (place()/'count').exists() else 0

def drain_ours(o):
    fl, jobs = filled(o), o.tenants*o.each
    with Runner(o.tenants) as r:
        wait_for('all jobs run', lambda: counted() >= jobs, o.limit, 0.02)
        time.sleep(1)  # their results are on the way
        files, memory = r.files(), r.memory('VmHWM')
        took = span(fl, jobs)
    return dict(value=jobs/took, files=files, memory=memory)

def drain_raw(o, held):
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),)*2)
    from .peers.raw import SchemaSqlite, batch
    class File(SchemaSqlite):
        path = property(lambda self: self.file)
        def visit(self):
            for _ in range(0, o.each, batch): self.finish('t', [(json.dumps(task(**json.loads(p))), id) for id, _, p in self.claim('t')])
    def file(i):
        f = File('raw', place())
        f.file = fl.path(i)
        return f
    from .tasks import count as task
    fl = filled(o)
    files = [file(i) for i in range(o.tenants)]
    if held:
        for f in files: f.conn.execute('SELECT 1 FROM tenant_jobs').fetchone()
    for f in files:
        f.visit()
        if not held: f.conn.close()
    return dict(value=o.tenants*o.each/span(fl, o.tenants*o.each))

def lone(fl, n, jobs, gap, since=0, going_on=lambda: True):
    "How long each of `jobs` waits that one tenant submits while it is `going_on`, from the call of submit to the first line of the task"
    called = {}
    for k in range(since, since + jobs):
        time.sleep(random.uniform(*gap))
        if not going_on(): break
        called[k] = time.time()
        fl.submit(n, 'stamp', k)
    wait_for('all jobs run', lambda: {k for k, _ in said('ran')} >= set(called), 60, 0.02)
    ran = dict(said('ran'))
    return [ran[k] - called[k] for k in called]

def idle(o):
    fl = built(o.n)
    with Runner(o.n) as r:
        settled = r.settle()
        before = r.cpu()
        time.sleep(o.seconds)
        busy = (r.cpu() - before)/o.seconds
        files, memory = r.files(), r.memory()
        lone(fl, o.n//2, 5, (0.02, 0.05))
        waits = lone(fl, o.n//2, o.lone, (0.02, 0.05), 5)
        return dict(value=100*busy, settled=settled, files=files, memory=memory, files_after=r.files(), memory_peak=r.memory('VmHWM'), **spread(waits))

def noise(o):
    fl = built(10 + o.many)
    if o.noise:
        for n in range(o.many): fl.submit_many(n, o.noise, range(n*o.jobs//o.many, (n + 1)*o.jobs//o.many))
    with Runner(10 + o.many) as r:
        r.settle(3)
        waits = lone(fl, o.many + 5, o.seconds, (0.95, 1), 0, lambda: not o.noise or left(fl.path(o.many - 1)))
        noisy = sum(left(fl.path(n)) for n in range(o.many))
    if not waits: raise Wrong('the noise was over before the first job came')
    return dict(spread(waits), value=spread(waits)['p50'], jobs=len(waits), noise_left=noisy)

def left(path):
    with closing(sqlite3.connect(path, timeout=10)) as conn: return conn.execute("SELECT count(*) FROM tenant_jobs WHERE status IN ('pending', 'running')").fetchone()[0]

steps = {'drain ours': drain_ours, 'drain raw, opened for each visit': lambda o: drain_raw(o, False), 'drain raw, held open': lambda o: drain_raw(o, True), 'idle': idle, 'noise': noise}

def work(n):
    fl = fleet(int(n))
    print('ready', flush=True)
    sys.stdin.readline()
    fl.work()


def plan(a):
    "`(name, step, options)` of each measurement of a round"
    out = []
    if 'drain' in a.only:
        jobs = 10*a.tenants
        for n in dict.fromkeys([a.tenants, *(n for n in a.sizes if n <= jobs)]):
            kinds = [s for s in steps if s.startswith('drain') and (n <= a.tenants or 'held' not in s)]  # so many files are not held open
            out += [(s if n == a.tenants else f'{s}; {n:,} tenants', s, dict(tenants=n, each=jobs//n, limit=a.limit - 60)) for s in kinds]
    if 'idle' in a.only: out += [(f'idle, {n:,} tenants', 'idle', dict(n=n, seconds=a.seconds, lone=a.lone)) for n in a.sizes]
    if 'noise' in a.only: out += [(f'noise: {label}', 'noise', dict(noise=task, jobs=a.noise, seconds=a.seconds, many=many))
        for label, task, many in (('none', '', 1), ('jobs that wait 2 ms', 'chew', 1), ('jobs that compute 2 ms', 'burn', 1), ('jobs that wait 2 ms, of 60 tenants', 'chew', 60))]
    return out

columns = dict(drain=[('jobs/s', 'value', ',.0f'), ('ratio', 'ratio', '.2f'), ('MiB', 'memory', '.0f'), ('files', 'files', '.0f')],
    idle=[('% of a core', 'value', '.2f'), ('MiB', 'memory', '.0f'), ('files', 'files', '.0f'), ('seen after s', 'settled', '.0f'), ('p50 ms', 'p50', '.2f'), ('p99 ms', 'p99', '.1f'), ('ratio', 'ratio', '.2f')],
    noise=[('p50 ms', 'p50', '.2f'), ('p99 ms', 'p99', '.1f'), ('jobs', 'jobs', '.0f'), ('noise left', 'noise_left', ',.0f'), ('ratio', 'ratio', '.2f')])

def kind(name): return name.split()[0].strip(',:')

def summarise(results):
    "Medians, and the median of the ratios within a round: to raw with as many tenants, to one tenant, to no noise"
    groups = {}
    for name in results: groups.setdefault(kind(name), []).append(name)
    for k, names in groups.items():
        key = 'p50' if k == 'idle' else 'value'
        for n in names:
            base = next((b for b in names if 'opened' in b and b.partition(';')[2] == n.partition(';')[2]), names[0])
            figures = [f for f in results[n]['runs'] if f]
            results[n]['median'] = {k: median(f.get(k) for f in figures) for k in (figures[0] if figures else ())}
            pairs = [(f[key], b[key]) for f, b in zip(results[n]['runs'], results[base]['runs']) if f and b]
            results[n]['median']['ratio'] = median(x/y for x, y in pairs)
    return groups

def show(results, groups):
    for k, names in groups.items():
        cols = columns[k]
        print(f'\n{"":46}' + ''.join(f'{h:>13}' for h, *_ in cols))
        for n in names:
            m = results[n]['median']
            print(f'{n:46}' + ''.join(f'{m[k]:>13{f}}' if m.get(k) is not None else f'{"-":>13}' for _, k, f in cols), *(f'FAILED: {x}' for x in results[n]['failed']))

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.tenants', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='drain,idle,noise')
    p.add_argument('--sizes', default='1,100,1000,10000', type=lambda s: [int(n) for n in s.split(',')], help='tenants of an idle runner, and with a share each of the jobs to drain')
    p.add_argument('--tenants', type=int, default=1000, help='tenants with ten jobs each')
    p.add_argument('--runs', type=int, default=3, help='rounds')
    p.add_argument('--seconds', type=int, default=20, help='of idling, and of noise')
    p.add_argument('--lone', type=int, default=100, help='lone jobs among idle tenants')
    p.add_argument('--noise', type=int, default=50_000, help='jobs of the noisy tenant')
    p.add_argument('--limit', type=int, default=420, help='seconds for one measurement')
    p.add_argument('--quick', action='store_true', help='few tenants, few seconds: to see that all works')
    p.add_argument('--save', type=Path, default=here/'results'/'tenants.json')
    p.add_argument('--add', action='store_true', help='keep the kinds of the saved file that are not taken now')
    a = p.parse_args()
    if a.quick: a.runs, a.sizes, a.tenants, a.seconds, a.lone, a.noise = 1, [1, 100], 100, 5, 20, 5000
    began = time.time()
    results = {name: dict(runs=[], failed=[]) for name, *_ in plan(a)}
    for n in range(a.runs):
        for name, step, options in plan(a):
            got = launch(['benchmarks.tenants', 'measure', step, json.dumps(options)], a.limit)
            results[name]['runs'].append(got.get('figure'))
            if got.get('failed'): results[name]['failed'].append(got['failed'])
            print(f'{time.time()-began:6.0f} s  round {n+1}  {name:46}', got.get('failed') or {k: round(v, 3) if v is not None else v for k, v in got['figure'].items()}, flush=True)
    show(results, summarise(results))
    m = machine()
    saved = json.loads(a.save.read_text()) if a.add and a.save.exists() else dict(machine={}, results={}, seconds=0)
    kept = {n: r for n, r in saved['results'].items() if kind(n) not in a.only.split(',')}
    taken = (saved.get('taken') or dict.fromkeys(map(kind, saved['results']), saved['machine'].get('date'))) | dict.fromkeys(map(kind, results), m['date'])
    found = {n: r for k in columns for n, r in (kept | results).items() if kind(n) == k}
    a.save.parent.mkdir(parents=True, exist_ok=True)
    a.save.write_text(json.dumps(dict(machine=m, options=vars(a) | dict(save=a.save.name), seconds=round(saved['seconds'] + time.time() - began), taken=taken, results=found), indent=1)+'\n')
    print(f'\n{a.save}')

if __name__ == '__main__':
    if sys.argv[1:2] == ['measure']: answer(lambda: steps[sys.argv[2]](SimpleNamespace(**json.loads(sys.argv[3]))))
    elif sys.argv[1:2] == ['work']: work(*sys.argv[2:])
    elif sys.argv[1:2] == ['build']: fleet(int(sys.argv[2])).build()
    else: main()
