"Cancel, retry, delete, move, rerun and wait, over both databases, also while the job runs, ends or dies at that moment."
import asyncio, random, threading, time
from concurrent.futures import ThreadPoolExecutor
import pytest
from fastsql import Database
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import wait_until
from fh_saas.db_host import gen_id
from fh_saas.jobs.control import WrongState
from fh_saas.jobs.retries import Cancel, Permanent
from fh_saas.jobs.states import Outcome, shown_state
from fh_saas.jobs.store import JobNotFound, Store
from fh_saas.jobs.tasks import BadPayload
from fh_saas.utils_bgtsk import BackgroundTaskManager, InvalidJob, QueueClosed, StillRunning  # noqa: F401


@pytest.fixture
def other(url, new_engine):
    "A manager on the same database in another engine, as in another process"
    db = Database(url)
    yield BackgroundTaskManager(db, new_engine(handoff=0))
    db.conn.close()
    db.engine.dispose()

def begun(manager, f, **kw):
    "Submit `f`, and run it in a thread"
    id, bg = manager.submit('t', f, **kw)
    t = threading.Thread(target=lambda: asyncio.run(bg()))
    t.start()
    wait_until(lambda: manager.get_job(id).status != 'pending')
    return id, t

world = set()  # what tasks that hold on to nothing look at

def outcomes(m, id): return [a['outcome'] for a in m.attempts(id)]

# --- Cancel

def test_a_pending_job_is_cancelled_at_once_and_never_runs(manager):
    ran = []
    id, bg = manager.submit('t', lambda: ran.append(1))
    job = manager.cancel(id)
    asyncio.run(bg())
    bg.func(*bg.args)
    assert (job.status, bool(job.completed_at), ran, manager.attempts(id)) == ('cancelled', True, [], [])

def test_a_job_that_waits_for_its_next_attempt_is_cancelled(manager):
    def f(): raise ValueError('no')
    id, bg = manager.submit('t', f)
    bg.func(*bg.args)
    assert manager.cancel(id).status == 'cancelled' and outcomes(manager, id) == ['retry']

@pytest.mark.parametrize('how', ['progress', 'give_way', 'should_stop'])
def test_a_sync_task_ends_where_it_reports(manager, how):
    ended = []
    def f(job):
        try:
            for i in range(2000):
                if how == 'should_stop':
                    if job.should_stop: raise Cancel('left by itself')
                else: getattr(job, how)()
                time.sleep(0.01)
        finally: ended.append(i)
    id, t = begun(manager, f)
    assert shown_state(manager.cancel(id), '') == 'cancelling'
    t.join(10)
    job = manager.get_job(id)
    assert (job.status, job.error_message, job.cancel_requested_at) == ('cancelled', 'left by itself' if how == 'should_stop' else 'cancelled on request', None)
    assert outcomes(manager, id) == ['cancelled'] and ended[0] < 200 and job.retry_count == 0

@pytest.mark.parametrize('clean', [True, False])
def test_an_async_task_is_cancelled_where_it_awaits(manager, clean):
    told, begun = [], []
    async def f():
        begun.append(1)
        try: await asyncio.sleep(20)
        except asyncio.CancelledError:
            told.append(1)
            await asyncio.sleep(0.01)  # it may clean up
            if clean: raise
            return 7
    id, bg = manager.submit('t', f)
    async def main():
        t = asyncio.create_task(bg())
        while not begun: await asyncio.sleep(0.01)
        manager.cancel(id)
        await asyncio.wait_for(t, 10)  # the request that awaits it is not cancelled with it
        return t.cancelled()
    assert asyncio.run(main()) is False and told == [1]
    job = manager.get_job(id)
    assert (job.status, job.result) == (('cancelled', None) if clean else ('completed', '7'))

@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_another_process_cancels(manager, other, kind):
    def f(job):
        while True: job.progress(1); time.sleep(0.01)
    async def g(): await asyncio.sleep(60)
    id, t = begun(manager, f if kind == 'sync' else g)
    other.cancel(id)
    t.join(10)
    assert (manager.get_job(id).status, outcomes(manager, id)) == ('cancelled', ['cancelled'])

@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_a_direct_call_is_cancelled(manager, kind):
    def f(job):
        while True: job.give_way(); time.sleep(0.01)
    async def g(): await asyncio.sleep(60)
    id, bg = manager.submit('t', f if kind == 'sync' else g)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(bg.func, *bg.args)
        wait_until(lambda: manager.get_job(id).status == 'running')
        manager.cancel(id)
        assert got.result(10).kind == 'cancelled'

def test_a_task_that_does_not_listen_is_recorded_as_what_it_did(manager):
    go = threading.Event()
    def f(): go.wait(10); return 3
    id, t = begun(manager, f)
    manager.cancel(id)
    manager.cancel(id)  # asked twice is asked once
    go.set()
    t.join(10)
    assert (manager.get_job(id).status, manager.get_job(id).result) == ('completed', '3')

@pytest.mark.parametrize('error', [ValueError('x'), Permanent('x')])
def test_a_cancelled_task_that_fails_is_not_repeated(manager, error):
    go = threading.Event()
    def f(): go.wait(10); raise error
    id, t = begun(manager, f)
    manager.cancel(id)
    go.set()
    t.join(10)
    job = manager.get_job(id)
    assert (job.status, outcomes(manager, id)) == ('cancelled', ['cancelled']) and 'x' in job.error_message

@pytest.mark.parametrize('kind', ['retry', 'snooze', 'release', 'lost'])
def test_a_request_that_the_process_never_heard_of_holds(store, kind):
    "The outcome that would send the job back to pending meets the request in the row"
    store.add(dict(id='a', job_type='t', task='t', max_retries=3))
    row = store.claim_one('a', 'tok', 'w', 30)
    store.act_on('cancel', 'a')
    assert store.finish(row, Outcome(kind, error='why'))
    got = store.get('a')
    assert (got['status'], bool(got['completed_at']), got['cancel_requested_at']) == ('cancelled', True, None)
    assert store.claim(('t',), (), gen_id(), 'w', 30, 10) == []

def test_a_job_whose_process_died_is_cancelled_by_the_rescue(store):
    store.add(dict(id='a', job_type='t', task='t', max_retries=3))
    store.claim_one('a', 'tok', 'dead', -1)
    store.act_on('cancel', 'a')
    store.rescue()
    assert store.get('a')['status'] == 'cancelled'

def test_a_claim_that_was_never_begun_is_cancelled_when_given_back(store):
    store.add(dict(id='a', job_type='t', task='t', max_retries=3))
    row = store.claim_one('a', 'tok', 'w', 30)
    store.act_on('cancel', 'a')
    store.write(store.release([row]))
    got = store.get('a')
    assert (got['status'], got['attempt'], bool(got['completed_at'])) == ('cancelled', 0, True)

def test_what_has_ended_is_not_cancelled(manager):
    id, bg = manager.submit('t', lambda: 1)
    bg.func(*bg.args)
    before = manager.get_job(id)
    with pytest.raises(WrongState, match='completed: it has ended'): manager.cancel(id)
    assert manager.get_job(id) == before
    for odd in ("x' OR '1'='1", 'a\x00b', '\ud800', 'x'*100_000, None, 7):
        for do in (manager.cancel, manager.retry, manager.delete, manager.rerun, lambda i: manager.move(i, priority=1)):
            with pytest.raises(JobNotFound): do(odd)

def test_cancel_races_with_the_end(manager):
    "Whoever wins, there is one end, and who was told of a cancellation sees it or an end that came first"
    def one(n):
        def f(job): time.sleep(random.random()/200); job.progress(50); return n
        id, bg = manager.submit('t', f, max_retries=2)
        def stop():
            time.sleep(random.random()/100)
            try: return manager.cancel(id).status
            except WrongState: return 'too late'
        with ThreadPoolExecutor(2) as pool: said, _ = pool.submit(stop), pool.submit(lambda: bg.func(*bg.args))
        job = manager.get_job(id)
        assert job.status in ('completed', 'cancelled') and job.completed_at and not job.cancel_requested_at and len(manager.attempts(id)) <= 1
        if said.result() == 'too late': assert job.status == 'completed'
        if job.status == 'cancelled': assert job.result is None
        return job.status
    with ThreadPoolExecutor(8) as pool: ends = list(pool.map(one, range(48)))
    assert len(ends) == 48

# --- Retry, rerun, move, delete

def test_a_failed_job_runs_again_with_an_attempt_more(manager):
    def f():
        if 'up' not in world: raise ValueError('no')
        return 5
    world.discard('up')
    id, bg = manager.submit('t', f, max_retries=1)
    bg.func(*bg.args)
    assert manager.get_job(id).status == 'failed'
    world.add('up')
    manager.retry(id)
    job = manager.wait(id, 10)
    assert (job.status, job.result, job.retry_count, job.max_retries, outcomes(manager, id)) == ('completed', '5', 1, 2, ['failed', 'completed'])

def test_a_cancelled_job_runs_again(manager):
    def f(): return 5
    id, _ = manager.submit('t', f)
    manager.cancel(id)
    manager.retry(id)
    assert manager.wait(id, 10).result == '5'

def test_what_never_failed_is_not_retried(manager):
    def f(): return 1
    id, bg = manager.submit('t', f)
    with pytest.raises(WrongState, match='pending'): manager.retry(id)
    bg.func(*bg.args)
    with pytest.raises(WrongState, match='rerun'): manager.retry(id)

def test_a_function_that_is_gone_is_not_retried(manager):
    id, bg = manager.submit('t', lambda: 1/0, max_retries=1)
    bg.func(*bg.args)
    for again in (manager.retry, manager.rerun):
        with pytest.raises(InvalidJob, match='submit it again'): again(id)
    assert manager.retry_all(everything=True) == 0 and manager.get_job(id).status == 'failed'

def test_a_rerun_is_a_new_job(manager):
    def f(a, b): return [a, b]
    id, bg = manager.submit('t', f, max_retries=7, a=1, b=1, priority=3, triggered_by='manual:ada')
    bg.func(*bg.args)
    again = manager.rerun(id, b=2)
    job = manager.wait(again, 10)
    assert job.result == '[1,2]' and (job.rerun_of, job.max_retries, job.priority, job.triggered_by) == (id, 7, 3, 'manual:ada')
    with pytest.raises(BadPayload): manager.rerun(id, c=3)
    assert len(manager.list_jobs()) == 2

def test_a_pending_job_moves(manager):
    def f(): return 1
    id, _ = manager.submit('t', f, run_at='2100-01-01T00:00:00Z')
    job = manager.move(id, queue='slow', priority=4)
    assert (job.queue, job.priority, job.status) == ('slow', 4, 'pending')
    for kw in ({}, dict(priority=9), dict(queue='')):
        with pytest.raises(InvalidJob): manager.move(id, **kw)
    manager.cancel(id)
    with pytest.raises(WrongState): manager.move(id, queue='q')

def test_what_runs_is_not_deleted(manager):
    go = threading.Event()
    def f(job): job.log('a line'); go.wait(10)
    id, t = begun(manager, f)
    with pytest.raises(WrongState, match='cancel it first'): manager.delete(id)
    go.set()
    t.join(10)
    assert manager.logs(id) and manager.attempts(id)
    manager.delete(id)
    with pytest.raises(JobNotFound): manager.get_job(id)
    assert manager.store.logs(id) == manager.store.attempts(id) == []

def test_a_function_that_held_on_to_values_of_its_job_is_not_used_for_another(manager):
    def make(x):
        def work():
            if x == 1: raise Permanent('no')
            return x
        return work
    (one, bg), (two, bg2) = manager.submit('t', make(1)), manager.submit('t', make(2))
    bg.func(*bg.args)
    for again in (manager.retry, manager.rerun):
        with pytest.raises(InvalidJob, match='holds on to values'): again(one)
    assert manager.retry_all(everything=True, dry_run=True) == manager.retry_all(everything=True) == 0
    bg2.func(*bg2.args)
    assert (manager.get_job(one).status, manager.get_job(two).result) == ('failed', '2')

def test_what_is_claimed_and_not_yet_begun_keeps_its_function(manager):
    "A cancellation between the claim and the attempt finds a running row"
    id, bg = manager.submit('t', lambda: 1)
    row = manager.store.claim_one(id, 'tok', manager.engine.worker, 30)
    manager.cancel(id)
    desk = manager.engine._desks[manager.store]
    assert id in desk.functions
    [a] = desk._take([row])
    desk.hear()
    assert a.ctx.cancelled and a.call().kind == 'cancelled'
    desk.let_go(a, ended=True)

# --- Many

def test_bulk_takes_what_matches_and_nothing_else(manager):
    def f(n=0): return n
    far = dict(run_at='2100-01-01T00:00:00Z')
    a = [manager.submit('a', f, **far)[0] for _ in range(3)]
    b = [manager.submit('b', f, queue='q', **far)[0] for _ in range(3)]
    assert manager.cancel_all(queue='q', dry_run=True) == 3 and {manager.get_job(i).status for i in b} == {'pending'}
    assert manager.cancel_all(queue='q') == 3 == manager.cancel_all(job_type='a', dry_run=True)
    assert {manager.get_job(i).status for i in a} == {'pending'} and manager.cancel_all(queue='q') == 0
    at = manager.get_job(a[1]).created_at + 'Z'
    assert manager.cancel_all(job_type='a', since=at) + manager.cancel_all(job_type='a', until=at) == 3
    assert manager.delete_all(job_type="x' OR '1'='1") == 0 and manager.delete_all(status='cancelled', job_type='b') == 3
    assert {j.id for j in manager.list_jobs()} == {*a}

def test_bulk_leaves_alone_what_has_changed_since_it_looked(lite, monkeypatch):
    "In a file it looks without the lock; somebody else is faster to get it"
    gone, moved, kept = (lite.submit('a', dict, n=n, run_at='2100-01-01T00:00:00Z')[0] for n in range(3))
    lite.cancel(gone)
    write = lite.store.write
    def before(do):
        def late(op):
            monkeypatch.undo()
            do()
            return write(op)
        monkeypatch.setattr(lite.store, 'write', late)
    before(lambda: lite.retry(gone))
    assert lite.delete_all(status='cancelled') == 0
    before(lambda: lite.move(moved, queue='other'))
    assert lite.cancel_all(job_type='a', queue='default', since=lite.get_job(moved).created_at + 'Z') == 1
    assert lite.get_job(gone).status != 'cancelled' and [lite.get_job(i).status for i in (moved, kept)] == ['pending', 'cancelled']

@pytest.mark.parametrize('do', ['cancel_all', 'retry_all', 'delete_all'])
def test_bulk_without_a_filter_must_be_said(manager, do):
    manager.submit('t', dict, n=1)
    for only in ({}, dict(job_type=None), dict(jobtype='t'), dict(since='yesterday')):
        with pytest.raises(InvalidJob): getattr(manager, do)(**only)
    assert [j.status for j in manager.list_jobs()] == ['pending']

def test_bulk_goes_on_after_a_thousand_and_meets_each_job_once(manager):
    def f(n): raise Permanent(str(n))
    ids = manager.submit_many('t', f, [dict(n=n) for n in range(1200)], max_retries=1)
    wait_until(lambda: manager.retry_all(job_type='t', dry_run=True) == 1200, 60)
    assert manager.retry_all(job_type='t') == 1200
    wait_until(lambda: manager.retry_all(job_type='t', dry_run=True) == 1200, 60)
    assert {manager.get_job(i).attempt for i in random.sample(ids, 20)} == {2}
    assert manager.delete_all(everything=True) == 1200 and manager.list_jobs() == []

def test_two_who_lock_rows_in_different_orders_both_succeed(new_pg):
    "PostgreSQL ends one of them, which is run once more when the other has had its turn; nobody sees it"
    url = new_pg()
    one, two = Store(url), Store(url)
    for id in 'ab': one.add(dict(id=id, job_type='t', task='t', max_retries=3))
    both, ran, began, ended = threading.Barrier(2), [], [], []
    def change(store, ids):
        def op(cur, now):
            ran.append(ids); began.append(time.monotonic())
            store.moving(priority=3)(cur, now, [ids[0]])
            if ran.count(ids) == 1: both.wait(10)
            try: return list(store.moving(priority=4)(cur, now, [ids[1]]))
            except Exception: ended.append(time.monotonic()); raise
        return store.write(op)
    with ThreadPoolExecutor(2) as pool: first, second = pool.submit(change, one, 'ab'), pool.submit(change, two, 'ba')
    assert (first.result(), second.result(), len(ran)) == (['b'], ['a'], 3)
    assert began[2] > ended[0] + 0.04  # at once, it could take its first row before who waits for it has woken up, and be ended again
    one.close(), two.close()

# --- Wait

def test_wait_says_when_it_gives_up(manager):
    def f(): return 1
    id, _ = manager.submit('t', f, run_at='2100-01-01T00:00:00Z')
    with pytest.raises(StillRunning, match='within 0.1 s'): manager.wait(id, 0.1)
    with pytest.raises(TimeoutError): asyncio.run(manager.await_job(id, 0.1))
    with pytest.raises(JobNotFound): manager.wait('nobody', 1)
    for odd in ('1', -1, float('nan')):
        with pytest.raises(ValueError, match='timeout='): manager.wait(id, odd)
    manager.cancel(id)
    assert manager.wait(id, 0).status == 'cancelled'
    assert asyncio.run(manager.await_job(id, 5)).status == 'cancelled'

# --- Any order

@given(st.lists(st.sampled_from(['claim', 'cancel', 'retry', 'delete', 'move', 'completed', 'retry_outcome', 'failed', 'release', 'rescue']), max_size=14))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_actions_keeps_the_invariants(store, steps):
    "A job is finished exactly when it has an end, only a running one has a token, and an ended one returns to pending by `retry` alone"
    id, row = gen_id(), None
    store.add(dict(id=id, job_type='t', task='t', max_retries=2))
    for step in steps:
        before = store.get(id)
        try:
            if step == 'claim': row = store.claim_one(id, gen_id(), 'w', -1) or row
            elif step == 'rescue': store.rescue()
            elif step in ('completed', 'retry_outcome', 'failed', 'release'): row and store.finish(row, Outcome(step.removesuffix('_outcome')))
            else: store.act_on(step, id, **dict(priority=3) if step == 'move' else {})
        except WrongState: assert store.get(id) == before
        try: now = store.get(id)
        except JobNotFound:
            assert step == 'delete' and before['status'] != 'running'
            return
        assert (now['completed_at'] is None) == (now['status'] in ('pending', 'running')) and bool(now['claim_token']) == (now['status'] == 'running')
        assert not (now['cancel_requested_at'] and now['status'] != 'running')
        if before['completed_at'] and not now['completed_at']: assert step == 'retry' and before['status'] in ('failed', 'cancelled')
        if before['cancel_requested_at'] and now['status'] != 'running': assert now['completed_at']

def test_a_word_is_no_leave_to_change_everything(manager):
    id, _ = manager.submit('t', print, run_at='2100-01-01T00:00:00Z')
    for f in (manager.cancel_all, manager.retry_all, manager.delete_all): pytest.raises(TypeError, f, 'boom')
    assert manager.get_job(id).status == 'pending'

def test_run_again_is_with_the_key_of_its_own_arguments(manager):
    def f(order, region='eu'): return order
    f.__qualname__ = 'keyed'
    manager.engine.registry.add(f, f.__qualname__, concurrency_key=lambda order, region: f'{order}/{region}')
    id, _ = manager.submit('t', f, order=1, run_at='2100-01-01T00:00:00Z')
    assert manager.get_job(id).concurrency_key == '1/eu' and manager.get_job(manager.rerun(id, order=2)).concurrency_key == '2/eu'

def test_who_would_wait_for_himself_is_told(manager):
    async def f(): return 7
    id, _ = manager.submit('t', f)
    async def main():
        manager.engine.use_loop(asyncio.get_running_loop())
        with pytest.raises(RuntimeError, match='aresult'): manager.result(id, 5)
        manager.store.write(lambda cur, now: cur.execute('UPDATE tenant_jobs SET run_at = created_at') and None)
        manager.engine.attend(manager.store)
        return await manager.aresult(id, 10)
    assert asyncio.run(main()) == 7

def test_each_action_in_a_state_that_is_not_for_it(manager):
    def f(): return 1
    done, bg = manager.submit('t', f)
    bg.func(*bg.args)
    waits, _ = manager.submit('t', f, run_at='2100-01-01T00:00:00Z')
    runs, _ = manager.submit('t', f, run_at='2100-01-01T00:00:00Z')
    manager.store.claim_one(runs, 'token', 'me', 30)
    for act, id, said in ((manager.cancel, done, 'has ended'), (manager.retry, done, 'rerun'), (manager.retry, waits, 'only a failed'), (manager.retry, runs, 'only a failed'), (manager.delete, runs, 'cancel it first')):
        before = manager.get_job(id)
        with pytest.raises(WrongState, match=said): act(id)
        assert manager.get_job(id) == before
    for id in (done, runs): pytest.raises(WrongState, manager.move, id, 'q')
