"What one job, one tenant or one host does stays its own."
import asyncio, gc, subprocess, sys, threading, time
from functools import partial
from pathlib import Path
import pytest
from conftest import wait_until
from fastsql import Database
from fh_saas.db_connect import show_url, writing
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import TenantMismatch, delete_tenant, get_or_create_tenant_db, suspend_tenant
from fh_saas.jobs.desk import Slot
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import task
from fh_saas.utils_bgtsk import BackgroundTaskManager, TenantJob
from fh_saas.workers.runner import Runner
from tenacity import wait_fixed

finals = 'completed', 'failed', 'completed_with_warnings'
def ended(m, job_id, seconds=20): return wait_until(lambda: (j := m.get_job(job_id)).status in finals and j, seconds, f'{job_id} did not end')


@pytest.fixture
def two(new_sqlite, new_engine):
    "Managers of two databases on one engine"
    e = new_engine(handoff=0.2)
    dbs = [Database(new_sqlite()) for _ in range(2)]
    yield [BackgroundTaskManager(db, e) for db in dbs]
    for db in dbs: db.conn.close(); db.engine.dispose()


def import_into(seen):
    def work(line): seen.append(line)
    return work

def test_a_closure_of_one_tenant_meets_no_job_of_another(two, new_engine):
    acme, globex = two
    first = BackgroundTaskManager(acme.db, new_engine(handoff=3600))
    job_id, _ = first.submit('import', import_into([]), line='acme secret')
    first.engine.stop(0)
    with writing(acme.store.engine) as conn: conn.execute(acme.store.t.jobs.update().values(run_at=None))
    theirs, ours = [], []
    other, _ = globex.submit('import', import_into(theirs), line='globex')
    assert ended(globex, other).status == 'completed' and theirs == ['globex']
    time.sleep(0.6)
    assert acme.get_job(job_id).status == 'pending' and acme.state(acme.get_job(job_id)) == 'waiting'
    acme.submit('import', import_into(ours), line='acme')  # the same function, for this database: what was left goes on
    assert ended(acme, job_id).status == 'completed' and wait_until(lambda: sorted(ours) == ['acme', 'acme secret']) and theirs == ['globex']

sent = []
def send(to, dry_run=False):
    sent.append((to, dry_run))
    if len(sent) < 3: raise OSError

def test_a_partial_is_for_its_own_job_only(two):
    m, _ = two
    m.engine.registry.add(send, backoff=wait_fixed(0.1))
    job_id, _ = m.submit('send', send, to='ada')
    dry, _ = m.submit('send', partial(send, dry_run=True), to='bob')
    assert {ended(m, i).status for i in (job_id, dry)} == {'completed'}
    assert {d for to, d in sent if to == 'ada'} == {False} and {d for to, d in sent if to == 'bob'} == {True}

def test_two_lambdas_are_two_tasks(two):
    m, _ = two
    jobs = [m.submit('n', f)[0] for f in (lambda: 1, lambda: 2)]
    assert [ended(m, j).result for j in jobs] == ['1', '2']

def test_two_hosts_in_one_folder_share_no_tenant(tmp_path):
    one, two = (HostDatabase(f'sqlite:///{tmp_path}/{n}.db') for n in ('one', 'two'))
    get_or_create_tenant_db('acme', host=one).close()
    with pytest.raises(TenantMismatch, match='acme'): get_or_create_tenant_db('acme', host=two)
    two.register(one.find('acme'))
    with pytest.raises(TenantMismatch, match='another host'): delete_tenant('acme', two)
    with pytest.raises(TenantMismatch): delete_tenant('acme', two, force=True)
    assert (tmp_path/'acme_db.db').exists()

def test_handles_that_are_collected_at_any_moment_block_nothing(tmp_path):
    host, done = HostDatabase(f'sqlite:///{tmp_path}/host.db'), threading.Event()
    def work():
        old = gc.get_threshold()
        gc.set_threshold(50, 2, 2)
        try:
            for n in range(200):
                db = get_or_create_tenant_db(f't{n%7}', host=host)
                db.t.products  # a cycle: the handle is left to the collector
            done.set()
        finally: gc.set_threshold(*old)
    threading.Thread(target=work, daemon=True).start()
    assert done.wait(60)

def test_many_idle_tenants_hold_few_files(tmp_path):
    code = """
import os, resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import task
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner
from tenacity import wait_fixed
@task('ping')
def ping(): return 1
host = HostDatabase(f'sqlite:///{sys.argv[1]}/host.db')
host.open_dbs.max_open = 16
names = [f't{n}' for n in range(150)]
for n in names: get_or_create_tenant_db(n, host=host).close()
with Runner(host, Settings(handoff=0, poll=0.5), sweep=0.5) as r:
    ids = []
    for n in names:
        with get_or_create_tenant_db(n, host=host) as db: ids.append((n, BackgroundTaskManager(db).submit('ping', ping)[0]))
    def done():
        for n, i in ids:
            with get_or_create_tenant_db(n, host=host) as db:
                if BackgroundTaskManager(db).get_job(i).status != 'completed': return False
        return True
    until = time.monotonic() + 40
    while not done() and time.monotonic() < until: time.sleep(0.2)
    time.sleep(2)
    print(done(), len(os.listdir('/proc/self/fd')))
"""
    p = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, timeout=90, cwd=Path(__file__).parent.parent)
    assert p.returncode == 0, p.stderr[-2000:]
    ok, files = p.stdout.split()[-2:]
    assert ok == 'True' and int(files) < 450, p.stderr[-2000:]

@pytest.mark.parametrize('bad', [None, 'text', [1], {'x': object()}])
def test_details_that_are_none_harm_nobody(two, bad):
    m, _ = two
    def odd(job): job.details = bad
    job_id, _ = m.submit('odd', odd)
    assert ended(m, job_id, 5).status == 'completed'

def test_a_row_without_moments_is_rescued_like_any_other(two):
    m, _ = two
    m.tenant_jobs.insert(TenantJob(id='by hand', job_type='ping', status='running', payload='{}'))
    m.engine.registry.add(lambda: 1, 'ping')
    job_id, _ = m.submit('ok', lambda: 2)
    m.engine.attend(m.store)
    assert ended(m, 'by hand').status == ended(m, job_id).status == 'completed'

def test_no_more_jobs_are_claimed_than_can_run(new_sqlite, new_engine):
    e = new_engine(handoff=0, concurrency=2, poll=0.1)
    most, now, lock = [0], [0], threading.Lock()
    def work():
        with lock: now[0] += 1
        time.sleep(0.1)
        with lock: now[0] -= 1
    ms = [BackgroundTaskManager(Database(new_sqlite()), e) for _ in range(12)]
    ids = [(m, m.submit('work', work)[0]) for m in ms]
    def running(): return sum(len(m.list_jobs(status='running')) for m in ms)
    until = time.monotonic() + 30
    while any(m.get_job(i).status != 'completed' for m, i in ids) and time.monotonic() < until: most[0] = max(most[0], running())
    # twelve databases are not counted in one moment, and an outcome on its way to the disk still counts as running
    assert most[0] <= 5 and all(m.get_job(i).attempt == 1 for m, i in ids)

def test_a_row_of_this_process_that_nobody_works_on_is_taken_back(new_sqlite, new_engine):
    m = BackgroundTaskManager(Database(new_sqlite()), new_engine(handoff=0, lease=1, poll=0.1))
    go = threading.Event()
    def slow(): assert go.wait(30)
    m.submit('slow', slow)
    job_id, _ = m.submit('ping', lambda: 1, run_at='2999-01-01T00:00:00Z')
    m.store.claim_one(job_id, 'forgotten', m.engine.worker, 1)  # as after a claim that went wrong
    try: assert wait_until(lambda: m.get_job(job_id).status == 'completed', 10) and m.get_job(job_id).retry_count == 1
    finally: go.set()

def test_sys_exit_inside_an_async_task_leaves_the_loop_alive(two):
    m, _ = two
    async def child(): sys.exit(3)
    async def bad(): await asyncio.gather(child())
    async def good(): return 1
    jobs = [m.submit('x', f, 1)[0] for f in (bad, good)]
    assert [ended(m, j).status for j in jobs] == ['failed', 'completed']

def test_a_suspended_tenant_starts_nothing(tmp_path):
    host, ran = HostDatabase(f'sqlite:///{tmp_path}/host.db'), []
    @task('suspended_ping')
    def ping(): ran.append(1)
    with Runner(host, Settings(handoff=1.5, poll=0.2), sweep=0.2) as runner:
        with get_or_create_tenant_db('acme', host=host) as db: m = BackgroundTaskManager(db); job_id, bg = m.submit('ping', ping)
        suspend_tenant('acme', host)
        wait_until(lambda: runner.engine.is_paused(m.store))
        asyncio.run(bg())
        time.sleep(2.5)
        assert ran == [] and m.store.get(job_id)['status'] == 'pending'

def test_tenants_take_turns_at_the_slot_of_suspects(new_sqlite, new_engine):
    "After a crash, one has five interrupted jobs and others have two"
    e, ran = new_engine(handoff=3600, poll=0.2), []
    managers = [BackgroundTaskManager(Database(new_sqlite()), e) for _ in range(3)]
    def interrupted(name): ran.append(name); time.sleep(0.05)
    for name, m, n in zip('abc', managers, (5, 2, 2)):
        for _ in range(n): m.submit('t', interrupted, 3, name=name, run_at='2100-01-01')
        with writing(m.store.engine) as conn: conn.execute(m.store.t.jobs.update().values(run_at='2020-01-01T00:00:00.000000', lost=1, attempt=1, retry_count=1))
    for m in managers: e.attend(m.store)
    wait_until(lambda: len(ran) == 9, 40, f'{ran}')
    assert all(x != y for x, y in zip(ran[:6], ran[1:6])), ran
    for m in managers: m.db.conn.close(); m.db.engine.dispose()

def test_some_of_those_that_wait_for_the_slot_are_told_at_once_that_it_is_free():
    "After a crash hundreds wait, each came at each end, and one of them had it"
    slot, desks = Slot(), [object() for _ in range(20)]
    assert slot.take(first := object())
    assert not any(slot.take(d) for d in desks)
    assert slot.give() == desks[:8]
    assert slot.take(desks[0]) and not any(slot.take(d) for d in desks[1:8])
    assert slot.give() == desks[8:16]
    assert slot.take(desks[8])
    assert slot.give() == desks[16:] + desks[1:5]  # those that came in vain are behind the others

def test_desks_that_waited_for_the_slot_of_a_suspect_come_to_rest(two):
    e, ids = two[0].engine, []
    for m in two:
        for n in range(3):
            job_id, _ = m.submit('ping', lambda: time.sleep(0.05), run_at='2999-01-01T00:00:00Z')
            ids.append((m, job_id))
        with writing(m.store.engine) as conn: conn.execute(m.store.t.jobs.update().values(lost=1, run_at=None))
    for m in two: e.attend(m.store)
    assert {ended(m, i).status for m, i in ids} == {'completed'}
    one, other = (e._desks[m.store] for m in two)
    one.freed, other.freed = [other], [one]  # as when each found the slot taken by the other for nothing
    visits, visit = [], e._have_turn
    e._have_turn = lambda desk, *args: (visits.append(1), visit(desk, *args))[1]
    e.attend(two[0].store)
    time.sleep(1)
    assert len(visits) < 20

@pytest.mark.parametrize('details', ['{broken', '[1]', '7'])
def test_damaged_details_keep_no_job_from_running(two, details):
    m, _ = two
    job_id, _ = m.submit('ping', lambda: 1, run_at='2999-01-01T00:00:00Z')
    with writing(m.store.engine) as conn: conn.execute(m.store.t.jobs.update().values(details=details, run_at=None))
    m.engine.attend(m.store)
    assert ended(m, job_id).status == 'completed'

def test_no_password_is_shown_whatever_its_place():
    assert 's3cret' not in show_url('postgresql://h/db?user=x&password=s3cret') + show_url('postgresql://x:s3cret@h/db?sslpassword=s3cret')
