"crash.py run|submit <host url> <tenants, comma> [<first> <last>]: what is killed again and again"
import asyncio, itertools, random, sys, time
import sqlalchemy as sa
from tenacity import wait_fixed
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import open_tenant_db
from fh_saas.jobs.context import JobContext
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.process import use_engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import task
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner

settings = Settings(lease=1.5, poll=0.2, handoff=0.2, grace=1)


def ran(job):
    with job.begin() as conn: conn.execute(sa.text('INSERT INTO ran (job_id, attempt) VALUES (:id, :n)'), dict(id=job.id, n=job.attempt))

def fail_once(n, job):
    if n % 10 == 0 and job.row['retry_count'] == 0: raise RuntimeError('the first time it always fails')

def length(n): return 0.25 if n % 7 == 3 else 0.005  # some are long enough to be hit

@task('sync_row', backoff=wait_fixed(0.1))
def sync_row(n:int, job:JobContext):
    ran(job)
    time.sleep(length(n))
    fail_once(n, job)
    return n

@task('async_row', backoff=wait_fixed(0.1))
async def async_row(n:int, job:JobContext):
    await asyncio.to_thread(ran, job)
    await asyncio.sleep(length(n))
    fail_once(n, job)
    return n


def submit(host, tenants, first, last):
    engine = use_engine(Engine(settings))
    managers = [BackgroundTaskManager(open_tenant_db(t, host)) for t in tenants]
    for m in managers: engine.pause(m.store)
    for n, m in zip(range(first, last), itertools.cycle(managers)):
        job_id, _ = m.submit('row', (sync_row, async_row)[n % 2], max_retries=10, n=n)
        sys.stdout.write(f'{m.db.tenant_id} {job_id}\n')
        if n % 40 == 39: time.sleep(random.uniform(0, 0.8))  # in bursts, so that a kill finds many in flight
    sys.stdout.write('all\n')


if __name__ == '__main__':
    what, url, tenants = sys.argv[1:4]
    host = HostDatabase(url)
    if what == 'submit': submit(host, tenants.split(','), *map(int, sys.argv[4:]))
    else:
        Runner(host, settings, sweep=0.5).start()
        time.sleep(600)
