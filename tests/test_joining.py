"A job in a transaction of the app's: there exactly if the rows beside it are, whatever happens."
import asyncio, json, os, signal, sqlite3, subprocess, sys, time
from pathlib import Path
import pytest
import sqlalchemy as sa
from fastsql import Database
from hypothesis import HealthCheck, given, settings, strategies as st
from sqlalchemy.orm import Session
from fh_saas.db_connect import DatabaseBusy
from fh_saas.db_host import HostDatabase, gen_id
from fh_saas.db_tenant import delete_tenant, get_or_create_tenant_db
from fh_saas.jobs import following
from fh_saas.jobs.options import InvalidJob, Unique
from fh_saas.jobs.store import JobNotFound, QuotaExceeded
from fh_saas.jobs.tenancy import rules_of
from fh_saas.jobs.unique import NotUnique
from fh_saas.utils_bgtsk import BackgroundTaskManager
from conftest import wait_until

def confirm(n): return n

@pytest.fixture
def shop(manager):
    with manager.transaction() as tx: tx.exec_driver_sql('CREATE TABLE orders (n INTEGER)')
    return manager

def orders(m):
    with m.store.cursor() as cur: return [n for n, in cur.execute('SELECT n FROM orders ORDER BY n').fetchall()]
def jobs(m): return sorted(json.loads(j.payload)['n'] for j in m.list_jobs())
def insert(n): return sa.text(f'INSERT INTO orders VALUES ({n})')

def plain(url):
    "A connection of the driver, as its own manual opens it"
    u = sa.make_url(url)
    if u.get_backend_name() == 'sqlite': return sqlite3.connect(u.database)
    import psycopg
    return psycopg.connect(u.set(drivername='postgresql').render_as_string(hide_password=False))

def drivers_url(url): return sa.make_url(url).set(drivername='postgresql+psycopg') if 'postgresql' in str(url) else url

class Ways:
    "Each opens a transaction, and gives what is passed as `conn` and what runs a statement, commits, rolls back"
    @staticmethod
    def connection(url):
        c = sa.create_engine(drivers_url(url)).connect()
        return c, c.execute, c.commit, c.rollback, c.close
    @staticmethod
    def session(url):
        s = Session(sa.create_engine(drivers_url(url)))
        return s, s.execute, s.commit, s.rollback, s.close
    @staticmethod
    def fastsql(url):
        db = Database(drivers_url(url))
        return db, db.conn.execute, db.conn.commit, db.conn.rollback, db.conn.close
    @staticmethod
    def driver(url):
        c = plain(url)
        return c, lambda s: c.execute(str(s)), c.commit, c.rollback, c.close

@pytest.mark.parametrize('way', ['connection', 'session', 'fastsql', 'driver'])
@pytest.mark.parametrize('first', ['rows', 'job'])
def test_rows_and_job_are_committed_together(shop, url, way, first):
    conn, run, commit, rollback, close = getattr(Ways, way)(url)
    for n, end in ((1, commit), (2, rollback), (3, commit)):
        if first == 'rows': run(insert(n))
        id, bg = shop.submit('t', confirm, n=n, conn=conn)
        if first == 'job': run(insert(n))
        assert n not in orders(shop) and n not in jobs(shop)
        end()
        asyncio.run(bg())
        if end is commit: assert shop.get_job(id).status == 'completed'
        else: pytest.raises(JobNotFound, shop.get_job, id)
    close()
    assert orders(shop) == jobs(shop) == [1, 3]

def test_the_with_form(shop):
    with shop.transaction() as tx:
        tx.execute(insert(1))
        id, bg = shop.submit('t', confirm, n=1, conn=tx)
        shop.submit_many('t', confirm, [dict(n=2), dict(n=3)], conn=tx)
        again, _ = asyncio.run(shop.asubmit('t', confirm, n=4, conn=tx))
        assert jobs(shop) == []
    with pytest.raises(ZeroDivisionError), shop.transaction() as tx:
        shop.submit('t', confirm, n=9, conn=tx)
        1/0
    assert orders(shop) == [1] and jobs(shop) == [1, 2, 3, 4]

def test_it_runs_by_itself_soon_after_the_commit(url, new_engine):
    m = BackgroundTaskManager(Database(url), new_engine(handoff=0))
    conn, _, commit, _, close = Ways.driver(url)
    id, _ = m.submit('t', confirm, n=1, conn=conn)
    time.sleep(0.3)
    commit(); begun = time.monotonic()
    assert m.wait(id, 10).status == 'completed' and time.monotonic() - begun < 3
    close()
    with m.transaction() as tx: id, _ = m.submit('t', confirm, n=2, conn=tx)
    begun = time.monotonic()
    assert m.wait(id, 10).status == 'completed' and time.monotonic() - begun < 4

def test_a_closure_of_a_job_that_never_was_is_forgotten(shop):
    kept = shop.engine._desks[shop.store].functions
    for conn_way in ('transaction', 'driver'):
        n = len(kept)
        if conn_way == 'transaction':
            with pytest.raises(ZeroDivisionError), shop.transaction() as tx:
                shop.submit('t', lambda: 1, conn=tx)
                1/0
        else:
            conn, _, _, rollback, close = Ways.driver(shop.store.url.render_as_string(hide_password=False))
            shop.submit('t', lambda: 1, conn=conn)
            rollback(); close()
        wait_until(lambda: len(kept) == n, 10)
    with pytest.raises(InvalidJob): shop.submit('t', lambda: 1, conn=object())
    assert len(kept) == n and not shop.engine._following

def test_a_savepoint_rolled_back_takes_the_job_along(shop, monkeypatch):
    monkeypatch.setattr(following, 'after_commit', 0.3)
    with shop.transaction() as tx:
        with pytest.raises(ZeroDivisionError), tx.begin_nested():
            lost, _ = shop.submit('t', confirm, n=1, conn=tx)
            1/0
        with tx.begin_nested(): shop.submit('t', confirm, n=2, conn=tx)
    assert jobs(shop) == [2]
    wait_until(lambda: not shop.engine._following, 10)

def test_another_database_is_refused(shop, new_url):
    other = new_url()
    for way in ('connection', 'session', 'fastsql', 'driver'):
        conn, *_, close = getattr(Ways, way)(other)
        with pytest.raises(InvalidJob, match='another database'): shop.submit('t', confirm, n=1, conn=conn)
        close()
    assert jobs(shop) == []

@pytest.mark.parametrize('kind', ['raw', 'sqlalchemy'])
def test_a_connection_that_commits_by_itself_is_refused(shop, url, kind):
    if kind == 'sqlalchemy': conn = sa.create_engine(drivers_url(url), isolation_level='AUTOCOMMIT').connect()
    else:
        conn = plain(url)
        if isinstance(conn, sqlite3.Connection): conn.isolation_level = None
        else: conn.autocommit = True
    with pytest.raises(InvalidJob, match='begin a transaction'): shop.submit('t', confirm, n=1, conn=conn)
    assert jobs(shop) == []
    if kind == 'raw':
        conn.execute('BEGIN')
        shop.submit('t', confirm, n=1, conn=conn)
        conn.execute('ROLLBACK')
    conn.close()
    assert jobs(shop) == []

@pytest.mark.parametrize('conn', [object(), 'sqlite:///x.db', 7, True])
def test_what_is_no_connection(shop, conn):
    with pytest.raises(InvalidJob, match='use a connection of'): shop.submit('t', confirm, n=1, conn=conn)

def test_rows_in_another_shape_do_not_matter(shop, url):
    conn = plain(url)
    if isinstance(conn, sqlite3.Connection): conn.row_factory = lambda cur, row: dict(zip([d[0] for d in cur.description], row))
    else:
        from psycopg.rows import dict_row
        conn.row_factory = dict_row
    id, bg = shop.submit('t', confirm, n=1, unique=True, conn=conn)
    conn.commit(); conn.close()
    assert jobs(shop) == [1]

def test_unique_in_a_transaction(shop, url):
    a, _ = shop.submit('t', confirm, n=1, unique=True, run_at='2100-01-01')
    with shop.transaction() as tx:
        assert shop.submit('t', confirm, n=1, unique=True, conn=tx)[0] == a
        b, _ = shop.submit('t', confirm, n=2, unique=True, conn=tx)
        assert shop.submit('t', confirm, n=2, unique=True, conn=tx)[0] == b
        with pytest.raises(NotUnique): shop.submit('t', confirm, n=2, unique=Unique(by=True, then='reject'), conn=tx)
    assert jobs(shop) == [1, 2]

def test_unique_in_a_snapshot_is_refused(new_pg, new_manager):
    shop = new_manager(url := new_pg())
    conn = sa.create_engine(drivers_url(url), isolation_level='REPEATABLE READ').connect()
    with pytest.raises(InvalidJob, match='repeatable read'): shop.submit('t', confirm, n=1, unique=True, conn=conn)
    shop.submit('t', confirm, n=1, conn=conn)
    conn.commit(); conn.close()
    assert jobs(shop) == [1]

def test_under_a_quota_a_snapshot_is_refused(new_pg, new_engine):
    "It does not see how many have been submitted since"
    host, tenant = HostDatabase(new_pg()), f'quota-{gen_id()[-6:]}'
    rules_of(host).set(tenant, pending=2)
    with get_or_create_tenant_db(tenant, host=host) as db:
        m = BackgroundTaskManager(db, new_engine(concurrency=0))
        eng = sa.create_engine(host.url_of(host.find(tenant)), isolation_level='REPEATABLE READ')
        with eng.connect() as conn:
            conn.execute(sa.text('SELECT 1'))
            for n in range(2): m.submit('t', confirm, n=n)
            with pytest.raises(InvalidJob, match='quota of pending jobs in a transaction that is repeatable read'): m.submit('t', confirm, n=2, conn=conn)
        eng.dispose()
        with m.transaction() as tx, pytest.raises(QuotaExceeded): m.submit('t', confirm, n=2, conn=tx)
        assert len(m.list_jobs()) == 2
    m.engine.stop(0)
    delete_tenant(tenant, host, force=True)
    host.close()

def test_a_transaction_that_has_read_too_early_is_told_so(new_sqlite, new_manager):
    m = new_manager(url := new_sqlite())
    conn = sqlite3.connect(sa.make_url(url).database, timeout=0.2)
    conn.isolation_level = None
    conn.execute('BEGIN'); conn.execute('SELECT count(*) FROM tenant_jobs').fetchone()
    m.submit('t', confirm, n=1)
    with pytest.raises(DatabaseBusy): m.submit('t', confirm, n=2, conn=conn)
    conn.execute('ROLLBACK'); conn.close()
    assert jobs(m) == [1]

def test_inside_of_a_task(shop):
    def order(n, job):
        with job.begin() as conn:
            conn.execute(insert(n))
            id, _ = shop.submit('t', confirm, n=n, conn=conn, triggered_by=f'job:{job.id}')
            if n == 2: raise ZeroDivisionError
        return id
    ids = [shop.submit('order', order, 1, n=n) for n in (1, 2)]
    for _, bg in ids: bg.func(*bg.args)
    child = shop.get_job(json.loads(shop.get_job(ids[0][0]).result))
    assert orders(shop) == [1] and child.triggered_by == f'job:{ids[0][0]}' and shop.get_job(ids[1][0]).status == 'failed'

@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(['commit', 'rollback', 'savepoint', 'raise'])), max_size=8))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_jobs_are_where_rows_are(shop, steps):
    with shop.transaction() as tx:
        tx.execute(sa.text('DELETE FROM orders'))
        tx.execute(sa.text('DELETE FROM tenant_jobs'))
    for n, end in steps:
        try:
            with shop.transaction() as tx:
                with tx.begin_nested() as inner:
                    tx.execute(insert(n))
                    shop.submit('t', confirm, n=n, conn=tx, run_at='2100-01-01')
                    if end == 'savepoint': inner.rollback()
                if end == 'rollback': tx.rollback()
                if end == 'raise': raise ZeroDivisionError
        except (ZeroDivisionError, sa.exc.InvalidRequestError, sa.exc.ResourceClosedError): pass
    assert orders(shop) == jobs(shop)

def test_killed_at_any_moment(url, tmp_path):
    "A process that writes rows and jobs together is killed again and again"
    child = Path(__file__).parent/'children'/'joining.py'
    seen = 0
    for round in range(4):
        p = subprocess.Popen([sys.executable, str(child), url], stdout=subprocess.PIPE)
        assert p.stdout.readline() == b'ready\n'
        time.sleep(0.05 + 0.1*round)
        os.kill(p.pid, signal.SIGKILL)
        p.wait()
        eng = sa.create_engine(drivers_url(url))
        with eng.connect() as c:
            rows, found = (sorted(r[0] for r in c.execute(sa.text(q))) for q in ('SELECT n FROM orders', "SELECT payload FROM tenant_jobs"))
        eng.dispose()
        assert rows == sorted(json.loads(p)['n'] for p in found)
        seen = len(rows)
    assert seen > 10

def test_a_tenant_of_a_host_is_rung_for(tmp_path, new_engine, monkeypatch):
    "Elsewhere somebody learns of it after the commit, and of the hint before"
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    with get_or_create_tenant_db('acme', 'Acme', host) as db:
        m = BackgroundTaskManager(db, new_engine(concurrency=0))
        wakes = m.engine.tenancy(m.store).wakes
        def rung():
            with wakes.cursor() as cur: return cur.execute("SELECT hint_at, wake_at FROM fh_saas_wakes WHERE tenant_id = 'acme'").fetchone()
        with m.transaction() as tx:
            m.submit('t', confirm, n=1, conn=tx)
            assert rung()[0] and not rung()[1]
        wait_until(lambda: rung()[1], 10)
    host.close()

def test_a_forgotten_conn_is_said_at_once(new_sqlite, new_pg, new_manager):
    m = new_manager(new_sqlite())
    def f(job):
        with job.begin(): m.submit('t', confirm, n=2)
    for submit in (lambda: m.submit('t', confirm, n=1), lambda: m.transaction().__enter__(), lambda: m.submit_many('t', confirm, [dict(n=1)])):
        with m.transaction(): begun = time.monotonic(); pytest.raises(InvalidJob, submit).match('conn=')
        assert time.monotonic() - begun < 3
    id, bg = m.submit('t', f, 1)
    assert 'conn=' in bg.func(*bg.args).error
    p = new_manager(new_pg())
    async def later(): await p.asubmit('t', confirm, n=1)
    with p.transaction():  # it would be committed by itself, and run before the rows are there
        pytest.raises(InvalidJob, lambda: p.submit('t', confirm, n=1)).match('conn=')
        pytest.raises(InvalidJob, lambda: asyncio.run(later())).match('conn=')
        with p.transaction() as other: p.submit('t', confirm, n=2, conn=other)
    p.submit('t', confirm, n=1)
    assert sorted(jobs(p)) == [1, 2]

def test_a_transaction_that_is_over_is_refused(shop):
    with shop.transaction() as tx: pass
    with pytest.raises(InvalidJob, match='over'): shop.submit('t', confirm, n=1, conn=tx)

def test_what_a_task_submits_waits_for_no_response(manager):
    def parent(job): return manager.submit('t', confirm, n=1)[0]
    id, bg = manager.submit('t', parent)
    bg.func(*bg.args)
    child = manager.wait(json.loads(manager.get_job(id).result), 3)
    assert child.status == 'completed' and child.triggered_by == f'job:{id}'

def test_nothing_is_kept_on_a_connection_that_lives_long(shop, url):
    import gc
    conn, run, commit, rollback, close = Ways.connection(url)
    for n in range(30):
        shop.submit('t', confirm, n=n, conn=conn, run_at='2100-01-01')
        (commit if n % 2 else rollback)()
    wait_until(lambda: not shop.engine._following, 20)
    def kept(): gc.collect(); return sum(isinstance(o, following.Followed) and o.store is shop.store for o in gc.get_objects())
    wait_until(lambda: not kept(), 5)
    assert jobs(shop) == list(range(1, 30, 2))
    close()

def test_rolled_back_on_a_connection_that_goes_on(new_pg, new_manager):
    m = new_manager(url := new_pg())
    conn = plain(url)
    for n in range(5): m.submit('t', confirm, n=n, conn=conn); conn.rollback()
    conn.execute('SELECT 1')  # in a transaction again
    wait_until(lambda: not m.engine._following, 10)
    conn.close()

def test_another_task_of_the_loop_is_told_to_try_again(new_sqlite, new_manager):
    m = new_manager(new_sqlite())
    async def main():
        entered, leave = asyncio.Event(), asyncio.Event()
        async def a():
            with m.transaction() as tx: m.submit('t', confirm, n=1, conn=tx); entered.set(); await leave.wait()
        t = asyncio.create_task(a())
        await entered.wait()
        with pytest.raises(DatabaseBusy, match='another task'): m.submit('t', confirm, n=2)
        leave.set()
        await t
        m.submit('t', confirm, n=3)
    asyncio.run(main())
    assert jobs(m) == [1, 3]

# --- What a second review has found

def test_the_block_may_end_in_another_context_than_it_began_in(new_sqlite, new_manager):
    import contextvars
    m = new_manager(new_sqlite())
    block = m.transaction()
    tx = contextvars.copy_context().run(block.__enter__)
    m.submit('t', confirm, n=1, conn=tx)
    contextvars.copy_context().run(block.__exit__, None, None, None)
    assert jobs(m) == [1]

def test_what_was_started_in_the_block_may_submit_after_it(new_sqlite, new_manager):
    m = new_manager(new_sqlite())
    async def main():
        over = asyncio.Event()
        async def later(): await over.wait(); m.submit('t', confirm, n=2)
        with m.transaction() as tx:
            t = asyncio.create_task(later())
            m.submit('t', confirm, n=1, conn=tx)
            with pytest.raises(InvalidJob, match='conn='): await m.asubmit('t', confirm, n=3)
            with pytest.raises(InvalidJob, match='conn='): m.cancel('x')
        over.set()
        await t
    asyncio.run(main())
    assert jobs(m) == [1, 2]

def test_a_look_that_fails_ends_no_following(new_pg, new_manager, monkeypatch):
    from fh_saas.db_connect import DatabaseUnavailable
    from fh_saas.jobs.store import Store
    m, fails = new_manager(url := new_pg(), handoff=0), [1, 1]
    was = Store.state_of
    def broken(self, xid):
        if fails: fails.pop(); raise DatabaseUnavailable('away')
        return was(self, xid)
    monkeypatch.setattr(Store, 'state_of', broken)
    conn = plain(url)
    id, _ = m.submit('t', lambda: 7, conn=conn)
    wait_until(lambda: not fails, 10)
    conn.commit(); conn.close()
    wait_until(lambda: not m.engine._following, 10)
    assert m.result(id, 20) == 7

def test_a_forgotten_connection_lets_go_of_its_lock(new_sqlite, new_manager):
    import gc
    m = new_manager(url := new_sqlite(), busy=2)
    def forget():
        conn = sa.create_engine(url).connect()
        m.submit('t', confirm, n=1, conn=conn)
    forget()
    gc.collect()
    m.submit('t', confirm, n=2)
    assert jobs(m) == [2]
