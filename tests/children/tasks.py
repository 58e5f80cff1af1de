"Tasks of the children, under fixed names: a test submits them, a child runs them"
import asyncio, os, time
from fh_saas.jobs.tasks import task


@task('echo')
def echo(n): return n

@task('work')
def work(seconds): print('begun', flush=True); time.sleep(seconds); return os.getpid()

@task('awork')
async def awork(seconds): await asyncio.sleep(seconds); return os.getpid()

# how long these sleep is the process's business: 60 s in the one that is stopped, nothing in the next
def seconds(): return float(os.environ.get('NAP', 0))

@task('nap')
def nap(): print('begun', flush=True); time.sleep(seconds()); return os.getpid()

@task('anap')
async def anap(): print('begun', flush=True); await asyncio.sleep(seconds()); return os.getpid()

@task('anap_cleanup')
async def anap_cleanup():
    "Takes a moment to clean up after it was cancelled, as clients and pools do"
    print('begun', flush=True)
    try: await asyncio.sleep(seconds())
    finally: await asyncio.sleep(0.3)
    return os.getpid()

@task('anap_stubborn')
async def anap_stubborn():
    "Takes a cancellation for one more error"
    print('begun', flush=True)
    until = time.monotonic() + seconds()
    while time.monotonic() < until:
        try: await asyncio.sleep(0.2)
        except asyncio.CancelledError: continue
    return os.getpid()

@task('poison')
def poison(): time.sleep(0.05); os._exit(66)

@task('harm')
def harm(how, seconds=0.05):
    "What no other job may notice"
    time.sleep(seconds)
    if how == 'exit': os._exit(66)
    if how == 'segv': os.kill(os.getpid(), 11)
    if how == 'memory': return bytearray(2**60)
    if how == 'result': return object()
    while how == 'loop': pass
