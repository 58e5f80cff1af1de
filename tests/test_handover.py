"Between a claim and the begin of its job, and between its end and the record of it: who waits, who has gone, who is not told."
import asyncio, signal, sqlite3, threading, time
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
import psycopg, pytest
from starlette.background import BackgroundTask, BackgroundTasks
from fh_saas.db_connect import DatabaseBusy, DatabaseUnavailable, NewerDatabase, writing
from fh_saas.jobs import heartbeats
from fh_saas.jobs.ends import Stale
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.rules import Limits
from fh_saas.jobs.states import Outcome
from fh_saas.jobs.line import Line
from conftest import wait_until

@pytest.fixture
def make(new_manager, new_sqlite, new_pg):
    "Call it with a kind of database and settings for a manager; `queues` as for an engine"
    def made(kind='sqlite', queues=None, **kw):
        m = new_manager((new_sqlite if kind == 'sqlite' else new_pg)(), **kw)
        m.engine.line.queues = queues
        return m
    return made

@pytest.fixture(params=['sqlite', 'postgresql'])
def kind(request): return request.param

@contextmanager
def locked(m):
    "Nobody else writes"
    conn = sqlite3.connect(m.store.url.database, isolation_level=None)
    conn.execute('BEGIN IMMEDIATE')
    try: yield
    finally: conn.close()

def in_hand(m): return m.engine.line.running, m.engine.line.waiting, m.engine.line.handed, {q: n for q, n in m.engine.line._by_queue.items() if n}, len(m.engine._live())
def calm(m): wait_until(lambda: in_hand(m) == (0, 0, 0, {}, 0), 10, f'{in_hand(m)}')

# --- Async jobs of responses

@pytest.mark.parametrize('limit', ['process', 'queue', 'queue by a rule'])
def test_async_jobs_of_responses_keep_to_the_limit(kind, make, limit):
    m = make(kind, {'api': 2, 'default': 9} if limit == 'queue' else None, concurrency=3 if limit == 'process' else 9)
    if limit == 'queue by a rule': m.engine.line.shares = {'api': 2}
    now, most, ran = 0, 0, []
    async def f(n):
        nonlocal now, most
        now += 1; most = max(most, now)
        await asyncio.sleep(0.004)
        now -= 1; ran.append(n)
    async def go():
        for k in range(5):  # when some have been timed, more are claimed than can begin
            handles = [(await m.asubmit('t', f, n=20*k + n, queue='api'))[1] for n in range(20)]
            await asyncio.gather(*(h() for h in handles))
    asyncio.run(go())
    wait_until(lambda: {j.status for j in m.list_jobs(limit=None)} == {'completed'}, 20)  # those that were refused run afterwards
    assert most == (3 if limit == 'process' else 2) and sorted(ran) == [*range(100)]
    calm(m)

def test_what_gets_no_place_is_given_back_and_run_soon(make):
    m = make(concurrency=1)
    m.engine.line._timed, m.engine.line._slow = 100, 0.0001  # it claims far ahead
    async def slow(): await asyncio.sleep(2.5)
    async def quick(): return 1
    async def go():
        handles = [(await m.asubmit('t', f))[1] for f in (slow, quick, quick)]
        await asyncio.gather(*(h() for h in handles[1:]), asyncio.create_task(handles[0]()))
    asyncio.run(go())
    wait_until(lambda: {j.status for j in m.list_jobs()} == {'completed'}, 8, 'due when there is a place, not after the handoff')
    calm(m)

@pytest.mark.parametrize('when', ['before the claim', 'after it', 'in line'])
def test_a_job_whose_event_loop_has_ended_is_run_all_the_same(make, when, monkeypatch):
    m = make(concurrency=1, lease=60)
    ran = []
    async def f(): ran.append(1)
    id, bg = m.submit('t', f)
    if when == 'before the claim':
        with locked(m), pytest.raises(TimeoutError): asyncio.run(asyncio.wait_for(bg(), 0.3))
    else:
        held, go_on = threading.Event(), threading.Event()
        real = Engine._given if when == 'after it' else Line.begin
        def late(*args):
            if when == 'after it': held.set(); go_on.wait(10)
            return real(*args) if when == 'after it' else bool(m.engine.line.hand(args[1], -1))
        monkeypatch.setattr(*(Engine, '_given') if when == 'after it' else (Line, 'begin'), late)
        if when == 'in line': monkeypatch.setattr(Line, 'take', lambda *a, **kw: None)
        with pytest.raises(TimeoutError): asyncio.run(asyncio.wait_for(bg(), 0.3))
        go_on.set()
        monkeypatch.undo()
        if when == 'in line': m.engine.crew.call()
    assert m.wait(id, 40 if when == 'before the claim' else 10).status == 'completed' and ran == [1], when
    calm(m)

def test_a_response_that_is_cancelled_leaves_no_claim_behind(make):
    "Its job was asked for, and not claimed yet"
    m = make()
    async def f(): return 1
    id, bg = m.submit('t', f)
    desk = m.engine._desks[m.store]
    async def go():
        desk.turning = True  # another turn is at it
        try:
            t = asyncio.create_task(bg())
            await asyncio.sleep(0.05)
            assert [w[0] for w in desk.wanted] == [id]
            t.cancel()
            await asyncio.wait({t})
        finally: desk.turning = False
    asyncio.run(go())
    assert desk.wanted == [] and m.get_job(id).status == 'pending'

def test_who_is_cancelled_in_line_leaves_its_job_to_be_run(make):
    m = make(concurrency=1)
    ran = []
    async def hold(): await asyncio.sleep(0.6)
    async def f(): ran.append(1)
    async def go():
        _, first = await m.asubmit('t', hold)
        a = asyncio.create_task(first())
        await asyncio.sleep(0.2)
        id, bg = await m.asubmit('t', f)
        m.engine._allot = lambda desk: 1  # it claims ahead
        b = asyncio.create_task(bg())
        await asyncio.sleep(0.2)
        assert m.engine.line.waiting == 1
        b.cancel()
        await asyncio.wait({a, b})
        return id
    id = asyncio.run(go())
    assert m.wait(id, 2).status == 'completed' and [a['outcome'] for a in m.attempts(id)] == ['completed'] and ran == [1]
    calm(m)

def test_who_is_cancelled_before_its_claim_fails_leaves_no_error_in_the_loop(make, monkeypatch):
    m = make()
    said = []
    async def f(): return 1
    async def go():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
        _, bg = await m.asubmit('t', f)
        tried = []
        def fails(op): time.sleep(0.3); tried.append(1); monkeypatch.undo(); raise DatabaseUnavailable('gone')
        monkeypatch.setattr(m.store, 'write', fails)
        t = asyncio.create_task(bg())
        await asyncio.sleep(0.1)
        t.cancel()
        await asyncio.sleep(0.5)
        assert tried and t.cancelled()
    asyncio.run(go())
    assert said == []

@pytest.mark.parametrize('late', ['after the line was emptied', 'at the very end'])
def test_a_claim_that_lands_while_the_engine_stops_lets_its_response_go(make, monkeypatch, late):
    m = make(concurrency=1)
    def full(a):
        m.engine.line.hand(a, -1)
        stopper.start()
        time.sleep(0.3)
        return False
    monkeypatch.setattr(m.engine.line, 'begin', full)
    monkeypatch.setattr(m.engine, '_allot', lambda desk: 1)
    if late == 'at the very end':
        for name, nothing in (('pull', []), ('take', None)): monkeypatch.setattr(m.engine.line, name, lambda *args, nothing=nothing, **kw: nothing)
    stopper = threading.Thread(target=m.engine.stop, args=(1,))
    async def f(): raise AssertionError('it is run')
    async def go():
        id, bg = await m.asubmit('t', f, 1)
        await asyncio.wait_for(bg(), 10)
        return id
    id = asyncio.run(go())
    stopper.join(20)
    job = m.get_job(id)
    assert (job.status, job.retry_count) == ('pending', 0)

@pytest.mark.parametrize('f', ['sync', 'async'])
def test_nothing_begins_after_the_stop_though_its_claim_lands_late(make, monkeypatch, f):
    "It had waited for a lock: its job was begun without being told to stop, and cut off when the grace was over"
    m, begun = make(concurrency=4, handoff=0, poll=3600), []
    e, desk, claimed, emptied = m.engine, m.engine._desks[m.store], threading.Event(), threading.Event()
    def sync(): begun.append(1); time.sleep(0.5)
    async def coroutine(): begun.append(1); await asyncio.sleep(0.5)
    turn, pull = desk.turn, e.line.pull
    def late(*args):
        said = turn(*args)
        if said[1]: claimed.set(); emptied.wait(10)
        return said
    monkeypatch.setattr(desk, 'turn', late)
    monkeypatch.setattr(e.line, 'pull', lambda *args: (pull(*args), emptied.set())[0])
    id, _ = m.submit('t', sync if f == 'sync' else coroutine, 1)
    assert claimed.wait(10)
    e.stop(0.5)
    job = m.get_job(id)
    assert (begun, job.status, job.attempt, job.retry_count, m.attempts(id)) == ([], 'pending', 0, 0, [])

def test_a_claim_that_comes_after_the_engine_has_let_its_response_go_is_given_back(make):
    m = make()
    async def f(): raise AssertionError('it is run')
    id, _ = m.submit('t', f)
    said = []
    async def go():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
        future, desk = asyncio.get_running_loop().create_future(), m.engine._desks[m.store]
        t = asyncio.create_task(m.engine._handed(future, desk))
        await asyncio.sleep(0.05)
        a = m.engine._claim(m.store, id, None)
        m.engine.stopping = True
        m.engine._leave([])
        assert await asyncio.wait_for(t, 5) is None
        future.set_result(a)
        await asyncio.sleep(0.1)
    asyncio.run(go())
    wait_until(lambda: m.engine._live() == [], 10)
    job = m.get_job(id)
    assert (job.status, job.attempt) == ('pending', 0) and said == []

def test_a_response_that_is_cancelled_at_the_moment_of_its_claim_leaves_its_job_to_be_run(make):
    m = make()
    ran = []
    async def f(): ran.append(1)
    id, _ = m.submit('t', f)
    async def go():
        future, desk = asyncio.get_running_loop().create_future(), m.engine._desks[m.store]
        t = asyncio.create_task(m.engine._handed(future, desk))
        await asyncio.sleep(0.05)
        a = m.engine._claim(m.store, id, None)
        a.waiter = future
        m.engine.line.hand(a)
        future.set_result(a)
        asyncio.get_running_loop().call_soon(t.cancel)  # when the result is on its way already
        with pytest.raises(asyncio.CancelledError): await t
        assert (await m.await_job(id, timeout=5)).status == 'completed'  # while this loop goes on: its end would bring the job back as well
    asyncio.run(go())
    assert ran == [1]
    calm(m)

def test_a_handle_runs_its_job_though_its_database_is_paused(make):
    m = make()
    id, bg = m.submit('t', lambda: 7)
    m.engine.pause(m.store)
    bg.func(*bg.args)
    assert m.get_job(id).result == '7'

# --- Who is told

def test_an_outcome_of_a_database_that_is_forgotten_is_waited_for_by_nobody(make):
    m = make()
    id, _ = m.submit('t', lambda: 1)
    e, a = m.engine, m.engine._claim(m.store, id, None)
    e.forget(a.store)
    e._record(a, Outcome('completed'), done := Future())
    e._unwritten([a], DatabaseUnavailable('gone'))
    assert done.result(5) is None and not a.desk.unwritten and e._live() == []

def test_whoever_waits_for_a_direct_call_is_told_when_the_engine_stops(make):
    m = make(busy=0.2, grace=0)
    lock = sqlite3.connect(m.store.url.database, isolation_level=None, check_same_thread=False)
    def f(): lock.execute('BEGIN IMMEDIATE')
    id, bg = m.submit('t', f)
    said = []
    t = threading.Thread(target=lambda: said.append(bg.func(*bg.args)), daemon=True)
    t.start()
    wait_until(lambda: m.engine._desks[m.store].unwritten, 10)
    m.engine.stop(0)
    t.join(10)
    lock.close()
    assert not t.is_alive() and said == [None]

@pytest.mark.parametrize('f', ['sync', 'async'])
def test_a_job_that_was_lost_while_it_waited_in_line_is_forgotten(make, f):
    m = make()
    async def g(): raise AssertionError('it is run')
    id, _ = m.submit('t', g if f == 'async' else lambda: 1/0)
    a = m.engine._claim(m.store, id, None)
    a.ctx.lost, a.done = True, Future()
    m.engine._begin(a) if f == 'async' else m.engine._one(a)
    assert a.done.result(5) is None and m.engine._live() == [] and in_hand(m)[:3] == (0, 0, 0)

# --- A server that is lost in the middle of a commit

def breaks_once(m, name, monkeypatch, when):
    "The answer to the next commit does not come; it was done all the same"
    real, done = getattr(m.store.kind, name), []
    def broken(*args):
        said = real(*args)
        if not done and when(): done.append(1); raise psycopg.OperationalError('server closed the connection unexpectedly')
        return said
    monkeypatch.setattr(m.store.kind, name, broken)
    return done

def test_claims_whose_commit_was_not_confirmed_are_given_back(make, monkeypatch):
    m = make('postgresql', lease=60)
    done = breaks_once(m, 'commit', monkeypatch, lambda: running(m))
    id, _ = m.submit('t', lambda: 7, 1, run_at='2020-01-01')
    job = m.wait(id, 10)
    assert done and (job.status, job.result, job.attempt, [a['outcome'] for a in m.attempts(id)]) == ('completed', '7', 1, ['completed'])
    assert not m.engine._desks[m.store].unsure and m.engine.stale == 0

@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_a_claim_by_hand_that_is_interrupted_after_its_commit_is_given_back(kind, make, monkeypatch, error):
    m = make(kind, lease=60)
    id, bg = m.submit('t', lambda: 7, 1)
    commit = m.store.kind.commit
    def interrupted(cur):
        monkeypatch.setattr(m.store.kind, 'commit', commit)
        commit(cur)
        raise error
    monkeypatch.setattr(m.store.kind, 'commit', interrupted)
    with pytest.raises(error): bg.func(*bg.args)
    job = m.wait(id, 10)
    assert (job.status, job.attempt, [a['outcome'] for a in m.attempts(id)]) == ('completed', 1, ['completed'])

def rows(m):
    with psycopg.connect(m.store.url.set(drivername='postgresql').render_as_string(hide_password=False)) as conn: return [s for s, in conn.execute('SELECT status FROM tenant_jobs')]

def running(m): return rows(m) and rows(m)[0] == 'running'

def test_a_claim_for_a_response_that_was_not_confirmed_is_given_back(make, monkeypatch):
    "Nothing else is due, and its lease is long"
    m = make('postgresql', lease=60)
    async def f(): return 7
    async def go():
        id, bg = await m.asubmit('t', f, 1)
        done = breaks_once(m, 'commit', monkeypatch, lambda: running(m))
        await asyncio.wait_for(bg(), 10)
        return id, done
    id, done = asyncio.run(go())
    job = m.wait(id, 10)
    assert done and (job.status, job.attempt, [a['outcome'] for a in m.attempts(id)]) == ('completed', 1, ['completed'])

def test_a_claim_of_a_suspect_that_was_not_confirmed_is_given_back(make, monkeypatch):
    m = make('postgresql', lease=60)
    id, _ = m.submit('t', lambda: 7, 2, run_at='2100-01-01')
    done = breaks_once(m, 'commit', monkeypatch, lambda: running(m))
    with psycopg.connect(m.store.url.set(drivername='postgresql').render_as_string(hide_password=False)) as conn: conn.execute('UPDATE tenant_jobs SET run_at = created_at, lost = 1, attempt = 1, retry_count = 1')
    m.engine.attend(m.store)
    assert m.wait(id, 20).status == 'completed' and done and [a['number'] for a in m.attempts(id)] == [2]

def test_a_claim_that_is_interrupted_while_another_thread_writes_it_is_given_back(make):
    m = make(concurrency=0)
    id, _ = m.submit('t', lambda: 7, 1)
    desk, s, led, at_it, go_on, done = m.engine._desks[m.store], m.store, threading.Event(), threading.Event(), threading.Event(), threading.Event()
    threads = [threading.Thread(target=s.write, args=(lambda cur, now: led.set() or go_on.wait(10),)), threading.Thread(target=lambda: s.write(lambda cur, now: at_it.set() or done.wait(10)))]
    def interrupt():
        wait_until(lambda: len(s._queue) == 2)
        time.sleep(0.3)  # the claim waits by then; it would commit the batch itself otherwise
        go_on.set()
        at_it.wait(10)  # the claim is in the same batch, and comes after this
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        done.set()
    threads[0].start(); led.wait(10)
    threads[1].start(); wait_until(lambda: len(s._queue) == 1)
    threads.append(t := threading.Thread(target=interrupt)); t.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever a test before has left
    try:
        with pytest.raises(KeyboardInterrupt): desk.claim(id)
    finally: signal.signal(signal.SIGINT, before)
    for t in threads: t.join(10)
    wait_until(lambda: m.get_job(id).status == 'running')  # nobody has it
    desk.undoubt()
    job = m.get_job(id)
    assert (job.status, job.attempt) == ('pending', 0) and not desk.unsure

def test_a_suspect_is_not_trusted_before_it_has_begun(make):
    m = make(concurrency=0)
    id, _ = m.submit('t', lambda: 7, 3)
    with writing(m.store.engine) as conn: conn.execute(m.store.t.jobs.update().values(run_at='2020-01-01T00:00:00.000000', lost=1, attempt=1, retry_count=1))
    e, desk = m.engine, m.engine._desks[m.store]
    [a] = desk.suspect(e.slot, e._room(desk, 1, suspects=True))
    e._see_to_suspects()
    assert a.suspect and e.slot.taken
    desk.give_back([a])

def test_what_waits_for_a_thread_is_not_said_to_run(make):
    m = make(concurrency=1)
    m.engine.quiet = True
    go, begun = threading.Event(), threading.Event()
    def hold(): begun.set(); go.wait(20)
    ids = [m.submit('t', hold, run_at='2020-01-01')[0] for _ in range(3)]
    e, desk = m.engine, m.engine._desks[m.store]
    attempts = desk.turn([], [], e._room(desk, 3))[1]
    e.line.put(desk, attempts)
    e.crew.call()
    assert begun.wait(10)
    wait_until(lambda: len(e.running_jobs()) == 1, 10)
    go.set()
    wait_until(lambda: m.store.by_status() == {'completed': 3}, 20)

def test_a_job_whose_function_is_gone_has_failed_at_once(make):
    "It failed three times, for `NoneType` cannot be called"
    m = make()
    id, bg = m.submit('t', lambda: 7, run_at='2100-01-01')
    a = m.engine._desks[m.store].claim(id)
    a.func = None
    o = a.call()
    assert o.kind == 'failed' and 'submit it again' in o.error
    m.engine._desks[m.store].give_back([a])

def test_one_host_that_fails_in_another_way_keeps_no_retry_from_being_told(make):
    m, rung = make(), []
    class Host:
        def __init__(self, ring): self.ring = ring
    class Desk:
        def __init__(self, name, ring): self.store, self.tenancy = SimpleNamespace(tenant=name), SimpleNamespace(tenant_id=name, wakes=Host(ring))
    for name, ring in (('a', lambda id, at: 1/0), ('b', lambda id, at: rung.append(id)), ('c', lambda id, at: 1/0)): m.engine._due_again(Desk(name, ring), 1)
    wait_until(lambda: rung == ['b'])
    m.engine._due_again(Desk('d', lambda id, at: rung.append(id)), 1)
    wait_until(lambda: rung == ['b', 'd'] and not m.engine._again)

def test_a_suspect_that_runs_for_long_does_not_keep_the_others_waiting(kind, make, monkeypatch):
    monkeypatch.setattr(heartbeats, 'trusted_after', 1.5)
    m, over, begun = make(kind), threading.Event(), []
    def long(): begun.append(time.monotonic()); over.wait(30)
    ids = [m.submit('t', long, 3, run_at='2100-01-01')[0] for _ in range(3)]
    with writing(m.store.engine) as conn: conn.execute(m.store.t.jobs.update().values(run_at='2020-01-01T00:00:00.000000', lost=1, attempt=1, retry_count=1))
    m.engine.attend(m.store)
    wait_until(lambda: len(begun) == 3, 20)
    assert all(1.4 < b - a < 8 for a, b in zip(begun, begun[1:])) and not over.is_set()
    over.set()
    assert {m.wait(id, 20).status for id in ids} == {'completed'}
    calm(m)
    assert not m.engine.slot.taken

def test_claims_that_never_began_are_in_no_doubt_and_those_that_are_stay_so_until_the_engine_stops(make, monkeypatch):
    m = make('postgresql', lease=60)
    id, _ = m.submit('t', lambda: 7, 1, run_at='2100-01-01')
    desk, kind = m.engine._desks[m.store], m.store.kind
    with monkeypatch.context() as mp:
        def begin(*args): raise psycopg.OperationalError('connection refused')
        mp.setattr(kind, 'begin', begin)
        for _ in range(6):
            with pytest.raises(DatabaseUnavailable): desk.claim(id)
    for error in (DatabaseBusy('locked'), Stale(), NewerDatabase('newer')):  # whatever it was is rolled back
        def refused(cur, now): raise error
        with pytest.raises(type(error)): desk._claimed(refused, 'token')
    assert not desk.doubtful and not desk.unsure
    monkeypatch.setattr(m.engine, '_turn', lambda *args: None)  # nobody has another turn
    done = breaks_once(m, 'commit', monkeypatch, lambda: running(m))
    with pytest.raises(DatabaseUnavailable): desk.claim(id)
    assert done and len(desk.doubtful) == 1 and desk.unsure and m.get_job(id).status == 'running'
    desk.rung, desk.met = True, False
    desk.functions.clear(); desk._own = frozenset()
    assert not desk.retire()
    m.engine.stop(0)
    job = m.get_job(id)
    assert (job.status, job.attempt, job.retry_count) == ('pending', 0, 0)

def test_a_heartbeat_and_a_rescue_settle_doubts_before_they_count_jobs_as_lost(make, monkeypatch):
    m = make('postgresql', lease=60, concurrency=0)
    desk = m.engine._desks[m.store]
    for act in (desk.renew, lambda: (m.engine.store(m.store.url), desk.rescue())):
        id, _ = m.submit('t', lambda: 7, 1)
        done = breaks_once(m, 'commit', monkeypatch, lambda: running(m))
        with pytest.raises(DatabaseUnavailable): desk.claim(id)
        monkeypatch.undo()
        with psycopg.connect(m.store.url.set(drivername='postgresql').render_as_string(hide_password=False)) as conn: conn.execute("UPDATE tenant_jobs SET lease_until = '2020-01-01T00:00:00'")
        act(); act()
        job = m.get_job(id)
        assert done and (job.status, job.attempt, job.retry_count) == ('pending', 0, 0)
        m.delete(m.cancel(id).id)

@pytest.mark.parametrize('how', ['completed', 'failed', 'retry'])
def test_an_outcome_whose_commit_was_not_confirmed_is_no_dropped_one(make, monkeypatch, how):
    m = make('postgresql', lease=60)
    ran = []
    def f():
        ran.append(1)
        if how != 'completed' and len(ran) < 2: raise OSError('no')
        return 1
    id, bg = m.submit('t', f, 1 if how == 'failed' else 3)
    for name in ('commit', 'at_once'): breaks_once(m, name, monkeypatch, lambda: bool(ran))
    said = bg.func(*bg.args)
    assert said.kind == how and m.engine.stale == 0
    assert m.get_job(id).status == ('pending' if how == 'retry' else how) and [a['outcome'] for a in m.attempts(id)] == [how]
    assert m.engine._live() == []

@pytest.mark.parametrize('ours', [Outcome('completed', result='1'), Outcome('failed', error='ValueError: ours')])
def test_an_outcome_that_another_has_recorded_is_dropped(make, monkeypatch, ours):
    "The claim was lost while the server was away"
    m = make('postgresql', lease=60)
    id, bg = m.submit('t', lambda: 1, 1 if ours.kind == 'failed' else 3)
    a = m.engine._claim(m.store, id, None)
    m.store.write(lambda cur, now: cur.execute("UPDATE tenant_jobs SET lease_until = created_at") and None)
    assert [o.kind for _, o in m.store.rescue()] == ['failed' if ours.kind == 'failed' else 'lost']
    a.tried = True
    m.engine._record(a, ours, done := Future())
    a.desk.ends.clear()
    m.engine._one_by_one([a])
    assert done.result(5) is None and m.engine.stale == 1 and m.get_job(id).status == ('failed' if ours.kind == 'failed' else 'pending')

# --- Errors at odd moments

@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_an_outcome_whose_record_is_interrupted_is_written_all_the_same(make, monkeypatch, error):
    "Ctrl-C in a notebook: the job ran for ever, as far as anybody could see"
    m, write, done = make(lease=60, poll=3600), None, []
    write = m.store.write
    id, bg = m.submit('t', lambda: 7, 1)
    def interrupted(op):
        if not done and threading.current_thread() is threading.main_thread() and m.get_job(id).status == 'running': done.append(1); raise error
        return write(op)
    monkeypatch.setattr(m.store, 'write', interrupted)
    with pytest.raises(error): bg.func(*bg.args)
    job = m.wait(id, 4)
    assert done and (job.status, job.result, [a['outcome'] for a in m.attempts(id)]) == ('completed', '7', ['completed'])
    calm(m)

def test_an_outcome_whose_record_is_interrupted_one_by_one_is_written_all_the_same(make, monkeypatch):
    m, done = make(poll=3600), []
    desk, write = m.engine._desks[m.store], m.store.write
    desk.ends += claims(m, *(ids := [m.submit('t', print)[0] for _ in range(2)]))
    def one_is_stale(*args): monkeypatch.undo(); monkeypatch.setattr(m.store, 'write', interrupted); raise Stale
    def interrupted(op):
        if not done and threading.current_thread() is threading.main_thread(): done.append(1); raise KeyboardInterrupt
        return write(op)
    monkeypatch.setattr(desk, 'turn', one_is_stale)
    with pytest.raises(KeyboardInterrupt): m.engine._turn(desk)
    for id in ids: assert m.wait(id, 5).status == 'completed'
    calm(m)

def test_an_interrupt_of_one_thread_is_not_that_of_another(make):
    "It was put into the event loop of a server, which ended"
    m, future = make(concurrency=0), Future()
    m.engine._troubled(m.engine._desks[m.store], [], [('an id', None, future, True)], KeyboardInterrupt())
    assert future.done() and future.exception() is None

def claims(m, *ids):
    "Attempts of these jobs that have come to their end, which is not written"
    found = [m.engine._desks[m.store].claim(id) for id in ids]
    for a in found: a.outcome = Outcome('completed')
    return found

def test_what_was_claimed_is_run_though_something_fails_right_after_that(make, monkeypatch):
    "Nobody else knows of it, and its lease was renewed for ever"
    m = make(lease=60, poll=3600, concurrency=2)
    e, desk, told = m.engine, m.engine._desks[m.store], m.engine._all_written
    first, second, third = (m.submit('t', lambda: 7, 1)[0] for _ in range(3))
    def fails_once(*args): monkeypatch.setattr(e, '_all_written', told); raise RuntimeError("can't start new thread")
    monkeypatch.setattr(e, '_all_written', fails_once)
    m.store.write(lambda cur, now: cur.execute(f"UPDATE tenant_jobs SET run_at = '2020-01-01T00:00:00.000000' WHERE id = '{second}'") and None)
    desk.ends += claims(m, first)
    desk.hungry, desk.wanted, desk.responses_first = True, [(third, None, Future(), True)], True  # what a response brings, too
    e._turn(desk)
    for id in (second, third, first):
        job = m.wait(id, 4)
        assert (job.status, job.attempt, [a['outcome'] for a in m.attempts(id)]) == ('completed', 1, ['completed'])
    calm(m)

def test_an_error_while_outcomes_are_tried_again_loses_none_and_keeps_no_lease_from_being_renewed(make, monkeypatch, caplog):
    m = make(concurrency=0)
    e, desk, record, failed = m.engine, m.engine._desks[m.store], m.engine._record, []
    desk.unwritten += claims(m, *(ids := [m.submit('t', print)[0] for _ in range(3)]))
    def fails_once(*args):
        if not failed: failed.append(1); raise MemoryError
        return record(*args)
    monkeypatch.setattr(e, '_record', fails_once)
    desk.beating = True  # as the thread of heartbeats says it
    e._beat(desk)
    assert 'could not be tried again' in caplog.text and len(desk.unwritten) == 3 and e._to_beat() == [desk]
    desk.retry_at = 0.0
    e._beat(desk)
    e._turn(desk)
    wait_until(lambda: {m.get_job(id).status for id in ids} == {'completed'}, 5)
    calm(m)

def test_outcomes_that_find_a_lock_wait_for_it_once(make, monkeypatch, caplog):
    "One of thirty was stale, and then the file was locked: a thread waited for it thirty times"
    m = make(concurrency=0)
    e, desk, write, tries = m.engine, m.engine._desks[m.store], m.store.write, []
    ends = claims(m, *[m.submit('t', print)[0] for _ in range(5)])
    def locks(op):
        tries.append(1)
        if len(tries) > 2: raise DatabaseBusy('locked')
        return write(op)
    with monkeypatch.context() as mp:
        mp.setattr(m.store, 'write', locks)
        e._one_by_one([*ends])
    assert len(tries) == 3 and [*desk.unwritten] == ends[2:] and all(a.tried for a in ends[2:])
    assert [m.get_job(a.row['id']).status for a in ends] == ['completed']*2 + ['running']*3
    assert [r.getMessage().split(': ', 1)[1] for r in caplog.records] == ["its outcome 'completed' cannot be written yet, nor can those of 2 others: locked"]
    desk.unwritten.clear()
    e._one_by_one(ends[2:])
    assert {j.status for j in m.list_jobs()} == {'completed'} and not desk.live

def test_one_line_says_that_many_outcomes_cannot_be_written(make, monkeypatch, caplog):
    "Sixteen thousand lines in a quarter of a minute, of one locked file"
    m = make(concurrency=0)
    e, desk, turn = m.engine, m.engine._desks[m.store], m.engine._desks[m.store].turn
    desk.ends += (ends := claims(m, *[m.submit('t', print)[0] for _ in range(4)]))
    def busy(*args): raise DatabaseBusy('locked')
    monkeypatch.setattr(desk, 'turn', busy)
    e._turn(desk)
    assert [*desk.unwritten] == ends and [r.getMessage() for r in caplog.records if 'its outcome' in r.getMessage()] == [f"{ends[0]}: its outcome 'completed' cannot be written yet, nor can those of 3 others: locked"]
    monkeypatch.setattr(desk, 'turn', turn)
    e._try_again(desk)
    wait_until(lambda: {j.status for j in m.list_jobs()} == {'completed'} and not desk.live, 5)

# --- Leases of databases of which some do not answer

def test_databases_that_do_not_answer_leave_threads_to_those_that_do(make, monkeypatch):
    "Forty that were locked held every thread, and the jobs of others were taken back"
    e, now = make(concurrency=0).engine, time.monotonic()
    def desks(n, **kw): return [SimpleNamespace(**dict(live=[1], unwritten=[], beating=False, beat_at=0.0) | kw) for _ in range(n)]
    sick, well = desks(40, beat_at=now - 1), [*desks(3), *desks(1, live=[], unwritten=[1])]
    others = [*desks(2, beat_at=now + 60), *desks(2, live=[]), *desks(1, beating=True)]  # not yet; nothing to say; on its way
    monkeypatch.setattr(e, '_desks', dict(enumerate([*sick, *well, *others])))
    asked = e._to_beat()
    assert asked == well + asked[4:] and len(asked) == 4 + 16 and all(d in sick for d in asked[4:])
    for d in asked[4:]: d.beating = True
    assert e._to_beat() == well
    for d in asked[4:9]: d.beating, d.beat_at = False, now + 60  # five have waited in vain
    assert len(again := e._to_beat()) == 4 + 5 and not any(d is a for d in again[4:] for a in asked[4:])
    sick[-1].beat_at = now - 100
    assert e._to_beat()[4] is sick[-1]  # who waits longest comes first, or the last ones would never be asked
    monkeypatch.undo()

def test_who_could_not_renew_its_leases_keeps_no_thread_until_it_tries_again(make, monkeypatch):
    m = make(concurrency=0, lease=20)
    e, desk, beat, begun = m.engine, m.engine._desks[m.store], m.engine._desks[m.store].beat, time.monotonic()
    claims(m, m.submit('t', print)[0])
    monkeypatch.setattr(e, '_try_again', lambda desk: None)
    def busy(): raise DatabaseBusy('locked')
    monkeypatch.setattr(desk, 'beat', busy)
    e._beat(desk)
    assert time.monotonic() < begun + 1 and begun + 2 <= desk.beat_at < begun + 3 and e._to_beat() == []
    desk.beat_at -= 3
    assert e._to_beat() == [desk]
    monkeypatch.setattr(desk, 'beat', lambda: None)
    e._beat(desk)
    assert desk.beat_at == 0.0

# --- A task that has got another name

@pytest.mark.parametrize('what', ['rate', 'pause', 'pause of the old name'])
def test_what_holds_for_a_task_holds_for_rows_under_its_old_names(kind, make, what):
    m = make(kind)
    ran = []
    def send(n): ran.append(n)
    m.engine.registry.add(send, 'send', aliases=('send_mail',), rate=(3, 60) if what == 'rate' else None)
    m.engine.registry.file_under('mail', 'send')
    if what != 'rate': m.engine._desks[m.store]._free = Limits(off=frozenset({'send' if what == 'pause' else 'send_mail'}))
    m.engine.registry.add(lambda n: ran.append(n), 'other')
    names = [('send', 's'), ('send_mail', 's'), (None, 'mail')]
    m.store.add_many([dict(id=f'{n}', job_type=t, task=name, payload=f'{{"n":{n}}}', max_retries=3) for n, (name, t) in enumerate(names*3)])
    m.store.add(dict(id='x', job_type='o', task='other', payload='{"n":"x"}', max_retries=3))
    m.engine.attend(m.store)
    assert m.wait('x', 10).status == 'completed'
    time.sleep(1)
    assert len(ran) == (4 if what == 'rate' else 1)

@pytest.mark.parametrize('rates', [dict(send=(5, 1), send_mail=(1, 60)), dict(send_mail=(60, 60), send=(9, 1))])
def test_of_two_rates_for_one_task_the_slower_holds(make, rates):
    m = make()
    m.engine.registry.add(lambda n: n, 'send', aliases=('send_mail',))
    desk = m.engine._desks[m.store]
    desk._free = Limits(rates=rates)
    assert m.engine._room(desk, 1).rates == dict(send=min(rates.values(), key=lambda r: r[0]/r[1]))

def test_a_response_goes_on_though_its_async_job_is_released_at_the_end(new_url, new_manager):
    "The job is begun again elsewhere; what else the response brought is run, and its server sees no error"
    m, ran = new_manager(new_url(), grace=0.2), []
    async def long(): ran.append('begun'); await asyncio.sleep(60)
    async def go():
        m.engine.use_loop(asyncio.get_running_loop())
        id, bg = m.submit('long', long)
        response = asyncio.create_task(BackgroundTasks([bg, BackgroundTask(ran.append, 'next')])())
        while not ran: await asyncio.sleep(0.01)
        await asyncio.to_thread(m.engine.stop)
        await asyncio.wait_for(response, 10)
        return id
    id = asyncio.run(go())
    assert ran == ['begun', 'next'] and [a['outcome'] for a in m.attempts(id)] == ['release']

def test_a_stop_after_the_end_waits_for_no_coroutine_that_cleaned_up_for_long(make):
    "What it came to is left at its desk, where nobody has a turn any more"
    m, inside, over = make(handoff=0), threading.Event(), threading.Event()
    async def tidy():
        inside.set()
        try: await asyncio.sleep(60)
        finally: await asyncio.sleep(1.5); over.set()
    m.engine.registry.add(tidy, tidy.__qualname__)
    id, _ = m.submit('t', tidy)
    assert inside.wait(10)
    m.engine.stop(0)
    assert over.wait(10) and m.store.get(id)['status'] == 'pending'
    wait_until(lambda: any(d.ends for d in m.engine._desks.values()), 10)
    at = time.monotonic()
    m.engine.stop(0)
    assert time.monotonic() < at + 2
