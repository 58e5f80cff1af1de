"A job that one process submits is started by another, without anybody polling the tenants."
import subprocess, sys, time
import pytest
from conftest import wait_until
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.store import Store
from fh_saas.jobs.tasks import Registry, task
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner

submitter = '''
import sys
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import Registry
from fh_saas.utils_bgtsk import BackgroundTaskManager
def started(n): return n
host, dies = HostDatabase(sys.argv[1]), sys.argv[2] == 'dies'
m = BackgroundTaskManager(get_or_create_tenant_db('acme', host=host), Engine(Settings(concurrency=0, busy=0.5), Registry()))
if dies:
    wakes = m.engine.tenancy(m.store).wakes
    wakes.ring = lambda *args: sys.exit()
    wakes.bound = 1  # a commit takes a second at most here, so the hint leads to it after two
sys.stdin.readline()
for n in range(3): print(m.submit('t', started, n=n)[0], flush=True)
'''

@pytest.fixture(params=['sqlite', 'postgresql'])
def host(request, tmp_path):
    if request.param == 'sqlite': h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    else: h = HostDatabase(request.getfixturevalue('new_pg')())
    yield h
    from fh_saas.db_tenant import delete_tenant, list_tenants
    for t in list_tenants(h): delete_tenant(t.id, h, force=True)
    h.close()

@pytest.fixture
def serve(host, monkeypatch):
    "A runner that finds every tenant quiet first, so that only a ring leads there"
    begun = []
    task('started')(lambda n: begun.append(time.monotonic()))
    runner = Runner(host, Settings(poll=3600)).start()
    get_or_create_tenant_db('acme', host=host).close()
    time.sleep(1.5)
    yield begun
    runner.stop(0)

def child(host, how):
    p = subprocess.Popen([sys.executable, '-c', submitter, host.url.render_as_string(hide_password=False), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return p

def test_a_ring_is_heard_at_once(host, serve):
    p = child(host, 'rings')
    time.sleep(2)
    p.stdin.write('\n'); p.stdin.flush()
    assert len(p.stdout.readline()) == 33
    start = time.monotonic()
    wait_until(lambda: serve, 5)
    assert serve[0] - start < 2  # it is milliseconds; a poll of this runner would be an hour
    wait_until(lambda: len(serve) == 3, 5)
    p.wait(10)

def test_one_that_dies_before_it_rings_has_left_a_hint(host, serve):
    p = child(host, 'dies')
    p.stdin.write('\n'); p.stdin.flush()
    p.wait(20)
    wait_until(lambda: serve, 8)
    assert len(serve) == 1

def test_one_of_the_listeners_is_called_before_the_note_is_there(tmp_path):
    from fh_saas.jobs.bell import Bell, Ear
    h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    ears = [Ear(h.url, h.id, f'w:{n}') for n in range(2)]
    web = Engine(Settings(concurrency=0), Registry())
    m = BackgroundTaskManager(get_or_create_tenant_db('acme', host=h), web)
    bell = web.tenancy(m.store).wakes.bell
    bell.call('acme'); bell.call('acme')  # two within a few milliseconds are one
    heard = [e.wait(0.2) for e in ears]
    assert sorted(heard) == [[], ['!acme']]
    time.sleep(0.02)
    m.submit('t', print)
    heard = [e.wait(1) for e in ears]
    assert sorted(heard, key=len) == [['acme'], ['!acme', 'acme']]
    for e in ears: e.close()
    bell.call('acme')  # nobody listens any more
    web.stop(0); h.close()

def test_the_sweep_finds_what_nobody_rang_for_and_visits_nobody_else(tmp_path):
    h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    ran, visited = [], []
    task('swept')(lambda n: ran.append(n))
    for id in ('acme', 'globex', 'initech'): get_or_create_tenant_db(id, host=h).close()
    with Runner(h, Settings(poll=3600), sweep=1) as r:
        wait_until(lambda: len(r._stores) == 3, 10)  # each is visited once at the start
        time.sleep(1)
        visit = r.wakes.lease
        r.wakes.lease = lambda id, *args: visited.append(id) or visit(id, *args)
        try:
            other = Store(h.url_of(h.find('globex')))
            other.add(dict(id='unrung', job_type='swept', task='swept', payload='{"n": 7}', max_retries=1))
            other.close()
            wait_until(lambda: ran == [7] and visited, 15)
        finally: r.wakes.lease = visit
    assert set(visited) == {'globex'}
    h.close()
