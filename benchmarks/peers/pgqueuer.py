"PgQueuer with asyncpg: batches of 100, LISTEN/NOTIFY. It keeps a log line of each job, but no return values. Sync tasks run in threads, by `asyncio.to_thread`, as its docs say."
import asyncio
import asyncpg
from pgqueuer import PgQueuer as App
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.queries import Queries
from .base import AsyncPeer, OnPostgres, pg_durable
from ..tasks import functions

class PgQueuer(OnPostgres, AsyncPeer):
    package, raws, durability, note = 'pgqueuer', ('raw-postgres',), pg_durable, 'logs the outcome, stores no return value'
    stored_sql = 'SELECT count(*) FROM pgqueuer'
    done_sql = "SELECT count(*) FROM pgqueuer_log WHERE status = 'successful'"
    open_sql = 'SELECT 1 FROM pgqueuer LIMIT 1'

    async def connect(self):
        self.pool = await asyncpg.create_pool(self.url, min_size=2, max_size=10)
        self.queries = Queries(AsyncpgPoolDriver(self.pool))

    def create(self):
        super().create()
        async def install(): await self.queries.install()
        self.run(install())

    async def asubmit(self, task, n): await self.queries.enqueue(task, str(n).encode(), 0)

    def submit_many(self, task, ns):
        async def many(): await self.queries.enqueue([task]*len(ns), [str(n).encode() for n in ns], [0]*len(ns))
        self.run(many())

    def entry(self, f):
        async def entry(job): await asyncio.to_thread(f, int(job.payload))
        return entry

    def work(self): self.run(self.serve())

    async def serve(self):
        app = App(AsyncpgPoolDriver(self.pool))
        for name, f in functions.items(): app.entrypoint(name)(self.entry(f))
        await app.run(batch_size=100)

class PgQueuerAsync(PgQueuer):
    "The same with async tasks, which need no thread"
    def entry(self, f):
        async def entry(job): f(int(job.payload))
        return entry
