"""The databases themselves: what a loop written by hand does on the same tables, without an engine.

A job is submitted in one INSERT and commit. A worker claims up to 100 due jobs in one guarded UPDATE, runs them, and writes
their results in one transaction, guarded by its token: two commits per hundred jobs. There is no retry, lease or rescue.
`plain` is a minimal table with checks and a partial index; `schema` is fh_saas's own, with its indexes and attempts."""
import json, sqlite3, time, uuid
from contextlib import asynccontextmanager
from .base import OnPostgres, OnRedis, OnSqlite, answer, no_aof, pg_durable, redis_results, sqlite_full, sqlite_normal, starlette
from ..tasks import functions

batch = 100
pick = "SELECT id FROM {table} WHERE status='pending' AND run_at <= {now} {tasks} ORDER BY priority DESC, run_at, id LIMIT {batch} {lock}"

class Plain:
    "A minimal table of jobs"
    table, id_type = 'jobs', 'bigint'
    ddl = """CREATE TABLE jobs (id {serial}, task TEXT NOT NULL, payload TEXT NOT NULL,
        status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'running', 'completed', 'failed')),
        priority INTEGER NOT NULL DEFAULT 2 CHECK (priority BETWEEN 1 AND 4), run_at {real} NOT NULL,
        claim_token TEXT, started_at {real}, completed_at {real}, result TEXT,
        CHECK ((status IN ('completed', 'failed')) = (completed_at IS NOT NULL)))"""
    index = "CREATE INDEX jobs_due ON jobs (priority DESC, run_at, id) WHERE status = 'pending'"
    columns, claimed, tasks, attempt = 'task, payload, run_at', '', '', None
    now = staticmethod(time.time)
    def create(self, url, execute, postgres):
        execute(self.ddl.format(serial='BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY' if postgres else 'INTEGER PRIMARY KEY',
            real='DOUBLE PRECISION' if postgres else 'REAL'))
        execute(self.index)
    def row(self, task, n): return task, json.dumps(dict(n=n)), time.time()

class Schema:
    "fh_saas's own tables"
    table, id_type = 'tenant_jobs', 'text'
    columns = 'id, job_type, status, payload, max_retries, retry_count, created_at, task, queue, priority, run_at'
    claimed, tasks = ', attempt=attempt+1', f"AND task IN ({', '.join(map(repr, functions))})"
    attempt = 'tenant_job_attempts (job_id, number, ended_at, outcome)'
    @staticmethod
    def now():
        from fh_saas.db_host import timestamp
        return timestamp()
    def create(self, url, execute, postgres):
        from fh_saas.jobs.store import Store
        Store(url).close()
    def row(self, task, n):
        from fh_saas.db_host import gen_id, timestamp
        return gen_id(), task, 'pending', json.dumps(dict(n=n)), 3, 0, timestamp(), task, 'default', 2, timestamp()


class Raw:
    "What both databases have in common"
    missing = dict(inside='the measure is compared to `latency` of the raw side, from another process', crash='a bare loop has no lease: what it had claimed would stay claimed')
    schema = Plain()
    _conn = None

    @property
    def stored_sql(self): return f'SELECT count(*) FROM {self.schema.table}'
    @property
    def done_sql(self): return f"SELECT count(*) FROM {self.schema.table} WHERE status='completed' AND result IS NOT NULL"
    @property
    def open_sql(self): return f"SELECT 1 FROM {self.schema.table} WHERE status IN ('pending', 'running') LIMIT 1"

    @property
    def conn(self):
        if self._conn is None: self._conn = self.open()
        return self._conn

    def insert(self, mark): return f"INSERT INTO {self.schema.table} ({self.schema.columns}) VALUES ({', '.join([mark]*len(self.schema.columns.split(',')))})"

    def claiming(self, mark, lock=''):
        chosen = pick.format(table=self.schema.table, now=mark, tasks=self.schema.tasks, batch=batch, lock=lock)
        return f"UPDATE {self.schema.table} SET status='running', claim_token={mark}, started_at={mark}{self.schema.claimed} WHERE id IN ({chosen}) RETURNING id, task, payload"

    def work(self):
        while True:
            token = uuid.uuid4().hex
            if got := self.claim(token): self.finish(token, [(json.dumps(functions[t](**json.loads(p))), id) for id, t, p in got])
            else: time.sleep(0.001)

    def app(self):
        async def route(request):  # an insert is too short to be worth the way through a thread
            self.submit('noop', 0)
            return answer()
        return starlette(route)


class RawSqlite(Raw, OnSqlite):
    level, durability = 'FULL', sqlite_full

    def open(self):
        conn = sqlite3.connect(self.path, isolation_level=None, timeout=10, check_same_thread=False)
        conn.execute('PRAGMA journal_mode=WAL')
        conn.execute(f'PRAGMA synchronous={self.level}')
        return conn

    def create(self):
        self.conn
        self.schema.create(f'sqlite:///{self.path}', self.conn.execute, postgres=False)

    def submit(self, task, n): self.conn.execute(self.insert('?'), self.schema.row(task, n))

    def submit_many(self, task, ns):
        self.conn.execute('BEGIN IMMEDIATE')
        self.conn.executemany(self.insert('?'), (self.schema.row(task, n) for n in ns))
        self.conn.execute('COMMIT')

    def claim(self, token):
        now = self.schema.now()
        self.conn.execute('BEGIN IMMEDIATE')
        got = self.conn.execute(self.claiming('?'), (token, now, now)).fetchall()
        self.conn.execute('COMMIT')
        return got

    def finish(self, token, results):
        now, s = self.schema.now(), self.schema
        self.conn.execute('BEGIN IMMEDIATE')
        self.conn.executemany(f"UPDATE {s.table} SET status='completed', result=?, completed_at=?, claim_token=NULL WHERE id=? AND claim_token=? AND status='running'",
            [(r, now, id, token) for r, id in results])
        if s.attempt: self.conn.executemany(f"INSERT INTO {s.attempt} VALUES (?, 1, ?, 'completed')", [(id, now) for _, id in results])
        self.conn.execute('COMMIT')

class RawSqliteNormal(RawSqlite): level, durability = 'NORMAL', sqlite_normal
class SchemaSqlite(RawSqlite): schema = Schema()
class SchemaSqliteNormal(RawSqliteNormal): schema = Schema()


class RawPostgres(Raw, OnPostgres):
    durability, package = pg_durable, 'psycopg'

    def open(self):
        import psycopg
        return psycopg.connect(self.url, autocommit=True)

    def create(self):
        super().create()
        self.schema.create(self.url, self.conn.execute, postgres=True)

    def submit(self, task, n): self.conn.execute(self.insert('%s'), self.schema.row(task, n))

    def submit_many(self, task, ns):
        with self.conn.cursor() as cur, cur.copy(f'COPY {self.schema.table} ({self.schema.columns}) FROM STDIN') as copy:
            for n in ns: copy.write_row(self.schema.row(task, n))

    def claim(self, token):
        now = self.schema.now()
        return self.conn.execute(self.claiming('%s', 'FOR UPDATE SKIP LOCKED'), (token, now, now)).fetchall()

    def finish(self, token, results):
        now, s = self.schema.now(), self.schema
        texts, ids = map(list, zip(*results))
        with self.conn.transaction():
            self.conn.execute(f"""UPDATE {s.table} SET status='completed', result=d.result, completed_at=%s, claim_token=NULL
                FROM unnest(%s::{s.id_type}[], %s::text[]) AS d(id, result) WHERE {s.table}.id = d.id AND claim_token=%s AND status='running'""", (now, ids, texts, token))
            if s.attempt: self.conn.execute(f"INSERT INTO {s.attempt} SELECT unnest(%s::text[]), 1, %s, 'completed'", (ids, now))

    def app(self):
        import psycopg_pool
        pool = psycopg_pool.AsyncConnectionPool(self.url, min_size=8, max_size=8, open=False, kwargs=dict(autocommit=True))
        @asynccontextmanager
        async def lifespan(app):
            async with pool: yield
        async def route(request):
            async with pool.connection() as conn: await conn.execute(self.insert('%s'), self.schema.row('noop', 0))
            return answer()
        return starlette(route, lifespan=lifespan)

class SchemaPostgres(RawPostgres): schema = Schema()


class RawRedis(Raw, OnRedis):
    "A list of jobs; results in keys. Claimed jobs are nowhere but in the worker."
    durability, package = no_aof, 'redis'
    def open(self): return self.redis()
    def stored(self): return self.conn.llen('jobs')
    def over(self, n): return self.done() >= n
    def submit(self, task, n): self.conn.rpush('jobs', json.dumps((n, task)))

    def submit_many(self, task, ns):
        with self.conn.pipeline() as p:
            for n in ns: p.rpush('jobs', json.dumps((n, task)))
            p.execute()

    def work(self):
        done = self.redis(redis_results)
        while True:
            _, first = self.conn.blpop('jobs')
            got = [json.loads(j) for j in (first, *(self.conn.lpop('jobs', batch - 1) or ()))]
            done.mset({f'{uuid.uuid4()}': json.dumps(functions[t](n)) for n, t in got})
