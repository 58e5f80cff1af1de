"One database per tenant, on a SQLite and on a PostgreSQL host: names, the cache, states, identity, secrets."
import errno, gc, logging, multiprocessing, os, shutil, sqlite3, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
import psycopg, pytest
import sqlalchemy as sa
import fh_saas.db_tenant
from fh_saas.db_connect import (DatabaseCorrupt, DatabaseFull, DatabaseReadOnly, DatabaseUnavailable, FhSaasError, InvalidDatabaseURL, UnsupportedDatabase, check_url, open_engine, read_meta, reading, typed, write_meta, writing)
from fh_saas.db_host import HostDatabase, TenantCatalog, TenantNotFound, env_url, gen_id, shown, timestamp
from fh_saas.db_tenant import (InvalidTenantId, TenantBusy, TenantDatabase, TenantMismatch, TenantSuspended, check_tenant_id, close_tenant_db,
    delete_tenant, get_or_create_tenant_db, list_tenants, open_tenant_db, resume_tenant, suspend_tenant)
from fh_saas.jobs.claims import Room
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.states import Outcome
from fh_saas.jobs.store import Store
import fh_saas.ops.copies, fh_saas.ops.upgrades
from fh_saas.ops.copies import export_tenant, restore_tenant
from fh_saas.ops.tenants import tenant_report
from fh_saas.ops.upgrades import migrate_tenants
from fh_saas.utils_bgtsk import BackgroundTaskManager
from children.launch import here
from conftest import free_port, mounted, wait_until

@pytest.fixture(scope='module')
def pg_host(pg_server):
    "URL of the database of a host on a server: one for all tests, for a new one is dear"
    eng, name = open_engine(pg_server, isolation_level='AUTOCOMMIT'), f'fh_saas_test_{gen_id()[-12:]}'
    with eng.connect() as conn: conn.exec_driver_sql(f'CREATE DATABASE {name}')
    yield sa.make_url(pg_server).set(database=name).render_as_string(hide_password=False)
    with eng.connect() as conn: conn.exec_driver_sql(f'DROP DATABASE {name} WITH (FORCE)')
    eng.dispose()

@pytest.fixture
def new_host(tmp_path, request):
    "Call it with a kind of database for a host; what its tenants have on a server is dropped afterwards"
    hosts = []
    def make(kind, folder='data', **kw):
        h = HostDatabase(f"sqlite:///{tmp_path/folder/'host.db'}" if kind == 'sqlite' else request.getfixturevalue('pg_host'), **kw)
        hosts.append(h)
        return h
    yield make
    for h in hosts:
        for t in h.tenants() if h.url.get_backend_name() == 'postgresql' else []: delete_tenant(t.id, h, force=True)
        h.close()

@pytest.fixture(params=['sqlite', 'postgresql'])
def host(request, new_host): return new_host(request.param)

@pytest.fixture
def lite(new_host): return new_host('sqlite')

@pytest.fixture
def prefix(): return f'x{gen_id()[-10:]}'

def files(path): return sorted(str(p.relative_to(path)) for p in path.rglob('*') if p.is_file())

def put(db, name):
    db.conn.execute(sa.text('CREATE TABLE IF NOT EXISTS own (name VARCHAR)')); db.conn.execute(sa.text('INSERT INTO own VALUES (:n)'), dict(n=name)); db.conn.commit()

def names(db):
    got = [r[0] for r in db.conn.execute(sa.text('SELECT name FROM own'))]
    db.conn.rollback()
    return got

# --- Helpers of every row

def test_timestamps_are_utc_and_sort_as_text():
    assert timestamp(0) == '1970-01-01T00:00:00.000000' and len(timestamp()) == 26 and timestamp(1e9) < timestamp(1e9 + 0.5) and shown(timestamp(0)).endswith('Z') and shown(None) is None

def test_ids_grow_in_all_threads_and_are_never_the_same():
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda _: [gen_id() for _ in range(2000)], range(8)))
    assert all(g == sorted(g) for g in got) and len({i for g in got for i in g}) == 16_000 and all(len(g[0]) == 32 and int(g[0], 16) for g in got)
    a = gen_id(); time.sleep(0.002)
    assert a < gen_id()

# --- Ids

hostile = ['../x', 'a/b', 'host.db?x=', '', 'x'*300, 'con', 'аcme', 'ａcme', 'acmé', 'ACME', 'Con', 'nul', 'com1', 'lpt9', '.', '..', '.hidden', 'a.b', 'a b', ' a', 'a ', 'a\n', '\n', 'a\x00b', '\ud800', 'a\\b', 'C:\\x', '/etc/passwd',
    '~', '$HOME', '%2e%2e%2f', "a'b", 'a"b', 'a;b', 'a--b;drop', '-a', '_a', 'a:b', 'a?mode=memory', 'file:x', ':memory:', 'host', 'system', 'postgres', 'template1', 'é', '١', '²', 'a\u200bb', 'a\u202eb', 'x'*49, None, 7, 1.5, b'acme', True, ['a'], ('a',)]

@pytest.mark.parametrize('go', [get_or_create_tenant_db, lambda i, host: get_or_create_tenant_db(i, 'A name', host)], ids=['id', 'id and name'])
def test_hostile_ids_are_refused_and_touch_nothing(lite, tmp_path, go):
    before = files(tmp_path)
    for bad in hostile:
        with pytest.raises(InvalidTenantId) as e: go(bad, host=lite)
        assert isinstance(e.value, (FhSaasError, ValueError)) and len(str(e.value)) < 300, bad
    assert files(tmp_path) == before and lite.tenants() == []

def test_hostile_ids_are_refused_on_postgresql(new_host):
    host = new_host('postgresql')
    def databases():
        with reading(host.engine) as conn: return {r[0] for r in conn.exec_driver_sql('SELECT datname FROM pg_database')}
    for bad in hostile:
        with pytest.raises(InvalidTenantId): get_or_create_tenant_db(bad, host=host)
    assert not any(d.startswith('t_') and d.endswith('_db') and d[2:-3] in {h for h in hostile if isinstance(h, str)} for d in databases()) and host.tenants() == []

def test_a_refusal_names_the_value_and_the_way_out():
    with pytest.raises(InvalidTenantId, match=r"'\.\./x'.*use 1 to 48"): check_tenant_id('../x')
    with pytest.raises(InvalidTenantId, match="'con'.*reserved.*another"): check_tenant_id('con')
    with pytest.raises(InvalidTenantId, match='300'): check_tenant_id('x'*300)

def test_two_long_ids_that_a_server_would_cut_to_one_are_refused(host):
    for end in 'ab':
        with pytest.raises(InvalidTenantId): get_or_create_tenant_db('x'*65 + end, host=host)
    assert host.tenants() == []

def test_the_longest_ids_are_two_tenants(host, prefix):
    ids = [prefix + 'x'*(47 - len(prefix)) + end for end in 'ab']
    for i in ids:
        with get_or_create_tenant_db(i, host=host) as db: put(db, i)
    for i in ids:
        with open_tenant_db(i, host) as db: assert names(db) == [i]

@pytest.mark.parametrize('id', ['a', '1', 'acme', 'a-b_c', '0'*48, 'console', 'select', 'acme--', 'tenant_jobs'])
def test_good_ids_pass(id): assert check_tenant_id(id) == id

def test_an_id_cannot_take_the_hosts_own_file(tmp_path):
    host = HostDatabase(f"sqlite:///{tmp_path/'shop_db.db'}")
    with pytest.raises(FhSaasError): get_or_create_tenant_db('shop', host=host)
    assert host.tenants() == []
    host.close()

# --- Create, find, list

def test_a_tenant_is_created_once_and_found_again(host, prefix):
    with get_or_create_tenant_db(prefix, 'Acme GmbH', host) as db: assert isinstance(db, TenantDatabase); put(db, 'kept')
    with get_or_create_tenant_db(prefix, 'Another name', host) as db: assert names(db) == ['kept'] and db.tenant_id == prefix
    with open_tenant_db(prefix, host) as db: assert names(db) == ['kept']
    (t,) = list_tenants(host)
    assert (t.id, t.name, t.state, t.is_active, t.plan_tier, t.epoch) == (prefix, 'Acme GmbH', 'active', True, 'free', 1) and t.created_at

def test_tenants_share_nothing(host, prefix):
    with get_or_create_tenant_db(f'{prefix}a', host=host) as a, get_or_create_tenant_db(f'{prefix}b', host=host) as b:
        put(a, 'a'); put(b, 'b')
        assert (names(a), names(b)) == (['a'], ['b']) and len(list_tenants(host)) == 2

def test_a_sqlite_tenant_is_one_file_in_the_hosts_folder(lite, tmp_path):
    with get_or_create_tenant_db('acme', host=lite) as db: put(db, 'x')
    close_tenant_db('acme', lite)
    assert [f for f in files(tmp_path) if not f.endswith(('-wal', '-shm'))] == ['data/acme_db.db', 'data/host.db']

def test_the_folder_may_be_moved(lite, tmp_path):
    with get_or_create_tenant_db('acme', host=lite) as db: put(db, 'x')
    close_tenant_db('acme', lite); lite.close()
    shutil.move(tmp_path/'data', tmp_path/'moved')
    host = HostDatabase(f"sqlite:///{tmp_path/'moved'/'host.db'}")
    with open_tenant_db('acme', host) as db: assert names(db) == ['x']
    close_tenant_db('acme', host); host.close()

def test_an_unknown_tenant_is_not_found_and_not_made(host, prefix):
    for f in (open_tenant_db, delete_tenant, suspend_tenant, resume_tenant):
        with pytest.raises(TenantNotFound, match=prefix) as e: f(prefix, host)
        assert isinstance(e.value, FhSaasError) and isinstance(e.value, KeyError)
    assert host.tenants() == [] and host.find(prefix) is None

@pytest.mark.parametrize('bad', ['../x', "' OR '1'='1", 'a\x00b', '\ud800', '', 'x'*300])
def test_a_hostile_id_opens_and_deletes_nothing(host, bad):
    for f in (open_tenant_db, delete_tenant, suspend_tenant, resume_tenant):
        with pytest.raises((TenantNotFound, InvalidTenantId)): f(bad, host)
    assert host.tenants() == []

def test_two_hosts_in_one_process(new_host):
    one, two = new_host('sqlite', 'one'), new_host('sqlite', 'two')
    with get_or_create_tenant_db('acme', 'One', one) as a, get_or_create_tenant_db('acme', 'Two', two) as b:
        put(a, 'one'); put(b, 'two')
        assert (names(a), names(b)) == (['one'], ['two']) and (one.find('acme').name, two.find('acme').name) == ('One', 'Two')
    delete_tenant('acme', one)
    assert one.tenants() == [] and len(two.tenants()) == 1

def _create(url, id, go, out):
    host = HostDatabase(url)
    go.wait(60)
    try:
        with get_or_create_tenant_db(id, 'Name', host) as db: out.put(db.engine.url.database)
    except BaseException as e: out.put(repr(e)); raise
    finally: host.close()

def test_a_tenants_database_holds_the_text_of_all_languages_whatever_the_server_makes_by_itself(new_host, new_pg, pg_server, prefix, monkeypatch):
    host, text, latin = new_host('postgresql'), 'Grüße, 你好 ☃', sa.make_url(new_pg()).database
    with psycopg.connect(pg_server, autocommit=True) as conn:
        conn.execute(f'DROP DATABASE {latin}')
        conn.execute(f"CREATE DATABASE {latin} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    monkeypatch.setattr('fh_saas.db_tenant._template', latin)
    with get_or_create_tenant_db(f'{prefix}-utf', host=host) as db:
        assert db.conn.exec_driver_sql('SHOW server_encoding').scalar() == 'UTF8'
        assert db.conn.exec_driver_sql(f"SELECT '{text}' || (SELECT datcollate FROM pg_database WHERE datname = current_database())").scalar() == f'{text}C'

@pytest.mark.parametrize('kind', ['sqlite', 'postgresql'])
def test_sixteen_processes_create_the_same_tenant_at_once(new_host, kind, prefix):
    host, n = new_host(kind), 16
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['fh_saas.utils_bgtsk', 'fh_saas.db_tenant', 'pytest', 'psycopg'])
    go, out = ctx.Barrier(n), ctx.Queue()
    ps = [ctx.Process(target=_create, args=(host.url.render_as_string(hide_password=False), prefix, go, out)) for _ in range(n)]
    for p in ps: p.start()
    got = [out.get(timeout=60) for _ in ps]
    for p in ps: p.join(60)
    assert len({*got}) == 1 and [p.exitcode for p in ps] == [0]*n and len(host.tenants()) == 1

def test_sixteen_threads_create_the_same_tenant_at_once(host, prefix):
    go = threading.Barrier(16)
    def one(_):
        go.wait()
        with get_or_create_tenant_db(prefix, host=host) as db: return db.engine.url.database
    with ThreadPoolExecutor(16) as pool: assert len({*pool.map(one, range(16))}) == 1
    assert len(host.tenants()) == 1

def test_threads_create_tenants_of_their_own_at_once(host, prefix):
    go = threading.Barrier(6)
    def one(n):
        go.wait()
        with get_or_create_tenant_db(f'{prefix}{n}', host=host) as db: put(db, db.tenant_id); return names(db)
    with ThreadPoolExecutor(6) as pool: assert [r[0] for r in pool.map(one, range(6))] == [t.id for t in host.tenants()]

# --- The cache

def many(host, n, prefix='t'):
    ids = [f'{prefix}{i}' for i in range(n)]
    for i in ids: get_or_create_tenant_db(i, host=host).close()
    return ids

def test_the_cache_is_bounded_and_closes_the_least_recently_used(lite):
    lite.open_dbs.max_open = 3
    ids = many(lite, 5)
    assert len(lite.open_dbs) == 3
    pool = {i: str(lite.url_of(lite.find(i))) for i in ids}
    assert [k in lite.open_dbs._pools for k in pool.values()] == [False, False, True, True, True]
    open_tenant_db(ids[2], lite).close()
    open_tenant_db(ids[0], lite).close()
    assert [k in lite.open_dbs._pools for k in pool.values()] == [True, False, True, False, True]

def test_a_database_in_use_is_never_closed(lite):
    lite.open_dbs.max_open = 2
    ids = many(lite, 8)
    held = [open_tenant_db(i, lite) for i in ids[:5]]
    for i in ids[5:]: open_tenant_db(i, lite).close()
    for h in held: put(h, h.tenant_id); assert names(h) == [h.tenant_id]
    assert len(lite.open_dbs) >= 5
    for h in held: h.close()
    open_tenant_db(ids[7], lite).close()
    assert len(lite.open_dbs) <= 2

def test_closing_a_handle_twice_gives_it_back_once(lite):
    many(lite, 1)
    a, b = open_tenant_db('t0', lite), open_tenant_db('t0', lite)
    a.close(); a.close()
    assert lite.open_dbs.in_use(lite.url_of(lite.find('t0'))) == 1
    put(b, 'x'); b.close()
    assert lite.open_dbs.in_use(lite.url_of(lite.find('t0'))) == 0

@pytest.mark.parametrize('kind,seconds', [('sqlite', 1), ('postgresql', 1)])
def test_threads_hammering_a_small_cache_meet_no_error(new_host, kind, seconds, prefix):
    host = new_host(kind)
    host.open_dbs.max_open = 3
    ids = many(host, 10 if kind == 'sqlite' else 5, prefix)
    for i in ids:
        with open_tenant_db(i, host) as db: put(db, i)
    until = time.monotonic() + seconds
    def one(n):
        done = 0
        while time.monotonic() < until:
            with open_tenant_db(ids[(n*7 + done*3)%len(ids)], host) as db: assert names(db) == [db.tenant_id]
            done += 1
        return done
    with ThreadPoolExecutor(12) as pool: assert all(pool.map(one, range(12)))
    open_tenant_db(ids[0], host).close()
    assert len(host.open_dbs) <= 3 and not host.open_dbs._users

def test_a_handle_collected_without_close_is_given_back(lite):
    many(lite, 1)
    url = lite.url_of(lite.find('t0'))
    db = open_tenant_db('t0', lite)
    assert lite.open_dbs.in_use(url) == 1
    del db
    gc.collect()
    assert lite.open_dbs.in_use(url) == 0
    with open_tenant_db('t0', lite) as db: put(db, 'x')

def test_what_a_lost_handle_did_not_commit_is_rolled_back(lite):
    many(lite, 1)
    with open_tenant_db('t0', lite) as db: put(db, 'kept')
    db = open_tenant_db('t0', lite)
    db.conn.execute(sa.text("INSERT INTO own VALUES ('lost')"))
    del db
    gc.collect()
    with open_tenant_db('t0', lite) as db: assert names(db) == ['kept']; put(db, 'more')

@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='counts open files in /proc')
def test_open_files_are_bounded(lite):
    lite.open_dbs.max_open = 3
    ids = many(lite, 20)
    gc.collect()
    folder = f'{Path(lite.url.database).parent}/'  # another test's engine may still close files of its own
    count = lambda: sum(os.readlink(f'/proc/self/fd/{f}').startswith(folder) and '_db.db' in os.readlink(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd') if os.path.islink(f'/proc/self/fd/{f}'))
    for _ in range(3):
        for i in ids:
            with open_tenant_db(i, lite) as db: put(db, i)
    assert 0 < count() <= 3*3*2
    for i in ids: close_tenant_db(i, lite)
    assert count() == 0

def test_closing_the_pool_leaves_handles_in_use_alone(lite):
    many(lite, 1)
    db = open_tenant_db('t0', lite)
    close_tenant_db('t0', lite)
    put(db, 'x')
    with open_tenant_db('t0', lite) as other: assert names(other) == ['x']
    db.close()
    close_tenant_db('nobody', lite)

# --- States

def test_a_suspended_tenant_is_not_opened_until_it_is_resumed(host, prefix):
    with get_or_create_tenant_db(prefix, host=host) as db: put(db, 'x')
    suspend_tenant(prefix, host)
    for f in (open_tenant_db, get_or_create_tenant_db):
        with pytest.raises(TenantSuspended, match='suspended.*resume'): f(prefix, host=host)
    assert [t.id for t in list_tenants(host, 'paused')] == [prefix] and list_tenants(host, 'active') == []
    resume_tenant(prefix, host)
    with open_tenant_db(prefix, host) as db: assert names(db) == ['x']

def test_a_state_is_one_of_four(lite):
    many(lite, 1)
    with pytest.raises(ValueError, match='nonsense'): lite.set_state('t0', 'nonsense')
    with pytest.raises(sa.exc.IntegrityError), writing(lite.engine) as conn: conn.exec_driver_sql("UPDATE core_tenants SET state = 'nonsense'")

def test_a_deleted_tenant_is_gone_with_its_database(host, prefix, tmp_path):
    with get_or_create_tenant_db(prefix, host=host) as db: put(db, 'old')
    url = host.url_of(host.find(prefix))
    delete_tenant(prefix, host)
    assert host.tenants() == [] and not any(prefix in f for f in files(tmp_path))
    with pytest.raises(DatabaseUnavailable): Store(url)
    with pytest.raises(TenantNotFound): open_tenant_db(prefix, host)
    with get_or_create_tenant_db(prefix, host=host) as db: assert 'own' not in sa.inspect(db.engine).get_table_names()

def test_a_tenant_with_a_running_job_is_busy(host, prefix):
    get_or_create_tenant_db(prefix, host=host).close()
    s = Store(host.url_of(host.find(prefix)))
    s.add(dict(id='a', job_type='t', task='t', max_retries=3)); row = s.claim_one('a', 'tok', 'w', 30)
    with pytest.raises(TenantBusy, match='1 running'): delete_tenant(prefix, host)
    assert host.find(prefix).state == 'deleting' and s.get('a')['status'] == 'running'
    with pytest.raises(TenantSuspended): open_tenant_db(prefix, host)
    assert s.finish(row, Outcome('completed'))
    s.close()
    delete_tenant(prefix, host)
    assert host.tenants() == []

def test_a_job_whose_worker_died_does_not_keep_a_tenant(host, prefix):
    get_or_create_tenant_db(prefix, host=host).close()
    s = Store(host.url_of(host.find(prefix)))
    s.add(dict(id='a', job_type='t', task='t', max_retries=3)); s.claim_one('a', 'tok', 'w', -1); s.close()
    delete_tenant(prefix, host)
    assert host.tenants() == []

def test_a_tenant_with_an_open_handle_is_busy(lite):
    many(lite, 1)
    with open_tenant_db('t0', lite) as db:
        with pytest.raises(TenantBusy, match='1 open handle'): delete_tenant('t0', lite)
        put(db, 'still there')
    delete_tenant('t0', lite)
    assert lite.tenants() == []

def test_force_deletes_at_once(host, prefix):
    get_or_create_tenant_db(prefix, host=host).close()
    s = Store(host.url_of(host.find(prefix)))
    s.add(dict(id='a', job_type='t', task='t', max_retries=3)); s.claim_one('a', 'tok', 'w', 30); s.close()
    delete_tenant(prefix, host, force=True)
    assert host.tenants() == []

# --- Identity and damage

def test_swapped_files_are_noticed(lite):
    for i, db in ((i, get_or_create_tenant_db(i, host=lite)) for i in ('acme', 'globex')): put(db, i); db.close(); close_tenant_db(i, lite)
    folder = Path(lite.url.database).parent
    (folder/'acme_db.db').rename(folder/'x'); (folder/'globex_db.db').rename(folder/'acme_db.db'); (folder/'x').rename(folder/'globex_db.db')
    for i, other in (('acme', 'globex'), ('globex', 'acme')):
        for f in (open_tenant_db, get_or_create_tenant_db):
            with pytest.raises(TenantMismatch, match=f"'{other}', not to '{i}'"): f(i, host=lite)

def test_a_file_that_is_put_in_anothers_place_is_noticed_by_a_process_that_has_it_open(lite, tmp_path):
    "A web process went on with the pool that it had, and showed one tenant the other's rows"
    for i in ('acme', 'globex'):
        with get_or_create_tenant_db(i, host=lite) as db: put(db, i)
    kept = open_tenant_db('globex', lite)
    copy, at = export_tenant(lite, 'acme', tmp_path/'copy.db'), Path(lite.url_of(lite.find('globex')).database)
    for suffix in ('', '-wal', '-shm'):
        if (p := at.with_name(at.name + suffix)).exists(): p.rename(tmp_path/f'away{suffix}')
    copy.rename(at)
    for _ in range(2):
        with pytest.raises(TenantMismatch, match="'acme', not to 'globex'"): open_tenant_db('globex', lite)
    kept.close()
    with pytest.raises(TenantMismatch, match="'acme', not to 'globex'"): open_tenant_db('globex', lite)
    for p in at.parent.glob('globex_db.db*'): p.unlink()
    for suffix in ('', '-wal', '-shm'):
        if (p := tmp_path/f'away{suffix}').exists(): p.rename(at.with_name(at.name + suffix))
    with open_tenant_db('globex', lite) as db: assert names(db) == ['globex']

def test_a_database_of_unknown_origin_is_not_taken_over(lite):
    folder = Path(lite.url.database).parent
    con = sqlite3.connect(folder/'acme_db.db'); con.execute('CREATE TABLE secret (x)'); con.commit(); con.close()
    with pytest.raises(TenantMismatch, match='acme'): get_or_create_tenant_db('acme', host=lite)
    assert lite.tenants() == []

def test_a_lost_file_is_an_error_and_no_empty_database(lite):
    many(lite, 2)
    close_tenant_db('t0', lite)
    path = Path(lite.url_of(lite.find('t0')).database)
    for p in path.parent.glob('t0_db.db*'): p.unlink()
    for f in (open_tenant_db, get_or_create_tenant_db):
        with pytest.raises(DatabaseUnavailable): f('t0', host=lite)
    assert not path.exists()
    with open_tenant_db('t1', lite) as db: put(db, 'not affected')

def test_a_damaged_file_harms_only_its_tenant(lite):
    many(lite, 2)
    for i in ('t0', 't1'): close_tenant_db(i, lite)
    path = Path(lite.url_of(lite.find('t0')).database)
    path.write_bytes(b'no database' * 1000)
    with pytest.raises(DatabaseCorrupt, match='good copy'): open_tenant_db('t0', lite)
    with open_tenant_db('t1', lite) as db: put(db, 'not affected')
    with pytest.raises(FhSaasError): delete_tenant('t0', lite)
    delete_tenant('t0', lite, force=True)
    assert [t.id for t in lite.tenants()] == ['t1'] and not path.exists()

def test_a_failed_open_leaves_nothing_in_the_cache(lite):
    many(lite, 1)
    close_tenant_db('t0', lite)
    path = Path(lite.url_of(lite.find('t0')).database)
    path.rename(path.with_suffix('.away'))
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable): open_tenant_db('t0', lite)
    assert len(lite.open_dbs) == 0 and not lite.open_dbs._users
    path.with_suffix('.away').rename(path)
    with open_tenant_db('t0', lite) as db: put(db, 'back')

# --- Connections

def pragmas(run): return {p: run(f'PRAGMA {p}') for p in ('journal_mode', 'synchronous', 'foreign_keys', 'busy_timeout')}

@pytest.mark.parametrize('level,number', [('FULL', 2), ('NORMAL', 1), ('EXTRA', 3)])
def test_every_connection_has_its_pragmas_set(new_host, level, number):
    host = new_host('sqlite', level, synchronous=level)
    handles = [get_or_create_tenant_db('acme', host=host) for _ in range(3)]
    want = dict(journal_mode='wal', synchronous=number, foreign_keys=1, busy_timeout=5000)
    for db in handles: assert pragmas(lambda p: db.conn.exec_driver_sql(p).scalar()) == want
    with reading(host.engine) as conn: assert pragmas(lambda p: conn.exec_driver_sql(p).scalar()) == want
    s = Store(host.url_of(host.find('acme')), synchronous=level)
    for _ in range(2):
        with s.cursor() as cur: assert pragmas(lambda p: cur.execute(p).fetchone()[0]) == want
        s.engine.dispose()
    s.close()
    for db in handles: db.close()

def test_the_engines_store_has_the_level_of_its_settings(lite, new_engine):
    many(lite, 1)
    s = new_engine(synchronous='NORMAL', busy=1.5).store(lite.url_of(lite.find('t0')))
    with s.cursor() as cur: assert pragmas(lambda p: cur.execute(p).fetchone()[0]) == dict(journal_mode='wal', synchronous=1, foreign_keys=1, busy_timeout=1500)

def test_the_default_level_is_full(lite, new_engine):
    many(lite, 1)
    assert Settings().synchronous == 'FULL'
    with open_tenant_db('t0', lite) as db: assert db.conn.exec_driver_sql('PRAGMA synchronous').scalar() == 2

@pytest.mark.parametrize('level', ['OFF', 'off', '', 'FULL; DROP TABLE x', None, 2])
def test_another_level_is_refused(tmp_path, level):
    with pytest.raises(ValueError, match='synchronous'): HostDatabase(f"sqlite:///{tmp_path/'host.db'}", synchronous=level)

def test_jobs_of_a_tenant_run_through_its_handle(host, prefix, engine):
    with get_or_create_tenant_db(prefix, host=host) as db:
        m = BackgroundTaskManager(db, engine)
        id, bg = m.submit('t', lambda job: job.tenant)
        bg.func(*bg.args)
        assert m.get_job(id).result == f'"{prefix}"' and m.tenant_jobs[id].status == 'completed'
    with open_tenant_db(prefix, host) as db: assert db.q('SELECT status FROM tenant_jobs')[0]['status'] == 'completed'
    engine.stop(0)

# --- The environment

env_names = ('DB_TYPE', 'DB_USER', 'DB_PASS', 'DB_HOST', 'DB_PORT', 'DB_NAME')

@pytest.fixture
def env(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for n in env_names: monkeypatch.delenv(n, raising=False)
    return lambda **kw: [monkeypatch.setenv(k, v) for k, v in kw.items()]

def test_without_environment_the_host_is_a_file_here(env, tmp_path):
    h = HostDatabase()
    assert h.url.get_backend_name() == 'sqlite' and h.tenants() == []
    h.close()
    assert any(f.endswith('.db') for f in files(tmp_path))

def test_the_environment_names_a_file(env, tmp_path):
    env(DB_TYPE='sqlite', DB_NAME='mine')
    h = HostDatabase.from_env()
    with get_or_create_tenant_db('acme', host=h) as db: put(db, 'x')
    h.close()
    assert {'mine.db', 'acme_db.db'} <= {*files(tmp_path)}

def test_without_a_host_that_of_the_environment_is_meant(env, tmp_path):
    env(DB_TYPE='SQLITE', DB_NAME=str(tmp_path/'envhost'))
    with get_or_create_tenant_db('acme', 'Acme') as db: put(db, 'x')
    with open_tenant_db('acme') as db: assert names(db) == ['x']
    assert [t.name for t in list_tenants()] == ['Acme'] and (tmp_path/'acme_db.db').exists()
    suspend_tenant('acme'); resume_tenant('acme'); close_tenant_db('acme'); delete_tenant('acme')
    assert list_tenants() == []

def test_another_environment_is_another_host(env, tmp_path):
    for n in ('one', 'two'):
        (tmp_path/n).mkdir()
        env(DB_TYPE='SQLITE', DB_NAME=str(tmp_path/n/'host'))
        get_or_create_tenant_db('acme', n).close()
        assert [t.name for t in list_tenants()] == [n]

def test_a_relative_host_of_the_environment_means_the_current_folder(env, tmp_path, monkeypatch):
    for n in ('one', 'two'):
        (tmp_path/n).mkdir()
        monkeypatch.chdir(tmp_path/n)
        get_or_create_tenant_db('acme', n).close()
        assert [t.name for t in list_tenants()] == [n] and (tmp_path/n/'acme_db.db').exists()

def test_the_environment_names_a_server(env, new_pg):
    u = sa.make_url(new_pg())
    env(DB_TYPE='POSTGRESQL', DB_USER=u.username, DB_PASS=u.password or 'any', DB_HOST=u.host, DB_PORT=str(u.port), DB_NAME=u.database)
    h = HostDatabase()
    assert (h.url.get_backend_name(), h.url.host, h.url.port, h.url.database, h.url.username) == ('postgresql', u.host, u.port, u.database, u.username) and h.tenants() == []
    h.close()

def test_odd_passwords_of_the_environment_survive(env):
    env(DB_TYPE='POSTGRESQL', DB_PASS='p@ss/w:rd?#%20 é', DB_HOST='db.example.com')
    u = sa.make_url(env_url())
    assert (u.password, u.host, u.port) == ('p@ss/w:rd?#%20 é', 'db.example.com', 5432)

@pytest.mark.parametrize('kw,word', [(dict(DB_TYPE='MYSQL'), 'MYSQL'), (dict(DB_TYPE='POSTGRESQL', DB_PORT='many'), 'many')])
def test_a_wrong_environment_names_the_value(env, kw, word):
    env(**kw)
    with pytest.raises(InvalidDatabaseURL, match=word): HostDatabase()

# --- Wrong hosts, and secrets

@pytest.mark.parametrize('url,error', [('nonsense', InvalidDatabaseURL), ('mysql://u:p@h/x', InvalidDatabaseURL), ('postgresql://u:p@h', InvalidDatabaseURL), ('sqlite://', UnsupportedDatabase),
    ('sqlite:///:memory:', UnsupportedDatabase), (7, InvalidDatabaseURL)])
def test_a_wrong_url_is_a_typed_error(url, error):
    with pytest.raises(error): HostDatabase(url)

def test_a_host_that_is_no_database_is_a_typed_error(tmp_path):
    (tmp_path/'host.db').write_bytes(b'no database'*1000)
    with pytest.raises(DatabaseCorrupt): HostDatabase(f"sqlite:///{tmp_path/'host.db'}")

def test_a_host_that_cannot_be_written_is_a_typed_error(lite):
    many(lite, 1); lite.close()
    con = sqlite3.connect(lite.url.database); con.execute('PRAGMA wal_checkpoint(TRUNCATE)'); con.close()
    with pytest.raises(DatabaseReadOnly): HostDatabase(f'sqlite:///file:{lite.url.database}?mode=ro&uri=true').set_state('t0', 'paused')

canary = 'kanarienvogel'

def shown_everywhere(x): return f'{x} {x!r} {getattr(x, "args", "")} {x.__cause__!r} {x.__context__!r}' if isinstance(x, BaseException) else f'{x} {x!r}'

def test_a_password_is_in_no_repr_error_or_log(pg_server, new_host, env, caplog, new_engine, prefix):
    caplog.set_level(logging.DEBUG)
    said, base = [], sa.make_url(pg_server).set(password=canary)
    host = new_host('postgresql')
    host.url = host.url.set(password=canary)
    with get_or_create_tenant_db(prefix, host=host) as db:
        engine = new_engine(busy=0.5)
        m = BackgroundTaskManager(db, engine)
        said += [host, db, host.find(prefix), host.url_of(host.find(prefix)), engine, m, m.store, m.store.url, list_tenants(host)]
        for bad in ('no', None):
            try: m.get_job(bad)
            except FhSaasError as e: said.append(e)
    urls = [base.set(port=free_port()), base.set(database='no_such_database'), base.set(drivername='mysql'), sa.URL.create('postgresql', base.username, canary, base.host, base.port), base.set(username='no_such_role', database='no_such_database')]
    for u in urls:
        for f in (HostDatabase, Store):
            try: f(u.render_as_string(hide_password=False))
            except FhSaasError as e: said.append(e)
            else: raise AssertionError(u)
    try: BackgroundTaskManager(type('Db', (), dict(engine=type('E', (), dict(url=f'postgres:/u:{canary}@h/x')))))
    except FhSaasError as e: said.append(e)
    try: HostDatabase(f'postgresql://u:{canary}@h:port/x')
    except FhSaasError as e: said.append(e)
    env(DB_TYPE='POSTGRESQL', DB_PASS=canary, DB_HOST='127.0.0.1', DB_PORT=str(free_port()))
    try: get_or_create_tenant_db('acme')
    except FhSaasError as e: said.append(e)
    assert len(said) > 20 and not [s for s in map(shown_everywhere, said) if canary in s] and canary not in caplog.text
    with reading(host.engine) as conn: assert canary not in str(conn.exec_driver_sql('SELECT * FROM core_tenants').fetchall())
    engine.stop(0)

# --- What happens meanwhile

def test_nobody_gets_a_handle_that_was_not_checked(lite, monkeypatch):
    "Two requests open a tenant's database for the first time at the same moment, and it is another's"
    many(lite, 2)
    at = {i: Path(lite.url_of(lite.find(i)).database) for i in ('t0', 't1')}
    for i in at: close_tenant_db(i, lite)
    shutil.copy(at['t1'], at['t0'])
    both, real = threading.Barrier(2, timeout=10), fh_saas.db_tenant.read_meta
    def slow(conn):
        if both.n_waiting < 2 and not both.broken:
            try: both.wait()
            except threading.BrokenBarrierError: pass
        return real(conn)
    monkeypatch.setattr(fh_saas.db_tenant, 'read_meta', slow)
    def opened():
        with pytest.raises(TenantMismatch, match="'t1'"): open_tenant_db('t0', lite)
    with ThreadPoolExecutor(2) as pool: [f.result() for f in [pool.submit(opened) for _ in range(2)]]
    both.abort()
    opened()

def test_a_database_that_two_tenants_are_said_to_have_is_opened_for_its_own(lite):
    many(lite, 1)
    lite.register(TenantCatalog('other', 'other', lite.find('t0').db_url))
    with open_tenant_db('t0', lite):
        with pytest.raises(TenantMismatch, match="'t0', not to 'other'"): open_tenant_db('other', lite)
        open_tenant_db('t0', lite).close()

def test_children_of_a_process_do_not_read_each_others_answers(host, prefix):
    names = [f'{prefix}{n}' for n in range(4)]
    for n in names: get_or_create_tenant_db(n, host=host).close()
    host.open_dbs.close(host.url_of(host.find(names[0])))
    script = here/'forks_host.py'
    done = subprocess.run([sys.executable, script, host.url.render_as_string(hide_password=False), ','.join(names)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == (f'4 children, {names[0]}, 4 notes\n', 0), done.stdout + done.stderr

def job_in(host, id, **kw):
    with closing(Store(host.url_of(host.find(id)))) as s: s.add(dict(id='a', job_type='t', task='t', max_retries=3) | kw)

def sleeping(how):
    "The `time` of one module: the standard one is everybody's, and the drivers sleep too"
    return SimpleNamespace(sleep=how, monotonic=time.monotonic, time=time.time)

@pytest.mark.parametrize('waits', ['due', 'scheduled', 'none'])
def test_a_job_that_is_begun_after_all_keeps_its_tenant(host, prefix, waits, monkeypatch):
    "Who runs jobs hears of a state within a second, and may begin one until then"
    get_or_create_tenant_db(prefix, host=host).close()
    if waits != 'none': job_in(host, prefix, **dict(run_at='2100-01-01T00:00:00.000000') if waits == 'scheduled' else {})
    def heeding(s):
        assert host.find(prefix).state == 'deleting' and s == fh_saas.db_tenant.heeded > 1
        if waits == 'due':
            with closing(Store(host.url_of(host.find(prefix)))) as s: assert s.claim_one('a', 'tok', 'w', 30)
        slept.append(waits)
    slept = []
    monkeypatch.setattr(fh_saas.db_tenant, 'time', sleeping(heeding))
    if waits == 'due':
        with pytest.raises(TenantBusy, match='1 running'): delete_tenant(prefix, host)
    else: delete_tenant(prefix, host)
    assert (slept, host.find(prefix) is None) == ([waits]*(waits != 'none'), waits != 'due')

def test_a_delete_that_was_cut_off_is_finished_by_the_same_call(host, prefix, monkeypatch):
    get_or_create_tenant_db(prefix, host=host).close()
    with monkeypatch.context() as m:
        m.setattr(HostDatabase, 'unregister', lambda *args: 1/0)
        with pytest.raises(ZeroDivisionError): delete_tenant(prefix, host)
    assert host.find(prefix).state == 'deleting'
    delete_tenant(prefix, host)
    assert host.find(prefix) is None

def test_the_database_that_goes_is_the_tenants_own(lite, pg_server):
    "It may lie on another server than the host"
    name = f'fh_saas_test_{gen_id()[-12:]}'
    eng = open_engine(pg_server, isolation_level='AUTOCOMMIT', poolclass=sa.NullPool)
    with eng.connect() as conn: conn.exec_driver_sql(f'CREATE DATABASE {name}')
    lite.register(TenantCatalog('far', 'far', sa.make_url(pg_server).set(database=name).render_as_string(hide_password=False)))
    with open_tenant_db('far', lite) as db: put(db, 'x')
    delete_tenant('far', lite)
    with eng.connect() as conn: assert not conn.execute(sa.text('SELECT 1 FROM pg_database WHERE datname = :n'), dict(n=name)).first()

# --- Upgrades of all

def upgraded(host, upgrade, **kw): return {t: e and type(e).__name__ for t, e in migrate_tenants(host, upgrade, '2', **kw)}

def test_an_upgrade_leaves_a_tenant_in_the_state_in_which_it_is(lite):
    many(lite, 5)
    suspend_tenant('t4', lite)
    def upgrade(db):
        seen.append((db.tenant_id, lite.find(db.tenant_id).state))
        if db.tenant_id == 't0':  # while those behind it wait for their turn
            suspend_tenant('t1', lite)
            lite.set_state('t2', 'deleting')
            delete_tenant('t3', lite)
            suspend_tenant('t0', lite)
    seen = []
    assert upgraded(lite, upgrade, workers=1) == dict.fromkeys(('t0', 't1', 't4'))
    assert sorted(t for t, _ in seen) == ['t0', 't1', 't4'] and {s for t, s in seen if t != 't1'} == {'migrating'}
    assert {t.id: t.state for t in lite.tenants()} == dict(t0='paused', t1='paused', t2='deleting', t4='paused')

@pytest.mark.parametrize('where', ['in the upgrade', 'before its end'])
def test_an_upgrade_that_was_cut_off_comes_back_to_the_state_before(host, prefix, where, monkeypatch):
    for n in (0, 1): get_or_create_tenant_db(f'{prefix}{n}', host=host).close()
    suspend_tenant(f'{prefix}1', host)
    states = lambda: {t.id[-1]: t.state for t in host.tenants()}
    def upgrade(db): ran.append(db.tenant_id[-1]) or where == 'in the upgrade' and len(ran) < 3 and 1/0
    ran, real = [], HostDatabase.set_state
    with monkeypatch.context() as m:
        m.setattr(HostDatabase, 'set_state', lambda self, id, state, *args: real(self, id, state, *args) if state == 'migrating' else 1/0)
        assert upgraded(host, upgrade) == {f'{prefix}{n}': 'ZeroDivisionError' for n in (0, 1)}
    assert states() == {'0': 'migrating', '1': 'migrating'}
    assert upgraded(host, upgrade) == dict.fromkeys((f'{prefix}0', f'{prefix}1'))
    assert states() == {'0': 'active', '1': 'paused'} and sorted(ran) == (['0', '0', '1', '1'] if where == 'in the upgrade' else ['0', '1'])

def test_what_an_upgrade_leaves_uncommitted_is_committed(host, prefix):
    with get_or_create_tenant_db(prefix, host=host) as db: put(db, 'a')
    assert upgraded(host, lambda db: db.q('ALTER TABLE own ADD COLUMN price INTEGER')) == {prefix: None}
    assert [e for _, e in migrate_tenants(host, lambda db: db.q('UPDATE own SET price = 5'), 3)] == [None]
    with open_tenant_db(prefix, host) as db: assert db.q('SELECT price FROM own') == [dict(price=5)]

def test_an_upgrade_that_is_none_takes_no_tenant_out_of_service(lite):
    async def later(db): raise AssertionError
    many(lite, 1)
    for bad in (later, 'later', 3):
        with pytest.raises(TypeError, match='plain function.*nothing was upgraded'): migrate_tenants(lite, bad, '2')
    assert lite.find('t0').state == 'active'
    assert upgraded(lite, lambda db: later(db)) == dict(t0='TypeError') and read_meta_of(lite, 't0').get('app_version') is None

def read_meta_of(host, id):
    with reading(host.open_db(host.find(id)).engine) as conn: return read_meta(conn)

def test_an_upgrade_begins_when_nobody_believes_any_more_that_its_tenant_is_active(host, prefix, new_engine):
    "One that submits and runs jobs all the time: none is open at most moments"
    begun, over, stop = [], [], threading.Event()
    with get_or_create_tenant_db(prefix, host=host) as db:
        m = BackgroundTaskManager(db, new_engine(poll=0.1))
        def flow():
            while not stop.wait(0.05): m.submit('t', lambda: begun.append(time.monotonic()), run_at='2020-01-01')
        t = threading.Thread(target=flow)
        t.start()
        wait_until(lambda: len(begun) > 5)
        def upgrade(db):
            over.append(time.monotonic())
            time.sleep(1)
            over.append(time.monotonic())
        try: assert upgraded(host, upgrade) == {prefix: None}
        finally: stop.set(); t.join()
        assert not [at for at in begun if over[0] < at < over[1]]
        wait_until(lambda: begun[-1] > over[1], 20, 'it does not go on')

def test_small_upgrades_do_not_wait_one_after_the_other(lite, monkeypatch):
    many(lite, 24)
    slept, out = [], []
    def wait(s):
        slept.append(s)
        out.append(sum(t.state == 'migrating' for t in lite.tenants()))
        time.sleep(0.2)
    monkeypatch.setattr(fh_saas.ops.upgrades, 'time', sleeping(wait))
    assert len(upgraded(lite, lambda db: None, workers=2)) == 24 and slept == [fh_saas.db_tenant.heeded]*24
    assert 4 < max(out) <= 2*16

def test_long_upgrades_keep_few_tenants_out_of_service(lite, monkeypatch):
    many(lite, 12)
    monkeypatch.setattr(fh_saas.ops.upgrades, 'heeded', 0.05)
    out = []
    def upgrade(db):
        time.sleep(0.3)
        out.append(sum(t.state == 'migrating' for t in lite.tenants()))
    assert len(upgraded(lite, upgrade, workers=2)) == 12 and max(out) <= 4

def test_a_tenant_whose_state_somebody_else_changes_is_not_upgraded(lite, monkeypatch):
    many(lite, 1)
    real = fh_saas.ops.upgrades.write_notes
    def other(*args, **notes):
        real(*args, **notes)
        if 'state_before' in notes: lite.set_state('t0', 'migrating')  # at this moment
    monkeypatch.setattr(fh_saas.ops.upgrades, 'write_notes', other)
    assert upgraded(lite, lambda db: 1/0) == dict(t0='FhSaasError') and lite.find('t0').state == 'migrating'

def same(host): return HostDatabase(str(host.url.render_as_string(hide_password=False)))

def test_of_two_who_upgrade_at_once_the_second_waits_and_finds_it_done(host, prefix, caplog):
    for n in range(3): get_or_create_tenant_db(f'{prefix}{n}', host=host).close()
    ran, go_on = [], threading.Event()
    def upgrade(db): ran.append(db.tenant_id); go_on.wait(20)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(upgraded, host, upgrade, workers=1)
        wait_until(lambda: ran)
        second = pool.submit(upgraded, same(host), lambda db: 1/0)
        wait_until(lambda: 'waiting for its end' in caplog.text)
        go_on.set()
        done = dict.fromkeys(f'{prefix}{n}' for n in range(3))
        assert first.result(30) == second.result(30) == done and sorted(ran) == [*done]
    assert {t.state for t in host.tenants()} == {'active'}

@pytest.mark.parametrize('age,waits', [(0, True), (20, False), (-3600, False)])
def test_who_was_killed_while_it_upgraded_is_not_waited_for_for_long(host, prefix, age, waits):
    get_or_create_tenant_db(prefix, host=host).close()
    with writing(host.engine) as conn: write_meta(conn, upgrading=f'web:1:abc {timestamp(time.time() - age)}')
    turn = fh_saas.ops.upgrades.HostTurn(host)
    assert turn.take() != waits
    with writing(host.engine) as conn: write_meta(conn, upgrading='')
    assert upgraded(host, lambda db: None) == {prefix: None}
    with reading(host.engine) as conn: assert not read_meta(conn)['upgrading']

@pytest.mark.parametrize('how', ['stopped', 'without the host', 'without its thread'])
def test_who_was_not_heard_of_for_long_begins_no_further_tenant(lite, monkeypatch, how):
    many(lite, 3)
    monkeypatch.setattr(fh_saas.ops.upgrades, 'heeded', 0)
    turn = fh_saas.ops.upgrades.HostTurn
    made, init, read = [], turn.__init__, turn._read
    monkeypatch.setattr(turn, '__init__', lambda self, host, *args: init(self, host, *args) or made.append(self))
    monkeypatch.setattr(turn, 'give', lambda self: monkeypatch.setattr(turn, '_read', read))
    def upgrade(db):
        ran.append(db.tenant_id)
        if how == 'stopped':  # and another has the turn by now
            with writing(lite.engine) as conn: write_meta(conn, upgrading=f'web:1:abc {timestamp()}')
        else: monkeypatch.setattr(turn, '_read', lambda *args: 1/0 if how == 'without its thread' else (_ for _ in ()).throw(DatabaseUnavailable('gone')))
        made[0].kept -= fh_saas.ops.upgrades.turn_lasts
    ran = []
    assert upgraded(lite, upgrade, workers=1) == dict(t0=None, t1='FhSaasError', t2='FhSaasError') and ran == ['t0']

@pytest.mark.parametrize('heard', [True, False])
def test_who_upgrades_one_tenant_for_long_is_heard_of_meanwhile(lite, monkeypatch, heard):
    monkeypatch.setattr(fh_saas.ops.upgrades, 'turn_lasts', 1.5)
    turn = fh_saas.ops.upgrades.HostTurn
    if not heard: monkeypatch.setattr(turn, '_keep', lambda self: None)
    with turn(lite):
        time.sleep(2)
        assert turn(lite).take() != heard

def test_who_was_not_heard_of_for_long_and_has_the_turn_again_keeps_it(lite, monkeypatch):
    monkeypatch.setattr(fh_saas.ops.upgrades, 'turn_lasts', 1.5)
    turn = fh_saas.ops.upgrades.HostTurn
    with turn(lite) as mine:
        other = turn(lite)
        with writing(lite.engine) as conn: write_meta(conn, upgrading=f'{other.who} {timestamp()}')
        time.sleep(0.7)  # it has asked meanwhile
        assert not turn(lite).take()
        other.give()
        mine.kept = 0.0
        mine.mine()
        time.sleep(2)
        assert not turn(lite).take()

def test_no_copy_is_put_back_while_tenants_are_upgraded(lite, tmp_path, monkeypatch):
    many(lite, 2)
    for m in (fh_saas.ops.upgrades, fh_saas.ops.copies): monkeypatch.setattr(m, 'heeded', 0.1)
    copy = export_tenant(lite, 't0', tmp_path/'copy')
    def upgrade(db):
        other = "is migrating: nothing was put back" if db.tenant_id == 't0' else "is migrating: nothing was put back|upgrades the tenants of this host.*nothing was changed"
        with pytest.raises(FhSaasError, match=other): restore_tenant(lite, 't0', copy, busy=0.1)  # whichever of the two comes first
        ran.append(db.tenant_id)
    ran = []
    assert upgraded(lite, upgrade, workers=1) == dict(t0=None, t1=None) and len(ran) == 2
    assert lite.find('t0').held is None
    with ThreadPoolExecutor(1) as pool:
        with fh_saas.ops.upgrades.HostTurn(lite): later = pool.submit(restore_tenant, lite, 't0', copy); time.sleep(0.5); assert lite.find('t0').held is None
        later.result(20)
    assert lite.find('t0').held

def test_a_version_may_be_a_number(lite):
    many(lite, 1)
    ran = []
    for _ in range(2): assert dict(migrate_tenants(lite, lambda db: ran.append(1), 2)) == dict(t0=None)
    assert ran == [1]

def test_a_tenant_is_suspended_though_its_database_is_locked(lite):
    many(lite, 1)
    fh_saas.ops.upgrades.write_notes(lite.url_of(lite.find('t0')), lite, state_before='active')  # left by one who was killed
    with sqlite3.connect(lite.url_of(lite.find('t0')).database, isolation_level=None) as conn:
        conn.execute('BEGIN IMMEDIATE')
        suspend_tenant('t0', lite)
    conn.close()
    assert lite.find('t0').state == 'paused'

def test_a_note_of_who_upgrades_now_is_not_taken_for_one_that_was_left(lite):
    many(lite, 1)
    with writing(lite.engine) as conn: write_meta(conn, upgrading=f'web:1:abc {timestamp()}')
    fh_saas.ops.upgrades.write_notes(lite.url_of(lite.find('t0')), lite, state_before='active')
    suspend_tenant('t0', lite)
    with pytest.raises(TenantSuspended, match='migrate again'): resume_tenant('t0', lite)

@pytest.mark.parametrize('note', ['web:1:abc 2020-01-01T00:00:00.000000', 'restore:web:1:abc now'])
def test_a_note_that_was_left_keeps_no_tenant_from_being_resumed(lite, note):
    many(lite, 1)
    with writing(lite.engine) as conn: write_meta(conn, upgrading=note.replace('now', timestamp()))
    fh_saas.ops.upgrades.write_notes(lite.url_of(lite.find('t0')), lite, state_before='active')
    suspend_tenant('t0', lite)
    resume_tenant('t0', lite)
    assert lite.find('t0').state == 'active'

def test_a_copy_is_put_back_when_who_upgraded_was_killed_just_before(lite, tmp_path, monkeypatch):
    many(lite, 1)
    monkeypatch.setattr(fh_saas.ops.copies, 'heeded', 0.1)
    copy = export_tenant(lite, 't0', tmp_path/'copy')
    with writing(lite.engine) as conn: write_meta(conn, upgrading=f'web:1:abc {timestamp(time.time() - 12)}')
    restore_tenant(lite, 't0', copy)
    assert lite.find('t0').held

def test_no_password_of_a_url_is_in_the_arguments_of_a_tool(monkeypatch):
    seen = []
    monkeypatch.setattr(fh_saas.ops.copies.subprocess, 'run', lambda args, env, **kw: seen.append((args, env)) or SimpleNamespace(returncode=0, stdout=''))
    monkeypatch.setattr(fh_saas.ops.copies.shutil, 'which', lambda name: f'/bin/{name}')
    for url in ('postgresql://u:s3cret@h/db', 'postgresql://u@h/db?password=s3cret&sslmode=require'):
        fh_saas.ops.copies._copy_pg(sa.make_url(url), 'there')
        args, env = seen.pop()
        assert 's3cret' not in ' '.join(args) and env['PGPASSWORD'] == 's3cret' and 'host=h' in args[-1]
    with pytest.raises(DatabaseUnavailable, match='key without one'): fh_saas.ops.copies._copy_pg(sa.make_url('postgresql://u@h/db?sslpassword=s3cret'), 'there')

def test_who_has_lost_his_turn_does_not_end_that_of_another(host):
    one, two, three = (fh_saas.ops.upgrades.HostTurn(host) for _ in range(3))
    assert one.take() and not two.take()
    with writing(host.engine) as conn: write_meta(conn, upgrading=f'{one.who} {timestamp(time.time() - 20)}')  # `one` was stopped for so long
    assert two.take()
    one.give()
    assert not three.take() and two.take()
    two.give()
    assert three.take()
    three.give()

def test_a_tenant_that_is_suspended_while_it_is_upgraded_is_not_resumed_before_the_end(host, prefix):
    get_or_create_tenant_db(prefix, host=host).close()
    def upgrade(db):
        suspend_tenant(prefix, host)
        with pytest.raises(TenantSuspended, match='migrate again'): resume_tenant(prefix, host)
        seen.append(host.find(prefix).state)
        if len(seen) == 1: raise ZeroDivisionError
    seen = []
    assert upgraded(host, upgrade) == {prefix: 'ZeroDivisionError'}
    with pytest.raises(TenantSuspended, match='migrate again'): resume_tenant(prefix, host)
    assert upgraded(host, upgrade) == {prefix: None} and seen == ['paused', 'paused'] and host.find(prefix).state == 'paused'
    resume_tenant(prefix, host)
    assert host.find(prefix).state == 'active'

def test_a_run_that_is_interrupted_leaves_no_tenant_out_of_service_that_it_did_not_come_to(lite, monkeypatch):
    ids = many(lite, 40)
    lite.set_state('t39', 'migrating')  # another run was cut off there
    monkeypatch.setattr(fh_saas.ops.upgrades, 'heeded', 0.3)
    ran = []
    run = migrate_tenants(lite, lambda db: ran.append(db.tenant_id), '2', workers=2)
    next(run)
    assert 1 < sum(t.state == 'migrating' for t in lite.tenants()) <= 33
    run.close()
    assert 0 < len(ran) < 10 and {t.id: t.state for t in lite.tenants()} == dict.fromkeys(ids, 'active') | dict(t39='migrating')
    suspend_tenant('t38', lite); resume_tenant('t38', lite)
    assert len(upgraded(lite, lambda db: None)) == 40 and {t.state for t in lite.tenants()} == {'active'}

def test_a_run_that_ended_between_its_last_two_steps_keeps_nobody_from_resuming(lite):
    many(lite, 1)
    assert upgraded(lite, lambda db: None) == dict(t0=None)
    fh_saas.ops.upgrades.write_notes(lite.url_of(lite.find('t0')), lite, state_before='active')
    suspend_tenant('t0', lite)
    resume_tenant('t0', lite)
    assert lite.find('t0').state == 'active'
    suspend_tenant('t0', lite)
    fh_saas.ops.upgrades.write_notes(lite.url_of(lite.find('t0')), lite, state_before='active')
    with pytest.raises(TenantSuspended): resume_tenant('t0', lite)
    assert upgraded(lite, lambda db: 1/0) == dict(t0=None)  # it is done
    resume_tenant('t0', lite)

@pytest.mark.parametrize('how', ['done', 'given up'])
def test_what_another_process_has_done_meanwhile_is_not_done_again(lite, monkeypatch, how):
    many(lite, 1)
    def wait(s):
        if how == 'done': fh_saas.ops.upgrades.write_notes(lite.url_of(lite.find('t0')), lite, app_version='2')
        lite.set_state('t0', 'active')
    monkeypatch.setattr(fh_saas.ops.upgrades, 'time', sleeping(wait))
    ran = []
    assert upgraded(lite, ran.append) == dict(t0=None if how == 'done' else 'FhSaasError') and ran == [] and lite.find('t0').state == 'active'

@pytest.mark.parametrize('state', ['migrating', 'deleting', 'paused'])
def test_no_job_of_a_tenant_that_is_out_of_service_is_begun_however_fresh_that_is(lite, new_engine, state):
    with get_or_create_tenant_db('acme', host=lite) as db:
        m, ran = BackgroundTaskManager(db, new_engine(concurrency=0)), []
        id, bg = m.submit('t', lambda: ran.append(1), run_at='2020-01-01')
        desk = m.engine._desks[m.store]
        desk.tenancy.refresh()
        lite.set_state('acme', state)
        desk.tenancy.refresh()  # as by the look of this very turn
        assert desk.turn([], [], Room(5))[1] == [] and m.get_job(id).status == 'pending'
        bg.func(*bg.args)  # by hand it is run though the tenant is paused
        assert len(ran) == (state == 'paused') and m.get_job(id).status == ('completed' if state == 'paused' else 'pending')

def test_a_state_before_is_remembered_no_longer_than_the_upgrade(host, prefix):
    get_or_create_tenant_db(prefix, host=host).close()
    suspend_tenant(prefix, host)
    assert upgraded(host, lambda db: None) == {prefix: None} and host.find(prefix).state == 'paused'
    host.set_state(prefix, 'migrating')
    assert {t: e for t, e in migrate_tenants(host, lambda db: None, '3')} == {prefix: None} and host.find(prefix).state == 'active'

def test_a_tenant_that_is_being_deleted_or_upgraded_is_not_resumed(lite):
    many(lite, 1)
    for state, acts in dict(deleting=(suspend_tenant,), migrating=(resume_tenant,)).items():
        lite.set_state('t0', state)
        for act in acts:
            with pytest.raises(TenantSuspended, match=state): act('t0', lite)
        assert lite.find('t0').state == state
    suspend_tenant('t0', lite); suspend_tenant('t0', lite); resume_tenant('t0', lite); resume_tenant('t0', lite)
    assert lite.find('t0').state == 'active'

def test_a_deletion_that_was_refused_is_taken_back(host, prefix):
    get_or_create_tenant_db(prefix, host=host).close()
    with closing(Store(host.url_of(host.find(prefix)))) as s:
        s.add(dict(id='a', job_type='t', task='t', max_retries=3)); s.claim_one('a', 'tok', 'w', 30)
    with pytest.raises(TenantBusy, match='unsuspend takes it back'): delete_tenant(prefix, host)
    assert 'unsuspend' in next(r['why'] for r in tenant_report(host, wrong=True) if r['id'] == prefix)
    resume_tenant(prefix, host)
    assert host.find(prefix).state == 'active' and tenant_report(host, wrong=True) == []
    open_tenant_db(prefix, host).close()

def test_a_tenant_that_was_half_upgraded_when_it_was_to_be_deleted_is_not_resumed(lite):
    many(lite, 1)
    fh_saas.ops.upgrades.write_notes(lite.url_of(lite.find('t0')), lite, state_before='active')
    lite.set_state('t0', 'deleting')
    with pytest.raises(TenantSuspended, match='migrate again'): resume_tenant('t0', lite)
    assert lite.find('t0').state == 'migrating'
    assert {t: e for t, e in migrate_tenants(lite, lambda db: None, '2')} == dict(t0=None) and lite.find('t0').state == 'active'

def test_who_would_take_a_deletion_back_waits_for_its_end(host, prefix, monkeypatch):
    get_or_create_tenant_db(prefix, host=host).close()
    drop, at_it, go_on = fh_saas.db_tenant._drop, threading.Event(), threading.Event()
    monkeypatch.setattr(fh_saas.db_tenant, '_drop', lambda *args: at_it.set() or go_on.wait(10) and drop(*args))
    with ThreadPoolExecutor(2) as pool:
        deletes = pool.submit(delete_tenant, prefix, host)
        at_it.wait(10)
        resumes = pool.submit(resume_tenant, prefix, host)
        time.sleep(0.3)
        assert not resumes.done()
        go_on.set()
        deletes.result(10)
        if error := resumes.exception(10): assert isinstance(error, (TenantSuspended, TenantNotFound))
    assert host.find(prefix) is None

@pytest.mark.parametrize('left', ['-wal', '-shm', '.gone'])
def test_a_deletion_that_was_cut_off_leaves_no_file(lite, left, monkeypatch):
    many(lite, 1)
    path, unlink = Path(lite.url_of(lite.find('t0')).database), Path.unlink
    for suffix in ('-wal', '-shm'): Path(f'{path}{suffix}').touch()
    with monkeypatch.context() as m:
        m.setattr(Path, 'unlink', lambda self, **kw: 1/0 if self.name.endswith(left) else unlink(self, **kw))
        with pytest.raises(ZeroDivisionError): delete_tenant('t0', lite)
    with pytest.raises(TenantSuspended): resume_tenant('t0', lite)  # what is left is no database
    delete_tenant('t0', lite)
    assert not list(path.parent.glob(f'{path.name}*')) and lite.find('t0') is None

def test_a_deletion_whose_database_is_gone_is_not_taken_back(host, prefix, monkeypatch):
    get_or_create_tenant_db(prefix, host=host).close()
    with monkeypatch.context() as m:
        m.setattr(HostDatabase, 'unregister', lambda *args: 1/0)
        with pytest.raises(ZeroDivisionError): delete_tenant(prefix, host)
    with pytest.raises(TenantSuspended, match='gone already: delete it again'): resume_tenant(prefix, host)
    delete_tenant(prefix, host)
    assert host.find(prefix) is None

@pytest.mark.parametrize('moment', ['before it says so', 'before it drops'])
def test_a_second_deletion_leaves_a_tenant_alone_that_was_made_anew(host, prefix, monkeypatch, moment):
    get_or_create_tenant_db(prefix, host=host).close()
    at_it, go_on, me = threading.Event(), threading.Event(), threading.get_ident()
    name = dict(zip(('before it says so', 'before it drops'), ('_check_owner', '_open_jobs')))[moment]
    real = getattr(fh_saas.db_tenant, name)
    def late(*args):
        said = real(*args)
        if threading.get_ident() != me: at_it.set(); go_on.wait(10)
        return said
    monkeypatch.setattr(fh_saas.db_tenant, name, late)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(delete_tenant, prefix, host)
        at_it.wait(10)
        delete_tenant(prefix, host)
        get_or_create_tenant_db(prefix, host=host).close()
        go_on.set()
        assert isinstance(second.exception(20), TenantBusy)
    assert host.find(prefix).state == 'active'
    open_tenant_db(prefix, host).close()

def test_what_is_taken_back_in_the_last_moment_is_not_deleted(lite, monkeypatch):
    many(lite, 1)
    close = type(lite.open_dbs).close
    monkeypatch.setattr(type(lite.open_dbs), 'close', lambda *args: close(*args) or resume_tenant('t0', lite))
    with pytest.raises(TenantBusy, match='nothing was deleted'): delete_tenant('t0', lite)
    monkeypatch.undo()
    open_tenant_db('t0', lite).close()

def test_an_older_release_leaves_alone_what_a_newer_one_has_upgraded(lite):
    many(lite, 2)
    ran = []
    assert dict(migrate_tenants(lite, lambda db: ran.append(3), 3)) == dict(t0=None, t1=None)
    old = dict(migrate_tenants(lite, lambda db: ran.append(2), 2))
    assert set(old) == {'t0', 't1'} and 'is at version 3' in str(old['t0']) and ran == [3, 3]
    assert dict(migrate_tenants(lite, lambda db: ran.append(10), '10')) == dict(t0=None, t1=None) and ran == [3, 3, 10, 10]
    assert {t.state for t in lite.tenants()} == {'active'}

def test_urls_of_providers_and_urls_that_are_none(monkeypatch):
    assert check_url('postgres://u:p@h/db') == check_url('postgresql://u:p@h/db')
    for url, said in (('postgresql://u:s3cret@h:port/db', 'postgresql://… is not a database URL: its port'), ('postgresql://app:s3cret/db', 'postgresql://… is not'), ('/tmp/x.db', "'/tmp/x.db' is not a database URL"),
            ('postgresql://u:s3@cret@h/db', 'written %40'), (7, 'a int is not'), ('s3cret@h', 'a text without')):
        with pytest.raises(InvalidDatabaseURL, match=said) as e: check_url(url)
        assert 'cret' not in str(e.value)
    monkeypatch.setenv('DATABASE_URL', 'sqlite:////nowhere/x.db')
    with pytest.raises(InvalidDatabaseURL): HostDatabase('')

def test_a_folder_that_cannot_be_made_is_said_as_such(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(DatabaseUnavailable, match='its folder cannot be made'): HostDatabase(f'sqlite:///{tmp_path}/file/host.db')

def test_a_claim_that_waited_for_the_lock_asks_again_whether_the_tenant_is_active(lite, new_engine):
    with get_or_create_tenant_db('acme', host=lite) as db:
        m, ran = BackgroundTaskManager(db, new_engine(poll=0.1, lease=60)), []
        id, bg = m.submit('t', lambda: 1)
        bg.func(*bg.args)  # from here on the file is known
        lock = sqlite3.connect(m.store.url.database, isolation_level=None)
        id, _ = m.submit('t', lambda: ran.append(1), run_at=timestamp(time.time() + 0.5))
        lock.execute('BEGIN IMMEDIATE')
        wait_until(lambda: m.engine._desks[m.store].turning, what='no claim waits for the lock')
        suspend_tenant('acme', lite)
        time.sleep(1.3)
        lock.execute('COMMIT')
        lock.close()
        wait_until(lambda: not m.engine._desks[m.store].turning)
        time.sleep(0.3)
        assert ran == [] and m.get_job(id).status == 'pending'
        resume_tenant('acme', lite)
        assert m.wait(id, 20).status == 'completed'

# --- Copies and names that two want at once

def test_a_copy_takes_no_place_of_another(lite, prefix, tmp_path, monkeypatch):
    "Two commands name the same file, and a file of the user's own looks like one that is on its way"
    for n in 'ab': get_or_create_tenant_db(prefix + n, host=lite).close()
    (own := tmp_path/'copy.part').write_text('own')
    copied, go_on, check = threading.Event(), threading.Event(), fh_saas.ops.copies._check_sound
    monkeypatch.setattr(fh_saas.ops.copies, '_check_sound', lambda *args: check(*args) or copied.set() or go_on.wait(20))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(export_tenant, lite, f'{prefix}a', tmp_path/'copy')
        assert copied.wait(10)
        monkeypatch.setattr(fh_saas.ops.copies, '_check_sound', check)
        export_tenant(lite, f'{prefix}b', tmp_path/'copy')
        go_on.set()
        with pytest.raises(FileExistsError, match='exists by now'): late.result(20)
    with closing(sqlite3.connect(tmp_path/'copy')) as conn: assert conn.execute("SELECT value FROM fh_saas_meta WHERE key = 'tenant_id'").fetchone() == (f'{prefix}b',)
    assert own.read_text() == 'own' and sorted(p.name for p in tmp_path.glob('copy*')) == ['copy', 'copy.part']

def test_a_copy_is_published_without_hard_links_too(lite, prefix, tmp_path, monkeypatch):
    get_or_create_tenant_db(prefix, host=lite).close()
    def none(*args): raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', none)
    assert export_tenant(lite, prefix, tmp_path/'copy').stat().st_size > 0
    with pytest.raises(FileExistsError): export_tenant(lite, prefix, tmp_path/'copy')

def test_what_is_full_is_named(lite, prefix, tmp_path):
    with get_or_create_tenant_db(prefix, host=lite) as db:
        for sql in ('CREATE TABLE big (x)', 'INSERT INTO big VALUES (randomblob(300000))'): db.conn.execute(sa.text(sql))
        db.conn.commit()
    (folder := tmp_path/'small').mkdir()
    with mounted(folder, '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs'):
        with pytest.raises(FhSaasError, match='/small/copy.*no space left'): export_tenant(lite, prefix, folder/'copy')
        assert not list(folder.iterdir())

def test_a_restore_that_finds_the_disk_full_leaves_room_and_says_what_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(fh_saas.ops.copies, 'heeded', 0.1)
    (folder := tmp_path/'small').mkdir()
    with mounted(folder, '-t', 'tmpfs', '-o', 'size=9m', 'tmpfs'):
        host = HostDatabase(f'sqlite:///{folder}/host.db')
        with get_or_create_tenant_db('acme', host=host) as db:
            for sql in ('CREATE TABLE big (x)', *['INSERT INTO big VALUES (randomblob(1000000))']*2): db.conn.execute(sa.text(sql))
            db.conn.commit()
            copy = export_tenant(host, 'acme', tmp_path/'copy')
            for sql in ('DELETE FROM big', 'VACUUM', 'PRAGMA wal_checkpoint(TRUNCATE)'): db.conn.execute(sa.text(sql)); db.conn.commit()
            (folder/'ballast').write_bytes(b'x'*(shutil.disk_usage(folder).free - 1_000_000))
            free = shutil.disk_usage(folder).free
            with pytest.raises(DatabaseFull, match='acme_db'): restore_tenant(host, 'acme', copy)
            assert shutil.disk_usage(folder).free > free/2 and host.find('acme').held is None
        host.close()

def test_a_restore_that_is_interrupted_before_it_has_begun_holds_nobody(lite, tmp_path, monkeypatch):
    many(lite, 1)
    copy = export_tenant(lite, 't0', tmp_path/'copy')
    def interrupted(seconds): raise KeyboardInterrupt
    monkeypatch.setattr(fh_saas.ops.copies.time, 'sleep', interrupted)
    with pytest.raises(KeyboardInterrupt): restore_tenant(lite, 't0', copy)
    monkeypatch.undo()
    assert lite.find('t0').held is None
    with pytest.raises(TypeError, match='pass a HostDatabase'): export_tenant('t0', lite, tmp_path/'other')

def test_a_name_whose_new_file_was_met_before_it_said_whose_it_is(host, prefix):
    "By a process that had the tenant open when it was deleted: the name could never be used again"
    with get_or_create_tenant_db(prefix, host=host) as db: url = db.engine.url
    delete_tenant(prefix, host)
    if url.get_backend_name() == 'sqlite': Path(url.database).touch()
    else: fh_saas.db_tenant._create_pg(host, url.database)
    (s := Store(url, tenant=prefix)).close()
    assert 'tenant_id' not in s.notes
    get_or_create_tenant_db(prefix, host=host).close()
    delete_tenant(prefix, host)
    if url.get_backend_name() == 'sqlite': Path(url.database).touch()
    else: fh_saas.db_tenant._create_pg(host, url.database)
    s = Store(url, tenant=prefix)
    s.add(dict(id='1', job_type='t', task='t', max_retries=3))
    s.close()
    with pytest.raises(TenantMismatch, match='move it away'): get_or_create_tenant_db(prefix, host=host)  # that is somebody's
    if url.get_backend_name() == 'postgresql':
        with writing(open_engine(host.url, isolation_level='AUTOCOMMIT')) as conn: conn.exec_driver_sql(f'DROP DATABASE "{url.database}" WITH (FORCE)')

def test_a_drivers_error_is_one_line_without_a_password():
    e = typed('postgresql://u:secret@h/db', psycopg.OperationalError('connection failed:\n  Connection refused\n'))
    assert isinstance(e, DatabaseUnavailable) and str(e).endswith('(connection failed: Connection refused)') and 'secret' not in str(e)

def test_a_file_that_is_no_hosts_is_not_changed(tmp_path):
    own = tmp_path/'own.db'
    with closing(sqlite3.connect(own)) as conn: conn.execute('CREATE TABLE own (x)')
    (empty := tmp_path/'empty.db').touch()
    before = own.read_bytes()
    for f in (own, empty):
        with pytest.raises(ValueError, match='is no host database.*nothing was changed'): HostDatabase(f'sqlite:///{f}', create=False)
    assert own.read_bytes() == before and empty.read_bytes() == b'' and sorted(p.name for p in tmp_path.iterdir()) == ['empty.db', 'own.db']
