"""fh-saas 0.9.14, the release of the seed, as it is on PyPI. It has the name of this package, so it is installed into a folder
of its own (`.peers`, not in git) and put in front of the path in processes that measure it."""
import asyncio, subprocess, sys, time
from pathlib import Path
from .base import OnSqlite, answer, starlette
from ..tasks import functions

version = '0.9.14'
folder = Path(__file__).parents[1]/'.peers'/f'fh-saas-{version}'
if not folder.exists():
    got = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', '--no-deps', '--target', str(folder), f'fh-saas=={version}'], capture_output=True, text=True)
    if got.returncode: raise ImportError(f'fh-saas=={version}: {got.stderr.strip().splitlines()[-1]}')
sys.path.insert(0, str(folder))
import fh_saas
if fh_saas.__version__ != version: raise ImportError(f'fh_saas {fh_saas.__version__} instead of {version}')
from fastsql import Database
from fh_saas.utils_bgtsk import BackgroundTaskManager

class Released(OnSqlite):
    raws, web_worker, share = ('raw-sqlite-full',), False, 0.2
    durability = "SQLite rollback journal, synchronous=FULL (SQLite's defaults): the row survives a power cut, but nobody takes it up again"
    note = 'jobs are run by the process that submitted them'
    missing = dict(bulk='no bulk submit', drain2='jobs live in the process that submitted them', latency='jobs live in the process that submitted them')
    stored_sql = 'SELECT count(*) FROM tenant_jobs'
    done_sql = "SELECT count(*) FROM tenant_jobs WHERE status = 'completed'"
    _manager = None

    @property
    def manager(self):
        if self._manager is None: self._manager = BackgroundTaskManager(Database(f'sqlite:///{self.path}'))
        return self._manager

    def create(self): self.manager
    def submit(self, task, n): return self.manager.submit(task, functions[task], n=n)[1]
    def fill(self, task, ns): (self.place/'own').write_text(f'{task} {len(ns)}')  # the worker submits them itself

    def work(self):
        own = self.place/'own'
        if own.exists():
            task, n = own.read_text().split()
            own.unlink()
            jobs = [self.submit(task, i) for i in range(int(n))]
            asyncio.run(self.all(jobs))
        self.manager
        while True: time.sleep(1)

    def begin(self): self._loop = asyncio.new_event_loop()
    def submit_here(self, task, n): self._loop.run_until_complete(self.submit(task, n)())

    async def all(self, jobs):
        for j in jobs: await j()

    def app(self):
        def route(request): return answer(self.submit('noop', 0))
        return starlette(route)
