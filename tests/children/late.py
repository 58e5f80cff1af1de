"late.py <url>: a process that is told to end while a job runs, and in which a last request still submits one"
import os, signal, sys, time
from fastsql import Database
import tasks
from fh_saas.jobs.settings import Settings
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner

runner = Runner(settings=Settings(handoff=0, poll=0.2, grace=0.3)).start()
manager = BackgroundTaskManager(Database(sys.argv[1]))
job_id, _ = manager.submit('nap', tasks.nap)
while manager.get_job(job_id).status != 'running': time.sleep(0.02)
signal.signal(signal.SIGTERM, lambda *args: None)  # as a server has a handler of its own
runner._listen()
os.kill(os.getpid(), signal.SIGTERM)
while not runner.engine.closed: time.sleep(0.02)
print('stopped', job_id)
print('late', manager.submit('late', tasks.echo, n=1)[0])
time.sleep(1.5)  # the server ends its last connections
print('leaving')
