"Real databases for the tests: a SQLite file each, and a database each on a real PostgreSQL server."
import glob, os, pwd, shutil, socket, sqlite3, subprocess, tempfile, time, uuid
from contextlib import closing, contextmanager
from pathlib import Path
import pytest
import sqlalchemy as sa
from fastsql import Database
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import delete_tenant
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import Registry
from fh_saas.utils_bgtsk import BackgroundTaskManager


def absent(service, why):
    "Skip for want of a server, loudly; where servers are required, fail"
    text = f'NO {service}: {why}'
    if os.environ.get('FH_SAAS_REQUIRE_SERVICES') == '1': pytest.fail(text, pytrace=False)
    pytest.skip(text)


def _answers(url):
    try: import psycopg
    except ImportError: return False
    try: psycopg.connect(url, connect_timeout=3).close()
    except psycopg.Error: return False
    return True


def _own_server(folder):
    "Start a PostgreSQL of our own from installed binaries; its URL and what stops it"
    bins = sorted(glob.glob('/usr/lib/postgresql/*/bin'), key=lambda p: int(p.split('/')[-2]))
    initdb = shutil.which('initdb') or (bins and f'{bins[-1]}/initdb')
    if not initdb or not os.path.exists(initdb): return None, None
    user, as_user = 'postgres', []
    if os.getuid() == 0:  # the server refuses to run as root
        try: uid = pwd.getpwnam('postgres')
        except KeyError: uid = pwd.getpwnam('nobody')
        os.chown(folder, uid.pw_uid, uid.pw_gid)
        as_user = ['setpriv', f'--reuid={uid.pw_uid}', f'--regid={uid.pw_gid}', '--clear-groups']
    data, port = f'{folder}/data', free_port()
    subprocess.run([*as_user, initdb, '-D', data, '-U', user, '-A', 'trust', '-N'], check=True, capture_output=True, cwd=folder)
    server = subprocess.Popen([*as_user, str(Path(initdb).with_name('postgres')), '-D', data, '-p', str(port), '-k', folder, '-c', 'listen_addresses=127.0.0.1'],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    url = f'postgresql://{user}@127.0.0.1:{port}/postgres'
    for _ in range(100):
        if _answers(url): return url, server
        time.sleep(0.1)
    server.terminate()
    return None, None


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='session')
def pg_server(tmp_path_factory):
    "URL of a PostgreSQL server on which databases can be made"
    if url := os.environ.get('FH_SAAS_TEST_PG_URL'):
        if not _answers(url): absent('POSTGRESQL', 'nothing answers at FH_SAAS_TEST_PG_URL')
        yield url
        return
    for user in ('postgres', pwd.getpwuid(os.getuid()).pw_name):
        if _answers(url := f'postgresql://{user}@127.0.0.1:5432/postgres'):
            yield url
            return
    folder = tempfile.mkdtemp(prefix='fh_saas_pg')
    url, server = _own_server(folder)
    if url is None: absent('POSTGRESQL', 'FH_SAAS_TEST_PG_URL is not set, nothing answers on port 5432, and no server is installed')
    yield url
    server.terminate()
    server.wait(20)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def new_pg(pg_server):
    "Call it for the URL of a new, empty PostgreSQL database; dropped afterwards"
    import psycopg
    names = []
    def make():
        names.append(name := f'fh_saas_test_{uuid.uuid4().hex[:12]}')
        with psycopg.connect(pg_server, autocommit=True) as conn: conn.execute(f'CREATE DATABASE {name}')
        return sa.make_url(pg_server).set(database=name).render_as_string(hide_password=False)
    yield make
    with psycopg.connect(pg_server, autocommit=True) as conn:
        for name in names: conn.execute(f'DROP DATABASE IF EXISTS {name} WITH (FORCE)')


@pytest.fixture
def statements(monkeypatch):
    "What is sent to PostgreSQL from here on, in this process"
    import psycopg
    sent, execute = [], psycopg.Cursor.execute
    monkeypatch.setattr(psycopg.Cursor, 'execute', lambda self, query, *args, **kw: sent.append(str(query)) or execute(self, query, *args, **kw))
    return sent


@pytest.fixture
def new_sqlite(tmp_path):
    "Call it for the URL of a new, empty SQLite file"
    def make():
        path = tmp_path/f'{uuid.uuid4().hex[:8]}.db'
        path.touch()
        return f'sqlite:///{path}'
    return make


@pytest.fixture(params=['sqlite', 'postgresql'])
def new_url(request):
    "`new_sqlite` and `new_pg` in turn: what is tested with this holds for both"
    return request.getfixturevalue('new_sqlite' if request.param == 'sqlite' else 'new_pg')


@pytest.fixture
def url(new_url): return new_url()


@pytest.fixture
def host(url):
    "A host without tenants; those that a test makes are deleted with it"
    h = HostDatabase(url)
    yield h
    for t in h.tenants(): delete_tenant(t.id, h, force=True)
    h.close()


@pytest.fixture
def new_engine():
    "Call it with settings for an engine with a registry of its own; stopped afterwards"
    made = []
    def make(registry=None, **settings):
        made.append(e := Engine(Settings(**dict(handoff=30, poll=0.2, grace=1) | settings), registry or Registry()))
        return e
    yield make
    for e in made: e.stop(0)


@pytest.fixture
def engine(new_engine): return new_engine()


@pytest.fixture
def store(engine, url): return engine.store(url)


@pytest.fixture
def manager(engine, url):
    db = Database(url)
    yield BackgroundTaskManager(db, engine)
    db.conn.close()
    db.engine.dispose()


@pytest.fixture
def new_manager(new_engine):
    "Call it with a URL and settings for a manager with an engine of its own"
    dbs = []
    def make(url, engine=None, **settings):
        dbs.append(db := Database(url))
        return BackgroundTaskManager(db, engine or new_engine(**settings))
    yield make
    for db in dbs: db.conn.close(); db.engine.dispose()

@pytest.fixture
def lite(new_sqlite, new_manager): return new_manager(new_sqlite())


@contextmanager
def mounted(folder, *how):
    "Something mounted at `folder`, if this machine lets us"
    r = subprocess.run(['mount', *how, str(folder)], capture_output=True, text=True)
    if r.returncode: absent('MOUNT', r.stderr.strip())
    try: yield folder
    finally: subprocess.run(['umount', '-l', str(folder)], check=True)


odd_values = ('abc', '', b'\xff\x00', -1, 2**62, 1e308, '9999-99-99', '['*5000, '{"a":'*700 + '1' + '}'*700, '{"a":NaN}')


def forge(path, ids):
    "Write into each of these jobs something that no type and no check of a column keeps out of a SQLite file; ids that are left over stay as they are"
    with closing(sqlite3.connect(path, isolation_level=None)) as c:
        c.execute('PRAGMA ignore_check_constraints=ON')
        columns = [name for _, name, *_ in c.execute('PRAGMA table_info(tenant_jobs)') if name != 'id']
        cases = [(col, '?', v) for col in columns for v in odd_values] + [(col, 'CAST(? AS TEXT)', b'A\xff') for col in columns]
        cases += [('id', '?', b'A\xff'), ('id', 'CAST(? AS TEXT)', b'A\xff')]
        for (col, how, v), id in zip(cases, ids): c.execute(f'UPDATE tenant_jobs SET {col}={how} WHERE id=?', (v, id))
    return len(cases)


def wait_until(true, seconds=20, what='the awaited did not happen'):
    "Wait for `true()` without a fixed sleep"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if v := true(): return v
        time.sleep(0.02)
    raise AssertionError(f'{what} within {seconds} s')
