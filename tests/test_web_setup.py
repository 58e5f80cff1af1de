"Every form of answer that a FastHTML route can return beside a job's handle."
import asyncio
import pytest
from fasthtml.common import EventStream, FastHTML, FileResponse, FtResponse, HtmxResponseHeaders, HTMLResponse, JSONResponse, P, Redirect, RedirectResponse, Response, StreamingResponse, Title, cookie, fast_app
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.settings import Settings
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.web.setup import setup_jobs

async def stream():
    yield 'data: 1\n\n'
    await asyncio.sleep(0)
    yield 'data: 2\n\n'

forms = dict(
    component=lambda: P('hello'), text=lambda: 'hello', mapping=lambda: dict(hello=1), parts=lambda: (Title('t'), P('hello')), nested=lambda: ((P('hello'),), (P('again'),)), nothing=lambda: (),
    json=lambda: JSONResponse(dict(hello=1), 202), html=lambda: HTMLResponse('<p>hello</p>'), plain=lambda: PlainTextResponse('hello'), bare=lambda: Response(status_code=204), redirect_response=lambda: RedirectResponse('/x', 303),
    redirect=lambda: Redirect('/x'), file=lambda: FileResponse(__file__), events=lambda: EventStream(stream()), streaming=lambda: StreamingResponse(stream()), ft=lambda: FtResponse(P('hello'), 201),
    with_cookie=lambda: (cookie('k', 'v'), JSONResponse(dict(hello=1))), with_own=lambda: JSONResponse(dict(hello=1), background=BackgroundTask(own.append, 1)), with_owns=lambda: JSONResponse(dict(hello=1), background=BackgroundTasks([BackgroundTask(own.append, 1)])))
status = dict(json=202, bare=204, redirect_response=303, redirect=303, ft=201)
own = []

@pytest.fixture
def shop(tmp_path):
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    db = get_or_create_tenant_db('acme', 'Acme', host)
    yield host, db
    db.close(); host.close()

def make(kind): return FastHTML(secret_key='x') if kind == 'FastHTML' else fast_app(secret_key='x', pico=False)[0]

@pytest.mark.parametrize('htmx', [False, True], ids=['page', 'htmx'])
@pytest.mark.parametrize('app_kind,handler', [('FastHTML', 'sync'), ('FastHTML', 'async'), ('fast_app', 'sync')])
def test_no_form_of_answer_loses_the_task(shop, htmx, app_kind, handler):
    host, db = shop
    app, done, plain = make(app_kind), [], make(app_kind)
    setup_jobs(app, host, Settings(handoff=3600))  # nobody else takes these jobs in time
    def note(form): done.append(form)
    def routed(form, answer):
        def handle():
            _, bg = BackgroundTaskManager(db).submit('note', note, form=form)
            return answer(), bg
        async def ahandle(): return handle()
        def bare(): return answer()
        app.route(f'/{form}', methods=['GET'])(ahandle if handler == 'async' else handle)
        plain.route(f'/{form}', methods=['GET'])(bare)
    for form, answer in forms.items(): routed(form, answer)
    plain.hdrs[:] = app.hdrs  # with what components need, in the head of each page
    own.clear()
    headers = {'HX-Request': 'true'} if htmx else {}
    with TestClient(app, follow_redirects=False, headers=headers) as c, TestClient(plain, follow_redirects=False, headers=headers) as p:
        for n, form in enumerate(forms, 1):
            got = c.get(f'/{form}')
            assert done == [*forms][:n], form
            if form == 'nothing': continue  # FastHTML shows an empty tuple in a way of its own
            bare = p.get(f'/{form}')
            assert (got.status_code, got.text) == (bare.status_code, bare.text) and got.headers.get('location') == bare.headers.get('location') and got.headers.get('hx-redirect') == bare.headers.get('hx-redirect'), form
            if not htmx: assert got.status_code == status.get(form, 200)
            if form == 'with_cookie': assert 'k=v' in got.headers['set-cookie']
    assert own == [1]*4

def test_without_it_tasks_are_dropped(shop):
    "Should FastHTML mend this by itself one day, the mend can go"
    host, db = shop
    app, ran = FastHTML(secret_key='x'), []
    @app.route('/json', methods=['GET'])
    def get(): return JSONResponse({}), BackgroundTask(ran.append, 1)
    with TestClient(app) as c: c.get('/json')
    assert ran == []

def test_tasks_of_others_and_beforeware(shop):
    host, db = shop
    ran = []
    def gate(req):
        if req.url.path == '/shut': return RedirectResponse('/login', 303), BackgroundTask(ran.append, 'gate')
    app = FastHTML(secret_key='x', before=gate, after=lambda resp: None)
    setup_jobs(app, host)
    @app.route('/two', methods=['GET'])
    def two(): return BackgroundTask(ran.append, 1), JSONResponse({}), BackgroundTask(ran.append, 2)
    @app.route('/shut', methods=['GET'])
    def shut(): return P('open')
    @app.route('/headers', methods=['GET'])
    def headers(): return HtmxResponseHeaders(trigger='x'), P('hello'), BackgroundTask(ran.append, 3)
    with TestClient(app, follow_redirects=False) as c:
        assert c.get('/two').json() == {} and c.get('/shut').headers['location'] == '/login' and c.get('/headers').headers['hx-trigger'] == 'x'
    assert ran == [1, 2, 'gate', 3]

def test_the_app_starts_and_stops_the_runner(shop):
    host, db = shop
    app = FastHTML(secret_key='x')
    runner = setup_jobs(app, host).runner
    with TestClient(app):
        id, _ = BackgroundTaskManager(db).submit('t', lambda: 5, run_at='2020-01-01')
        assert BackgroundTaskManager(db).result(id, 20) == 5 and runner.engine is BackgroundTaskManager(db).engine
    assert runner.engine.closed

def test_what_cannot_be_set_up(shop):
    host, db = shop
    app = FastHTML(secret_key='x')
    setup_jobs(app, host)
    with pytest.raises(ValueError, match='already'): setup_jobs(app, host)
    with pytest.raises(TypeError, match='lifespan'): setup_jobs(object())
    with pytest.raises(TypeError, match='HostDatabase'): setup_jobs(FastHTML(secret_key='x'), 'sqlite:///x.db')
    for kw, error, said in ((dict(settings=dict(concurrency=2)), TypeError, r'Settings\('), (dict(queues=['a']), ValueError, 'queue -> jobs'), (dict(queues={'a': '4'}), ValueError, 'whole number'), (dict(queues={'a': 0}), ValueError, 'whole number'),
            (dict(queues={'a': None}), ValueError, 'whole number'), (dict(queues={}), ValueError, 'leave it out'), (dict(queues={'a': 2.5}), ValueError, 'whole number'), (dict(tasks=[print]), TypeError, 'domain -> tasks'),
            (dict(tokens={'s3cret': 'admin'}, role=lambda req: None), TypeError, r'Access\('), (dict(tokens=['s3cret'], role=lambda req: None), TypeError, 'token -> Access')):
        with pytest.raises(error, match=said) as e: setup_jobs(FastHTML(secret_key='x'), host, **kw)
        assert 's3cret' not in str(e.value)
    with pytest.raises(ValueError, match='cannot be a part of a URL|is no task'): setup_jobs(app := FastHTML(secret_key='x'), host, tasks=dict(a=[lambda: 1]))
    setup_jobs(app, host)  # nothing was added
    for kw in (dict(concurrency=2.5), dict(concurrency=True), dict(lease=True)):
        with pytest.raises(ValueError, match='number'): Settings(**kw)
