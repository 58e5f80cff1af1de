"Events after the commit, and numbers about queues and tasks, over both databases."
import asyncio, threading, time, types
from concurrent.futures import ThreadPoolExecutor
import pytest
from fh_saas.db_host import timestamp
from fh_saas.jobs import events as module, statistics
from fh_saas.jobs.events import Event, Events, events
from fh_saas.jobs.options import InvalidJob
from fh_saas.jobs.retries import Snooze
from fh_saas.jobs.states import Outcome
from fh_saas.jobs.store import Store
from conftest import wait_until

@pytest.fixture
def heard():
    found = []
    events.on()(add := lambda e: found.append(e))
    yield found
    events.off(add)

def kinds(found, id): return [e.kind for e in found if e.job_id == id]
def call(bg): return bg.func(*bg.args)

def test_the_life_of_a_job(manager, heard):
    def f(job):
        job.progress(50, 'half')
        wait_until(lambda: 'progressed' in kinds(heard, job.id), 10)
        if job.attempt == 1: raise ZeroDivisionError
    id, bg = manager.submit('t', f)
    assert events.settled() and kinds(heard, id) == ['submitted']
    call(bg); call(bg)
    assert events.settled() and kinds(heard, id) == ['submitted', 'started', 'progressed', 'retried', 'started', 'finished']
    e = {(e.kind, e.attempt): e for e in heard if e.job_id == id}
    assert (e['progressed', 1].percent, e['progressed', 1].message) == (50, 'half')
    assert (e['retried', 1].outcome, e['retried', 1].status, e['retried', 1].error) == ('retry', 'pending', 'ZeroDivisionError') and e['finished', 2].status == 'completed'
    assert {x.tenant for x in heard} == {manager.store.tenant} and {x.job_type for x in heard} == {'t'} and heard[0].at <= heard[-1].at

def test_every_way_to_submit_and_to_end(manager, heard):
    def f(n):
        if n == 1: raise Snooze(60)
        if n == 2: raise ValueError
    async def g(): return 1
    ids = manager.submit_many('t', f, [dict(n=0)])
    async def main():
        id, bg = await manager.asubmit('t', g)
        await bg()
        return id
    ids.append(asyncio.run(main()))
    for n in (1, 2):
        id, bg = manager.submit('t', f, 1, n=n)
        call(bg)
        ids.append(id)
    with manager.transaction() as tx: ids.append(manager.submit('t', f, n=0, conn=tx)[0])
    ids.append(manager.submit('t', f, n=3, run_at='2100-01-01')[0])
    manager.cancel(ids[-1])
    wait_until(lambda: [kinds(heard, id)[-1:] for id in ids[:2]] == [['finished']]*2 and 'submitted' in kinds(heard, ids[4]), 20)
    assert events.settled()
    assert [kinds(heard, id) for id in ids[1:4]] == [['submitted', 'started', 'finished'], ['submitted', 'started', 'retried'], ['submitted', 'started', 'finished']]
    assert [(e.status, e.outcome) for e in heard if e.kind == 'finished' and e.job_id in (ids[3], ids[5])] == [('failed', 'failed'), ('cancelled', None)]

def test_what_was_rolled_back_is_not_told(manager, heard):
    with pytest.raises(ZeroDivisionError), manager.transaction() as tx:
        id, _ = manager.submit('t', print, conn=tx)
        1/0
    wait_until(lambda: not manager.engine._following, 10)
    a, _ = manager.submit('t', print, unique='k', run_at='2100-01-01')
    b, _ = manager.submit('t', print, unique='k')
    assert events.settled() and kinds(heard, id) == [] and a == b and kinds(heard, a) == ['submitted']

def test_it_is_told_after_the_commit(manager):
    seen = []
    @events.on('submitted', 'finished')
    def look(e): seen.append((e.kind, manager.get_job(e.job_id).status))
    try:
        id, bg = manager.submit('t', print)
        events.settled()
        call(bg)
        events.settled()
    finally: events.off(look)
    assert seen == [('submitted', 'pending'), ('finished', 'completed')]

def test_the_lost_and_the_cancelled(manager, heard):
    def f(): return 1
    lost, _ = manager.submit('t', f, run_at='2100-01-01')
    manager.store.claim_one(lost, 'x', 'gone', -1)
    manager.engine._desks[manager.store].rescue()
    ids = [manager.submit('t', f, run_at='2100-01-01', tags=['x'])[0] for _ in range(3)]
    assert manager.cancel_all(tag='x') == 3
    assert events.settled() and kinds(heard, lost)[-1] == 'retried' and [kinds(heard, id) for id in ids] == [['submitted', 'finished']]*3

def test_a_broken_and_a_slow_subscriber_harm_nobody(manager, heard, caplog):
    gate = threading.Event()
    @events.on('submitted')
    def broken(e): raise SystemExit
    @events.on('finished')
    def slow(e): gate.wait(20)
    try:
        begun = time.monotonic()
        for n in range(3): call(manager.submit('t', print)[1])
        assert time.monotonic() - begun < 5
        gate.set()
        assert events.settled()
    finally:
        gate.set()
        for f in (broken, slow): events.off(f)
    assert [e.kind for e in heard].count('finished') == 3 and 'a subscriber of' in caplog.text

def test_too_many_for_a_slow_subscriber_are_dropped_and_counted(monkeypatch):
    monkeypatch.setattr(module, 'most_waiting', 10)
    hub, gate, got = Events(), threading.Event(), []
    hub.on()(lambda e: (gate.wait(10), got.append(e)))
    for n in range(30): hub.tell(Event('started', 't', str(n), 't', 't', 'running', timestamp()))
    gate.set()
    assert hub.settled() and hub.dropped == 20 and [e.job_id for e in got] == [str(n) for n in range(10)]

def test_events_whose_thread_cannot_be_started_are_told_with_those_that_follow(monkeypatch, caplog):
    "Whoever told them got the error, in the midst of what it did; and nobody was told anything any more"
    hub, got, start, failed = Events(), [], threading.Thread.start, []
    def fails_once(t):
        if not failed and t.name == 'fh_saas-events': failed.append(1); raise RuntimeError("can't start new thread")
        start(t)
    monkeypatch.setattr(threading.Thread, 'start', fails_once)
    hub.on()(lambda e: got.append(e.job_id))
    def tell(id): hub.tell(Event('started', 't', id, 't', 't', 'running', timestamp()))
    tell('first')
    assert failed and got == [] and "can't start" in caplog.text
    tell('second')
    assert hub.settled(3) and got == ['first', 'second']

def test_filters_and_bad_subscribers():
    hub, got = Events(), []
    hub.on('finished', tenant='a', job_type='x')(f := lambda e: got.append(e.job_id))
    for n, (kind, tenant, typ) in enumerate([('finished', 'a', 'x'), ('started', 'a', 'x'), ('finished', 'b', 'x'), ('finished', 'a', 'y')]): hub.tell(Event(kind, tenant, str(n), typ, 't', 'running', timestamp()))
    assert hub.settled() and got == ['0']
    hub.off(f)
    assert not hub.subscribers
    for bad in (3, None): pytest.raises(TypeError, hub.on('finished'), bad)
    async def g(e): pass
    with pytest.raises(TypeError, match='call_soon_threadsafe'): hub.on()(g)
    with pytest.raises(ValueError, match='no kind'): hub.on('ended')

# --- Numbers

def test_queues_in_numbers(new_url):
    s = Store(new_url())
    s.add_many([dict(id=f'{n}', job_type='t', task='t', queue='a' if n < 4 else 'b') for n in range(6)])
    s.add(dict(id='later', job_type='t', task='t', queue='c', run_at='2100-01-01T00:00:00.000000Z'))
    s.add(dict(id='old', job_type='t', task='t', queue='b', run_at='2020-01-01T00:00:00.000000Z'))
    s.write(lambda cur, now: cur.execute("UPDATE tenant_jobs SET run_at = NULL WHERE id = '5'") and None)
    assert s.claim_one('0', 'x', 'me', 30)
    q = s.open_jobs()
    assert {k: (v['due'], v['scheduled'], v['running']) for k, v in q.items()} == dict(a=(3, 0, 1), b=(3, 0, 0), c=(0, 1, 0))
    assert q['c']['oldest_due'] is None and q['a']['oldest_due'] < 60 and q['b']['oldest_due'] > 5*365*86400 and s.by_status() == dict(pending=7, running=1)

def test_tasks_in_numbers(new_url):
    s = Store(new_url())
    for n in range(20):
        s.add(dict(id=f'{n:02}', job_type='t', task='even' if n % 2 == 0 else None, max_retries=3))
        row = s.claim_one(f'{n:02}', f'x{n}', 'me', 30)
        s.finish(row, Outcome('completed' if n % 4 else 'failed'))
    tasks = s.lately()
    assert tasks['even']['outcomes'] == dict(completed=5, failed=5) and tasks['t']['outcomes'] == dict(completed=10)
    w, d = tasks['even']['wait'], tasks['even']['duration']
    assert w['n'] == d['n'] == 10 and 0 <= w['p50'] <= w['p95'] <= w['max'] < 60 and d['mean'] >= 0
    assert sum(sum(t['outcomes'].values()) for t in s.lately(5).values()) == 5 and s.lately(0) == {}

def test_an_empty_database_in_numbers(manager):
    assert manager.stats() == dict(queues={}, tasks={}, statuses={})
    with pytest.raises(InvalidJob): manager.stats(-1)

def test_jobs_by_tag_and_column(manager):
    a, _ = manager.submit('t', print, tags=['vip', 'import'], queue='q', run_at='2100-01-01')
    b, _ = manager.submit('t', print, tags='vip', triggered_by='api', run_at='2100-01-01')
    manager.submit('t', print, tags='vi', run_at='2100-01-01')
    ids = lambda **kw: {j.id for j in manager.list_jobs(**kw)}
    assert ids(tag='vip') == {a, b} and ids(tag='import') == {a} and ids(tag='p') == ids(tag='%') == set() and ids(queue='q', tag='vip') == {a} and ids(triggered_by='api') == {b}
    for bad in ('vip,import', 7): pytest.raises(InvalidJob, manager.list_jobs, tag=bad)
    with pytest.raises(InvalidJob, match='payload is no filter'): manager.list_jobs(payload='x')

def test_a_forked_process_tells_its_own(lite):
    import os
    got = []
    events.on('finished')(f := lambda e: got.append(e.job_id))
    try:
        call(lite.submit('t', print)[1]); events.settled()
        if (pid := os.fork()) == 0:
            got.clear()
            events.tell(Event('finished', 't', 'mine', 't', 't', 'completed', timestamp()))
            os._exit(0 if events.settled(5) and got == ['mine'] else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally: events.off(f)

def test_a_bound_method_can_leave(lite):
    class Page:
        def hear(self, e): pass
    hub, page = Events(), Page()
    hub.on()(page.hear)
    hub.off(page.hear)
    assert not hub.subscribers

def test_a_damaged_row_spoils_no_numbers(new_url):
    s = Store(new_url())
    s.add(dict(id='x', job_type='t', task='t'))
    s.write(lambda cur, now: cur.execute("UPDATE tenant_jobs SET run_at = NULL, created_at = 'soon'") and None)
    assert s.open_jobs()['default'] == dict(due=1, scheduled=0, running=0, oldest_due=None)

def test_what_many_monitors_show_is_counted_once(lite, monkeypatch):
    s, asked, clock, took = lite.store, [], [1000.0], [0.2]
    real = Store.open_jobs
    def slow(self):
        asked.append(1); time.sleep(0.05); clock[0] += took[0]
        return real(self)
    monkeypatch.setattr(Store, 'open_jobs', slow)
    monkeypatch.setattr(statistics, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))
    def asks_after(wait):
        before, clock[0] = len(asked), clock[0] + wait
        s.open_lately()
        return len(asked) > before
    s.add(dict(id='a', job_type='t', task='t', max_retries=3))
    with ThreadPoolExecutor(8) as pool: found = [f.result() for f in [pool.submit(s.open_lately) for _ in range(16)]]
    assert len(asked) == 1 and all(f['default']['due'] == 1 for f in found)
    found[0]['default']['due'] = 7
    assert s.open_lately()['default']['due'] == 1 and len(asked) == 1
    assert not asks_after(1.9) and asks_after(0.2)  # it took 0.2 seconds
    took[0] = 0.0
    assert asks_after(2.1) and not asks_after(0.8) and asks_after(0.2)
    took[0] = 60.0  # the file was locked, or the machine slept
    assert asks_after(1) and not asks_after(14.9)
    s.add(dict(id='b', job_type='t', task='t', max_retries=3))
    assert asks_after(0.2) and s.open_lately()['default']['due'] == 2

def test_a_moment_that_had_passed_was_no_wait(manager):
    id, bg = manager.submit('t', print, run_at='2019-01-01')
    manager.wait(id, 10)
    assert manager.attempts(id)[0]['waited'] < 60

def test_a_job_that_waits_for_its_response_is_not_called_scheduled(manager):
    waits, later = manager.submit('t', print)[0], manager.submit('t', print, run_at='2100-01-01')[0]
    assert [manager.state(manager.get_job(i)) for i in (waits, later)] == ['pending', 'scheduled']
