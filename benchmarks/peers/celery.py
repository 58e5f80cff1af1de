"Celery with Redis as broker and for results: a worker with a pool of eight threads, prefetching eight for each. `CeleryLate` acknowledges late, with a visibility timeout of 10 s."
from celery import Celery as App
from .base import OnRedis, no_aof, redis_jobs, redis_results
from ..tasks import functions

class Celery(OnRedis):
    package, raws, durability, share = 'celery', ('raw-redis',), f'{no_aof}; acknowledged before it runs, so a crash loses those in hand', 0.2
    missing = dict(bulk='Celery publishes one by one')
    late = False

    def __init__(self, key, place):
        super().__init__(key, place)
        self.app_ = App('bench', broker=redis_jobs, backend=redis_results)
        self.app_.conf.update(worker_prefetch_multiplier=8, worker_hijack_root_logger=False, worker_send_task_events=False, broker_connection_retry_on_startup=True,
            task_acks_late=self.late, task_reject_on_worker_lost=self.late, **(dict(broker_transport_options=dict(visibility_timeout=10)) if self.late else {}))
        self.tasks = {name: self.app_.task(name=name)(f) for name, f in functions.items()}

    def submit(self, task, n): self.tasks[task].delay(n)
    def stored(self): return self.redis().llen('celery')
    def work(self): self.app_.worker_main(['worker', '-P', 'threads', '-c', '8', '-l', 'ERROR', '--without-gossip', '--without-mingle', '--without-heartbeat'])

class CeleryLate(Celery):
    late, durability = True, f'{no_aof}; acknowledged after it ran'
    missing = {m: 'only for the crash; see celery' for m in ('submit', 'bulk', 'drain', 'drain2', 'latency', 'inside', 'web')}
