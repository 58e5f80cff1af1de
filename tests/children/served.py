"An app as a server imports it, with the tasks and the host of `fleet_app`; what its jobs do goes to FLEET_TRACE"
import asyncio, os, time
from fasthtml.common import FastHTML, JSONResponse
from fleet_app import nap, note
from fh_saas import BackgroundTaskManager, HostDatabase, get_or_create_tenant_db, setup_jobs
from fh_saas.jobs.tasks import task

app, host = FastHTML(secret_key='served'), HostDatabase(os.environ['FLEET_HOST'])
jobs = setup_jobs(app, host)

@task('patient')
def patient(job, seconds):
    "Looks whether it is to stop, and gives way then"
    note('begin', job.id)
    until = time.monotonic() + seconds
    while time.monotonic() < until and not job.should_stop: time.sleep(0.02)
    if job.should_stop: note('told', job.id)
    job.give_way()
    note('end', job.id)

@task('anap')
async def anap(job, seconds):
    note('begin', job.id)
    await asyncio.sleep(seconds)
    note('end', job.id)

@app.route('/start/{name}')
def start(name:str, seconds:float):
    with get_or_create_tenant_db(os.environ['SERVED_TENANT'], host=host) as db: job_id, bg_task = BackgroundTaskManager(db).submit(name, dict(nap=nap, anap=anap, patient=patient)[name], seconds=seconds)
    return JSONResponse(dict(job=job_id, pid=os.getpid())), bg_task
