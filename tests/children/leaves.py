"leaves.py <url> <task>: a script that comes to its end while a job runs"
import sys, time
from fastsql import Database
import tasks
from fh_saas.utils_bgtsk import BackgroundTaskManager

manager = BackgroundTaskManager(Database(sys.argv[1]))
job_id, _ = manager.submit('leaves', getattr(tasks, sys.argv[2]))
while manager.get_job(job_id).status != 'running': time.sleep(0.02)
print('leaving')
