"A job that one process submits is started by another, without anybody polling the tenants."
import asyncio, os, random, resource, subprocess, sys, time, uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
import pytest
from conftest import wait_until
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.bell import Bell, Ear
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.store import Store
from fh_saas.jobs.tasks import Registry, task
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.jobs.tenancy import rules_of
from fh_saas.jobs import notes
from fh_saas.jobs.wake import Wakes, wakes_of
from fh_saas.workers import lookout, watch
from fh_saas.workers.fleet import Fleet
from fh_saas.workers.runner import Runner

submitter = '''
import os, sys
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import Registry
from fh_saas.utils_bgtsk import BackgroundTaskManager
def started(n): return n
host, dies = HostDatabase(sys.argv[1]), sys.argv[2] == 'dies'
m = BackgroundTaskManager(get_or_create_tenant_db(sys.argv[3], host=host), Engine(Settings(concurrency=0, busy=0.5), Registry()))
if dies:
    wakes = m.engine.tenancy(m.store).wakes
    wakes.ring_soon = lambda *args: os._exit(0)
    wakes.bound = 1  # a commit takes a second at most here, so the hint leads to it after two
sys.stdin.readline()
for n in range(3): print(m.submit('t', started, n=n)[0], flush=True)
'''
acme = f'acme-{uuid.uuid4().hex[:6]}'  # tests at the same time share one server

@pytest.fixture
def serve(host, monkeypatch):
    "A runner that finds every tenant quiet first, so that only a ring leads there"
    begun = []
    task('started')(lambda n: begun.append(time.monotonic()))
    runner = Runner(host, Settings(poll=3600)).start()
    get_or_create_tenant_db(acme, host=host).close()
    time.sleep(1.5)
    yield begun
    runner.stop(0)

def child(host, how):
    p = subprocess.Popen([sys.executable, '-c', submitter, host.url.render_as_string(hide_password=False), how, acme], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return p

def test_a_ring_is_heard_at_once(host, serve):
    p = child(host, 'rings')
    time.sleep(2)
    p.stdin.write('\n'); p.stdin.flush()
    assert len(p.stdout.readline()) == 33
    wait_until(lambda: serve, 5)  # it is milliseconds; the hint leads there after ten seconds, a poll of this runner after an hour
    wait_until(lambda: len(serve) == 3, 5)
    p.wait(10)

def test_who_is_called_does_not_ask_the_host_first(host, serve, monkeypatch):
    monkeypatch.setattr(lookout.Lookout, '_look', lambda self: 1.0)  # nothing is found there
    p = child(host, 'rings')
    time.sleep(2)
    p.stdin.write('\n'); p.stdin.flush()
    wait_until(lambda: serve, 8)
    p.wait(10)

def test_each_tenant_is_one_process_to_call(host, new_engine):
    fleet, engines = Fleet(host), [new_engine() for _ in range(3)]
    assert fleet.place('me') == (0, 1)
    for e in engines: fleet.beat(e)
    places = sorted(fleet.place(e.worker) for e in engines)
    assert places == [(0, 3), (1, 3), (2, 3)]
    def home(place, bell, id): return Runner._at_home(SimpleNamespace(_place=place, wakes=SimpleNamespace(bell=bell)), id)
    called = {id: [n for n, place in enumerate(places) if home(place, None, id)] for id in map(str, range(100))}
    assert all(len(who) == 1 for who in called.values()) and {n for n, in called.values()} == {0, 1, 2}
    assert not any(home(place, 'a bell calls by name', '7') for place in places)

def test_notes_do_not_wait_for_the_disk_and_what_an_operator_says_does(new_pg, new_engine, statements):
    h = HostDatabase(new_pg())
    wakes = wakes_of(h)
    assert [setting(c) for c in (wakes, Store(new_pg()), Store(h.url, 'sys_jobs'))] == ['off', 'on', 'on']
    rules_of(h).set(queue='imports', concurrency=2)
    begun = next(n for n, s in enumerate(statements) if 'SET LOCAL synchronous_commit TO on' in s)
    assert 'INSERT INTO fh_saas_rules' in ''.join(statements[begun:])
    Fleet(h).beat(e := new_engine())
    statements.clear()
    Fleet(h).ask(e.worker, 'quiet')
    assert [s.split()[0] for s in statements][-3:] == ['SET', 'UPDATE', 'COMMIT']
    wakes.close(); h.close()

def setting(committer):
    with committer.cursor() as cur: return cur.execute('SHOW synchronous_commit').fetchone()[0]

def test_one_that_dies_before_it_rings_has_left_a_hint(host, serve):
    p = child(host, 'dies')
    p.stdin.write('\n'); p.stdin.flush()
    p.wait(20)
    wait_until(lambda: serve, 8)
    assert len(serve) == 1

def test_one_of_the_listeners_is_called_before_the_note_is_there(tmp_path, monkeypatch):
    from fh_saas.jobs.bell import Ear
    h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    ears = [Ear(h.url, h.id, f'w:{n}') for n in range(2)]
    web = Engine(Settings(concurrency=0), Registry())
    m = BackgroundTaskManager(get_or_create_tenant_db('acme', host=h), web)
    bell = web.tenancy(m.store).wakes.bell
    with monkeypatch.context() as slow:
        slow.setattr('fh_saas.jobs.bell.pause', 60)
        bell.call('acme'); bell.call('acme')  # two within the pause are one
    heard = [e.wait(0.2) for e in ears]
    assert sorted(heard) == [[], ['!acme']]
    bell._next = 0.0  # it is over
    m.submit('t', print)
    def all_of(ear):
        heard = []
        wait_until(lambda: heard.extend(ear.wait(0.05)) or 'acme' in heard, 5)  # the note comes last
        return heard
    assert sorted(map(all_of, ears), key=len) == [['acme'], ['!acme', 'acme']]
    for e in ears: e.close()
    bell.call('acme')  # nobody listens any more
    web.stop(0); h.close()

@pytest.fixture
def elsewhere(host):
    "A manager in a process that leaves its jobs to others, and the rings and commits that it makes"
    web = Engine(Settings(concurrency=0), Registry())
    m, rings, commits = BackgroundTaskManager(get_or_create_tenant_db(acme, host=host), web), [], []
    wakes, note, commit = web.tenancy(m.store).wakes, web.tenancy(m.store).wakes._note, m.store._transact
    wakes._note = lambda *args: rings.append(args) or note(*args)
    m.store._transact = lambda *args, **kw: commits.append(1) or commit(*args, **kw)
    yield m, rings, commits
    web.stop(0)
    noted(m)
    del wakes._note  # the host's wakes outlive this engine

async def together(m, n, **options): return await asyncio.gather(*(m.asubmit('t', print, **options) for _ in range(n)))

def noted(m):
    "Wait for the notes that wait"
    wakes = m.engine.tenancy(m.store).wakes
    wait_until(lambda: not wakes.notes.at, 5)
    with wakes.notes._pen: return wakes

def test_jobs_that_share_a_commit_share_a_note(elsewhere):
    m, rings, commits = elsewhere
    assert len(asyncio.run(together(m, 100))) == 100
    wakes = noted(m)
    assert 1 <= len(rings) <= len(commits) + 1 < 50 and set(rings) == {(acme, None, 'default')}
    assert acme in wakes.due()[0]

def test_a_lone_submit_asks_a_server_twice(elsewhere, statements):
    m, *_ = elsewhere
    m.submit('t', print)  # with a hint for the next seconds
    statements.clear()
    m.submit('t', print)
    assert len(statements) == (0 if m.engine.tenancy(m.store).wakes.bell else 2)  # the job, and the ring in the host

def test_in_a_stream_of_submits_a_note_speaks_for_many_and_the_last_comes_after_the_last_commit(elsewhere, monkeypatch):
    m, rings, _ = elsewhere
    wakes, seen = m.engine.tenancy(m.store).wakes, []
    note = wakes._note  # as the fixture has it
    monkeypatch.setattr(wakes, '_note', lambda *args: seen.append(m.store.by_status()['pending']) or note(*args))
    monkeypatch.setattr(notes, 'spacing', 0.05)
    start, at_once = time.monotonic(), 0 if wakes.bell else notes.burst
    for n in range(100): m.submit('t', print)
    took = time.monotonic() - start
    noted(m)
    assert 1 <= len(rings) <= at_once + took/0.05 + 2
    assert seen[:at_once] == [*range(1, at_once + 1)] and seen[-1] == 100
    time.sleep(notes.burst*0.05)
    m.submit('t', print)
    noted(m)
    assert seen[-1] == 101

@pytest.mark.parametrize('bell', [True, False])
def test_every_commit_is_followed_by_a_note_whoever_commits_beside_it(tmp_path, monkeypatch, bell):
    h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    wakes, committed, seen = Wakes(h), {n: 0 for n in range(4)}, {n: 0 for n in range(4)}
    if not bell: wakes.bell = None  # as on a server
    def note(tenant, at, queue): seen.update(committed) or time.sleep(random.uniform(0, 0.002))
    monkeypatch.setattr(wakes, '_note', note)
    monkeypatch.setattr(notes, 'spacing', 0.001)
    def submits(n):
        for _ in range(8):
            committed[n] += 1
            wakes.ring_soon('acme', 'default')
            time.sleep(random.uniform(0, 0.001))
    with ThreadPoolExecutor(4) as threads:
        for _ in range(150):
            list(threads.map(submits, committed))
            wait_until(lambda: seen == committed, 5)  # each time there is a last one
    assert set(committed.values()) == {1200}
    wakes.close(); h.close()

def test_a_note_that_fails_does_not_keep_back_the_next(tmp_path, monkeypatch, caplog):
    h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    wakes, written = Wakes(h), []
    monkeypatch.setattr(wakes, '_note', lambda tenant, at, queue: written.append(tenant) if tenant == 'globex' else 1/0)
    for t in ('acme', 'globex', 'globex'): wakes.ring_soon(t)
    wait_until(lambda: written, 5)
    assert written == ['globex'] and 'tenant=acme: not noted' in caplog.text
    wakes.close(); h.close()

leaver = '''
import multiprocessing, os, sys, threading, time
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs import notes
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import Registry
from fh_saas.utils_bgtsk import BackgroundTaskManager
how, url, after = sys.argv[1:]
host = HostDatabase(url)
m = BackgroundTaskManager(get_or_create_tenant_db('acme', host=host), Engine(Settings(concurrency=0), Registry()))
def leave():
    m.submit('t', print, queue='q')
    time.sleep(float(after))
if __name__ == '__main__':
    if how != 'main':  # one that has a thread already which writes notes
        m.submit('t', print, queue='before')
        time.sleep(0.1)
    if how == 'main': leave()
    elif how.startswith('os.fork'):
        if 'beside' in how:
            its = m.engine.tenancy(m.store).wakes.notes
            threading.Thread(target=lambda: (its._lock.acquire(), its._pen.acquire(), time.sleep(60)), daemon=True).start()
            time.sleep(0.1)
        if os.fork() == 0: leave(); sys.exit()
        os.wait()
        os._exit(0)
    else:
        p = multiprocessing.get_context(how).Process(target=leave)
        p.start(); p.join(60); sys.exit(p.exitcode)
'''

@pytest.mark.parametrize('process, after', [('main', 0), ('main', 0.0095), ('main', 0.0105), ('os.fork', 0), ('os.fork beside a thread that writes', 0), ('fork', 0), ('fork', 0.0105), ('spawn', 0)])
def test_who_ends_writes_the_notes_that_wait(tmp_path, process, after):
    "However short the time between the last submit and the end: at once, or while the thread is about to write"
    (tmp_path/'leaver.py').write_text(leaver)
    h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    subprocess.run([sys.executable, 'leaver.py', process, str(h.url), str(after)], cwd=tmp_path, check=True, timeout=60)
    assert list(wakes_of(h).due(queues=('q',))[0]) == ['acme']
    h.close()

def test_an_engine_that_stops_writes_the_notes_of_its_tenants(elsewhere, monkeypatch):
    m, rings, _ = elsewhere
    monkeypatch.setattr(notes, 'spacing', 60)
    wakes = m.engine.tenancy(m.store).wakes
    for n in range(notes.burst + 1): m.submit('t', print)
    before = len(rings)
    m.engine.stop(0)  # a web server ends by a signal, and Python's own end is not reached
    assert len(rings) == before + 1 and acme in wakes.due()[0] and not wakes.notes.at

def test_a_task_in_a_process_of_its_own_leaves_a_note_too(tmp_path):
    (tmp_path/'isolated.py').write_text('''
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import open_tenant_db
from fh_saas.jobs.tasks import task
from fh_saas.utils_bgtsk import BackgroundTaskManager
def more(): ...
@task('isolated_submit', isolate='process')
def isolated_submit(url): BackgroundTaskManager(open_tenant_db('acme', HostDatabase(url))).submit('more', more, queue='q')
''')
    script = f'''
import sys
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.utils_bgtsk import BackgroundTaskManager
from isolated import isolated_submit
m = BackgroundTaskManager(get_or_create_tenant_db('acme', host=HostDatabase('sqlite:///{tmp_path}/host.db')))
job_id, bg = m.submit(isolated_submit, url='sqlite:///{tmp_path}/host.db')
print(bg.func(*bg.args).kind)
'''
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    assert done.stdout == 'completed\n' and list(wakes_of(h).due(queues=('q',))[0]) == ['acme'], done.stderr
    h.close()

def test_a_host_that_does_not_answer_holds_up_the_end_once(tmp_path, monkeypatch):
    from fh_saas.db_connect import DatabaseBusy
    h, tried = HostDatabase(f'sqlite:///{tmp_path}/host.db'), []
    wakes = Wakes(h)
    monkeypatch.setattr(notes, 'spacing', 60)
    def note(tenant, at, queue): tried.append(tenant); raise DatabaseBusy('locked')
    monkeypatch.setattr(wakes, '_note', note)
    for t in ('acme', 'globex', 'initech'): wakes.ring_soon(t)
    wakes.close(); wakes.close()
    assert tried == ['acme']
    h.close()

def test_without_a_thread_a_note_is_written_by_who_submits(tmp_path, monkeypatch):
    h, written = HostDatabase(f'sqlite:///{tmp_path}/host.db'), []
    wakes = Wakes(h)
    monkeypatch.setattr(wakes, '_note', lambda tenant, at, queue: written.append(tenant))
    def none_left(self): raise RuntimeError("can't start new thread")
    with monkeypatch.context() as m:
        m.setattr('threading.Thread.start', none_left)
        for n in range(3): wakes.ring_soon('acme')
        assert written == ['acme']*3
    wakes.ring_soon('acme')
    wait_until(lambda: len(written) == 4, 5)  # and by the thread, when there can be one
    wakes.close(); h.close()

@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_thread_that_has_died_is_replaced(tmp_path, monkeypatch):
    h, written = HostDatabase(f'sqlite:///{tmp_path}/host.db'), []
    wakes = Wakes(h)
    monkeypatch.setattr(wakes, '_note', lambda tenant, at, queue: sys.exit() if tenant == 'acme' else written.append(tenant))
    wakes.ring_soon('acme')
    wakes.notes.thread.join(5)
    wakes.ring_soon('globex')
    wait_until(lambda: written == ['globex'], 5)
    wakes.close(); h.close()

def test_each_queue_and_each_moment_is_rung_for(elsewhere):
    m, rings, _ = elsewhere
    async def some():
        await asyncio.gather(together(m, 5, queue='a'), together(m, 5, queue='b', run_at='2040-01-01 00:00:00'), together(m, 1, queue='b', run_at='2039-01-01 00:00:00'))
    asyncio.run(some())
    noted(m)
    assert (acme, None, 'a') in rings and {q for _, _, q in rings} == {'a', 'b'}
    assert min(at for _, at, q in rings if q == 'b')[:4] == '2039'

def test_a_ring_that_fails_takes_no_job_along(elsewhere, caplog):
    m, *_ = elsewhere
    def broken(*args): raise RuntimeError('no bell')
    m.engine.tenancy(m.store).wakes.ring_soon = broken
    assert len(asyncio.run(together(m, 3))) == 3 and m.submit('t', print)
    assert m.store.by_status()['pending'] == 4
    assert 'no bell' in caplog.text

def test_a_server_keeps_what_was_there_when_it_began_out_of_collections(tmp_path):
    import gc
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    async def serve():
        async with Runner(host, Settings(grace=0)).lifespan(None): return gc.get_freeze_count()
    gc.unfreeze()
    try:
        frozen = asyncio.run(serve())
        assert frozen > 1000 and 0 < asyncio.run(serve()) <= frozen  # once for a process: what comes later may go again
    finally: gc.unfreeze(); host.close()

def test_the_first_who_passes_by_tells_the_others(new_pg):
    from fh_saas.jobs.bell import Ear
    h = HostDatabase(new_pg())
    wakes, ear = wakes_of(h), Ear(h.url, h.id, 'w:1')
    ear.wait(0)
    wakes.ring('acme')
    assert ear.wait(5) == ['acme']
    def visit(me): return wakes.settle('acme', me, *wakes.lease('acme', me), 0.0, None, True)
    assert visit('w:1') and ear.wait(5) == ['acme']
    assert visit('w:2') and ear.wait(0.3) == []  # whom it does not concern either
    wakes.ring('acme')
    assert ear.wait(5) == ['acme']
    assert visit('w:1') and ear.wait(5) == ['acme']
    ear.close(); h.close()

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

def test_an_idle_process_looks_less_often_until_somebody_comes(host):
    with Runner(host, Settings(poll=3600)) as r: pass  # what it listens with is there, and nobody listens any more
    often, seldom = (watch.glance, 3*watch.glance) if r.wakes.bell else (0.5, 0.5)
    r._lively = time.monotonic()
    assert r._pause() == often
    r._lively -= watch.drowsy
    assert r._pause() == seldom
    r._visiting.add('acme')
    assert r._pause() == often
    r._visiting.clear()
    assert r._pause() == often

def test_a_call_keeps_a_process_awake(tmp_path, monkeypatch):
    calls = []
    class CalledEar:
        def __init__(self, *args): pass
        def wait(self, seconds): time.sleep(0.01); return calls.pop() if calls else []
        def close(self): pass
    monkeypatch.setattr(watch, 'Ear', CalledEar)
    monkeypatch.setattr(Runner, '_hurry', lambda self, id: True)  # it looks there without a visit
    h = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    with Runner(h, Settings(poll=3600)) as r:
        time.sleep(0.1)
        assert r._lively == 0.0
        calls.append(['!acme'])
        wait_until(lambda: r._lively > 0, 5)
    h.close()

def test_a_process_with_very_many_open_files_hears_the_bell_too(tmp_path):
    "A web process with a thousand open connections: `select` takes no file above number 1023"
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most[1]), most[1]))
    files = []
    try:
        host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
        bell = Bell(host.id)
        while not files or files[-1] < 1024: files.append(os.open(os.devnull, os.O_RDONLY))  # just before: the collector closes what tests before have left
        ear = Ear(host.url, host.id, 'me')
        assert ear._sock.fileno() > 1023
        assert ear.wait(0.05) == []
        bell.ring('acme')
        assert ear.wait(5) == ['acme']
        bell.close(); ear.close(); host.close()
    finally:
        for f in files: os.close(f)
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
