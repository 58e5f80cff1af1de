"Tasks with options, names and aliases, and every way to submit them, over both databases."
import asyncio, threading, time, uuid
from datetime import datetime, timedelta
from types import SimpleNamespace
import pytest
from conftest import wait_until
from fastsql import Database
from fh_saas.db_host import seconds, timestamp
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs import registered, tasks
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.options import InvalidJob, Unique
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import BadPayload, Registry, TaskNameTaken, UnknownTask, task
from fh_saas.utils_bgtsk import BackgroundTaskManager, JobNotFound
from fh_saas.workers.fleet import Fleet


@pytest.fixture
def registry(monkeypatch):
    "What `@task` writes to, for one test"
    monkeypatch.setattr(tasks, 'registry', r := Registry())
    return r

@pytest.fixture
def new_manager(registry, new_engine, url):
    "Call it for a manager, as a process has it that knows what is in `registry`"
    dbs = []
    def make(reg=None, **settings):
        dbs.append(db := Database(url))
        return BackgroundTaskManager(db, new_engine(reg or registry, **settings))
    yield make
    for db in dbs: db.conn.close(); db.engine.dispose()

@pytest.fixture
def m(new_manager): return new_manager()

far = dict(run_at='2100-01-01T00:00:00Z')

def columns(job): return job.job_type, job.task, job.queue, job.priority, job.max_retries

def test_a_task_says_what_holds_for_its_jobs(m):
    @task('scan', queue='scans', priority=4, max_retries=7)
    def scan(n): return n
    ids = [m.submit('scan', scan, n=1, **far)[0], m.submit(scan, n=1, **far)[0], m.submit('scan', n=1, **far)[0], m.submit('scan', 'scan', n=1, **far)[0],
        scan.submit(m, n=1, **far)[0], *m.submit_many('scan', scan, [dict(n=1)]), *m.submit_many(scan, None, [dict(n=1), dict(n=2)])]
    async def main(): return [(await m.asubmit(scan, n=1, **far))[0], (await scan.asubmit(m, n=1, **far))[0]]
    ids += asyncio.run(main())
    assert {columns(m.get_job(i)) for i in ids} == {('scan', 'scan', 'scans', 4, 7)}

def test_a_submit_says_otherwise(m):
    @task('scan', queue='scans', priority=4, max_retries=7)
    def scan(n): return n
    id, _ = m.submit('nightly', scan, 3, n=1, queue='q', priority=1, **far)
    assert columns(m.get_job(id)) == ('nightly', 'scan', 'q', 1, 3)
    [id] = m.submit_many('nightly', 'scan', [dict(n=1)], max_retries=3)
    assert columns(m.get_job(id)) == ('nightly', 'scan', 'scans', 4, 3)

@pytest.mark.parametrize('plain', [True, False])
def test_a_task_that_says_nothing_is_as_before(m, plain):
    def scan(n): return n
    if not plain: task('scan')(scan)
    id, _ = m.submit('t', scan, n=1, **far)
    assert columns(m.get_job(id))[2:] == ('default', 2, 3)

@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_a_job_submitted_by_name_runs_and_the_function_stays_plain(m, kind):
    def f(n): return n + 1
    async def g(n): return n + 1
    t = task('inc')(f if kind == 'sync' else g)
    assert (t(1) if kind == 'sync' else asyncio.run(t(1))) == 2
    id, bg = m.submit('inc', n=4)
    asyncio.run(bg())
    assert m.get_job(id).result == '5'

def test_a_moment_from_now_is_by_the_clock_of_the_database(m):
    @task('later')
    def later(n): return n
    m.store.kind.ahead = 7*86400.0
    try:
        def at(id): return seconds(m.get_job(id).run_at) - time.time() - 7*86400
        ids = [m.submit('later', n=1, run_at=timedelta(hours=1))[0], *m.submit_many('later', [dict(n=1), dict(n=2)], run_at=timedelta(hours=1)), asyncio.run(m.asubmit('later', n=1, run_at=timedelta(hours=1)))[0],
            m.submit('later', n=1, run_at=timedelta(hours=1), unique=True)[0]]
        assert all(3595 < at(id) < 3605 for id in ids) and {m.state(id) for id in ids} == {'scheduled'}
        assert m.submit('later', n=1, run_at=timedelta(hours=2), unique=Unique(by=True, then='replace'))[0] == ids[-1] and 7195 < at(ids[-1]) < 7205
        with m.transaction() as conn: ids.append(m.submit('later', n=1, run_at=timedelta(hours=1), conn=conn)[0])
        assert 3595 < at(ids[-1]) < 3605
    finally: m.store.kind.ahead = 0.0
    id, bg = m.submit('later', n=1, run_at=timedelta(hours=-1))
    assert m.get_job(id).run_at < timestamp() and not bg.later
    id, bg = m.submit('later', n=1, run_at=timedelta(hours=1))
    assert bg.later
    for odd in (timedelta.max, timedelta.min, datetime.max - datetime.now() - timedelta(hours=1)):
        with pytest.raises(InvalidJob, match='between the years'): m.submit('later', n=1, run_at=odd)
    with pytest.raises(InvalidJob, match='or a timedelta from now'): m.submit('later', n=1, run_at=60)
    with pytest.raises(InvalidJob, match='ISO 8601 text$'): m.cancel_all(since=timedelta(hours=1))

def test_an_unknown_name_is_said_and_nothing_written(m):
    @task('product_import')
    def f(): return 1
    for args in (('produkt_import',), ('t', 'produkt_import')):
        with pytest.raises(UnknownTask, match="'produkt_import'.* did you mean 'product_import'"): m.submit(*args)
    for odd in ('', "x\x00'; --", 'a'*100_000, None, 7):
        with pytest.raises((UnknownTask, InvalidJob)): m.submit(odd)
    assert m.list_jobs() == []

def test_a_name_that_nobody_has_waits_unharmed_and_is_shown(new_manager, registry):
    @task('old')
    def f(n): return n
    before = new_manager(handoff=60)
    id, _ = before.submit('t', 'old', n=3)
    before.engine.stop()
    without = new_manager(Registry(), handoff=0)
    without.engine.attend(without.store)
    assert without.state(without.get_job(id)) == 'waiting' and without.get_job(id).attempt == 0

def test_an_old_name_runs_under_the_new_function(new_manager):
    later = Registry()
    def renamed(n): return n*10
    later.add(renamed, 'new', aliases=('old',))
    m = new_manager(later, handoff=0)
    m.store.add(dict(id='a', job_type='t', task='old', payload='{"n": 3}', max_retries=3))
    m.engine.attend(m.store)
    assert m.wait('a', 10).result == '30'
    assert m.wait(m.rerun('a', n=4), 10).result == '40'

def test_an_alias_that_another_task_has_is_refused(registry):
    def a(): return 1
    def b(): return 2
    task('a')(a)
    with pytest.raises(TaskNameTaken): task('b', aliases=['a'])(b)
    assert registry.names[0] == ('a',)

def test_a_notebook_cell_that_is_run_again_keeps_the_newest_options(registry):
    def f(): return 1
    task('f', queue='q')(f)
    task('f', queue='r', max_retries=9)(f)
    assert registry.find('f', None).defaults == dict(queue='r', max_retries=9)

@pytest.mark.parametrize('kw', [dict(queue=''), dict(queue=7), dict(priority=0), dict(priority='HIGH'), dict(max_retries=-1), dict(max_retries=True), dict(aliases=['']), dict(aliases=[7]), dict(aliases=5), dict(backoff=7), dict(backoff='x')])
def test_bad_options_are_refused_where_they_are_written(registry, kw):
    with pytest.raises(InvalidJob): task('f', **kw)
    assert registry.names == ((), ())

def test_a_function_that_has_a_submit_of_its_own_keeps_it(registry):
    class Callable_:
        __qualname__ = 'c'
        def submit(self): return 'mine'
        def __call__(self): return 1
    c = task('c')(Callable_())
    assert c.submit() == 'mine'

def test_what_no_job_can_call_is_refused_where_it_is_defined(m):
    def gen(): yield 1
    async def agen(): yield 1
    def pos(a, /): pass
    for f, said in ((gen, 'generator'), (agen, 'generator'), (pos, 'position only')):
        with pytest.raises(InvalidJob, match=said): task('x')(f)
        with pytest.raises(InvalidJob, match=said): m.submit('t', f)
    with pytest.raises(InvalidJob, match='a name'): task('x')(print)

def test_plausible_mistakes_are_told_what_was_meant(m):
    @task('plain')
    def plain(n=1): return n
    async def co(): pass
    def sync(account, seconds=1): pass
    with pytest.raises(TypeError, match="did you mean the option 'priority'"): m.submit(plain, priorty=4)
    with pytest.raises(BadPayload, match="did you mean 'account'[?]$"): m.submit(sync, acount='a')
    with pytest.raises(BadPayload, match="did you mean 'seconds'[?]$"): m.submit(sync, account='a', second=2)
    with pytest.raises(BadPayload, match="unexpected keyword argument 'zzz'[^?]*$"): m.submit(sync, account='a', zzz=2)
    with pytest.raises(BadPayload, match="missing a required argument: 'account'.*; 'acount' is none of these; did you mean 'account'[?]$"): m.submit(sync, acount='a')
    with pytest.raises(InvalidJob, match="^'a.csv' is no task: the arguments of a job go by keyword"): m.submit(plain, 'a.csv')
    def told(name, job): pass
    with pytest.raises(BadPayload, match="argument 'jobs'[^?]*$"): m.submit(told, name='x', jobs=5)  # the context is not what was meant
    with pytest.raises(InvalidJob, match='the function itself'): m.submit(co())
    with pytest.raises(TypeError, match='BackgroundTaskManager'): plain.submit(n=1)
    with pytest.raises(TypeError, match='BackgroundTaskManager'): plain.submit(m.db)
    with pytest.raises(InvalidJob, match='priorty is no option'): m.submit_many(plain, [dict(n=1)], priorty=4)
    with pytest.raises(InvalidJob, match='raised KeyError'): m.submit(plain, concurrency_key=lambda n: {}[n])
    assert m.list_jobs() == []

def test_many_with_options(m):
    @task('plain', concurrency_key=lambda n, k: f'{n}{k}')
    def plain(n, k='a'): return n
    ids = m.submit_many(plain, [dict(n=1), dict(n=2, k='b')], queue='q', priority=4, tags=['x'], triggered_by='api', **far)
    jobs = [m.get_job(i) for i in ids]
    assert {(j.queue, j.priority, j.tags, j.triggered_by) for j in jobs} == {('q', 4, ',x,', 'api')} and [j.concurrency_key for j in jobs] == ['1a', '2b']

# --- What other processes know

@pytest.fixture
def elsewhere(host, monkeypatch):
    "A manager in a process that runs nothing and knows no task, beside the engines of others; `seen` is its states"
    monkeypatch.setattr(registered, 'believed', -1.0)
    web, others, fleet = Engine(Settings(concurrency=0), Registry()), [], Fleet(host)
    m = BackgroundTaskManager(get_or_create_tenant_db(f'knows-{uuid.uuid4().hex[:6]}', host=host), web)
    for name in ('import', 'export', None): m.store.add(dict(id=f'{name}', job_type='old_type', task=name, payload='{}'))
    def other(*names):
        others.append(e := Engine(Settings(concurrency=1), r := Registry()))
        for n in names: r.add(print, n)
        return e
    yield SimpleNamespace(m=m, fleet=fleet, other=other, host=host, seen=lambda: {id: m.state(m.get_job(id)) for id in ('import', 'export', 'None')})
    for e in (web, *others): fleet.leave(e.worker); e.stop(0)

def test_a_job_waits_for_its_task_if_no_living_process_knows_it(elsewhere):
    e = elsewhere
    assert {*e.seen().values()} == {'pending'}  # nobody runs jobs: they wait, and not for a task
    e.fleet.beat(one := e.other('import'))
    assert e.seen() == {'import': 'pending', 'export': 'waiting', 'None': 'waiting'}
    e.fleet.beat(two := e.other('export', 'old_type'))
    assert {*e.seen().values()} == {'pending'}
    e.fleet.beat(two, state='stopping')
    assert e.seen()['export'] == 'waiting'
    e.fleet.beat(two, state='quiet')
    assert e.seen()['export'] == 'pending'
    e.fleet.db.write(lambda cur, now: cur.execute(f"UPDATE fh_saas_workers SET beat_at = '{timestamp(now - 16)}' WHERE id = '{two.worker}'") and None)
    assert e.seen()['export'] == 'waiting'  # it was killed
    one.registry.add(print, 'export')
    e.fleet.beat(one)
    assert e.seen()['export'] == 'pending'

def test_who_runs_jobs_counts_what_it_knows_itself(elsewhere):
    e = elsewhere
    own = e.other('export')
    m = BackgroundTaskManager(e.m.db, own)
    own.pause(m.store)
    assert m.state(m.get_job('export')) == 'pending' and e.fleet.db not in registered._heard  # nobody was asked
    assert m.state(m.get_job('import')) == 'waiting'
    e.fleet.beat(e.other('import'))
    assert [m.state(m.get_job(id)) for id in ('import', 'export')] == ['pending', 'pending']

def test_a_release_that_does_not_say_what_it_knows_may_know_everything(elsewhere):
    e = elsewhere
    e.fleet.beat(one := e.other('import'))
    e.fleet.db.write(lambda cur, now: cur.execute("UPDATE fh_saas_workers SET tasks = NULL") and None)
    assert {*e.seen().values()} == {'pending'}
    m = BackgroundTaskManager(e.m.db, e.other('other'))
    m.engine.pause(m.store)
    assert m.state(m.get_job('export')) == 'pending'  # who runs jobs does not know what the other one knows, either
    for text in ('5', 'null', 'garbage', '', '{}', '[1]', '[["import"]]'):
        e.fleet.db.write(lambda cur, now: cur.execute(f"UPDATE fh_saas_workers SET tasks = '{text}'") and None)
        assert {*e.seen().values()} == {'pending'} and [w.tasks for w in e.fleet.workers()] == [None], text
    e.fleet.db.write(lambda cur, now: cur.execute("ALTER TABLE fh_saas_workers DROP COLUMN tasks") and None)
    assert {*e.seen().values()} == {'pending'}  # the table of an older release
    assert [w.id for w in Fleet(e.host).workers()] == [one.worker]

def test_a_host_that_does_not_answer_keeps_no_event_loop_waiting(elsewhere, monkeypatch):
    e, asked, go_on = elsewhere, threading.Event(), threading.Event()
    e.fleet.beat(e.other('import'))
    before, ask = registered.known_elsewhere(e.fleet.db), registered._ask
    monkeypatch.setattr(registered, '_ask', lambda *args: (asked.set(), go_on.wait(10), ask(*args))[-1])
    async def page(): return e.m.state(e.m.get_job('export'))
    begun = time.monotonic()
    assert asyncio.run(page()) == 'waiting' and before == {'import'}  # as was heard before
    assert asked.wait(5) and e.m.state(e.m.get_job('export')) == 'waiting' and time.monotonic() - begun < 5  # nor any other, while one asks
    e.fleet.beat(e.other('export'))
    go_on.set()
    wait_until(lambda: e.seen()['export'] == 'pending', 5)

def test_a_function_that_only_this_process_has_is_not_waited_for(new_manager):
    m, held = new_manager(handoff=60), 3
    def nested(): return held
    ids = [m.submit('t', f, run_at='2100-01-01')[0] for f in (nested, lambda: 1)]
    assert [m.state(m.get_job(id)) for id in ids] == ['scheduled', 'scheduled']
    assert {m.get_job(id).task for id in ids} <= m.engine.able

def test_arguments_of_another_kind_are_refused_with_what_they_are(m):
    @task('kinds')
    def kinds(n=1): return n
    id, _ = m.submit(kinds)
    for call, said in ((lambda: m.submit_many(kinds, 5), 'payloads is int'), (lambda: m.submit_many(kinds, 'abc'), 'payloads is str'), (lambda: m.rerun(id, [1]), 'changes are list'),
        (lambda: BackgroundTaskManager(m.db, 5), 'engine is int'), (lambda: Unique(by=5), 'by=5'), (lambda: Unique(by=(1,)), 'names of arguments')):
        with pytest.raises((TypeError, ValueError), match=said): call()
    for call in (m.state, m.why_waiting):
        with pytest.raises(JobNotFound): call(5)

def test_jobs_may_be_filed_under_any_number_of_names(m):
    "Each was made a part of every claim: after five thousand a process ran twelve jobs a second, and after 33,000 none"
    @task('filed')
    def filed(): return 1
    r = m.engine.registry
    for n in range(2*tasks.most_types): r.enter(r.meet(filed), f'import-{n}')
    assert len(r.names[1]) <= tasks.most_types + len(r.names[0])
    before = r.names
    id, bg = m.submit('import-of-one-more', filed)
    assert r.names is before and m.get_job(id).task == 'filed'
    bg.func(*bg.args)
    assert m.get_job(id).status == 'completed'
