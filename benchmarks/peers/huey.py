"Huey on a SQLite file: a consumer with four threads that looks every 10 ms at first, every 100 ms at the latest."
from huey import SqliteHuey
from .base import OnSqlite, sqlite_full
from ..tasks import functions

class Huey(OnSqlite):
    package, raws = 'huey', ('raw-sqlite-full',)
    durability = f'{sqlite_full}; a job is deleted when it is taken, so a crash loses those in hand'
    missing = dict(bulk='Huey has no bulk enqueue')
    stored_sql, done_sql = 'SELECT count(*) FROM task', 'SELECT count(*) FROM kv'

    def __init__(self, key, place):
        super().__init__(key, place)
        self.huey = SqliteHuey('bench', filename=str(self.path))
        self.tasks = {name: self.huey.task()(f) for name, f in functions.items()}

    def submit(self, task, n): self.tasks[task](n)
    def work(self): self.huey.create_consumer(workers=4, worker_type='thread', initial_delay=0.01, max_delay=0.1, periodic=False).run()
