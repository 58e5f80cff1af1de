"What one database's turn, job, lock or server does to the others of the same process."
import asyncio, os, sqlite3, subprocess, sys, threading, time, urllib.request
from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace
import pytest
import sqlalchemy as sa
from conftest import free_port, wait_until
from fh_saas.db_connect import DatabaseBusy, FhSaasError
from fh_saas.db_host import gen_id, timestamp
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.desk import Desk
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.ring import Ring
from fh_saas.jobs.rules import Rules
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.store import Store
from fh_saas.jobs.tasks import Registry, task
from fh_saas.jobs.tenancy import Tenancy, rules_of
from fh_saas.jobs.wake import wakes_of
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner
from fh_saas.workers.worker import Worker

ran = []

def own_end(job, n):
    time.sleep(0.02)
    with job.begin() as conn: job.complete(conn, n)
    ran.append(n)

async def own_end_async(job, n): own_end(job, n)

@task('turns_work')
def work(n, s=0.02): time.sleep(s); ran.append(n)

@pytest.fixture
def made():
    engines = []
    def make(queues=None, **settings):
        (registry := Registry()).add(own_end); registry.add(own_end_async); registry.add(work)
        engines.append(e := Engine(Settings(**dict(handoff=0, grace=1, poll=3600) | settings), registry, queues))
        return e
    ran.clear()
    yield make
    for e in engines: e.stop(0)

@pytest.fixture
def turns(monkeypatch):
    "How many turns were had"
    had, turn = [], Engine._turn
    monkeypatch.setattr(Engine, '_turn', lambda self, desk, *args, **kw: had.append(desk) or turn(self, desk, *args, **kw))
    return lambda: len(had)

@pytest.mark.parametrize('func', [own_end, own_end_async])
@pytest.mark.parametrize('queues', [None, dict(default=1)])
def test_a_job_that_writes_its_own_end_makes_room_for_the_next(made, new_url, new_manager, func, queues):
    "Without a runner that looks by, all stood still after the second"
    e = made(queues, concurrency=1 if queues is None else 4)
    ms = [new_manager(new_url(), e) for _ in range(2)]
    for m in ms: m.submit_many('t', func, [dict(n=n) for n in range(6)])
    wait_until(lambda: len(ran) == 12, 8)

def test_responses_of_one_tenant_keep_no_other_from_its_turn(made, new_sqlite, new_manager, turns):
    e = made(concurrency=2)
    first, second = new_manager(new_sqlite(), e), new_manager(new_sqlite(), e)
    first.submit_many('t', work, [dict(n='first') for _ in range(300)])
    second.submit_many('t', work, [dict(n='second') for _ in range(300)])
    over, desk = threading.Event(), e._desks[second.store]
    def respond():
        while not over.wait(0.002):
            if len(desk.wanted) < 20:
                id, _ = second.submit('t', work, n='brought')
                with desk._lock: desk.wanted.append((id, None, SimpleNamespace(set_result=lambda r: None, set_exception=lambda e: None), True))
                e._errand(desk)
    t = threading.Thread(target=respond)
    t.start()
    try:
        wait_until(lambda: len(ran) > 20, 10)
        before, at = turns(), Counter(ran)
        time.sleep(3)
        now = Counter(ran)
    finally: over.set(); t.join()
    assert turns() - before < 3000 and now['first'] - at['first'] > 30  # 12,000 turns a second, and none for the first

def test_a_response_gets_the_place_of_a_job_that_wrote_its_own_end(made, new_sqlite, new_manager):
    "Such an end has no turn of its own: the response waited for the next look"
    e = made(concurrency=1, handoff=60)
    m, inside, go_on = new_manager(new_sqlite(), e), threading.Event(), threading.Event()
    desk = e._desks[m.store]
    def holds(job):
        inside.set(); go_on.wait(10)
        with job.begin() as conn: job.complete(conn, 1)
    async def main():
        first = asyncio.create_task(m.submit('t', holds)[1]())
        await asyncio.to_thread(inside.wait, 10)
        second = asyncio.create_task(m.submit('t', work, n='brought', s=0)[1]())
        await asyncio.to_thread(wait_until, lambda: desk in e._ring and not desk.turning)  # it was asked for, and there is no room
        assert desk.wanted and not desk.hungry
        desk.due = None  # no look that comes anyway
        go_on.set()
        await asyncio.wait([first, second], timeout=5)
    try: asyncio.run(asyncio.wait_for(main(), 15))
    finally: go_on.set()
    assert ran == ['brought']

def test_what_is_due_has_its_part_beside_more_responses_than_there_is_room_for(made, new_sqlite, new_manager):
    "A page that brought more than its threads could do kept all else of that tenant waiting"
    e = made(concurrency=1, handoff=60)
    e.crew.call = lambda *args: None  # nobody goes on by itself
    m, got = new_manager(new_sqlite(), e), []
    brought, desk = [m.submit('t', work, n=n)[0] for n in range(6)], e._desks[m.store]
    due = m.submit_many('t', work, [dict(n='due')]*3)
    desk.wanted, desk.hungry = [(id, None, Future(), True) for id in brought], True
    for _ in range(10):  # in one of them it learns that nothing else is due any more
        e._turn(desk)
        if a := e.line.take(): got.append(a.row['id']); e.line.done(a)
    assert [n for n, id in enumerate(got) if id in due] == [0, 2, 4] and [id for id in got if id in brought] == brought

# --- What is due later

def test_a_database_that_was_forgotten_is_looked_at_no_more(made, new_sqlite, new_manager):
    "It claimed beside the one of the same place that came after it, and nobody renewed its leases"
    url, e = new_sqlite(), made(concurrency=2)
    old, away = e._desks[e.store(url)], new_manager(url, made(concurrency=0))
    e.forget(old.store)
    away.submit('t', work, n=1)
    e._at(old, time.monotonic() + 60)
    assert old.due is None and not any(d is old for *_, d in e._agenda)
    old.hungry = True
    e._turn(old)
    assert not (old.live or ran) and {j.status for j in away.list_jobs()} == {'pending'} and not any(d is old for *_, d in e._agenda)

def test_who_forgets_a_database_again_leaves_the_next_of_its_name_alone(made, new_sqlite):
    e, url = made(), new_sqlite()
    old = e.store(url)
    e.forget(old)
    new = e.store(url)
    e.forget(old)
    assert e.store(url) is new and e.stores() == [new]

def test_what_is_far_away_is_left_to_the_host_that_rings(made, new_sqlite):
    "Each retry of an hour was remembered for that hour"
    e = made(concurrency=2)
    rung, other = (e._desks[e.store(new_sqlite())] for _ in range(2))
    rung.rung = True
    for d in (rung, other): e.attend(d.store, 3600)
    assert rung.due is None and other.due is not None and [d for *_, d in e._agenda] == [other]
    e.attend(rung.store, 59)
    assert rung.due is not None

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)
def test_a_rule_that_changes_has_those_looked_at_at_once_that_wait(host, made, monkeypatch):
    "Thousands that had nothing to do kept the next job waiting"
    e, dbs = made(concurrency=2), [get_or_create_tenant_db(f'rule{n}', host=host) for n in range(5)]
    monkeypatch.setattr(e, '_start', lambda: None)
    monkeypatch.setattr(e.crew, 'call', lambda *args: None)  # nobody goes on by itself
    desks = [e._desks[BackgroundTaskManager(db, e).store] for db in dbs]
    def looks(*which):
        e._errands.clear(); e._agenda.clear()
        for d in desks: d.hungry, d.due, d.tenancy.read = False, None, time.monotonic()
        desks[1].hungry, desks[3].paused = True, True
        e._blocked = {desks[4]}
        begun = time.monotonic()
        e.reconsider(*which)
        return [desks.index(d) for d in e._errands], {n: d.due - begun for n, d in enumerate(desks) if d.due}, [n for n, d in enumerate(desks) if not d.tenancy.read]
    at_once, later, asked = looks()
    assert (at_once, [*later], asked) == ([0, 1, 3, 4], [2], [0, 1, 2, 3, 4])
    assert 0.01 <= later[2] < 1
    assert looks({'rule2'}) == ([2], {}, [2])
    e._blocked = set()
    for db in dbs: db.close()

def test_a_lease_that_runs_out_while_its_row_is_held_is_looked_for_now_and_then(made, new_pg, new_manager, turns):
    e = made(concurrency=2, lease=1)
    m, goes_on = new_manager(new_pg(), e), threading.Event()
    def holds(job):
        with job.begin() as conn: job.complete(conn, 'kept'); goes_on.wait(20)
    e.registry.add(holds)
    id, _ = m.submit('t', holds)
    wait_until(lambda: m.get_job(id).status == 'running', 10)
    time.sleep(2)
    before = turns()
    e.attend(m.store)
    time.sleep(3)
    n = turns() - before
    goes_on.set()
    wait_until(lambda: m.get_job(id).result == '"kept"', 15)
    assert n < 30  # hundreds a second

def test_what_was_lost_does_not_wait_for_the_end_of_a_backlog(made, new_url, new_manager):
    e, url = made(concurrency=2), new_url()
    m = new_manager(url, made(concurrency=0))
    lost, _ = m.submit('t', work, n='lost', priority=4)
    m.submit_many('t', work, [dict(n=n) for n in range(3000)])
    j = m.store.t.jobs
    with m.store.engine.begin() as conn:
        conn.execute(j.update().where(j.c.id == lost).values(status='running', claim_token='x', worker='gone', lease_until=timestamp(time.time() - 1), started_at=timestamp(time.time() - 9), attempt=1))
    e.attend(new_manager(url, e).store)
    wait_until(lambda: 'lost' in ran, 15)
    assert len(ran) < 2000

def test_what_a_turn_claims_while_it_is_told_to_start_nothing_goes_back(made, new_sqlite, new_manager, monkeypatch):
    e = made(concurrency=2)
    m = new_manager(new_sqlite(), e)
    desk, turn = e._desks[m.store], Desk.turn
    def told(self, *args, **kw):
        said = turn(self, *args, **kw)
        if said[1]: e.be_quiet()
        return said
    monkeypatch.setattr(Desk, 'turn', told)
    id, _ = m.submit('t', work, n='late')
    wait_until(lambda: e.quiet, 10)
    wait_until(lambda: m.get_job(id).status == 'pending' and not desk.live, 10)
    assert m.get_job(id).attempt == 0 and ran == []
    monkeypatch.undo()
    e.be_quiet(False)
    assert m.wait(id, 10).status == 'completed' and m.get_job(id).attempt == 1

def test_last_attempts_of_one_tenant_are_begun_beside_the_short_jobs_of_another(made, new_sqlite, new_manager):
    e = made(concurrency=8)
    flood, last = new_manager(new_sqlite(), e), new_manager(new_sqlite(), e)
    flood.submit_many('t', work, [dict(n='flood', s=0.001) for _ in range(12000)])
    last.submit_many('t', work, [dict(n='last', s=0.001) for _ in range(3000)], max_retries=1)
    wait_until(lambda: ran.count('flood') >= 5000 or len(ran) >= 12000, 60)
    assert ran.count('last') >= 50  # one in a hundred

# --- Databases that do not answer

def locked(path):
    conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    conn.execute('BEGIN IMMEDIATE')
    return conn

def test_forty_locked_databases_keep_no_other_from_its_jobs(made, new_sqlite, new_manager):
    e, away = made(concurrency=4), made(concurrency=0)
    urls = [new_sqlite() for _ in range(40)]
    for url in urls: new_manager(url, away).submit('t', work, n='locked')
    locks = [locked(sa.make_url(url).database) for url in urls]
    well = new_manager(new_sqlite(), e)
    well.submit_many('t', work, [dict(n='well') for _ in range(600)])
    wait_until(lambda: 'well' in ran, 10)
    stores = [new_manager(url, e).store for url in urls]
    for s in stores: e.attend(s)
    wait_until(lambda: ran.count('well') == 600, 30)  # 3 s alone; two a second, it was
    assert 'locked' not in ran
    for conn in locks: conn.rollback(); conn.close()
    for s in stores: e.attend(s)
    wait_until(lambda: ran.count('locked') == 40, 60)

def test_whoever_waits_because_many_turns_are_stuck_keeps_no_other_and_comes_again(made, new_sqlite, monkeypatch):
    e, called = made(concurrency=2), []
    unknown, well, last = (e._desks[e.store(new_sqlite())] for _ in range(3))
    monkeypatch.setattr(e.crew, 'call', lambda *args: called.append(1))
    stuck = {type("Stuck", (), dict(ailing=None))(): 0.0 for _ in range(24)}
    e._turning.update(stuck)
    well.sound = True
    e._errands[unknown] = None
    for d in (unknown, well): e._ring.join(d)
    assert (e._next_turn(), [*e._later]) == (well, [unknown])  # it is not called while there are errands
    e._turned(last, False, [], None)
    assert [*e._later] == [unknown]
    for d in stuck: e._turning.pop(d)
    called.clear()
    e._turned(last, False, [], None)
    assert (unknown in e._errands, [*e._later], called != []) == (True, [], True)
    e._errands.clear()

def test_the_lock_of_a_file_is_waited_for_longer_the_longer_that_lasts(made, new_sqlite):
    e = made(busy=4)
    d = e._desks[e.store(new_sqlite())]
    assert d.patience == 1
    d.ailing = time.monotonic()
    assert d.patience == 0.1
    d.ailing -= 8
    assert 2 <= d.patience < 2.5
    d.ailing -= 100
    assert d.patience == 4
    d.sound, d.ailing = True, None
    assert d.patience is None

def test_a_turn_at_a_file_that_was_never_written_to_waits_for_its_lock_no_longer_than_that(made, new_sqlite):
    e, url = made(busy=10), new_sqlite()
    d = e._desks[e.store(url)]
    room = e._room(d, 1)
    lock = sqlite3.connect(url.removeprefix('sqlite:///'), isolation_level=None)
    lock.execute('BEGIN IMMEDIATE')
    begun = time.monotonic()
    with pytest.raises(DatabaseBusy): d.turn([], [], room)
    assert d.ailing is None
    with pytest.raises(FhSaasError, match='write lock|locked|busy'): e.take_turn(d.store)  # whoever visits it hears of that at once
    assert time.monotonic() - begun < 6
    lock.close()

@pytest.fixture
def acme(host):
    ran.clear()
    with get_or_create_tenant_db(f'turn-{gen_id()[-6:]}', host=host) as db: yield BackgroundTaskManager(db, e := Engine(Settings(concurrency=0)))
    e.stop(0)

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)
def test_whoever_comes_while_a_database_is_forgotten_opens_it_anew(host, acme):
    e, tenant = Engine(Settings(concurrency=0)), acme.db.tenant_id
    url = host.url_of(host.find(tenant))
    before = e.tied(url, 'tenant_jobs', host, tenant, rung=True)
    assert e._desks[before].retire()  # as `tidy` does, and is held up
    came = []
    t = threading.Thread(target=lambda: came.append(e.tied(url, 'tenant_jobs', host, tenant))); t.start()
    time.sleep(0.1)
    assert not came
    e.forget(before)
    t.join(10)
    assert came[0] is not before and e.knows(came[0]) and not e._desks[came[0]].retire()  # a manager works with it
    e.stop(0)

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)
def test_a_visit_to_a_locked_tenant_sets_it_aside(host, acme):
    "It only looked whether something is due, which a locked file answers, and came again each second"
    acme.submit('turns_work', work, n=1)
    conn, w = locked(acme.store.url.database), wakes_of(host)
    with Runner(host, Settings(concurrency=2, handoff=0, busy=0.5)):
        def fails():
            with w.cursor() as cur: return cur.execute('SELECT fails FROM fh_saas_wakes WHERE tenant_id = ?', [acme.store.tenant]).fetchone()[0]
        wait_until(lambda: fails() >= 2, 20)
        conn.rollback(); conn.close()
        wait_until(lambda: ran == [1], 20)

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)
def test_a_worker_that_leaves_when_nothing_is_due_waits_for_a_lock(host, acme):
    acme.submit('turns_work', work, n=1)
    conn = locked(acme.store.url.database)
    t = threading.Timer(4, lambda: (conn.rollback(), conn.close()))
    t.start()
    Worker(host, Settings(concurrency=2, handoff=0, busy=0.5)).run(once=True)
    t.join()
    assert ran == [1]

# --- A host that does not answer

@pytest.fixture
def ruled(host):
    r = rules_of(host)
    r.set(tenant='acme', weight=3)
    r.now()
    return r

def test_nobody_asks_for_rules_under_a_lock(host, ruled, monkeypatch):
    get_or_create_tenant_db('acme', host=host).close()
    t, asked = Tenancy(host, 'acme'), []
    monkeypatch.setattr(Rules, 'all', lambda self: asked.append(1) or [])
    ruled._read = 0.0  # long ago
    assert (t.limits.weight, asked) == (3, [])
    t.hear()
    assert (t.limits.weight, asked) == (1, [1])

def test_one_thread_waits_for_rules_and_the_others_go_on(ruled, monkeypatch):
    waits, goes_on, ask = threading.Event(), threading.Event(), Rules.all
    def slow(self): waits.set(); goes_on.wait(10); return ask(self)
    monkeypatch.setattr(Rules, 'all', slow)
    ruled._read = 0.0
    t = threading.Thread(target=ruled.now)
    t.start()
    try:
        assert waits.wait(5)
        ruled._read, begun = 0.0, time.monotonic()  # it has waited for longer than they are fresh
        assert ruled.of('acme').weight == 3 and time.monotonic() < begun + 1
    finally: goes_on.set(); t.join()
    assert not ruled._asking

def test_one_thread_waits_for_a_host_that_did_not_answer_and_the_others_go_on(host, monkeypatch):
    for id in ('acme', 'globex'): get_or_create_tenant_db(id, host=host).close()
    a, b, w = Tenancy(host, 'acme'), Tenancy(host, 'globex'), wakes_of(host)
    a.refresh(); b.refresh()
    waits, goes_on, asked = threading.Event(), threading.Event(), []
    def away(self, id):
        asked.append(id)
        if len(asked) > 1: waits.set(); goes_on.wait(10)
        raise DatabaseBusy('away')
    monkeypatch.setattr(type(w), 'facts', away)
    a.read = b.read = 0.0
    a.refresh(1.0)  # the first is told that it does not answer
    assert not w.silent
    a.read = 0.0
    t = threading.Thread(target=a.refresh, args=[1.0])
    t.start()
    try:
        assert waits.wait(5)
        b.refresh(1.0)
        assert asked == ['acme', 'acme'] and w.silent and b.facts['state'] == 'active'
    finally: goes_on.set(); t.join()
    monkeypatch.undo()
    b.refresh(1.0)
    assert not w.silent and time.monotonic() - b.read < 5

# --- Weights

class Tenant:
    def __init__(self, weight): self.weight = weight

def test_where_all_weights_are_great_turns_are_as_short_as_where_all_are_one():
    ring, (a, b, c) = Ring(), [Tenant(w) for w in (1000, 1000, 3000)]
    for t in (a, b, c): ring.join(t)
    got = []
    for _ in range(10):
        got.append(who := ring.first)
        ring.took(who, ring.grant(who, 1, 1))
    assert got == [a, b, c, c, c]*2

def test_what_was_granted_by_a_weight_of_before_is_not_kept():
    ring, (a, b) = Ring(), [Tenant(50), Tenant(1)]
    for t in (a, b): ring.join(t)
    ring.took(a, ring.grant(a, 1, 1))
    a.weight = 1
    ring.even()
    got = []
    for _ in range(6):
        got.append(who := ring.first)
        ring.took(who, ring.grant(who, 1, 1))
    assert got == [a, b]*3

def test_queues_that_come_and_go_leave_nothing_behind(made, new_sqlite, new_manager):
    m = new_manager(new_sqlite(), e := made(concurrency=2))
    for n in range(20): m.submit('t', work, n=n, s=0, queue=f'q{n}')
    wait_until(lambda: len(ran) == 20 and e.idle, 20)
    assert not (e.line._by_queue or e.line._running_by_queue)

# --- The end of a server that no signal tells

served = '''
import sys, time
from fasthtml.common import FastHTML
from fh_saas import HostDatabase, get_or_create_tenant_db, BackgroundTaskManager, setup_jobs
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.store import Store
host = HostDatabase(sys.argv[1])
app = FastHTML(secret_key='x')
jobs = setup_jobs(app, host)
def long(): time.sleep(20)
@app.route('/go')
def go():
    with get_or_create_tenant_db('acme', host=host) as db:
        id, bg = BackgroundTaskManager(db).submit('long', long)
    return id, bg
import uvicorn
uvicorn.run(app, port=int(sys.argv[2]), log_level='warning', limit_max_requests=1)
'''

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)
def test_a_server_that_has_served_its_most_requests_gives_its_jobs_back(host, tmp_path):
    "It waited for the tasks of its responses before it said that it ends, and took new jobs meanwhile"
    get_or_create_tenant_db('acme', host=host).close()
    (script := tmp_path/'served.py').write_text(served)
    p = subprocess.Popen([sys.executable, script, host.url.render_as_string(), str(port := free_port())], env=os.environ | dict(FH_SAAS_GRACE='1'), cwd=tmp_path)
    try:
        def answer():
            try:
                with urllib.request.urlopen(f'http://127.0.0.1:{port}/go', timeout=5) as r: return bool(r.read())
            except OSError: return False
        wait_until(answer, 30)
        assert p.wait(12) == 0  # the job takes 20 s
    finally: p.kill()
    with get_or_create_tenant_db('acme', host=host) as db: [job] = BackgroundTaskManager(db, e := Engine(Settings(concurrency=0))).list_jobs()
    e.stop(0)
    assert (job.status, job.retry_count) == ('pending', 0)

def filled(store):
    "One job that can be run here, one that nobody here knows, and one that is due later"
    for id, what, delay in (('now', 'turns_work', 0), ('strange', 'nobody_knows', 0), ('later', 'turns_work', 60)):
        store.add(dict(id=id, job_type=what, task=what, payload='{"n": 1, "s": 1}', queue=f'of {id}', max_retries=3), delay=delay)
    return store

def shape(mine, lapse, waiting): return round(mine, -1), round(lapse, -1), {q: round(s, -1) for q, s in waiting.items()}

def test_a_visit_that_claims_from_a_file_learns_there_when_to_come_again(made, new_sqlite, monkeypatch):
    "A look of its own opened the file once more"
    e, opened = made(concurrency=2, lease=100), []
    store = filled(e.store(new_sqlite()))
    monkeypatch.setattr(Store, 'outlook', lambda *args: opened.append(1))
    seen = e.take_turn(store)
    monkeypatch.undo()
    assert not opened and shape(*seen) == shape(*e.outlook(store)) == (60, 100, {'of strange': 0, 'of later': 60})

def test_of_a_server_the_claim_tells_nothing_that_took_two_statements(made, new_pg):
    "Between them another process may claim a job: it would be in neither answer, and its lease would be nobody's"
    e = made(concurrency=2, lease=100)
    store = filled(e.store(new_pg()))
    assert e.take_turn(store) is None and shape(*e.outlook(store)) == (60, 100, {'of strange': 0, 'of later': 60})

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)
def test_what_a_visit_takes_back_is_not_in_what_its_claim_has_seen(made, new_url):
    "The jobs of a process that is gone were running still when it claimed"
    e = made(concurrency=1)
    store = e.store(new_url())
    store.add(dict(id='lost', job_type='t', task='nobody_knows', payload='{}', max_retries=3))
    store.claim_one('lost', gen_id(), 'gone', -1)
    assert e.take_turn(store) is None
    mine, lapse, waiting = e.outlook(store)
    assert (mine, lapse) == (None, None) and 'default' in waiting
