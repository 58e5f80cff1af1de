"""fh_saas itself: a host, one tenant, and `Worker`s, what `fh-saas worker` starts, in the worker processes. The submitting process runs nothing.

Everything that knows the API is in this file."""
import asyncio, sqlite3
from contextlib import closing
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.process import use_engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import registry
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner
from fh_saas.workers.worker import Worker
from .base import OnPostgres, OnSqlite, answer, pg_durable, sqlite_full, sqlite_normal, starlette
from ..tasks import functions

for f in functions.values(): registry.add(f)


class Common:
    "A tenant of a host"
    level, tenant, web_worker, package = 'FULL', 'acme', False, 'fh-saas'
    missing = {}
    stored_sql = 'SELECT count(*) FROM tenant_jobs'
    done_sql = "SELECT count(*) FROM tenant_jobs WHERE status = 'completed' AND result IS NOT NULL"
    open_sql = "SELECT 1 FROM tenant_jobs WHERE status IN ('pending', 'running') LIMIT 1"
    _manager = _host = None

    @property
    def host(self):
        if self._host is None: self._host = HostDatabase(self.host_url, self.level)
        return self._host

    def settings(self, **kw): return Settings(synchronous=self.level, **kw)

    @property
    def manager(self):
        "A manager in a process that only submits"
        if self._manager is None:
            use_engine(Engine(self.settings(concurrency=0)))
            self._manager = self.open()
        return self._manager

    def open(self): return BackgroundTaskManager(get_or_create_tenant_db(self.tenant, host=self.host))
    def create(self): self.manager
    def submit(self, task, n): self.manager.submit(task, functions[task], n=n)

    def submit_many(self, task, ns):
        self.manager.submit_many(task, functions[task], [dict(n=n) for n in ns])

    def work(self):
        Worker(self.host, self.settings()).run()

    def begin(self):
        self._runner, self._loop = Runner(self.host, self.settings()).start(), asyncio.new_event_loop()
        self._manager = self.open()

    def submit_here(self, task, n):
        _, bg_task = self.manager.submit(task, functions[task], n=n)
        self._loop.run_until_complete(bg_task())  # as Starlette does it after the response

    def app(self):
        "The app runs the jobs itself, after the response"
        runner, managers = Runner(self.host, self.settings()), []
        def route(request):
            if not managers: managers.append(self.open())
            _, bg_task = managers[0].submit('noop', functions['noop'], n=0)
            return answer(bg_task)
        return starlette(route, lifespan=runner.lifespan)


class Async:
    "The web route is a coroutine: it awaits `asubmit`"
    missing = {m: 'as the one with a sync route' for m in ('submit', 'bulk', 'drain', 'drain2', 'latency', 'inside', 'crash')}
    runs = {} # settings of the web process
    def app(self):
        runner, managers = Runner(self.host, self.settings(**self.runs)), []
        async def route(request):
            if not managers: managers.append(self.open())
            _, bg_task = await managers[0].asubmit('noop', functions['noop'], n=0)
            return answer(bg_task)
        return starlette(route, lifespan=runner.lifespan)

class Elsewhere(Async):
    "The same, and the jobs are run by a worker, as those of the other peers are"
    web_worker, runs = True, dict(concurrency=0)


class Ours(Common, OnSqlite):
    durability, raws = f'{sqlite_full}; a claim may be taken back by it, and its job is pending again', ('raw-sqlite-full', 'schema-sqlite-full')
    @property
    def path(self): return self.place/f'{self.tenant}_db.db'
    @property
    def host_url(self): return f'sqlite:///{self.place}/host.db'

class OursNormal(Ours):
    level, durability, raws = 'NORMAL', sqlite_normal, ('raw-sqlite-normal', 'schema-sqlite-normal')

class OursAsync(Async, Ours): ...
class OursNormalAsync(Async, OursNormal): ...
class OursWorker(Elsewhere, Ours): ...
class OursNormalWorker(Elsewhere, OursNormal): ...

class OursPostgres(Common, OnPostgres):
    "Host and tenant are databases of one server"
    durability, raws = pg_durable, ('raw-postgres', 'schema-postgres')
    @property
    def tenant(self): return self.place.name.lower()
    @property
    def database(self): return f't_{self.tenant}_db'
    @property
    def host_url(self): return self.url.replace(self.database, f'host_{self.tenant}')

    def create(self):
        self._admin(f'CREATE DATABASE "host_{self.tenant}"')
        self.manager

    def drop(self):
        super().drop()
        self._admin(f'DROP DATABASE IF EXISTS "host_{self.tenant}" WITH (FORCE)')

class OursPostgresAsync(Async, OursPostgres): ...
class OursPostgresWorker(Elsewhere, OursPostgres): ...


class Fleet:
    "A host with many tenants, in SQLite files of one folder; used by `benchmarks.tenants`"
    def __init__(self, place, n, level='FULL'):
        self.place, self.n, self.level = place, n, level
        self.ids = [f't{i:05}' for i in range(n)]
        self.host = HostDatabase(f'sqlite:///{place}/host.db', level)
        self._managers = {}

    def path(self, i): return self.place/f'{self.ids[i]}_db.db'

    def build(self):
        "One tenant is made as an app makes it; the others are copies of its file and row, with their own id in them"
        first = self.ids[0]
        BackgroundTaskManager(get_or_create_tenant_db(first, host=self.host), engine := Engine(Settings(synchronous=self.level), registry))
        engine.stop(0)
        self.host.open_dbs.close(self.host.url_of(self.host.find(first)))
        with closing(sqlite3.connect(self.path(0))) as conn: conn.execute('PRAGMA wal_checkpoint(TRUNCATE)')
        template = self.path(0).read_bytes()
        for i in range(1, self.n): self.path(i).write_bytes(template.replace(first.encode(), self.ids[i].encode()))
        with closing(sqlite3.connect(self.place/'host.db')) as conn, conn:
            rows = [tuple(id if c == first else c.replace(first, id) if isinstance(c, str) else c for c in conn.execute('SELECT * FROM core_tenants').fetchone()) for id in self.ids[1:]]
            if rows: conn.executemany(f"INSERT INTO core_tenants VALUES ({', '.join('?'*len(rows[0]))})", rows)
        if self.n > 1:  # refused if the file were not this tenant's
            with get_or_create_tenant_db(self.ids[-1], host=self.host): pass
        return self

    def manager(self, i):
        "A manager in a process that only submits"
        if not self._managers: use_engine(Engine(Settings(synchronous=self.level, concurrency=0)))
        if i not in self._managers:
            self._managers.clear()  # a held handle is five open files
            self._managers[i] = BackgroundTaskManager(get_or_create_tenant_db(self.ids[i], host=self.host))
        return self._managers[i]

    def submit(self, i, task, n): self.manager(i).submit(task, functions[task], n=n)

    def submit_many(self, i, task, ns):
        manager = self.manager(i)
        manager.submit_many(task, functions[task], [dict(n=n) for n in ns])

    def work(self):
        Worker(self.host, Settings(synchronous=self.level)).run()
