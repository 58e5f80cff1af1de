"An app under the servers that people run it with, each with two processes: gunicorn, with its own workers and with uvicorn's, and uvicorn."
import json, os, signal, time, urllib.request, uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from types import SimpleNamespace
import pytest
from conftest import free_port, wait_until
from children.launch import Child
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import delete_tenant, get_or_create_tenant_db
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.fleet import Fleet

servers = dict(asgi=('gunicorn', '-k', 'asgi', '-w', '2', '--no-control-socket'), uvicorn_worker=('gunicorn', '-k', 'uvicorn_worker.UvicornWorker', '-w', '2', '--no-control-socket'), uvicorn=('uvicorn', '--workers', '2'))
under_gunicorn = pytest.mark.parametrize('kind', ['asgi', 'uvicorn_worker'])


class Site:
    "A host with one tenant, and servers of its app; this process only looks"
    def __init__(self, url, folder):
        self.host, self.folder, self.trace, self.procs = HostDatabase(url), folder, folder/'trace', []
        self.fleet = Fleet(self.host)
        self.tenant = f'acme-{uuid.uuid4().hex[:6]}'  # tests at the same time share one server
        self.manager = BackgroundTaskManager(get_or_create_tenant_db(self.tenant, host=self.host), Engine(Settings(concurrency=0)))

    def serve(self, kind, *args, there=2, **env):
        "A server of two processes, once `there` of them are heard of"
        port = free_port()
        at = ('--bind', f'127.0.0.1:{port}') if kind != 'uvicorn' else ('--port', port)
        name, *rest = servers[kind]
        self.procs.append(p := Child('-m', name, *rest, *at, *args, 'served:app', **dict(FLEET_HOST=self.host.url.render_as_string(hide_password=False), FLEET_TRACE=self.trace, SERVED_TENANT=self.tenant, FH_SAAS_GRACE=3) | env))
        p.at = f'http://127.0.0.1:{port}'
        old = {w.id for w in self.alive()}
        wait_until(lambda: len({w.id for w in self.alive()} - old) >= there, 60, f'the server is not up: {p.out}')
        return p

    def alive(self): return [w for w in self.fleet.workers() if w.state != 'lost']

    def get(self, server, path):
        "What a route answers; None if the connection was cut, as those that a process has not accepted yet when it ends"
        try:
            with urllib.request.urlopen(server.at + path, timeout=10) as r: return json.loads(r.read())
        except (OSError, HTTPException): return None

    def start(self, server, name, seconds): return self.get(server, f'/start/{name}?seconds={seconds}')

    def jobs(self): return self.manager.list_jobs(None, None, None)
    def of(self, status): return [j for j in self.jobs() if j.status == status]
    def said(self, word): return [SimpleNamespace(at=float(at), pid=int(pid), job=rest[0]) for at, pid, w, *rest in map(str.split, self.trace.read_text().splitlines() if self.trace.exists() else []) if w == word]
    def all_ended(self, seconds): wait_until(lambda: (jobs := self.jobs()) and all(j.status == 'completed' for j in jobs), seconds, 'the end of all jobs did not come')

    def each_ran_once(self, answers):
        begun, ended = (Counter(s.job for s in self.said(word)) for word in ('begin', 'end'))
        ids = {j.id for j in self.jobs()}
        assert {a['job'] for a in answers} <= ids and begun == ended == Counter(ids)
        assert all(j.retry_count == 0 for j in self.jobs())

    def close(self):
        for p in self.procs: p.close()
        self.manager.engine.stop(0)
        self.manager.db.close()
        for t in self.host.tenants(): delete_tenant(t.id, self.host, force=True)
        self.host.close()


@pytest.fixture
def site(new_sqlite, tmp_path):
    s = Site(new_sqlite(), tmp_path)
    yield s
    s.close()

@pytest.fixture
def pg_site(new_pg, tmp_path):
    s = Site(new_pg(), tmp_path)
    yield s
    s.close()


def by_both(site, server):
    "Jobs that are started until both processes have answered; what was answered"
    answers = []
    with ThreadPoolExecutor(8) as pool:
        def both(): answers.extend(pool.map(lambda _: site.start(server, 'nap', 0.05), range(16))); return len({a['pid'] for a in answers}) == 2
        wait_until(both, 20, 'both processes did not answer')
    return answers

@pytest.mark.parametrize('db, kind, args', [('site', 'asgi', ['--preload']), ('site', 'uvicorn_worker', ['--preload']), ('site', 'uvicorn', []), ('pg_site', 'uvicorn_worker', ['--preload'])])
def test_two_processes_serve_and_each_job_is_run_once(request, db, kind, args):
    "Also if the app, with its host, was loaded before they were forked"
    site = request.getfixturevalue(db)
    answers = by_both(site, server := site.serve(kind, *args))
    site.all_ended(15)
    site.each_ran_once(answers)
    assert len(site.jobs()) == len(answers)
    server.send(signal.SIGTERM)
    assert server.ends(15) < 15 and not site.alive()

@under_gunicorn
def test_processes_that_are_replaced_after_so_many_requests_lose_no_job_and_leave_none(site, kind):
    "A job that they left behind would be taken back after 30 s"
    server, answers = site.serve(kind, '--preload', '--max-requests', '20'), []
    with ThreadPoolExecutor(4) as pool:
        def more(): answers.extend(a for a in pool.map(lambda _: site.start(server, 'nap', 0.3), range(8)) if a); return len({a['pid'] for a in answers}) >= 4
        wait_until(more, 40, 'processes were not replaced')
    site.all_ended(15)
    site.each_ran_once(answers)

@pytest.mark.parametrize('kind', [pytest.param('asgi', marks=pytest.mark.xfail(strict=True, reason='it is not told before the connections of its clients are closed, and is killed meanwhile')), 'uvicorn_worker'])
def test_a_process_that_has_served_its_most_requests_tells_its_jobs_at_once(site, kind):
    "Though a client keeps its connection open, as browsers do"
    server = site.serve(kind, '--preload', '--workers', '1', '--max-requests', '3', '--timeout', '8', '--graceful-timeout', '8', '--keep-alive', '60', there=1, FH_SAAS_GRACE=1)
    client = HTTPConnection(server.at.removeprefix('http://'), timeout=10)
    client.request('GET', '/start/patient?seconds=60')
    assert json.loads(client.getresponse().read())
    wait_until(lambda: site.said('begin'), 10)
    for _ in range(3): site.get(server, '/api/v1/health')
    try: wait_until(lambda: site.said('told'), 5, 'the job was not told')
    finally: client.close()

@pytest.mark.parametrize('kind', ['asgi', 'uvicorn_worker'])
def test_an_async_job_runs_on_when_its_client_has_gone(site, kind):
    assert site.start(site.serve(kind, '--preload', '--workers', '1', there=1), 'anap', 4)
    site.all_ended(15)
    assert len(site.said('begin')) == 1

@pytest.mark.parametrize('kind, args', [('asgi', ['--preload']), ('uvicorn_worker', ['--preload']), ('uvicorn', [])])
def test_jobs_give_way_when_the_server_is_told_to_end_and_the_next_one_takes_them_over(site, kind, args):
    first = site.serve(kind, *args)
    for _ in range(4): assert site.start(first, 'patient', 60)
    wait_until(lambda: len(site.said('begin')) == 4, 15)
    first.send(signal.SIGTERM)
    assert first.ends(15) < 15
    assert len(site.said('told')) == 4
    assert [(j.status, j.retry_count) for j in site.jobs()] == [('pending', 0)]*4 and not site.alive()
    site.serve('uvicorn_worker', '--preload', there=1)
    wait_until(lambda: len(site.said('begin')) == 8, 5, 'the jobs did not begin again')

@pytest.mark.parametrize('kind, args', [('asgi', ['--preload']), ('uvicorn_worker', [])])
def test_jobs_go_on_in_the_processes_of_a_reload(site, kind, args):
    server = site.serve(kind, *args)
    for _ in range(4): assert site.start(server, 'patient', 4)
    wait_until(lambda: len(site.said('begin')) == 4, 15)
    old = {w.pid for w in site.alive()}
    server.send(signal.SIGHUP)
    wait_until(lambda: (now := {w.pid for w in site.alive()}) and len(now) == 2 and not now & old, 30, 'there are no new processes')
    site.all_ended(25)
    assert {s.pid for s in site.said('begin')[:4]} <= old and len(site.said('begin')) <= 8
    assert all(j.retry_count == 0 for j in site.jobs())

def test_what_a_killed_process_of_a_server_ran_is_begun_again_within_its_lease(site):
    "Others look at a tenant ten seconds after a submit (`Wakes.bound`) if its process has not told the host more; a lease that is shorter than that waits for it"
    server = site.serve('uvicorn_worker', '--preload', FH_SAAS_LEASE=3)
    submitted, job = time.time(), site.start(server, 'patient', 60)
    wait_until(lambda: site.said('begin'), 15)
    first, killed = site.said('begin')[0].pid, time.time()
    os.kill(first, signal.SIGKILL)
    again = wait_until(lambda: site.said('begin')[1:], 25, 'the job was not begun again')
    assert again[0].pid != first and again[0].job == job['job'] and again[0].at < max(killed + 3, submitted + 10) + 5
