"Which commits wait for the disk: those of a job, of an outcome, of a claim that must not be lost, but not those of other claims."
import sqlite3, threading, time
from dataclasses import replace
import pytest
from conftest import wait_until
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db, read_notes
from fh_saas.jobs.rules import Limits
from fh_saas.jobs.tenancy import Held
from fh_saas.jobs.wake import wakes_of
from fh_saas.utils_bgtsk import BackgroundTaskManager

@pytest.fixture
def lite(new_manager, new_sqlite):
    "Call it for a manager, in whose database a claim was made already"
    def make(**kw):
        m = new_manager(new_sqlite(), concurrency=0, **kw)
        m.engine._desks[m.store].proven = True
        return m
    return make

def level(conn): return {0: 'OFF', 1: 'NORMAL', 2: 'FULL', 3: 'EXTRA'}[conn.execute('PRAGMA synchronous').fetchone()[0]]

class Watched:
    "Notes the level of each commit that has written something, of the store of a manager"
    def __init__(self, m, monkeypatch):
        self.levels, kind, commit = [], m.store.kind, m.store.kind.commit
        m.store.write(lambda cur, now: None)
        self.store, begun = m.store, m.store._writer.total_changes
        def watched(cur):
            nonlocal begun
            if cur.connection.total_changes != begun: self.levels.append(level(cur.connection))
            begun = cur.connection.total_changes
            commit(cur)
        monkeypatch.setattr(kind, 'commit', watched)
    @property
    def now(self): return level(self.store._writer)

def claim(m, *ids):
    d = m.engine._desks[m.store]
    return d.turn([], list(ids), None, d_room(m, d)) if ids else d.turn([], [], m.engine._room(d, 5))

def d_room(m, d): return m.engine._room(d, 0)

@pytest.mark.parametrize('by', ['id', 'search'])
def test_a_claim_does_not_wait_for_the_disk(lite, monkeypatch, by):
    m = lite()
    id, _ = m.submit('t', lambda: 1, run_at='2020-01-01')
    w = Watched(m, monkeypatch)
    claim(m, *[id]*(by == 'id'))
    assert m.get_job(id).status == 'running' and (w.levels, w.now) == (['NORMAL'], 'FULL')
    m.submit('t', lambda: 1, run_at='2100-01-01'); m.cancel(m.list_jobs()[0].id)
    assert set(w.levels[1:]) <= {'FULL'} and w.now == 'FULL'

def test_the_first_claim_of_a_process_does(lite, monkeypatch):
    "A job that takes the machine along is met again after its start, and must be counted then"
    m = lite()
    desk = m.engine._desks[m.store]
    desk.proven = False
    assert desk.turn([], [], m.engine._room(desk, 5))[1] == [] and not desk.proven  # there was nothing
    for n in range(2): m.submit('t', lambda: 1, run_at='2020-01-01')
    w = Watched(m, monkeypatch)
    for job in m.list_jobs(): claim(m, job.id)
    assert w.levels == ['FULL', 'NORMAL'] and desk.unsynced is not None

@pytest.mark.parametrize('why', ['last attempt', 'one of several is in its last attempt', 'rate', 'an outcome comes with it', 'in doubt'])
def test_a_claim_that_must_not_be_lost_does(lite, monkeypatch, why):
    m = lite()
    desk = m.engine._desks[m.store]
    for retries in dict([('last attempt', [1]), ('one of several is in its last attempt', [3, 1])]).get(why, [3]): m.submit('t', lambda: 1, retries, run_at='2020-01-01')
    ends = []
    if why == 'rate': desk._free = Limits(rates={m.list_jobs()[0].task: (5, 60)})
    if why == 'in doubt': desk.doubtful = {'token': time.monotonic() + 60}
    if why == 'an outcome comes with it':
        got, attempts, *_ = claim(m)
        attempts[0].outcome = attempts[0].call()
        ends = attempts
        m.submit('t', lambda: 1, 3, run_at='2020-01-01')
    w = Watched(m, monkeypatch)
    if 'last attempt' in why: claim(m, *[j.id for j in m.list_jobs()])
    else: desk.turn(ends, [], replace(m.engine._room(desk, 5), sure=5))  # one with a rate is not claimed ahead
    assert {j.status for j in m.list_jobs()} <= {'running', 'completed'} and (w.levels, w.now) == (['FULL'], 'FULL') and desk.unsynced is None
    assert {j.attempt for j in m.list_jobs()} == {1}  # not twice

@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize('when', ['op', 'commit', 'after'])
def test_whatever_happens_to_a_claim_the_next_commit_waits(lite, monkeypatch, error, when):
    m = lite()
    id, _ = m.submit('t', lambda: 1, run_at='2020-01-01')
    def fails(*args): raise error
    with monkeypatch.context() as mp:
        if when == 'commit': mp.setattr(m.store.kind, 'commit', fails)
        if when == 'after': mp.setattr(m.store, '_prompt', fails)
        def op(cur, now):
            cur.execute('UPDATE tenant_jobs SET priority = 3')
            if when == 'op': fails()
        op.lazy = lambda said: True
        with pytest.raises(error): m.store.write(op)
    w = Watched(m, monkeypatch)
    m.submit('t', lambda: 1, run_at='2100-01-01')
    assert w.now == 'FULL' and m.get_job(id).priority == (3 if when == 'after' else 2)

def test_who_shares_a_commit_with_a_claim_waits(lite, monkeypatch):
    m = lite()
    id, _ = m.submit('t', lambda: 1, run_at='2020-01-01')
    w, led, go_on, s = Watched(m, monkeypatch), threading.Event(), threading.Event(), m.store
    threads = [threading.Thread(target=s.write, args=(lambda cur, now: led.set() or go_on.wait(10),)), threading.Thread(target=claim, args=(m, id)),
        threading.Thread(target=s.write, args=(lambda cur, now: cur.execute('UPDATE tenant_jobs SET tags = NULL'),))]
    threads[0].start(); led.wait(10)
    for t in threads[1:]: t.start()
    wait_until(lambda: len(s._queue) == 2)
    go_on.set()
    for t in threads: t.join(10)
    assert m.get_job(id).status == 'running' and w.levels == ['FULL'] and m.engine._desks[s].unsynced is None

@pytest.mark.parametrize('kw,journal', [(dict(synchronous='NORMAL'), 'wal'), ({}, 'delete')])
def test_where_there_is_nothing_to_spare_nothing_changes(lite, monkeypatch, kw, journal):
    from fh_saas import db_connect
    if journal == 'delete': monkeypatch.setattr(db_connect, '_wal', lambda conn, busy: None)
    m = lite(**kw)
    if journal == 'delete':
        m.store.close()
        with sqlite3.connect(m.store.url.database) as conn: assert conn.execute('PRAGMA journal_mode=DELETE').fetchone()[0] == 'delete'
        conn.close()
    m.submit('t', lambda: 1, run_at='2020-01-01')
    w, level = Watched(m, monkeypatch), kw.get('synchronous', 'FULL')
    claim(m)
    assert (w.levels, w.now) == ([level], level)

def test_a_claim_of_a_job_that_runs_is_soon_on_the_disk_and_the_host_hears_of_it_then(tmp_path, new_engine):
    "Else a power cut could leave a database behind what the host knows of it: its jobs would be held"
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    with get_or_create_tenant_db('acme', host=host) as db:
        m, over = BackgroundTaskManager(db, new_engine(lease=600)), threading.Event()
        m.engine._desks[m.store]._beat, m.engine._desks[m.store].proven = time.monotonic(), True  # the next one for the lease's sake comes much later
        id, _ = m.submit('t', lambda: over.wait(20), run_at='2020-01-01')
        wait_until(lambda: m.get_job(id).status == 'running', 10)
        desk = m.engine._desks[m.store]
        mark = desk.tenancy.seen
        desk.tenancy.tell()
        assert desk.tenancy.wakes.facts('acme')['mark'] <= desk.tenancy.sure
        wait_until(lambda: desk.unsynced is None and desk.tenancy.sure >= mark, 5, 'no heartbeat has followed')
        wait_until(lambda: desk.tenancy.wakes.facts('acme')['mark'] >= mark, 10, 'the host does not know')
        over.set()
        assert m.wait(id, 10).status == 'completed'
    host.close()

def test_a_claim_that_others_follow_is_on_the_disk_as_soon(lite):
    m = lite(lease=600)
    for _ in range(3): m.submit('t', lambda: 1, run_at='2020-01-01')
    desk = m.engine._desks[m.store]
    desk._beat = time.monotonic()
    desk.turn([], [], m.engine._room(desk, 1))
    since = desk.unsynced
    desk.turn([], [], m.engine._room(desk, 1))
    assert desk.unsynced == since and len(desk.live) == 2
    before = desk.claims_so_far
    desk.turn([], [], m.engine._room(desk, 1))  # while another thread commits
    desk._flushed(before, False, True)
    assert desk.unsynced == before[1]
    desk.renew()
    assert desk.unsynced is None

def test_a_copy_one_step_behind_is_not_brought_up_to_what_is_known(tmp_path, new_engine):
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    with get_or_create_tenant_db('acme', host=host) as db:
        m, path = BackgroundTaskManager(db, new_engine(concurrency=0)), tmp_path/'acme_db.db'
        ids, desk = [m.submit('t', lambda: 1, run_at='2020-01-01')[0] for _ in range(2)], m.engine._desks[m.store]
        assert desk.claim(ids[0])
        desk.tell()
        with sqlite3.connect(path) as conn, sqlite3.connect(tmp_path/'copy.db') as to: conn.backup(to)
        assert desk.claim(ids[1]) and desk.tenancy.own > desk.tenancy.sure
        (tmp_path/'copy.db').replace(path)
        for log in ('-wal', '-shm'): (tmp_path/f'acme_db.db{log}').unlink(missing_ok=True)
        desk.tell()
        assert read_notes(host.url_of(host.find('acme')), host)['mark'] == '1'
        assert host.find('acme').held and not desk.tenancy.untold  # said at once, and once
        with pytest.raises(Held): desk.claim(ids[1])
    host.close()

@pytest.mark.parametrize('way', ['plain', 'its own commit'])
def test_the_host_hears_how_far_a_database_has_come_whoever_committed(tmp_path, new_engine, monkeypatch, way):
    "Else a copy that is put back would not be known for what it is"
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    def plain(): return 1
    def own(job):
        with job.begin() as conn: job.complete(conn, 1)
    with get_or_create_tenant_db('acme', host=host) as db:
        m = BackgroundTaskManager(db, e := new_engine())
        desk = e._desks[m.store]
        for _ in range(5):
            id, bg = m.submit('t', plain if way == 'plain' else own)
            bg.func(*bg.args)
            assert m.get_job(id).status == 'completed'
        assert desk.tenancy.seen >= 5
        desk.tell()
        mark = wakes_of(host).facts('acme')['mark']
        assert mark >= 5 and mark == desk.tenancy.sure <= int(read_notes(host.url_of(host.find('acme')), host)['mark']) and not desk.tenancy.untold
    host.close()

def test_a_mark_is_sure_only_with_a_commit_that_came_after_it(tmp_path):
    from fh_saas.jobs.tenancy import Tenancy
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    get_or_create_tenant_db('acme', host=host).close()
    t = Tenancy(host, 'acme'); t.refresh()
    t.advanced(dict(mark='4'), t.facts, synced=False)
    assert (t.seen, t.sure, t.untold, t.reached) == (5, 0, True, (5, t.facts))
    t.tell()
    assert t.wakes.facts('acme')['mark'] == 0
    t.advanced(dict(mark='2'), t.facts)  # an earlier commit, of a thread that was slow
    assert (t.seen, t.sure) == (5, 3)
    t.tell()
    assert t.wakes.facts('acme')['mark'] == 3 and t.untold
    t.synced(5, dict(t.facts, epoch=2))  # of the file before
    assert t.sure == 3
    t.synced(5, t.facts); t.synced(9, t.facts)
    assert (t.seen, t.sure) == (5, 5)
    t.tell()
    assert not t.untold and t.wakes.facts('acme')['mark'] == 5
    host.close()

def test_a_claim_that_is_committed_is_not_said_to_have_failed(lite):
    m = lite()
    id, _ = m.submit('t', lambda: 1, run_at='2020-01-01')
    s = m.store
    s.write(lambda cur, now: None)
    class Odd:
        def __init__(self, conn): self.conn = conn
        def __getattr__(self, name): return getattr(self.conn, name)
        def execute(self, sql): raise sqlite3.OperationalError('disk I/O error')
    s._writer = Odd(s._writer)
    got, *_ = claim(m, id)
    assert list(got) == [id] and s._writer is None
    m.submit('t', lambda: 1, run_at='2100-01-01')
    assert level(s._writer) == 'FULL'
