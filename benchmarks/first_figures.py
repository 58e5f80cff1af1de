"""First figures: durable submits one by one, and jobs drained by one process, as ratios to raw `sqlite3`.

Raw and ours alternate in one run; medians of `--runs`; SQLite's level is the same on both sides. The raw side does
the same inserts and the same guarded claim and finish, in batches of 100 for the drain, without engine or checks.
"""
import argparse, json, sqlite3, statistics, tempfile, time
from pathlib import Path
from fastsql import Database
from fh_saas.db_host import gen_id, timestamp
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.model import tables
from fh_saas.jobs.store import Store
from fh_saas.jobs.tasks import Registry
from fh_saas.utils_bgtsk import BackgroundTaskManager


def noop(n): return n


def fresh(level):
    path = Path(tempfile.mkdtemp())/'bench.db'
    path.touch()
    Store(f'sqlite:///{path}').close()
    conn = sqlite3.connect(path, isolation_level=None)
    conn.execute(f'PRAGMA synchronous={level}')
    return path, conn


add = 'INSERT INTO tenant_jobs (id, job_type, status, payload, max_retries, retry_count, created_at, task, queue, priority, run_at) VALUES (?,?,?,?,?,?,?,?,?,?,?)'
def row(n): return gen_id(), 'noop', 'pending', json.dumps(dict(n=n)), 3, 0, timestamp(), 'noop', 'default', 2, timestamp()


def raw_submit(level, n):
    _, conn = fresh(level)
    start = time.perf_counter()
    for i in range(n): conn.execute(add, row(i))
    return n/(time.perf_counter()-start)


def our_submit(level, n):
    path, _ = fresh(level)
    engine = Engine(Settings(synchronous=level, handoff=3600), Registry())
    manager = BackgroundTaskManager(Database(f'sqlite:///{path}'), engine)
    start = time.perf_counter()
    for i in range(n): manager.submit('noop', noop, n=i)
    took = time.perf_counter()-start
    engine.stop(0)
    return n/took


def raw_drain(level, n):
    _, conn = fresh(level)
    conn.execute('BEGIN')
    conn.executemany(add, map(row, range(n)))
    conn.execute('COMMIT')
    start = time.perf_counter()
    while True:
        conn.execute('BEGIN IMMEDIATE')
        got = conn.execute("""UPDATE tenant_jobs SET status='running', claim_token='t', started_at=?, attempt=attempt+1 WHERE id IN (SELECT id FROM tenant_jobs
            WHERE status='pending' AND run_at <= ? AND task IN ('noop') ORDER BY priority DESC, run_at, id LIMIT 100) RETURNING id, payload""", (timestamp(), timestamp())).fetchall()
        conn.execute('COMMIT')
        if not got: return n/(time.perf_counter()-start)
        done = [(json.dumps(noop(**json.loads(p))), timestamp(), i) for i, p in got]
        conn.execute('BEGIN IMMEDIATE')
        conn.executemany("UPDATE tenant_jobs SET status='completed', result=?, completed_at=?, claim_token=NULL WHERE id=? AND claim_token='t' AND status='running'", done)
        conn.executemany("INSERT INTO tenant_job_attempts (job_id, number, ended_at, outcome) VALUES (?, 1, ?, 'completed')", [(i, at) for _, at, i in done])
        conn.execute('COMMIT')


def our_drain(level, n):
    path, conn = fresh(level)
    conn.execute('BEGIN')
    conn.executemany(add, map(row, range(n)))
    conn.execute('COMMIT')
    registry = Registry()
    registry.add(noop)
    engine = Engine(Settings(synchronous=level), registry)
    store = engine.store(f'sqlite:///{path}')
    start = time.perf_counter()
    engine.attend(store)
    while conn.execute("SELECT 1 FROM tenant_jobs WHERE status IN ('pending', 'running') LIMIT 1").fetchone(): time.sleep(0.005)
    took = time.perf_counter()-start
    engine.stop(0)
    return n/took


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=int, default=3)
    p.add_argument('--jobs', type=int, default=3000)
    p.add_argument('--save', type=Path, help='write the figures as JSON')
    a = p.parse_args()
    assert tables().jobs.name == 'tenant_jobs'
    out = []
    print(f'{"SQLite, jobs per second":28} {"level":7} {"raw":>9} {"fh_saas":>9} {"ratio":>6}')
    for what, raw, ours in (('submit one by one', raw_submit, our_submit), ('drain, one process', raw_drain, our_drain)):
        for level in ('FULL', 'NORMAL'):
            pairs = [(raw(level, a.jobs), ours(level, a.jobs)) for _ in range(a.runs)]
            r, o, ratio = (statistics.median(v) for v in ([x for x, _ in pairs], [y for _, y in pairs], [y/x for x, y in pairs]))
            out.append(dict(what=what, level=level, raw=r, ours=o, ratio=ratio, runs=a.runs, jobs=a.jobs))
            print(f'{what:28} {level:7} {r:9,.0f} {o:9,.0f} {ratio:6.2f}')
    if a.save: a.save.write_text(json.dumps(out, indent=1)+'\n')


if __name__ == '__main__': main()
