"opens.py <host url> <tenant> <start at>: opens a tenant that may not exist yet, at the same moment as others, and runs a job there"
import sys, time
import tasks
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.utils_bgtsk import BackgroundTaskManager

while time.time() < float(sys.argv[3]): time.sleep(0.001)
with get_or_create_tenant_db(sys.argv[2], host=HostDatabase(sys.argv[1])) as db:
    manager = BackgroundTaskManager(db)
    job_id, bg_task = manager.submit('echo', tasks.echo, n=1)
    bg_task.func(*bg_task.args, **bg_task.kwargs)
    print('done', job_id)
