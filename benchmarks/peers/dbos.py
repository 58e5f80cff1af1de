"""DBOS: jobs are workflows on a queue, submitted by a `DBOSClient`. Its queue is polled every 10 ms here (1 s by default), with
at most 100 workflows at once in a process."""
import time
from dbos import DBOS, DBOSClient
from .base import OnPostgres, OnSqlite, pg_durable
from ..tasks import functions

class Dbos:
    package, share = 'dbos', 0.05
    _client = None
    table = 'workflow_status'

    @property
    def stored_sql(self): return f"SELECT count(*) FROM {self.table} WHERE queue_name = 'bench'"
    @property
    def done_sql(self): return f"SELECT count(*) FROM {self.table} WHERE queue_name = 'bench' AND status = 'SUCCESS'"

    def launch(self):
        dbos = DBOS(config=dict(name='bench', system_database_url=self.url, application_version='1', executor_id='bench', log_level='ERROR', console_log_level='ERROR',
            notification_listener_polling_interval_sec=0.01))
        for name, f in functions.items(): DBOS.workflow(name=name)(f)
        DBOS.launch()
        DBOS.register_queue('bench', worker_concurrency=100, polling_interval_sec=0.01)
        return dbos

    def create(self):
        super().create()
        self.launch()
        DBOS.destroy()

    @property
    def client(self):
        if self._client is None: self._client = DBOSClient(system_database_url=self.url)
        return self._client

    def options(self, task): return dict(workflow_name=task, queue_name='bench', app_version='1')
    def submit(self, task, n): self.client.enqueue(self.options(task), n)

    def submit_many(self, task, ns):
        with self.client._sys_db.engine.begin() as conn:
            for n in ns: self.client.enqueue_in_transaction(conn, self.options(task), n)

    def begin(self): self.launch()
    def work(self):
        self.launch()
        while True: time.sleep(1)

class DbosSqlite(Dbos, OnSqlite):
    raws, durability = ('raw-sqlite-full',), "SQLite rollback journal, synchronous=FULL (SQLite's defaults): survives a power cut"
    @property
    def url(self): return f'sqlite:///{self.path}'

class DbosPostgres(Dbos, OnPostgres):
    raws, durability, table = ('raw-postgres',), pg_durable, 'dbos.workflow_status'
