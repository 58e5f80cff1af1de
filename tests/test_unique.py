"Unique jobs and concurrency keys, over both databases, with many who submit and claim at once."
import asyncio, json, threading, time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
import pytest
from fastsql import Database
from hypothesis import HealthCheck, given, settings, strategies as st
from fh_saas.db_connect import DatabaseBusy
from fh_saas.db_host import seconds, timestamp
from fh_saas.jobs.options import InvalidJob, Unique
from fh_saas.jobs.states import Outcome
from fh_saas.jobs.control import WrongState
from fh_saas.jobs.store import Adding, Store
from fh_saas.jobs.tasks import Registry
from fh_saas.jobs.unique import NotUnique
from fh_saas.utils_bgtsk import BackgroundTaskManager
from conftest import wait_until

far = dict(run_at='2100-01-01T00:00:00Z')

def sync(account, full=False): return account
def other(account): return account
def report(day): return day

def ids(m): return [j.id for j in m.list_jobs()]

def test_the_same_job_is_not_submitted_twice(manager):
    a, first = manager.submit('t', sync, account=1, unique=True, **far)
    b, again = manager.submit('t', sync, account=1, full=False, unique=True)
    assert a == b and first.is_new and not again.is_new and ids(manager) == [a]
    assert len({a, *(manager.submit('t', f, unique=True, **kw)[0] for f, kw in ((sync, dict(account=2)), (sync, dict(account=1, full=True)), (other, dict(account=1))))}) == 4
    assert manager.submit('t', sync, account=1, **far)[0] != a  # who does not ask for it gets a job of its own

def test_the_same_job_is_met_under_a_name_that_its_task_had_before(url, new_engine):
    "Two releases, each in a process of its own"
    def invoice(k): return k
    def send(k): return k
    invoice.__task_name__, send.__task_name__ = 'invoice', 'send_invoice'
    old, new = (BackgroundTaskManager(Database(url), new_engine(Registry(), concurrency=0)) for _ in range(2))
    old.engine.registry.add(invoice, 'invoice'); new.engine.registry.add(send, 'send_invoice', aliases=['invoice'])
    def submit(m, name, **kw): return m.submit(name, name, unique=True, **kw, **far)[0]
    a = submit(old, 'invoice', k=1)
    assert submit(new, 'send_invoice', k=1) == a and submit(new, 'send_invoice', k=2) != a
    old.cancel(a)
    b = submit(new, 'send_invoice', k=1)
    assert b != a
    with pytest.raises(WrongState, match='the same one is there again'): new.retry(a)

def test_the_same_job_is_not_submitted_twice_by_processes_that_know_nothing_of_each_other(url, new_engine):
    managers, start = [BackgroundTaskManager(Database(url), new_engine(concurrency=0)) for _ in range(3)], threading.Barrier(3)
    for m in managers: m.submit('t', other, account=0, **far)
    def submit(m, n):
        start.wait()
        return m.submit('t', sync, account=n, unique=True, **far)[0]
    with ThreadPoolExecutor(3) as pool:
        for n in range(60): assert len(set(pool.map(submit, managers, [n]*3))) == 1
    assert managers[0].store.by_status()['pending'] == 63

def test_the_handle_of_one_that_was_there_runs_nothing(manager):
    a, _ = manager.submit('t', sync, account=1, unique=True, **far)
    _, again = manager.submit('t', sync, account=1, unique=True)
    asyncio.run(again())
    assert manager.get_job(a).status == 'pending'

def test_a_handle_does_not_run_its_job_before_its_time(manager):
    a, bg = manager.submit('t', sync, account=1, **far)
    asyncio.run(bg())
    assert manager.get_job(a).status == 'pending'
    b, bg = manager.submit('t', sync, account=1, run_at=datetime.now(timezone.utc) - timedelta(hours=1))
    asyncio.run(bg())
    assert manager.wait(b, 10).status == 'completed'

@pytest.mark.parametrize('states,counts', [(None, 'pending running'), ('pending', 'pending'), (('completed', 'failed'), 'completed failed'), (['pending', 'running', 'completed', 'cancelled'], 'pending running completed cancelled')])
def test_states_that_count(new_sqlite, new_engine, states, counts):
    m = BackgroundTaskManager(Database(new_sqlite()), new_engine(concurrency=0))
    for state in ('pending', 'running', 'completed', 'failed', 'cancelled'):
        u = Unique(key=state, states=states)
        a, _ = m.submit('t', sync, 1, account=1, unique=u)
        if state == 'cancelled': m.cancel(a)
        elif state != 'pending':
            row = m.store.claim_one(a, 'token', 'me', 30)
            if state != 'running': m.store.finish(row, Outcome(state))
        assert m.get_job(a).status == state
        assert (m.submit('t', sync, account=1, unique=u)[0] == a) == (state in counts.split())

def test_a_period(manager):
    u = Unique(key='k', period=60, states=('pending', 'running', 'completed'))
    a, bg = manager.submit('t', sync, account=1, unique=u)
    bg.func(*bg.args)
    assert manager.submit('t', sync, account=1, unique=u)[0] == a
    manager.store.write(lambda cur, now: cur.execute(f"UPDATE tenant_jobs SET created_at = '{timestamp(now - 61)}'") and None)
    assert manager.submit('t', sync, account=1, unique=u)[0] != a

def test_reject_says_which(manager):
    a, _ = manager.submit('t', sync, account=1, unique='k', **far)
    with pytest.raises(NotUnique, match=f'{a} is pending; nothing') as e: manager.submit('t', sync, account=2, unique=Unique(key='k', then='reject'))
    assert (e.value.job_id, e.value.status, ids(manager)) == (a, 'pending', [a])

def test_replace_changes_what_waits_and_nothing_else(manager):
    u = Unique(key='k', then='replace')
    a, _ = manager.submit('t', sync, account=1, unique=u, priority=1, tags=['old'], **far)
    b, bg = manager.submit('t', sync, 7, account=2, unique=u, queue='q', run_at='2099-01-01T00:00:00Z')
    job = manager.get_job(a)
    assert a == b and not bg.is_new and (json.loads(job.payload), job.queue, job.priority, job.max_retries, job.tags, job.run_at[:4]) == (dict(account=2), 'q', 2, 7, None, '2099')
    manager.submit('t', sync, account=3, unique=u)
    assert manager.wait(a, 10).result == '3'
    assert manager.submit('t', sync, account=4, unique=u)[0] != a

def test_what_runs_is_not_replaced(new_url, new_engine):
    m = BackgroundTaskManager(Database(new_url()), new_engine(concurrency=0))
    a, _ = m.submit('t', sync, account=1, unique=Unique(key='k', then='replace'))
    assert m.store.claim_one(a, 'token', 'me', 30)
    b, bg = m.submit('t', sync, account=2, unique=Unique(key='k', then='replace'))
    assert a != b and bg.is_new and json.loads(m.get_job(a).payload) == dict(account=1)

def test_debounce_waits_for_the_last(manager):
    u = Unique(key='k', then='debounce', period=0.6)
    made = []
    for n in range(5):
        made.append(manager.submit('t', sync, account=n, unique=u))
        asyncio.run(made[-1][1]())
        time.sleep(0.1)
    [a] = {id for id, _ in made}
    assert manager.get_job(a).status == 'pending'
    job = manager.wait(a, 10)
    assert job.result == '4' and seconds(job.started_at) - seconds(job.created_at) > 0.9

@pytest.mark.parametrize('bad', [3, [], dict(key='x'), ''])
def test_what_is_no_uniqueness(lite, bad):
    with pytest.raises(InvalidJob, match='unique'): lite.submit('t', sync, account=1, unique=bad)
    assert ids(lite) == []

@pytest.mark.parametrize('kw,said', [(dict(), 'Say by='), (dict(then='reject'), 'Say by='), (dict(by=True, key='x'), 'only one'), (dict(key='x', then='merge'), 'none of'), (dict(key='x', period=0), 'period'), (dict(key='x', period='1'), 'period'),
    (dict(key='x', period=float('nan')), 'period'), (dict(key='x', states='open'), "states='open'"), (dict(key='x', then='debounce'), 'needs a period'), (dict(key='x', then='replace', states='running'), 'leave states out'), (dict(key='x'*300), 'key')])
def test_a_uniqueness_that_makes_no_sense(kw, said):
    with pytest.raises(InvalidJob, match=said): Unique(**kw)

def test_by_an_argument_that_is_none(lite):
    with pytest.raises(InvalidJob, match="no argument 'acount'; it has full, account"): lite.submit('t', sync, account=1, unique=Unique(by='acount'))
    with pytest.raises(InvalidJob, match='@task'): lite.submit('t', lambda: 1, unique='k')
    assert ids(lite) == []

def test_a_task_says_it_for_all_of_its_jobs(new_sqlite, new_manager):
    m = new_manager(new_sqlite())
    m.engine.registry.add(report, 'report', unique=Unique(by=True), concurrency_key=lambda day: f'reports {day}', tags=',daily,', timeout=60)
    a, _ = m.submit('t', report, day=1, **far)
    assert m.submit('t', report, day=1)[0] == a and m.submit('t', report, day=1, unique=False, **far)[0] != a
    job = m.get_job(a)
    assert (job.concurrency_key, job.tags, job.timeout) == ('reports 1', ',daily,', 60)
    with pytest.raises(InvalidJob, match='one by one'): m.submit_many('t', report, [dict(day=1)])

def test_unique_jobs_of_many_threads_and_loops(manager):
    "Each key gets one job, whoever comes first"
    def some(n): return [manager.submit('t', sync, account=k, unique=True, **far)[0] for k in range(5)]
    async def all_at_once(): return [id for id, _ in await asyncio.gather(*(manager.asubmit('t', sync, account=k % 5, unique=True, **far) for k in range(40)))]
    with ThreadPoolExecutor(12) as pool: got = [id for part in pool.map(some, range(24)) for id in part]
    got += asyncio.run(all_at_once())
    assert len(set(got)) == 5 == len(ids(manager))

def test_unique_jobs_of_two_engines(new_url, new_manager):
    "Two engines have a connection each, as two processes do; both orders of two keys at once"
    url = new_url()
    a, b = new_manager(url), new_manager(url)
    def some(m, keys): return [m.submit('t', sync, account=k, unique=True, **far)[0] for k in keys*20]
    with ThreadPoolExecutor(4) as pool: done = [pool.submit(some, m, keys) for m, keys in ((a, [1, 2]), (b, [2, 1]), (a, [2, 1]), (b, [1, 2]))]
    assert len({id for d in done for id in d.result()}) == 2 == len(ids(a))

@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(['existing', 'reject', 'replace', 'debounce']), st.sampled_from(['', 'run', 'cancel'])), max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_never_two_open_jobs_of_a_key(new_sqlite, new_engine, steps):
    m = BackgroundTaskManager(Database(new_sqlite()), new_engine(concurrency=0))
    for key, then, also in steps:
        u = Unique(key=str(key), then=then, period=60, states=None if then in ('replace', 'debounce') else ('pending', 'running'))
        try: id, _ = m.submit('t', sync, account=key, unique=u)
        except NotUnique as e: id = e.job_id
        if also == 'run' and m.get_job(id).status == 'pending': m.run_job(id, sync)
        if also == 'cancel' and m.get_job(id).status == 'pending': m.cancel(id)
        waiting = [j.unique_key for j in m.list_jobs(status='pending')]
        assert len(waiting) == len(set(waiting))

# --- Concurrency keys

def test_one_of_a_key_at_a_time(manager):
    lock, most, done = threading.Lock(), [], []
    def f(account, n):
        if not lock.acquire(blocking=False): most.append(n)
        else: time.sleep(0.03); lock.release()
        done.append(n)
    for n in range(6): manager.submit('t', f, account=1, n=n, concurrency_key='account 1')
    quick = [manager.submit('t', sync, account=n)[0] for n in range(3)]
    manager.engine.attend(manager.store)
    manager.store.write(lambda cur, now: cur.execute("UPDATE tenant_jobs SET run_at = created_at WHERE status = 'pending'") and None)
    manager.engine.attend(manager.store)
    wait_until(lambda: len(done) == 6, 30)
    assert not most and all(manager.wait(q, 10).status == 'completed' for q in quick)

def test_blocked_jobs_hide_nobody(new_url):
    s = Store(new_url())
    s.add_many([dict(id=f'{n:03}', job_type='t', task='t', priority=4, concurrency_key='k') for n in range(300)] + [dict(id='z', job_type='t', task='t', priority=1)])
    first = s.claim(('t',), (), 'a', 'me', 30, 10)
    assert [r['id'] for r in first] == ['000', 'z'] and s.claim(('t',), (), 'b', 'me', 30, 10) == []
    assert s.next_due(('t',), ())[0] is None and s.outlook(('t',), ())[2] == {}
    s.finish(first[0], Outcome('completed'))
    assert [r['id'] for r in s.claim(('t',), (), 'c', 'me', 30, 10)] == ['001']

def test_many_keys_in_one_claim_with_limits(new_url):
    s = Store(new_url())
    s.add_many([dict(id=f'{n:03}', job_type='t', task='t', queue='ab'[n % 2], concurrency_key=f'k{n % 5}') for n in range(50)])
    rows = s.claim(('t',), (), 'a', 'me', 30, 20, most_by_queue={'a': 2}, rates={'t': (4, 60)})
    keys = [r['concurrency_key'] for r in rows]
    assert len(keys) == 4 == len(set(keys)) and [r['queue'] for r in rows].count('a') <= 2

def test_by_id_a_taken_key_waits_as_well(manager):
    def f(): return 1
    hold, _ = manager.submit('t', f, concurrency_key='k', **far)
    row = manager.store.claim_one(hold, 'token', 'me', 30)
    id, bg = manager.submit('t', f, concurrency_key='k')
    assert bg.func(*bg.args) is None and manager.get_job(id).status == 'pending'
    asyncio.run(bg())
    assert manager.get_job(id).status == 'pending'
    manager.store.finish(row, Outcome('completed'))
    manager.engine.attend(manager.store)
    assert manager.wait(id, 10).status == 'completed'

def test_two_engines_keep_one_key_apart(new_url, new_engine):
    "Each sees only its own claims until they are committed"
    url, running, most, lock = new_url(), set(), [], threading.Lock()
    def f(n, k):
        with lock:
            if k in running: most.append(n)
            running.add(k)
        time.sleep(0.01)
        with lock: running.discard(k)
    ms = [BackgroundTaskManager(Database(url), new_engine(poll=0.05)) for _ in range(2)]
    for m in ms: m.engine.registry.add(f, 'keyed')
    ms[0].store.add_many([dict(id=f'{n:03}', job_type='t', task='keyed', payload=json.dumps(dict(n=n, k=n % 3)), concurrency_key=f'k{n % 3}', max_retries=1) for n in range(90)])
    for m in ms: m.engine.attend(m.store)
    wait_until(lambda: not ms[0].list_jobs(status='pending') and not ms[0].list_jobs(status='running'), 60)
    assert not most and {j.status for j in ms[0].list_jobs()} == {'completed'}

@pytest.mark.parametrize('bad', ['', 'x'*300, 7])
def test_a_bad_concurrency_key(lite, bad):
    with pytest.raises(InvalidJob, match='concurrency_key'): lite.submit('t', sync, account=1, concurrency_key=bad)
    with pytest.raises(InvalidJob, match='concurrency_key'): lite.submit('t', sync, account=1, concurrency_key=lambda account: bad)

@pytest.mark.parametrize('bad', ['', 'a,b', [], [1], ['x'*100], 7, [str(n) for n in range(30)]])
def test_bad_tags(lite, bad):
    with pytest.raises(InvalidJob, match='tag'): lite.submit('t', sync, account=1, tags=bad)

# --- What an attack has found

def test_an_open_transaction_that_holds_a_key_stops_nobody_else(new_pg, new_manager):
    m = new_manager(new_pg(), busy=1)
    with m.transaction() as tx, ThreadPoolExecutor(1) as pool:
        m.submit('t', sync, account=1, unique='k', conn=tx)
        def clicks():
            for _ in range(3):
                with pytest.raises(DatabaseBusy, match='same unique job'): m.submit('t', sync, account=1, unique='k')
        c = threading.Thread(target=clicks)
        c.start()
        others = 0
        while c.is_alive(): pool.submit(m.submit, 't', sync, account=2, **far).result(); others += 1  # beside the transaction, not in it
    c.join()
    assert others > 10 and m.submit('t', sync, account=1, unique='k')[0]

def test_two_coroutines_with_one_key_do_not_wait_for_each_other_in_their_loop(new_pg, new_manager):
    m = new_manager(new_pg())
    async def route(n):
        with m.transaction() as tx:
            id, _ = await m.asubmit('t', sync, account=1, unique='k', conn=tx)
            await asyncio.sleep(0.2)
        return id
    async def main(): return await asyncio.gather(route(1), route(2))
    begun = time.monotonic()
    a, b = asyncio.run(main())
    assert a == b and time.monotonic() - begun < 3

def test_a_replaced_job_begins_anew(manager):
    u, seen = Unique(key='k', then='replace'), []
    def f(path, job):
        seen.append((path, dict(job.details), job.row['retry_count']))
        job.details['row'] = 500; job.progress(50)
        if path == 'a': raise ValueError
    f.__qualname__ = 'replaced'
    id, bg = manager.submit('t', f, path='a', unique=u)
    bg.func(*bg.args)
    again, bg = manager.submit('other', f, path='b', unique=u, run_at='2100-01-01')
    job = manager.get_job(id)
    assert again == id and (job.job_type, job.retry_count, job.error_message, job.details, job.progress_percent) == ('other', 0, None, None, None)
    manager.run_job(id, f)
    assert seen == [('a', {}, 0), ('b', {}, 0)]

def test_the_key_is_the_same_for_the_same_arguments(lite):
    def f(tags:set[str], x:float=0): pass
    f.__qualname__ = 'same'
    a, _ = lite.submit('t', f, tags={'a', 'b', 'c', 'd'}, x=1, unique=True, **far)
    assert lite.submit('t', f, tags={'d', 'c', 'b', 'a'}, x=1.0, unique=True)[0] == a
    assert [json.loads(j.payload)['tags'] for j in lite.list_jobs()] == [['a', 'b', 'c', 'd']]

def test_keys_of_two_tasks_never_meet(lite):
    def g(): pass
    def h(): pass
    lite.engine.registry.add(g, 'mail'); lite.engine.registry.add(h, 'mail:x')
    assert lite.submit('t', g, unique='x:y', **far)[0] != lite.submit('t', h, unique='y', **far)[0]
    with pytest.raises(InvalidJob, match='names no argument'): Unique(by=())

def test_a_retry_makes_no_second_one(manager):
    def f(): raise ZeroDivisionError
    a, bg = manager.submit('t', f, 1, unique=True)
    bg.func(*bg.args)
    b, _ = manager.submit('t', f, unique=True, **far)
    with pytest.raises(WrongState, match=b): manager.retry(a)
    manager.cancel(b)
    manager.retry(a)

def test_a_quota_counted_in_an_open_transaction_stops_no_claim(new_pg, new_manager):
    m = new_manager(new_pg(), busy=1)
    m.engine.registry.add(report, 'report', rate=(100, 60))
    with m.transaction() as tx:
        m.store.join(tx, Adding(m.store, [dict(id='x', job_type='t', task='report', payload='{"day":1}', max_retries=3, run_at='2100-01-01')], quota=100))
        with ThreadPoolExecutor(1) as pool: id, _ = pool.submit(m.submit, 't', report, day=2, run_at='2020-01-01').result()  # beside the transaction
        assert m.wait(id, 5).status == 'completed'
        with pytest.raises(DatabaseBusy, match='quota'): m.store.add(dict(id='y', job_type='t', max_retries=3), quota=100)

@pytest.mark.parametrize('bulk', [False, True])
def test_a_retry_and_a_submit_at_once_make_no_two(url, new_engine, bulk):
    "By processes that know nothing of each other"
    one, two = (BackgroundTaskManager(Database(url), new_engine(concurrency=0)) for _ in range(2))
    start = threading.Barrier(2)
    for m in (one, two): m.submit('t', other, account=0, **far)
    def again(n, id):
        start.wait()
        try: one.retry_all(queue=f'q{n}') if bulk else one.retry(id)
        except WrongState: pass  # the other was there first
    def submit(n, id):
        start.wait()
        two.submit('t', sync, account=n, unique=True, queue=f'q{n}')
    with ThreadPoolExecutor(2) as pool:
        for n in range(60):
            id, _ = one.submit('t', sync, account=n, unique=True, queue=f'q{n}', **far)
            one.cancel(id)
            for f in [pool.submit(again, n, id), pool.submit(submit, n, id)]: f.result()
            assert len([j for j in one.list_jobs(limit=None) if j.queue == f'q{n}' and j.status == 'pending']) == 1, n

def test_a_retry_waits_for_a_transaction_that_submits_the_same_and_gives_up(new_pg, new_engine):
    m = BackgroundTaskManager(Database(new_pg()), new_engine(concurrency=0, busy=0.5))
    id, _ = m.submit('t', sync, account=1, unique=True, **far)
    m.cancel(id)
    with m.transaction() as conn:
        m.submit('t', sync, account=1, unique=True, conn=conn, **far)
        with ThreadPoolExecutor(1) as pool, pytest.raises(DatabaseBusy, match='unique'): pool.submit(m.retry, id).result(10)
    with pytest.raises(WrongState): m.retry(id)
    assert sorted(j.status for j in m.list_jobs()) == ['cancelled', 'pending']

def test_many_retried_at_once_are_one_of_a_kind(manager):
    def f(): raise ZeroDivisionError
    ids = []
    for _ in range(3):
        id, bg = manager.submit('t', f, 1, unique=True)
        bg.func(*bg.args)
        ids.append(id)
    assert manager.retry_all(status='failed', dry_run=True) == 1 == manager.retry_all(status='failed')
    manager.wait(ids[2], 20)
    assert [manager.get_job(i).attempt for i in ids] == [1, 1, 2]

@pytest.mark.parametrize('end', ['commit', 'rollback'])
def test_a_job_that_is_replaced_in_a_transaction_runs_when_it_is_committed(manager, end):
    "It was there before, so that it is there says nothing"
    m = manager
    u = Unique(key='k', then='replace')
    id, _ = m.submit('t', sync, account=1, unique=u, run_at='2100-01-01')
    try:
        with m.transaction() as tx:
            again, handle = m.submit('t', sync, account=2, unique=u, run_at='2020-01-01', conn=tx)
            time.sleep(1)  # whoever follows the transaction has looked
            assert len(m.engine._followed) == 1
            if end == 'rollback': raise ZeroDivisionError
    except ZeroDivisionError: wait_until(lambda: not m.engine._followed, 10)
    assert (again, handle.is_new) == (id, False)
    if end == 'commit': assert m.wait(id, 10).status == 'completed' and m.result(id) == 2
    else: assert (j := m.get_job(id)).run_at.startswith('2100') and j.status == 'pending'
