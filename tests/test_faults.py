"Faults that are really injected: each ends in a typed error or a recorded outcome, and harms nobody else."
import asyncio, os, signal, sqlite3, statistics, subprocess, threading, time, uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
import httpx2, psycopg, pytest
import sqlalchemy as sa
from fastsql import Database
from children import tasks
from children.launch import Child, here
from conftest import forge, free_port, mounted, wait_until
from fh_saas import Permanent, db_connect
from fh_saas.db_connect import (DatabaseBusy, DatabaseCorrupt, DatabaseFull, DatabaseReadOnly, DatabaseUnavailable, FhSaasError, NewerDatabase, TooManyConnections, UnsupportedDatabase, writing)
from fh_saas.db_host import HostDatabase, seconds, timestamp
from fh_saas.db_tenant import close_tenant_db, delete_tenant, get_or_create_tenant_db, open_tenant_db
from fh_saas.jobs import attempt
from fh_saas.jobs.desk import Desk
from fh_saas.jobs.payload import NotJson
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.store import Store
from fh_saas.jobs.wake import Wakes, wakes_of
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.worker import Worker

ended = ('completed', 'completed_with_warnings', 'failed', 'cancelled')


@pytest.fixture
def child():
    "Start scripts of `tests/children`; killed afterwards"
    with ExitStack() as stack:
        def start(*args, **kw):
            stack.callback((c := Child(*args, **kw)).close)
            return c
        yield start


@pytest.fixture
def open_manager(new_engine):
    "Call it with a URL for a manager, by default on an engine of its own; with `runs=False` its engine leaves the jobs to others"
    with ExitStack() as stack:
        def make(url, engine=None, runs=True, **settings):
            stack.callback(lambda db: (db.conn.close(), db.engine.dispose()), db := Database(str(url)))
            m = BackgroundTaskManager(db, engine or new_engine(**settings))
            if not runs: m.engine.pause(m.store)
            return m
        yield make


class Gate:
    "A task that waits where a test wants it to"
    def __init__(self):
        self.inside, self.go = threading.Event(), threading.Event()
        def gated(n):
            self.inside.set()
            assert self.go.wait(60)
            return n
        self.task = gated

    def submit(self, manager, **kw):
        job_id, bg_task = manager.submit('gated', self.task, n=1, **kw)
        threading.Thread(target=bg_task.func, args=bg_task.args, daemon=True).start()
        assert self.inside.wait(10)
        return job_id


def echo(n): return n

def execute(store, sql, **params):
    with writing(store.engine) as conn: conn.execute(sa.text(sql), params)

def end(manager, job_id, seconds=20, status=ended):
    "The job once it has ended"
    return wait_until(lambda: (j := manager.get_job(job_id)).status in status and j, seconds, f'{job_id}: no {status}')

def outcomes(manager, job_id): return [a['outcome'] for a in manager.attempts(job_id)]

def run(manager, n=1):
    "Submit a job and run it here"
    job_id, bg_task = manager.submit('echo', echo, n=n)
    bg_task.func(*bg_task.args)
    return manager.get_job(job_id)

def by_engine(manager, seconds=5):
    "Submit a job that the engine's own threads run; seconds until its end is seen"
    start = time.monotonic()
    job_id, _ = manager.submit('echo', echo, n=1)
    end(manager, job_id, seconds, ['completed'])
    return time.monotonic() - start

usual = statistics.median # the machine may stand still once

def bounded(seconds, error, f, *args, **kw):
    "`f` raises `error`, in time"
    start = time.monotonic()
    with pytest.raises(error) as e: f(*args, **kw)
    assert time.monotonic() - start < seconds
    return str(e.value)


# --- Zombies and clocks

def test_a_zombies_late_result_is_dropped(url, child, open_manager):
    m = open_manager(url, runs=False, handoff=0)
    zombie = child('worker.py', url, '{"lease": 1}')
    zombie.says('ready')
    job_id, _ = m.submit('work', tasks.work, seconds=0.6)
    end(m, job_id, 10, ['running'])
    zombie.says('^begun$')  # one that is claimed and not begun has no late result
    zombie.send(signal.SIGSTOP)
    heir = child('worker.py', url, '{"lease": 1}')
    j = end(m, job_id)
    assert (j.status, j.result, j.retry_count, outcomes(m, job_id)) == ('completed', str(heir.pid), 1, ['lost', 'completed'])
    heir.kill()
    zombie.send(signal.SIGCONT)
    zombie.says('^stale 1$')
    assert m.get_job(job_id) == j and outcomes(m, job_id) == ['lost', 'completed']
    job_id, _ = m.submit('work', tasks.work, seconds=0)
    assert end(m, job_id).result == str(zombie.pid)  # and it goes on as a good worker


def _far_lease(m, at='2999-01-01T00:00:00.000000'):
    "A job whose runner wrote its lease when the clock was wrong, and died"
    job_id, _ = m.submit('echo', echo, n=1, run_at=at)
    execute(m.store, "UPDATE tenant_jobs SET status='running', claim_token='t', worker='gone', attempt=1, started_at=created_at, lease_until=:at WHERE id=:id", at=at, id=job_id)
    return job_id

def test_a_lease_too_far_ahead_has_expired(url, open_manager):
    m = open_manager(url, lease=1)
    j = end(m, _far_lease(m), 5)
    assert (j.status, j.retry_count, outcomes(m, j.id)) == ('completed', 1, ['lost', 'completed'])

def test_a_lease_too_far_ahead_is_seen_beside_a_good_one(url, open_manager):
    m, gate = open_manager(url, lease=1), Gate()
    gate.submit(m)
    assert end(m, _far_lease(m), 5).status == 'completed'
    gate.go.set()


# --- A lock that another process holds

def test_a_foreign_write_lock(new_url, child, open_manager, new_engine):
    locked, free = new_url(), new_url()
    e, gate = new_engine(busy=0.4, lease=8, handoff=0), Gate()
    m, other = open_manager(locked, e), open_manager(free, e)
    job_id = gate.submit(m)
    holder = child('lock.py', locked)
    holder.says('locked')
    assert locked.rpartition('/')[2] in bounded(3*0.4+1+1, DatabaseBusy, m.submit, 'echo', echo, n=1)
    assert usual(by_engine(other) for _ in range(5)) < 1
    gate.go.set()  # the result is there, and can not be written
    time.sleep(1.5)
    assert m.get_job(job_id).status == 'running' and usual(by_engine(other) for _ in range(5)) < 1
    holder.kill()
    j = end(m, job_id, 5)
    assert (j.status, j.result, j.attempt, j.retry_count, e.stale) == ('completed', '1', 1, 0, 0)
    assert by_engine(m) < 3 and len(m.list_jobs()) == 2  # nothing of the refused one was written

def test_many_locked_tenants_keep_no_other_waiting(new_sqlite, child, open_manager, new_engine):
    e, holders, gates = new_engine(busy=2, handoff=0, concurrency=32, lease=3), [], []
    other = open_manager(new_sqlite(), e)
    for url in (urls := [new_sqlite() for _ in range(10)]):
        gates.append(gate := Gate())
        gate.submit(open_manager(url, e))
    for url in urls: holders.append(child('lock.py', url))
    for h in holders: h.says('locked')
    for gate in gates: gate.go.set()
    waits, until = [], time.monotonic() + 3  # heartbeats and visits of the ten come and wait
    while time.monotonic() < until: waits.append(by_engine(other, 10))
    for h in holders: h.kill()
    assert max(waits) < 1.9  # who waits for one of the locks waits for two seconds or more

@pytest.fixture
def fleet(tmp_path, new_engine, child):
    "Call it with a number for managers of so many tenants of one SQLite host, and what locks the host"
    host, dbs = HostDatabase(f'sqlite:///{tmp_path}/host.db'), ExitStack()
    def make(n, **settings):
        e = new_engine(handoff=0, **settings)
        ms = [BackgroundTaskManager(dbs.enter_context(get_or_create_tenant_db(f't{i}', host=host)), e) for i in range(n)]
        def lock(*urls):
            (holder := child('lock.py', *(u.render_as_string(hide_password=False) for u in urls or [host.url]))).says('locked')
            return holder
        return ms, lock
    yield make
    dbs.close()
    host.close()

def test_a_locked_host_keeps_no_lease_from_being_renewed(fleet):
    [m], lock = fleet(1, lease=3, busy=5)
    over, runs = threading.Event(), []
    def long(): runs.append(1); over.wait(30)
    id, _ = m.submit('long', long)
    wait_until(lambda: runs, 10)
    holder, desk = lock(), m.engine._desks[m.store]
    [a] = desk.live.values()
    desk.tenancy.told, desk.tenancy.told_at = 0, 0.0  # there is something to say
    least, until = 99, time.monotonic() + 8
    while time.monotonic() < until: least = min(least, a.lease_until - time.monotonic()); time.sleep(0.05)
    assert desk.tenancy.untold and desk.tenancy.told_at  # it was tried
    holder.kill()
    over.set()
    assert least > 0.3 and (j := end(m, id)).status == 'completed' and (j.attempt, len(runs)) == (1, 1)

def test_marks_that_cannot_be_told_take_one_thread(fleet):
    "However many tenants there are, and whatever they wait for"
    ms, lock = fleet(6, lease=3, busy=2)
    e, over = ms[0].engine, threading.Event()
    others, vip = ms[1:], ms[0]
    def own(job):
        with job.begin() as conn: job.complete(conn, 1)
    for _ in range(2):
        for m in others: assert end(m, m.submit('own', own)[0]).status == 'completed'
    id, _ = vip.submit('long', lambda: over.wait(30))
    wait_until(lambda: e._desks[vip.store].live, 10)
    holders = [lock(m.store.url) for m in others]
    [a] = e._desks[vip.store].live.values()
    for t in (e._desks[m.store].tenancy for m in others): t.own, t.told = t.own + 1, 0  # there is something to say
    least, most, until = 99, 0, time.monotonic() + 6
    while time.monotonic() < until:
        for m in others: e._desks[m.store].tenancy.told_at = 0.0
        e.tidy(256)
        least, most = min(least, a.lease_until - time.monotonic()), max(most, e.house.busy)
        time.sleep(0.2)
    for h in holders: h.kill()
    over.set()
    assert least > 0.3 and most <= 8 and end(vip, id).attempt == 1  # those of the other five, before, took a thread each second

def test_an_engine_ends_in_bounded_time_though_the_host_is_locked(fleet):
    ms, lock = fleet(8, busy=1)
    for m in ms: end(m, m.submit('t', lambda: 1)[0])
    for m in ms: (t := m.engine._desks[m.store].tenancy).told = 0; assert t.untold
    holder, start = lock(), time.monotonic()
    ms[0].engine.stop(0)
    took = time.monotonic() - start
    holder.kill()
    assert took < 8 and all(m.store._writer is None for m in ms)

def _in_line(ms) -> list:
    "A job of each, claimed and not begun"
    e = ms[0].engine
    e.quiet, room, e.line.size = True, e._room(e._desks[ms[0].store], 1), 0  # nothing is begun
    ids = [m.submit('t', lambda: 1, run_at='2020-01-01')[0] for m in ms]
    for m in ms:
        _, attempts, *_ = (desk := e._desks[m.store]).turn([], [], room)
        e.line.put(desk, attempts)
        for a in attempts: a.counted = True
    return ids

@pytest.mark.parametrize('threads', ['threads', 'no threads'])
def test_jobs_in_line_go_back_in_bounded_time_though_the_host_is_locked(fleet, monkeypatch, threads):
    "Where no thread can be started: an `atexit` handler since Python 3.12"
    ms, lock = fleet(4, busy=1, concurrency=1)
    e, ids = ms[0].engine, _in_line(ms)
    assert e.line.waiting == 4 and e.line.running == 0
    holder, start = lock(), time.monotonic()
    with monkeypatch.context() as mp:
        if threads == 'no threads': mp.setattr(threading.Thread, 'start', lambda self: exec("raise RuntimeError(\"can't start new thread\")"))
        e.stop(0)
    took = time.monotonic() - start
    holder.kill()
    assert took < 16 and [m.get_job(id).status for m, id in zip(ms, ids)] == ['pending']*4  # a host's lock is waited for for five seconds; once for each of four it is 40

def test_an_engine_ends_in_bounded_time_though_all_is_locked(fleet):
    "Host and tenants, with jobs in line and jobs that run: however many there are, and whatever each part of the end waits for"
    ms, lock = fleet(12, busy=1, concurrency=16)
    e, inside, go_on = ms[0].engine, threading.Semaphore(0), threading.Event()
    def runs(): inside.release(); go_on.wait(30)
    running = [m.submit('runs', runs)[0] for m in ms[:4]]
    assert all(inside.acquire(timeout=10) for _ in running)
    _in_line(ms[4:])
    for m in ms: e.tenancy(m.store).told = 0; assert e.tenancy(m.store).untold
    left, say = [], e._say_farewell
    e._say_farewell = lambda desks, until: left.append(until - time.monotonic()) or say(desks, until)
    holders, start = [lock(), lock(*(m.store.url for m in ms))], time.monotonic()
    e.stop(0)
    took = time.monotonic() - start
    for h in holders: h.kill()
    go_on.set()
    assert took < 9 and 1 < left[0] < 3.5  # of 4 seconds for all that follows the grace; the locks of running jobs have taken some
    wait_until(lambda: all(m.store._writer is None for m in ms), 10)  # who still waited for a lock closes behind itself

def test_a_host_that_is_locked_keeps_no_mark_from_another(fleet, tmp_path):
    [m], lock = fleet(1, busy=1)
    another, e = HostDatabase(f'sqlite:///{tmp_path}/another.db'), m.engine
    db = get_or_create_tenant_db('its', host=another)
    ms = m, BackgroundTaskManager(db, e)
    tenancies = [e._desks[m.store].tenancy for m in ms]
    for m in ms: end(m, m.submit('t', lambda: 1)[0])
    holder = lock()
    for t in tenancies: t.told = 0; assert t.untold
    e.rings.put(e._desks[ms[0].store])
    e.stop(0)
    untold = [t.untold for t in tenancies]
    holder.kill()
    db.close(); another.close()
    assert untold == [True, False]

def test_a_tenant_that_is_locked_keeps_no_mark_from_another(fleet):
    ms, lock = fleet(6, busy=1)
    for m in ms: end(m, m.submit('t', lambda: 1)[0])
    tenancies = [m.engine._desks[m.store].tenancy for m in ms]
    for t in tenancies: t.told = 0
    for t in tenancies[:3]: t.sure = 0  # there is a claim of which the disk may not know
    holders, start = [lock(m.store.url) for m in ms[:3]], time.monotonic()
    ms[0].engine.stop(0)
    took = time.monotonic() - start
    for h in holders: h.kill()
    assert [t.untold for t in tenancies] == [True]*3 + [False]*3 and took < 6

def test_a_host_that_answers_again_is_told_of_retries_while_jobs_drain(fleet):
    ms, lock = fleet(2, busy=2, grace=30)
    e, gates, failed = ms[0].engine, [threading.Event(), threading.Event()], []
    def fails(n): gates[n].wait(30); failed.append(n); raise OSError('once')
    ids = [m.submit('fails', fails, n=n)[0] for n, m in enumerate(ms)]
    wait_until(lambda: all(e._desks[m.store].live for m in ms), 10)
    time.sleep(1)  # what is noted in the host for the submits has been written
    wakes, holder = e.tenancy(ms[0].store).wakes, lock()
    (stop := threading.Thread(target=e.stop)).start()
    gates[0].set()
    wait_until(lambda: wakes in e._mute, 10)
    holder.kill()
    until = e._mute[wakes]
    gates[1].set()
    stop.join(10)
    assert time.monotonic() < until  # it did not answer a moment ago
    with wakes.cursor() as cur: [[wake]] = cur.execute("SELECT wake_at FROM fh_saas_wakes WHERE tenant_id = 't1'").fetchall()
    assert abs(seconds(wake) - seconds(ms[1].get_job(ids[1]).run_at)) < 0.5  # and not the end of the attempt's lease

def test_an_end_waits_once_for_a_host_that_takes_no_mark(fleet, monkeypatch):
    "And not once for each tenant; a thread that has it end can wait for nobody else"
    ms, _ = fleet(3)
    e, asked = ms[0].engine, []
    for m in ms: (t := e.tenancy(m.store)).told, t.told_at = 0, 0.0; end(m, m.submit('t', lambda: 1)[0])
    def busy(self): asked.append(self.tenant_id); raise DatabaseBusy('the host is locked')
    monkeypatch.setattr(type(e.tenancy(ms[0].store)), 'tell', busy)
    e.stopping = True
    e._stoppers.add(threading.get_ident())
    for m in ms: (t := e.tenancy(m.store)).told, t.told_at = 0, 0.0; assert t.untold; e._tell_mark(e._desks[m.store])
    assert len(asked) == 1

def test_an_engine_that_cannot_say_farewell_closes_its_stores(fleet, monkeypatch):
    ms, _ = fleet(2)
    for m in ms: end(m, m.submit('t', lambda: 1)[0])
    for m in ms: m.store.write(lambda cur, now: None); m.engine._desks[m.store].tenancy.told = 0
    monkeypatch.setattr(type(ms[0].engine._desks[ms[0].store].tenancy), 'tell', lambda self: 1/0)
    ms[0].engine.stop(0)
    assert all(m.store._writer is None for m in ms)

def test_results_of_a_locked_tenant_keep_no_threads(new_sqlite, child, open_manager, new_engine):
    "Every thread for jobs has run a job of one tenant, whose results now wait for its lock"
    e, inside, go = new_engine(busy=0.3, handoff=0, concurrency=4, lease=20), threading.Semaphore(0), threading.Event()
    def gated(): inside.release(); assert go.wait(60)
    m, other = open_manager(url := new_sqlite(), e), open_manager(new_sqlite(), e)
    ids = [m.submit('gated', gated)[0] for _ in range(4)]
    assert all(inside.acquire(timeout=10) for _ in ids)
    holder = child('lock.py', url)
    holder.says('locked')
    go.set()
    time.sleep(1)
    took = usual(by_engine(other, 5) for _ in range(3))
    holder.kill()
    assert [end(m, i).attempt for i in ids] == [1]*4 and took < 1

def test_locked_tenants_do_not_hold_up_the_end(new_sqlite, child, open_manager, new_engine):
    e, holders = new_engine(busy=1, handoff=0, lease=30), []
    for url in (urls := [new_sqlite() for _ in range(6)]): Gate().submit(open_manager(url, e))
    for url in urls: holders.append(child('lock.py', url))
    for h in holders: h.says('locked')
    start = time.monotonic()
    e.stop(0.5)
    took = time.monotonic() - start
    for h in holders: h.kill()
    assert took < 5  # grace, and one wait for all locks, of one second


# --- Full, read-only, gone, damaged

def test_a_full_disk(tmp_path, new_sqlite, open_manager, new_engine):
    (folder := tmp_path/'small').mkdir()
    with mounted(folder, '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs'):
        e, gate = new_engine(handoff=0, lease=20), Gate()
        m, other = open_manager(f'sqlite:///{folder}/a.db', e), open_manager(new_sqlite(), e)
        job_id, ids = gate.submit(m), []
        with open(folder/'filler', 'wb', buffering=0) as f:
            with pytest.raises(OSError, match='No space'):
                while True: f.write(bytes(4096))
        with pytest.raises(DatabaseFull, match='free some'):
            for _ in range(200): ids.append(m.submit('echo', echo, n='x'*5000, run_at='2999-01-01T00:00:00')[0])
        gate.go.set()
        time.sleep(1)
        assert m.get_job(job_id).status == 'running' and by_engine(other) < 1
        (folder/'filler').unlink()
        j = end(m, job_id, 5)
        assert (j.status, j.attempt, j.retry_count, e.stale) == ('completed', 1, 0, 0)
        assert {j.id for j in m.list_jobs(None, 'pending')} == set(ids) and by_engine(m) < 5
        with m.store.cursor() as cur: assert cur.execute('PRAGMA integrity_check').fetchone() == ('ok',)
        e.stop(0)
        m.db.conn.close(); m.db.engine.dispose()

def test_a_database_opened_read_only(new_sqlite, open_manager, new_engine):
    url, e = new_sqlite(), new_engine(handoff=0)
    run(open_manager(url, e))
    m = open_manager(f"sqlite:///file:{url.removeprefix('sqlite:///')}?mode=ro&uri=true", e)
    assert 'permission' in bounded(2, DatabaseReadOnly, m.submit, 'echo', echo, n=1)
    assert len(m.list_jobs()) == 1

def test_a_folder_mounted_read_only(tmp_path, new_sqlite, open_manager, new_engine):
    (folder := tmp_path/'ro').mkdir()
    url, e = f'sqlite:///{folder}/a.db', new_engine(handoff=0)
    first = open_manager(url)
    run(first)
    first.engine.stop(0)
    first.db.conn.close(); first.db.engine.dispose()
    before = (folder/'a.db').read_bytes()
    with mounted(folder, '--bind', str(folder)):
        assert not subprocess.run(['mount', '-o', 'remount,ro,bind', str(folder)]).returncode
        other = open_manager(new_sqlite(), e)
        bounded(3, (DatabaseReadOnly, DatabaseUnavailable), lambda: e.store(url).add(dict(id='1', job_type='echo', max_retries=3)))
        assert by_engine(other) < 1
    assert (folder/'a.db').read_bytes() == before

def remove(url):
    path = Path(sa.make_url(str(url)).database)
    for p in path.parent.glob(f'{path.name}*'): p.unlink()
    return path

def test_a_file_deleted_under_a_running_engine(new_sqlite, open_manager, new_engine):
    url, e = new_sqlite(), new_engine(handoff=0)
    m, other = open_manager(url, e), open_manager(new_sqlite(), e)
    run(m)
    path = remove(url)
    bounded(3, (DatabaseUnavailable, DatabaseReadOnly), m.submit, 'echo', echo, n=2)
    assert usual(by_engine(other) for _ in range(5)) < 1
    assert not path.exists()

def test_a_file_deleted_while_its_connections_were_closed(tmp_path, new_engine):
    e, host = new_engine(handoff=0), HostDatabase(f'sqlite:///{tmp_path}/host.db')
    db, db2 = (get_or_create_tenant_db(n, host=host) for n in ('acme', 'globex'))
    m, other = BackgroundTaskManager(db, e), BackgroundTaskManager(db2, e)
    run(m)
    m.store.close(); db.close(); host.open_dbs.close(db.engine.url)
    path = remove(m.store.url)
    bounded(3, DatabaseUnavailable, m.submit, 'echo', echo, n=2)
    bounded(3, DatabaseUnavailable, open_tenant_db, 'acme', host)
    time.sleep(1.5)  # a visit or two
    assert by_engine(other) < 1 and not path.exists()
    db2.close(); host.close()

def test_a_tenant_deleted_and_made_anew_has_a_database_of_its_own(tmp_path, new_engine):
    e, host = new_engine(handoff=0), HostDatabase(f'sqlite:///{tmp_path}/host.db')
    with get_or_create_tenant_db('acme', host=host) as db: run(BackgroundTaskManager(db, e))
    delete_tenant('acme', host)
    with get_or_create_tenant_db('acme', host=host) as db:
        m = BackgroundTaskManager(db, e)
        job_id, _ = m.submit('echo', echo, n=2)
        with sqlite3.connect(tmp_path/'acme_db.db') as conn: assert conn.execute('SELECT id FROM tenant_jobs').fetchall() == [(job_id,)]
        assert end(m, job_id).status == 'completed'
    host.close()

def test_a_file_that_is_no_database(tmp_path, new_sqlite, open_manager, new_engine):
    e, host = new_engine(handoff=0), HostDatabase(f'sqlite:///{tmp_path}/host.db')
    other = open_manager(new_sqlite(), e)
    get_or_create_tenant_db('acme', host=host).close()
    close_tenant_db('acme', host)
    (bad := tmp_path/'acme_db.db').write_bytes(junk := b'hello, this is no database '*1000)
    for f in (lambda: open_tenant_db('acme', host), lambda: get_or_create_tenant_db('acme', host=host), lambda: e.store(f'sqlite:///{bad}')):
        with pytest.raises(DatabaseCorrupt, match='acme_db.db.*good copy'): f()
    assert by_engine(other) < 1 and bad.read_bytes() == junk
    host.close()

def test_corrupt_pages(new_sqlite, open_manager, new_engine):
    url, e = new_sqlite(), new_engine(handoff=0)
    m, other = open_manager(url, e), open_manager(new_sqlite(), e)
    e.pause(m.store)
    for n in range(40): m.submit('echo', echo, n='x'*2000, run_at='2999-01-01T00:00:00')
    wait_until(lambda: not e._desks[m.store].turning)
    m.store.close()
    # a connection that is open while this process reads the file as a file loses its locks, and is in the way afterwards
    with closing(sqlite3.connect(path := Path(url.removeprefix('sqlite:///')))) as conn: assert conn.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchone()[0] == 0
    good = path.read_bytes()
    path.write_bytes(good[:4096*3] + os.urandom(len(good) - 4096*3))
    with pytest.raises(DatabaseCorrupt, match='good copy'):
        m.list_jobs(limit=None)
        for n in range(10): m.submit('echo', echo, n=n)
    e.pause(m.store, False)
    assert usual(by_engine(other) for _ in range(5)) < 1

def test_a_newer_database(url, open_manager, new_engine):
    m = open_manager(url)
    j = run(m)
    execute(m.store, "UPDATE fh_saas_meta SET value='99' WHERE key='schema:tenant_jobs'")
    with pytest.raises(NewerDatabase, match='schema 99.*upgrade'): open_manager(url, new_engine())
    assert m.get_job(j.id) == j

@pytest.mark.parametrize('url', ['sqlite://', 'sqlite:///:memory:', 'sqlite:///file::memory:?cache=shared&uri=true', 'sqlite:///file:x?mode=memory&cache=shared&uri=true'])
def test_memory_is_refused_with_the_reason(url, open_manager):
    with pytest.raises(UnsupportedDatabase, match='one connection.*use a file'): open_manager(url)


# --- PostgreSQL

@pytest.fixture
def server(pg_server):
    with psycopg.connect(pg_server, autocommit=True) as conn: yield conn

def terminate(server, url): return server.execute('SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE datname = %s', [sa.make_url(url).database]).fetchone()[0]

def test_backends_killed_while_idle(new_pg, server, open_manager):
    m = open_manager(url := new_pg(), handoff=0)
    for _ in range(3):
        job_id = run(m).id  # here, or by the engine if that was faster
        wait_until(lambda: m.get_job(job_id).status == 'completed')
        assert terminate(server, url)
        assert by_engine(m) < 5
        assert terminate(server, url)
        m.list_jobs()

def test_backends_killed_while_a_job_runs(new_pg, server, open_manager):
    m, gate = open_manager(url := new_pg(), lease=2, handoff=0), Gate()
    job_id = gate.submit(m)
    for _ in range(6):  # through several heartbeats
        terminate(server, url)
        time.sleep(0.5)
    terminate(server, url)
    gate.go.set()
    j = end(m, job_id)
    assert (j.status, j.attempt, m.engine.stale) == ('completed', 1, 0)

def test_a_transaction_that_stalls_keeps_its_rows_from_nobody(new_pg, monkeypatch):
    "As that of a process which was stopped in the middle of it"
    monkeypatch.setattr('fh_saas.db_connect.stalled', 0.3)
    stopped, other = Store(url := new_pg()), Store(url)
    stopped.add(dict(id='j', job_type='t', task='t'))
    stopped.close()
    held, gate = threading.Event(), threading.Event()
    rename = lambda cur, name: cur.execute("UPDATE tenant_jobs SET task = %s WHERE id = 'j'", [name])
    def op(cur, now):
        rename(cur, 'stopped')
        held.set()
        gate.wait(20)
        rename(cur, 'late')
    with ThreadPoolExecutor() as pool:
        late = pool.submit(stopped.write, op)
        assert held.wait(5)
        other.write(lambda cur, now: rename(cur, 'other') and None)
        gate.set()
        with pytest.raises(DatabaseUnavailable, match='idle-in-transaction'): late.result(10)
    assert stopped.get('j')['task'] == 'other'
    stopped.write(lambda cur, now: rename(cur, 'again') and None)
    assert other.get('j')['task'] == 'again'
    for s in (stopped, other): s.close()

@pytest.fixture
def few(new_pg, server):
    "URL of a new database, for a role that may have four connections"
    url, role = sa.make_url(new_pg()), f'fh_saas_test_{uuid.uuid4().hex[:12]}'
    server.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'few' CONNECTION LIMIT 4")
    server.execute(f'ALTER DATABASE {url.database} OWNER TO {role}')
    yield url.set(username=role, password='few')
    server.execute(f'DROP DATABASE {url.database} WITH (FORCE)')
    server.execute(f'DROP ROLE {role}')

def test_who_is_refused_a_connection_closes_those_it_does_not_use_and_waits(few, server, monkeypatch):
    monkeypatch.setattr(db_connect, '_room_made', 0.0)
    store, eng = Store(few), db_connect.open_engine(few)
    store.add(dict(id='a', job_type='t', task='t', payload='{}'))
    with db_connect.reading(eng) as conn: conn.exec_driver_sql('SELECT 1')
    mine = [db_connect.connect(few) for _ in range(2)]
    assert server.execute('SELECT count(*) FROM pg_stat_activity WHERE usename = %s', [few.username]).fetchone() == (4,)
    mine += [db_connect.connect(few, busy=3) for _ in range(2)]  # in the place of the writer and of the engine's
    with pytest.raises(TooManyConnections, match='no connection to spare'), store.cursor(): pass
    threading.Timer(0.5, mine.pop().close).start()
    assert store.get('a')['job_type'] == 't'
    for c in mine: c.close()
    store.close()

@pytest.mark.parametrize('way', ['begin', 'db', 'a database of its own'])
def test_a_job_that_gets_no_connection_comes_again_without_having_used_an_attempt(way, new_pg, open_manager, new_engine, monkeypatch):
    monkeypatch.setattr(attempt, 'later', 0.5)
    m, other, here, connects = open_manager(new_pg(), new_engine(handoff=0, busy=0.2)), new_pg(), threading.local(), psycopg.connect
    def connect(*args, **kw):
        if getattr(here, 'full', False): raise psycopg.OperationalError('connection failed: FATAL:  sorry, too many clients already')
        return connects(*args, **kw)
    monkeypatch.setattr(psycopg, 'connect', connect)
    def work(job):
        here.full = job.attempt < 3
        try:
            if way == 'begin':
                with job.begin() as conn: return conn.exec_driver_sql('SELECT 7').scalar()
            if way == 'db': return job.db.conn.exec_driver_sql('SELECT 7').scalar()
            with db_connect.reading(db_connect.open_engine(other, busy=0.2)) as conn: return conn.exec_driver_sql('SELECT 7').scalar()
        finally: here.full = False
    j = end(m, m.submit('work', work, max_retries=1)[0], 20)
    assert (j.status, j.retry_count, j.result, outcomes(m, j.id)) == ('completed', 0, '7', ['snooze', 'snooze', 'completed'])
    a, b, _ = m.attempts(j.id)
    assert 'TooManyConnections' in a['error'] and seconds(b['started_at']) - seconds(a['ended_at']) > 0.4

def test_the_policy_of_a_task_and_its_timeout_come_before_that(new_sqlite, open_manager):
    m = open_manager(new_sqlite(), handoff=0)
    def full(): raise TooManyConnections('full')
    def slow(job): wait_until(lambda: job.should_stop, 10); raise TooManyConnections('full')
    m.engine.registry.add(full, full.__qualname__, on_error={DatabaseUnavailable: Permanent})
    for f, kw in ((full, dict(max_retries=3)), (slow, dict(max_retries=1, timeout=1))):
        assert outcomes(m, end(m, m.submit('t', f, **kw)[0], 10).id) == ['failed']

def test_a_full_server_sets_no_tenant_aside_for_long(new_sqlite, monkeypatch):
    host, calls, trouble = HostDatabase(new_sqlite()), [], Wakes.trouble
    get_or_create_tenant_db('acme', host=host).close()
    def full(self, *args): raise TooManyConnections('full')
    for name in ('look', 'turn'): monkeypatch.setattr(Desk, name, full)
    monkeypatch.setattr(Wakes, 'trouble', lambda *args: calls.append(args) or trouble(*args))
    with Worker(host, Settings(concurrency=2)) as w:
        wait_until(lambda: calls, 20)
        wait_until(lambda: (desk := next((d for d in w.engine._desks.values() if d.store.tenant == 'acme'), None)) and desk.quiet == 2, 20)
        for _ in range(4): w.engine._turn(next(d for d in w.engine._desks.values() if d.store.tenant == 'acme'))
        assert [d.quiet for d in w.engine._desks.values() if d.store.tenant == 'acme'] == [2]
    assert calls[0][-1] == 2.0
    (wakes := wakes_of(host)).write(lambda cur, now: cur.execute("UPDATE fh_saas_wakes SET fails = 8, visitor = 'me'"))
    assert trouble(wakes, 'acme', 'me', timestamp(), 'full', 2.0) == 2
    host.close()

def test_a_database_dropped_under_a_running_engine(new_pg, server, open_manager, new_engine):
    e, gate = new_engine(handoff=0, lease=2), Gate()
    m, other = open_manager(url := new_pg(), e), open_manager(new_pg(), e)
    gate.submit(m)
    server.execute(f'DROP DATABASE {sa.make_url(url).database} WITH (FORCE)')
    assert 'cannot be reached' in bounded(5, DatabaseUnavailable, m.submit, 'echo', echo, n=1)
    gate.go.set()
    bounded(5, DatabaseUnavailable, m.list_jobs)
    assert usual(by_engine(other) for _ in range(5)) < 1
    wait_until(lambda: e.stale == 1, 10, 'the result that can not be written was not given up')

def test_nothing_is_left_idle_in_transaction(new_pg, server, new_engine):
    host = HostDatabase(new_pg())
    e, name = new_engine(handoff=0), f'x{uuid.uuid4().hex[:8]}'
    try:
        with get_or_create_tenant_db(name, host=host) as db:
            m, sys_m = BackgroundTaskManager(db, e), BackgroundTaskManager(host, e)
            def fails(): raise ValueError
            for x in (m, sys_m):
                job_id = run(x).id
                assert by_engine(x) < 5
                bad, bg = x.submit('fails', fails, max_retries=1)
                bg.func(*bg.args)
                x.get_job(job_id), x.list_jobs(), x.attempts(job_id), x.logs(job_id)
                with pytest.raises(FhSaasError): x.get_job('none')
            host.tenants(), host.find(name), host.find('none')
            names = [sa.make_url(str(u)).database for u in (host.url, db.engine.url)]
            sql = "SELECT state, query FROM pg_stat_activity WHERE datname = ANY(%s) AND state LIKE 'idle in transaction%%' AND now() - state_change > interval '0.3 s'"
            time.sleep(1)
            assert server.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = ANY(%s)", [names]).fetchone()[0] >= 3
            assert server.execute(sql, [names]).fetchall() == []
    finally:
        e.stop(0)
        delete_tenant(name, host, force=True)
        host.close()

def test_jobs_in_their_own_transactions_do_not_keep_heartbeats_out(new_pg, open_manager, new_engine):
    "More jobs sit in `job.begin()` than a connection pool has by default, for longer than a lease"
    url = new_pg()
    m, heir = open_manager(url, lease=1, handoff=0, concurrency=20), open_manager(url, lease=1, handoff=0, runs=False)
    def sits(job):
        with job.begin() as conn: conn.execute(sa.text('SELECT pg_sleep(4)'))
    ids = [m.submit('sits', sits)[0] for _ in range(20)]
    wait_until(lambda: len(heir.list_jobs(None, 'running')) >= 15)
    heir.engine.pause(heir.store, False)  # another process, that takes back what has no lease
    start = time.monotonic()
    m.list_jobs()
    took = time.monotonic() - start
    assert [end(heir, i, 30).attempt for i in ids] == [1]*20 and took < 3


# --- Processes that are told to end, or are ended

def serve(child, *args, wait='/ok', **env):
    port = free_port()
    c = child(*args or ('-m', 'uvicorn', 'app:app', '--log-level', 'warning', '--port'), port, **env)
    c.http = httpx2.Client(base_url=f'http://127.0.0.1:{port}', timeout=5)
    def up():
        assert c.running, c.text
        try: return c.http.get(wait).status_code == 200
        except httpx2.TransportError: return False
    wait_until(up, 20, 'the server does not answer')
    return c

def started(server, m, name):
    "Start a job through a route, whose answer does not wait for it; its id once it runs"
    r = server.http.get(f'/start/{name}')
    assert r.status_code == 200
    j, = m.list_jobs()
    assert j.id in r.text
    server.says('begun')  # its row says so before
    return end(m, j.id, 5, ['running']).id

@pytest.mark.parametrize('name', ['nap', 'anap', 'anap_cleanup', 'anap_stubborn'])
def test_sigterm_releases_a_long_job(name, new_sqlite, child, open_manager):
    m = open_manager(url := new_sqlite(), runs=False)
    grace = 2 if name == 'nap' else 1
    first = serve(child, DBURL=url, RUNNER=grace, NAP=60)
    job_id = started(first, m, name)
    at = time.monotonic()
    first.send(signal.SIGTERM)
    first.ends(grace+8)
    assert grace-0.5 < time.monotonic() - at
    j = m.get_job(job_id)
    assert (j.status, j.retry_count, outcomes(m, job_id)) == ('pending', 0, ['release'])
    second = serve(child, DBURL=url, RUNNER=2, NAP=0)
    j = end(m, job_id, 10)
    assert (j.status, j.retry_count, int(j.result)) == ('completed', 0, second.pid)

@pytest.mark.parametrize('name', ['nap', 'anap'])
def test_kill_9_of_a_bare_manager(name, new_sqlite, child, open_manager):
    m, env = open_manager(url := new_sqlite(), runs=False), dict(FH_SAAS_LEASE=1, FH_SAAS_POLL=0.2)
    first = serve(child, DBURL=url, NAP=60, **env)
    job_id = started(first, m, name)
    first.kill()
    second = serve(child, DBURL=url, NAP=0, **env)
    j = end(m, job_id, 10)
    assert (j.status, j.retry_count, int(j.result), outcomes(m, job_id)) == ('completed', 1, second.pid, ['lost', 'completed'])

@pytest.mark.parametrize('name', ['nap', 'anap'])
def test_a_script_ends_though_a_job_runs(name, url, child, open_manager):
    m = open_manager(url, runs=False)
    c = child('leaves.py', url, name, NAP=60, FH_SAAS_GRACE=0.5, FH_SAAS_HANDOFF=0)
    c.says('leaving')
    c.ends(0.5+3)
    j, = m.list_jobs()
    assert (c.proc.returncode, j.status, j.retry_count, outcomes(m, j.id)) == (0, 'pending', 0, ['release'])

def test_a_submit_after_the_stop_starts_nothing(new_sqlite, child, open_manager):
    m = open_manager(url := new_sqlite(), runs=False)
    c = child('late.py', url, NAP=60, FH_SAAS_HANDOFF=0, FH_SAAS_GRACE=5)
    nap, late = c.says('^stopped (.*)')[1], c.says('^late (.*)')[1]
    c.says('leaving')
    c.ends(2)
    assert m.get_job(nap).status == 'pending' and outcomes(m, nap) == ['release'] and m.get_job(late).status == 'pending'

def test_sleeping_jobs_do_not_slow_a_sync_route(new_sqlite, child, open_manager):
    m = open_manager(url := new_sqlite(), runs=False)
    c = serve(child, DBURL=url, RUNNER=1, NAP=60)
    def p99():
        took = []
        for _ in range(200):
            start = time.perf_counter()
            assert c.http.get('/ok').status_code == 200
            took.append(time.perf_counter() - start)
        return sorted(took)[-3]
    base = p99()
    for _ in range(200): c.http.get('/start/nap')
    assert len(m.list_jobs(None, 'running', None)) >= 16 and len(m.list_jobs(None, None, None)) == 200
    assert p99() < max(0.1, 5*base)

@pytest.mark.parametrize('form, handoff, soon', [('start', 60, True), ('json', 1, False)])
def test_a_job_runs_after_its_response_whatever_became_of_its_task(form, handoff, soon, new_sqlite, child, open_manager):
    m = open_manager(url := new_sqlite(), runs=False)
    c = serve(child, DBURL=url, RUNNER=1, HANDOFF=handoff)
    start = time.monotonic()
    r = c.http.get(f'/{form}/nap')
    j, = m.list_jobs()
    assert j.id in r.text and j.status != 'failed'
    assert int(end(m, j.id, 10).result) == c.pid
    assert time.monotonic() - start < (2 if soon else 5)

@pytest.mark.parametrize('how', [('-m', 'uvicorn', 'app:app', '--log-level', 'warning', '--reload', '--port'), (here/'serve.py',)], ids=['uvicorn', 'serve'])
def test_a_reloader_runs_no_jobs(how, new_sqlite, child, open_manager, tmp_path):
    m = open_manager(url := new_sqlite(), runs=False, handoff=0)
    c = serve(child, *how, cwd=tmp_path, DBURL=url, FH_SAAS_POLL=0.2)
    time.sleep(1.3)  # a manager made at import looks around after 1 s
    ids = [m.submit('nap', tasks.nap)[0] for _ in range(20)]
    pids = {int(j.worker.split(':')[1]) for j in (end(m, i, 15, ['completed']) for i in ids)}
    assert len(pids) == 1 and c.pid not in pids


# --- Tasks that mean harm

def _poisoned(url, child, open_manager, neighbours, **settings):
    m = open_manager(url, runs=False, handoff=0)
    good = [m.submit('work', tasks.work, seconds=0.3)[0] for _ in range(neighbours)]
    bad, _ = m.submit('poison', tasks.poison, max_retries=3)
    deaths = 0
    while m.get_job(bad).status not in ended:
        c = child('worker.py', url, '{"lease": 1}')
        wait_until(lambda: not c.running or m.get_job(bad).status in ended, 10, 'neither poisoned nor done')
        if not c.running: assert c.proc.returncode == 66; deaths += 1
    return m, bad, good, deaths

def test_poison_is_set_aside(url, child, open_manager):
    m, bad, _, deaths = _poisoned(url, child, open_manager, 0)
    j = m.get_job(bad)
    assert (j.status, j.retry_count, deaths, outcomes(m, bad)) == ('failed', 3, 3, ['lost', 'lost', 'failed']) and 'worker_lost' in j.error_message

def test_poison_does_not_take_its_neighbours_along(new_sqlite, child, open_manager):
    m, bad, good, _ = _poisoned(new_sqlite(), child, open_manager, 12)
    assert 'worker_lost' in m.get_job(bad).error_message
    assert {end(m, i, 10).status for i in good} == {'completed'}

def test_poison_in_one_tenant_fails_no_job_of_another(tmp_path, child):
    for n in range(4):
        c = child('killer.py', tmp_path, int(n == 0))
        c.proc.wait(40)
        if c.proc.returncode == 0: break
    assert n == 3 and "[('innocent', 'completed'), ('killer', 'failed')]" in c.text

def test_poison_of_every_kind_beside_good_jobs(new_sqlite, child, open_manager):
    "Two that kill the process, two that fail, one that never ends; and twelve that are to be done"
    m = open_manager(url := new_sqlite(), runs=False, handoff=0)
    good = [m.submit('work', tasks.work, seconds=0.3)[0] for _ in range(6)]
    bad = {how: m.submit('harm', tasks.harm, 2, how=how, timeout=1)[0] for how in ('exit', 'segv', 'memory', 'loop', 'result')}
    good += [m.submit('work', tasks.work, seconds=0.3)[0] for _ in range(6)]
    for _ in range(12):
        c = child('worker.py', url, '{"lease": 1}')
        wait_until(lambda: not c.running or all(m.get_job(i).status in ended for i in (*bad.values(), *good)), 30, 'neither poisoned nor done')
        if c.running: break
    errors = {how: m.get_job(i).error_message for how, i in bad.items()}
    assert {m.get_job(i).status for i in bad.values()} == {'failed'} and {m.get_job(i).status for i in good} == {'completed'}
    assert {how: next((w for w in ('worker_lost', 'MemoryError', 'TimedOut', 'cannot be stored') if w in e), e) for how, e in errors.items()} == dict(exit='worker_lost', segv='worker_lost', memory='MemoryError', loop='TimedOut', result='cannot be stored')

class Unprintable(Exception):
    def __str__(self): raise RuntimeError('no words')

@pytest.mark.parametrize('error', [SystemExit(3), KeyboardInterrupt(), MemoryError(), GeneratorExit(), asyncio.CancelledError(), Unprintable(), RecursionError('deep')], ids=lambda e: type(e).__name__)
def test_what_a_task_raises_stays_in_its_job(error, new_sqlite, open_manager):
    m = open_manager(new_sqlite(), handoff=0)
    def bad(): raise error
    async def abad(): raise error
    async def awaited(): raise error
    def gives_awaitable(): return awaited()
    ids = [m.submit('bad', f, max_retries=1)[0] for f in (bad, abad, gives_awaitable)]  # by the engine's threads and loop
    for f in (bad, abad, gives_awaitable):
        job_id, bg = m.submit('bad', f, max_retries=1)
        bg.func(*bg.args)  # and here
        ids.append(job_id)
    for i in ids:
        j = end(m, i, 10)
        assert j.status == 'failed' and type(error).__name__ in j.error_message and j.error_log, j
    async def fine(): return 1
    job_id, _ = m.submit('fine', fine)
    assert end(m, job_id).status == 'completed' and by_engine(m) < 3


# --- Forks

def _forked(child, url, stays, words):
    c = child('forks.py', url, stays, FH_SAAS_HANDOFF=0, FH_SAAS_GRACE=1)
    said = lambda: {m[0]: m[1:] for line in c.text.splitlines() if (m := line.split()) and m[0] in words}
    try: wait_until(lambda: set(said()) == words, 10)
    finally: text = c.text
    said = said()
    assert {v[0] for v in said.values()} == {'completed'}, text
    assert said['before'][2] == str(c.pid) != said['child'][2]
    return {v[1] for v in said.values()}

def test_a_fork_runs_jobs_beside_its_parent(url, child, open_manager):
    ids = _forked(child, url, 1, {'before', 'child', 'last', 'parent'})
    assert {j.id for j in open_manager(url, runs=False).list_jobs(None, 'completed')} == ids

def test_a_fork_outlives_its_parent(url, child, open_manager):
    "SQLite keeps its locks per process: a child on inherited ones would write into a file that its parent has removed"
    ids = _forked(child, url, 0, {'before', 'child', 'last'})
    assert {j.id for j in open_manager(url, runs=False).list_jobs(None, 'completed')} == ids

def test_a_lock_protocol_that_does_not_come_to_an_end_is_a_busy_database():
    "A process that was stopped while it recovered the log; found by the soak, after 28 minutes"
    import sqlite3
    from fh_saas.db_connect import DatabaseBusy, typed
    e = sqlite3.OperationalError('locking protocol')
    e.sqlite_errorcode = sqlite3.SQLITE_PROTOCOL
    assert type(typed('sqlite:///x.db', e)) is DatabaseBusy

# --- The host

def test_a_tenant_that_is_first_looked_at_while_the_host_is_away(host, new_engine, monkeypatch, caplog):
    db, e, away = get_or_create_tenant_db(f'late-{uuid.uuid4().hex[:6]}', host=host), new_engine(poll=1.0), threading.Event()
    m, real = BackgroundTaskManager(db, e), Wakes.facts
    e.registry.add(lambda: 1, 'late_task')
    def facts(self, id):
        if not away.is_set(): raise DatabaseUnavailable('away')
        return real(self, id)
    monkeypatch.setattr(Wakes, 'facts', facts)
    m.store.add(dict(id='a', job_type='late_task', task='late_task', payload='{}', max_retries=3))
    e.attend(m.store)
    wait_until(lambda: 'next try in' in caplog.text, 10)
    away.set()
    assert m.wait('a', 20).status == 'completed' and 'the host does not answer' in caplog.text
    assert not [r for r in caplog.records if r.levelname == 'ERROR']

def refused(n): raise ValueError(n)

@pytest.mark.parametrize('state', ['pending', 'running'])
@pytest.mark.parametrize('task', [refused, tasks.echo], ids=lambda f: f.__name__)
def test_an_odd_row_stops_no_other_job(new_sqlite, new_engine, open_manager, task, state):
    "A file takes anything for anything, from whoever writes into it"
    def engine(**kw):
        e = new_engine(handoff=0.01, **kw)
        for f in (refused, tasks.echo): e.registry.add(f, f.__qualname__)
        return e
    m = open_manager(url := new_sqlite(), engine(concurrency=0))
    odd = m.submit_many('t', task, [dict(n=n) for n in range(400)])
    if state == 'running':
        with m.store.engine.begin() as conn: conn.execute(m.store.t.jobs.update().values(status=state, claim_token='x', worker='gone', lease_until=timestamp(1), started_at=timestamp(0), attempt=1))
    assert forge(m.store.url.database, odd) < len(odd)
    good = m.submit_many('t', tasks.echo, [dict(n=n) for n in range(20)])
    m = open_manager(url, engine(concurrency=4))
    wait_until(lambda: all(m.get_job(i).status == 'completed' for i in good), 20)
    wait_until(lambda: m.list_jobs(status='running') == [], 20, 'a job was left running')

begun = []

def noted(n): begun.append(n)

def test_a_job_put_back_by_hand_with_its_count_begun_anew_is_run_once_more(new_url, new_engine, open_manager):
    "The number of its attempt is on record already"
    m = open_manager(new_url(), new_engine(handoff=0.01))
    m.engine.registry.add(noted, noted.__qualname__)
    begun.clear()
    ids = m.submit_many('t', noted, [dict(n=n) for n in range(5)])
    def done(): return all(m.get_job(i).status == 'completed' for i in ids)
    wait_until(done)
    with m.store.engine.begin() as conn: conn.execute(m.store.t.jobs.update().values(status='pending', attempt=0, completed_at=None, run_at=timestamp(0)))
    m.submit('t', noted, n=5)
    wait_until(done)
    assert sorted(begun) == sorted([*range(5)]*2 + [5]) and all(len(m.attempts(i)) == 1 for i in ids)

@pytest.mark.parametrize('state', ['pending', 'running', 'failed'])
def test_an_odd_row_can_be_acted_on(new_sqlite, new_engine, open_manager, state):
    "Each act does what it says, or says in an error of ours why not"
    e, ended_at = new_engine(concurrency=0), timestamp(0) if state == 'failed' else None
    e.registry.add(tasks.echo, tasks.echo.__qualname__)
    m = open_manager(new_sqlite(), e)
    def odd(n=400):
        ids = m.submit_many('t', tasks.echo, [dict(n=n) for n in range(400)])
        with m.store.engine.begin() as conn: conn.execute(m.store.t.jobs.update().where(m.store.t.jobs.c.id.in_(ids)).values(status=state, started_at=timestamp(0), completed_at=ended_at))
        return ids[:forge(m.store.url.database, ids[:n]) - 2]
    ids = odd()
    for act in (m.state, m.why_waiting, m.cancel, m.retry, m.rerun, m.delete):
        for id in ids:
            try: act(id)
            except FhSaasError as e: assert str(e)
    odd(len(ids))
    for act in (m.cancel_all, m.retry_all, m.delete_all):
        assert act(everything=True, dry_run=True) - act(everything=True) in (0, 2)  # two have an id that nobody can name

@pytest.mark.parametrize('how', ['?', 'CAST(? AS TEXT)'])
@pytest.mark.parametrize('state', ['pending', 'running'])
def test_a_row_that_nobody_can_name_is_ended_and_stands_in_no_others_way(new_sqlite, new_engine, open_manager, how, state):
    "It is the first that is due, of the same rank as others in two priorities, and holds their key"
    m = open_manager(url := new_sqlite(), runs=False)
    ids = [m.submit('t', tasks.echo, n=n, concurrency_key='k')[0] for n in range(5)]
    with closing(sqlite3.connect(m.store.url.database, isolation_level=None)) as c:
        c.execute('UPDATE tenant_jobs SET run_at=?, created_at=?', (timestamp(1),)*2)
        c.execute('UPDATE tenant_jobs SET priority=3 WHERE id=?', ids[4:])
        if state == 'running': c.execute("UPDATE tenant_jobs SET status='running', claim_token='x', lease_until=?, started_at=?, attempt=1 WHERE id=?", (timestamp(1), timestamp(1), ids[0]))
        c.execute(f'UPDATE tenant_jobs SET id={how} WHERE id=?', (b'0\xff', ids[0]))
    other = open_manager(url, concurrency=1)
    other.engine.registry.add(tasks.echo, tasks.echo.__qualname__)
    other.engine.attend(other.store)
    wait_until(lambda: all(m.get_job(i).status == 'completed' for i in ids[1:]), 10)
    [odd] = m.list_jobs(status='failed')
    assert odd.error_message.startswith('its id is no text')

@pytest.mark.parametrize('result', ['abc', '', '9999-99-99', '['*5000])
def test_a_damaged_result_is_said_to_be_one(new_url, open_manager, result):
    m = open_manager(new_url())
    id, bg = m.submit('t', tasks.echo, n=1)
    bg.func(*bg.args)
    with m.store.engine.begin() as conn: conn.execute(m.store.t.jobs.update().values(result=result))
    with pytest.raises(NotJson, match='result in the row is not JSON'): m.result(id)

@pytest.mark.parametrize('note', ['abc', '9'*10_000, b'\xff'])
def test_a_damaged_note_of_the_schema_is_said_to_be_one(new_sqlite, note):
    Store(url := new_sqlite()).close()
    with closing(sqlite3.connect(sa.make_url(url).database, isolation_level=None)) as c: c.execute("UPDATE fh_saas_meta SET value=? WHERE key='schema:tenant_jobs'", (note,))
    with pytest.raises(DatabaseCorrupt, match='say that they have schema'): Store(url)
