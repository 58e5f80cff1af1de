"The JSON API as a client meets it: what it takes and gives, and every way in which it says no."
import base64, json, sqlite3, threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace
import psycopg, pytest
import sqlalchemy as sa
from fasthtml.common import FastHTML, JSONResponse
from starlette.testclient import TestClient
from fh_saas.db_host import HostDatabase, TenantCatalog
from fh_saas.db_connect import DatabaseBusy
from fh_saas.jobs import pages
from fh_saas.jobs.options import Unique
from fh_saas.jobs.retries import Permanent
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.marks import Marks
from fh_saas.jobs.store import Store
from fh_saas.jobs.tasks import task
from fh_saas.jobs.tenancy import rules_of
from fh_saas.testing import JobTester
from fh_saas.web.access import Access
from fh_saas.web.setup import setup_jobs
from conftest import wait_until

at = '/api/v1/admin/background-tasks'
start = '/api/v1/catalog/product-import'

def product_import(path:str, limit:int=None): # The file; most lines
    "Bring a shop's products up to date"
    if path == 'broken': raise Permanent('no such file')
    return dict(path=path, limit=limit)
def login(password:str, url:str, fail:bool=False):
    if fail: raise Permanent(f'{password} was refused by {url}')
    return dict(token=password, tried=[url, password], card=dict(api_key='k-12345'), max_tokens=5)
def odd(job_id:str, self:str, payload:dict, job_type:str='', queue:str='', unique:bool=False, triggered_by:str='', max_retries:int=0, conn:str='', func:str='', task_func:str=''): return dict(job_id=job_id, self=self, payload=payload, job_type=job_type, queue=queue, unique=unique, triggered_by=triggered_by, max_retries=max_retries, conn=conn, func=func, task_func=task_func)
def report(job, n:int=0): job.progress(45, 'Processing batch 5 of 11'); job.details.update(rows=n)
async def nothing(): pass
@task('stock_sync', unique=Unique(by=('account',)))
def stock_sync(account:int, full:bool=False): return account
tasks = dict(catalog=[product_import, odd], users=[login, report, nothing], stock=[stock_sync])
tokens = dict(op=Access('operator', 'acme', 'script'), view=Access('viewer', 'acme', 'reader'), admin=Access('admin', user='root'), other=Access('operator', 'globex', 'script'))

def said(r, status, kind=None, text=''):
    "The problem that a response is"
    assert r.status_code == status and r.headers['content-type'] == 'application/problem+json', (r.status_code, r.text[:300])
    p = r.json()
    assert {'type', 'title', 'status', 'detail'} <= p.keys() and p['status'] == status and p['detail'] and p['title'] and p['type'] == ('about:blank' if kind is None else f'https://abhisheksreesaila.github.io/fh-saas/web/problems.html#{kind}') and text in p['detail'], p
    return p

@pytest.fixture
def new_web(tmp_path):
    "Call it with the URL of a tenant's database for an app, whose jobs run when they are told to"
    open_ = []
    def make(url, other=None, busy=0.3, role=lambda req: None, tester=True, settings=None, own=lambda app: None, **kw):
        host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
        for id, u in dict(acme=url, globex=other).items():
            if not u: continue
            Store(u).close()  # for a database that is empty the directory would wait, lest somebody be making it
            host.register(TenantCatalog(id, id, u))
        jt = JobTester().__enter__() if tester else None
        if jt: jt.engine.settings = replace(jt.engine.settings, busy=busy)
        app = FastHTML(secret_key='x')
        own(app)
        jobs = setup_jobs(app, host, settings, role=role, tokens=tokens, tasks=tasks, **kw)
        def client(token='op', **kw): return TestClient(app, headers={'Authorization': f'Bearer {token}'} if token else {}, raise_server_exceptions=False, **kw)
        c = client()
        c.__enter__()
        open_.append((c, jt, host))
        return SimpleNamespace(app=app, host=host, jobs=jobs, jt=jt, c=c, client=client, url=url, m=jobs.directory.manager('acme'), start=lambda path='a.csv', c=c, **kw: c.post(start, json=dict(path=path), **kw).json()['job_id'])
    yield make
    for c, jt, host in open_:
        c.__exit__(None, None, None)
        if jt: jt.__exit__(None, None, None)
        host.close()

@pytest.fixture
def web(new_url, new_web): return new_web(new_url())

@pytest.fixture
def lite(new_sqlite, new_web): return new_web(new_sqlite())

def ids(r): assert r.status_code == 200, r.text; return [j['id'] for j in r.json()['items']]
def put(w, id, **cols): w.m.store.write(lambda cur, now: cur.execute(f"UPDATE tenant_jobs SET {', '.join(f'{k} = {v!r}' for k, v in cols.items())} WHERE id = '{id}'") and None)

# --- Starting and watching

def test_a_start_is_accepted_in_the_form_of_the_seed_documents(web):
    r = web.c.post(start, json=dict(path='a.csv'))
    id = r.json()['job_id']
    assert r.status_code == 202 and r.json() == dict(job_id=id, task_type='product_import', status='pending', message='Task queued successfully', status_url=f'{at}/{id}')
    assert (r.headers['location'], r.headers['retry-after'], r.headers['content-type']) == (f'{at}/{id}', '3', 'application/json')
    job = web.c.get(r.headers['location'])
    assert job.json()['triggered_by'] == 'api' and job.headers['retry-after'] == '3'
    web.jt.drain()
    job = web.c.get(r.headers['location'])
    assert job.json()['status'] == 'completed' and job.json()['result'] == dict(path='a.csv', limit=None) and 'retry-after' not in job.headers

def test_a_job_is_shown_in_the_form_of_the_seed_documents(web):
    id = web.c.post('/api/v1/users/report', json=dict(n=7)).json()['job_id']
    def keys(j): return {*j} == {'id', 'task_type', 'status', 'state', 'progress_percent', 'progress_message', 'created_at', 'started_at', 'completed_at', 'run_at', 'triggered_by', 'error_message', 'details', 'result', 'queue', 'priority', 'rerun_of', 'tags', 'attempts'}
    def moments(j): return [j[k] for k in ('created_at', 'started_at', 'completed_at', 'run_at')]
    before = web.c.get(f'{at}/{id}').json()
    assert keys(before) and (before['status'], before['state'], before['started_at'], before['completed_at'], before['details'], before['error_message'], before['attempts'], before['tags']) == ('pending', 'pending', None, None, None, None, dict(begun=0, failed=0, most=3), [])
    web.jt.drain()
    after = web.c.get(f'{at}/{id}').json()
    assert keys(after) and (after['status'], after['progress_message'], after['details'], after['attempts']['begun'], after['task_type'], after['queue'], after['priority']) == ('completed', 'Processing batch 5 of 11', dict(rows=7), 1, 'report', 'default', 2)
    for j in (before, after): assert all(m is None or m.endswith('Z') and datetime.fromisoformat(m).utcoffset().total_seconds() == 0 for m in moments(j))
    assert None not in moments(after) and ids(web.c.get(at)) == [id] and web.c.get(at).json() == dict(items=[after], next_cursor=None)

def test_a_job_runs_behind_its_response(new_sqlite, new_web):
    "With the app's own runner"
    w = new_web(new_sqlite(), tester=False, settings=Settings(handoff=3600))
    for path in (start, '/api/v1/users/nothing'):
        url = w.c.post(path, json=dict(path='a.csv') if path == start else {}).headers['location']
        wait_until(lambda: w.c.get(url).json()['status'] == 'completed')
    assert w.c.post('/api/v1/users/nothing').status_code == 202  # without a body

def test_arguments_may_have_any_name(web):
    args = dict(job_id='1', self='me', payload=dict(a=1), job_type='t', queue='q', unique=True, triggered_by='x', max_retries=7, conn='c', func='f', task_func='g')
    r = web.c.post('/api/v1/catalog/odd', json=args)
    assert r.status_code == 202, r.text
    web.jt.drain()
    job = web.c.get(r.headers['location']).json()
    assert (job['result'], job['triggered_by'], job['queue'], job['attempts']['most']) == (args, 'api', 'default', 3)
    again = web.c.post(f"{at}/{job['id']}/rerun", json=dict(payload={}, self='you'))
    web.jt.drain()
    assert web.c.get(again.headers['location']).json()['result'] == args | dict(payload={}, self='you')
    assert web.c.post('/api/v1/catalog/odd', json=args, headers={'Idempotency-Key': 'k'}).json()['job_id'] == web.c.post('/api/v1/catalog/odd', json=args, headers={'Idempotency-Key': 'k'}).json()['job_id']

def test_secrets_are_not_sent(web):  # an argument that is secret comes back in the result under another name
    secret = 'hunter22-hunter22'
    done, failed = [web.c.post('/api/v1/users/login', json=dict(password=secret, url=f'postgresql://me:{secret}@db/x', fail=fail)).headers['location'] for fail in (False, True)]
    web.jt.drain()
    texts = [web.c.get(u).text for u in (done, failed, at, f'{at}/statistics')]
    assert not any(secret in t or 'k-12345' in t for t in texts), texts
    job = web.c.get(done).json()
    assert job['result']['token'] == job['result']['card']['api_key'] == '***' and job['result']['max_tokens'] == 5 and web.c.get(failed).json()['status'] == 'failed'
    refused = web.c.post('/api/v1/users/login', json=dict(password=[secret], url=1))
    assert secret not in said(refused, 422, 'invalid')['detail']

# --- Lists

@pytest.fixture
def many(web):
    "Jobs of all kinds, by name"
    def add(path='a', **kw): return web.m.submit(kw.pop('job_type', 'product_import'), product_import, path=path, **kw)[0]
    j = SimpleNamespace(failed=add('broken', tags=['x', 'é']), done=add('file100%', queue='bulk', triggered_by='manual:admin'))
    web.jt.drain()
    j.cancelled = add('file_1')
    web.m.cancel(j.cancelled)
    j.pending, j.late = add('fileX1', tags=['x'], job_type='order_import'), add('late', run_at='2999-01-01T00:00:00Z')
    j.running = add('run')
    put(web, j.running, status='running', claim_token='t', started_at='2026-01-01T00:00:00.000000')
    for n, id in enumerate(vars(j).values()): put(web, id, created_at=f'2026-01-0{n+1}T00:00:00.000000')
    web.j = j
    return web

filtered = [({}, 'running late pending cancelled done failed'), (dict(status='failed'), 'failed'), (dict(status='failed,completed'), 'done failed'), (dict(status='pending,running,failed'), 'running late pending failed'),
    (dict(task_type='order_import'), 'pending'), (dict(task_type='order'), ''), (dict(queue='bulk'), 'done'), (dict(tag='x'), 'pending failed'), (dict(tag='é'), 'failed'), (dict(triggered_by='manual:admin'), 'done'), (dict(q='NO SUCH'), 'failed'), (dict(q='%'), ''), (dict(q='no_such'), ''),
    (dict(since='2026-01-03'), 'running late pending cancelled'), (dict(until='2026-01-03T00:00:00Z'), 'done failed'), (dict(since='2026-01-02T01:00:00+01:00', until='2026-01-04T00:00Z'), 'cancelled done'), (dict(limit='2'), 'running late'), (dict(status='', q='', limit='3'), 'running late pending'),
    (dict(tag='x', status='pending'), 'pending'), (dict(rerun_of='nobody'), '')]

def test_filters(many, subtests):
    for query, names in filtered:
        with subtests.test(**query): assert ids(many.c.get(at, params=query)) == [getattr(many.j, n) for n in names.split()]

def test_running_is_what_is_under_way_and_what_waits(many, monkeypatch):
    j, get = many.j, lambda **q: ids(many.c.get(f'{at}/running', params=q))
    assert get() == [j.running, j.late, j.pending] and get(limit=2) == [j.running, j.late] and get(task_type='order_import') == [j.pending] and get(tag='nope') == []
    said(many.c.get(f'{at}/running', params=dict(status='failed')), 422, 'invalid', 'status')
    monkeypatch.setattr(pages, 'stretch', 2)
    assert get(task_type='order_import') == [j.pending], "however many are newer"

def test_pages_show_each_job_once_while_others_arrive(web):
    old = web.m.submit_many('product_import', product_import, [dict(path=f'{n}.csv') for n in range(120)])
    seen, url, n = [], f'{at}?limit=7&task_type=product_import', 0
    while url:
        r = web.c.get(url)
        seen += ids(r)
        web.start(f'new{n}')
        n, link = n + 1, r.headers.get('link')
        assert bool(link) == bool(r.json()['next_cursor']) and n < 30
        url = link and link[1:].removesuffix('>; rel="next"')
    assert seen == old[::-1] and n == 18

# --- Steering

def test_steering_one_job(many):
    j, c = many.j, many.c
    def act(what, id, **kw): return c.post(f'{at}/{id}/{what}', **kw)
    assert act('cancel', j.pending).json()['status'] == 'cancelled' and act('cancel', j.running).json()['state'] == 'cancelling' and act('cancel', j.running).status_code == 200
    for what, id in (('cancel', j.done), ('cancel', j.failed), ('retry', j.done), ('retry', j.late)): said(act(what, id), 409, 'wrong-state', id)
    again = act('retry', j.failed)
    assert (again.status_code, again.json()['status'], again.json()['completed_at']) == (200, 'pending', None)
    said(c.delete(f'{at}/{j.running}'), 409, 'wrong-state')
    gone = c.delete(f'{at}/{j.done}')
    assert (gone.status_code, gone.content) == (204, b'')
    for r in (c.get(f'{at}/{j.done}'), c.delete(f'{at}/{j.done}'), act('cancel', j.done), act('retry', j.done), act('rerun', j.done)): said(r, 404, 'not-found', j.done)
    for what in ('cancel', 'retry'): said(act(what, j.failed, json=dict(x=1)), 422, 'invalid', 'no arguments')

def test_rerun(web):
    id = web.start('a.csv')
    web.jt.drain()
    r = web.c.post(f'{at}/{id}/rerun', json=dict(limit=5))
    assert r.status_code == 202 and r.json()['status'] == 'pending' and r.headers['location'] == f"{at}/{r.json()['job_id']}" != f'{at}/{id}'
    plain = web.c.post(f'{at}/{id}/rerun')
    web.jt.drain()
    job = web.c.get(r.headers['location']).json()
    assert (job['result'], job['rerun_of']) == (dict(path='a.csv', limit=5), id) and web.c.get(plain.headers['location']).json()['result'] == dict(path='a.csv', limit=None)
    assert ids(web.c.get(at, params=dict(rerun_of=id))) == [plain.json()['job_id'], job['id']]
    for args in (dict(limit='x'), dict(nope=1)): said(web.c.post(f'{at}/{id}/rerun', json=args), 422, 'invalid', next(iter(args)))
    assert len(ids(web.c.get(at))) == 3

def test_the_context_of_a_task_comes_from_nobody_outside(web):
    "`{\"job\": 5}` was taken, and the task called the methods of a number"
    said(web.c.post('/api/v1/users/report', json=dict(job=5)), 422, 'invalid', "'job' is filled when the job begins")
    assert ids(web.c.get(at)) == []
    id = web.c.post('/api/v1/users/report', json={}).json()['job_id']
    said(web.c.post(f'{at}/{id}/rerun', json=dict(job=5)), 422, 'invalid', "'job'")
    assert ids(web.c.get(at)) == [id]

def test_bulk(many):
    j, bulk = many.j, lambda **body: many.c.post(f'{at}/bulk', json=body)
    everything = ids(many.c.get(at))
    assert bulk(action='delete', everything=True, dry_run=True).json() == dict(action='delete', count=5, dry_run=True) and ids(many.c.get(at)) == everything
    assert bulk(action='cancel', filter=dict(task_type='order_import')).json() == dict(action='cancel', count=1, dry_run=False) and many.c.get(f'{at}/{j.pending}').json()['status'] == 'cancelled'
    assert bulk(action='retry', filter=dict(status='failed', tag='x'), dry_run=True).json()['count'] == 1 and bulk(action='retry', filter=dict(until='2026-01-02')).json()['count'] == 1 and many.c.get(f'{at}/{j.failed}').json()['status'] == 'pending'
    assert bulk(action='cancel', everything=True).json()['count'] == 3 and many.c.get(f'{at}/{j.running}').json()['state'] == 'cancelling'
    both = dict(status='cancelled,completed')
    r, listed = bulk(action='delete', filter=both, dry_run=True), len(ids(many.c.get(at, params=both)))
    assert r.status_code == 422 or r.json()['count'] == listed, "what the list finds, or an error"
    assert bulk(action='delete', everything=True).json()['count'] == 5 and ids(many.c.get(at)) == [j.running]

no_bulk = [({}, 'action'), (dict(action='move'), 'action'), (dict(action=['cancel']), 'action'), (dict(action=None, everything=True), 'action'), (dict(action='cancel'), 'everything'), (dict(action='delete', filter={}), 'everything'), (dict(action='delete', filter=dict(job_type='x', nope='y')), 'nope'),
    (dict(action='delete', filter=[]), 'filter'), (dict(action='delete', filter=dict(task_type=1)), 'filter'), (dict(action='delete', filter=dict(since='soon')), 'since'), (dict(action='delete', filter=dict(tag='a,b')), 'tag'), (dict(action='delete', filter=dict(queue='\0')), 'queue'),
    (dict(action='delete', everything='yes'), 'everything'), (dict(action='delete', everything=True, dry_run=1), 'dry_run'), (dict(action='delete', everything=True, extra=1), 'extra'), (dict(action='delete', filter=dict(status='')), 'status')]

def test_a_wrong_bulk_changes_nothing(lite, subtests):
    id = lite.start()
    for body, text in no_bulk:
        with subtests.test(**body): said(lite.c.post(f'{at}/bulk', json=body), 422, 'invalid', text)
    assert ids(lite.c.get(at)) == [id]

# --- In numbers

def test_statistics(many):
    r = many.c.get(f'{at}/statistics')
    s = r.json()
    assert r.status_code == 200 and {*s} == {'queues', 'tasks', 'statuses'} and s['queues']['default'] | dict(oldest_due=0) == dict(due=1, scheduled=1, running=1, oldest_due=0)
    assert s['statuses'] == {k: dict(count=n, more=False) for k, n in dict(pending=2, running=1, completed=1, completed_with_warnings=0, failed=1, cancelled=1).items()}
    assert s['tasks']['product_import']['outcomes'] == dict(completed=1, failed=1) and {*s['tasks']['product_import']} == {'outcomes', 'wait', 'duration'} and s['tasks']['product_import']['duration']['n'] == 2
    assert sum(many.c.get(f'{at}/statistics?sample=1').json()['tasks']['product_import']['outcomes'].values()) == 1
    for v in ('0', '-1', 'x', '1e3', '100001', '٣'): said(many.c.get(f'{at}/statistics', params=dict(sample=v)), 422, 'invalid', 'sample')

def test_health_is_open_to_all(new_sqlite, new_web):
    w = new_web(new_sqlite(), tester=False)
    c = w.client(None)
    assert (r := c.get('/api/v1/health')).status_code == 200 and r.json() == dict(status='ok')
    w.jobs.runner.stop()
    assert (r := c.get('/api/v1/health')).status_code == 503 and r.json() == dict(status='stopping')

# --- Idempotency

def test_the_same_key_is_the_same_job(web):
    def post(key, at=start, **args): return web.c.post(at, json=args, headers={'Idempotency-Key': key})
    first = post('k', path='a.csv')
    assert post('k', path='a.csv').json() == first.json() and post('k2', path='a.csv').json()['job_id'] != first.json()['job_id']
    p = said(post('k', path='b.csv'), 422, 'invalid', "Idempotency-Key 'k'")
    assert p['job_id'] == first.json()['job_id']
    web.jt.drain()
    assert post('k', path='a.csv').json() == first.json() | dict(status='completed') and len(ids(web.c.get(at))) == 2
    web.c.delete(first.headers['location'])
    assert post('k', path='a.csv').json()['job_id'] != first.json()['job_id']
    assert post('k', '/api/v1/users/report', n=1).status_code == 202  # of another task

def test_the_same_arguments_in_another_order_are_the_same(web):
    def post(text): return web.c.post(start, content=text, headers={'Idempotency-Key': 'k', 'Content-Type': 'application/json'})
    first = post('{"path": "a.csv", "limit": 3}')
    again = post('{"limit":3,"path":"a.csv"}')
    assert again.status_code == 202 and again.json() == first.json(), again.text

def test_twenty_at_once_with_one_key_are_one_job(web):
    gate = threading.Barrier(20)
    def post(n): gate.wait(30); return web.c.post(start, json=dict(path='a.csv'), headers={'Idempotency-Key': 'k'})
    with ThreadPoolExecutor(20) as pool: got = list(pool.map(post, range(20)))
    assert {r.status_code for r in got} == {202} and len({r.json()['job_id'] for r in got}) == 1 == len(ids(web.c.get(at)))

def test_keys(lite, subtests):
    def post(key): return lite.c.post(start, json=dict(path='a'), headers={'Idempotency-Key': key})
    for key in ('', 'k'*129, 'a\tb', b'\x85', b'\xa0'):
        with subtests.test(no=key): said(post(key), 422, 'invalid', 'Idempotency-Key')
    assert ids(lite.c.get(at)) == []
    for key in ('k'*128, '"', "'; DROP TABLE", b'\xf6', '%00'):
        with subtests.test(key=key): assert len({post(key).json()['job_id'] for _ in range(2)}) == 1

# --- Refusals

def js(text, **headers): return dict(content=text, headers={'Content-Type': 'application/json'} | headers)

wrong = dict(
    form=(dict(data=dict(path='a')), 415, None), text=(dict(content='path=a', headers={'Content-Type': 'text/plain'}), 415, None), untyped=(dict(content=b'{"path":"a"}'), 415, None), file=(dict(files=dict(path=b'a')), 415, None),
    chunked_form=(dict(content=iter([b'path=a']), headers={'Content-Type': 'application/x-www-form-urlencoded'}), 415, None), chunked_text=(dict(content=iter([b'path=a']), headers={'Content-Type': 'text/plain'}), 415, None),
    no_boundary=(dict(content='x', headers={'Content-Type': 'multipart/form-data'}), 415, None), no_end=(dict(content='--b\r\nx', headers={'Content-Type': 'multipart/form-data; boundary=b'}), 415, None),
    not_json=(js('{"path":'), 400, None), empty_json=(js(' '), 400, None), bytes=(js(b'\xff\xfe\xfd'), 400, None), deep=(js('['*200_000), 400, None), digits=(js('{"limit":' + '9'*5000 + '}'), 400, None), nan=(js('{"path":NaN}'), 422, 'invalid'),
    list=(js('[1]'), 422, 'invalid'), null=(js('null'), 422, 'invalid'), string=(js('"x"'), 422, 'invalid'), missing=(js('{}'), 422, 'invalid'), nothing=({}, 422, 'invalid'), typ=(js('{"path":5}'), 422, 'invalid'), extra=(js('{"path":"a","nope":1}'), 422, 'invalid'), option=(js('{"path":"a","queue":"x"}'), 422, 'invalid'),
    query=(dict(json=dict(path='a'), params=dict(limit=1)), 422, 'invalid'), large=(dict(json=dict(path='x'*1_100_000)), 413, 'too-large'), grows=(js(json.dumps(dict(path='ö'*400_000), ensure_ascii=False).encode()), 413, 'too-large'), big_form=(dict(data=dict(path='x'*1_100_000)), 413, 'too-large'))

def test_what_cannot_be_started(lite, subtests):
    for name, (kw, status, kind) in wrong.items():
        with subtests.test(name): said(lite.c.post(start, **kw), status, kind)
    assert ids(lite.c.get(at)) == []

not_asked = [(at, dict(nope=1)), (at, dict(job_type='x')), (at, dict(sort='id')), (f'{at}/running', dict(cursor='x')), (at, dict(limit=0)), (at, dict(limit=501)), (at, dict(limit='-1')), (at, dict(limit='ten')), (at, dict(limit='9'*5000)), (at, dict(status='dead')), (at, dict(status='failed,dead')),
    (at, dict(since='yesterday')), (at, dict(until='2026-13-01')), (at, dict(since='0001-01-01T00:00:00+14:00')), (at, dict(q='x'*201)), (at, dict(q='\0')), (at, dict(tag='a,b')), (at, dict(cursor='x')), (at, dict(cursor='W10')), (at, dict(cursor=base64.urlsafe_b64encode(b'['*3000).decode())),
    (at, dict(task_type=' '))]

def test_what_cannot_be_asked(lite, subtests):
    for path, query in not_asked:
        with subtests.test(str(query)[:60]): assert len(said(lite.c.get(path, params=query), 422, 'invalid', min(query))['detail']) < 400

nowhere = [('GET', '/api/v1/nothing', 404), ('POST', '/api/v1/catalog/no-such-task', 404), ('GET', start, 405), ('PUT', at, 405), ('DELETE', f'{at}/bulk', 404), ('GET', f'{at}/x/cancel', 405), ('GET', f'{at}/a%2Fb', 404), ('GET', f'{at}/%00', 404), ('GET', f'{at}/{"x"*5000}', 404), ('GET', f'{at}/%ff%fe', 404)]

def test_what_is_not_there(lite, subtests):
    for method, path, status in nowhere:
        with subtests.test(f'{method} {path}'[:60]):
            r = lite.c.request(method, path)
            assert (r.status_code, r.headers['content-type'], r.json()['status']) == (status, 'application/problem+json', status) and len(r.content) < 1000, r.text[:200]

def test_what_a_query_says_is_no_argument(web):  # FastHTML puts the query's parameters into the JSON body it has read
    id, admin, query = web.start('a.csv'), web.client('admin'), dict(tenant='acme')
    web.jt.drain()
    def done(r): web.jt.drain(); assert r.status_code == 202, r.text; return web.c.get(f"{at}/{r.json()['job_id']}").json()['result']
    assert done(admin.post(start, params=query, json=dict(path='b.csv'))) == dict(path='b.csv', limit=None)
    assert done(admin.post(f'{at}/{id}/rerun', params=query, json=dict(limit=3))) == dict(path='a.csv', limit=3)
    assert admin.post(f'{at}/bulk', params=query, json=dict(action='cancel', everything=True)).json() == dict(action='cancel', count=0, dry_run=False)
    r = web.c.post(f'{at}/{id}/rerun', params=dict(path='other.csv'), json=dict(limit=4))
    assert r.status_code == 422 or done(r) == dict(path='a.csv', limit=4)
    assert web.c.post(f'{at}/bulk', params=dict(everything='1'), json=dict(action='delete')).status_code == 422

def test_routes_of_the_apps_own_are_left_alone(new_sqlite, new_web):
    async def uploads(req): return JSONResponse(len(await req.body()))
    c = new_web(new_sqlite(), own=lambda app: app.route('/api/v1/uploads', methods=['POST'])(uploads)).c
    assert c.post('/api/v1/uploads', content=b'x'*2_000_000).json() == 2_000_000
    assert c.post('/api/v1/uploads', content='[1]', headers={'Content-Type': 'text/plain+json'}).json() == 3

def test_who_may_do_what(new_sqlite, new_web):
    w = new_web(new_sqlite(), new_sqlite())
    id, view, other, admin = w.start(), w.client('view'), w.client('other'), w.client('admin')
    assert ids(view.get(at)) == [id] and view.get(f'{at}/{id}').status_code == view.get(f'{at}/statistics').status_code == 200
    for r in (view.post(start, json=dict(path='a')), view.delete(f'{at}/{id}'), *(view.post(f'{at}/{id}/{what}') for what in ('cancel', 'retry', 'rerun')), view.post(f'{at}/bulk', json=dict(action='cancel', everything=True))): said(r, 403, text='operator')
    assert ids(other.get(at)) == []
    for r in (other.get(f'{at}/{id}'), other.post(f'{at}/{id}/cancel'), other.delete(f'{at}/{id}'), other.post(f'{at}/{id}/rerun'), other.get(at, params=dict(tenant='acme')), admin.get(at), admin.get(at, params=dict(tenant='nobody')), admin.get(at, params=dict(tenant='\0'))): said(r, 404, 'not-found')
    for token, text in ((None, 'signed in'), ('guess', 'not known'), ('', 'not known'), ('ö'.encode(), 'not known')):
        r = w.client(None).get(at, headers={} if token is None else {'Authorization': b'Bearer ' + (token if isinstance(token, bytes) else token.encode())})
        said(r, 401, text=text)
        assert r.headers['www-authenticate'].startswith('Bearer')
    started = admin.post(start, params=dict(tenant='acme'), json=dict(path='a'))
    assert started.status_code == 202, started.text
    assert started.headers['location'].endswith('?tenant=acme') and admin.get(started.headers['location']).status_code == 200 and w.c.get(f"{at}/{started.json()['job_id']}").status_code == 200
    assert 'tenant=acme' in admin.get(at, params=dict(tenant='acme', limit=1)).headers['link']

def test_a_page_of_another_site_changes_nothing(new_sqlite, new_web):
    w = new_web(new_sqlite(), role=lambda req: 'admin', tenant=lambda req: 'acme')
    c = w.client(None)
    for headers in ({'Origin': 'https://evil.example'}, {'Sec-Fetch-Site': 'cross-site'}, {'Origin': 'null'}): said(c.post(start, json=dict(path='a'), headers=headers), 403, text='another site')
    assert c.post(start, data=dict(path='a')).status_code in (403, 415)
    assert c.post(start, json=dict(path='a'), headers={'Origin': 'http://testserver', 'Sec-Fetch-Site': 'same-origin'}).status_code == 202 and len(ids(c.get(at))) == 1

def test_too_many_calls(new_sqlite, new_web):
    w = new_web(new_sqlite(), rate=(3, 60))
    assert [w.c.get(at).status_code for _ in range(5)] == [200]*3 + [429]*2
    r = w.c.post(start, json=dict(path='a'))
    said(r, 429, text='3 requests')
    assert 1 <= int(r.headers['retry-after']) <= 60 and w.client('view').get(at).status_code == 200 and w.client(None).get('/api/v1/health').status_code == 200

def test_a_full_quota(web):
    rules_of(web.host).set(tenant='acme', pending=2)
    wait_until(lambda: web.jt.engine.limits(web.m.store).pending == 2)
    one, _ = web.start('1'), web.start('2')
    for r in (web.c.post(start, json=dict(path='3')), web.c.post(f'{at}/{one}/rerun')):
        said(r, 429, 'quota-exceeded', 'may have 2')
        assert int(r.headers['retry-after']) > 0
    assert len(ids(web.c.get(at))) == 2
    web.jt.drain()
    assert web.c.post(start, json=dict(path='3')).status_code == 202

def test_a_closed_queue(web):
    rules_of(web.host).set(queue='default', mode='draining')
    wait_until(lambda: web.jt.engine.limits(web.m.store).draining)
    r = web.c.post(start, json=dict(path='a'))
    said(r, 503, 'unavailable', 'drained')
    assert int(r.headers['retry-after']) > 0

def test_a_busy_database(web):
    id = web.start()
    lite = web.url.startswith('sqlite')
    own = sqlite3.connect(sa.make_url(web.url).database, isolation_level=None) if lite else psycopg.connect(web.url)
    own.execute('BEGIN IMMEDIATE' if lite else 'LOCK TABLE tenant_jobs IN EXCLUSIVE MODE')
    for r in (web.c.post(start, json=dict(path='b')), web.c.post(f'{at}/{id}/cancel'), web.c.delete(f'{at}/{id}'), web.c.post(f'{at}/bulk', json=dict(action='cancel', everything=True))):
        p = said(r, 503, 'unavailable', 'try again')
        assert int(r.headers['retry-after']) > 0 and web.url.rpartition('/')[2] not in p['detail']
    assert ids(web.c.get(at)) == [id] and web.c.get(f'{at}/{id}').json()['status'] == 'pending'  # reading waits for nobody
    own.rollback() if not lite else own.execute('ROLLBACK')
    own.close()
    assert web.c.post(start, json=dict(path='b')).status_code == 202 and web.c.post(f'{at}/{id}/cancel').status_code == 200

def test_a_suspended_tenant_takes_nothing_new_and_shows_what_it_has(web):
    job = web.start()
    web.host.set_state('acme', 'paused')
    web.jobs.directory._known.clear()
    p = said(web.c.post(start, json=dict(path='b.csv')), 409, 'wrong-state', "'acme' is suspended")
    said(web.c.post(f'{at}/{job}/rerun'), 409, 'wrong-state', "'acme' is suspended")
    assert 'nothing was submitted' in p['detail'] and [j.id for j in web.m.list_jobs()] == [job] and web.c.get(f'{at}/{job}').status_code == 200
    web.host.set_state('acme', 'active')
    web.jobs.directory._known.clear()
    assert web.c.post(start, json=dict(path='b.csv')).status_code == 202

# --- What a row may hold

@pytest.mark.parametrize('result', ['{"file": "caf\\udce9.csv", "\\ud83d": ["\\ud83d"]}', '"\\ud83d"', '{"a": NaN, "b": [Infinity, 1e999]}', 'NaN'])
def test_what_no_response_can_carry_is_shown_all_the_same(lite, result):
    "Half of an emoji, the name of a file that is no UTF-8, numbers that only Python takes for JSON"
    id = lite.c.post(start, content=b'{"path": "\\ud800"}', headers={'Content-Type': 'application/json'}).json()['job_id']
    lite.jt.drain()
    put(lite, id, result=result, details=result)
    for path in (at, f'{at}/{id}', f'{at}/running'): assert lite.c.get(path).status_code == 200, path
    admin = lite.client('admin')
    for path in ('/jobs/list', f'/jobs/job/{id}', '/jobs', f'/jobs/-/progress/{id}', '/jobs/-/list'): assert admin.get(path, params=dict(tenant='acme')).status_code == 200, path

# --- Who did what

def test_a_user_may_be_a_number(new_sqlite, new_web):
    w = new_web(new_sqlite(), role=lambda req: 'operator', user=lambda req: 5, tenant=lambda req: 'acme')
    id = w.start()
    w.m.cancel(id)
    assert w.client(None).delete(f'{at}/{id}').status_code == 204
    assert [(e.by, e.action) for e in w.jobs.audit.entries('acme')] == [('5', 'delete')]

@pytest.mark.parametrize('error', [DatabaseBusy('locked'), MemoryError()])
def test_a_bulk_act_that_is_cut_off_says_so_and_is_in_the_audit(web, monkeypatch, error):
    for n in range(5): web.m.cancel(web.start())
    act, write, n = Store.act_on_all, Store.write, []
    def late(self, op):
        n.append(1)
        if len(n) > 2: raise error
        return write(self, op)
    def one_by_one(self, *args):
        monkeypatch.setattr(Store, 'write', late)
        try: return act(self, *args, each=1)
        finally: monkeypatch.setattr(Store, 'write', write)
    monkeypatch.setattr(Marks, 'decided', lambda self: None)  # it writes, too
    monkeypatch.setattr(Store, 'act_on_all', one_by_one)
    def delete(): return web.c.post(f'{at}/bulk', json=dict(action='delete', filter=dict(status='cancelled')))
    if isinstance(error, MemoryError): assert delete().status_code == 500
    else:
        p = said(delete(), 503, 'unavailable')
        assert 'Nothing was changed' not in p['detail'] and 'look first' in p['detail']
    assert len(web.m.list_jobs()) == 3
    assert [(e.action, e.what) for e in web.jobs.audit.entries('acme')] == [('bulk', "delete: 2 jobs with {'status': 'cancelled'}, and then it failed")]
    monkeypatch.undo()
    assert web.c.post(f'{at}/bulk', json=dict(action='delete', filter=dict(queue='50 %s'))).json()['count'] == 0
    assert web.jobs.audit.entries('acme')[0].what == "delete: 0 jobs with {'queue': '50 %s'}"

def test_a_task_that_is_unique_by_some_arguments_gives_the_job_that_is_there(web):
    first = web.c.post('/api/v1/stock/stock-sync', json=dict(account=7))
    again = web.c.post('/api/v1/stock/stock-sync', json=dict(account=7, full=True))
    assert (first.status_code, again.status_code) == (202, 202) and first.json()['job_id'] == again.json()['job_id']

def test_a_banner_is_asked_for_what_no_database_can_hold(web):
    id = web.start()
    for query in (f'seen=%00,{id}&types=x', f'seen=%00,{id}&types=%00,x', f'seen=%ed%a0%80,{id}&types=x'): r = web.c.get(f'/jobs/-/banner?{query}'); assert r.status_code == 200 and r.text.count('fs-line') == 1, query
