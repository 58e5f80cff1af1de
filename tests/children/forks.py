"forks.py <url> <parent stays: 0 or 1>: a process whose default engine is at work forks; both submit and run jobs"
import os, sys, time
from fastsql import Database
import tasks
from fh_saas.jobs.process import default_engine
from fh_saas.utils_bgtsk import BackgroundTaskManager

url, stays, me = sys.argv[1], sys.argv[2] == '1', os.getpid()
db = Database(url)
manager = BackgroundTaskManager(db)
db.conn.close(); db.engine.dispose()  # the app's own connection is the app's to close before it forks

def run(who, n):
    job_id, bg_task = manager.submit('echo', tasks.echo, n=n)
    bg_task.func(*bg_task.args, **bg_task.kwargs)
    while (status := manager.get_job(job_id).status) != 'completed': time.sleep(0.02)  # the engine may have been first
    sys.stdout.write(f'{who} {status} {job_id} {default_engine().worker.split(":")[1]}\n')

run('before', 0)
if (child := os.fork()) == 0:
    run('child', 1)
    while not stays and os.getppid() == me: time.sleep(0.02)
    job_id, _ = manager.submit('echo', tasks.echo, n=2)  # by the engine's own threads
    while manager.get_job(job_id).status != 'completed': time.sleep(0.02)
    sys.stdout.write(f'last completed {job_id} {os.getpid()}\n')
    os._exit(0)
if stays:
    os.waitpid(child, 0)
    run('parent', 3)
else:
    time.sleep(0.5)
