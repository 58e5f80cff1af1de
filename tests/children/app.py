"An app as users write them; DBURL, NAP and RUNNER (its grace; empty for none) come from the environment"
import os, time
from fasthtml.common import FastHTML, JSONResponse, P
from fastsql import Database
import tasks
from fh_saas.jobs.settings import Settings
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner

app = FastHTML()
manager = BackgroundTaskManager(Database(os.environ['DBURL']))
if grace := os.environ.get('RUNNER'): Runner(settings=Settings(grace=float(grace), poll=0.2, handoff=float(os.environ.get('HANDOFF', 1)))).attach(app)

def named(name): return getattr(tasks, name)

@app.route('/start/{name}')
def start(name:str):
    job_id, bg_task = manager.submit(name, named(name))
    return P(job_id, id='job'), bg_task

@app.route('/json/{name}')
def json(name:str):
    job_id, bg_task = manager.submit(name, named(name))
    return JSONResponse(dict(job_id=job_id)), bg_task

@app.route('/ok')
def ok(): return f'{time.time()}'
