"Who may see and do what on the web: every route, as a hostile tenant, a hostile site and a hostile payload would try it."
import asyncio, itertools, json, re, shutil, threading, time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, urlsplit
import pytest
import sqlalchemy as sa
from bs4 import BeautifulSoup
from fastsql import Database
from fasthtml.common import FastHTML
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
import fh_saas.web.live as live
from fh_saas.db_host import HostDatabase, catalog_table
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.commit import Committer
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tenancy import rules_of
from conftest import forge
from conftest import forge
from fh_saas.testing import JobTester
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.web.access import Access
from fh_saas.web.components import JobBanner, JobButton, JobList, JobProgress, JobStatus
from fh_saas.web.setup import setup_jobs

API = '/api/v1/admin/background-tasks'
roles = ('viewer', 'operator', 'admin')
nobody = '0'*32  # an id that no job has
open_to_all = {'/jobs/-/style', '/jobs/-/script', '/api/v1/openapi.json', '/api/v1/health'}
admins_only = {'/jobs/workers', '/jobs/workers/ask', '/jobs/workers/queue', '/jobs/workers/rule', '/jobs/tenants', '/jobs/tenants/act'}
refusals = ('another site', 'too old', 'takes the role', 'Sign in again', 'nobody is signed in', 'shown to this machine only')

def sync(path:str='x', password:str='default-of-sync'): return dict(n=1)

class Web:
    "An app with two tenants, and a session for each user"
    def __init__(self, tmp, **kw):
        self.host = HostDatabase(f'sqlite:///{tmp}/host.db', synchronous='NORMAL')
        self.dbs = {t: get_or_create_tenant_db(t, f'{t.title()} Ltd', self.host) for t in ('acme', 'globex')}
        self.m = {t: BackgroundTaskManager(d) for t, d in self.dbs.items()}
        self.users = {f'{t}-{r}': (t, r) for t in self.dbs for r in roles[:2]} | {'root': (None, 'admin')}
        tokens = {f'token-{u}': Access(r, t, u) for u, (t, r) in self.users.items()}
        def of(n): return lambda req: self.users.get(req.session.get('u'), (None, None))[n]
        self.app = FastHTML(secret_key='x', title='App')
        self.jobs = setup_jobs(self.app, self.host, Settings(concurrency=0), **dict(tenant=of(0), role=of(1), user=lambda req: req.session.get('u'), tokens=tokens, tasks=dict(catalog=[sync])) | kw)
        @self.app.route('/in/{u}', methods=['GET'])
        def sign_in(u:str, session): session['u'] = u; return 'in'

    def client(self, user=None, token=False, **kw):
        "A browser with a session, which knows its token; or a script"
        c = TestClient(self.app, follow_redirects=False, **kw)
        c.csrf = ''
        if user and token: c.headers['Authorization'] = f'Bearer token-{user}'
        elif user:
            c.get(f'/in/{user}')
            id = self.m['acme'].submit('form', sync)[0] if user == 'root' else None
            page = c.get('/jobs/list', params=dict(tenant='acme') if id else {})
            found = BeautifulSoup(page.text, 'html.parser').find('input', {'name': 'csrf'})
            c.csrf = found['value'] if found else ''
            if id: self.m['acme'].cancel(id); self.m['acme'].delete(id)
        return c

    def routes(self):
        for r in self.jobs.routes:
            for method in sorted({*r.methods} - {'HEAD'}): yield method, r.path

    def gated(self): return [x for x in self.routes() if x[1] not in open_to_all]

    def everything(self):
        "All that an act could change"
        q = lambda db, sql: [tuple(r.values()) for r in db.q(sql)]
        return [[(t.id, t.state, t.held) for t in self.host.tenants()]] + [q(d, 'SELECT id, status, cancel_requested_at, payload, retry_count FROM tenant_jobs ORDER BY id') for d in self.dbs.values()] + [len(self.jobs.audit.entries(limit=1000))]

    def set(self, tenant, id, **values):
        d = self.dbs[tenant]
        d.conn.execute(sa.text(f"UPDATE tenant_jobs SET {', '.join(f'{k}=:{k}' for k in values)} WHERE id=:id"), dict(values, id=id))
        d.conn.commit()

    def close(self):
        for d in self.dbs.values(): d.close()
        self.host.close()

@pytest.fixture
def new_web(tmp_path):
    with JobTester() as tester:
        made = []
        def make(**kw):
            made.append(w := Web(tmp_path, **kw))
            w.tester = tester
            return w
        yield make
        for w in made: w.close()

@pytest.fixture
def web(new_web): return new_web()

@pytest.fixture
def touched(monkeypatch):
    "The files of databases to which anything was said"
    found = set()
    for name in ('cursor', 'write'):
        def spy(self, *a, _f=getattr(Committer, name), **kw): found.add(str(self.url.database)); return _f(self, *a, **kw)
        monkeypatch.setattr(Committer, name, spy)
    def heard(conn, *a): found.add(str(conn.engine.url.database))
    sa.event.listen(sa.Engine, 'before_cursor_execute', heard)
    yield found
    sa.event.remove(sa.Engine, 'before_cursor_execute', heard)

def ask(c, method, path, id='', params=None, form=None, **kw):
    "One request as this user's page or script makes it"
    url = path.replace('{job_id}', id)
    if method == 'GET': return c.get(url, params=params, **kw)
    if method == 'DELETE': return c.request(method, url, params=params, **kw)
    if url.startswith('/api'): return c.post(url, params=params, **dict(json={}) | kw)
    if is_part(path) and 'referer' not in kw.get('headers', {}): kw['headers'] = {'HX-Request': 'true'} | kw.get('headers', {})
    return c.post(url, params=params, **dict(data=dict(csrf=c.csrf) | (form or {})) | kw)

def is_part(path): return path.startswith('/jobs/-/') and not path.endswith('stream')
def refused(x): return x.status_code in (401, 403) or any(s in x.text for s in refusals)

# --- Other tenants

secrets_of_globex = ('globex_type', 'Globex type', 'globex-payload', 'globex-message', 'globex-error', 'globex-tag', 'Globex Ltd')

@pytest.mark.parametrize('by', ['session', 'token'])
@pytest.mark.parametrize('role', ['viewer', 'operator'])
def test_another_tenants_jobs_are_not_there(web, touched, role, by):
    m, g = web.m['acme'], web.m['globex']
    theirs, _ = g.submit('globex_type', sync, path='globex-payload', tags=['globex-tag'])
    web.set('globex', theirs, status='failed', progress_message='globex-message', error_message='globex-error', completed_at='2026-01-01T00:00:00.000000')
    c = web.client(f'acme-{role}', by == 'token')
    mine, _ = m.submit('own', sync)
    def look(method, path, id, **params):
        if path.endswith('/stream'): params['jobs'] = id
        touched.clear()
        x = ask(c, method, path, id, params, dict(job=id, do='delete', id='globex', queue='q', worker='w'))
        assert not {t for t in touched if 'globex' in t}, (method, path, params)
        assert not [s for s in secrets_of_globex if s in x.text], (method, path, params, x.text)
        return x
    n = 0
    for method, path in web.gated():
        tries = [(mine, dict(tenant='globex')), (theirs, dict(tenant='globex')), (theirs, dict(tenant='GLOBEX'))]
        if '{job_id}' in path or path.endswith('/stream'): tries += [(theirs, {}), (theirs, dict(tenant='acme')), (theirs, dict(tenant=''))]
        for id, params in tries:
            n += 1
            x, want = look(method, path, id, **params), (286 if method == 'GET' else 200) if is_part(path) else 404
            foreign = params.get('tenant') in ('globex', 'GLOBEX')
            if not foreign and role == 'viewer' and method != 'GET': assert refused(x); continue
            if path.endswith('/stream') and not foreign: assert x.text == f'retry: 3000\n\nevent: job\ndata: {theirs}\n\nevent: end\ndata: \n\n'; continue
            assert x.status_code == want and (not is_part(path) or ('no tenant' if path.endswith('/start') else 'not there any more') in x.text), (method, path, params, x.status_code, x.text)
            # nor can one tell it from what does not exist
            other = look(method, path, nobody if id == theirs else id, **{k: 'nowhere' if v in ('globex', 'GLOBEX') else v for k, v in params.items()})
            def plain(x, p): return re.sub('value="[0-9a-f]{40}"', '', x.text).replace(theirs, 'ID').replace(nobody, 'ID').replace(p.get('tenant') or '#', 'T').replace('nowhere', 'T')
            assert (other.status_code, plain(other, params)) == (x.status_code, plain(x, params)), (method, path, params)
    assert n > 80 and g.get_job(theirs).status == 'failed' and m.get_job(mine).status == 'pending'
    # no id of it among what is listed, and an act on many leaves it alone
    for path in (API, f'{API}/running', f'{API}/statistics', '/jobs', '/jobs/list', '/jobs/-/list', '/jobs/-/banner', '/jobs/audit'):
        x = look('GET', path, '', **({'q': theirs} if path == API else {}))
        assert x.status_code == 200 and theirs not in x.text, path
    if role == 'operator' and by == 'session':
        ask(c, 'POST', '/jobs/list', form=dict(job=[theirs, mine], do='cancel'))
        assert m.get_job(mine).status == 'cancelled' and ask(c, 'POST', f'{API}/bulk', json=dict(action='delete', everything=True)).json()['count'] == 1
        assert g.get_job(theirs).status == 'failed'

@pytest.mark.parametrize('query,status', [('tenant=globex&tenant=acme', 200), ('tenant=acme&tenant=globex', 404), ('tenant=', 200), ('tenant=%67lobex', 404), ('tenant=acme%00', 404), ('tenant=%D0%B0cme', 404), ('tenant[]=globex', 422), ('tenant=acme%20', 404), ('Tenant=globex', 422), ('tenant=globex%0d%0aX:y', 404)])
def test_tricks_with_the_name_of_a_tenant(web, query, status):
    web.m['globex'].submit('globex_type', sync)
    x = web.client('acme-operator').get(f'{API}?{query}')
    assert x.status_code == status and 'globex_type' not in x.text and 'x' not in x.headers

def test_a_session_without_a_tenant_sees_no_audit(web):
    web.jobs.audit.note('them', 'globex', 'delete', 'their-job')
    for web.users['lost'] in ((None, 'operator'), ('', 'operator')):
        c = web.client('lost')
        for _, path in [x for x in web.gated() if x[0] == 'GET' and '{' not in x[1]]:
            x = c.get(path)
            assert 'their-job' not in x.text and 'globex' not in x.text, (web.users['lost'], path)  # '' is no tenant, and shows all tenants' acts

@pytest.fixture
def hostless(new_sqlite, touched):
    "An app without a host: each user's tenant is a database of its own"
    with JobTester():
        dbs = {u: Database(new_sqlite()) for u in 'ab'}
        app = FastHTML(secret_key='x')
        jobs = setup_jobs(app, None, Settings(concurrency=0), tenant=lambda req: dbs.get(req.headers['u']), role=lambda req: 'operator')
        yield SimpleNamespace(app=app, jobs=jobs, dbs=dbs, c={u: TestClient(app, headers=dict(u=u), follow_redirects=False) for u in (*dbs, 'lost')}, manager=lambda u: BackgroundTaskManager(dbs[u]))
        for d in dbs.values(): d.conn.close(); d.engine.dispose()

def test_without_a_host_nobody_falls_into_the_database_that_happens_to_be_open(hostless):
    id, _ = hostless.manager('a').submit('secret_of_a', sync)
    for u in ('lost', 'b'):
        for path in (API, f'{API}/{id}', '/jobs', '/jobs/list', f'/jobs/job/{id}', '/jobs/-/list', f'/jobs/-/progress/{id}'):
            x = hostless.c[u].get(path)
            assert 'ecret' not in x.text, (u, path)  # a user whose tenant is None gets the only open database
    hostless.manager('b').submit('b', sync)
    assert '?tenant=' not in hostless.c['lost'].get('/jobs').text  # and, with two, the names of all of them

def test_a_button_of_another_database_starts_nothing(hostless):
    @hostless.app.route('/home', methods=['GET'])
    def home(req): return JobButton(BackgroundTaskManager(hostless.dbs[req.headers['u']]), 'go', sync, path='/of/a')
    form = lambda u: {i['name']: i['value'] for i in BeautifulSoup(hostless.c[u].get('/home').text, 'html.parser').find_all('input')}
    a, b = form('a'), form('b')
    hostless.c['b'].post('/jobs/-/start', data=dict(csrf=b['csrf'], what=a['what']))
    assert hostless.manager('b').list_jobs() == []  # a plain Database has no tenant_id, so the button is everybody's
    hostless.c['b'].post('/jobs/-/start', data=b)
    assert len(hostless.manager('b').list_jobs()) == 1

def test_a_button_belongs_to_its_tenant_and_a_token_to_its_session(web):
    @web.app.route('/home/{t}', methods=['GET'])
    def home(t:str): return JobButton(web.m[t], 'go', sync, path='of-acme')
    a, again, g = web.client('acme-operator'), web.client('acme-operator'), web.client('globex-operator')
    what = BeautifulSoup(a.get('/home/acme').text, 'html.parser').find('input', {'name': 'what'})['value']
    assert a.csrf and len({a.csrf, again.csrf, g.csrf}) == 3
    for c, csrf, token in ((g, g.csrf, what), (again, a.csrf, what), (a, a.csrf, what[:-6] + ('A' if what[-6] != 'A' else 'B') + what[-5:]), (a, a.csrf, ''), (web.client('acme-viewer'), '', what)):
        c.post('/jobs/-/start', data=dict(csrf=csrf, what=token))
        assert web.m['acme'].list_jobs() == [] == web.m['globex'].list_jobs()
    a.post('/jobs/-/start', data=dict(csrf=a.csrf, what=what, path='another'))
    assert [web.m['acme'].arguments(j.id)['path'] for j in web.m['acme'].list_jobs()] == ['of-acme']

# --- Roles

@pytest.mark.parametrize('by', ['session', 'token'])
def test_every_route_takes_its_role(web, by):
    assert {p for _, p in web.routes()} > open_to_all | admins_only
    for role in (None, *roles):
        user = role and ('root' if role == 'admin' else f'acme-{role}')
        c = web.client(user, by == 'token')
        for method, path in web.routes():
            needs = 'admin' if path in admins_only else 'viewer' if method == 'GET' else 'operator'
            may = path in open_to_all or role is not None and roles.index(role) >= roles.index(needs)
            id, _ = web.m['acme'].submit('t', sync)
            if path.endswith('/stream'): web.m['acme'].cancel(id)
            before = web.everything()
            x = ask(c, method, path, id, dict(tenant='acme') | (dict(jobs=id) if path.endswith('/stream') else {}) if role == 'admin' else dict(jobs=id) if path.endswith('/stream') else {}, dict(do='suspend', id='nobody'))
            assert refused(x) == (not may) and (x.status_code < 500 or path.endswith('health')), (role, method, path, x.status_code, x.text[:200])
            if not may: assert web.everything() == before and 'Sync' not in x.text and id not in x.text.replace(f'jobs={id}', '')

def test_workers_are_not_for_tenants(web):
    id, _ = web.m['acme'].submit('t', sync)
    web.tester.drain()
    name = web.m['acme'].attempts(id)[0]['worker']
    assert name in web.client('root').get(f'/jobs/job/{id}', params=dict(tenant='acme')).text
    for role in roles[:2]: assert name not in web.client(f'acme-{role}').get(f'/jobs/job/{id}').text  # machine and process of the worker

# --- Other sites

foreign = dict(origin=dict(origin='https://evil.example'), null=dict(origin='null'), cross={'sec-fetch-site': 'cross-site'}, same={'sec-fetch-site': 'same-site'}, port=dict(origin='http://testserver:81'), longer=dict(origin='http://testserver.evil.example'), user=dict(origin='http://testserver@evil.example'),
    broken=dict(origin='http://['))  # an Origin that cannot be parsed is a 500

def test_no_other_site_changes_anything(web):
    c, other = web.client('root'), web.client('root')
    for method, path in web.gated():
        if method == 'GET': continue
        id, _ = web.m['acme'].submit('t', sync)
        before = web.everything()
        def hold(why, **kw):
            x = ask(c, method, path, id, dict(tenant='acme'), dict(job=id, do='delete', sure='1', id='acme', queue='q', mode='paused'), **kw)
            no_form = path.startswith('/api') and x.status_code == 415
            assert (x.status_code == 403 or is_part(path) and x.status_code == 200 or no_form) and (no_form or refused(x)) and web.everything() == before, (method, path, why, x.status_code, x.text[:200])
        for why, h in foreign.items():
            hold(why, headers=h)
            if method == 'POST': hold(f'{why} json', headers=h, json={}, **({} if path.startswith('/api') else dict(data=None)))
        if method == 'DELETE': continue  # no form can send it
        for csrf in ('', 'x', other.csrf, 'é', c.csrf + 'x'): hold(f'csrf {csrf}', data=dict(csrf=csrf, do='delete', job=id))  # other letters are a 500
        for kind in ('text/plain', 'multipart/form-data; boundary=x', 'application/x-www-form-urlencoded', ''): hold(kind, content=b'', headers={'content-type': kind}, **({'json': None} if path.startswith('/api') else {'data': None}))
        hold('file', files=dict(csrf=('f', c.csrf)), **({'json': None} if path.startswith('/api') else {'data': None}))  # a file is no token
    assert ask(c, 'POST', '/jobs/job/{job_id}/cancel', id, dict(tenant='acme'), headers={'origin': 'http://testserver', 'sec-fetch-site': 'same-origin'}).status_code == 303

@pytest.mark.parametrize('referer,to', [('http://testserver/shop?x=1', '/shop?x=1'), ('https://evil.example/x', None), ('http://testserver//evil.example', None), ('http://testserver/\t/evil.example', None), ('http://testserver/\\evil.example', '/%5Cevil.example'),
    ('http://testserver/a\\r\\nX: y', '/a%5Cr%5CnX:%20y'), ('//evil.example', None), ('javascript:alert(1)', None), ('http://[', None)])  # the last is a 500, after the act, which is not in the audit
def test_back_leads_to_this_site(web, referer, to):
    c, (id, _) = web.client('acme-operator'), web.m['acme'].submit('t', sync)
    x = ask(c, 'POST', '/jobs/-/job/{job_id}/cancel', id, headers=dict(referer=referer))
    assert x.status_code == 303 and x.headers['location'] == (to or f'/jobs/job/{id}') and [e.what for e in web.jobs.audit.entries()] == [id]

@pytest.mark.parametrize('method', ['HEAD', 'OPTIONS', 'PUT', 'PATCH', 'GET'])
def test_other_methods_change_nothing(web, method):
    c, (id, _) = web.client('acme-operator'), web.m['acme'].submit('t', sync)
    before = web.everything()
    for m, path in web.gated():
        if m != 'GET': assert c.request(method, path.replace('{job_id}', id), params=dict(csrf=c.csrf, _method='DELETE'), headers={'X-HTTP-Method-Override': 'POST'}).status_code < 500
    assert web.everything() == before

def test_what_an_address_says_is_no_argument(web):
    r, c = web.client('root'), web.client('acme-operator')
    id, _ = web.m['acme'].submit('t', sync, path='mine')
    assert ask(r, 'POST', '/api/v1/catalog/sync', params=dict(tenant='acme'), json=dict(path='p')).status_code == 202  # FastHTML puts the query into the JSON, so an admin who names a tenant cannot act
    assert ask(r, 'POST', f'{API}/{id}/cancel', params=dict(tenant='acme')).status_code == 200
    ask(c, 'POST', f'{API}/{id}/rerun', params=dict(path='theirs'))
    assert {web.m['acme'].arguments(j.id)['path'] for j in web.m['acme'].list_jobs()} == {'mine', 'p'}

# --- Without an authoriser

through = ('Forwarded', 'X-Forwarded-For', 'X-Forwarded-Host', 'X-Real-IP', 'X-Forwarded-Proto', 'Via', 'CF-Connecting-IP', 'True-Client-IP', 'X-Client-IP', 'X-Forwarded-Server', 'X-Forwarded-Port')  # from the fifth on they are not known

def test_an_app_that_says_nothing_answers_this_machine_only(new_web):
    web = new_web(tenant=None, role=None, user=None)
    id, _ = web.m['acme'].submit('acme_type', sync)
    def come(client='127.0.0.1', host='127.0.0.1:5001', **headers): return TestClient(web.app, base_url='http://testserver', client=(client, 1), headers=dict(host=host) | headers, follow_redirects=False)
    local = [dict(), dict(host='localhost'), dict(client='::1', host='[::1]:5001'), dict(host='LOCALHOST:80')]
    remote = [dict(client='10.0.0.9'), dict(client='testclient'), dict(client='0.0.0.0'), *(dict(host=h) for h in ('evil.example', '127.0.0.1.evil.example', '10.0.0.9', 'localhost.evil.example', '[', '')), *({h: 'x'} for h in through)]
    for kw in local:
        assert come(**kw).get('/jobs/tenants').status_code == 200
        with come(**kw).websocket_connect('/jobs/-/monitor?tenant=acme') as ws: assert ws.receive_json()['type'] == 'snapshot'
    for kw in remote:
        c = come(**kw)
        c.csrf, before = '', web.everything()
        for method, path in web.gated():
            x = ask(c, method, path, id, dict(tenant='acme', jobs=id))
            assert refused(x) and 'setup_jobs' in x.text and 'acme' not in x.text.lower(), (kw, method, path)
        with pytest.raises(WebSocketDisconnect), c.websocket_connect('/jobs/-/monitor?tenant=acme'): pass
        assert web.everything() == before

@pytest.mark.parametrize('gate', [dict(), dict(role=None, tenant=None), dict(role=None, tenant=None, tokens=None)])
def test_an_app_that_says_nothing_says_so_when_it_starts(new_web, caplog, gate):
    "Behind a proxy that speaks HTTP/1.1 and adds no header everybody is this machine"
    web = new_web(**gate)
    assert not caplog.records
    with TestClient(web.app): pass
    assert [r.levelname for r in caplog.records if 'give role= before a proxy' in r.getMessage()] == ['WARNING']*('role' in gate)

# --- Hostile text

evil = '''zzevil"'></title></textarea></pre></script></option><zz-tag zz-attr="1" onerror=alert(1)><script>alert(1)</script><img src=x onerror='alert(1)'>javascript:alert(1)&lt;zz-tag&gt;\u202e'''

def inspected(x, path):
    "The page, if all its elements and attributes are the app's own"
    soup = BeautifulSoup(x.text, 'html.parser')
    for el in soup.find_all(True):
        assert not el.name.startswith('zz') and el.name not in ('img', 'iframe', 'object', 'style', 'base'), (path, el)
        assert not [k for k in el.attrs if k.startswith(('zz', 'on')) or k in ('style', 'srcdoc')], (path, el)
        for k in ('href', 'src', 'action', 'formaction', 'hx-get', 'hx-post'): assert el.get(k, '/').startswith(('/', '#', '?', 'data:,')) or el[k] == '', (path, k, el[k])
        if el.name == 'script': assert el.get('src') and not el.text, path
    return soup

secured = {'content-security-policy': "default-src 'none'", 'x-frame-options': 'DENY', 'x-content-type-options': 'nosniff', 'referrer-policy': 'same-origin', 'cache-control': 'no-store'}

@pytest.fixture
def infested(web):
    "A job in each state, with hostile text in every field"
    m, ids = web.m['acme'], []
    begun = '2026-01-01T00:00:00.000000'
    for status in ('pending', 'running', 'completed', 'completed_with_warnings', 'failed', 'cancelled', 'pending'):
        id, _ = m.submit('t', sync, payload=dict(path=evil))
        o = json.dumps({evil: evil, 'list': [evil, {evil: evil}]})
        web.set('acme', id, status=status, job_type=evil, task=evil, queue=evil, triggered_by=evil, tags=f',{evil.replace(",", "")},', progress_message=evil, error_message=evil, error_log=f'Traceback\n  File "{evil}", line 1\n{evil}', result=evil if ids else o, details=o,
            retry_count=1, progress_percent=40, rerun_of=evil, concurrency_key=evil, unique_key=None, worker=evil, attempt=1, run_at='2999-01-01T00:00:00.000000' if ids else begun, started_at=begun, completed_at=None if status in ('pending', 'running') else '2026-01-01T00:00:01.000000')
        d, t = web.dbs['acme'], m.store.t
        d.conn.execute(t.attempts.insert().values(job_id=id, number=1, started_at=begun, ended_at=begun, outcome=evil, error=evil, worker=evil))
        d.conn.execute(t.logs.insert().values(job_id=id, attempt=1, line=1, at=begun, level='warning', message=evil, item=evil))
        d.conn.commit()
        ids.append(id)
    with web.host.engine.begin() as conn: conn.execute(catalog_table.update().values(name=evil, held=evil))
    web.users[evil] = ('acme', 'operator')
    web.jobs.audit.note(evil, 'acme', evil, evil)
    web.ids = ids
    return web

def soup(x): return BeautifulSoup(x.text, 'html.parser')
def said(el): return [s for s in el.stripped_strings if s != 'now' and not s.endswith(' ago')]

def test_a_list_of_some_jobs_asks_for_the_same_when_it_looks_again(web):
    m = web.m['acme']
    ids = [m.submit(t, sync, path=t, queue=q, tags=[tag], run_at='2100-01-01')[0] for t, q, tag in (('a', 'x', 'red'), ('b', 'x', 'blue'), ('a', 'y', 'blue'))]
    m.cancel(ids[0])
    new = m.rerun(ids[0])
    at = m.get_job(ids[1]).created_at
    searches = [dict(job_type='a'), dict(queue='x'), dict(tag='blue'), dict(status=('cancelled', 'failed')), dict(status='cancelled'), dict(rerun_of=ids[0]), dict(q=ids[2]), dict(since=at, until=m.get_job(new).created_at), dict(task='nobody')]
    for n, only in enumerate(searches):
        @web.app.route(f'/list{n}', methods=['GET'])
        def home(): return JobList(m, **only)
        c = web.client('acme-operator')
        first = soup(c.get(f'/list{n}')).select_one('.fs-jobs')
        again = soup(c.get(first['hx-get'])).select_one('.fs-jobs')
        assert said(again) == said(first) and again['hx-get'] == first['hx-get'] and len(first.select('tbody tr')) == len(m.store.page(**only)[0]), only

def test_a_banner_finds_the_jobs_of_its_page_behind_many_others(web):
    m = web.m['acme']
    id = m.submit('ours', sync, path='x', run_at='2100-01-01')[0]
    m.submit_many('other', sync, [dict(path='x')]*450, run_at='2100-01-01')
    @web.app.route('/page', methods=['GET'])
    def page(): return JobBanner(m, 'ours', 'theirs')
    @web.app.route('/since', methods=['GET'])
    def since(): return JobBanner(m, 'ours', at=m.get_job(id).created_at)
    c = web.client('acme-operator')
    assert len(soup(c.get('/page')).select('.fs-line')) == 1
    m.cancel(id)
    assert len(soup(c.get('/page')).select('.fs-line')) == 0 and len(soup(c.get('/since')).select('.fs-line')) == 1

def test_hostile_text_is_only_text(infested, monkeypatch):
    web, seen = infested, 0
    monkeypatch.setattr(live, 'recheck', 0.1)
    @web.app.route('/home', methods=['GET'])
    def home(): return JobList(web.m['acme'], live=True, q=evil[:100]), JobBanner(web.m['acme'], evil, seen=[evil, *web.ids]), JobButton(web.m['acme'], evil, sync, path=evil)
    hostile = dict(q=evil, cursor=evil, done=evil, n=evil, after=evil, before='~', types=evil, seen=evil, acts=evil, live='1')
    for user, params in (('acme-operator', {}), ('root', dict(tenant='acme'))):
        c = web.client(user)
        if user == 'acme-operator': web.users['acme-operator'] = ('acme', 'operator')
        for method, path in web.routes():
            if path.endswith('/stream'): continue
            for id in web.ids if '{' in path else [evil[:60]]:
                for extra in ({}, hostile):
                    if method == 'GET': x = ask(c, method, path, id, params | extra)
                    elif path == '/jobs/list': x = ask(c, method, path, '', params, dict(all='1', q='"' + evil[:60].replace('"', ''), do=evil) | extra)
                    elif path.endswith('/rerun') and 'api' not in path: x = ask(c, method, path, id, params, dict(shown='{}', arguments=evil))
                    else: continue
                    assert x.status_code < 500 or path.endswith('health'), (path, x.status_code)
                    if 'html' in (kind := x.headers['content-type']): inspected(x, path); seen += 1
                    elif path not in open_to_all: assert kind in ('application/json', 'application/problem+json') and json.loads(x.text) is not None, (path, kind)
                    if path not in open_to_all: assert 'no-store' in x.headers.get('cache-control', ''), path  # what the API says may be kept by a cache
                    if path not in open_to_all: assert x.headers.get('x-content-type-options') == 'nosniff', path
    soup = inspected(c.get('/jobs/list', params=dict(tenant='acme')), 'list')
    assert seen > 100 and 'zz-tag zz-attr' in soup.get_text() and all(e in inspected(c.get(f'/jobs/job/{web.ids[0]}', params=dict(tenant='acme')), 'job').get_text() for e in ('zz-tag', "'></title>"))
    inspected(SimpleNamespace(text=''.join(re.findall('<body.*', c.get('/home').text, re.S))), 'home')

@pytest.mark.parametrize('trick', ['\\delete?tenant=globex&x=', '/delete?tenant=globex&x=', '/../../list#', '%2Fdelete', '"><zz-tag>'])
def test_an_id_stays_its_part_of_an_address(web, trick):
    "A row whose id somebody has chosen; an admin's click means the job it stands beside, and the tenant of the page"
    theirs = web.m['globex'].submit('t', sync)[0]
    id, m, c = theirs + trick, web.m['acme'], web.client('root')
    web.set('acme', old := m.submit('t', sync)[0], triggered_by='job:../../logout', rerun_of=id)
    m.store.write(lambda cur, now: cur.execute(f"UPDATE tenant_jobs SET id = '{id}' WHERE id = '{old}'") and None)
    @web.app.route('/home', methods=['GET'])
    def home(): return JobProgress(m, id), JobStatus(m, id), JobList(m)
    part, at = quote(id, safe=''), dict(tenant='acme')
    pages = [c.get(p, params=at) for p in ('/jobs/list', '/home', *(f'/jobs/{x}/{part}' for x in ('job', '-/progress', '-/status') if not {*'/%'} & {*trick}))]  # a server, and twice the client of these tests, reads them before they are routed
    found = [u for x in pages for el in soup(x).find_all(True) for k in ('href', 'action', 'hx-get', 'hx-post') if theirs in (u := el.get(k, '')) or 'logout' in u]
    assert {x.status_code for x in pages} == {200} and len(found) >= 4, found
    for u in found: assert 'tenant=acme' in urlsplit(u).query and 'tenant=globex' not in urlsplit(u).query and (part in urlsplit(u).path.split('/') or '..%2F..%2Flogout' in u), u

def test_dashboard_pages_are_secured(infested):
    web, n = infested, 0
    for user, params in ((None, {}), ('acme-viewer', {}), ('acme-viewer', dict(tenant='globex')), ('root', dict(tenant='acme')), ('root', {})):
        c = web.client(user)
        for method, path in web.gated():
            if path.startswith('/api') or path.endswith('/stream') or method != 'GET': continue
            x = c.get(path.replace('{job_id}', web.ids[0]), params=params)
            if x.status_code == 303: continue
            n += 1
            for k, v in secured.items(): assert x.headers.get(k, '').startswith(v), (user, path, k)  # parts have no policy and can be framed, with their buttons
            assert 'unsafe' not in x.headers['content-security-policy'] and '*' not in x.headers['content-security-policy']
    assert n > 30

def test_nothing_gets_into_a_header(web):
    for n in range(3): web.m['acme'].submit('t', sync)
    c, r = web.client('acme-operator'), web.client('root')
    for text in ('a\r\nX-Evil: 1', 'é☃', '\x00', '"><a>', 'x'*5000):
        for x in (r.get(API, params=dict(tenant='acme', limit=1, since='2020-01-01', triggered_by=text)), c.get(API, params=dict(q=text, limit=1)), ask(c, 'POST', '/jobs/list', form=dict(do='delete', job='x', q=text)), c.get('/jobs', params=dict(tenant=text)), r.get('/jobs/list', params=dict(tenant=text)), ask(c, 'POST', '/jobs/-/job/{job_id}/cancel', 'x%0d%0aX-Evil:1')):
            assert x.status_code < 500 and 'x-evil' not in x.headers and all(v.isprintable() for v in x.headers.values())

# --- Streams and sockets

def heard(c, **kw): return c.get('/jobs/-/stream', **kw)

def test_streams_and_sockets_are_for_this_site(web):
    c, (id, _) = web.client('acme-viewer'), web.m['acme'].submit('t', sync)
    for why, h in foreign.items():
        assert heard(c, params=dict(jobs=id), headers=h).status_code == 403, why
        with pytest.raises(WebSocketDisconnect), c.websocket_connect('/jobs/-/monitor', headers=h): pass
    for user in (None, 'lost'):
        with pytest.raises(WebSocketDisconnect), web.client(user).websocket_connect('/jobs/-/monitor'): pass
        assert heard(web.client(user), params=dict(jobs=id)).status_code == 401
    assert web.jobs.streams == web.jobs.sockets == 0

def test_a_socket_tells_of_its_tenant_only(web, touched):
    mine, theirs = (web.m[t].submit(f'{t}_type', sync)[0] for t in ('acme', 'globex'))
    for t, id in (('acme', mine), ('globex', theirs)): web.set(t, id, status='running', started_at='2026-01-01T00:00:00.000000')
    touched.clear()
    for user in ('acme-viewer', 'acme-operator'):
        with pytest.raises(WebSocketDisconnect), web.client(user).websocket_connect('/jobs/-/monitor?tenant=globex'): pass
        with web.client(user).websocket_connect('/jobs/-/monitor') as ws: first = ws.receive_json()
        assert [j['id'] for j in first['running']] == [mine] and 'globex' not in json.dumps(first)
    assert not {t for t in touched if 'globex' in t}

@pytest.mark.parametrize('end', ['role', 'tenant', 'token'])
def test_streams_and_sockets_end_with_the_right(new_web, monkeypatch, end):
    granted = dict(t=Access('viewer', 'acme', 'script'))
    web = new_web(tokens=granted.get) if end == 'token' else new_web()
    monkeypatch.setattr(live, 'recheck', 0.2)
    monkeypatch.setattr(live, 'every', 0.1)
    id, _ = web.m['acme'].submit('t', sync)
    c = web.client('acme-viewer') if end != 'token' else web.client()
    if end == 'token': c.headers['Authorization'] = 'Bearer t'
    def grant(): granted['t'] = Access('viewer', 'acme', 'script'); web.users['acme-viewer'] = ('acme', 'viewer')
    def take():
        if end == 'token': granted.pop('t')
        else: web.users['acme-viewer'] = (None, None) if end == 'role' else ('globex', 'viewer')
    for kind in ('stream', 'socket'):
        grant()
        (timer := threading.Timer(0.4, take)).start()
        begun = time.monotonic()
        if kind == 'stream': assert heard(c, params=dict(jobs=id)).text.endswith('event: end\ndata: \n\n')
        else:
            with c.websocket_connect('/jobs/-/monitor') as ws:
                with pytest.raises(WebSocketDisconnect) as e:
                    while True: ws.receive_json()
                assert e.value.code == 1008
        assert 0.3 < time.monotonic() - begun < 5, kind
        timer.join()
    assert web.jobs.streams == 0

def test_one_user_does_not_take_all_sockets(web, monkeypatch):
    monkeypatch.setattr(live, 'most_streams', 8)
    with ExitStack() as held:
        for _ in range(8):
            try: held.enter_context(web.client('acme-viewer').websocket_connect('/jobs/-/monitor')).receive_json()
            except WebSocketDisconnect: break
        with web.client('globex-viewer').websocket_connect('/jobs/-/monitor') as ws: assert ws.receive_json()  # the limit is one for the whole process

@pytest.mark.parametrize('spec', ['2.3', '2.4'])
def test_a_stream_that_nobody_gets_is_given_back(new_web, spec):
    web = new_web(role=lambda req: 'viewer', tenant=lambda req: 'acme')
    id, _ = web.m['acme'].submit('t', sync)
    bodies = [dict(type='http.request', body=b'', more_body=False)]
    async def receive(): return bodies.pop() if bodies else await asyncio.sleep(60)
    async def send(m): raise OSError('the client has gone')
    async def main():
        scope = dict(type='http', asgi=dict(version='3.0', spec_version=spec), http_version='1.1', method='GET', path='/jobs/-/stream', raw_path=b'', query_string=f'jobs={id}'.encode(), headers=[(b'host', b'x')], client=('10.0.0.9', 1), server=('x', 80), scheme='http', root_path='')
        with pytest.raises(Exception): await web.app(scope, receive, send)
    asyncio.run(main())
    assert web.jobs.streams == 0 and not web.jobs.hub._watches  # the thousandth of these closes the door for all

# --- Limits

def test_rates(new_web):
    web = new_web(rate=(5, 60))
    c = web.client('acme-viewer', token=True)
    got = [c.get(f'{API}?limit=1') for _ in range(7)]
    assert [x.status_code for x in got] == [200]*5 + [429]*2 and 0 < int(got[-1].headers['retry-after']) <= 61
    assert web.client('globex-viewer', token=True).get(API).status_code == 200 == web.client('acme-operator', token=True).get(API).status_code
    assert ask(web.client('acme-operator', token=True), 'POST', f'{API}/bulk', json=dict(action='delete', everything=True)).status_code == 200

def test_who_guesses_tokens_is_not_told_of_a_right_one(new_web):
    web = new_web(rate=(5, 60))
    def come(token, host='10.0.0.1'): return TestClient(web.app, client=(host, 1), headers={'Authorization': f'Bearer {token}'} if token else {})
    def tried(host='10.0.0.1'):
        with come('token-acme-viewer', host).websocket_connect('/jobs/-/monitor') as ws: return ws.receive_json()['type']
    assert [come('').get(API).status_code for _ in range(9)] == [401]*5 + [429]*4 and come('token-acme-viewer').get('/jobs/list').status_code == 200  # to have no session is no guess
    assert tried() == 'snapshot'
    got = [come(f'guess {n}').get('/jobs/list').status_code for n in range(3)] + [come('guess').get(API).status_code for _ in range(4)]
    assert got == [401]*5 + [429]*2
    x = come('token-acme-viewer').get('/jobs/list')
    assert x.status_code == 429 and 0 < int(x.headers['retry-after']) <= 61
    with pytest.raises(WebSocketDisconnect): tried()
    assert come('token-acme-viewer', '10.0.0.2').get('/jobs/list').status_code == 200 and tried('10.0.0.2') == 'snapshot'
    browser = web.client('acme-viewer')
    assert [TestClient(web.app, client=('10.0.0.1', 1), cookies=browser.cookies).get('/jobs/list').status_code for _ in range(9)] == [200]*9

def test_a_socket_that_guesses_counts(new_web):
    web = new_web(rate=(5, 60))
    c = web.client()
    c.headers['Authorization'] = 'Bearer guess'
    for _ in range(5):
        with pytest.raises(WebSocketDisconnect), c.websocket_connect('/jobs/-/monitor'): pass
    assert web.client('acme-viewer', token=True).get('/jobs/list').status_code == 429

def test_what_a_stranger_sends_is_not_parsed(web, monkeypatch):
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, 'loads', lambda s, *a, **kw: parsed.append(len(s)) or loads(s, *a, **kw))
    o = json.dumps(dict(path=['x'*9_000]))
    for kind in ('application/json', 'application/json; charset=utf-8', 'application/problem+json'):
        for c, status in ((web.client(), 401), (web.client('acme-viewer', token=True), 403)):
            for path in (f'/api/v1/catalog/sync', f'{API}/{nobody}/rerun', '/jobs/list'): assert c.post(path, content=o, headers={'content-type': kind}).status_code == status
    assert not [n for n in parsed if n > 9_000]
    assert web.client('acme-operator', token=True).post('/api/v1/catalog/sync', content=o, headers={'content-type': 'application/json'}).status_code == 422 and [n for n in parsed if n > 9_000] == [len(o)]  # once

class Waits:
    "An async callable that `iscoroutinefunction` does not know"
    def __init__(self, said): self.said = said
    async def __call__(self, req): return self.said

@pytest.mark.parametrize('f', [Waits('anna'), lambda req: Waits('anna')(req), Waits('anna').__call__], ids=['object', 'lambda', 'method'])
def test_rates_of_a_user_whose_name_is_waited_for(new_web, f):
    web = new_web(user=f, tenant=Waits('acme'), role=Waits('viewer'), rate=(5, 60))
    c = web.client()
    assert [c.get(f'{API}?limit=1').status_code for _ in range(7)] == [200]*5 + [429]*2

def test_a_banner_goes_on_asking_for_each_job_it_shows(web):
    "More than five are shown if they were seen before, and none of them is taken for one that has ended"
    ids = [web.m['acme'].submit('t', sync)[0] for _ in range(7)]
    got = BeautifulSoup(web.client('acme-viewer').get('/jobs/-/banner', params=dict(live=1, seen=','.join(ids))).text, 'html.parser').div
    assert len(got.select('.fs-line')) == 7 and {*got['data-live'].split()} == {*ids} and 'every 30s' in got['hx-trigger']

@pytest.mark.parametrize('phase', [0, 1])
@pytest.mark.parametrize('seen', [True, False])
def test_a_banner_misses_no_job_that_changes_its_state_meanwhile(web, monkeypatch, phase, seen):
    "It is claimed, or given back, before each read"
    id, _ = web.m['acme'].submit('t', sync)
    c, store, cursor = web.client('acme-viewer'), web.m['acme'].store, Committer.cursor
    states = itertools.cycle(['running', 'pending'])
    for _ in range(phase): next(states)
    def spy(self, *a, **kw):
        if self.url == store.url: s = next(states); web.set('acme', id, status=s, claim_token='t' if s == 'running' else None)
        return cursor(self, *a, **kw)
    monkeypatch.setattr(Committer, 'cursor', spy)
    got = c.get('/jobs/-/banner', params=dict(live=1, seen=id if seen else '')).text
    assert f'data-live="{id}"' in got and 'every 30s' in got and got.count('fs-line') == 1

def test_a_watch_that_has_not_looked_yet_is_not_over():
    w = live.Watch({'a'})
    assert not w.over
    w.look({'a': None})
    assert w.over

def test_a_damaged_moment_ends_no_stream():
    "Another program has written the row"
    row = dict(dict.fromkeys(live._pulse), id='a', status='running', progress_percent=50, started_at='soon')
    assert json.loads(live.step(row)) == dict(id='a', percent=50, message='', left='')

def test_sizes(web):
    c, r = web.client('acme-operator'), web.client('root')
    id, _ = web.m['acme'].submit('t', sync)
    before = web.everything()
    for method, path in web.gated():
        if method != 'GET': assert ask(r, method, path, id, dict(tenant='acme'), content=b'x'*(1024*1024 + 1), **({} if method == 'DELETE' else {'json': None} if path.startswith('/api') else {'data': None})).status_code == 413
    many = ','.join(f'{n:032x}' for n in range(60))
    for path, params, status in (('/jobs/-/stream', dict(jobs=many), 422), ('/jobs/-/stream', dict(jobs=''), 422), ('/jobs/-/banner', dict(seen=many*8, types=','*3000), 200), (API, dict(limit=501), 422), (API, dict(limit=0), 422), (API, dict(limit='9'*5000), 422), (API, dict(limit='000000001' + '9'*10), 422),
        (f'{API}/statistics', dict(sample='000000001' + '9'*10), 422), (f'{API}/statistics', dict(sample='000000001' + '9'*5000), 422),  # only its first nine digits are looked at
        (API, dict(q='x'*15_000), 422), ('/jobs/list', dict(q='a:'*9_000), 422), ('/jobs/list', dict(q='"'*499), 422), ('/jobs/list', dict(done='delete', n='9'*5000), 200), ('/jobs/list', dict(done='delete', n='1', **{'not': '9'*5000}), 200),
        (API, dict(cursor='A'*15_000), 422), ('/jobs/-/list', dict(limit='9'*5000), 200), ('/jobs/audit', dict(before='x'*15_000), 200)):
        begun = time.monotonic()
        x = TestClient(web.app, raise_server_exceptions=False, cookies=c.cookies).get(path, params=params)
        assert x.status_code == status and time.monotonic() - begun < 3, (path, x.status_code, {k: v[:20] if isinstance(v, str) else v for k, v in params.items()})
    assert ask(c, 'POST', '/jobs/list', form=dict(do='delete', job=['x']*2000)).status_code in (400, 413, 422) and web.everything() == before

def test_odd_forms_are_no_errors_of_the_server(web):
    c, n = TestClient(web.app, raise_server_exceptions=False, cookies=web.client('root').cookies), 0
    names = 'do', 'q', 'job', 'all', 'sure', 'what', 'shown', 'arguments', 'worker', 'concurrency', 'queue', 'mode', 'id', 'csrf', 'action', 'filter'
    csrf = web.client('root')
    for method, path in web.gated():
        if method != 'POST': continue
        for v in (5, None, [], [1], {}, 'é', '\ud800', '9'*5000, True, '[1]', 'null'):
            id, _ = web.m['acme'].submit('t', sync)
            x = c.post(path.replace('{job_id}', id), params=dict(tenant='acme'), content=json.dumps(dict.fromkeys(names, v)), headers={'content-type': 'application/json'})
            assert x.status_code < 500 or x.status_code == 503 and 'unavailable' in x.text, (path, v)  # JSON where a form is meant is a 500
            n += 1
        if not path.startswith('/api'):
            x = TestClient(web.app, raise_server_exceptions=False, cookies=csrf.cookies).post(path.replace('{job_id}', id), params=dict(tenant='acme'), data=dict(csrf=csrf.csrf, do='delete'), files={k: ('f', b'x') for k in names if k not in ('csrf', 'do')})
            assert x.status_code < 500, (path, 'files')  # a file where text is meant, too
    assert n > 100

def test_a_search_that_is_cut_does_not_act_on_more(web):
    c = web.client('acme-operator')
    web.m['acme'].submit('a', sync, queue='mine')
    other, _ = web.m['acme'].submit('a', sync)
    q = 'status:pending' + ' '*500 + 'queue:mine'
    ask(c, 'POST', '/jobs/list', form=dict(q=q, do='delete', sure='1'))
    assert web.m['acme'].get_job(other).status == 'pending'  # what stands behind the 500th letter is left out without a word

def test_long_results_do_not_stop_a_list(web):
    id, _ = web.m['acme'].submit('t', sync)
    c, ended = web.client('acme-viewer', token=True), dict(status='completed', completed_at='2026-01-01T00:00:00.000000')
    for n, shown in ((2_000, 'text the quick'), (50_000, '<td>...</td>')):  # what is longer is not masked to show 200 letters of it: it is not read
        web.set('acme', id, **ended, result=json.dumps(dict(text='the quick brown fox '*n)))
        begun = time.process_time()
        assert shown in c.get('/jobs/-/list').text and time.process_time() - begun < 0.3

def test_a_secret_in_long_arguments_is_in_no_list(web):
    "They are not looked at for it: so no list has what came of them"
    id, _ = web.m['acme'].submit('t', sync, payload=dict(password='open sesame', path='x'*100_000))
    web.set('acme', id, status='completed', completed_at='2026-01-01T00:00:00.000000', result=json.dumps(dict(said='open sesame')), details='{}')
    c, viewer = web.client('acme-viewer'), web.client('acme-viewer', token=True)
    item, = viewer.get(API).json()['items']
    assert (item['left_out'], item['result'], item['details']) == (['result', 'details'], None, None)
    for path in ('/jobs/list', '/jobs/-/list', f'/jobs/-/banner?seen={id}', f'/jobs/job/{id}', f'/jobs/-/progress/{id}', f'{API}/{id}'): assert (x := (viewer if path.startswith(API) else c).get(path)).status_code == 200 and 'sesame' not in x.text, path
    assert viewer.get(f'{API}/{id}').json()['result'] == dict(said='***')

@pytest.mark.parametrize('depth', [1, 20, 60, 200])
def test_a_page_does_not_multiply_what_was_sent(web, depth):
    "With two spaces for each level, a number in sixty lists takes 124 characters"
    id, _ = web.m['acme'].submit('t', sync)
    nested = '['*depth + ','.join(['1']*100_000) + ']'*depth
    web.set('acme', id, status='completed', completed_at='2026-01-01T00:00:00.000000', payload=json.dumps(dict(path='a')).replace('"a"', nested), result=nested, details=f'{{"a":{nested}}}', error_log='x'*150_000)
    x = web.client('acme-operator').get(f'/jobs/job/{id}')
    assert x.status_code == 200 and len(x.text) < 1_300_000, len(x.text)  # all of the arguments twice, to be changed
    page = soup(x)
    assert [len(page.find(id=n).get_text()) for n in ('args', 'result', 'details', 'trace')] == [100_000]*4 and x.text.count('more characters are not shown') == 5 and '50,000 more characters' in x.text

@pytest.mark.parametrize('state', ['pending', 'running', 'completed'])
def test_an_odd_row_is_shown_as_well_as_it_can_be(web, state):
    m, c, at = web.m['acme'], web.client('acme-operator'), '2026-01-01T00:00:00.000000'
    ids = m.submit_many('t', sync, [{}]*400)
    with m.store.engine.begin() as conn: conn.execute(m.store.t.jobs.update().values(status=state, started_at=at, result='{}', completed_at=at if state == 'completed' else None))
    n = forge(m.store.url.database, ids)
    parts = ['/jobs', '/jobs/workers', f'{API}?limit=500', *(f'/jobs/-/banner?seen={",".join(ids[i:i + 20])}' for i in range(0, n, 20))]
    cursor = ''
    while cursor is not None:
        parts.append(f'/jobs/list?cursor={quote(cursor)}')
        _, cursor = m.store.page(50, cursor or None)
    for id in ids[:n]:
        parts += [f'/jobs/job/{id}', f'/jobs/-/progress/{id}', f'{API}/{id}']
    for id in ids[:n - 2]: m.get_job(id), m.attempts(id), m.logs(id)  # the last two have another id now
    with m.store.engine.begin() as conn: conn.execute(m.store.t.attempts.insert(), [dict(job_id=ids[n], number=k, outcome='failed', started_at=at, ended_at=at, waited=v) for k, v in enumerate((float('inf'), -float('inf'), 1e308, 1e308))])
    for path in (*parts, f'{API}/statistics', f'/jobs/job/{ids[n]}'): assert c.get(path).status_code < 500, path

def test_a_result_of_many_members_shows_the_first(web):
    id, _ = web.m['acme'].submit('t', sync)
    web.set('acme', id, status='completed', completed_at='2026-01-01T00:00:00.000000', result=json.dumps({f'k{n}': n for n in range(20_000)}))
    for path in (f'/jobs/job/{id}', f'/jobs/-/progress/{id}'):
        page = soup(web.client('acme-viewer').get(path))
        assert len(page.select('.fs-result dt')) == 101 and 'and 19,900 more' in page.get_text(), path

def test_short_arguments_are_in_lines_and_long_ones_can_be_changed(web):
    id, _ = web.m['acme'].submit('t', sync, payload=dict(path='a'))
    c = web.client('acme-operator')
    assert soup(c.get(f'/jobs/job/{id}')).find(id='args').get_text() == '{\n  "path": "a"\n}'
    long, _ = web.m['acme'].submit('t', sync, payload=dict(path='ab'*60_000))
    form = soup(c.get(f'/jobs/job/{long}')).find(id='fs-again')
    sent = form.find('textarea').get_text()
    x = ask(c, 'POST', f'/jobs/job/{long}/rerun', form=dict(shown=form.find('input', {'name': 'shown'})['value'], arguments=sent.replace('ab'*60_000, 'b')))
    assert x.status_code == 303 and web.m['acme'].arguments(x.headers['location'].rpartition('/')[2]) == dict(path='b')

# --- Secrets

def test_secrets_are_masked_and_cannot_be_searched_for(web):
    id, _ = web.m['acme'].submit('t', sync, path='p', password='Hunter2-is-it')
    v = web.client('acme-viewer')
    for user in ('acme-viewer', 'acme-operator'):
        c = web.client(user)
        for method, path in web.gated():
            if method == 'GET' and not path.endswith('/stream') and path not in admins_only: assert 'unter2' not in ask(c, method, path, id).text, path
    assert v.get(API, params=dict(q=id)).json()['items'] and not v.get(API, params=dict(q='hunter2')).json()['items']  # letter by letter, a viewer reads the secret
    assert id not in v.get('/jobs/list', params=dict(q='hunter2')).text
    assert 'default-of-sync' not in web.client().get('/api/v1/openapi.json').text  # a default of an argument with a secret name, shown to everyone

# --- The audit

def test_each_act_is_in_the_audit_and_no_other(web):
    c, r, m = web.client('acme-operator'), web.client('root'), web.m['acme']
    def noted(): return [(e.by, e.tenant, e.action, e.what) for e in web.jobs.audit.entries(limit=1000)]
    def new(status='pending'):
        id, _ = m.submit('t', sync)
        if status != 'pending': web.set('acme', id, status=status, completed_at='2026-01-01T00:00:00.000000')
        return id
    for base in (API, '/jobs/job', '/jobs/-/job'):
        for action, status in (('cancel', 'pending'), ('retry', 'failed'), ('delete', 'failed'), ('rerun', 'failed')):
            id, n = new(status), len(noted())
            if base == API: x = ask(c, 'DELETE' if action == 'delete' else 'POST', f'{base}/{id}' + ('' if action == 'delete' else f'/{action}'))
            elif base == '/jobs/-/job' and action in ('delete', 'rerun'): continue
            else: x = ask(c, 'POST', f'{base}/{id}/{action}', form=dict(shown='{}', arguments='{}'))
            assert x.status_code < 400 and len(noted()) == n + 1 and noted()[0] == ('acme-operator', 'acme', action, id), (base, action)
    a, b, n = new(), new(), len(noted())
    ask(c, 'POST', '/jobs/list', form=dict(do='cancel', job=[a, b]))
    ask(c, 'POST', f'{API}/bulk', json=dict(action='delete', filter=dict(status='cancelled')))
    ask(r, 'POST', '/jobs/workers/queue', form=dict(queue='q', mode='paused'))
    ask(r, 'POST', '/jobs/tenants/act', form=dict(do='suspend', id='globex'))
    rules_of(web.host).set('globex', task='t', starts=2, period=60)
    ask(r, 'POST', '/jobs/workers/rule', form=dict(tenant='globex', task='t'))
    assert len(noted()) == n + 5 and a in noted()[4][3] and b in noted()[4][3] and {x[0] for x in noted()[:3]} == {'root'}
    assert noted()[0][1:] == (None, 'rule', 'taken away: tenant globex, task t: starts=2 period=60') and [r.queue for r in rules_of(web.host).all()] == ['q']

def test_rules_of_tenants_and_tasks_are_seen_and_taken_away(web):
    r, rules = web.client('root'), rules_of(web.host)
    assert 'There are none' in r.get('/jobs/workers').text
    rules.set('acme', mode='paused'); rules.set('*', task='<b>sync', starts=2, period=60); rules.set('globex', weight=0.5, pending=1_234_567)
    page = r.get('/jobs/workers').text
    own = page[page.index('Rules of tenants and tasks'):]
    assert own.index('mode=paused') < own.index('starts=2 period=60') and 'pending=1234567 weight=0.5' in own and '&lt;b&gt;sync' in own and '<b>sync' not in own
    def row(id): return (p := r.get('/jobs/tenants').text)[p.index(f'tenant-{id}'):].partition('</tr>')[0]
    assert 'fh-saas resume --tenant acme' in row('acme') and 'a rule' not in row('globex')
    assert ask(r, 'POST', '/jobs/workers/rule', form=dict(queue='q')).status_code == 422  # queues have a table of their own
    ask(r, 'POST', '/jobs/workers/rule', form=dict(tenant='acme'))
    ask(r, 'POST', '/jobs/workers/rule', form=dict(tenant='*', task='<b>sync'))
    assert [x.tenant for x in rules.all()] == ['globex'] and 'a rule' not in row('acme')
    n = len(web.jobs.audit.entries())
    assert ask(r, 'POST', '/jobs/workers/rule', form=dict(tenant='acme')).status_code == 303 and len(web.jobs.audit.entries()) == n  # somebody was quicker

def test_a_held_tenant_of_which_nothing_can_be_decided_here_says_what_to_do(web):
    "It said that the database cannot answer, and to try again"
    r = web.client('root')
    def act(id): return ask(r, 'POST', '/jobs/tenants/act', form=dict(do='release', id=id))
    assert (a := act('acme')).status_code == 409 and 'is not held' in a.text
    db = web.m['acme'].store
    assert web.host.hold('acme', 'its file was replaced')
    with db.cursor() as cur: cur.execute("INSERT INTO fh_saas_meta (key, value) VALUES ('tenant_id', 'globex') ON CONFLICT (key) DO UPDATE SET value = 'globex'")
    assert (a := act('acme')).status_code == 409 and 'fh-saas release acme --adopt' in a.text

def test_an_app_is_told_at_once_what_it_said_wrong():
    app = FastHTML(secret_key='x')
    for odd, said in ((dict(rate=5), 'calls, seconds'), (dict(rate=('x', 1)), 'calls, seconds'), (dict(rate=(0, 1)), 'calls, seconds'), (dict(tokens={5: Access('admin')}), 'int as a token'), (dict(tokens={'': Access('admin')}), 'empty'), (dict(local='/nowhere/at/all'), 'no folder')):
        before = len(app.routes)
        with pytest.raises((ValueError, TypeError), match=said): setup_jobs(app, None, Settings(concurrency=0), **odd)
        assert len(app.routes) == before
    setup_jobs(app, None, Settings(concurrency=0))

def test_what_only_an_admin_may_is_no_act_of_the_tenant_whose_page_was_open(web):
    rules_of(web.host).set('globex', weight=2)
    ask(web.client('root'), 'POST', '/jobs/workers/rule?tenant=acme', form=dict(tenant='globex'))
    assert [(e.tenant, e.action) for e in web.jobs.audit.entries()] == [(None, 'rule')]
    assert 'globex' not in web.client('acme-viewer').get('/jobs/audit').text

def test_what_was_refused_is_not_in_the_audit(web):
    c, v, m = web.client('acme-operator'), web.client('acme-viewer'), web.m['acme']
    done = m.submit('t', sync)[0]
    web.set('acme', done, status='completed', completed_at='2026-01-01T00:00:00.000000')
    theirs, _ = web.m['globex'].submit('t', sync)
    def entries(): return web.jobs.audit.entries()
    for base in (API, '/jobs/job', '/jobs/-/job'):
        for id in (done, theirs, nobody):
            for headers in ({}, {'HX-Request': 'true'}):
                ask(c, 'POST', f'{base}/{id}/retry', headers=headers)
                ask(v, 'POST', f'{base}/{id}/retry', headers=headers)
                assert entries() == [], (base, id, headers)  # a button by htmx that came too late
    ask(c, 'POST', '/jobs/list', form=dict(all='1', q='status:completed'))
    assert entries() == []  # to ask how many it would be is no act
    ask(c, 'POST', '/jobs/list', form=dict(do='retry', job=[done, theirs, 'nonsense']))
    assert entries() == []  # none of these was done
    assert ask(c, 'POST', '/jobs/list', form=dict(q='x y', do='delete', sure='1')).status_code == 422 and entries() == []

def test_the_audit_names_each_job_of_an_act_on_many(web):
    c, id = web.client('acme-operator'), web.m['acme'].submit('t', sync)[0]
    fill = [f'{n:060}' for n in range(40)]
    ask(c, 'POST', '/jobs/list', form=dict(do='delete', job=[*fill, id, *fill]))
    assert not web.m['acme'].list_jobs() and any(id in e.what for e in web.jobs.audit.entries())  # hidden in the middle of a long list, which is cut there
    many = [web.m['acme'].submit('t', sync)[0] for _ in range(60)]
    ask(c, 'POST', '/jobs/list', form=dict(do='delete', job=many))
    said = ' '.join(e.what for e in web.jobs.audit.entries())
    assert not web.m['acme'].list_jobs() and all(i in said for i in many)

def test_a_button_starts_nothing_for_a_tenant_that_is_suspended(web):
    @web.app.route('/home', methods=['GET'])
    def home(): return JobButton(web.m['acme'], 'go', sync, path='a')
    c = web.client('acme-operator')
    what = BeautifulSoup(c.get('/home').text, 'html.parser').find('input', {'name': 'what'})['value']
    web.host.set_state('acme', 'paused')
    web.jobs.directory._known.clear()
    x = c.post('/jobs/-/start', data=dict(csrf=c.csrf, what=what))
    assert x.status_code == 409 and 'takes no new jobs' in x.text and web.m['acme'].list_jobs() == []
    assert 'takes no new jobs' in c.post('/jobs/-/start', data=dict(csrf=c.csrf, what=what), headers={'HX-Request': 'true'}).text and web.m['acme'].list_jobs() == []
    id, _ = web.m['acme'].submit('t', sync, path='b')  # through a handle that was open before
    x = c.post(f'/jobs/job/{id}/rerun', data=dict(csrf=c.csrf, shown='{"path": "b"}', arguments='{"path": "b"}'))
    assert x.status_code == 409 and len(web.m['acme'].list_jobs()) == 1
    web.host.set_state('acme', 'active')
    web.jobs.directory._known.clear()
    c.post('/jobs/-/start', data=dict(csrf=c.csrf, what=what))
    assert len(web.m['acme'].list_jobs()) == 2
    deep, own = '['*50_000 + ']'*50_000, json.dumps(web.m['acme'].arguments(id))
    for sent in (dict(shown=deep, arguments=own), dict(shown=own, arguments=deep), dict(shown=own, arguments='{"path": ' + deep + '}'), dict(shown=own, arguments='{')):
        assert c.post(f'/jobs/job/{id}/rerun', data=sent | dict(csrf=c.csrf)).status_code == 422


def test_the_file_of_another_tenant_is_shown_to_nobody(web):
    "Somebody has copied globex's over acme's"
    theirs, _ = web.m['globex'].submit('t', sync, path='theirs')
    c = web.client('acme-operator')
    at = {t: Path(web.host.url_of(web.host.find(t)).database) for t in web.m}
    for db in web.dbs.values(): db.close()
    for t, m in web.m.items(): web.host.open_dbs.close(web.host.url_of(web.host.find(t))); m.store.close()
    shutil.copy(at['globex'], new := at['acme'].with_suffix('.new'))
    for x in ('-wal', '-shm'): Path(f"{at['acme']}{x}").unlink(missing_ok=True)
    new.replace(at['acme'])
    web.jobs.directory._known.clear()
    for path in ('/jobs', '/jobs/list', f'/jobs/job/{theirs}', API, f'{API}/{theirs}', f'/jobs/-/progress/{theirs}'):
        r = c.get(path)
        assert r.status_code == 503 and 'theirs' not in r.text and 'globex' not in r.text, (path, r.text[:300])
    assert c.request('DELETE', f'{API}/{theirs}').status_code == 503
    assert [j.id for j in web.m['globex'].list_jobs()] == [theirs]
    assert web.client('globex-operator').get(f'{API}/{theirs}').status_code == 200

def test_why_jobs_are_held_is_an_operators_matter(web):
    web.host.hold('acme', "it is a copy of tenant 'globex': /backups/globex.db")
    seen, all_ = web.client('acme-operator').get('/jobs').text, web.client('root').get('/jobs', params=dict(tenant='acme')).text
    assert 'Open jobs are held' in seen and 'globex' not in seen and '/backups/globex.db' in all_

def test_why_a_job_waits_is_told_to_admins(web):
    id, _ = web.m['acme'].submit('t', sync, concurrency_key='<b>default-of-sync', run_at='2100-01-01')
    rules_of(web.host).set(queue='default', mode='paused')
    def seen(user, **kw): return [*soup(web.client(user).get(f'/jobs/job/{id}', **kw)).select('[aria-label="Why it waits"] li')]
    found = [li.text for li in seen('root', params=dict(tenant='acme'))]
    assert found[0] == "Queue 'default' is paused, by a rule: fh-saas resume --queue default takes it back." and found[1] == 'It is to run at 2100-01-01T00:00:00.000000Z.'
    assert seen('acme-operator') == []
    web.host.hold('acme', "it is a copy of tenant 'globex': <i>/backups/globex.db")
    web.m['acme'].engine.tenancy(web.m['acme'].store).read = 0.0
    c = web.client('root').get(f'/jobs/job/{id}', params=dict(tenant='acme'))
    assert '&lt;i&gt;/backups/globex.db' in c.text and 'Open jobs are held' not in c.text and 'globex' not in web.client('acme-operator').get(f'/jobs/job/{id}').text

def test_a_job_is_shown_though_nobody_can_tell_why_it_waits(web, monkeypatch):
    id, _ = web.m['acme'].submit('t', sync, run_at='2100-01-01')
    monkeypatch.setattr(BackgroundTaskManager, 'why_waiting', lambda self, job: 1/0)
    page = web.client('root').get(f'/jobs/job/{id}', params=dict(tenant='acme'))
    assert page.status_code == 200 and [li.text for li in soup(page).select('[aria-label="Why it waits"] li')] == ['Why it waits cannot be told now: the log says why.']
    assert soup(web.client('acme-operator').get(f'/jobs/job/{id}')).select('[aria-label="Why it waits"]') == []

def test_a_button_of_another_tenants_page_says_so(web):
    @web.app.route('/home', methods=['GET'])
    def home(): return JobButton(web.m['globex'], 'go', sync, path='a')
    c = web.client('acme-operator')
    what = BeautifulSoup(c.get('/home').text, 'html.parser').find('input', {'name': 'what'})['value']
    x = c.post('/jobs/-/start', data=dict(csrf=c.csrf, what=what), headers={'HX-Request': 'true'})
    assert "another tenant's page" in x.text.replace('&#39;', "'").replace('&#x27;', "'") and web.m['acme'].list_jobs() == []
