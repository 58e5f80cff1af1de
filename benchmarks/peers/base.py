"""What a peer is, and where it keeps its jobs.

A peer is a few small methods: `create` an empty queue, `submit` a task of `benchmarks.tasks` by name, `work` as a worker until
killed, count what is `stored` and what is `done` (with its result, where the peer keeps results). `benchmarks.measures`
does the rest, alike for all. `missing` says for each measure that a peer cannot take part in, why."""
import asyncio, os, sqlite3
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit
from ..measures import Missing

postgres_url = os.environ.get('BENCH_POSTGRES', 'postgresql://postgres@127.0.0.1:5432/postgres')
redis_url = os.environ.get('BENCH_REDIS', 'redis://127.0.0.1:6379')
redis_jobs, redis_results = f'{redis_url}/15', f'{redis_url}/14'  # two numbered databases, emptied before each measurement

def starlette(route, **kw):
    from starlette.applications import Starlette
    from starlette.routing import Route
    return Starlette(routes=[Route('/', route)], **kw)

def answer(background=None):
    from starlette.responses import PlainTextResponse
    return PlainTextResponse('accepted', background=background)


class Peer:
    durability = ''   # what becomes of a submitted job at a crash and at a power cut
    note = ''
    package = None    # whose version is reported
    raws = ()         # the raw peers it is compared to; the first is the one in the tables
    missing = {}      # measure: why not
    share = 1         # of the usual number of jobs, for slow ones
    web_worker = True # does another process run the jobs of the web route?

    def __init__(self, key:str, place:Path): self.key, self.place = key, Path(place)
    def create(self): "Make an empty queue"
    def drop(self): "Remove what `create` made outside of `place`"

    def submit(self, task, n): raise NotImplementedError
    def submit_each(self, task, ns):
        for n in ns: self.submit(task, n)
    def submit_many(self, task, ns): raise NotImplementedError
    def fill(self, task, ns):
        "Submit in whatever way is quick: this is not measured"
        (self.submit_each if 'bulk' in self.missing else self.submit_many)(task, ns)

    def work(self): raise NotImplementedError
    def begin(self):
        "Run jobs in this process, too"
        raise Missing('jobs are run by a process of their own')
    def submit_here(self, task, n):
        "Submit a job that this process runs"
        self.submit(task, n)
    def stored(self) -> int: raise NotImplementedError
    def done(self) -> int: raise NotImplementedError
    def over(self, n) -> bool:
        "Are all `n` done? Asked again and again, so it should be cheap"
        return self.done() >= n

    def app(self):
        def route(request):
            self.submit('noop', 0)
            return answer()
        return starlette(route)


class AsyncPeer(Peer):
    "A peer whose API is async: `connect` and `asubmit`; `submit_each` is then one coroutine"
    _loop = None
    async def connect(self): ...
    async def asubmit(self, task, n): ...

    def run(self, coro):
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop.run_until_complete(self.connect())
        return self._loop.run_until_complete(coro)

    def submit(self, task, n): self.run(self.asubmit(task, n))

    def submit_each(self, task, ns):
        async def each():
            for n in ns: await self.asubmit(task, n)
        self.run(each())

    def app(self):
        @asynccontextmanager
        async def lifespan(app):
            await self.connect()
            yield
        async def route(request):
            await self.asubmit('noop', 0)
            return answer()
        return starlette(route, lifespan=lifespan)


class Counts(Peer):
    "Counting by SQL: `stored_sql`, `done_sql`, and `open_sql`, which finds a row while there is something left to do"
    open_sql = None
    def stored(self): return self.query(self.stored_sql)[0]
    def done(self): return self.query(self.done_sql)[0]
    def over(self, n): return self.query(self.open_sql) is None if self.open_sql else super().over(n)


class OnSqlite(Counts):
    "Jobs in a SQLite file"
    _reader = None
    @property
    def path(self): return self.place/'jobs.db'
    def query(self, sql):
        if self._reader is None: self._reader = sqlite3.connect(self.path, isolation_level=None, timeout=10)
        return self._reader.execute(sql).fetchone()


class OnPostgres(Counts):
    "Jobs in a PostgreSQL database of their own"
    _reader = None
    @property
    def database(self): return self.place.name.lower()
    @property
    def url(self): return urlsplit(postgres_url)._replace(path=f'/{self.database}').geturl()

    def _admin(self, *statements):
        import psycopg
        with psycopg.connect(postgres_url, autocommit=True) as conn:
            for s in statements: conn.execute(s)

    def create(self): self._admin(f'CREATE DATABASE "{self.database}"')
    def drop(self):
        if self._reader: self._reader.close()
        self._admin(f'DROP DATABASE IF EXISTS "{self.database}" WITH (FORCE)')

    def query(self, sql):
        import psycopg
        if self._reader is None: self._reader = psycopg.connect(self.url, autocommit=True)
        return self._reader.execute(sql).fetchone()


class OnRedis(Peer):
    "Jobs in one numbered database of Redis, results in another, so that both can be counted at once"
    def redis(self, url=redis_jobs):
        import redis
        self.__dict__.setdefault('_clients', {})
        if url not in self._clients: self._clients[url] = redis.Redis.from_url(url)
        return self._clients[url]
    def create(self): self.drop()
    def drop(self):
        for url in (redis_jobs, redis_results): self.redis(url).flushdb()
    def done(self): return self.redis(redis_results).dbsize()

no_aof = 'Redis as it is configured here (by default no AOF: lost at a restart or power cut since the last snapshot)'
pg_durable = 'PostgreSQL, synchronous_commit as the server has it (by default on: survives a power cut)'
sqlite_full = 'SQLite WAL, synchronous=FULL: survives a power cut'
sqlite_normal = 'SQLite WAL, synchronous=NORMAL: survives a killed process, a power cut may take the last commits'
