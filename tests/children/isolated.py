"Tasks that run in a process of their own, some of them badly."
import asyncio, ctypes, os, time
from dataclasses import dataclass
from datetime import date
import sqlalchemy as sa
from fh_saas.jobs.retries import Permanent, RetryAfter, Snooze
from fh_saas.jobs.tasks import task

@dataclass
class Sheet: at: date; n: int

@task(isolate='process')
def good(n:int, at:date, job) -> Sheet:
    for i in job.track(range(3)): job.log(f'step {i}', item=i)
    job.warn('one price is missing')
    job.details['pid'] = os.getpid()
    job.db.q('SELECT 1')
    print('a task may print what it likes')
    return Sheet(at, n)

@task(isolate='process')
async def agood(n): await asyncio.sleep(0.01); return n

@task(isolate='process')
def bad(how, job=None):
    if how == 'exit': os._exit(7)
    if how == 'segv': ctypes.string_at(0)
    if how == 'raise': raise ValueError('no')
    if how == 'permanent': raise Permanent('never')
    if how == 'later': raise RetryAfter(77)
    if how == 'snooze': raise Snooze(77)
    if how == 'system exit': raise SystemExit(3)
    if how == 'result': return object()
    if how == 'stop': os.kill(os.getpid(), 19)
    if how == 'flood': return 'x'*20_000_000

@task(isolate='process')
def loops():
    while True: pass

@task(isolate='process')
def sleeps(job):
    job.log('begun', item=os.getpid())
    while True: job.progress(1); time.sleep(0.01)

@task(isolate='process')
async def asleeps(job):
    job.progress(1, 'asleep')
    try: await asyncio.sleep(100)
    finally: job.log('cleaned up')

@task(isolate='process', memory=100)
def hungry(mib): return len(bytearray(mib*2**20))

@task(isolate='process')
def commits(job, back=False):
    job.log('before')
    with job.begin() as conn:
        conn.execute(sa.text('INSERT INTO own VALUES (1)'))
        job.complete(conn, 'committed')
        if back: conn.rollback()
    os._exit(9)

@task(isolate='process')
def hires(job):
    "Makes a manager, submits a job, and works on for a while"
    from fastsql import Database
    from fh_saas.utils_bgtsk import BackgroundTaskManager
    url = job.store.url.render_as_string(hide_password=False)
    m = BackgroundTaskManager(Database(url))
    id = m.submit('agood', agood, n=3)[0]
    time.sleep(1.5)
    return [id, m.engine.worker, m.engine.settings.concurrency]

@task(isolate='process')
def forks():
    import multiprocessing, subprocess
    with multiprocessing.get_context('fork').Pool(2) as pool: found = pool.map(abs, [-1, -2])
    return found, subprocess.Popen(['sleep', '61']).pid

@task(isolate='process')
def hangs():
    import re
    re.match('(a+)+$', 'a'*60 + 'b')

@task(isolate='process')
def surroundings(): return os.environ.get('PYTHONPATH')
