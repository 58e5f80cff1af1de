"The helpers for the tests of apps: as an app's suite uses them."
import asyncio, subprocess, sys, threading, time
from datetime import date
import pytest
from fasthtml.common import FastHTML, P
from starlette.testclient import TestClient
from fh_saas.jobs.process import default_engine
from fh_saas.jobs.retries import Cancel, Permanent, Snooze
from fh_saas.jobs.tasks import BadPayload, Registry, task
from fh_saas.testing import JobTester
from fh_saas.jobs.settings import Settings
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner

pytest_plugins = ()

@task('app_confirm')
def confirm(order:int, due:date, job) -> date:
    job.log('sent', item=order)
    return due

@task('app_flaky', max_retries=3)
def flaky(job):
    if job.attempt < 3: raise ConnectionError('away')
    return 'there'

@task('app_parent')
def parent(n, job):
    if n: job.log('child', item=parent.submit(BackgroundTaskManager(job.db, default_engine()), n=n-1)[0])
    return n

@task('app_async')
async def later(n): await asyncio.sleep(0); return n

def test_nothing_runs_before_it_is_told_to(fh_jobs, fh_tenant_db):
    app = FastHTML(secret_key='x')
    @app.route('/orders')
    def post(order:int): return P('ok'), confirm.submit(BackgroundTaskManager(fh_tenant_db), order=order, due=date(2026, 1, 31))[1]
    threads = threading.active_count()
    with TestClient(app) as client: assert client.post('/orders?order=7').status_code == 200
    job = fh_jobs.assert_submitted(confirm, order=7, due=date(2026, 1, 31))
    assert job.status == 'pending' and fh_jobs.assert_submitted('app_confirm', times=1).id == job.id
    [(id, o)] = fh_jobs.drain()
    assert (id, o.kind) == (job.id, 'completed') and fh_jobs.drain() == [] and threading.active_count() <= threads + 1

def test_the_clock_is_the_tests(fh_jobs, fh_tenant_db):
    m, begun = BackgroundTaskManager(fh_tenant_db), time.monotonic()
    id, _ = flaky.submit(m)
    kinds = []
    for wait in (0, 1.9, 0.2, 3.9, 0.2):
        fh_jobs.advance(wait)
        kinds.append([o.kind for _, o in fh_jobs.drain()])
    assert kinds == [['retry'], [], ['retry'], [], ['completed']] and m.result(id, 0) == 'there' and time.monotonic() - begun < 5
    tomorrow, _ = later.submit(m, n=1, run_at='2100-01-01')
    assert fh_jobs.drain() == [] and m.state(m.get_job(tomorrow)) == 'scheduled'
    fh_jobs.advance(100*366*86400)
    assert m.state(m.get_job(tomorrow)) == 'pending' and [o.kind for _, o in fh_jobs.drain()] == ['completed']

def test_drain_runs_what_jobs_submit_and_stops_in_the_end(fh_jobs, fh_tenant_db):
    parent.submit(BackgroundTaskManager(fh_tenant_db), n=3)
    assert [o.result for _, o in fh_jobs.drain()] == ['3', '2', '1', '0']
    parent.submit(BackgroundTaskManager(fh_tenant_db), n=50)
    with pytest.raises(Exception, match='do they submit each other'): fh_jobs.drain(most=10)

def test_urgent_ones_first(fh_jobs, fh_tenant_db):
    m = BackgroundTaskManager(fh_tenant_db)
    ids = [later.submit(m, n=p, priority=p)[0] for p in (1, 4, 2, 3)]
    assert [o.result for _, o in fh_jobs.drain()] == ['4', '3', '2', '1'] and len(ids) == 4

def test_perform_is_a_whole_attempt(fh_jobs, fh_tenant_db):
    p = fh_jobs.perform(fh_tenant_db, confirm, order=7, due='2026-01-31')
    assert p.result == date(2026, 1, 31) and p.job.status == 'completed' and [(l['message'], l['item']) for l in p.logs] == [('sent', '7')]
    with pytest.raises(BadPayload): fh_jobs.perform(fh_tenant_db, confirm, order='x', due=date(2026, 1, 1))
    def f(kind): raise dict(p=Permanent, s=lambda m: Snooze(60, m), c=Cancel, v=ValueError)[kind]('no')
    assert [fh_jobs.perform(fh_tenant_db, f, kind=k).outcome.kind for k in 'pscv'] == ['failed', 'snooze', 'cancelled', 'retry']
    assert fh_jobs.perform(fh_tenant_db, f, kind='v', max_retries=1).outcome.kind == 'failed' and fh_jobs.perform(fh_tenant_db, 'app_async', n=5).result == 5

def test_what_was_submitted(fh_jobs, fh_tenant_db):
    m = BackgroundTaskManager(fh_tenant_db)
    for n in (1, 2): confirm.submit(m, order=n, due=date(2026, 1, n))
    m.submit('other_type', later, n=3)
    assert len(fh_jobs.jobs(confirm)) == 2 and [j.payload for j in fh_jobs.jobs(confirm, due=date(2026, 1, 2))] == ['{"order":2,"due":"2026-01-02"}'] and len(fh_jobs.jobs('other_type')) == len(fh_jobs.jobs(later)) == 1
    assert fh_jobs.assert_submitted(confirm, times=0, order=9) is None
    for kw in (dict(order=9), dict(times=1), dict(times=3)):
        with pytest.raises(AssertionError, match="jobs of 'confirm'.*the last submitted: .*app_async"): fh_jobs.assert_submitted(confirm, **kw)

def test_inline(fh_jobs_inline, fh_tenant_db):
    m = BackgroundTaskManager(fh_tenant_db)
    id, bg = later.submit(m, n=5)
    assert m.result(id, 0) == 5
    asyncio.run(bg())
    parent.submit(m, n=2)
    assert [j.status for j in m.list_jobs('app_parent')] == ['completed']*3
    id, _ = flaky.submit(m)
    assert m.get_job(id).retry_count == 1
    with m.transaction() as tx: id, _ = later.submit(m, n=6, conn=tx)
    until = time.monotonic() + 5
    while m.get_job(id).status != 'completed' and time.monotonic() < until: time.sleep(0.01)
    assert m.result(id, 0) == 6

def test_in_a_rolled_back_transaction_nothing_was_submitted(fh_jobs, fh_tenant_db):
    m = BackgroundTaskManager(fh_tenant_db)
    with pytest.raises(ZeroDivisionError), m.transaction() as tx:
        confirm.submit(m, order=1, due=date(2026, 1, 1), conn=tx)
        1/0
    fh_jobs.assert_submitted(confirm, times=0)

def test_both_databases_and_afterwards_all_is_as_before(url):
    from fastsql import Database
    before = default_engine()
    with JobTester(Registry()) as jobs:
        db = Database(url)
        m = BackgroundTaskManager(db)
        id, _ = m.submit('t', later, n=1)
        assert m.engine is jobs.engine is default_engine() and [o.kind for _, o in jobs.drain()] == ['completed']
        jobs.advance(3600)
        again, _ = m.submit('t', later, n=2)
        assert m.get_job(again).created_at > m.get_job(id).created_at[:13] and len(jobs.drain()) == 1
    assert default_engine() is before and before is not jobs.engine
    db.conn.close(); db.engine.dispose()

def test_a_task_that_nobody_knows_stays(fh_jobs, fh_tenant_db):
    m = BackgroundTaskManager(fh_tenant_db)
    m.store.add(dict(id='x', job_type='t', task='of another release', max_retries=3))
    assert fh_jobs.drain() == [] and m.state(m.get_job('x')) == 'waiting'

def test_the_plugin_is_found_in_a_suite_of_an_app(tmp_path):
    (tmp_path/'test_app.py').write_text('''
from fh_saas.jobs.tasks import task
from fh_saas.utils_bgtsk import BackgroundTaskManager
@task("hello")
def hello(name): return f"Hello {name}"
def test_it(fh_jobs, fh_tenant_db):
    hello.submit(BackgroundTaskManager(fh_tenant_db), name="Ada")
    fh_jobs.assert_submitted(hello, name="Ada")
    assert fh_jobs.drain()[0][1].result == '"Hello Ada"'
def test_again(fh_jobs, fh_tenant_db): fh_jobs.assert_submitted(hello, times=0)
''')
    p = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert '2 passed' in p.stdout, p.stdout + p.stderr

def test_the_runner_of_the_app_leaves_the_jobs_to_the_test(fh_jobs, fh_host, fh_tenant_db):
    from fh_saas.workers.runner import Runner
    app, runner = FastHTML(secret_key='x'), Runner(fh_host)
    runner.attach(app)
    @app.route('/later')
    async def post(n:int):
        id, bg = await BackgroundTaskManager(fh_tenant_db).asubmit(later, n=n)
        return P(id), bg
    with TestClient(app) as client:
        client.post('/later?n=5')
        assert fh_jobs.assert_submitted(later, n=5).status == 'pending' and default_engine() is fh_jobs.engine
        assert [o.result for _, o in fh_jobs.drain()] == ['5']
    assert default_engine() is fh_jobs.engine and not fh_jobs.engine.closed

def test_inline_in_an_event_loop_and_in_a_transaction(fh_jobs_inline, fh_tenant_db):
    m = BackgroundTaskManager(fh_tenant_db)
    async def main(): return (await m.asubmit(later, n=5))[0]
    assert m.result(asyncio.run(main()), 0) == 5
    threads = threading.active_count()
    with m.transaction() as tx: id, _ = later.submit(m, n=6, conn=tx)
    assert m.result(id, 0) == 6 and threading.active_count() <= threads

def test_a_typing_error_makes_no_test_pass(fh_jobs, fh_tenant_db):
    from fh_saas.jobs.tasks import UnknownTask
    with pytest.raises(UnknownTask, match="did you mean 'app_confirm'"): fh_jobs.assert_submitted('app_confrm', times=0)
    with pytest.raises(TypeError, match='no argument ordr'): fh_jobs.assert_submitted(confirm, times=0, ordr=1)

def test_inline_jobs_that_open_transactions_themselves(fh_jobs_inline, fh_tenant_db):
    m = BackgroundTaskManager(fh_tenant_db)
    def outer():
        with m.transaction() as tx: return later.submit(m, n=1, conn=tx)[0]
    with m.transaction() as tx: id, _ = m.submit('outer', outer, conn=tx)
    assert m.result(m.result(id, 0), 0) == 1

def test_an_outcome_that_cannot_be_written_is_said(fh_jobs, fh_tenant_db):
    import sqlite3
    m, kept = BackgroundTaskManager(fh_tenant_db), []
    def f(job):
        kept.append(c := sqlite3.connect(job.store.url.database))
        c.execute('BEGIN IMMEDIATE')
    fh_jobs.engine.settings.__dict__['busy'] = 0.2
    m.store.busy = 0.2
    m.submit('t', f)
    with pytest.raises(Exception, match='cannot be written'): fh_jobs.drain()
    kept[0].close()

def test_a_runner_that_runs_already_leaves_the_jobs_of_a_test_alone(fh_host, fh_tenant_db):
    with Runner(fh_host, Settings(concurrency=2, handoff=0)) as r:
        m = BackgroundTaskManager(fh_tenant_db)
        before, _ = later.submit(m, n=1)
        assert m.wait(before, 15).status == 'completed'
        with JobTester() as t:
            mine, _ = later.submit(m, n=2)
            time.sleep(1.5)
            assert m.get_job(mine).status == 'pending' and [id for id, _ in t.drain()] == [mine] and r.engine.quiet
            r._obey('run', None)  # nor does a command that it should go on have it run them
            assert r.engine.quiet
        after, _ = later.submit(m, n=3)
        assert m.wait(after, 15).status == 'completed' and not r.engine.quiet
