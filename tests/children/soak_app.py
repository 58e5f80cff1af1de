"The tasks of `soak_fleet.py`, and its host by the URL in SOAK_HOST; each attempt notes itself in a table of the app's own"
import asyncio, os, time
import sqlalchemy as sa
from tenacity import wait_fixed
from fh_saas.db_host import HostDatabase, seconds, timestamp
from fh_saas.jobs.context import JobContext
from fh_saas.jobs.retries import Permanent
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import task
from fh_saas.workers.runner import Runner

soon = wait_fixed(0.3)


def ran(job):
    with job.begin() as conn:
        conn.execute(sa.text('INSERT INTO ran VALUES (:id, :n, :token, :at, :pid)'), dict(id=job.id, n=job.attempt, token=job.row['claim_token'], at=timestamp(), pid=os.getpid()))

@task('quick', backoff=soon)
def quick(job:JobContext, n=0): ran(job); return n

@task('slow', backoff=soon)
def slow(seconds:float, job:JobContext): ran(job); time.sleep(seconds)

@task('later', backoff=soon)
def later(due:str, job:JobContext):
    ran(job)
    if time.time() < seconds(due): raise Permanent(f'begun before {due}')

@task('once', backoff=soon)
def once(job:JobContext):
    ran(job)
    if job.row['retry_count'] == 0: raise RuntimeError('the first time it always fails')

@task('never', backoff=soon)
def never(job:JobContext): ran(job); raise RuntimeError('it always fails')

@task('odd', backoff=soon)
def odd(job:JobContext):
    ran(job)
    job.progress(50, 'half')
    job.warn('no price', item='line 7')
    time.sleep(0.1)
    job.progress(100, 'all')

@task('wait', backoff=soon)
async def wait(seconds:float, job:JobContext):
    await asyncio.to_thread(ran, job)
    await asyncio.sleep(seconds)


def host(): return Runner(HostDatabase(os.environ['SOAK_HOST']), Settings(lease=5))
