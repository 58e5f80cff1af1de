"SAQ on Redis: one worker with concurrency 16, blocking pops, results kept. Sync tasks run in threads."
import json
from saq import Queue, Worker
from .base import AsyncPeer, OnRedis, no_aof, redis_jobs
from ..tasks import functions

class Saq(OnRedis, AsyncPeer):
    package, raws, durability, share = 'saq', ('raw-redis',), no_aof, 0.3
    missing = dict(bulk='SAQ enqueues one by one')

    async def connect(self):
        self.queue = Queue.from_url(redis_jobs, name='bench')
        await self.queue.connect()

    async def asubmit(self, task, n): await self.queue.enqueue(task, n=n)
    def stored(self): return len(self.keys())
    def keys(self): return list(self.redis().scan_iter('saq:job:bench:*', count=10_000))

    def over(self, n): return self.redis().zcard('saq:bench:incomplete') == 0

    def done(self):
        keys = self.keys()
        got = self.redis().mget(keys) if keys else []
        return sum(json.loads(j)['status'] == 'complete' for j in got if j)

    def entry(self, name, f):
        def entry(ctx, *, n): return f(n)
        return name, entry

    def work(self):
        async def serve(): await Worker(self.queue, [self.entry(*i) for i in functions.items()], concurrency=16).start()
        self.run(serve())

class SaqAsync(Saq):
    "The same with async tasks, which need no thread"
    def entry(self, name, f):
        async def entry(ctx, *, n): return f(n)
        return name, entry
