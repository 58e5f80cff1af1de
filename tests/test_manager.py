"The door, sentence by sentence, over both databases: what `submit` promises, and that the engine keeps it by itself."
import asyncio, functools, importlib.util, json, os, signal, subprocess, sys, textwrap, threading, time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from decimal import Decimal
import pytest
from fasthtml.common import Div, P, to_xml
import sqlalchemy as sa
from fastsql import Database
from fastsql.core import NotFoundError
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import JSONResponse
from tenacity import wait_fixed
from fh_saas.db_connect import DatabaseBusy, FhSaasError, open_engine, reading, writing
from fh_saas.db_host import SystemJob, gen_id, seconds, timestamp
from fh_saas.jobs.context import JobContext
from fh_saas.jobs.process import default_engine
from fh_saas.jobs.payload import NotJson, TooLarge
from fh_saas.jobs.retries import Permanent, RetryAfter, Snooze
from fh_saas.jobs.states import shown_state
from fh_saas.jobs.store import JobNotFound
from fh_saas.jobs.tasks import BadPayload, NoTaskName, Registry, TaskNameTaken, task
from fh_saas.utils_bgtsk import BackgroundTaskManager, InvalidJob, TenantJob, Unique
from conftest import wait_until

@pytest.fixture(scope='module')
def one_pg(pg_server):
    "A new database is dear on a server: one for all tests, emptied in between"
    eng, name = open_engine(pg_server, isolation_level='AUTOCOMMIT'), f'fh_saas_test_{gen_id()[-12:]}'
    def run(sql):
        with eng.connect() as conn: conn.exec_driver_sql(sql)
    run(f'CREATE DATABASE {name}')
    yield sa.make_url(pg_server).set(database=name).render_as_string(hide_password=False)
    run(f'DROP DATABASE {name} WITH (FORCE)')
    eng.dispose()

@pytest.fixture(params=['sqlite', 'postgresql'])
def url(request):
    if request.param == 'sqlite': return request.getfixturevalue('new_sqlite')()
    u = request.getfixturevalue('one_pg')
    eng = open_engine(u)
    with writing(eng) as conn:
        for t in sa.inspect(conn).get_table_names(): conn.exec_driver_sql('DELETE FROM tenant_jobs' if t == 'tenant_jobs' else f'DROP TABLE {t}' if t == 'own' else 'SELECT 1')
    eng.dispose()
    return u

def quick(manager, f, wait=0.2):
    "Let failed attempts of `f` be repeated soon"
    manager.engine.registry.add(f, f.__qualname__, backoff=wait_fixed(wait))
    return f

def call(bg): return bg.func(*bg.args, **bg.kwargs)

def run(manager, f, **kw):
    "The job after one attempt at `f`"
    id, bg = manager.submit('t', f, **kw)
    call(bg)
    return manager.get_job(id)

def ended(manager, id, n=20): return wait_until(lambda: (j := manager.get_job(id)).completed_at and j, n, f'{id} did not end')
def outcomes(manager, id): return [a['outcome'] for a in manager.attempts(id)]
def later(s): return timestamp(time.time() + s)

class Calls(list):
    "A task that fails as often as it is told, and notes its calls"
    def task(self, fail=0, error=OSError):
        def f(**kw):
            self.append(kw)
            if len(self) <= fail: raise error(f'call {len(self)}')
            return len(self)
        return f

# --- Submit

def test_submit_gives_the_id_and_a_background_task(manager):
    id, bg = manager.submit('greet', lambda who: f'hello {who}', who='Ann')
    job = manager.get_job(id)
    assert isinstance(bg, BackgroundTask) and isinstance(job, TenantJob) and isinstance(id, str)
    assert (job.id, job.job_type, job.status, json.loads(job.payload), job.max_retries, job.retry_count) == (id, 'greet', 'pending', {'who': 'Ann'}, 3, 0)
    assert (job.result, job.error_log, job.started_at, job.completed_at) == (None,)*4 and abs(seconds(job.created_at) - time.time()) < 2
    assert job.created_at.isascii() and len(job.created_at) == 26

def test_the_eleven_fields_keep_their_order():
    names = list(TenantJob.__dataclass_fields__)
    assert names[:11] == ['id', 'job_type', 'status', 'payload', 'result', 'error_log', 'retry_count', 'max_retries', 'created_at', 'started_at', 'completed_at']
    assert TenantJob('a', 't', 'pending', '{}').max_retries == 3

def test_a_submitted_job_is_committed(manager, url):
    id, _ = manager.submit('t', lambda: 1)
    eng = open_engine(url)
    with reading(eng) as conn: assert conn.execute(sa.text('SELECT status FROM tenant_jobs WHERE id = :i'), dict(i=id)).scalar() == 'pending'
    eng.dispose()

def test_ids_grow(lite):
    ids = [lite.submit('t', print)[0] for _ in range(20)]
    assert ids == sorted(ids) and len({*ids}) == 20

def test_an_awaited_task_runs_its_job(manager):
    calls = Calls()
    id, bg = manager.submit('t', calls.task(), x=1)
    asyncio.run(bg())
    job = manager.get_job(id)
    assert calls == [{'x': 1}] and (job.status, job.result, job.retry_count) == ('completed', '1', 0)
    assert job.created_at <= job.started_at <= job.completed_at and outcomes(manager, id) == ['completed']

def test_the_job_runs_after_the_response_of_a_route(lite):
    order, calls = [], Calls()
    id, bg = lite.submit('t', calls.task())
    async def send(m): order.append((m['type'], m.get('more_body'), len(calls)))
    asyncio.run(JSONResponse({}, background=BackgroundTasks([bg]))(dict(type='http', method='GET', headers=[]), None, send))
    assert [o[2] for o in order] == [0, 0] and lite.get_job(id).status == 'completed'

def test_a_fasthtml_route_returns_it_beside_its_page(lite):
    from fasthtml.common import Client, P, fast_app
    app, rt = fast_app()
    calls = Calls()
    @rt('/go')
    def get(): return P('on its way'), lite.submit('t', calls.task(), x=2)[1]
    r = Client(app).get('/go')
    assert 'on its way' in r.text and r.status_code == 200 and calls == [{'x': 2}]
    assert [j.status for j in lite.list_jobs()] == ['completed']

def test_a_task_that_raises_does_not_skip_the_next_task_of_the_response(lite):
    calls = Calls()
    (a, bad), (b, good) = lite.submit('t', calls.task(fail=1)), lite.submit('t', calls.task())
    asyncio.run(BackgroundTasks([bad, good])())
    assert lite.get_job(a).status == 'pending' and lite.get_job(b).status == 'completed'

# --- Results

def test_a_falsy_or_odd_result_is_a_result(manager):
    def f(): return result
    for result in (0, False, [], '', 0.0, {}, 'é日本🚀', [1, [None, {'a': True}]], 'a\x00b', '\ud800', -1.5e300, 2**70):
        job = run(manager, f)
        assert job.status == 'completed' and job.result is not None and json.loads(job.result) == result and type(json.loads(job.result)) is type(result)

def test_none_is_no_result(manager):
    job = run(manager, lambda: None)
    assert job.status == 'completed' and job.result is None

class Trap(dict):
    def items(self): raise KeyError('trap')

knot = []
knot.append(knot)
not_json = dict(datetime=datetime(2026, 1, 1), bytes=b'x', set={1}, nan=float('nan'), inf=[float('inf')], int_key={1: 2}, none_key={'a': {None: 2}}, knot=knot,
    object=object(), decimal=Decimal(1), a_function=print, nested=[{'a': [{1, 2}]}], huge_int=10**5000, trap=Trap(a=1), generator=iter([1]))

@pytest.mark.parametrize('name', not_json)
def test_a_payload_that_is_not_json_is_refused_before_a_row_exists(lite, name):
    with pytest.raises(FhSaasError, match='payload') as e: lite.submit('t', lambda value: 1, value=not_json[name])
    assert isinstance(e.value, NotJson) and len(str(e.value)) < 400 and lite.list_jobs() == []

in_json = dict(datetime='2026-01-01T00:00:00', bytes='eA==', set=[1], decimal='1', nested=[{'a': [[1, 2]]}])

@pytest.mark.parametrize('name', in_json)
def test_a_result_that_has_a_form_in_json_is_stored_in_it(lite, name):
    job = run(lite, lambda: not_json[name])
    assert job.status == 'completed' and json.loads(job.result) == in_json[name]

@pytest.mark.parametrize('name', [n for n in not_json if n not in (*in_json, 'trap')])
@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_a_result_that_is_not_json_fails_and_is_not_retried(lite, name, kind):
    calls = []
    def f(): calls.append(1); return not_json[name]
    async def g(): return f()
    id, bg = lite.submit('t', quick(lite, f if kind == 'sync' else g, 0))
    asyncio.run(bg())
    job = lite.get_job(id)
    assert (job.status, job.result, len(calls)) == ('failed', None, 1) and 'result' in job.error_message and outcomes(lite, id) == ['failed']
    asyncio.run(bg())
    assert len(calls) == 1

def test_a_deep_payload_is_refused(lite):
    deep = []
    for _ in range(100_000): deep = [deep]
    with pytest.raises(NotJson, match='deep'): lite.submit('t', lambda value: 1, value=deep)
    while deep: deep = deep.pop()
    assert lite.list_jobs() == []

def test_a_10_mb_payload_is_refused_with_the_limit(manager):
    with pytest.raises(TooLarge, match=r'10,\d{3},\d{3} bytes.*limit is 1,048,576'): manager.submit('t', lambda text: 1, text='x'*10_000_000)
    assert manager.list_jobs() == []

def test_a_payload_and_a_result_up_to_the_limit_fit(manager):
    text = 'x'*(2**20 - 100)
    job = run(manager, lambda text: text, text=text)
    assert job.status == 'completed' and json.loads(job.result) == text

def test_a_10_mb_result_fails_with_the_limit_and_is_not_retried(manager):
    job = run(manager, lambda: 'x'*10_000_000)
    assert (job.status, job.result, job.retry_count) == ('failed', None, 1) and '1,048,576' in job.error_message and '10,000,002' in job.error_message

# --- Arguments

def test_arguments_may_be_called_like_those_of_submit(manager):
    def f(job_id, job_type, task_func, max_retries, self): return [job_id, job_type, task_func, max_retries, self]
    args = dict(job_id=1, job_type=2, task_func=3, max_retries=4, self=5)
    id, bg = manager.submit('t', f, payload=args)
    asyncio.run(bg())
    job = manager.get_job(id)
    assert json.loads(job.result) == [1, 2, 3, 4, 5] and json.loads(job.payload) == args and job.max_retries == 3 and job.job_type == 't'

def test_job_id_is_an_argument_like_any_other(manager):
    job = run(manager, lambda job_id: job_id, job_id='mine')
    assert job.result == '"mine"' and job.id != 'mine'

@pytest.mark.parametrize('name', ['payload', 'priority', 'queue', 'run_at', 'triggered_by', 'job', 'args', 'kwargs', 'func', 'status', 'id', 'db', 'store'])
def test_a_parameter_may_have_any_name(lite, name):
    f = eval(f'lambda {name}: {name}')
    id, bg = lite.submit('t', f, **{name: {'a': 1}})
    call(bg)
    job = lite.get_job(id)
    assert json.loads(job.result or 'null') == {'a': 1} and json.loads(job.payload) == {name: {'a': 1}} and (job.priority, job.queue) == (2, 'default')

def test_keywords_of_a_task_that_takes_any(manager):
    assert json.loads(run(manager, lambda **kw: kw, job_id=1, x='2').result) == {'job_id': 1, 'x': '2'}

def test_payload_is_a_mapping_and_stands_alone(lite):
    def f(x, y=0): return x
    with pytest.raises(BadPayload, match='list'): lite.submit('t', f, payload=[1])
    with pytest.raises(BadPayload, match='not both'): lite.submit('t', f, payload={'x': 1}, y=2)
    assert lite.list_jobs() == []

def test_the_payload_is_what_it_was_at_submit(lite):
    given = {'x': [1]}
    id, bg = lite.submit('t', lambda x: x, payload=given)
    given['x'].append(2)
    call(bg)
    assert lite.get_job(id).result == '[1]' and given == {'x': [1, 2]}

@pytest.mark.parametrize('kw,word', [({}, 'a'), (dict(a=1, b=2, c=3), 'c'), (dict(b=1), 'a'), (dict(A=1), 'a')])
def test_a_payload_that_does_not_fit_is_refused(lite, kw, word):
    def f(a, b=0): return a
    with pytest.raises(BadPayload, match=f"'{word}'") as e: lite.submit('t', f, **kw)
    assert 'f' in str(e.value) and '(a, b=0)' in str(e.value) and lite.list_jobs() == []

def test_a_positional_only_argument_cannot_be_given(lite):
    def f(a, /): return a
    with pytest.raises(InvalidJob, match='by position only'): lite.submit('t', f, a=1)
    def g(a=3, /, *rest, b, **more): return [a, rest, b, more]
    assert json.loads(run(lite, g, b=1, c=7).result) == [3, [], 1, {'c': 7}]

def test_a_payload_that_no_longer_fits_fails_at_once(lite):
    def f(a): return a
    lite.engine.registry.add(f, 'f')
    lite.store.add(dict(id='x', job_type='t', task='f', payload='{"b": 1}', max_retries=3))
    lite.store.add(dict(id='y', job_type='t', task='f', payload='not json', max_retries=3))
    lite.engine.attend(lite.store)
    assert [(ended(lite, i).status, ended(lite, i).retry_count) for i in 'xy'] == [('failed', 1)]*2
    assert "'a'" in lite.get_job('x').error_message and 'JSON' in lite.get_job('y').error_message

@pytest.mark.parametrize('bad', [7, [print], b'name'])
def test_what_cannot_be_called_is_refused(lite, bad):
    with pytest.raises(TypeError, match='callable'): lite.submit('t', bad)
    assert lite.list_jobs() == []

def test_a_callable_without_a_name_is_refused_with_the_way_out(lite):
    class F:
        def __call__(self): return 1
    with pytest.raises(NoTaskName, match='task'): lite.submit('t', F())
    lite.engine.registry.add(f := F(), 'named')
    assert lite.list_jobs() == [] and lite.engine.registry.find('named', 't').func is f

def noted_alike(n): return n

def test_what_jobs_of_a_task_have_in_common_is_each_ones_own(lite):
    def rows(*ids): return [(j.job_type, j.max_retries, j.queue, j.priority, j.concurrency_key) for j in map(lite.get_job, ids)]
    register = functools.partial(lite.engine.registry.add, noted_alike, 'noted_alike')
    register(queue='a', max_retries=7, unique=Unique(by=True), concurrency_key=lambda n: f'key {n}')
    def one(*args, **kw): return lite.submit(*args, **kw)[0]
    first = one('t', noted_alike, n=1), one('t', noted_alike, 3, n=2, queue='b', priority=4), one('t', noted_alike, n=3), one('u', noted_alike, n=4), one('t', noted_alike, 1, n=5)
    assert rows(*first) == [('t', 7, 'a', 2, 'key 1'), ('t', 3, 'b', 4, 'key 2'), ('t', 7, 'a', 2, 'key 3'), ('u', 7, 'a', 2, 'key 4'), ('t', 1, 'a', 2, 'key 5')]
    for n in (True, 1.0, [], '1'):  # equal to, or told apart by less than, what went well before
        with pytest.raises(InvalidJob, match='max_retries'): lite.submit('t', noted_alike, n, n=6)
    for t in ([], ' ', 3):
        with pytest.raises(InvalidJob, match='job_type'): lite.submit(t, noted_alike, n=6)
    assert one('t', noted_alike, n=1) == first[0]  # unique, as before
    register(queue='c', max_retries=2, unique=None, concurrency_key=None)
    assert rows(one('t', noted_alike, n=1)) == [('t', 2, 'c', 2, None)]

@pytest.mark.parametrize('kw', [dict(max_retries=-1), dict(max_retries='3'), dict(max_retries=True), dict(max_retries=1.5), dict(max_retries=None), dict(max_retries=2**40), dict(job_type=''), dict(job_type=None),
    dict(job_type=7), dict(job_type='x'*300), dict(job_type='a\x00'), dict(job_type='\ud800'), dict(priority=0), dict(priority=5), dict(priority='high'), dict(queue=''), dict(queue=1), dict(run_at='soon'),
    dict(run_at=datetime(2026, 1, 1)), dict(run_at=5), dict(triggered_by='')])
def test_an_option_that_makes_no_sense_is_refused(lite, kw):
    (name, value), = kw.items()
    with pytest.raises(InvalidJob, match=name): lite.submit(**dict(job_type='t', task_func=print) | kw)
    assert lite.list_jobs() == []

@pytest.mark.parametrize('call,said', [(lambda m: m.submit(noted_alike, 3), 'by keyword'), (lambda m: m.submit_many(noted_alike), 'payloads are missing'), (lambda m: m.list_jobs(status='faild'), "'faild' is none of")])
def test_a_call_that_was_meant_in_another_way_says_so(lite, call, said):
    with pytest.raises(InvalidJob, match=said): call(lite)
    assert lite.list_jobs() == []

def test_a_state_is_told_by_id_too(lite):
    id, _ = lite.submit('t', noted_alike, n=1, run_at='2100-01-01')
    assert lite.state(id) == lite.state(lite.get_job(id)) == 'scheduled'

def test_a_handle_that_is_made_a_part_of_a_page_is_not_shown(lite, caplog):
    id, bg = lite.submit('t', noted_alike, n=1)
    assert to_xml(Div(P('done'), bg)) == to_xml(Div(P('done'), '')) and 'return it beside the page' in caplog.text and id in caplog.text

def test_options_reach_the_row(manager):
    at = datetime.now(timezone(timedelta(hours=5))) + timedelta(hours=1)
    id, _ = manager.submit('t', lambda: 1, 7, priority=4, queue='slow', triggered_by='manual:ann', run_at=at)
    job = manager.get_job(id)
    assert (job.max_retries, job.priority, job.queue, job.triggered_by) == (7, 4, 'slow', 'manual:ann') and seconds(job.run_at) == pytest.approx(at.timestamp(), abs=1e-3)

def test_a_hostile_job_type_is_only_a_name(manager):
    for text in ("x'); DROP TABLE tenant_jobs; --", '%s', ':a', "''", 'é日本', ' a '):
        id, bg = manager.submit(text, os.getpid)
        call(bg)
        assert [j.id for j in manager.list_jobs(job_type=text)] == [id] and manager.get_job(id).job_type == text

# --- Reading

def test_jobs_are_listed_newest_first_and_filtered(manager):
    ids = [manager.submit(t, lambda: 1)[0] for t in 'abab']
    manager.engine.run_job(manager.store, ids[1], lambda: 1)
    assert [j.id for j in manager.list_jobs()] == ids[::-1] and all(isinstance(j, TenantJob) for j in manager.list_jobs())
    assert [j.id for j in manager.list_jobs(job_type='a')] == [ids[2], ids[0]] and [j.id for j in manager.list_jobs('b', 'pending')] == [ids[3]]
    assert [j.id for j in manager.list_jobs(status='completed')] == [ids[1]]
    assert len(manager.list_jobs(limit=2)) == 2 and manager.list_jobs(limit=0) == [] and len(manager.list_jobs(limit=None)) == 4

def test_filters_are_bound(manager):
    manager.submit('a', lambda: 1)
    for text in ("' OR 1=1 --", "x'; DROP TABLE tenant_jobs; --", '%', '\\', 'a\x00b', '\ud800'): assert manager.list_jobs(job_type=text) == manager.list_jobs(queue=text) == [] and len(manager.list_jobs()) == 1

@pytest.mark.parametrize('limit', [-1, '5', 1.5, True])
def test_a_limit_that_is_none_is_refused(lite, limit):
    with pytest.raises(InvalidJob, match='limit'): lite.list_jobs(limit=limit)

def test_an_unknown_id_is_not_found(manager):
    manager.submit('t', lambda: 1)
    for id in ('nope', '', None, 7, "' OR 1=1 --", 'a\x00b', '\ud800', 'x'*10_000):
        with pytest.raises(JobNotFound) as e: manager.get_job(id)
        assert isinstance(e.value, NotFoundError) and isinstance(e.value, FhSaasError) and 'tenant_jobs' in str(e.value)

def test_tenant_jobs_is_the_fastsql_table(manager):
    calls = Calls()
    id, bg = manager.submit('greet', calls.task(), x=1)
    assert manager.tenant_jobs[id].status == 'pending'
    call(bg)
    t = manager.tenant_jobs
    assert t[id].status == 'completed' and t[id].result == '1' and [j.id for j in t()] == [id]
    assert [j.id for j in t(where="job_type = 'greet'", order_by='created_at DESC', limit=5)] == [id] and t(where="status = 'failed'") == []
    with pytest.raises(NotFoundError): t['nope']
    assert t.update(id=id, error_log='by hand').error_log == 'by hand' and manager.get_job(id).error_log == 'by hand'
    assert run(manager, lambda: 2).status == 'completed' and len(t()) == 2

def test_a_manager_needs_a_database():
    for bad in (None, 'sqlite:///x.db', 7):
        with pytest.raises(TypeError, match='Database'): BackgroundTaskManager(bad)

def test_a_database_in_memory_is_refused_with_the_reason():
    with pytest.raises(FhSaasError, match='memory'): BackgroundTaskManager(Database('sqlite:///:memory:'))

# --- Attempts

@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_a_traceback_begins_in_the_task(manager, kind):
    def breaks():
        try: int('x')
        except ValueError as e: raise RuntimeError('worse') from e
    async def abreaks(): breaks()
    id, bg = manager.submit('t', breaks if kind == 'sync' else abreaks, max_retries=1)
    call(bg)
    log = manager.get_job(id).error_log
    assert "ValueError: invalid literal for int() with base 10: 'x'" in log and log.rstrip().endswith('RuntimeError: worse') and log.count('Traceback (most recent call last)') == 2
    assert 'attempt.py' not in log and log.index('in breaks') < log.index('ValueError')
    class Odd(Permanent):
        @property
        def __traceback__(self): raise RuntimeError('is nobody’s business')
    def odd(): raise Odd('no such account')
    id, bg = manager.submit('t', odd)
    call(bg)
    assert manager.get_job(id).status == 'failed' and 'no such account' in manager.get_job(id).error_message
    id, bg = manager.submit('t', breaks, max_retries=1)
    manager.store.write(lambda cur, now: cur.execute("UPDATE tenant_jobs SET payload = '[]'") and None)  # it never comes to the task
    call(bg)
    assert 'Traceback' in manager.get_job(id).error_log and 'not an object' in manager.get_job(id).error_message

def test_three_failing_calls_leave_failed(manager):
    calls = Calls()
    id, bg = manager.submit('t', calls.task(fail=9), max_retries=3)
    for n in (1, 2):
        call(bg)
        job = manager.get_job(id)
        assert (job.status, job.retry_count, job.completed_at, len(calls)) == ('pending', n, None, n)
        assert seconds(job.run_at) - seconds(manager.attempts(id)[-1]['ended_at']) == pytest.approx(2**n, abs=0.01)
        assert f'OSError: call {n}' in job.error_log and 'Traceback' in job.error_log and job.error_message == f'OSError: call {n}'
    call(bg)
    job = manager.get_job(id)
    assert (job.status, job.retry_count, len(calls)) == ('failed', 3, 3) and job.completed_at and outcomes(manager, id) == ['retry', 'retry', 'failed']
    call(bg)
    assert len(calls) == 3 and manager.get_job(id) == job

@pytest.mark.parametrize('n', [0, 1])
def test_one_attempt_at_least_and_at_most(lite, n):
    calls = Calls()
    job = run(lite, calls.task(fail=9), max_retries=n)
    assert (job.status, job.retry_count, len(calls)) == ('failed', 1, 1)

def test_a_call_runs_before_the_retry_time(manager):
    calls = Calls()
    id, bg = manager.submit('t', calls.task(fail=1))
    call(bg)
    assert manager.get_job(id).run_at > later(1)
    call(bg)
    assert manager.get_job(id).status == 'completed' and manager.get_job(id).retry_count == 1 and len(calls) == 2

def test_a_call_runs_before_run_at(lite):
    id, bg = lite.submit('t', lambda: 1, run_at=datetime.now(timezone.utc) + timedelta(hours=1))
    call(bg)
    assert lite.get_job(id).status == 'completed'

def test_the_default_waits_are_2_4_8(lite):
    id, bg = lite.submit('t', Calls().task(fail=9), max_retries=5)
    waits = []
    for _ in range(4):
        call(bg)
        waits.append(seconds(lite.get_job(id).run_at) - seconds(lite.attempts(id)[-1]['ended_at']))
    assert waits == pytest.approx([2, 4, 8, 16], abs=0.01)

def test_the_default_retry_really_happens_after_2_seconds(lite):
    calls = Calls()
    id, bg = lite.submit('t', calls.task(fail=1))
    start = time.monotonic()
    call(bg)
    assert ended(lite, id, 10).status == 'completed' and 1.9 < time.monotonic() - start < 4 and len(calls) == 2

def test_retries_happen_by_themselves_until_success(manager):
    calls = Calls()
    id, bg = manager.submit('t', quick(manager, calls.task(fail=2)), x='é')
    asyncio.run(bg())
    assert manager.get_job(id).status in ('pending', 'running', 'completed')
    job = ended(manager, id)
    assert (job.status, job.retry_count, job.result, calls) == ('completed', 2, '3', [{'x': 'é'}]*3) and outcomes(manager, id) == ['retry', 'retry', 'completed']
    starts = [seconds(a['started_at']) for a in manager.attempts(id)]
    assert starts[1] - starts[0] >= 0.2 <= starts[2] - starts[1]

def test_retries_happen_by_themselves_until_failure(manager):
    calls = Calls()
    id, bg = manager.submit('t', quick(manager, calls.task(fail=9)))
    asyncio.run(bg())
    job = ended(manager, id)
    assert (job.status, job.retry_count, len(calls)) == ('failed', 3, 3) and outcomes(manager, id) == ['retry', 'retry', 'failed']

def test_a_wait_holds_no_thread(new_manager, new_sqlite):
    m = new_manager(new_sqlite(), concurrency=2)
    def fails(): raise OSError
    for bg in [m.submit('t', fails)[1] for _ in range(6)]: call(bg)
    start = time.monotonic()
    id, bg = m.submit('t', lambda: 1)
    asyncio.run(bg())
    assert m.get_job(id).status == 'completed' and time.monotonic() - start < 1.9  # the first of them is due again after two seconds

# --- Async

def test_an_async_function_called_directly(manager):
    async def f(x): await asyncio.sleep(0); return x + 1
    assert run(manager, f, x=1).result == '2'

def test_an_async_function_called_directly_inside_a_running_loop(lite):
    async def f(x): await asyncio.sleep(0); return x + 1
    async def main(): return run(lite, f, x=1)
    assert asyncio.run(main()).result == '2'

def test_an_async_function_awaited_runs_in_the_same_loop(manager):
    loops = []
    async def f(x): loops.append(asyncio.get_running_loop()); await asyncio.sleep(0.01); return x + 1
    async def main():
        id, bg = manager.submit('t', f, x=1)
        await bg()
        return id, asyncio.get_running_loop()
    id, loop = asyncio.run(main())
    assert loops == [loop] and manager.get_job(id).result == '2'

def test_an_async_function_retried_by_the_engine(manager):
    calls = []
    async def f():
        calls.append(1)
        await asyncio.sleep(0.01)
        if len(calls) < 3: raise OSError('no')
        return len(calls)
    id, bg = manager.submit('t', quick(manager, f))
    asyncio.run(bg())
    job = ended(manager, id)
    assert (job.status, job.result, job.retry_count) == ('completed', '3', 2)

def test_all_kinds_of_async_callables_are_awaited(lite):
    async def f(x): return x
    class Obj:
        async def method(self, x): return x
    def gives_a_coroutine(x): return f(x)
    for g in (f, functools.partial(f), Obj().method, lambda x: f(x), gives_a_coroutine):
        for go in (call, lambda bg: asyncio.run(bg())):
            id, bg = lite.submit('t', g, x=5)
            go(bg)
            assert lite.get_job(id).result == '5', g

def test_a_sync_task_does_not_block_the_loop(lite):
    async def main():
        id, bg = lite.submit('t', lambda: time.sleep(0.4))
        t, ticks = asyncio.create_task(bg()), 0
        while not t.done(): await asyncio.sleep(0.01); ticks += 1
        return ticks
    assert asyncio.run(main()) > 10

def test_a_task_that_raises_cancelled_by_itself_has_failed(lite):
    async def f(): raise asyncio.CancelledError
    id, bg = lite.submit('t', f, max_retries=1)
    asyncio.run(bg())
    assert lite.get_job(id).status == 'failed'

def test_a_cancelled_await_gives_the_attempt_back(lite):
    entered = threading.Event()
    async def f(): entered.set(); await asyncio.sleep(30)
    id, bg = lite.submit('t', f)
    async def main():
        t = asyncio.create_task(bg())
        while not entered.is_set(): await asyncio.sleep(0.01)
        t.cancel()
        await asyncio.wait([t], timeout=5)
    asyncio.run(main())
    job = lite.get_job(id)
    assert job.retry_count == 0 and outcomes(lite, id)[0] == 'release' and job.completed_at is None

# --- Overlap

def test_overlapping_calls_run_the_job_once(manager):
    calls, go = [], threading.Barrier(12)
    def f(): calls.append(1); time.sleep(0.1); return 7
    id, bg = manager.submit('t', f)
    def one(_): go.wait(); return call(bg)
    with ThreadPoolExecutor(12) as pool: got = list(pool.map(one, range(12)))
    assert len(calls) == 1 and manager.get_job(id).result == '7' and outcomes(manager, id) == ['completed'] and sum(g is not None for g in got) == 1

@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_overlapping_awaits_run_the_job_once(manager, kind):
    calls = []
    def f(): calls.append(1); time.sleep(0.05); return 7
    async def g(): calls.append(1); await asyncio.sleep(0.05); return 7
    id, bg = manager.submit('t', f if kind == 'sync' else g)
    async def main(): await asyncio.gather(*(bg() for _ in range(12)))
    asyncio.run(main())
    assert len(calls) == 1 and manager.get_job(id).result == '7' and outcomes(manager, id) == ['completed']

def test_an_await_and_the_runner_run_the_job_once(new_manager, url):
    m, calls = new_manager(url, handoff=0), Calls()
    f = calls.task()
    bgs = [m.submit('t', f) for _ in range(20)]
    async def main(): await asyncio.gather(*(bg() for _, bg in bgs))
    asyncio.run(main())
    for id, _ in bgs: ended(m, id)
    assert len(calls) == 20 and all(outcomes(m, id) == ['completed'] for id, _ in bgs)

@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_forty_simultaneous_jobs_all_end(manager, kind):
    def f(n): time.sleep(0.01); return n
    async def g(n): await asyncio.sleep(0.01); return n
    got, go = {}, threading.Barrier(40)
    def one(n):
        go.wait()
        id, bg = manager.submit('t', f if kind == 'sync' else g, n=n)
        asyncio.run(bg())
        got[id] = n
    with ThreadPoolExecutor(40) as pool: list(pool.map(one, range(40)))
    jobs = {j.id: j for j in manager.list_jobs()}
    assert len(jobs) == 40 and all(jobs[i].status == 'completed' and jobs[i].result == str(n) for i, n in got.items())

def test_forty_jobs_of_one_loop_all_end(manager):
    def f(n): return n
    async def main(): await asyncio.gather(*(manager.submit('t', f, n=n)[1]() for n in range(40)))
    asyncio.run(main())
    assert sorted(int(j.result) for j in manager.list_jobs()) == list(range(40))

# --- The app's own transaction

def own_rows(url):
    eng = open_engine(url)
    with reading(eng) as conn: rows = [r[0] for r in conn.exec_driver_sql('SELECT name FROM own ORDER BY name')]
    eng.dispose()
    return rows

def with_own_row(m, url):
    m.db.conn.execute(sa.text('CREATE TABLE own (name VARCHAR)'))
    m.db.conn.commit()
    m.db.conn.execute(sa.text("INSERT INTO own VALUES ('mine')"))
    assert m.db.conn.in_transaction() and own_rows(url) == []

def test_an_open_transaction_is_left_alone_on_postgresql(new_pg, new_manager):
    m = new_manager(url := new_pg())
    with_own_row(m, url)
    id, bg = m.submit('t', quick(m, Calls().task(fail=1)))
    call(bg)
    assert ended(m, id).status == 'completed' and len(m.list_jobs()) == 1
    assert m.db.conn.in_transaction() and own_rows(url) == []
    m.db.conn.rollback()
    assert own_rows(url) == [] and m.get_job(id).status == 'completed'
    m.db.conn.execute(sa.text("INSERT INTO own VALUES ('again')"))
    m.submit('t', lambda: 1)
    m.db.conn.commit()
    assert own_rows(url) == ['again']

def test_a_write_transaction_on_sqlite_ends_submit_in_bounded_time(new_sqlite, new_manager):
    m = new_manager(url := new_sqlite(), busy=0.5)
    with_own_row(m, url)
    start = time.monotonic()
    f = lambda: 1
    with pytest.raises(DatabaseBusy, match='db.conn'): m.submit('t', f)
    assert time.monotonic() - start < 3 and m.db.conn.in_transaction() and own_rows(url) == [] and m.list_jobs() == []
    m.db.conn.commit()
    assert own_rows(url) == ['mine'] and run(m, f).status == 'completed' and len(m.list_jobs()) == 1

def test_a_write_transaction_on_sqlite_can_still_be_rolled_back(new_sqlite, new_manager):
    m = new_manager(url := new_sqlite(), busy=0.2)
    with_own_row(m, url)
    f = lambda: 1
    with pytest.raises(DatabaseBusy): m.submit('t', f)
    m.db.conn.rollback()
    assert own_rows(url) == [] and m.submit('t', f)

def test_the_lock_of_another_is_not_blamed_on_db_conn(new_sqlite, new_manager):
    m = new_manager(url := new_sqlite(), busy=0.2)
    eng = open_engine(url)
    with writing(eng), pytest.raises(DatabaseBusy) as e: m.submit('t', lambda: 1)
    assert 'db.conn' not in str(e.value)
    eng.dispose()

def test_a_lock_during_the_finish_loses_no_result(new_sqlite, new_manager):
    m = new_manager(url := new_sqlite(), busy=0.2)
    eng, calls = open_engine(url), []
    def f():
        calls.append(1)
        locked.__enter__()
        threading.Timer(0.8, lambda: locked.__exit__(None, None, None)).start()
        return 'kept'
    locked = writing(eng)
    id, bg = m.submit('t', f)
    call(bg)
    assert m.get_job(id).result == '"kept"' and len(calls) == 1
    eng.dispose()

# --- What a task may raise

class Unprintable(Exception):
    def __str__(self): raise RuntimeError('no text')
    __repr__ = __str__
class Base(BaseException): pass
class Fatal(BaseException):
    def __str__(self): raise SystemExit(5)
def too_deep(): return too_deep()

raised = dict(plain=ValueError('bad value'), exit=SystemExit(3), exit_none=SystemExit(), interrupt=KeyboardInterrupt(), generator_exit=GeneratorExit(), base=Base('base'), fatal=Fatal(),
    unprintable=Unprintable(), nul=ValueError('a\x00b'), surrogate=ValueError('\ud800'), long=ValueError('x'*1_000_000), group=BaseExceptionGroup('g', [Unprintable(), SystemExit(1)]),
    stop=StopIteration(1), stop_async=StopAsyncIteration(), cancelled=asyncio.CancelledError(), bytes=OSError(b'\xff'), args=KeyError(), multiline=ValueError('one\ntwo\r\nthree'))

@pytest.mark.parametrize('kind', ['sync', 'async'])
@pytest.mark.parametrize('name', raised)
def test_whatever_a_task_raises_is_recorded_and_goes_no_further(lite, name, kind):
    def f(): raise raised[name]
    async def g(): raise raised[name]
    for go in (lambda bg: asyncio.run(bg()), call):
        id, bg = lite.submit('t', f if kind == 'sync' else g, max_retries=1)
        go(bg)
        job = lite.get_job(id)
        kinds = [type(raised[name]).__name__] + ['RuntimeError']*name.startswith('stop')
        assert (job.status, job.retry_count) == ('failed', 1) and any(k in job.error_message for k in kinds), job.error_message
        assert '\n' not in job.error_message and len(job.error_message) <= 500 and job.error_log and outcomes(lite, id) == ['failed']

def test_what_cannot_be_printed_is_recorded_in_both_databases_and_retried(manager):
    def f(name, job):
        if job.attempt == 1: raise raised[name]
    quick(manager, f, 0.05)
    ids = {}
    for name in ('exit', 'interrupt', 'unprintable', 'nul', 'surrogate', 'base'):
        ids[name], bg = manager.submit('t', f, name=name)
        asyncio.run(bg())
    for name, id in ids.items():
        assert ended(manager, id).status == 'completed' and outcomes(manager, id) == ['retry', 'completed'] and type(raised[name]).__name__ in manager.attempts(id)[0]['error']

def test_endless_recursion_is_a_failure_like_any_other(lite):
    job = run(lite, too_deep, max_retries=1)
    assert job.status == 'failed' and 'RecursionError' in job.error_message and len(job.error_log) < 40_000

def test_the_engine_survives_what_its_tasks_raise(new_manager, new_sqlite):
    m = new_manager(new_sqlite(), handoff=0, concurrency=2)
    def f(name): raise raised[name]
    bad = [m.submit('t', f, max_retries=1, name=n)[0] for n in raised]
    good = m.submit('t', lambda: 'ok')[0]
    assert [ended(m, i).status for i in bad] == ['failed']*len(bad) and ended(m, good).result == '"ok"'

def test_a_broken_backoff_policy_still_retries(lite):
    def f(): raise OSError
    lite.engine.registry.add(f, f.__qualname__, backoff=lambda state: 1/0)
    job = run(lite, f)
    assert job.status == 'pending' and job.retry_count == 1 and job.run_at > later(1)

# --- Who waits for a job returns no response: it is not left waiting for one

@pytest.mark.parametrize('kind', ['sync', 'async', 'lambda'])
def test_who_waits_for_the_end_waits_for_no_response(manager, kind):
    async def aplus(n): return n + 1
    func = dict(sync=plus, **{'async': aplus}, **{'lambda': lambda n: n + 1})[kind]
    start = time.monotonic()
    assert manager.result(manager.submit('t', func, n=1)[0], 20) == 2
    assert asyncio.run(manager.aresult(manager.submit('t', func, n=2)[0], 20)) == 3
    assert time.monotonic() - start < manager.engine.settings.handoff/2
    with pytest.raises(TimeoutError): manager.wait(id := manager.submit('t', func, n=3)[0], 0)  # that is a look
    time.sleep(0.1)
    assert manager.get_job(id).status == 'pending'

def plus(n): return n + 1

def test_a_response_that_comes_while_somebody_waits_runs_nothing_twice(manager):
    ran = []
    for n in range(20):
        id, bg = manager.submit('t', lambda: ran.append(1))
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(manager.wait, id, 20)
            if n % 2: time.sleep(0.006)
            asyncio.run(bg())
            assert waits.result().status == 'completed'
    assert len(ran) == 20

def test_waiting_begins_no_job_before_its_moment_nor_one_that_is_not_to_run_here(new_manager, url):
    m, other, ran = new_manager(url, handoff=5), new_manager(url, handoff=5), []
    soon = m.submit('t', lambda: ran.append('soon'), run_at=datetime.now(timezone.utc) + timedelta(seconds=4))[0]
    theirs = other.submit('t', lambda: ran.append('theirs'))[0]  # only the other process can run it
    other.engine.pause(other.store)
    m.engine.pause(m.store)
    mine = m.submit('t', lambda: ran.append('mine'))[0]
    for id in (soon, theirs, mine):
        with pytest.raises(TimeoutError): m.wait(id, 0.5)
    assert ran == []
    m.engine.pause(m.store, False)
    with pytest.raises(TimeoutError): m.wait(theirs, 0.3)
    assert m.wait(mine, 20).status == 'completed' and ran == ['mine']
    other.engine.pause(other.store, False)
    assert m.wait(soon, 20).status == other.wait(theirs, 20).status == 'completed' and sorted(ran) == ['mine', 'soon', 'theirs']


@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_an_awaited_handle_never_raises_though_the_database_is_broken(manager, kind):
    async def g(): return 1
    id, bg = manager.submit('t', (lambda: 1) if kind == 'sync' else g)
    with writing(manager.store.engine) as conn: conn.exec_driver_sql('ALTER TABLE tenant_jobs RENAME TO elsewhere')
    assert asyncio.run(bg()) is None
    with writing(manager.store.engine) as conn: conn.exec_driver_sql('ALTER TABLE elsewhere RENAME TO tenant_jobs')
    assert manager.get_job(id).status == 'pending' and asyncio.run(bg()) is None and manager.get_job(id).status == 'completed'

def test_an_awaited_handle_never_raises_though_the_database_is_gone(new_pg, new_manager, pg_server):
    m = new_manager(url := new_pg(), busy=0.5)
    id, bg = m.submit('t', lambda: 1)
    eng = open_engine(pg_server, isolation_level='AUTOCOMMIT')
    with eng.connect() as conn: conn.exec_driver_sql(f'DROP DATABASE {sa.make_url(url).database} WITH (FORCE)')
    eng.dispose()
    assert asyncio.run(bg()) is None

def test_an_awaited_handle_of_a_stopped_engine_leaves_the_job(lite):
    calls = Calls()
    id, bg = lite.submit('t', calls.task())
    lite.engine.stop(0)
    assert asyncio.run(bg()) is None and calls == [] and lite.get_job(id).status == 'pending'

# --- What a task may say

def test_permanent_fails_at_once(manager):
    def f(): raise Permanent('never')
    job = run(manager, f)
    assert (job.status, job.retry_count) == ('failed', 1) and 'never' in job.error_message

def test_retry_after_sets_the_wait_and_counts(manager):
    calls = Calls()
    id, bg = manager.submit('t', calls.task(fail=1, error=lambda m: RetryAfter(0.3, 'not yet')))
    call(bg)
    job = manager.get_job(id)
    assert (job.status, job.retry_count) == ('pending', 1) and 'not yet' in job.error_message
    assert seconds(job.run_at) - seconds(manager.attempts(id)[0]['ended_at']) == pytest.approx(0.3, abs=0.01)
    assert ended(manager, id).status == 'completed' and len(calls) == 2

def test_retry_after_respects_the_most_attempts(lite):
    def f(): raise RetryAfter(0)
    id, bg = lite.submit('t', f, max_retries=2)
    call(bg)
    job = ended(lite, id)
    assert (job.status, job.retry_count) == ('failed', 2)

def test_snooze_gives_the_attempt_back(manager):
    calls = Calls()
    id, bg = manager.submit('t', calls.task(fail=3, error=lambda m: Snooze(0.1)), max_retries=1)
    call(bg)
    job = ended(manager, id)
    assert (job.status, job.retry_count, len(calls)) == ('completed', 0, 4) and outcomes(manager, id) == ['snooze']*3 + ['completed']

@pytest.mark.parametrize('kind', [Snooze, RetryAfter])
def test_a_wait_is_a_finite_time(kind):
    for bad in (-1, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='seconds'): kind(bad)

def test_warnings_progress_details_and_logs_are_kept(manager):
    def f(job, rows):
        job.progress(250, 'x'*1000); job.progress(message='half'); job.progress(float('nan')); job.progress('no number')
        job.warn('bad line', item=7); job.log('fine'); job.warn('bad \x00 line \ud800')
        job.details['skipped'] = 2
        return rows
    job = run(manager, f, rows=3)
    assert (job.status, job.result, job.progress_percent, job.progress_message) == ('completed_with_warnings', '3', 100, 'half') and json.loads(job.details) == {'skipped': 2}
    logs = manager.logs(job.id)
    assert [(l['level'], l['item']) for l in logs] == [('warning', '7'), ('info', None), ('warning', None)] and logs[0]['message'] == 'bad line' and [l['line'] for l in logs] == [1, 2, 3]

def test_progress_is_seen_while_the_task_runs(manager):
    go = threading.Event()
    def f(job): job.progress(40, 'working'); job.log('first'); assert go.wait(10)
    id, bg = manager.submit('t', f)
    t = threading.Thread(target=call, args=(bg,)); t.start()
    try: wait_until(lambda: (manager.get_job(id).progress_percent, manager.get_job(id).progress_message) == (40, 'working') and manager.logs(id))
    finally: go.set(); t.join()
    assert manager.get_job(id).status == 'completed' and len(manager.logs(id)) == 1

def test_details_outlive_an_attempt(manager):
    seen = []
    def f(job):
        seen.append(job.details.get('at', 0)); job.details['at'] = job.attempt
        if job.attempt < 3: raise OSError
    id, bg = manager.submit('t', quick(manager, f, 0.05))
    call(bg)
    assert ended(manager, id).status == 'completed' and seen == [0, 1, 2]

def test_a_thousand_log_lines_and_no_more(lite):
    def f(job): [job.log(f'{i}') for i in range(3000)]
    job = run(lite, f)
    logs = lite.logs(job.id)
    assert job.status == 'completed' and len(logs) == 1001 and '1000' in logs[-1]['message']

def test_details_that_are_no_json_do_not_harm_the_job(lite):
    def f(job): job.details['x'] = object(); return 1
    assert run(lite, f).status == 'completed'

def test_the_context_is_found_by_its_annotation(lite):
    def f(ctx:JobContext, job): return [ctx.id, job, ctx.idempotency_key, ctx.attempt]
    job = run(lite, f, job='mine')
    assert json.loads(job.result) == [job.id, 'mine', job.id, 1]

def test_a_task_writes_in_a_transaction_of_its_own(manager):
    def f(job):
        with job.begin() as conn: conn.exec_driver_sql('CREATE TABLE own (name VARCHAR)'); conn.exec_driver_sql("INSERT INTO own VALUES ('x')")
        try:
            with job.begin() as conn: conn.exec_driver_sql("INSERT INTO own VALUES ('y')"); raise KeyError
        except KeyError: pass
        with job.begin() as conn: return [r[0] for r in conn.exec_driver_sql('SELECT name FROM own')]
    assert run(manager, f).result == '["x"]'

# --- The runner

def test_a_job_whose_response_never_came_is_run(new_manager, url):
    m, calls = new_manager(url, handoff=0.3), Calls()
    start = time.monotonic()
    id, _ = m.submit('t', calls.task(), x=1)
    assert ended(m, id).status == 'completed' and calls == [{'x': 1}] and time.monotonic() - start > 0.25

def test_the_most_urgent_job_runs_first(new_manager, new_sqlite):
    m, order = new_manager(new_sqlite(), handoff=0.3, concurrency=1), []
    f = lambda n: order.append(n)
    ids = [m.submit('t', f, payload={'n': p}, priority=p)[0] for p in (1, 2, 4, 3)]
    for i in ids: ended(m, i)
    assert order == [4, 3, 2, 1]

def test_no_more_jobs_at_once_than_allowed(new_manager, new_sqlite):
    m, now, most, lock = new_manager(new_sqlite(), handoff=0, concurrency=3), [0], [0], threading.Lock()
    def f():
        with lock: now[0] += 1; most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock: now[0] -= 1
    for i in [m.submit('t', f)[0] for _ in range(20)]: ended(m, i)
    assert most[0] <= 3

def orphan(url, new_manager, name, **kw):
    "A job that a process claimed which then died"
    m = new_manager(url)
    m.store.add(dict(id='orphan', job_type='t', task=name, payload='{"x": 1}', max_retries=3) | kw)
    m.store.claim_one('orphan', gen_id(), 'dead:1:x', -1)
    m.engine.stop(0)

def test_an_orphan_is_rescued_by_a_fresh_engine(new_manager, url):
    orphan(url, new_manager, 'f')
    m, calls = new_manager(url), Calls()
    m.engine.registry.add(calls.task(), 'f')
    job = ended(m, 'orphan')
    assert (job.status, job.retry_count, calls) == ('completed', 1, [{'x': 1}]) and outcomes(m, 'orphan') == ['lost', 'completed']

def test_a_live_job_of_another_process_is_left_alone(new_manager, url):
    m = new_manager(url)
    m.store.add(dict(id='other', job_type='t', task='f', max_retries=3))
    row = m.store.claim_one('other', gen_id(), 'alive:1:x', 30)
    m.engine.registry.add((calls := Calls()).task(), 'f')
    assert run(m, lambda: 1).status == 'completed'
    m.store.add(dict(id='mine', job_type='t', task='f', max_retries=3)); m.engine.attend(m.store)
    ended(m, 'mine')
    assert m.store.get('other')['claim_token'] == row['claim_token'] and len(calls) == 1

def test_a_bare_manager_retries_and_rescues(new_manager, new_sqlite):
    calls, others = Calls(), Calls()
    task('bare orphan', backoff=wait_fixed(0.1))(others.task())
    f = task(backoff=wait_fixed(0.1))(calls.task(fail=2))
    orphan(url := new_sqlite(), new_manager, 'bare orphan')
    db = Database(url)
    m = BackgroundTaskManager(db)
    try:
        id, bg = m.submit('t', f)
        asyncio.run(bg())
        assert ended(m, id).status == 'completed' and ended(m, 'orphan').status == 'completed' and (len(calls), len(others)) == (3, 1)
    finally: default_engine().stop(0); db.conn.close(); db.engine.dispose()

def test_a_job_of_an_unregistered_task_waits_unharmed(new_manager, url):
    m = new_manager(url, handoff=0)
    m.store.add(dict(id='x', job_type='t', task='later', payload='{}', max_retries=3)); m.engine.attend(m.store)
    assert [ended(m, m.submit('t', lambda: 1)[0]).status for _ in range(3)] == ['completed']*3
    job = m.get_job('x')
    assert (job.status, job.attempt, job.retry_count, m.attempts('x')) == ('pending', 0, 0, []) and shown_state(job, timestamp(), m.engine.registry.names[0]) == 'waiting'
    m.engine.registry.add((calls := Calls()).task(), 'later')
    assert ended(m, 'x').status == 'completed' and m.get_job('x').retry_count == 0 and calls == [{}]

def test_a_word_in_a_row_is_never_imported(new_manager, new_sqlite):
    m = new_manager(new_sqlite(), handoff=0)
    for i, t in enumerate(('os.system', 'os:abort', 'builtins.print', '__main__', "print('x')")): m.store.add(dict(id=f'{i}', job_type=t, task=t, payload='{}', max_retries=3))
    ended(m, m.submit('t', lambda: 1)[0])
    assert all(m.get_job(f'{i}').attempt == 0 for i in range(5))

def test_a_long_job_keeps_its_lease(new_manager, url):
    m, calls = new_manager(url, lease=1), []
    def f(): calls.append(1); time.sleep(1.6); return 'kept'
    id, bg = m.submit('t', f)
    asyncio.run(bg())
    assert m.get_job(id).result == '"kept"' and len(calls) == 1 and outcomes(m, id) == ['completed'] and m.engine.stale == 0

def test_a_task_that_lost_its_claim_is_told_and_its_result_dropped(new_manager, url):
    m, told = new_manager(url, lease=1), []
    def f(job): told.append(wait_until(lambda: job.should_stop, 10)); return 'late'
    id, bg = m.submit('t', f)
    t = threading.Thread(target=call, args=(bg,)); t.start()
    wait_until(lambda: m.get_job(id).status == 'running')
    with writing(m.store.engine) as conn: conn.execute(sa.text("UPDATE tenant_jobs SET claim_token = 'other', worker = 'other' WHERE id = :i"), dict(i=id))
    t.join(15)
    assert told == [True] and m.get_job(id).result is None and m.get_job(id).claim_token == 'other' and m.engine.stale == 1

def test_a_request_to_cancel_reaches_the_task(new_manager, new_sqlite):
    m = new_manager(new_sqlite(), lease=1)
    def f(job): return bool(wait_until(lambda: job.should_stop, 10))
    id, bg = m.submit('t', f)
    t = threading.Thread(target=call, args=(bg,)); t.start()
    wait_until(lambda: m.get_job(id).status == 'running')
    with writing(m.store.engine) as conn: conn.execute(sa.text('UPDATE tenant_jobs SET cancel_requested_at = :at'), dict(at=later(0)))
    t.join(15)
    assert m.get_job(id).completed_at

def test_a_stopping_engine_tells_its_tasks_and_lets_them_end(new_manager, url):
    m = new_manager(url, handoff=0, grace=10)
    entered = threading.Event()
    def f(job): entered.set(); return bool(wait_until(lambda: job.should_stop, 10))
    id, _ = m.submit('t', f)
    assert entered.wait(10)
    m.engine.stop()
    assert (m.get_job(id).status, m.get_job(id).result) == ('completed', 'true')

@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_what_does_not_end_in_time_is_released_and_its_late_result_dropped(new_manager, url, kind):
    m, entered, go, left = new_manager(url, handoff=0), threading.Event(), threading.Event(), threading.Event()
    def f():
        entered.set()
        assert go.wait(20); left.set()
        return 'late'
    async def g():
        entered.set()
        try: await asyncio.sleep(20)
        finally: left.set()
        return 'late'
    id, _ = m.submit('t', f if kind == 'sync' else g)
    assert entered.wait(10)
    start = time.monotonic()
    m.engine.stop(0.2)
    assert time.monotonic() - start < 4
    job = m.get_job(id)
    assert (job.status, job.retry_count, job.claim_token, job.completed_at) == ('pending', 0, None, None) and outcomes(m, id) == ['release']
    go.set()
    assert left.wait(10) and (kind == "async" or wait_until(lambda: m.engine.stale == 1))
    assert m.get_job(id) == job and outcomes(m, id) == ['release']
    other = new_manager(url)
    other.engine.registry.add(lambda: 'again', job.task); other.engine.attend(other.store)
    assert ended(other, id).result == '"again"' and other.get_job(id).retry_count == 0

def test_a_stopped_engine_starts_nothing(new_manager, url):
    m, calls = new_manager(url, handoff=0.2), Calls()
    f = calls.task()
    m.engine.stop(0)
    id, _ = m.submit('t', f)
    assert m.get_job(id).status == 'pending' and calls == []
    other = new_manager(url)
    other.engine.registry.add(f, f.__qualname__); other.engine.attend(other.store)
    assert ended(other, id).status == 'completed' and len(calls) == 1

child = '''
import sys, time
from fastsql import Database
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.process import use_engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import task
from fh_saas.utils_bgtsk import BackgroundTaskManager
@task('slow')
def slow(n): sys.stdout.write('running\\n'); sys.stdout.flush(); time.sleep(60)
use_engine(Engine(Settings(lease=1, handoff=0, poll=0.2)))
m = BackgroundTaskManager(Database(sys.argv[1]))
for n in range(3): m.submit('t', slow, n=n)
sys.stdout.write('submitted\\n'); sys.stdout.flush()
time.sleep(60)
'''

def test_a_killed_process_loses_nothing(new_manager, url):
    p = subprocess.Popen([sys.executable, '-c', child, url], stdout=subprocess.PIPE)
    try: assert sorted(p.stdout.readline() for _ in range(4)) == [*[b'running\n']*3, b'submitted\n']  # in whatever order
    finally: p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close()
    m, done = new_manager(url), []
    m.engine.registry.add(lambda n: done.append(n), 'slow')
    assert [ended(m, j.id).status for j in m.list_jobs()] == ['completed']*3 and sorted(done) == [0, 1, 2]
    assert all(outcomes(m, j.id) in (['lost', 'completed'], ['completed']) for j in m.list_jobs())

# --- Names

class Shop:
    def __init__(self, name): self.name, self.calls = name, 0
    def sync(self):
        self.calls += 1
        if self.calls == 1: raise OSError
        return self.name

def closure(name):
    calls = []
    def f():
        calls.append(1)
        if len(calls) == 1: raise OSError
        return name
    return f

def with_default(name):
    def f(name=name, calls=[]):
        calls.append(name)
        if calls.count(name) == 1: raise OSError
        return name
    return f

def partial(name): return functools.partial(_of, name)
_seen = []
def _of(name):
    _seen.append(name)
    if _seen.count(name) == 1: raise OSError
    return name

@pytest.mark.parametrize('make', [closure, lambda n: Shop(n).sync, with_default, partial], ids=['closure', 'bound method', 'default', 'partial'])
def test_a_retry_runs_the_very_function_not_another_of_its_name(lite, make):
    _seen.clear()
    names = ['one', 'two', 'three']
    fs = [make(n) for n in names]
    for f in fs: lite.engine.registry.add(f, backoff=wait_fixed(0.3))
    bgs = [lite.submit('t', f) for f in fs]
    for _, bg in bgs: call(bg)
    assert [ended(lite, id).result for id, _ in bgs] == ['"one"', '"two"', '"three"']

@pytest.mark.parametrize('make', [closure, lambda n: Shop(n).sync, with_default, partial], ids=['closure', 'bound method', 'default', 'partial'])
def test_a_job_without_a_response_runs_the_very_function(new_manager, new_sqlite, make):
    _seen.clear()
    m = new_manager(new_sqlite(), handoff=0.2)
    fs = [make(n) for n in ('one', 'two')]
    for f in fs: m.engine.registry.add(f, backoff=wait_fixed(0.05))
    ids = [m.submit('t', f)[0] for f in fs]
    assert [ended(m, id).result for id in ids] == ['"one"', '"two"']

def module(path, name, source):
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(name, path)
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

def test_two_functions_of_one_name_from_two_files_are_an_error(lite, tmp_path):
    a, b = (module(tmp_path/f'{n}.py', n, 'def work(x): return __name__') for n in ('mod_a', 'mod_b'))
    assert run(lite, a.work, x=1).result == '"mod_a"'
    with pytest.raises(TaskNameTaken, match='work') as e: lite.submit('t', b.work, x=1)
    assert 'mod_a.py' in str(e.value) and 'mod_b.py' in str(e.value) and '@task' in str(e.value) and len(lite.list_jobs()) == 1
    b.work.__task_name__ = 'other work'
    job = run(lite, b.work, x=1)
    assert (job.result, job.task) == ('"mod_b"', 'other work')

def test_one_file_under_two_module_names_is_one_task(lite, tmp_path):
    a, b = (module(tmp_path/'main.py', n, 'def work(x): return __name__') for n in ('__mp_main__', 'main'))
    assert a.work is not b.work and run(lite, a.work, x=1).result == '"__mp_main__"' and run(lite, b.work, x=1).result == '"main"'
    assert {j.task for j in lite.list_jobs()} == {'work'}

def test_a_function_defined_anew_is_the_same_task(lite):
    space = {'__name__': '__main__'}
    for n in (1, 2):
        exec(compile(f'def cell(): return {n}', f'<ipython-input-{n}>', 'exec'), space)
        assert run(lite, space['cell']).result == str(n)

def test_a_registered_name_goes_into_the_row(lite):
    @task('the stable name', backoff=wait_fixed(0.1))
    def f(): return 1
    assert run(lite, f).task == 'the stable name' and f() == 1
    def g(): return 1
    assert run(lite, g).task == g.__qualname__ and g.__module__ not in g.__qualname__

@pytest.mark.parametrize('bad', ['', 7, 'x'*300, b'x'])
def test_a_name_is_text(bad):
    with pytest.raises(ValueError): task(bad)

def test_one_name_for_two_tasks_of_one_file_is_an_error():
    r = Registry()
    def f(): pass
    def g(): pass
    r.add(f, 'same')
    with pytest.raises(TaskNameTaken): r.add(g, 'same')
    assert r.find('same', 't').func is f

# --- The host's own jobs

def test_system_jobs_run_on_the_same_engine(host, engine):
    m, calls = BackgroundTaskManager(host, engine), Calls()
    id, bg = m.submit('provision', quick(m, calls.task(fail=1), 0.1), tenant='acme')
    asyncio.run(bg())
    job = ended(m, id)
    assert isinstance(job, SystemJob) and (job.status, job.retry_count, job.job_type, calls) == ('completed', 1, 'provision', [{'tenant': 'acme'}]*2)
    assert isinstance(m.list_jobs()[0], SystemJob) and m.tenant_jobs[id].status == 'completed' and [t.id for t in host.tenants()] == []
    with pytest.raises(JobNotFound, match='sys_jobs'): m.get_job('nope')

# --- A loop that is gone

def test_an_engine_stops_though_the_loop_of_a_task_was_closed(lite):
    entered = []
    async def f(): entered.append(1); await asyncio.sleep(60)
    def g(): entered.append(2); time.sleep(1)
    ids, loop = [], asyncio.new_event_loop()
    async def main():
        for x in (f, g):
            id, bg = lite.submit('t', x)
            ids.append(id); asyncio.ensure_future(bg())
        while len(entered) < 2: await asyncio.sleep(0.01)
    loop.run_until_complete(main())
    pending = asyncio.all_tasks(loop)
    loop.close()
    lite.engine.stop(0.1)
    assert [(lite.get_job(i).status, lite.get_job(i).retry_count) for i in ids] == [('pending', 0)]*2 and pending
