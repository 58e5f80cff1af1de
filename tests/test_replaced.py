"Tenants that are made anew and files that are replaced while processes still remember the ones before"
import asyncio, sqlite3, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from concurrent.futures import ThreadPoolExecutor
import pytest
import sqlalchemy as sa
import fh_saas.db_tenant
import fh_saas.jobs.store
from conftest import wait_until
from fh_saas.db_connect import DatabaseBusy, DatabaseFull, DatabaseUnavailable, FhSaasError, open_engine, writing
from fh_saas.db_host import HostDatabase, gen_id
from fh_saas.db_tenant import delete_tenant, get_or_create_tenant_db, open_tenant_db
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.store import Store
from fh_saas.jobs.tasks import Registry
from fh_saas.jobs.tenancy import Held, Tenancy, rules_of, settle_held
from fh_saas.jobs.wake import wakes_of
from fh_saas.ops.copies import export_tenant
from fh_saas.utils_bgtsk import BackgroundTaskManager

swapping = '''
import shutil, sys, threading, time
from pathlib import Path
import fh_saas.jobs.claims
from fh_saas.jobs.store import Store
path, until, done = Path(sys.argv[1]), time.time() + 4, dict(written=0, read=0, swapped=0)
path.touch()
s = Store(f'sqlite:///{path}', synchronous='NORMAL')
s.close()
shutil.copy(path, copy := path.with_name('copy.db'))
def loop(what, f):
    while time.time() < until:
        try: f()
        except Exception: continue  # a write may fail here, but must not take the process along
        done[what] += 1
def write(): s.add_many([dict(id=f'{time.time_ns()}-{threading.get_ident()}', job_type='t', task='t')])
def read(): s.next_due(('t',), ())
def swap():
    time.sleep(0.02)
    shutil.copy(copy, new := path.with_suffix('.new'))
    for x in ('-wal', '-shm'): Path(f'{path}{x}').unlink(missing_ok=True)
    new.replace(path)
threads = [threading.Thread(target=loop, args=a) for a in [('written', write)]*2 + [('read', read)]*2 + [('swapped', swap)]]
for t in threads: t.start()
for t in threads: t.join()
assert all(done.values()), done
'''


@pytest.fixture
def host(tmp_path):
    h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    get_or_create_tenant_db('acme', host=h).close()
    yield h
    h.close()

def tenancy(host):
    t = Tenancy(host, 'acme')
    t.refresh()
    return t

def notes(host):
    s = Store(host.url_of(host.find('acme')), tenant='acme')
    try: return s.write(lambda cur, now: s.noting(cur))
    finally: s.close()


def test_a_replaced_file_ends_no_process(tmp_path):
    p = subprocess.run([sys.executable, '-c', swapping, tmp_path/'t.db'], capture_output=True, text=True, timeout=60)
    assert p.returncode == 0, (p.returncode, p.stderr[-2000:])

def test_a_mark_of_the_tenant_before_is_not_held_against_the_one_made_anew(host):
    before = tenancy(host)
    before.advanced(dict(mark='41'), before.facts)
    delete_tenant('acme', host)
    get_or_create_tenant_db('acme', host=host).close()
    before.tell()
    after = tenancy(host)
    assert after.facts['mark'] == 0
    after.read_notes(lambda: notes(host))

def test_an_untold_mark_does_not_hold_again_what_an_operator_has_released(host):
    told, untold = tenancy(host), tenancy(host)
    told.advanced(dict(mark='41'), told.facts)
    told.tell()
    untold.advanced(dict(mark='44'), untold.facts)
    host.hold('acme', 'put back')
    settle_held(host, 'acme', discard=False)
    untold.refresh()
    untold.read_notes(lambda: notes(host))

def test_a_mark_that_comes_while_an_operator_releases_a_tenant_does_not_hold_it_again(host, monkeypatch):
    "A process tells the host its last marks of the epoch before, which the database that is there may never have had"
    wakes, known, let_go = wakes_of(host), host.find('acme'), HostDatabase.let_go
    s = Store(host.url_of(known), tenant='acme')
    for _ in range(7): s.write(lambda cur, now: s.step(cur, s.noting(cur)))
    s.close()
    wakes.marked('acme', 2, known.created_at, known.epoch)
    host.hold('acme', 'a copy', created_at=known.created_at, epoch=known.epoch)
    def late(self, *args):
        wakes.marked('acme', 12, known.created_at, known.epoch)
        return let_go(self, *args)
    monkeypatch.setattr(HostDatabase, 'let_go', late)
    settle_held(host, 'acme', discard=False)
    assert int(notes(host)['mark']) == wakes.facts('acme')['mark'] == 8  # and not less than it was
    wakes.marked('acme', 13, known.created_at, known.epoch)
    assert wakes.facts('acme')['mark'] == 8

def test_a_mark_that_comes_while_a_tenant_is_deleted_is_not_held_against_the_next_of_that_name(new_pg):
    host, tenant = HostDatabase(new_pg()), f'again-{gen_id()[-6:]}'
    get_or_create_tenant_db(tenant, host=host).close()
    wakes, known = wakes_of(host), host.find(tenant)
    wakes.marked(tenant, 1, known.created_at, known.epoch)
    with writing(host.engine) as conn:
        host.unregister(tenant, conn)
        assert not wakes.marked(tenant, 2000, known.created_at, known.epoch)  # and it waits for nobody
    with wakes.cursor() as cur: assert cur.execute('SELECT count(*) FROM fh_saas_wakes').fetchone() == (0,)
    get_or_create_tenant_db(tenant, host=host).close()
    assert host.find(tenant).held is None
    delete_tenant(tenant, host, force=True)
    host.close()

@pytest.mark.parametrize('what', ['made anew', 'gone', 'held again'])
def test_a_release_is_for_the_tenant_that_was_found(host, monkeypatch, what):
    "Somebody deletes it at this moment, and perhaps makes it anew"
    host.hold('acme', 'a copy')
    let_go, known = HostDatabase.let_go, host.find('acme')
    def late(self, *args):
        if what == 'held again': host.take_back('acme', 'a copy'); host.hold('acme', 'another copy')
        else: delete_tenant('acme', host, force=True)
        if what == 'made anew': get_or_create_tenant_db('acme', host=host).close()
        return let_go(self, *args)
    monkeypatch.setattr(HostDatabase, 'let_go', late)
    with pytest.raises(FhSaasError, match='was changed by somebody else'): settle_held(host, 'acme', discard=False)
    now = host.find('acme')
    assert now is None if what == 'gone' else (now.epoch, now.held) == (known.epoch, None if what == 'made anew' else 'another copy')

def test_a_mark_that_the_host_did_not_take_is_told_by_a_process_that_runs_no_jobs(host, new_engine):
    "It has no heartbeat that says it again"
    def never(): raise AssertionError
    wakes, lock = wakes_of(host), sqlite3.connect(host.url.database, isolation_level=None)
    with open_tenant_db('acme', host) as db:
        m = BackgroundTaskManager(db, new_engine(Registry(), concurrency=0, busy=0.3))
        id, _ = m.submit('never', never)
        lock.execute('BEGIN IMMEDIATE')
        m.cancel(id)
        wait_until(lambda: m.engine.tenancy(m.store).told_at > time.monotonic(), 20)  # tried in vain
        lock.execute('ROLLBACK'); lock.close()
        wait_until(lambda: wakes.facts('acme')['mark'] == 1, 15)

def test_the_end_of_an_engine_tells_a_mark_again_that_somebody_elses_decision_kept(new_engine):
    e, tries = new_engine(Registry(), concurrency=0), []
    t = SimpleNamespace(wakes=object(), untold=True, sure=2, told=1, told_at=0.0)
    def tell(): tries.append(t.told_at); t.told = len(tries) - 1; return True
    e._flush_last(SimpleNamespace(tenancy=t, tell=tell), time.monotonic() + 5)
    assert len(tries) == 3

def test_who_counts_what_begins_does_so_before_it_holds_a_row(new_pg, new_engine, statements):
    "Two that take them in another order wait for each other"
    host, tenant = HostDatabase(new_pg()), f'order-{gen_id()[-6:]}'
    def order(): return 1
    with get_or_create_tenant_db(tenant, host=host) as db:
        rules_of(host).set(tenant=tenant, concurrency=5)
        m = BackgroundTaskManager(db, new_engine(concurrency=2))
        id, bg = m.submit('order', order)
        statements.clear()
        asyncio.run(bg())
        mine = [s for s in statements if 'fh_saas_wakes' not in s and 'fh_saas_rules' not in s]
        first = next(n for n, s in enumerate(mine) if '7307' in s)
        assert not [s for s in mine[:first] if s.startswith(('UPDATE', 'INSERT')) or 'FOR UPDATE' in s] and m.get_job(id).status == 'completed'
    m.engine.stop(0)
    delete_tenant(tenant, host, force=True)
    host.close()

ran = []
def replaced_ran(): ran.append(1)

@pytest.mark.parametrize('action', ['cancel', 'delete', 'cancel_all'])
def test_a_copy_in_which_a_job_is_open_that_was_cancelled_since_is_held(host, new_engine, action):
    "Nobody has claimed anything: only a process that submits and runs nothing was there"
    ran.clear()
    (registry := Registry()).add(replaced_ran)
    web, path = Engine(Settings(concurrency=0), registry), Path(host.url_of(host.find('acme')).database)
    with get_or_create_tenant_db('acme', host=host) as db:
        m = BackgroundTaskManager(db, web)
        id, _ = m.submit('replaced_ran', replaced_ran)
        copy = export_tenant(host, 'acme', path.with_name('copy.db'))
        getattr(m, action)(**dict(everything=True) if action == 'cancel_all' else dict(job_id=id))
        assert action == 'delete' or m.get_job(id).status == 'cancelled'
    web.stop(0)
    host.open_dbs.close(host.url_of(host.find('acme')))
    for x in ('-wal', '-shm'): Path(f'{path}{x}').unlink(missing_ok=True)
    copy.replace(path)
    with get_or_create_tenant_db('acme', host=host) as db:
        BackgroundTaskManager(db, e := new_engine(registry, handoff=0))
        wait_until(lambda: host.find('acme').held, 10)
    e.stop(0)
    assert 'an earlier state of itself' in host.find('acme').held and not ran

def test_a_file_that_was_put_back_is_not_brought_up_by_cancelling_in_it(host, new_engine):
    path = Path(host.url_of(host.find('acme')).database)
    with get_or_create_tenant_db('acme', host=host) as db:
        m = BackgroundTaskManager(db, e := Engine(Settings(concurrency=0)))
        ids = [m.submit('t', lambda: 1, run_at='2999-01-01')[0] for _ in range(4)]
        copy = export_tenant(host, 'acme', path.with_name('copy.db'))
        for id in ids[:2]: m.cancel(id)
    e.stop(0)
    host.open_dbs.close(host.url_of(host.find('acme')))
    for x in ('-wal', '-shm'): Path(f'{path}{x}').unlink(missing_ok=True)
    copy.replace(path)
    with get_or_create_tenant_db('acme', host=host) as db:
        m = BackgroundTaskManager(db, e := Engine(Settings(concurrency=0)))
        for id in ids: m.cancel(id)  # it is done, whatever the file is
        assert {m.get_job(id).status for id in ids} == {'cancelled'}
    e.stop(0)
    assert 'an earlier state of itself' in host.find('acme').held

def test_jobs_are_cancelled_though_the_host_cannot_be_told_that_their_tenant_is_to_be_held(host, monkeypatch):
    with get_or_create_tenant_db('acme', host=host) as db:
        m = BackgroundTaskManager(db, e := Engine(Settings(concurrency=0)))
        ids = [m.submit('t', lambda: 1, run_at='2999-01-01')[0] for _ in range(3)]
        def busy(self, why): raise DatabaseBusy('the host is locked')
        def replaced(self, *args): raise Held('another', self.facts)
        monkeypatch.setattr(Tenancy, 'hold', busy)
        monkeypatch.setattr(Tenancy, 'read_notes', replaced)
        m.cancel(ids[0])
        assert m.cancel_all(everything=True) == 2 and {m.get_job(id).status for id in ids} == {'cancelled'}
    e.stop(0)

def test_facts_of_the_epoch_before_do_not_hold_what_an_operator_has_released(host):
    late = tenancy(host)
    host.hold('acme', 'put back')
    settle_held(host, 'acme', discard=False)
    with pytest.raises(Held) as e: late.check(notes(host), late.facts, 0)
    assert not late.hold(e.value) and host.find('acme').held is None
    tenancy(host).read_notes(lambda: notes(host))

def test_facts_of_the_tenant_before_are_not_held_against_the_one_made_anew(host):
    late = tenancy(host)
    late.advanced(dict(mark='41'), late.facts)
    delete_tenant('acme', host)
    get_or_create_tenant_db('acme', host=host).close()
    late.read_notes(lambda: notes(host))  # what the host said is no second old
    assert late.seen == 0

def test_a_database_that_comes_further_while_it_is_looked_at_was_not_replaced(host):
    t = tenancy(host)
    def late():
        said = notes(host)
        t.advanced(said, t.facts)  # another thread's claim was committed by now
        return said
    t.read_notes(late)
    assert t.seen == 1

def test_a_step_that_was_undone_holds_nobody(host, new_engine):
    m, registry = None, Registry()
    registry.add(greet)
    m = BackgroundTaskManager(db := open_tenant_db('acme', host), new_engine(registry))
    db.close()
    ids = [m.submit('t', greet)[0] for _ in range(2)]
    with m.store.engine.begin() as conn: conn.exec_driver_sql('UPDATE tenant_jobs SET run_at = ? WHERE id = ?', ('2020-01-01T00:00:00.000000', ids[1]))
    commit, waits = m.store.kind.commit, []
    def full(cur):
        m.store.kind.commit = commit
        x = sqlite3.OperationalError('database or disk is full')
        x.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise x
    with ThreadPoolExecutor(2) as pool:
        with m.store._turn:  # they will share a commit: a claim by hand, and a turn
            waits.append(pool.submit(m.engine.run_job, m.store, ids[0], greet))
            wait_until(lambda: len(m.store._queue) == 1)
            m.engine.attend(m.store)
            wait_until(lambda: len(m.store._queue) == 2)
            m.store.kind.commit = full
        m.store._call_next()
        with pytest.raises(DatabaseFull): waits[0].result(20)
    wait_until(lambda: m.get_job(ids[1]).status == 'completed')
    m.engine.run_job(m.store, ids[0], greet)
    assert host.find('acme').held is None and m.get_job(ids[0]).status == 'completed'

def test_a_job_of_a_held_tenant_is_not_run_by_hand(host, new_engine):
    registry, ran = Registry(), []
    def f(): ran.append(1)
    registry.add(f)
    m = BackgroundTaskManager(db := open_tenant_db('acme', host), new_engine(registry))
    db.close()
    id, bg = m.submit('t', f)
    m.engine.tenancy(m.store).refresh()
    host.hold('acme', 'put back')
    time.sleep(1.1)  # what the host said is believed for a second
    assert bg.func(*bg.args) is None and not ran and m.get_job(id).status == 'pending'
    settle_held(host, 'acme', discard=False)
    time.sleep(1.1)
    bg.func(*bg.args)
    assert ran == [1]

def test_facts_of_another_tenant_do_not_move_the_mark(host):
    t = tenancy(host)
    before = t.facts
    delete_tenant('acme', host)
    get_or_create_tenant_db('acme', host=host).close()
    t.refresh()
    t.advanced(dict(mark='41'), before)  # a claim of before, whose thread was slow
    assert t.seen == 0

def test_a_file_that_is_only_being_made_anew_gets_no_tables_from_who_knew_the_one_before(host, new_engine):
    m = BackgroundTaskManager(db := open_tenant_db('acme', host), new_engine(concurrency=0))
    db.close()
    path = Path(m.store.url.database)
    delete_tenant('acme', host, force=True)
    path.touch()  # as whoever makes it anew does, a moment before saying whose it is
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match='being made anew'): m.list_jobs()
    get_or_create_tenant_db('acme', host=host).close()
    assert m.list_jobs() == [] and m.submit('t', greet)
    delete_tenant('acme', host, force=True)
    path.touch()
    with ThreadPoolExecutor(1) as pool:  # one who has not met the one before waits a moment for what is about to be said
        met = pool.submit(Store, m.store.url, tenant='acme')
        time.sleep(0.3)
        get_or_create_tenant_db('acme', host=host).close()
        (s := met.result()).close()
        assert s.notes['tenant_id'] == 'acme'

# --- On a server a database that was made anew has the name of the one before, and no file to tell them apart

@pytest.fixture
def far(new_pg):
    h = HostDatabase(new_pg())
    yield h
    for t in h.tenants(): delete_tenant(t.id, h, force=True)
    h.close()

@pytest.mark.parametrize('first', ['a submit', 'a look', 'a visit', 'a transaction'])
def test_a_tenant_that_was_made_anew_is_served_by_those_who_knew_the_one_before(far, new_engine, first):
    name, registry = f'x{gen_id()[-10:]}', Registry()
    registry.add(greet)
    get_or_create_tenant_db(name, host=far).close()
    m = BackgroundTaskManager(db := open_tenant_db(name, far), new_engine(registry))
    db.close()
    id, bg = m.submit('t', greet)
    bg.func(*bg.args)
    assert m.get_job(id).result == '"hello"'
    delete_tenant(name, far, force=True)
    get_or_create_tenant_db(name, host=far).close()
    if first == 'a look': assert m.list_jobs() == []
    if first == 'a transaction':
        with pytest.raises(DatabaseUnavailable, match='try again'), m.transaction() as conn: m.submit('t', greet, conn=conn)
        with m.transaction() as conn: id, bg = m.submit('t', greet, conn=conn)
        bg.func(*bg.args)
        m.delete(id)
    if first == 'a visit':
        m.engine.attend(m.store)
        time.sleep(0.5)
    id, bg = m.submit('t', greet)
    bg.func(*bg.args)
    assert (m.get_job(id).status, len(m.list_jobs())) == ('completed', 1)

def test_a_connection_that_came_before_the_tables_is_not_kept(far, new_engine):
    "Somebody looked in while the database was made anew, and was not known yet to be the tenant's"
    name = f'x{gen_id()[-10:]}'
    m = BackgroundTaskManager(db := get_or_create_tenant_db(name, host=far), new_engine(concurrency=0))
    db.close()
    delete_tenant(name, far, force=True)
    fh_saas.db_tenant._create_pg(far, f't_{name}_db')
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match='made anew'), m.store.cursor() as cur: cur.execute('SELECT 1')
    with pytest.raises(DatabaseUnavailable, match='made anew'): m.submit('t', greet)
    get_or_create_tenant_db(name, host=far).close()
    assert m.list_jobs() == [] and m.submit('t', greet)

def test_who_looks_while_another_makes_the_tables_gets_an_answer(far, new_engine, monkeypatch):
    "What was opened before there were tables is not handed to a reader"
    name = f'x{gen_id()[-10:]}'
    m = BackgroundTaskManager(db := get_or_create_tenant_db(name, host=far), new_engine(concurrency=0))
    db.close()
    delete_tenant(name, far, force=True)
    get_or_create_tenant_db(name, host=far).close()
    make, seen = fh_saas.jobs.store.ensure_tables, []
    def late(*args):
        monkeypatch.setattr(fh_saas.jobs.store, 'ensure_tables', make)
        with ThreadPoolExecutor(1) as other: seen.append(other.submit(m.list_jobs).result())
        return make(*args)
    monkeypatch.setattr(fh_saas.jobs.store, 'ensure_tables', late)
    assert m.list_jobs() == [] and seen == [[]]

def test_a_table_that_is_missing_is_not_said_to_be_there(far, new_engine):
    name = f'x{gen_id()[-10:]}'
    m = BackgroundTaskManager(db := get_or_create_tenant_db(name, host=far), new_engine(concurrency=0))
    db.close()
    id, _ = m.submit('t', greet)
    with m.store.engine.begin() as conn: conn.exec_driver_sql('DROP TABLE tenant_job_attempts')
    with pytest.raises(DatabaseUnavailable, match='are missing'): m.attempts(id)

def test_a_database_that_is_only_being_made_anew_gets_no_tables_from_who_knew_the_one_before(far, new_engine):
    name = f'x{gen_id()[-10:]}'
    get_or_create_tenant_db(name, host=far).close()
    m = BackgroundTaskManager(db := open_tenant_db(name, far), new_engine(concurrency=0))
    db.close()
    url = far.url_of(far.find(name))
    delete_tenant(name, far, force=True)
    with open_engine(far.url, isolation_level='AUTOCOMMIT', poolclass=sa.NullPool).connect() as conn: conn.exec_driver_sql(f'CREATE DATABASE "{url.database}"')
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match='made anew'): m.list_jobs()
    get_or_create_tenant_db(name, host=far).close()  # nobody else has written into it
    assert m.list_jobs() == []

def greet(): return 'hello'
