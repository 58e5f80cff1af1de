"worker.py <url> <settings as JSON>: runs the jobs of one database, and says how many results it dropped"
import json, sys, time
import tasks  # noqa: F401
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.process import use_engine
from fh_saas.jobs.settings import Settings

engine = use_engine(Engine(Settings(**dict(poll=0.1, handoff=0, grace=1) | json.loads(sys.argv[2]))))
engine.attend(engine.store(sys.argv[1]))
print('ready')
said = 0
while True:
    if engine.stale != said: print('stale', said := engine.stale)
    time.sleep(0.05)
