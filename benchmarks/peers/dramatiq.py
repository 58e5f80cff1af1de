"Dramatiq with Redis as broker and for results: a worker with eight threads."
import time
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from .base import OnRedis, no_aof, redis_jobs, redis_results
from ..tasks import functions

class Dramatiq(OnRedis):
    package, raws, durability, share = 'dramatiq', ('raw-redis',), f'{no_aof}; jobs of a dead worker come back after its heartbeat timeout (60 s)', 0.3
    missing = dict(bulk='Dramatiq enqueues one by one')

    def __init__(self, key, place):
        super().__init__(key, place)
        self.broker = RedisBroker(url=redis_jobs)
        self.broker.add_middleware(Results(backend=RedisBackend(url=redis_results)))
        dramatiq.set_broker(self.broker)
        self.actors = {name: dramatiq.actor(f, actor_name=name, store_results=True) for name, f in functions.items()}

    def submit(self, task, n): self.actors[task].send(n)
    def stored(self): return self.redis().llen('dramatiq:default')

    def work(self):
        dramatiq.Worker(self.broker, worker_threads=8).start()
        while True: time.sleep(1)
