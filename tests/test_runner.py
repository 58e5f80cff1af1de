"A runner begins whole or not at all, once, and ends as a whole, over both databases of a host."
import asyncio, multiprocessing, os, signal, threading, time, uuid
from pathlib import Path
import psycopg, pytest
from conftest import wait_until
from fh_saas.db_connect import DatabaseBusy, FhSaasError
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.notes import Notes
from fh_saas.jobs.process import default_engine, use_engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import task
from fh_saas.jobs.tenancy import rules_of
from fh_saas.jobs.wake import wakes_of
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.fleet import Fleet
from fh_saas.workers.runner import Runner
from fh_saas.workers.worker import Worker

begun = []

@task('runner_stamp')
def runner_stamp(n): begun.append(n)

@pytest.fixture
def acme(host):
    "What submits to a tenant, and runs nothing"
    begun.clear()
    with get_or_create_tenant_db(f'run-{uuid.uuid4().hex[:6]}', host=host) as db: yield BackgroundTaskManager(db, e := Engine(Settings(concurrency=0)))
    e.stop(0)

@pytest.fixture
def new_runner(host):
    made = []
    def new(of=host, **kw):
        made.append(r := Runner(of, Settings(concurrency=2, handoff=0, poll=3600, **kw)))
        return r
    yield new
    for r in made: r.stop(0)

def submit(m, n): m.submit('runner_stamp', runner_stamp, n=n)
def ours(host): return [w for w in Fleet(host).workers() if w.state != 'lost']
def watches(): return sum(t.name == 'fh_saas-watch' for t in threading.enumerate())

def test_a_second_runner_of_a_host_takes_the_place_of_the_first(host, acme, new_runner):
    "As of a cell that is run again; the first one leases no visits that it leaves undone"
    first, before = new_runner().start(), watches()
    second = new_runner().start()
    wait_until(lambda: [w.id for w in ours(host)] == [second.engine.worker], 15)
    wait_until(lambda: watches() == before, 10)
    waits = []
    for n in range(10):
        at = time.monotonic()
        submit(acme, n)
        wait_until(lambda: n in begun, 10)
        waits.append(time.monotonic() - at)
    assert max(waits) < 4 and first._post.over.is_set()  # each took up to seven seconds
    first.stop(0)
    assert not second.engine.stopping

def test_a_process_serves_one_host(host, acme, new_runner, tmp_path):
    other = HostDatabase(f'sqlite:///{tmp_path}/other.db')
    first = new_runner().start()
    with pytest.raises(FhSaasError, match='already: stop that runner before'): new_runner(other).start()
    submit(acme, 1)
    wait_until(lambda: begun, 10)  # it goes on
    first.stop(0)
    r = new_runner(other).start()
    wait_until(lambda: ours(other), 10)
    r.stop(0)
    other.close()

def test_a_host_has_one_name_however_it_is_written(tmp_path, monkeypatch, new_runner):
    monkeypatch.chdir(tmp_path)
    hosts = [HostDatabase(f'sqlite:///{tmp_path}/host.db'), HostDatabase('sqlite:///host.db')]
    first, second = (new_runner(h).start() for h in hosts)
    wait_until(lambda: [w.id for w in ours(hosts[0])] == [second.engine.worker], 15)
    for r in (first, second): r.stop(0)
    for h in hosts: h.close()

def test_a_runner_whose_engine_was_replaced_by_hand_ends(host, new_runner):
    r = new_runner().start()
    wait_until(lambda: ours(host), 10)
    use_engine(e := Engine(Settings(concurrency=1)))
    wait_until(lambda: not ours(host) and r._post.over.is_set(), 15)
    assert not e.stopping and r.start().engine is not e  # it may begin again
    wait_until(lambda: [w.id for w in ours(host)] == [r.engine.worker], 10)

def test_a_runner_that_runs_is_started_once(host, acme, new_runner):
    before, r = watches(), new_runner()
    e = r.start().engine
    assert r.start().engine is e and not e.stopping and watches() == before + 1
    wait_until(lambda: len(ours(host)) == 1, 10)
    submit(acme, 1)
    wait_until(lambda: begun, 10)
    r.stop(0); r.stop(0)
    assert ours(host) == []
    wait_until(lambda: watches() == before, 5)

def test_a_runner_that_is_started_while_it_ends_begins_after_that(host, acme, new_runner):
    over, r, before = threading.Event(), new_runner().start(), watches()
    def holds(): begun.append('holds'); over.wait(30)
    with get_or_create_tenant_db(acme.db.tenant_id, host=host) as db: BackgroundTaskManager(db).submit('holds', holds)
    wait_until(lambda: begun, 10)
    old = r.engine
    (stop := threading.Thread(target=r.stop, args=[20])).start()
    wait_until(lambda: old.stopping, 10)
    (start := threading.Thread(target=r.start)).start()
    time.sleep(0.5)
    assert r.engine is old
    over.set()
    start.join(20); stop.join(20)
    assert r.engine is not old and old.closed and not r.engine.stopping
    wait_until(lambda: watches() == before, 5)
    submit(acme, 1)
    wait_until(lambda: 1 in begun, 10)
    assert [(w.id, w.state) for w in ours(host)] == [(r.engine.worker, 'running')]

def test_many_who_start_a_runner_at_once_start_it_once(host, new_runner):
    before, r = watches(), new_runner()
    threads = [threading.Thread(target=r.start) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join(20)
    assert watches() == before + 1
    wait_until(lambda: len(ours(host)) == 1, 10)

def test_attached_twice_it_leaves_the_signals_as_they_were(new_runner):
    r, was = new_runner(), signal.getsignal(signal.SIGTERM)
    def own(*args): pass
    async def go():
        signal.signal(signal.SIGTERM, own)
        await r.astart(); await r.astart()
        assert signal.getsignal(signal.SIGTERM) is not own
        await r.astop(); await r.astop()
        assert signal.getsignal(signal.SIGTERM) is own
    try: asyncio.run(go())
    finally: signal.signal(signal.SIGTERM, was)

def test_two_of_one_app_pass_a_signal_on_when_they_have_ended(new_runner):
    a, b, was, heard = new_runner(), new_runner(), signal.getsignal(signal.SIGTERM), []
    async def go():
        def own(*args): heard.append(args)
        signal.signal(signal.SIGTERM, own)
        await a.astart(); await b.astart()
        await a.astop()
        assert signal.getsignal(signal.SIGTERM) is not own  # it is the other's still
        await b.astop()
        signal.raise_signal(signal.SIGTERM)
    try: asyncio.run(go())
    finally: signal.signal(signal.SIGTERM, was)
    assert len(heard) == 1

def test_a_runner_whose_host_does_not_answer_has_not_begun(host, acme, new_runner, monkeypatch):
    r, engine = new_runner(), default_engine()
    with monkeypatch.context() as mp:
        mp.setattr('fh_saas.workers.lookout.Fleet', lambda host: (_ for _ in ()).throw(DatabaseBusy('locked')))
        with pytest.raises(DatabaseBusy): r.start()
        at = time.monotonic()
        r.stop(0)
        assert default_engine() is engine and not engine.stopping and time.monotonic() < at + 4
    r.start()
    submit(acme, 1)
    wait_until(lambda: begun, 10)
    r.stop(0)
    with monkeypatch.context() as mp:  # nor the second time
        mp.setattr('fh_saas.workers.lookout.Fleet', lambda host: (_ for _ in ()).throw(DatabaseBusy('locked')))
        with pytest.raises(DatabaseBusy): r.start()
        r.stop(0)

def test_a_visit_of_the_run_before_does_not_mix_with_the_next(host, acme, new_runner, monkeypatch, caplog):
    at_it, go_on, r, store_of = threading.Event(), threading.Event(), new_runner(), Runner._store_of
    def slow(self, id, e):
        if not at_it.is_set(): at_it.set(); go_on.wait(30)
        return store_of(self, id, e)
    monkeypatch.setattr(Runner, '_store_of', slow)
    wakes_of(host).ring(acme.db.tenant_id)
    r.start()
    assert at_it.wait(10)
    r.stop(0)
    r.start()
    go_on.set()
    submit(acme, 1)
    wait_until(lambda: begun, 40)  # the lease of that visit may have to run out
    time.sleep(0.5)
    assert not [r for r in caplog.records if r.name == 'fh_saas.jobs']

def test_runners_that_have_ended_leave_no_threads(host, acme, new_runner):
    before = {t for t in threading.enumerate()}
    def left(): return [t.name for t in threading.enumerate() if t not in before and t.name.startswith('fh_saas-') and t.name != 'fh_saas-notes']
    r = new_runner()
    for n in range(4):
        with r: submit(acme, n); wait_until(lambda: n in begun, 10)
    wait_until(lambda: not left(), 10)

def test_notes_that_a_host_does_not_take_keep_no_process_from_ending():
    answer = threading.Event()
    notes = Notes(lambda *what: answer.wait(60))
    assert notes.waits('acme', 'q')
    wait_until(notes._pen.locked, 5)  # the thread is at it
    assert notes.waits('globex', 'q') and notes.at
    at = time.monotonic()
    notes.end(0.5)
    assert not notes.at and time.monotonic() < at + 20
    notes.end(0)
    assert time.monotonic() < at + 20
    answer.set()

def test_a_child_of_a_fork_ends_nothing_of_its_parents(host, acme, new_runner):
    "A `with`, a `finally` or a signal's handler that it has inherited: its parent's job would be given back while it runs"
    over, r = threading.Event(), new_runner().start()
    def holds(): begun.append('holds'); over.wait(30)
    with get_or_create_tenant_db(acme.db.tenant_id, host=host) as db: id, _ = BackgroundTaskManager(db).submit('holds', holds)
    wait_until(lambda: begun and ours(host), 10)
    if not (pid := os.fork()):
        try: r.stop(0); r.engine.stop(0)
        finally: os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert (acme.get_job(id).status, [w.state for w in ours(host)], r.engine.stopping) == ('running', ['running'], False)
    over.set()
    assert acme.wait(id, 10).status == 'completed' and [a['outcome'] for a in acme.attempts(id)] == ['completed']

@pytest.fixture
def signals():
    "A worker in the main thread takes the handlers of its process"
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for s, f in before.items(): signal.signal(s, f)

def test_a_child_of_a_task_can_be_ended(acme, signals):
    "The worker's handlers of signals are not for it"
    over = []
    @task('runner_parent')
    def parent():
        p = multiprocessing.get_context('fork').Process(target=time.sleep, args=[60])
        p.start()
        time.sleep(0.3)  # Python forgets what comes while it begins
        p.terminate()
        p.join(10)
        over.append(p.exitcode)
        w.told_to_stop()
    w = Worker(acme.db.host, Settings(concurrency=1, handoff=0, grace=2))
    acme.submit('runner_parent', parent)
    w.run()
    assert over == [-signal.SIGTERM]

def test_a_worker_whose_engine_was_taken_away_ends_with_an_error(acme, signals):
    "Its supervisor starts another one"
    @task('runner_takes')
    def takes(): use_engine(Engine(Settings(concurrency=1)))
    acme.submit('runner_takes', takes)
    with pytest.raises(FhSaasError, match='start it again'): Worker(acme.db.host, Settings(concurrency=1, handoff=0, grace=1)).run()
    default_engine().stop(0)

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)
@pytest.mark.parametrize('of', ['another host', 'no host'])
def test_a_runner_that_runs_no_jobs_leaves_another_hosts_alone(host, acme, new_runner, tmp_path, of):
    other = HostDatabase(f'sqlite:///{tmp_path}/other.db')
    r, aside = new_runner().start(), Runner(other if of == 'another host' else None, Settings(concurrency=0))
    assert aside.start().engine is r.engine
    aside.stop()
    submit(acme, 1)
    wait_until(lambda: begun, 10)
    assert r._runs() and not r.engine.stopping
    other.close()

def test_a_runner_is_started_in_a_loop_in_which_its_last_jobs_end(acme, new_runner):
    r = new_runner(grace=20)
    async def slow():
        begun.append('begin')
        await asyncio.sleep(1)
        begun.append('end')
    async def go():
        await r.astart()
        with get_or_create_tenant_db(acme.db.tenant_id, host=acme.db.host) as db: BackgroundTaskManager(db).submit('slow', slow)
        while not begun: await asyncio.sleep(0.02)
        (stop := threading.Thread(target=r.stop)).start()
        while not r._stopped.is_set(): await asyncio.sleep(0.02)
        await r.astart()
        stop.join(10)
        assert begun == ['begin', 'end'] and not r.engine.stopping
        await r.astop()
    asyncio.run(go())

def test_what_is_said_to_a_run_that_is_over_is_not_for_the_next(new_runner):
    r = new_runner().start()
    before = r._stopped
    r.stop(0)
    r.start()
    r._stop_run(before)
    assert not r.engine.stopping

def test_a_runner_that_is_stopped_while_it_begins_has_ended(host, new_runner, monkeypatch):
    r, at_it, go_on = new_runner(), threading.Event(), threading.Event()
    monkeypatch.setattr('fh_saas.workers.runner.use_engine', lambda e: at_it.set() or go_on.wait(10) and use_engine(e))
    (t := threading.Thread(target=r.start)).start()
    at_it.wait(10)
    r.stop(0)
    go_on.set()
    t.join(20)
    assert r.engine.closed and not ours(host)

@task('runner_rated')
def rated(n): begun.append(n)

@pytest.fixture
def once(host, new_engine):
    "A worker that is to leave when nothing is due, beside two tenants whose rate keeps some jobs waiting for three seconds"
    begun.clear()
    away, ms, ended = new_engine(concurrency=0), {}, []
    for name in ('a', 'b'):
        ms[name] = BackgroundTaskManager(get_or_create_tenant_db(f'{name}-{uuid.uuid4().hex[:6]}', host=host), away)
        rules_of(host).set(tenant=ms[name].db.tenant_id, task='runner_rated', starts=1, period=3.0)
        for n in range(3): ms[name].submit('runner_rated', rated, n=f'{name}{n}')
    w = Worker(host, Settings(concurrency=2, handoff=0, grace=1))
    def run():
        try: w.run(once=True)
        except BaseException as e: ended.append(repr(e))
        else: ended.append('well')
    (t := threading.Thread(target=run, daemon=True)).start()
    wait_until(lambda: w.engine and w.engine.blocked == 2, 30)
    yield ms, ended, w.engine
    w.told_to_stop()
    t.join(20)
    for m in ms.values(): m.db.close()

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)
def test_once_ends_well_beside_a_tenant_that_breaks_meanwhile(once):
    ms, ended, e = once
    [broken] = [d for d in e._blocked if d.store.tenant == ms['a'].db.tenant_id]
    (path := Path(broken.store.url.database)).rename(path.with_suffix('.away'))
    assert e._kept(broken, 60) is False and broken not in e._blocked
    wait_until(lambda: ended, 60)
    assert ended == ['well'] and {'b0', 'b1', 'b2'} <= set(begun)

@pytest.mark.parametrize('new_url', ['postgresql'], indirect=True)
def test_once_ends_though_a_tenant_does_not_answer_any_more(once):
    ms, ended, e = once
    name = ms['a'].store.url.database
    with psycopg.connect(ms['a'].db.host.url.set(drivername='postgresql', database='postgres').render_as_string(hide_password=False), autocommit=True) as conn:
        def allow(whether): conn.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {whether}')
        allow('false')
        try:
            conn.execute('SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s', [name])
            wakes_of(ms['a'].db.host).ring(ms['a'].db.tenant_id)
            wait_until(lambda: ended, 60)
        finally: allow('true')
    assert ended == ['well'] and {'b0', 'b1', 'b2'} <= set(begun)

def test_once_says_nothing_of_what_is_cancelled_meanwhile(once, caplog):
    ms, ended, _ = once
    for m in ms.values(): m.cancel_all(status='pending')
    wait_until(lambda: ended, 30)
    assert ended == ['well'] and 'a limit or a rate keeps' not in caplog.text
