"An app as a worker imports it: its tasks, and its host by the URL in FLEET_HOST"
import os, time
from pathlib import Path
from fh_saas.db_host import HostDatabase
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import task
from fh_saas.workers.runner import Runner

trace = Path(os.environ['FLEET_TRACE'])


def note(*words):
    with open(trace, 'a') as f: f.write(' '.join(map(str, (time.time(), os.getpid(), *words))) + '\n')


@task('ping')
def ping(n=0): note('ping', n)


@task('nap')
def nap(job, seconds, polite=False):
    note('begin', job.id)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if polite: job.give_way()
        time.sleep(0.01)
    note('end', job.id)


@task('flaky')
def flaky(job):
    note('tried', job.attempt)
    if job.attempt == 1: raise ConnectionError('503')


def host(): return Runner(HostDatabase(os.environ['FLEET_HOST']), Settings(lease=float(os.environ.get('FLEET_LEASE', 30)), poll=0.5), sweep=5)
