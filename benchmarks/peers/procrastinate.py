"Procrastinate on PostgreSQL: a worker with concurrency 10 and LISTEN/NOTIFY. It keeps the status of a job, but no return values. Sync tasks run in threads."
import procrastinate
from .base import OnPostgres, pg_durable
from ..tasks import functions

class Procrastinate(OnPostgres):
    package, raws, durability, share = 'procrastinate', ('raw-postgres',), pg_durable, 0.2
    note = 'stores the outcome, no return value; stalled jobs are only retried by a periodic task that the app adds (not done here, as by default)'
    stored_sql = 'SELECT count(*) FROM procrastinate_jobs'
    done_sql = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"
    open_sql = "SELECT 1 FROM procrastinate_jobs WHERE status IN ('todo', 'doing') LIMIT 1"
    _sync = None

    def make(self, connector):
        app = procrastinate.App(connector=connector(conninfo=self.url))
        self.tasks = {name: app.task(name=name)(f) for name, f in functions.items()}
        return app

    @property
    def sync(self):
        if self._sync is None:
            self._sync = self.make(procrastinate.SyncPsycopgConnector)
            self._sync.open()
        return self._sync

    def create(self):
        super().create()
        self.sync.schema_manager.apply_schema()

    def drop(self):
        self.sync.close()
        super().drop()

    def submit(self, task, n):
        self.sync
        self.tasks[task].defer(n=n)

    def submit_many(self, task, ns):
        self.sync
        self.tasks[task].batch_defer(*(dict(n=n) for n in ns))

    def work(self):
        with self.make(procrastinate.PsycopgConnector).open() as app: app.run_worker(concurrency=10, install_signal_handlers=False)
