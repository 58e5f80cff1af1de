"""Half an hour in the life of a fleet: four workers, of which three are killed again and again, over 200 tenants that operators suspend, pause, delete and put back.

`python -m pytest tests/soak_fleet.py -s`; FH_SAAS_SOAK_SECONDS, _TENANTS, _RATE (submits in a second) and _SEED change what it does."""
import heapq, itertools, os, random, re, shutil, signal, sqlite3, time
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path
from statistics import median
import pytest
from children import soak_app
from children.launch import Child
from conftest import wait_until
from test_crash import concurrency, watch
from test_fleet import command
from fh_saas.db_connect import DatabaseBusy
from fh_saas.db_host import HostDatabase, timestamp
from fh_saas.db_tenant import close_tenant_db, delete_tenant, get_or_create_tenant_db, resume_tenant, suspend_tenant
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.states import final
from fh_saas.jobs.store import Store
from fh_saas.jobs.tenancy import rules_of, settle_held
from fh_saas.jobs.wake import wakes_of
from fh_saas.workers.fleet import Fleet
from fh_saas.utils_bgtsk import BackgroundTaskManager

def env(name, default): return int(os.environ.get(f'FH_SAAS_SOAK_{name}', default))

load = dict(quick=50, slow=10, wait=15, once=8, never=4, odd=6, later=6, many=1)  # weights; `many` is 20 quick ones in one commit
ends_as = dict(never='failed', odd='completed_with_warnings')  # the others: completed
tables = ['CREATE TABLE IF NOT EXISTS ran (job_id TEXT, attempt INTEGER, token TEXT, at TEXT, pid INTEGER)', 'CREATE TABLE IF NOT EXISTS reopened (id TEXT)',
    *(sql.replace('TRIGGER', 'TRIGGER IF NOT EXISTS') for sql in watch['sqlite'])]


class Tenant:
    def __init__(self, name): self.name, self.open, self.free = name, True, True; self.blank()  # open: takes jobs; free: no operator is at it
    def blank(self): self.jobs, self.back, self.discards = {}, set(), []  # id -> kind; ids open in a copy that was put back; when it was held, if discarded


class Soak:
    "A host, its workers, this process that submits, and operators: what happens here stands in one agenda of generators, which yield the seconds they wait"
    def __init__(self, folder, tenants, seed):
        self.folder, self.rnd, self.c, self.over = folder, random.Random(seed), Counter(), False
        self.host, self.web = HostDatabase(f'sqlite:///{folder}/host.db'), Engine(Settings(concurrency=0))
        self.agenda, self.count, self.tenants = [], itertools.count(), [Tenant(f't{n}') for n in range(tenants)]
        self.procs, self.hit, self.stops, self.samples, self.traces = [], set(), [], [], []
        for t in self.tenants: self.furnish(t)
        self.workers = [self.worker() for _ in range(4)]  # the first is spared
        for w in self.workers: w.says('jobs at once', 60)
    def go(self, steps, wait=0.0): heapq.heappush(self.agenda, (time.monotonic() + wait, next(self.count), steps))
    def run(self, seconds):
        "Whatever is next; after so many seconds, until all that has begun is done"
        until = time.monotonic() + seconds
        while self.agenda:
            at, _, steps = heapq.heappop(self.agenda)
            time.sleep(max(0, at - time.monotonic()))
            self.over = time.monotonic() > until
            if (wait := next(steps, None)) is not None: self.go(steps, wait)
    def tried(self, f, *args):
        "Again while it is busy: a process that was stopped may hold a lock"
        for _ in range(10):
            try: return f(*args)
            except DatabaseBusy: self.c['busy'] += 1
            yield 1
        return f(*args)
    def until(self, true, seconds, what):
        then = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < then, what()
            yield 0.3
        return found
    def worker(self):
        self.procs.append(p := Child('-c', command, 'worker', 'soak_app:host', SOAK_HOST=self.host.url.render_as_string(hide_password=False)))
        return p
    def put_away(self, p):
        "A process is over; what it said is kept"
        p.kill()
        shutil.copy(p.out, log := self.folder/f'worker-{p.pid}.log')
        if 'Traceback (most' in p.text: self.traces.append(log)
        self.procs.remove(p)
        p.close()
    def path(self, t): return self.folder/f'{t.name}_db.db'
    def rows(self, t, sql, *args):
        with closing(sqlite3.connect(f'file:{self.path(t)}?mode=rw', uri=True, timeout=30)) as conn: return conn.execute(sql, args).fetchall()
    def furnish(self, t):
        with get_or_create_tenant_db(t.name, host=self.host) as db:
            store = Store(db.conn_str, tenant=t.name)
            store.write(lambda cur, now: [cur.execute(sql) for sql in tables] and None)
            store.close()

    # what apps do
    def submit(self, t, kind=None):
        r, kind = self.rnd, kind or self.rnd.choices([*load], load.values())[0]
        due, most = timestamp(time.time() + r.uniform(1, 8)), 4 if kind == 'never' else 100
        kw = dict(slow=dict(seconds=r.uniform(0.2, 2)), wait=dict(seconds=r.uniform(0.05, 1.5)), later=dict(due=due, run_at=due)).get(kind, {})
        with get_or_create_tenant_db(t.name, host=self.host) as db:
            m = BackgroundTaskManager(db, self.web)
            if kind == 'many': ids = m.submit_many('quick', soak_app.quick, [dict(n=n) for n in range(20)], most)
            else: ids = [m.submit(kind, getattr(soak_app, kind), most, queue=r.choice(['default', 'imports']), priority=r.randint(1, 4), **kw)[0]]
        t.jobs.update(dict.fromkeys(ids, 'quick' if kind == 'many' else kind))
        self.c['submitted'] += len(ids)
    def submits(self, rate):
        while not self.over:
            if there := [t for t in self.tenants if t.open]:
                try: self.submit(self.rnd.choice(there))
                except DatabaseBusy: self.c['busy'] += 1
            yield self.rnd.expovariate(rate)

    # what befalls workers
    def kills(self):
        while not self.over:
            yield self.rnd.uniform(2, 6)
            i = self.rnd.randrange(1, 4)
            if (p := self.workers[i]) is None: continue
            what = self.rnd.choices(('kill', 'stop', 'term'), (8, 1, 1))[0]
            # one that still imports Python has nothing to end with grace
            if what == 'term' and p.pid not in [w.pid for w in Fleet(self.host).workers()]: continue
            self.c[f'{what}s'] += 1
            if what != 'term': self.hit.add(p.pid)
            self.workers[i] = None
            self.go(getattr(self, what)(i, p))
    def kill(self, i, p):
        self.put_away(p)
        self.workers[i] = self.worker()
        yield 0
    def stop(self, i, p):
        p.send(signal.SIGSTOP)
        self.stops.append(stopped := [timestamp(), '9'])
        yield self.rnd.uniform(6, 12)
        p.send(signal.SIGCONT)
        stopped[1] = timestamp(time.time() + 10)
        self.workers[i] = p
    def term(self, i, p):
        p.send(signal.SIGTERM)
        yield from self.until(lambda: not p.running, 40, lambda: f'worker {p.pid} does not end')
        assert p.proc.returncode == 0, f'worker {p.pid} ended with {p.proc.returncode}'
        yield from self.kill(i, p)

    # what operators do
    def operators(self):
        while not self.over:
            yield self.rnd.uniform(0.5, 2)
            free, what = [t for t in self.tenants if t.free], self.rnd.choices(('suspension', 'pause', 'deletion', 'restore'), (3, 3, 1, 2))[0]
            if len(free) > len(self.tenants)*3/4: self.c[f'{what}s'] += 1; self.go(self.at_work(self.rnd.choice(free), getattr(self, what)))
    def at_work(self, t, what): t.free = False; yield from what(t); t.free = True
    def suspension(self, t, between=()):
        t.open = False
        yield from self.tried(suspend_tenant, t.name, self.host)
        yield self.rnd.uniform(1, 6)
        yield from between
        yield from self.tried(resume_tenant, t.name, self.host)
        t.open = True
    def pause(self, t):
        what = self.rnd.choice([dict(tenant=t.name), dict(tenant=t.name, queue='imports'), dict(tenant=t.name, task='quick'), dict(task='slow')])
        for mode in ('paused', None):
            yield from self.tried(lambda: rules_of(self.host).set(**what, mode=mode))
            yield self.rnd.uniform(1, 6)
    def deletion(self, t):
        t.open = False
        self.check_reopened(t)
        yield from self.tried(delete_tenant, t.name, self.host, True)
        t.blank()
        yield self.rnd.choice([0, 0, 1, 5])
        yield from self.tried(self.furnish, t)
        t.open = True
    def restore(self, t):
        "Back to a copy of some seconds before: it must be held, and nothing begins before somebody has decided"
        copy = self.folder/f'{t.name}.copy'
        with closing(sqlite3.connect(self.path(t))) as src, closing(sqlite3.connect(copy)) as dst:
            src.backup(dst)
            had, was = dict(t.jobs), int(dict(dst.execute('SELECT key, value FROM fh_saas_meta')).get('mark', 0))
            still = {id for id, in dst.execute('SELECT id FROM tenant_jobs WHERE completed_at IS NULL')}
        yield self.rnd.uniform(2, 6)
        def known(): return wakes_of(self.host).facts(t.name)['mark'] > was
        for n in range(60):
            # a worker that is killed before it has told the host how far it came leaves that to the next job
            if n % 10 == 0: yield from self.tried(self.submit, t, 'quick')
            if known(): break
            yield 1
        assert known(), f'jobs were submitted, and yet the host knows no mark above {was}: {self.story(t)}'
        # by the book with the tenant suspended, and now and then while it is at work
        if self.rnd.random() < 0.75: yield 3; yield from self.suspension(t, self.put_back(t, copy, had, still))
        else: yield from self.put_back(t, copy, had, still)
        then = timestamp()
        yield from self.tried(self.submit, t, 'quick')
        why = yield from self.until(lambda: self.host.find(t.name).held, 60, lambda: f'{t.name} was put back to mark {was} before {then}, and is not held: {self.story(t)}')
        assert 'earlier state of itself' in why, why
        yield self.rnd.uniform(0.2, 3)
        begun = self.rows(t, 'SELECT id FROM tenant_jobs WHERE started_at > ?', then)
        assert not begun, f'{t.name} was put back before {then}, and these were begun: {[self.story(t, id) for id, in begun]}'
        if discard := self.rnd.random() < 0.5: t.discards.append(self.host.find(t.name).held_at)
        yield from self.tried(settle_held, self.host, t.name, discard)
    def put_back(self, t, copy, had, still):
        self.check_reopened(t)
        shutil.copy(copy, new := copy.with_suffix('.new'))
        close_tenant_db(t.name, self.host)
        for suffix in ('-wal', '-shm'): Path(f'{self.path(t)}{suffix}').unlink(missing_ok=True)
        new.replace(self.path(t))
        t.jobs, t.back = had, t.back | still
        yield 0
    def watcher(self):
        for n in itertools.count():
            yield 2
            if self.over: return
            self.check_held()
            for p in filter(None, self.workers): assert p.running, f'worker {p.pid} has ended by itself, with {p.proc.returncode}'
            if n % 5 == 0:
                proc = Path(f'/proc/{self.workers[0].pid}')
                self.samples.append((int((proc/'statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20, *(len([*(proc/d).iterdir()]) for d in ('fd', 'task'))))

    # what must hold
    def story(self, t, id=None):
        "What is known of a job, or of a tenant"
        job, tenant = 'task, status, attempt, retry_count, created_at, run_at, started_at, completed_at, error_message, worker', (self.host.find(t.name), wakes_of(self.host).facts(t.name))
        if not id: return *tenant, self.rows(t, f'SELECT id, {job} FROM tenant_jobs WHERE completed_at IS NULL LIMIT 5')
        return dict(tenant=t.name, job=id, back=id in t.back, row=self.rows(t, f'SELECT {job} FROM tenant_jobs WHERE id = ?', id), ran=self.rows(t, 'SELECT attempt, token, at, pid FROM ran WHERE job_id = ?', id),
            attempts=self.rows(t, 'SELECT number, outcome, error, worker, started_at, ended_at FROM tenant_job_attempts WHERE job_id = ?', id))
    def check_reopened(self, t):
        bad = self.rows(t, 'SELECT DISTINCT id FROM reopened')
        assert not bad, f'jobs that had ended were changed: {[self.story(t, id) for id, in bad]}'
    def check_held(self):
        free = {t.name for t in self.tenants if t.free}
        odd = [h for h in self.host.tenants() if h.held and h.id in free]
        assert not odd, f'held, and nobody had put anything back: {odd}'
    def all_ended(self):
        self.check_held()
        return not any(self.rows(t, "SELECT 1 FROM tenant_jobs WHERE status IN ('pending', 'running') LIMIT 1") for t in self.tenants)
    def explained(self, worker, start, end):
        "Was that process killed or stopped, or did one that was stopped hold the lock, so that no lease was renewed?"
        return int(worker.split(':')[1]) in self.hit or self.locked(start, end)
    def locked(self, start, end): return any(a < end and start < b for a, b in self.stops)  # may a process that was stopped have held a lock?
    def check(self, t):
        self.check_reopened(t)
        assert self.rows(t, 'PRAGMA integrity_check') == [('ok',)], t.name
        jobs = {id: row for id, *row in self.rows(t, 'SELECT id, status, completed_at, created_at, retry_count, max_retries, progress_percent FROM tenant_jobs')}
        assert jobs.keys() == t.jobs.keys(), f'{t.name}: lost {t.jobs.keys() - jobs.keys()}, never told of {[self.story(t, id) for id in jobs.keys() - t.jobs.keys()]}'
        tries, ran, warned = defaultdict(dict), defaultdict(list), {*self.rows(t, "SELECT job_id, attempt FROM tenant_job_logs WHERE level = 'warning'")}
        for id, n, *rest in self.rows(t, 'SELECT job_id, number, outcome, error, worker, started_at, ended_at FROM tenant_job_attempts'): tries[id][n] = rest
        for id, n, token in self.rows(t, 'SELECT job_id, attempt, token FROM ran'): ran[id].append((n, token))
        for id in jobs: self.check_job(t, id, t.jobs[id], tries[id], ran[id], warned, *jobs[id])
    def check_job(self, t, id, kind, tries, ran, warned, status, done, created, failed, most, percent):
        def sure(true, what): assert true, f'{what}: {self.story(t, id)}'
        outcomes, lost = [o for o, *_ in tries.values()], {n for n, (o, error, *_) in tries.items() if o == 'lost' or (error or '').startswith('worker_lost')}
        discarded = status == 'cancelled' and any(created < at for at in t.discards)
        sure(status in final and done, 'it has not ended')
        sure(discarded or status == ends_as.get(kind, 'completed'), 'not the end it should have')
        sure(sum(o in final for o in outcomes) == (not discarded), 'not ended exactly once')
        sure(failed == sum(o in ('retry', 'lost', 'failed') for o in outcomes), 'failed attempts do not add up')
        sure(discarded or kind != 'never' or failed == most, 'not as many attempts as it had')
        sure(discarded or kind != 'odd' or percent == 100 and (id, max(tries)) in warned, 'a warning or the progress is missing')
        sure(len(ran) == len(set(ran)), 'a claim was run twice')
        self.c.update(jobs=1, executions=len(ran), lost=len(lost), discarded=discarded)
        if id in t.back: return  # what it did between copy and restore stands nowhere any more
        kept_out = {n for n, (o, error, _, *when) in tries.items() if o == 'retry' and 'DatabaseBusy' in error and self.locked(*when)}  # it could not even note that it began
        began, silent = {n for n, _ in ran}, {n for n, (o, *_) in tries.items() if n in lost | kept_out or o == 'release'}
        sure(len(began) == len(ran), 'an attempt ran twice')
        sure(began <= tries.keys() and tries.keys() - began <= silent, 'executions and attempts do not match')
        sure(outcomes.count('retry') - len(kept_out) == (kind == 'once') or kind == 'never' or discarded or kind == 'once' and lost, 'it failed where it should not')
        sure(all(self.explained(*tries[n][2:]) for n in lost), f'attempts {lost} were lost by a process that nothing had happened to')
        self.c['extra'] += len(began & silent)
    def check_memory(self):
        quarter = max(1, len(self.samples)//4)
        (mb, _, threads), (mb_last, _, threads_last) = ([median(x) for x in zip(*s)] for s in (self.samples[quarter:2*quarter], self.samples[-quarter:]))
        most, flat = max(files for _, files, _ in self.samples), mb_last <= 1.15*mb + 10 and threads_last <= threads + 8
        # in its first minutes it opens databases and starts threads, of which the crew has 48 at most and the house 32
        assert most < 800 and threads_last < 100 and (flat or len(self.samples) < 30), f'MB, files, threads of the spared worker {self.workers[0].pid}: {self.samples}'
        return dict(mb=(round(mb), round(mb_last)), files=most, threads=(threads, threads_last))


@pytest.mark.soak
def test_half_an_hour(tmp_path, capsys):
    s = Soak(tmp_path, env('TENANTS', 200), seed := env('SEED', time.time_ns()))
    try:
        for steps in (s.submits(env('RATE', 30)), s.kills(), s.operators(), s.watcher()): s.go(steps)
        s.run(env('SECONDS', 1800))
        start = time.monotonic()
        wait_until(s.all_ended, 180, 'not all jobs ended')
        s.c['healed'] = round(time.monotonic() - start, 1)
        figures = s.check_memory()
        for p in [*s.procs]: s.put_away(p)
        for t in s.tenants: s.check(t)
        assert s.c['extra'] <= concurrency*(s.c['kills'] + s.c['stops']), s.c
        assert not s.traces, 'errors that nobody had foreseen'
    except BaseException as e:
        for p in [*s.procs]: s.put_away(p)
        pids = {*re.findall(r'\b(?:worker |:)(\d{2,})\b', str(e))} | {str(s.workers[0].pid)}
        logs = [*s.traces, *(log for pid in pids if (log := tmp_path/f'worker-{pid}.log').exists())]
        e.add_note('\n'.join([f'seed {seed}, {dict(s.c)}', *(f'{log}: …{log.read_text(errors="replace")[-2000:]}' for log in logs[:4])]))
        raise
    finally:
        s.web.stop(0)
        s.host.close()
    with capsys.disabled(): print('', dict(s.c) | figures | dict(seed=seed))
