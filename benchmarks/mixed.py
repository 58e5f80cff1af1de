"""Loads of more than one kind in one process: what short jobs lose to what waits, runs or is held back beside them.

    python -m benchmarks.mixed --only 'a job of a minute runs,one attempt each'

Each load is one engine in a process of its own, with eight threads, on SQLite files at FULL. 20,000 no-op jobs are drained
while the rest of the load stands beside them; `ratio` is to the same jobs alone, in the same round."""
import argparse, json, os, sqlite3, sys, time
from dataclasses import dataclass, field
from pathlib import Path
from fh_saas.jobs.retries import Permanent
from .run import answer, here, launch, machine, median
from .tasks import noop

async def anoop(n): return n
def breaks(n): raise Permanent(f'{n} is no number')
def minute(n): time.sleep(60)
def computes(n):
    until = time.monotonic() + 60
    while time.monotonic() < until: pass

@dataclass
class Load:
    "20,000 short jobs, and what is beside them"
    short:object = noop
    tenants:int = 1 # whose databases the short jobs are spread over
    beside:int = 0 # other jobs in each of
    others:int = 0 # so many other databases, or if there are none in that of the short jobs
    task:object = minute # of the others
    queue:str = 'default' # and their queue
    queues:dict = None # that the process serves
    most:int = None # jobs that each of the other databases may run at once
    options:dict = field(default_factory=dict) # of the short jobs

loads = {
    'alone': Load(),
    'async jobs': Load(short=anoop),
    'jobs that fail': Load(short=breaks),
    'one attempt each': Load(options=dict(max_retries=1)),
    'a timeout each': Load(options=dict(timeout=60)),
    'a job of a minute runs': Load(beside=1),
    'a job computes': Load(beside=1, task=computes),
    'another tenant is at its limit': Load(beside=500, others=1, most=1),
    'five other tenants are at their limit': Load(beside=500, others=5, most=1),
    'queues with limits': Load(queues=dict(imports=1, default=8)),
    'a full queue in the same database': Load(beside=5000, queue='imports', queues=dict(imports=1, default=8)),
    'a full queue in five other databases': Load(beside=500, others=5, queue='imports', queues=dict(imports=1, default=8)),
    'twenty tenants': Load(tenants=20),
    'async jobs of twenty tenants': Load(short=anoop, tenants=20),
}

def measure(load, jobs, limit):
    "Short jobs per second"
    from fastsql import database
    from fh_saas import BackgroundTaskManager
    from fh_saas.jobs.engine import Engine
    from fh_saas.jobs.rules import Limits
    from fh_saas.jobs.settings import Settings
    from fh_saas.workers.worker import turn
    sys.setswitchinterval(turn)  # as a worker does
    place, engine = Path(os.environ['BENCH_PLACE']), Engine(Settings(handoff=0, concurrency=8), queues=load.queues)
    def manager(name):
        m = BackgroundTaskManager(database(place/f'{name}.db'), engine)
        engine.pause(m.store)
        return m
    flowing, others = ([manager(f'{kind}{n}') for n in range(size)] for kind, size in (('t', load.tenants), ('o', load.others)))
    for m in others: engine._desks[m.store]._free = Limits(most=load.most)  # as a host's rules would say
    for m in others or flowing[:1]:
        if load.beside: m.submit_many('beside', load.task, [dict(n=n) for n in range(load.beside)], queue=load.queue)
    for m in others: engine.pause(m.store, False)
    if load.beside and not others: engine.pause(flowing[0].store, False)
    if load.beside: time.sleep(1)  # what runs beside runs by now
    for m in flowing: engine.pause(m.store)
    each = jobs//load.tenants
    for m in flowing: m.submit_many('short', load.short, [dict(n=n) for n in range(each)], **load.options)
    start = time.perf_counter()
    for m in flowing: engine.pause(m.store, False)
    looks = [sqlite3.connect(place/f't{n}.db') for n in range(load.tenants)]
    def done(): return sum(c.execute("SELECT count(*) FROM tenant_jobs WHERE job_type = 'short' AND status IN ('completed', 'failed')").fetchone()[0] for c in looks)
    while (n := done()) < each*load.tenants and time.perf_counter() < start + limit: time.sleep(0.05)
    return dict(value=n/(time.perf_counter() - start))

def summarise(results):
    for r in results.values():
        pairs = [(f['value'], b['value']) for f, b in zip(r['runs'], results['alone']['runs']) if f and b]
        r['median'] = dict(value=median(f['value'] for f in r['runs'] if f), ratio=median(x/y for x, y in pairs))

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.mixed', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default=','.join(loads), type=lambda s: s.split(','))
    p.add_argument('--runs', type=int, default=3, help='rounds')
    p.add_argument('--jobs', type=int, default=20_000, help='short ones')
    p.add_argument('--limit', type=int, default=30, help='seconds for one measurement: the jobs that are done by then are counted')
    p.add_argument('--save', type=Path, default=here/'results'/'mixed.json')
    a = p.parse_args()
    if unknown := [k for k in a.only if k not in loads]: p.error(f'no load {", ".join(unknown)}')
    began, results = time.time(), {k: dict(runs=[], failed=[]) for k in dict.fromkeys(['alone', *a.only])}
    for n in range(a.runs):
        for name, r in results.items():
            got = launch(['benchmarks.mixed', 'measure', name, json.dumps(dict(jobs=a.jobs, limit=a.limit))], a.limit + 60)
            r['runs'].append(got.get('figure'))
            if got.get('failed'): r['failed'].append(got['failed'])
            print(f'{time.time()-began:6.0f} s  round {n+1}  {name:40}', got.get('failed') or f"{got['figure']['value']:,.0f}", flush=True)
    summarise(results)
    print(f'\n{"":40}{"jobs/s":>10}{"ratio":>8}')
    for name, r in results.items():
        m = r['median']
        print(f'{name:40}' + (f"{m['value']:>10,.0f}{m['ratio']:>8.2f}" if m['value'] else ''), *(f'FAILED: {x}' for x in r['failed']))
    a.save.parent.mkdir(parents=True, exist_ok=True)
    a.save.write_text(json.dumps(dict(machine=machine(), options=dict(runs=a.runs, jobs=a.jobs, limit=a.limit), seconds=round(time.time() - began), results=results), indent=1)+'\n')
    print(f'\n{a.save}')

if __name__ == '__main__': answer(lambda: measure(loads[sys.argv[2]], **json.loads(sys.argv[3]))) if sys.argv[1:2] == ['measure'] else main()
