"A database written by fh-saas 0.9.14 opens, keeps every row, and its unfinished jobs go on."
import json, multiprocessing, shutil
from dataclasses import fields
from pathlib import Path
import pytest
import sqlalchemy as sa
from fastsql import Database
from fh_saas.db_connect import open_engine, reading, writing
from fh_saas.db_host import HostDatabase, JobRecord, SystemJob
from fh_saas.db_tenant import TenantSuspended, open_tenant_db
from fh_saas.jobs.store import Store
from fh_saas.utils_bgtsk import BackgroundTaskManager
from conftest import wait_until

HERE = Path(__file__).parent/'fixtures'
ROWS = json.loads((HERE/'fh_saas_0_9_14.json').read_text())
old = ('id', 'job_type', 'status', 'payload', 'result', 'error_log', 'retry_count', 'max_retries', 'created_at', 'started_at', 'completed_at')
new = {f.name: f.default for f in fields(JobRecord) if f.name not in old}
job_types = ('cleanup', 'product_import', 'report_build', 'transaction_sync')
open_states = ('pending', 'running')

@pytest.fixture(params=['sqlite', 'postgresql'])
def old_db(request, tmp_path):
    "URL of a copy of the tenant database of 0.9.14, and its rows by id"
    if request.param == 'sqlite':
        shutil.copy(HERE/(name := 'fh_saas_0_9_14_tenant.sqlite3'), tmp_path/'old.db')
        url = f"sqlite:///{tmp_path/'old.db'}"
    else:
        url = request.getfixturevalue('new_pg')()
        run_sql(url, *filter(str.strip, (HERE/(name := 'fh_saas_0_9_14_tenant.sql')).read_text().split(';\n')))
    return url, {r['id']: r for r in ROWS[name]['tenant_jobs']}

def run_sql(url, *statements):
    eng = open_engine(url)
    with writing(eng) as conn:
        for s in statements: conn.exec_driver_sql(s.replace('%', '%%') if eng.dialect.name == 'postgresql' else s)
    eng.dispose()

def rows(url, table='tenant_jobs'):
    eng = open_engine(url)
    with reading(eng) as conn: got = {r['id']: dict(r) for r in conn.exec_driver_sql(f'SELECT * FROM {table}').mappings()}
    eng.dispose()
    return got

@pytest.fixture
def opened(old_db, new_engine):
    "A manager on the old database, its engine, and the old rows"
    db = Database(old_db[0])
    yield (m := BackgroundTaskManager(db, new_engine())), m.engine, old_db[1]
    db.conn.close(); db.engine.dispose()

def kept(row): return {k: row[k] for k in old}
def left_open(was): return [i for i, r in was.items() if r['status'] in open_states]
def all_ended(m, ids): return wait_until(lambda: all(m.get_job(i).completed_at for i in ids), 20, 'an old job did not end')

def test_the_fixture_has_every_kind_of_job(old_db):
    url, was = old_db
    assert rows(url) == was and len(was) == 13 and set(next(iter(was.values()))) == set(old)
    assert {(r['status'], r['retry_count']) for r in was.values() if r['status'] in open_states} == {('pending', 0), ('pending', 1), ('pending', 2), ('running', 0), ('running', 2)}

def test_every_value_of_every_row_is_kept(opened):
    m, engine, was = opened
    Store(m.store.url).close()
    got = rows(m.store.url)
    assert set(got) == set(was)
    for i, r in was.items():
        if r['status'] != 'running': assert kept(got[i]) == r
        else: assert {k: got[i][k] for k in old if k not in ('status', 'error_log')} == {k: r[k] for k in old if k not in ('status', 'error_log')}
        assert {k: v for k, v in got[i].items() if k in ('queue', 'priority', 'progress_percent', 'task', 'details', 'timeout')} == {k: new[k] for k in ('queue', 'priority', 'progress_percent', 'task', 'details', 'timeout')}

def test_opening_alone_changes_no_value(old_db):
    url, was = old_db
    Store(url).close()
    got = rows(url)
    assert {i: kept(r) for i, r in got.items()} == was
    assert all({k: r[k] for k in new} == new for r in got.values())

def test_the_manager_reads_the_old_rows(opened):
    m, engine, was = opened
    assert {j.id for j in m.list_jobs()} == set(was) and [j.created_at for j in m.list_jobs()] == sorted((r['created_at'] for r in was.values()), reverse=True)
    assert {j.id for j in m.list_jobs(job_type='product_import', status='completed')} == {i for i, r in was.items() if (r['job_type'], r['status']) == ('product_import', 'completed')}
    assert {j.id for j in m.tenant_jobs()} == set(was)

@pytest.mark.parametrize('change', ["status = 'processing'", "status = 'completed', completed_at = NULL", 'progress_percent = 101', 'priority = 9', "status = 'pending', completed_at = '2026-01-01'"])
def test_the_rules_hold_for_new_writes(old_db, change):
    url, was = old_db
    Store(url).close()
    with pytest.raises(sa.exc.IntegrityError): run_sql(url, f"UPDATE tenant_jobs SET {change} WHERE status = 'failed'")
    assert {i: kept(r) for i, r in rows(url).items()} == was

def test_an_engine_that_knows_no_tasks_runs_nothing(opened):
    m, engine, was = opened
    ids = left_open(was)
    engine.attend(m.store)
    wait_until(lambda: not m.list_jobs(status='running'))
    id, bg = m.submit('another', print)
    bg.func(*bg.args)
    assert m.get_job(id).status == 'completed'
    assert all(m.get_job(i).status == 'pending' and m.get_job(i).retry_count == was[i]['retry_count'] and m.get_job(i).attempt == 0 for i in ids)

def test_unfinished_jobs_go_on_once_their_type_is_registered(opened):
    m, engine, was = opened
    ran = []
    def task(**kw): ran.append(kw); return 'again'
    for t in job_types: engine.registry.add(task if t == job_types[0] else eval('lambda **kw: task(**kw)', dict(task=task)), t)
    engine.attend(m.store)
    ids = left_open(was)
    all_ended(m, ids)
    for i in ids:
        job = m.get_job(i)
        assert (job.status, job.result, job.retry_count, job.error_log if was[i]['status'] == 'pending' else None) == (
            'completed', '"again"', was[i]['retry_count'], was[i]['error_log'] if was[i]['status'] == 'pending' else None)
        assert {k: getattr(job, k) for k in ('job_type', 'payload', 'max_retries', 'created_at')} == {k: was[i][k] for k in ('job_type', 'payload', 'max_retries', 'created_at')}
    assert sorted(map(json.dumps, ran)) == sorted(json.dumps(json.loads(was[i]['payload'])) for i in ids)
    got = rows(m.store.url)
    assert all(kept(got[i]) == was[i] for i in was if i not in ids)

def test_a_job_on_its_last_attempt_fails_by_itself_when_that_fails(opened):
    m, engine, was = opened
    def task(**kw): raise OSError('still down')
    engine.registry.add(task, 'product_import')
    engine.attend(m.store)
    last = [i for i in left_open(was) if was[i]['job_type'] == 'product_import' and was[i]['retry_count'] == 2]
    all_ended(m, last)
    assert [(m.get_job(i).status, m.get_job(i).retry_count) for i in last] == [('failed', 3)]*len(last) and last

def test_a_submit_under_the_old_type_brings_the_task(opened):
    m, engine, was = opened
    ran = []
    def quite_another_name(account_id, days=0): ran.append(account_id); return account_id
    id, bg = m.submit('transaction_sync', quite_another_name, account_id='new')
    bg.func(*bg.args); engine.attend(m.store)
    ids = [i for i in left_open(was) if was[i]['job_type'] == 'transaction_sync']
    all_ended(m, ids)
    assert {m.get_job(i).status for i in [id, *ids]} == {'completed'} and sorted(ran) == ['acc-3', 'acc-4', 'new']
    assert all(m.get_job(i).attempt == 0 for i in left_open(was) if i not in ids)

def test_a_row_against_the_new_rules_does_not_prevent_opening(old_db, new_engine):
    url, was = old_db
    ids = [i for i, r in was.items() if r['status'] == 'pending']
    run_sql(url, f"UPDATE tenant_jobs SET status = 'processing' WHERE id = '{ids[0]}'", f"UPDATE tenant_jobs SET status = 'completed' WHERE id = '{ids[1]}'",
        f"UPDATE tenant_jobs SET retry_count = NULL, max_retries = NULL WHERE id = '{ids[2]}'", f"UPDATE tenant_jobs SET status = NULL WHERE id = '{ids[3]}'")
    db = Database(url)
    m = BackgroundTaskManager(db, new_engine())
    assert [m.get_job(i).status for i in ids[:4]] == ['processing', 'completed', 'pending', None] and len(m.list_jobs()) == 13
    m.engine.registry.add(lambda **kw: 1, 'x')
    m.engine.registry.file_under(was[ids[2]]['job_type'], 'x')
    m.engine.attend(m.store)
    assert wait_until(lambda: m.get_job(ids[2]).status == 'completed') and m.get_job(ids[0]).status == 'processing'
    with pytest.raises(sa.exc.IntegrityError): run_sql(url, "UPDATE tenant_jobs SET status = 'processing' WHERE status = 'failed'")
    db.conn.close(); db.engine.dispose()

def test_opening_twice_changes_nothing_more(old_db):
    url, _ = old_db
    def schema():
        eng = open_engine(url)
        with reading(eng) as conn: got = {t: [c['name'] for c in sa.inspect(conn).get_columns(t)] for t in sa.inspect(conn).get_table_names()}
        eng.dispose()
        return got
    Store(url).close()
    before = schema(), rows(url)
    Store(url).close()
    assert (schema(), rows(url)) == before

def test_an_upgraded_table_has_the_columns_and_rules_of_a_new_one(old_db, new_sqlite, request):
    url, _ = old_db
    fresh = new_sqlite() if url.startswith('sqlite') else request.getfixturevalue('new_pg')()
    def shape(u):
        Store(u).close()
        eng = open_engine(u)
        with reading(eng) as conn:
            i = sa.inspect(conn)
            got = {t: ({c['name'] for c in i.get_columns(t)}, sorted(x['name'] for x in i.get_indexes(t)), i.get_pk_constraint(t)['constrained_columns']) for t in i.get_table_names()}
        eng.dispose()
        return got
    assert shape(url) == shape(fresh)

def test_old_ids_stay_unique(old_db):
    url, was = old_db
    s = Store(url)
    with pytest.raises(Exception, match='(?i)unique'): s.add(dict(id=next(iter(was)), job_type='t', task='t'))
    s.close()

def _open(url, go):
    go.wait(60)
    Store(url, busy=30).close()

def _open_host(url, go):
    go.wait(60)
    HostDatabase(url).close()

def at_once(target, *args, n=16):
    "Exit codes of `n` fresh processes that begin together; they are forked from one that has imported the library and opened nothing"
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['fh_saas.utils_bgtsk', 'fh_saas.db_tenant', 'pytest', 'psycopg'])
    go = ctx.Barrier(n)
    ps = [ctx.Process(target=target, args=(*args, go)) for _ in range(n)]
    for p in ps: p.start()
    for p in ps: p.join(60)
    return [p.exitcode for p in ps]

def test_sixteen_processes_open_the_old_database_at_once(old_db):
    url, was = old_db
    assert at_once(_open, url) == [0]*16
    assert {i: kept(r) for i, r in rows(url).items()} == was

# --- The host

@pytest.fixture
def old_host(tmp_path):
    "URL of a copy of the host database of 0.9.14"
    shutil.copy(HERE/'fh_saas_0_9_14_host.sqlite3', tmp_path/'host.db')
    return f"sqlite:///{tmp_path/'host.db'}"

host_rows = ROWS['fh_saas_0_9_14_host.sqlite3']

def test_the_old_host_opens_with_its_tenants(old_host):
    for _ in range(2):
        host = HostDatabase(old_host)
        acme, globex = sorted(host.tenants(), key=lambda t: t.name)
        assert (acme.name, acme.state, acme.is_active, acme.db_url, acme.plan_tier, acme.epoch) == ('Acme GmbH', 'active', True, 'sqlite:///acme_db.db', 'free', 1)
        assert (globex.name, globex.state, globex.is_active, globex.db_url, globex.plan_tier) == ('Globex Çorp', 'paused', False, 'postgresql://app@db.example.com:5432/t_globex_db', 'pro')
        assert [t.id for t in host.tenants('active')] == [acme.id] and host.find(globex.id) == globex
        host.close()
    got = rows(old_host, 'core_tenants')
    assert all({k: got[r['id']][k] for k in r} == r for r in host_rows['core_tenants']) and len(got) == 2

def test_a_tenant_that_was_resumed_stays_so(old_host):
    host = HostDatabase(old_host)
    (globex,) = host.tenants('paused')
    with pytest.raises(TenantSuspended): open_tenant_db(globex.id, host)
    host.set_state(globex.id, 'active'); host.close()
    host = HostDatabase(old_host)
    assert len(host.tenants('active')) == 2
    host.close()

def test_the_tenant_of_the_old_host_opens_its_old_file(old_host, tmp_path):
    shutil.copy(HERE/'fh_saas_0_9_14_tenant.sqlite3', tmp_path/'acme_db.db')
    host = HostDatabase(old_host)
    (acme,) = host.tenants('active')
    with open_tenant_db(acme.id, host) as db: assert db.q('SELECT count(*) AS n FROM tenant_jobs')[0]['n'] == 13
    host.close()

def test_old_system_jobs_are_kept_and_go_on(old_host, new_engine):
    host = HostDatabase(old_host)
    m = BackgroundTaskManager(host, new_engine())
    was = {r['id']: r for r in host_rows['sys_jobs']}
    got = rows(old_host, 'sys_jobs')
    assert len(was) == 4 and all({k: got[i][k] for k in r} == r for i, r in was.items()) and all(isinstance(j, SystemJob) for j in m.list_jobs())
    ran = []
    m.engine.registry.add(lambda **kw: ran.append(kw), 'provision_tenant'); m.engine.registry.add(lambda: ran.append('rotated'), 'rotate_logs')
    m.engine.attend(m.store)
    ids = [i for i, r in was.items() if r['status'] == 'pending']
    all_ended(m, ids)
    assert {m.get_job(i).status for i in ids} == {'completed'} and len(ran) == 2 and 'rotated' in ran
    got = rows(old_host, 'sys_jobs')
    assert all({k: got[i][k] for k in r} == r for i, r in was.items() if i not in ids)
    host.close()

def test_sixteen_processes_open_the_old_host_at_once(old_host):
    assert at_once(_open_host, old_host) == [0]*16
    host = HostDatabase(old_host)
    assert sorted(t.state for t in host.tenants()) == ['active', 'paused']
    host.close()
