"`asubmit`: the promises of `submit`, kept from an event loop"
import asyncio, sqlite3, time
import pytest
from conftest import wait_until
from fh_saas.db_connect import DatabaseBusy
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.store import QuotaExceeded
from fh_saas.jobs.tasks import BadPayload
from fh_saas.jobs.tenancy import rules_of
from fh_saas.utils_bgtsk import BackgroundTaskManager, InvalidJob, QueueClosed


def double(n): return 2*n
async def adouble(n): return 2*n
def commits(store):
    made, commit = [], store._transact
    store._transact = lambda *args, **kw: made.append(1) or commit(*args, **kw)
    return made


def test_many_requests_share_commits_and_each_gets_its_own_job(manager):
    made = commits(manager.store)
    async def all_of_them(): return await asyncio.gather(*(manager.asubmit('t', double, n=n, priority=1 + n % 4) for n in range(100)))
    ids = [i for i, _ in asyncio.run(all_of_them())]
    assert len(set(ids)) == 100 and len(made) < 30
    assert [manager.get_job(i).payload for i in ids] == [f'{{"n":{n}}}' for n in range(100)]
    assert [manager.get_job(i).priority for i in ids] == [1 + n % 4 for n in range(100)]

@pytest.mark.parametrize('func', [double, adouble])
def test_its_task_is_run_by_the_response(manager, func):
    async def requests():
        async def request(n):
            job_id, bg_task = await manager.asubmit('t', func, n=n)
            await bg_task()
            return manager.get_job(job_id)
        return await asyncio.gather(*map(request, range(40)))
    assert [(j.status, j.result) for j in asyncio.run(requests())] == [('completed', str(2*n)) for n in range(40)]

def test_each_loop_is_answered_after_another_has_ended(manager):
    async def one(n): return await (await manager.asubmit('t', double, n=n))[1]()
    for n in range(5): asyncio.run(one(n))
    assert {j.status for j in manager.list_jobs()} == {'completed'} and len(manager.list_jobs()) == 5

def test_bad_input_is_refused_before_anything_is_written(manager):
    for error, kw in ((BadPayload, dict(m=1)), (InvalidJob, dict(n=1, priority=9)), (InvalidJob, dict(n=1, run_at='soon'))):
        with pytest.raises(error): asyncio.run(manager.asubmit('t', double, **kw))
    assert manager.list_jobs() == []

def test_a_duplicate_fails_alone(manager):
    async def both():
        store, call = manager.store, manager.engine.writers.submit
        job = lambda i: dict(id=i, job_type='t', task='t', payload='{}')
        return await asyncio.gather(*(store.aadd(job(i), 0, None, call) for i in ('a', 'b', 'a', 'c')), return_exceptions=True)
    found = asyncio.run(both())
    assert sum(isinstance(f, Exception) for f in found) == 1 and {j.id for j in manager.list_jobs()} == {'a', 'b', 'c'}

def test_the_loop_goes_on_while_another_process_holds_the_lock(new_engine, new_sqlite):
    from fastsql import Database
    url = new_sqlite()
    m = BackgroundTaskManager(Database(url), new_engine(busy=0.3))
    lock = sqlite3.connect(url.removeprefix('sqlite:///'), isolation_level=None)
    lock.execute('BEGIN IMMEDIATE')
    async def wait():
        ticks, job = 0, asyncio.create_task(m.asubmit('t', double, n=1))
        while not job.done(): await asyncio.sleep(0.01); ticks += 1
        with pytest.raises(DatabaseBusy): await job
        return ticks
    start = time.monotonic()
    assert asyncio.run(wait()) > 5 and time.monotonic() - start < 5
    lock.rollback()
    assert m.list_jobs() == []

def test_quota_and_drain_hold_for_requests_that_come_together(new_engine, tmp_path):
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    m = BackgroundTaskManager(get_or_create_tenant_db('acme', host=host), new_engine())
    rules_of(host).set('acme', pending=3)
    async def many(): return await asyncio.gather(*(m.asubmit('t', double, n=n) for n in range(10)), return_exceptions=True)
    assert [type(r) for r in asyncio.run(many())].count(QuotaExceeded) == 7 and len(m.list_jobs()) == 3
    rules_of(host).set('acme', mode='draining')
    with pytest.raises(QueueClosed): asyncio.run(m.asubmit('t', double, n=1))
    m.db.close(); host.close()

def test_a_request_that_goes_away_leaves_the_others_alone(manager):
    async def some():
        tasks = [asyncio.create_task(manager.asubmit('t', double, n=n)) for n in range(6)]
        await asyncio.sleep(0)
        for t in tasks[::2]: t.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)
    found = asyncio.run(some())
    assert all(manager.get_job(f[0]) for f in found[1::2]) and all(isinstance(f, asyncio.CancelledError) for f in found[::2])

def test_a_stopping_engine_lets_no_response_wait(new_engine, new_sqlite):
    from fastsql import Database
    engine = new_engine()
    m = BackgroundTaskManager(Database(new_sqlite()), engine)
    async def request():
        job_id, bg_task = await m.asubmit('t', slow)
        waiting = asyncio.create_task(bg_task())
        await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.stop, 0.1)
        await asyncio.wait_for(waiting, 5)
        return job_id
    job_id = asyncio.run(request())
    assert engine.closed and job_id

def slow(): time.sleep(3)

def test_an_engine_that_has_run_a_response_is_at_rest(manager):
    "It neither looks again and again, nor stands in the way of others"
    e, turns = manager.engine, []
    _, bg_task = manager.submit('double', double, n=2)
    asyncio.run(bg_task())
    wait_until(lambda: e.idle, 5)
    have = e._have_turn
    e._have_turn = lambda *args: turns.append(1) or have(*args)
    time.sleep(1)
    assert len(turns) < 10 and e.backlog == 0

def test_claims_that_cannot_be_given_back_are_tried_again(manager):
    "A job that got no thread within a second, in a database that takes no write just then"
    e = manager.engine
    desk, given = e._desks[manager.store], []
    back = desk.give_back
    def refuse(attempts):
        given.append(len(attempts))
        if len(given) == 1: raise DatabaseBusy('somebody has the lock')
        back(attempts)
    desk.give_back = refuse
    size, e.line.size = e.line.size, 0  # no thread takes a job
    ids = [manager.submit('double', double, n=n, run_at='2020-01-01T00:00:00Z')[0] for n in range(3)]
    desk._take(manager.store.claim(*desk.names, 'tok', e.worker, 30, 3))
    e.line.put(desk, list(desk.live.values()))
    e._start()
    wait_until(lambda: len(given) >= 2, 10)
    e.line.size = size
    e.attend(manager.store)
    wait_until(lambda: all(manager.get_job(i).status == 'completed' for i in ids), 10)

@pytest.mark.parametrize('met', [True, False])
def test_an_async_task_runs_in_the_loop_of_its_response(manager, met):
    seen = []
    async def where(): seen.append(asyncio.get_running_loop())
    if met: manager.engine.registry.add(where, where.__qualname__)
    async def request():
        job_id, bg_task = await manager.asubmit('t', where)
        await bg_task()
        return asyncio.get_running_loop() is seen[0]
    assert asyncio.run(request())
