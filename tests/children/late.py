"late.py <url>: a process that is told to end while a job runs, and in which a last request still submits one"
import sys, time
from fastsql import Database
import tasks
from fh_saas.jobs.settings import Settings
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner

runner = Runner(settings=Settings(handoff=0, poll=0.2, grace=0.3)).start()
manager = BackgroundTaskManager(Database(sys.argv[1]))
job_id, _ = manager.submit('nap', tasks.nap)
while manager.get_job(job_id).status != 'running': time.sleep(0.02)
runner.stop()
print('stopped', job_id)
print('late', manager.submit('late', tasks.echo, n=1)[0])
time.sleep(1.5)  # the server ends its last connections
print('leaving')
