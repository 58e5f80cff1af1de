"Many at once: threads on one database, processes on one new tenant."
import os, queue, re, threading, time, uuid
from collections import Counter
from functools import partial
from concurrent.futures import ThreadPoolExecutor
import pytest
from fastsql import Database
from children.launch import Child
from conftest import wait_until
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import delete_tenant, open_tenant_db
from fh_saas.jobs.claims import Room
from fh_saas.jobs.commit import _Write
from fh_saas.jobs.desk import Desk
from fh_saas.jobs.pool import Crew, Pool
from fh_saas.jobs.allotment import reserve
from fh_saas.jobs.rounds import Rounds, brief, most_turns
from fh_saas.jobs.line import Line, batch
from fh_saas.jobs.states import Outcome
from fh_saas.jobs.store import Adding, Store
from fh_saas.utils_bgtsk import BackgroundTaskManager


def forty_threads(manager, jobs):
    "Submit and run `jobs` in 40 threads that start at one moment; whatever they raised"
    ran, lock, errors, together = Counter(), threading.Lock(), [], threading.Barrier(40)
    def count(n):
        with lock: ran[n] += 1
        return n
    async def acount(n): return count(n)
    def work(thread):
        together.wait(30)
        for n in range(thread, jobs, 40):
            try:
                job_id, bg_task = manager.submit('count', (count, acount)[n % 2], n=n)
                bg_task.func(*bg_task.args, **bg_task.kwargs)
                j = manager.get_job(job_id)
                assert (j.status, j.result, j.attempt) == ('completed', str(n), 1), j
            except Exception as e: errors.append(e)
    with ThreadPoolExecutor(40) as pool:
        for t in range(40): pool.submit(work, t)
    return ran, errors


def test_forty_threads_on_one_database(manager, url):
    jobs = 2000 if url.startswith('sqlite') else 400
    ran, errors = forty_threads(manager, jobs)
    assert not errors, Counter(map(repr, errors)).most_common(5)
    assert ran == dict.fromkeys(range(jobs), 1)
    rows = manager.list_jobs(limit=None)
    assert len(rows) == jobs and {j.status for j in rows} == {'completed'} and manager.engine.stale == 0


def test_forty_threads_fail_and_run_again(new_engine, new_url):
    "Each job fails twice, and is run three times by its thread: `failed` is never seen, and no attempt is lost or doubled"
    url = new_url()
    db = Database(url)
    m, runs, errors = BackgroundTaskManager(db, new_engine(poll=60)), Counter(), []
    def third_time(n):
        runs[n] += 1
        if runs[n] < 3: raise ValueError(n)
    def work(thread):
        for n in range(thread, 120, 40):
            try:
                job_id, bg_task = m.submit('third', third_time, n=n)
                for _ in range(4): bg_task.func(*bg_task.args)
                assert [a['outcome'] for a in m.attempts(job_id)] == ['retry', 'retry', 'completed']
            except Exception as e: errors.append(e)
    with ThreadPoolExecutor(40) as pool: list(pool.map(work, range(40)))
    assert not errors and runs == dict.fromkeys(range(120), 3)
    db.conn.close(); db.engine.dispose()


def test_sixteen_processes_open_the_same_new_tenant(new_url):
    url, name = new_url(), f'n{uuid.uuid4().hex[:8]}'
    host, c = HostDatabase(url), Child('opens.py', url, name, 16, FH_SAAS_BUSY=30)  # sixteen that write at once wait for a slow disk, too
    try:
        c.ends(90)
        ids = set(re.findall(r'^done (\w+)$', c.text, re.M))
        assert c.proc.returncode == 0 and len(ids) == 16 and 'Traceback' not in c.text, c.text[-3000:]
        assert [t.id for t in host.tenants()] == [name]
        with open_tenant_db(name, host) as db: assert {j.id for j in BackgroundTaskManager(db).list_jobs(None, 'completed')} == ids
    finally:
        c.close()
        delete_tenant(name, host, force=True)
        host.close()


def test_short_jobs_of_many_databases_are_claimed_some_at_a_time(new_engine, new_sqlite, monkeypatch):
    "Where all threads have turns, nobody runs jobs, and each that begins makes room for a claim of one"
    fill, work = new_engine(concurrency=0), new_engine()
    managers = [BackgroundTaskManager(Database(new_sqlite()), fill) for _ in range(40)]
    def short(n): return n
    for m in managers: m.submit_many('short', short, [dict(n=n) for n in range(64)])
    claimed, runs, turn, run = [], [], Desk.turn, Rounds._run
    def counted(self, *args):
        got = turn(self, *args)
        if got[1]: claimed.append(len(got[1]))
        return got
    monkeypatch.setattr(Desk, 'turn', counted)
    monkeypatch.setattr(Rounds, '_run', lambda self, a: runs.append(a) or run(self, a))
    work.registry.add(short)
    managers = [BackgroundTaskManager(m.db, work) for m in managers]
    wait_until(lambda: sum(claimed) >= 40*64 and work.idle, 60)
    wait_until(lambda: all(m.store.by_status() == {'completed': 64} for m in managers), 60)  # where none comes to its turn for long, some are given back, and claimed again
    assert sum(claimed)/len(claimed) > 16, sorted(Counter(claimed).items())
    assert sum(claimed)/len(runs) > 16, 'a thread leaves its jobs for a turn that has to wait'


class a_desk:
    def __init__(self, ailing=None): self.ailing = ailing

def test_turns_that_are_stuck_are_not_counted(new_engine):
    e = new_engine()
    now = time.monotonic()
    e._turning = {a_desk(): now for _ in range(most_turns - 1)}
    assert not e._crowded()
    e._turning[a_desk()] = now - 2*reserve
    assert not e._crowded()
    e._turning[a_desk(ailing=now)] = time.monotonic()  # what could not be written to the last time is stuck, until the contrary is known
    assert not e._crowded()
    e._turning |= {d: time.monotonic() for d in (*e._turning, a_desk()) if d.ailing is None}
    assert e._crowded()
    e._turning.clear()


def test_what_ends_during_a_turn_is_written_in_the_next(new_engine, new_sqlite):
    e = new_engine(concurrency=0)
    m = BackgroundTaskManager(Database(new_sqlite()), e)
    desk = e._desks[m.store]
    first, second = (desk.claim(m.submit('t', print)[0]) for _ in range(2))
    desk.turning, desk.again = True, False
    assert not e._record(first, Outcome('completed')) and desk.again and desk.ends == [first]
    desk.turning, desk.again = False, False
    assert e._record(second, Outcome('completed')) and not desk.again
    e._turn(desk)
    assert {j.status for j in m.list_jobs()} == {'completed'} and not desk.live


def test_while_threads_have_jobs_one_turn_follows_the_other(new_engine, monkeypatch):
    e = new_engine()
    one = a_desk()
    e._turning[one], e.line.waiting = time.monotonic(), batch
    assert e._crowded()
    e.line.waiting = batch - 1; assert not e._crowded()  # they will have ended before the next one brings more
    e.line.waiting, e.line.running = batch, e.line.size; assert not e._crowded()  # nobody can begin them
    e.line.running, e.line.lanes.narrow = 0, ['a lane']
    monkeypatch.setattr(e.line.lanes, 'parked', lambda: 1); assert not e._crowded()  # or not all of them
    e.line.lanes.narrow = []
    e._turning[one] -= brief; assert not e._crowded()  # it waits for a disk or a lock, and not for the interpreter
    e._turning[a_desk()] = time.monotonic(); assert e._crowded()
    e._turning.clear(); e.line.waiting = 0


def test_writers_that_wait_are_told_when_the_one_before_them_fails(new_sqlite):
    "Each of many threads gets its own answer, whether its operation works or not"
    store = Store(new_sqlite())
    def write(n):
        def op(cur, now):
            if n % 7 == 0: raise ValueError(n)
            return n
        try: return store.write(op)
        except ValueError as e: return f'{e} failed'
    with ThreadPoolExecutor(40) as pool: got = list(pool.map(write, range(2000)))
    assert got == [f'{n} failed' if n % 7 == 0 else n for n in range(2000)]
    store.close()


def test_a_fork_leaves_what_waits_to_be_written_to_its_parent(new_sqlite):
    store = Store(new_sqlite())
    def job(id): return dict(id=id, job_type='t', task='t')
    waits = _Write(Adding(store, [job('parent')]), queue.SimpleQueue())
    store._queue.append(waits)  # as a writer that has come while another had the turn
    if (pid := os.fork()) == 0:
        try:
            store.add(job('child'))
            os._exit([r['id'] for r in store.list()] != ['child'])
        except BaseException: os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    store.add(job('last'))
    assert waits.over and waits.error is None and sorted(r['id'] for r in store.list()) == ['child', 'last', 'parent']
    store.close()


def test_a_thread_that_is_called_as_it_finds_work_lets_others_be_woken():
    "The token on its way to a thread that has found a long job by itself must not keep the rest of the crew asleep"
    asked, second, crew = [], threading.Event(), None
    def long(): ran.append(second.wait(10))
    def find():
        asked.append(1)
        if len(asked) == 2: crew.call(); return long  # another thread calls between its last two looks
        return second.set if len(asked) > 2 and not second.is_set() else None
    ran, crew = [], Crew(2, 'test', find)
    crew.call()
    wait_until(lambda: len(asked) >= 2)
    crew.call()
    wait_until(lambda: ran, 15)
    crew.close()
    assert ran == [True]


def test_a_thread_that_finds_two_pieces_of_work_in_the_moment_it_lies_down_wakes_another_for_the_second():
    "The last to lie down is the first to be woken: it must not wake itself"
    crew, work, looks, begun, over = None, [], [0], {}, threading.Event()
    def job(name, f):
        def run(): begun[name] = time.monotonic(); f()
        return run
    def find():
        looks[0] += 1
        if looks[0] == 2: work.extend([job('b', int), job('a', lambda: over.wait(5))])  # it counts as idle already
        if not work: return None
        f = work.pop()
        if work: crew.call()
        return f
    crew = Crew(8, 'test-self', lambda: None)
    for _ in range(3): crew.call(); time.sleep(0.02)
    crew.find = find
    crew.call()
    wait_until(lambda: 'b' in begun, 3, f'{begun}')
    over.set()
    crew.close()

def test_a_crew_outlives_an_error_of_its_search(caplog):
    looks, done = [], []
    def find():
        looks.append(1)
        if len(looks) <= 2: raise MemoryError('once, and once more')
        return partial(done.append, 1) if len(done) < 3 else None
    crew = Crew(2, 'test-error', find)
    crew.call()
    wait_until(lambda: len(looks) >= 2)
    for _ in range(3): crew.call(); time.sleep(0.02)
    wait_until(lambda: len(done) == 3, 5)
    assert 'finds nothing' in caplog.text
    crew.close()

def test_threads_of_a_pool_end_when_it_is_closed_and_what_comes_later_finds_one():
    pool = Pool(3, name := f"test-pool-{time.time_ns()}")
    def there(): return [t for t in threading.enumerate() if t.name == name]
    go, done = threading.Event(), []
    futures = [pool.submit(go.wait, 10) for _ in range(3)] + [pool.submit(done.append, n) for n in range(20)]
    assert len(there()) == 3
    pool.close()
    go.set()
    for f in futures: f.result(10)  # what was in line is done
    wait_until(lambda: not there(), 10)
    assert pool.submit(divmod, 7, 2).result(10) == (3, 1) and len(there()) == 1
    assert pool.submit(divmod, 7, 2).result(10) == (3, 1) and len(there()) == 1  # the one that is idle
    pool.close()
    wait_until(lambda: not there(), 10)

def test_many_calls_at_once_are_all_done_and_none_is_done_twice():
    pool, done = Pool(4, 'test-many'), []
    def submits(n): return [pool.submit(done.append, (n, k)) for k in range(500)]
    with ThreadPoolExecutor(8) as callers: futures = [f for fs in callers.map(submits, range(8)) for f in fs]
    for f in futures: f.result(20)
    assert len(done) == len(set(done)) == 4000 and pool.busy == 0
    pool.close()

def test_an_engine_keeps_nothing_by_the_name_of_a_database_that_was_forgotten(new_engine, new_sqlite):
    "A process may meet ten thousand, one after the other"
    e = new_engine()
    for _ in range(5): e.forget(e.store(new_sqlite()))
    assert not e._stores and not e._desks and not e._gates

def test_the_thread_of_the_agenda_outlives_an_error(new_engine, new_sqlite, monkeypatch, caplog):
    "Nothing that was due later was begun any more"
    e, looks = new_engine(), []
    desk = e._desks[e.store(new_sqlite())]
    def errand(d):
        looks.append(d)
        if len(looks) == 1: raise MemoryError
    monkeypatch.setattr(e, '_errand', errand)
    e._start()
    e._at(desk, time.monotonic())
    wait_until(lambda: len(looks) == 2, 4)  # it comes again by itself
    assert looks == [desk, desk] and 'goes on to be begun' in caplog.text

@pytest.mark.parametrize('which', ['fh_saas-schedule', 'fh_saas-heartbeat'])
def test_a_thread_that_could_not_be_started_is_started_by_the_next_call(new_engine, monkeypatch, which):
    e, start, begun = new_engine(), threading.Thread.start, []
    def fails_once(t):
        begun.append(t.name)
        if begun.count(which) == 1 and t.name == which: raise RuntimeError("can't start new thread")
        start(t)
    monkeypatch.setattr(threading.Thread, 'start', fails_once)
    with pytest.raises(RuntimeError): e._start()
    for _ in range(2): e._start()
    begun.remove(which)
    assert sorted(begun) == ['fh_saas-heartbeat', 'fh_saas-schedule']

def test_threads_that_were_given_up_count_on_when_the_size_changes(new_engine, new_sqlite, new_manager):
    e = new_engine(concurrency=4)
    m = new_manager(new_sqlite(), e)
    a = e._claim(m.store, m.submit('t', print, timeout=60)[0], None)
    e._abandon(a)
    assert e.crew.size == 4 + 1 + 32
    e.resize(6)
    assert (e.line.size, e.crew.size) == (6, 6 + 1 + 32)
    e._too_late(a, None)
    assert e.crew.size == 6 + 32

class a_job:
    is_async, counted, lane = False, False, None
    def __init__(self, queue='q'): self.row = dict(queue=queue, task='t')

class its_desk: weight = 1

def test_a_place_is_given_back_once():
    "By its end, and by whoever gives it up in the same moment: both have seen that it holds one"
    line, (a, b, c) = Line(4), [a_job() for _ in range(3)]
    line.put(its_desk(), [a, b, c])
    assert [line.take(), line.take()] == [a, b] and line.free() == 1
    for _ in range(2): line.done(a)
    assert (line.running, line.free(), a.counted, b.counted) == (1, 2, False, True)
    assert line.pull() == [c] and not c.counted
    line.done(c)  # nor by one that never had a place
    assert (line.running, line.waiting, line.free()) == (1, 0, 3)
    line.done(b)
    assert (line.running, line._by_queue) == (0, {})

def test_a_job_whose_queue_is_full_is_not_ready():
    "Threads were woken for it again and again"
    line = Line(4, dict(q=1, other=1))
    line.put(its_desk(), [first := a_job(), a_job()])
    assert line.ready() and line.take() is first
    assert not line.ready() and line.take() is None
    line.put(its_desk(), [other := a_job('other')])
    assert line.ready() and line.take() is other
    line.done(first)
    assert line.ready()

@pytest.mark.parametrize('how', ['by rate', 'by id'])
def test_who_has_waited_to_count_counts_what_began_meanwhile(new_pg, how):
    "A transaction's moment is older than its lock, if others had that before"
    url = new_pg()
    a, b = Store(url), Store(url)
    a.add_many([dict(id=f'{n:032}', job_type='t', task='t') for n in range(2)])
    rates, found = {'t': (1, 60)}, []
    def claims():
        if how == 'by rate': found.append(b.claim(('t',), (), 'b', 'w', 60, 1, rates=rates))
        else: found.append(b.write(b.claiming_these([f'{1:032}'], 'b', 'w', 60, Room(1, rates=rates))))
    with ThreadPoolExecutor(1) as pool:
        claim = a.claiming(('t',), (), 'a', 'w', 60, Room(1, rates=rates))
        def first(cur, now):
            a.kind.alone(cur)
            waiting = pool.submit(claims)
            time.sleep(2.5)  # more than a clock may be ahead
            return claim(cur, a.kind.now(cur)), waiting
        [got], waiting = a.write(first)
        waiting.result(20)
    assert got['id'] == f'{0:032}' and found == [[]]
    a.close(); b.close()
