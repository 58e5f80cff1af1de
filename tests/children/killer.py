"killer.py <folder> <submit: 0 or 1>: a runner of eight tenants, one of whose jobs kills its process"
import os, signal, sys, time
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import task
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner

@task('innocent')
def innocent(): time.sleep(0.3)

@task('killer')
def killer(): time.sleep(0.15); os.kill(os.getpid(), signal.SIGKILL)

host, tenants = HostDatabase(f'sqlite:///{sys.argv[1]}/host.db'), [f't{n}' for n in range(8)]
def jobs():
    for t in tenants:
        with get_or_create_tenant_db(t, host=host) as db: yield from BackgroundTaskManager(db).list_jobs()

if sys.argv[2] == '1':
    for n, t in enumerate(tenants):
        with get_or_create_tenant_db(t, host=host) as db:
            name, f = ('killer', killer) if n == 3 else ('innocent', innocent)
            BackgroundTaskManager(db).submit(name, f)
with Runner(host, Settings(handoff=0, poll=0.2, lease=1), sweep=0.2):
    while not all(j.completed_at for j in jobs()): time.sleep(0.1)
print(sorted({(j.job_type, j.status) for j in jobs()}))
