"What a page that asks costs, in statements and not in seconds."
import pytest
from fasthtml.common import FastHTML
from starlette.testclient import TestClient
from fh_saas import BackgroundTaskManager, HostDatabase, Settings, get_or_create_tenant_db, setup_jobs
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.process import use_engine
from fh_saas.jobs import pages
from fh_saas.jobs.pages import stretch
from fh_saas.web import joblist

@pytest.fixture
def shop(tmp_path):
    "A client of an app, the store of its tenant, and what SQLite is asked meanwhile"
    engine = use_engine(Engine(Settings(concurrency=0)))  # nobody else asks this database anything
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    with get_or_create_tenant_db('acme', host=host) as db: BackgroundTaskManager(db).submit_many('never', never, [dict(n=n) for n in range(60)])
    app = FastHTML(secret_key='x')
    jobs = setup_jobs(app, host, Settings(concurrency=0), tenant=lambda req: 'acme', role=lambda req: 'operator')
    store, said = jobs.directory.manager('acme').store, []
    store.list(1)  # which opens what it reads with
    traced = list(store._spare)
    for conn in traced: conn.set_trace_callback(said.append)
    yield TestClient(app), store, said
    for conn in traced: conn.set_trace_callback(None)
    engine.stop(0); host.close()

def never(n): raise AssertionError('nobody runs jobs here')

def asked(said, client, path):
    client.get(path)  # what is compiled and looked up once
    said.clear()
    assert client.get(path).status_code == 200
    return [s for s in said if s.lstrip().upper().startswith(('SELECT', 'WITH', 'INSERT', 'UPDATE', 'DELETE'))]

@pytest.mark.parametrize('path', ['/jobs/-/status/{}', '/jobs/-/progress/{}', '/api/v1/admin/background-tasks/{}'])
def test_a_poll_is_one_read_by_the_key(shop, path):
    client, store, said = shop
    id = store.list(1)[0]['id']
    reads = asked(said, client, path.format(id))
    assert len(reads) == 1, reads
    with store.cursor() as cur: plan = [r[-1] for r in cur.execute(f'EXPLAIN QUERY PLAN {reads[0]}').fetchall()]
    assert len(plan) == 1 and plan[0].startswith('SEARCH') and 'id=?' in plan[0], plan

@pytest.mark.parametrize('q,index', [('', None), ('status:failed', 'ix_tenant_jobs_rare'), ('status:pending', None)])
def test_a_list_reads_one_page(shop, q, index):
    "And its counts: nothing else, and nothing that sorts"
    client, store, said = shop
    reads = asked(said, client, f'/jobs/list?q={q}')
    page, = [r for r in reads if 'progress_percent' in r]
    with store.cursor() as cur: plan = ' '.join(r[-1] for r in cur.execute(f'EXPLAIN QUERY PLAN {page}').fetchall())
    assert 'TEMP B-TREE' not in plan and (index is None or index in plan), plan
    assert len(reads) <= 5, reads

def test_a_search_looks_no_further_than_its_stretch(shop):
    client, store, said = shop
    page, = [r for r in asked(said, client, '/jobs/list?q=nothing+like+this') if 'LIKE' in r]  # what it finds is also what is counted
    assert stretch == 30_000 and 'progress_percent' in page

@pytest.mark.parametrize('wide', [False, True])
def test_tabs_count_what_the_search_finds(shop, monkeypatch, wide):
    "Counted from the page where it has all, and by a statement where it has not"
    client, store, _ = shop
    if not wide: monkeypatch.setattr(pages, 'stretch', 20)
    found = []
    monkeypatch.setattr(joblist, '_tab_links', lambda a, only, counts: found.append(counts) or '')
    for r in store.page(3)[0]: client.app.state.jobs.directory.manager('acme').cancel(r['id'])
    for q in ('type:never', 'type:never status:cancelled', 'error:cancelled', 'never', 'type:other'):
        assert client.get('/jobs/list', params=dict(q=q)).status_code == 200
        assert found.pop() == store.counts(**{k: v for k, v in joblist.parse(q).items() if k != 'status'}), q
