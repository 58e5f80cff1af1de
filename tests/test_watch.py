"The thread that hears of a job runs it, and another one listens meanwhile."
import itertools, sqlite3, threading, time, uuid
from types import SimpleNamespace
import pytest
from conftest import wait_until
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.bell import Bell
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import Registry, task
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers import watch
from fh_saas.workers.fleet import Fleet
from fh_saas.workers.runner import Runner

began, go_on, numbers = {}, threading.Event(), itertools.count(100)

@task('watch.look')
def look(n): began[n] = threading.current_thread().name, time.monotonic()

@task('watch.hold')
def hold(n):
    look(n)
    go_on.wait(60)

@pytest.fixture
def shop(host, new_engine, monkeypatch):
    "A runner that knows two tenants, and what another process submits to them with"
    began.clear(); go_on.clear()
    monkeypatch.setattr(watch, 'headstart', 2.0)  # on a slow machine a visit would be there first
    away, own = new_engine(Registry(), concurrency=0), uuid.uuid4().hex[:6]  # tests at the same time share one server
    with Runner(host, Settings(concurrency=4, poll=3600)) as r:
        ms = {name: BackgroundTaskManager(get_or_create_tenant_db(f'{name}-{own}', host=host), away) for name in ('acme', 'globex', 'initech')}
        def submit(n, f=look, name='acme'):
            ms[name].submit(f, n=n)
            return time.monotonic()
        for n, name in enumerate(ms): submit(-1 - n, name=name); wait_until(lambda: -1 - n in began, 15)
        yield SimpleNamespace(runner=r, ms=ms, submit=submit, host=host)
        go_on.set()
    for m in ms.values(): m.db.close()

def calm(shop):
    "Nothing is due, and nobody looks whether anything is: the next job is heard of by a call alone"
    r = shop.runner
    wait_until(lambda: r.engine.idle and r._post.relief and not r._visiting and not r.wakes.due(1)[0] and not r.wakes.visited(), 20)

def by(n):
    wait_until(lambda: n in began, 10)
    return began[n][0]

def run_where_heard(shop, f):
    "On a busy machine a visit may be there first: one of some"
    for n in itertools.islice(numbers, 10):
        calm(shop)
        shop.submit(n, f)
        if by(n) == 'fh_saas-watch': return
        go_on.set()
        calm(shop)
        go_on.clear()
    raise AssertionError(began)

def test_who_hears_of_a_lone_job_runs_it(shop):
    for _ in range(3): run_where_heard(shop, look)

def test_another_listens_while_it_runs(shop, monkeypatch):
    run_where_heard(shop, hold)
    monkeypatch.setattr(watch, 'headstart', 0.01)
    beat = next(w.beat_at for w in Fleet(shop.host).workers() if w.id == shop.runner.engine.worker)
    for n in (1, 2, 3):
        at = shop.submit(n, name='globex' if n % 2 else 'acme')
        assert by(n).startswith('fh_saas-job') and began[n][1] - at < 0.5
    wait_until(lambda: next(w.beat_at for w in Fleet(shop.host).workers() if w.id == shop.runner.engine.worker) != beat, 10)
    go_on.set()
    run_where_heard(shop, look)

def test_a_job_that_does_not_end_keeps_no_runner_from_its_end(shop):
    run_where_heard(shop, hold)
    at = time.monotonic()
    shop.runner.stop(0)
    assert time.monotonic() - at < 4 and shop.runner._post.over.is_set()
    assert [j.status for j in shop.ms['acme'].list_jobs(status='pending')] == ['pending']  # another process may begin it
    go_on.set()
    wait_until(lambda: not any(t.is_alive() for t in shop.runner._watching), 10)

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)  # nobody waits for a lock on a server
def test_who_waits_for_a_locked_tenant_keeps_no_other_waiting(shop, monkeypatch):
    monkeypatch.setattr(watch, 'headstart', 0.01)
    calm(shop)
    bell, locks = Bell(shop.host.id), []
    for name in ('acme', 'globex'):
        locks.append(own := sqlite3.connect(shop.ms[name].store.url.database.removeprefix('file:').partition('?')[0], isolation_level=None))
        own.execute('BEGIN IMMEDIATE')
        bell.call(shop.ms[name].db.tenant_id)
        time.sleep(0.2)
    for n in range(5): at = shop.submit(n, name='initech'); assert by(n) and began[n][1] - at < 0.5
    for own in locks: own.close()
    bell.close()

def test_who_is_gone_is_relieved_by_nobody_else(shop, monkeypatch):
    "Whatever keeps the one, the other goes on listening"
    monkeypatch.setattr(watch, 'headstart', 0.01)
    calm(shop)
    monkeypatch.setattr(shop.runner.engine, 'serve', lambda store: go_on.wait(60))
    shop.submit(0)
    wait_until(lambda: not shop.runner._post.relief, 10)
    for n in range(1, 6): at = shop.submit(n, name='globex'); assert by(n).startswith('fh_saas-job') and began[n][1] - at < 0.5
