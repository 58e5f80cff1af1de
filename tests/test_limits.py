"What ends an attempt: its time, its memory, its own completion; and what an exception means."
import asyncio, json, logging, os, subprocess, sys, threading, time
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path
import pytest
import sqlalchemy as sa
from hypothesis import given, settings, strategies as st
from fastsql import Database
from tenacity import wait_fixed
from fh_saas.db_host import gen_id, seconds, timestamp
from fh_saas.jobs import recorder, tasks
from fh_saas.jobs.masking import hide, mask, masked, secret_values
from fh_saas.jobs.options import InvalidJob
from fh_saas.jobs.retries import Cancel, Permanent, RetryAfter, Snooze, TaskSignal
from fh_saas.jobs.heartbeats import brisk
from fh_saas.jobs.tasks import task
from fh_saas.jobs.lanes import Lanes
from fh_saas.jobs.line import Line
from fh_saas.jobs.ring import Ring
from fh_saas.jobs.rules import Rule, kept_by, limits_of
from fh_saas.utils_bgtsk import BackgroundTaskManager
from conftest import wait_until

sys.path.insert(0, str(Path(__file__).parent/'children'))
import isolated  # noqa: E402

def call(bg): return bg.func(*bg.args)
def outcomes(m, id): return [a['outcome'] for a in m.attempts(id)]

@pytest.fixture
def crew(url, new_engine):
    "A manager whose engine knows the isolated tasks"
    db = Database(url)
    m = BackgroundTaskManager(db, new_engine(tasks.registry))
    yield m
    db.conn.close(); db.engine.dispose()

# --- Timeouts

@pytest.mark.parametrize('n', [1, 2])
def test_an_async_task_is_cancelled_when_its_time_is_over(manager, n):
    ended = []
    async def f():
        try: await asyncio.sleep(60)
        finally: ended.append(1)
    id, bg = manager.submit('t', f, n, timeout=1)
    begun = time.monotonic()
    asyncio.run(bg())
    job = manager.get_job(id)
    assert 0.9 < time.monotonic() - begun < 5 and ended == [1]
    assert (job.status, job.retry_count, outcomes(manager, id)) == (('failed', 1, ['failed']) if n == 1 else ('pending', 1, ['retry'])) and job.error_message == 'TimedOut: took longer than its timeout of 1 s'

def test_a_sync_task_ends_where_it_reports(manager):
    def f(job):
        while True: job.progress(1); time.sleep(0.01)
    id, _ = manager.submit('t', f, 1, timeout=1)
    manager.engine.attend(manager.store)
    manager.store.write(lambda cur, now: cur.execute('UPDATE tenant_jobs SET run_at = created_at') and None)
    manager.engine.attend(manager.store)
    job = manager.wait(id, 10)
    assert job.error_message.startswith('TimedOut: took longer than its timeout of 1 s') and manager.engine._stuck == 0

def test_one_that_does_not_listen_is_given_up_and_its_result_dropped(new_url, new_manager, caplog):
    m, go, done = new_manager(new_url(), concurrency=1, handoff=0), threading.Event(), []
    def deaf(): go.wait(20); done.append(1); return 'late'
    def other(): return 1
    id, _ = m.submit('t', deaf, 1, timeout=1)
    wait_until(lambda: m.get_job(id).status == 'running')
    behind, _ = m.submit('t', other)
    assert m.wait(behind, 10).status == 'completed'  # the only place was free again
    job = m.get_job(id)
    assert job.status == 'failed' and job.error_message == 'TimedOut: took longer than its timeout of 1 s, and did not stop' and not done
    stale = m.engine.stale
    go.set()
    wait_until(lambda: m.engine.stale == stale + 1)
    assert m.get_job(id).result is None and outcomes(m, id) == ['failed'] and m.engine._stuck == 0

def test_too_many_stuck_threads_keep_their_places(new_sqlite, new_manager, monkeypatch):
    monkeypatch.setattr(recorder, 'most_stuck', 1)
    m, go = new_manager(new_sqlite(), concurrency=2, handoff=0), threading.Event()
    def deaf(): go.wait(30)
    ids = [m.submit('t', deaf, 1, timeout=1)[0] for _ in range(4)]
    for id in ids[:3]: assert m.wait(id, 15).status == 'failed'
    wait_until(lambda: m.engine._stuck == 3)
    time.sleep(0.3)
    assert m.get_job(ids[3]).status == 'pending' and m.engine.line.running == 2
    go.set()
    wait_until(lambda: m.engine._stuck == 0)
    assert m.wait(ids[3], 15).status in ('completed', 'failed')

def test_a_stubborn_coroutine_is_given_up_too(manager):
    async def f():
        until = time.monotonic() + 4
        while time.monotonic() < until:
            try: await asyncio.sleep(0.1)
            except asyncio.CancelledError: continue
        return 'late'
    id, _ = manager.submit('t', f, 1, timeout=1)
    manager.store.write(lambda cur, now: cur.execute('UPDATE tenant_jobs SET run_at = created_at') and None)
    manager.engine.attend(manager.store)
    assert manager.wait(id, 10).error_message.endswith('did not stop')
    wait_until(lambda: not manager.engine._stuck)
    assert manager.get_job(id).result is None

def test_in_time_nothing_happens(manager):
    async def f(): await asyncio.sleep(0.1); return 1
    def g(): time.sleep(0.1); return 1
    ids = [manager.submit('t', x, timeout=1) for x in (f, g)]
    for _, bg in ids: asyncio.run(bg())
    time.sleep(1.2)
    assert [manager.get_job(id).status for id, _ in ids] == ['completed', 'completed']

@pytest.mark.parametrize('bad', [0, -1, 0.5, '5', True, 10**9])
def test_a_bad_timeout(lite, bad):
    with pytest.raises(InvalidJob, match='timeout'): lite.submit('t', print, timeout=bad)
    with pytest.raises(InvalidJob, match='timeout'): task('x', timeout=bad)

# --- A process of its own

def test_it_is_like_any_other_task(crew):
    id, bg = crew.submit('good', n=3, at=date(2026, 1, 31))
    call(bg)
    assert crew.result(id, 20) == isolated.Sheet(date(2026, 1, 31), 3)
    job = crew.get_job(id)
    assert job.status == 'completed_with_warnings' and job.progress_percent == 100 and json.loads(job.details)['pid'] != os.getpid()
    assert [l['message'] for l in crew.logs(id)] == ['step 0', 'step 1', 'step 2', 'one price is missing']
    id, bg = crew.submit('agood', n=5)
    asyncio.run(bg())
    assert crew.result(id, 20) == 5

@pytest.mark.parametrize('how,status,said', [('exit', 'failed', 'ChildDied: .* exit code 7'), ('segv', 'failed', 'ChildDied: .* SIGSEGV'), ('raise', 'failed', 'ValueError: no'), ('permanent', 'failed', 'Permanent: never'),
    ('system exit', 'failed', 'SystemExit: 3'), ('result', 'failed', 'cannot be stored'), ('flood', 'failed', '20,000,002 bytes'), ('snooze', 'pending', 'again in 77 s')])
def test_what_it_breaks_is_its_own(crew, how, status, said):
    id, bg = crew.submit('bad', isolated.bad, 1, how=how)
    call(bg)
    job = crew.get_job(id)
    assert job.status == status
    assert job.error_message is None if status == 'pending' and not job.error_message else __import__('re').search(said, job.error_message)

def test_it_is_killed_when_its_time_is_over(crew):
    id, bg = crew.submit('loops', isolated.loops, 1, timeout=1)
    begun = time.monotonic()
    call(bg)
    assert crew.get_job(id).error_message.startswith('TimedOut: took longer than its timeout of 1 s') and time.monotonic() - begun < 6 and not crew.engine._stuck

@pytest.mark.parametrize('name', ['sleeps', 'asleeps', 'loops'])
def test_it_is_killed_when_it_is_cancelled(crew, name):
    id, bg = crew.submit(name)
    threading.Thread(target=call, args=(bg,)).start()
    wait_until(lambda: crew.get_job(id).status == 'running')
    if name == 'asleeps': wait_until(lambda: crew.get_job(id).progress_message == 'asleep', 20)
    if name == 'sleeps': time.sleep(1)
    crew.cancel(id)
    job = crew.wait(id, 10)
    assert job.status == 'cancelled' and not wait_until(lambda: crew.engine.idle, 10) is False
    if name == 'asleeps': assert [l['message'] for l in crew.logs(id)] == ['cleaned up']

def test_it_takes_no_more_memory_than_it_may(crew):
    id, bg = crew.submit('hungry', isolated.hungry, 1, mib=50)
    call(bg)
    assert crew.get_job(id).status == 'completed'
    id, bg = crew.submit('hungry', isolated.hungry, 1, mib=500)
    call(bg)
    assert crew.get_job(id).error_message == 'MemoryError'

def test_it_can_commit_its_completion_and_die(crew):
    with crew.transaction() as tx: tx.exec_driver_sql('CREATE TABLE own (n INTEGER)')
    id, bg = crew.submit('commits', isolated.commits)
    call(bg)
    job = crew.get_job(id)
    with crew.transaction() as tx: rows = tx.exec_driver_sql('SELECT count(*) FROM own').scalar()
    assert (job.status, job.result, rows, outcomes(crew, id), [l['message'] for l in crew.logs(id)]) == ('completed', '"committed"', 1, ['completed'], ['before'])

def test_it_ends_with_the_process_that_started_it(url, new_manager):
    import subprocess, signal
    code = f"""
import sys; sys.path.insert(0, {str(Path(isolated.__file__).parent)!r})
import isolated, time
from fastsql import Database
from fh_saas.utils_bgtsk import BackgroundTaskManager
m = BackgroundTaskManager(Database({url!r}))
id, bg = m.submit('sleeps', isolated.sleeps)
print(id, flush=True)
bg.func(*bg.args)
"""
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    id = p.stdout.readline().strip()
    m = new_manager(url, concurrency=0)
    pid = int(wait_until(lambda: m.logs(id), 20)[0]['item'])
    os.kill(p.pid, signal.SIGKILL); p.wait()
    def gone():
        try: return Path(f'/proc/{pid}/stat').read_text().split()[2] == 'Z'
        except OSError: return True
    wait_until(gone, 10)

def test_what_cannot_be_isolated():
    def inner(): pass
    for f in (inner, lambda: 1, isolated.Sheet(1, 2).__eq__):
        with pytest.raises(InvalidJob, match='top of a module'): task('inner', isolate='process')(f)
    for kw in (dict(isolate='thread'), dict(memory=100), dict(isolate='process', memory=1), dict(isolate='process', memory='1G')):
        with pytest.raises(InvalidJob): task('inner', **kw)

# --- What an exception means

class Busy(OSError): pass
class Gone(Busy): pass

@pytest.mark.parametrize('e,kind,delay', [(PermissionError('no'), 'failed', 0), (Busy('later'), 'retry', 60), (Gone('x'), 'cancelled', 0), (OSError('plain'), 'retry', 2), (KeyError('k'), 'retry', 7), (ValueError('snooze'), 'snooze', 5), (ValueError('other'), 'retry', 2),
    (ZeroDivisionError(), 'retry', 2), (Permanent('own word'), 'failed', 0), (ArithmeticError(), 'retry', 2)])
def test_the_policy_of_a_task(lite, e, kind, delay):
    def f(): raise e
    def broken(e): raise RuntimeError
    policy = {PermissionError: Permanent, Busy: RetryAfter(60), Gone: Cancel, LookupError: wait_fixed(7), ValueError: lambda e: Snooze(5) if 'snooze' in str(e) else None, ArithmeticError: broken, TaskSignal: RetryAfter(1)}
    lite.engine.registry.add(f, f.__qualname__, on_error=policy)
    id, bg = lite.submit('t', f)
    o = call(bg)
    assert (o.kind, o.delay) == (kind, delay) and (kind == 'snooze' or type(e).__name__ in o.error or kind in ('failed', 'cancelled'))

@pytest.mark.parametrize('bad', [{ValueError: 5}, {'ValueError': Permanent}, {int: Permanent}, {KeyboardInterrupt: Permanent}])
def test_a_policy_that_says_nothing(bad):
    with pytest.raises(TypeError, match='on_error'): task('x', on_error=bad)

# --- Completion in the task's own transaction

@pytest.fixture
def own(manager):
    with manager.transaction() as tx: tx.exec_driver_sql('CREATE TABLE own (n INTEGER)')
    return manager

def rows(m):
    with m.store.cursor() as cur: return cur.execute('SELECT count(*) FROM own').fetchone()[0]

def put(conn): conn.execute(sa.text('INSERT INTO own VALUES (1)'))

@pytest.mark.parametrize('then', ['return', 'raise', 'warn'])
@pytest.mark.parametrize('how', ['begin', 'db'])
@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_rows_and_completion_are_committed_together(own, then, how, kind):
    def f(job):
        if then == 'warn': job.warn('w')
        if how == 'begin':
            with job.begin() as conn: put(conn); job.complete(conn, {'n': 1})
        else: put(job.db.conn); job.complete(job.db, {'n': 1}); job.db.conn.commit()
        if then == 'raise': raise ZeroDivisionError
        return 'ignored'
    async def g(job): return f(job)
    id, bg = own.submit('t', f if kind == 'sync' else g)
    asyncio.run(bg())
    job = own.get_job(id)
    assert (job.status, json.loads(job.result), rows(own), job.retry_count, len(own.attempts(id))) == ('completed_with_warnings' if then == 'warn' else 'completed', {'n': 1}, 1, 0, 1)
    assert own.engine.stale == 0

def test_rolled_back_it_was_never_said(own):
    def f(job):
        if job.attempt == 1:
            with job.begin() as conn: put(conn); job.complete(conn); raise ZeroDivisionError
        with job.begin() as conn: put(conn); job.complete(conn); conn.rollback()
        return 'by itself'
    id, bg = own.submit('t', f)
    assert call(bg).kind == 'retry' and rows(own) == 0
    assert call(bg).kind == 'completed' and rows(own) == 0 and own.get_job(id).result == '"by itself"'

def test_who_has_lost_the_job_commits_nothing(own):
    def f(job):
        own.store.write(lambda cur, now: cur.execute("UPDATE tenant_jobs SET claim_token = 'another'") and None)
        with job.begin() as conn: put(conn); job.complete(conn)
    id, bg = own.submit('t', f)
    call(bg)
    assert rows(own) == 0 and own.get_job(id).status == 'running' and own.engine.stale == 1

def test_a_cancelled_job_commits_nothing(own):
    def f(job):
        own.cancel(job.id)
        wait_until(lambda: job.should_stop, 10)
        with job.begin() as conn: put(conn); job.complete(conn)
    id, bg = own.submit('t', f)
    call(bg)
    assert rows(own) == 0 and own.get_job(id).status == 'cancelled'

def test_each_thread_has_a_database_that_is_closed_at_the_end(own):
    seen = []
    def f(job):
        def use(): seen.append(job.db); put(job.db.conn); job.db.conn.commit()
        t = threading.Thread(target=use); t.start(); t.join()
        use()
        put(job.db.conn)  # never committed
        return len({id(db) for db in seen})
    job_id, bg = own.submit('t', f)
    call(bg)
    assert own.get_job(job_id).error_log is None
    assert own.get_job(job_id).result == '2' and rows(own) == 2 and all(db.conn.closed for db in seen)

# --- Secrets

@pytest.mark.parametrize('text,shown', [
    ('postgresql://ada:pa55@h/db', 'postgresql://ada:***@h/db'), ('GET https://h/?api_key=abcd&x=1', 'GET https://h/?api_key=***&x=1'), ('{"Password": "a b", "n": 1}', '{"Password": ***, "n": 1}'), ("client_secret='x y'", 'client_secret=***'),
    ('X-Auth-Token: abc', 'X-Auth-Token: ***'), ('Bearer abcdefgh123', '***'), ('eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc', '***'), ('key AKIAABCDEFGHIJKLMNOP', 'key ***'), ('sk_live_abcdefgh', '***'), ('-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----', '***'),
    ('token ring', 'token ring'), ('2 tokens left', '2 tokens left'), ('https://h:8080/x@y', 'https://h:8080/x@y'), ('nothing', 'nothing'), ('', '')])
def test_secrets_by_name_and_by_looks(text, shown): assert mask(text) == shown

pieces = st.sampled_from(['pass', 'WORD', 'ſecret', 'toKen', 'api', 'key', 'pİncode', 'cookıe', '_', '-', ' ', '\u00a0', '\n', '\u0307', '=', ': ', '"', "'", 's3', 'x://u:pw@h', 'Bearer abcdefgh1', 'baſic abcdefgh1', 'AKIA', 'ASIA', 'ABCDEFGHIJKLMNOP', 'iBan', 'X1234 ',
    'sk_live_abcdefgh', 'rk_test_abcdefgh', *(f'gh{c}_' for c in 'pousr'), 'x'*20, 'xoxb-', 'eyJ', 'abcdefgh.'*2, '-----BEGIN PRIVATE KEY-----'])

@given(st.lists(pieces, max_size=12).map(''.join))
@settings(max_examples=3000, deadline=None)
def test_no_pattern_is_left_out_that_would_have_matched(text):
    from fh_saas.jobs import masking
    kept = masking._names[:], masking._custom[:], masking._assigned
    hide('iban', patterns=r'\bX\d{4}\b')
    try:
        shown = text
        for _, p, new in (*masking._patterns, *masking._custom): shown = p.sub(new, shown)
        shown = masking._assigned.sub(lambda m: m[0] if masking._counts.search(m[1]) and m[2].isdecimal() else f'{m[1]}***', shown)
        assert mask(text) == shown
    finally: masking._names[:], masking._custom[:], masking._assigned = kept

def test_hostile_text_is_masked_in_no_time():
    for s in ('a'*50_000, '_'*50_000, 'token'*10_000, 'a-'*25_000, 'x://'*12_000, 'eyJ'*16_000, '"'*50_000, 'secret: "' + '\\'*50_000, 'sk_live_'*6000, 'eyJ-'*12_000, 'eyJ-'*3 + '.' + 'eyJ-'*12_000, '-eyJ'*400_000, 'password = '*5000, '-----BEGIN PRIVATE KEY-----'*1800):
        begun = time.perf_counter()
        mask(s)
        assert time.perf_counter() - begun < 2, s[:20]  # milliseconds; minutes without bounds in the patterns

def test_nothing_that_is_recorded_holds_a_secret_of_the_arguments(manager, caplog):
    caplog.set_level(logging.INFO)
    def f(user, api_key, db, job):
        job.progress(5, f'as {api_key}')
        job.log(f'login {user} {api_key}', item=api_key)
        job.warn(f'{db["password"]!r} is weak')
        raise ConnectionError(f'{api_key} {db["password"]} https://u:other@h/')
    id, bg = manager.submit('t', f, user='ada', api_key='q7Yb2-x', db=dict(password='hunter\n"2"', port=5))
    call(bg)
    shown = json.dumps([manager.get_job(id).error_message, manager.get_job(id).error_log, manager.get_job(id).progress_message, manager.logs(id), manager.attempts(id), manager.arguments(id)]) + caplog.text
    assert not [s for s in ('q7Yb2', 'hunter', 'other@') if s in shown] and 'ada' in shown and manager.arguments(id) == dict(user='ada', api_key='***', db=dict(password='***', port=5))

def test_names_and_patterns_can_be_added(monkeypatch):
    from fh_saas.jobs import masking
    monkeypatch.setattr(masking, '_names', masking._names[:]); monkeypatch.setattr(masking, '_custom', []); monkeypatch.setattr(masking, '_assigned', masking._assigned)
    assert mask('IBAN: DE1') == 'IBAN: DE1'
    hide('iban', patterns=r'\bX\d{4}\b')
    assert mask('customer_iban = DE1, X1234') == 'customer_iban = ***, ***' and masked(dict(IBAN=1)) == dict(IBAN='***')
    assert secret_values('not json') == () and secret_values('{"iban": ["DE1234", null, true]}') == ('DE1234',)
    with pytest.raises(ValueError): hide('-')

# --- Rates

def test_the_rate_of_a_task(new_url, new_manager):
    m, done = new_manager(new_url(), handoff=0), []
    def mail(n): done.append(n)
    m.engine.registry.add(mail, mail.__qualname__, rate=(2, 60))
    for n in range(5): m.submit('t', mail, n=n)
    other, _ = m.submit('t', print)
    assert m.wait(other, 10).status == 'completed'
    wait_until(lambda: len(done) == 2)
    time.sleep(0.5)
    assert len(done) == 2

def test_the_next_job_of_a_task_begins_when_its_rate_lets_it(new_url, new_manager):
    m = new_manager(new_url(), handoff=0)
    def letter(n): pass
    m.engine.registry.add(letter, letter.__qualname__, rate=(1, 4))
    for n in range(2): m.submit('t', letter, n=n)
    wait_until(lambda: all(j.completed_at for j in m.list_jobs()), 15)
    first, second = sorted(seconds(j.started_at) for j in m.list_jobs())
    assert 4 <= second - first < 5.5  # looks that only become rarer are 0.2, 0.6, 1.4, 3 and 6.2 s after the first

def due(store, task, n, **kw): store.add_many([dict(id=gen_id(), job_type=task or 'rated', task=task, payload='{}', max_retries=3) | kw for _ in range(n)])

def test_rows_of_0_9_14_whose_rate_is_used_up_keep_nobody_waiting(store):
    for _ in range(30): due(store, None, 1)
    due(store, 'free', 5)
    def named(task, job_type=None): return task or job_type
    limits = dict(rates={'rated': (3, 60)}, named=named)
    rows = store.claim(('rated', 'free'), ('rated',), 't1', 'me', 30, 8, **limits)
    assert Counter(named(r['task'], r['job_type']) for r in rows) == dict(rated=3, free=5)
    due(store, 'free', 2)
    assert [r['task'] for r in store.claim(('rated', 'free'), ('rated',), 't2', 'me', 30, 8, **limits)] == ['free', 'free']

def test_a_job_with_a_rate_is_not_claimed_before_it_can_start(store):
    "It counts as begun from its claim on, and would begin beside those of the next period"
    due(store, 'rated', 5)
    due(store, 'free', 5)
    rows = store.claim(('rated', 'free'), (), 't1', 'me', 30, 8, rates={'rated': (4, 60)}, sure=2)
    assert Counter(r['task'] for r in rows) == dict(rated=2, free=3)

def test_when_a_rate_opens(store):
    def opens(**rates):
        with store.cursor() as cur: at = store.opens_in(cur, store.kind.now(cur), rates)
        return at if at is None else round(at)
    def begin(n, ago):
        due(store, 'rated', n)
        assert len(store.claim(('rated',), (), gen_id(), 'me', 30, n, rates={'rated': (1000, 60)})) == n
        with store.engine.begin() as conn: conn.execute(store.t.starts.update().where(store.t.starts.c.n == n).values(at=timestamp(time.time() - ago)))
    begin(3, 50); begin(4, 30); begin(5, 10)
    def in_(n): return opens(rated=(n, 60))
    assert in_(13) is None and in_(12) == 10 and in_(10) == 10 and in_(9) == 30 and in_(6) == 30 and in_(5) == 50 and in_(1) == 50
    assert opens(other=(1, 60)) is None and opens(other=(1, 60), rated=(12, 60)) == 10

def test_a_rate_is_looked_at_when_it_opens_and_not_before(lite):
    e, desk = lite.engine, lite.engine._desks[lite.store]
    desk.seen = e._ended.copy(), desk.ended
    assert [e._bar(desk, ['default'], 3.0) for _ in range(3)] == [3.0]*3 and e._bar(desk, ['default'], -1.0) == 0.02
    assert [e._bar(desk, ['default']) for _ in range(2)] == [0.2, 0.4] and e._bar(desk, ['default'], 60) == 5.0
    desk._free = replace(desk._free, most=1)
    assert e._bar(desk, ['default'], 3.0) == 0.8  # it may be another process's end that it waits for

@pytest.mark.parametrize('bad', [5, (1,), (0, 1), (1, 0), ('1', 1), '10/m'])
def test_a_bad_rate(bad):
    with pytest.raises(InvalidJob, match='rate'): task('x', rate=bad)

def test_a_completion_that_was_never_committed_is_a_failure(own):
    def f(job): put(job.db.conn); job.complete(job.db, 5)
    id, bg = own.submit('t', f)
    assert call(bg).kind == 'failed' and 'never committed' in own.get_job(id).error_message and rows(own) == 0

def test_a_completed_job_is_done_to_100_percent(manager):
    def f(job): job.progress(80, 'step 4'); return 1
    def g(job): job.progress(80); raise Permanent('no')
    ids = [manager.submit('t', x) for x in (f, g, lambda: 1)]
    for _, bg in ids: call(bg)
    assert [manager.get_job(id).progress_percent for id, _ in ids] == [100, 80, None]

def test_a_script_that_submits_at_its_top_submits_nothing_in_the_child(tmp_path, new_sqlite):
    import subprocess
    url, script = new_sqlite(), tmp_path/'script.py'
    script.write_text(f"""
from fastsql import Database
from fh_saas.jobs.tasks import task
from fh_saas.utils_bgtsk import BackgroundTaskManager
@task('iso', isolate='process', max_retries=1)
def iso(): return 1
m = BackgroundTaskManager(Database({url!r}))
id, bg = m.submit('iso', iso)
bg.func(*bg.args)
print(len(m.list_jobs()), m.get_job(id).status, m.get_job(id).error_message)
""")
    p = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert p.stdout.startswith("1 failed ChildDied: the task's module cannot be imported") and "if __name__ == '__main__'" in p.stdout, p.stdout + p.stderr
    script.write_text(script.read_text().replace('m = Back', "if __name__ == '__main__':\n  m = Back").replace('\nid, bg', '\n  id, bg').replace('\nbg.', '\n  bg.').replace('\nprint', '\n  print'))
    p = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert p.stdout.startswith('2 completed None'), p.stdout + p.stderr

# --- What an attack has found

def gone(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2] == 'Z'
    except OSError: return True

def test_the_child_runs_nobody_elses_jobs(crew):
    others = [crew.submit('agood', n=n)[0] for n in range(3)]
    id, bg = crew.submit('hires')
    t = threading.Thread(target=call, args=(bg,)); t.start()
    wait_until(lambda: crew.get_job(id).status == 'running')
    crew.store.write(lambda cur, now: cur.execute("UPDATE tenant_jobs SET run_at = created_at WHERE status = 'pending'") and None)
    t.join()
    child, worker, concurrency = crew.result(id, 20)
    crew.engine.attend(crew.store)
    assert concurrency == 0 and crew.result(child, 20) == 3
    assert all(crew.wait(o, 20).status == 'completed' for o in others) and {a['worker'] for o in (*others, child) for a in crew.attempts(o)} == {crew.engine.worker}

def test_what_it_has_started_ends_with_it_and_keeps_nobody_waiting(crew):
    begun = time.monotonic()
    id, bg = crew.submit('forks')
    call(bg)
    found, pid = crew.result(id, 0)
    assert found == [1, 2] and time.monotonic() - begun < 20
    wait_until(lambda: gone(pid), 10)

def test_it_dies_with_its_parent_even_while_a_library_holds_the_interpreter(new_sqlite):
    import subprocess, signal
    url = new_sqlite()
    code = f"""
import sys, threading, time; sys.path.insert(0, {str(Path(isolated.__file__).parent)!r})
import isolated
from fastsql import Database
from fh_saas.utils_bgtsk import BackgroundTaskManager
id, bg = BackgroundTaskManager(Database({url!r})).submit('hangs', isolated.hangs)
threading.Thread(target=bg.func, args=bg.args, daemon=True).start()
time.sleep(3); print('now', flush=True); time.sleep(60)
"""
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'now\n'
    children = [int(c) for t in Path(f'/proc/{p.pid}/task').iterdir() for c in (t/'children').read_text().split()]
    assert children
    os.kill(p.pid, signal.SIGKILL); p.wait()
    wait_until(lambda: all(map(gone, children)), 5)

def test_a_child_that_cannot_be_started_leaves_nothing_open(crew, monkeypatch):
    before = len(os.listdir('/proc/self/fd'))
    monkeypatch.setattr(sys, 'executable', '/nowhere')
    for _ in range(5): call(crew.submit('agood', isolated.agood, 1, n=1)[1])
    monkeypatch.undo()
    assert len(os.listdir('/proc/self/fd')) <= before + 3

def test_an_outage_at_the_end_of_a_completed_task_costs_no_slot(lite, monkeypatch):
    from fh_saas.db_connect import DatabaseUnavailable
    from fh_saas.jobs.store import Store
    def broken(*a): raise DatabaseUnavailable('away')
    def f(job):
        with job.begin() as conn: job.complete(conn, 1)
        monkeypatch.setattr(Store, 'has_ended', broken)
    id, bg = lite.submit('t', f)
    call(bg)
    assert lite.get_job(id).result == '1' and lite.get_job(id).status == 'completed'
    wait_until(lambda: lite.engine.idle)

def test_an_error_in_the_heart_stops_no_heart(lite, monkeypatch):
    def broken(self): raise RuntimeError
    monkeypatch.setattr(type(lite.engine), '_close_idle', broken)
    id, bg = lite.submit('t', lambda: time.sleep(1.2))
    call(bg)
    assert any(t.name == 'fh_saas-heartbeat' and t.is_alive() for t in threading.enumerate())

def test_a_timeout_leaves_no_attempt_in_the_event_loop(lite):
    import gc
    from fh_saas.jobs.attempt import Attempt
    async def f(): return 1
    def alive(): gc.collect(); return sum(isinstance(o, Attempt) for o in gc.get_objects())
    async def main():
        before = alive()
        for _ in range(20): await (await lite.asubmit('t', f, timeout=3600))[1]()
        return alive() - before
    assert asyncio.run(main()) < 5

@pytest.mark.parametrize('pad', [0, 85, 100, 124, 125, 126, 150, 360])
def test_no_half_of_a_secret_stays_where_a_text_is_cut(lite, pad):
    def f(api_token, job):
        job.log('y'*(pad*16) + api_token + 'z'*3000)
        raise RuntimeError('y'*pad + api_token + 'z'*600)
    id, bg = lite.submit('t', f, 1, api_token='S3CRETabcdefghijabcdefghijabcdefghijabcdefghij')
    call(bg)
    job = lite.get_job(id)
    assert not any(part in t for t in (job.error_message, job.error_log, json.dumps(lite.logs(id))) for part in ('S3CRET', 'abcdefghij'))

def test_policies_and_refusals_show_no_secret(lite, caplog):
    def f(api_token:str): raise ValueError(api_token)
    def broken(e): raise RuntimeError('no opinion')
    lite.engine.registry.add(f, f.__qualname__, on_error={ValueError: broken})
    id, bg = lite.submit('t', f, api_token='S3CRETvalue')
    call(bg)
    with pytest.raises(TypeError) as e: lite.submit('t', f, api_token=['S3CRETvalue'])
    assert 'S3CRET' not in caplog.text + str(e.value) and 'api_token=***' in str(e.value)

def test_numbers_of_tokens_are_no_secret():
    assert masked(dict(max_tokens=4096, token='abc')) == dict(max_tokens=4096, token='***') and secret_values('{"max_tokens": 4096}') == () and mask('max_tokens=4096 token=4096') == 'max_tokens=4096 token=***'

def test_a_policy_may_speak_of_timeouts(lite):
    from fh_saas.jobs.retries import TimedOut
    async def f(): await asyncio.sleep(30)
    lite.engine.registry.add(f, f.__qualname__, on_error={TimedOut: Permanent})
    id, bg = lite.submit('t', f, timeout=1)
    asyncio.run(bg())
    assert lite.get_job(id).status == 'failed'

def test_completed_twice_in_one_transaction(own):
    def f(job):
        with job.begin() as conn: job.complete(conn, 1); job.complete(conn, 2)
    id, bg = own.submit('t', f, 1)
    call(bg)
    assert own.get_job(id).status == 'failed' and 'called already' in own.get_job(id).error_message

def test_cancelled_and_out_of_time_at_once(lite):
    async def f(job):
        while True:
            try: await asyncio.sleep(10)
            except asyncio.CancelledError:
                if job.cancelled: raise
                lite.cancel(job.id)
    id, bg = lite.submit('t', f, timeout=1)
    async def main(): await bg(); return asyncio.current_task().cancelling()
    assert asyncio.run(main()) == 0
    job = lite.wait(id, 10)
    assert job.status == 'cancelled' and [a['outcome'] for a in lite.attempts(id)] == ['cancelled']

# --- What a second review has found

def test_an_open_completion_keeps_no_lease_from_being_renewed(new_pg, new_manager):
    "Its row is held by the task's transaction; those of the others are renewed, and submits do not wait for it"
    m, go, done = new_manager(new_pg(), lease=3, busy=1, handoff=0), threading.Event(), []
    def holds(job):
        with job.begin() as conn: job.complete(conn, 'held'); go.wait(20)
    def lives(job): done.append(job.attempt); go.wait(20); return 'lived'
    a, b = m.submit('t', holds, 1)[0], m.submit('t', lives, 1)[0]
    wait_until(lambda: done and m.get_job(a).status == 'running')
    until, slowest = time.monotonic() + 6, 0
    while time.monotonic() < until:
        begun = time.monotonic()
        m.submit('t', print, run_at='2100-01-01')
        slowest = max(slowest, time.monotonic() - begun)
        time.sleep(0.05)
    go.set()
    assert m.result(a, 10) == 'held' and m.result(b, 10) == 'lived' and done == [1] and slowest < 0.9

@pytest.mark.parametrize('then', ['read', 'again'])
def test_after_a_rollback_it_is_as_if_nothing_had_been_said(own, then):
    def f(job):
        conn = job.db.conn
        put(conn); job.complete(job.db, 1); conn.rollback()
        conn.execute(sa.text('SELECT 1'))
        if then == 'again': put(conn); job.complete(job.db, 2); conn.commit()
        return 3
    id, bg = own.submit('t', f)
    call(bg)
    job = own.get_job(id)
    assert (job.status, job.result, rows(own)) == ('completed', '2' if then == 'again' else '3', then == 'again')

def test_a_bar_is_not_full_before_it_is_over(own):
    def f(job):
        job.progress(40)
        with job.begin() as conn: job.complete(conn); conn.rollback()
        raise Permanent('no')
    id, bg = own.submit('t', f)
    call(bg)
    assert (own.get_job(id).status, own.get_job(id).progress_percent) == ('failed', 40)

def test_a_policy_does_not_run_where_leases_are_renewed(lite):
    names = []
    def f(): time.sleep(3.5)
    def policy(e): names.append(threading.current_thread().name)
    from fh_saas.jobs.retries import TimedOut
    lite.engine.registry.add(f, f.__qualname__, on_error={TimedOut: policy})
    id, _ = lite.submit('t', f, 1, timeout=1, run_at='2020-01-01')
    assert lite.wait(id, 10).status == 'failed' and names and 'heartbeat' not in names[0]

def test_a_policy_may_raise_anything(lite):
    def f(): raise ValueError('x')
    def policy(e): raise SystemExit
    lite.engine.registry.add(f, f.__qualname__, on_error={ValueError: policy})
    id, bg = lite.submit('t', f, 1)
    assert call(bg).kind == 'failed' and lite.get_job(id).error_message == 'ValueError: x'

def test_a_slow_start_counts(crew, monkeypatch, tmp_path):
    (tmp_path/'sitecustomize.py').write_text('import time; time.sleep(8)')
    monkeypatch.syspath_prepend(str(tmp_path))
    id, bg = crew.submit('bad', isolated.bad, 1, how='x'*300_000, timeout=1)
    begun = time.monotonic()
    call(bg)
    assert crew.get_job(id).error_message.startswith('TimedOut') and time.monotonic() - begun < 6

def test_many_submitted_at_the_top_of_a_script_and_its_types(tmp_path, new_sqlite):
    import subprocess
    url, script = new_sqlite(), tmp_path/'script.py'
    script.write_text(f"""
from __future__ import annotations
from dataclasses import dataclass
from fastsql import Database
from fh_saas.jobs.tasks import task
from fh_saas.utils_bgtsk import BackgroundTaskManager
@dataclass
class Inner: n: int
@dataclass
class Outer: inner: Inner
@task('iso', isolate='process', max_retries=1)
def iso(o: Outer) -> Outer:
    print('done', o.inner.n)
    return o
m = BackgroundTaskManager(Database({url!r}))
try: m.submit_many(iso, [dict(o=Outer(Inner(1)))], run_at='2100-01-01')
except Exception as e: print('refused')
if __name__ == '__main__':
    id, bg = m.submit('iso', iso, o=Outer(Inner(7)))
    bg.func(*bg.args)
    print(len(m.list_jobs()), m.get_job(id).status, m.get_job(id).error_message, m.result(id, 0))
""")
    p = subprocess.run([sys.executable, '-u', str(script)], capture_output=True, text=True, timeout=60)
    assert p.stdout.splitlines() == ['refused', 'done 7', '2 completed None Outer(inner=Inner(n=7))'], p.stdout + p.stderr

def test_short_forms_of_a_secret_hide_nothing_else():
    assert secret_values('{"password": "    ", "token": "   x"}') == ('   x',) or 'x' not in secret_values('{"token": "   x"}')
    assert mask('hello', secret_values('{"password": "    "}')) == 'hello' and mask('k-eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghij') == 'k-***'

# --- Lanes

@pytest.fixture
def narrow(monkeypatch):
    "Each lane has one place, whatever its jobs use; empty it for the judgement as it is"
    judge, forced = Lanes.judge, [1]
    def all_narrow(lanes, now):
        if not forced: return judge(lanes, now)
        for tasks_ in lanes._all.values():
            for lane in tasks_.values(): lane.most = 1
        lanes.narrow = [lane for tasks_ in lanes._all.values() for lane in tasks_.values()]
    monkeypatch.setattr(Lanes, 'judge', all_narrow)
    return forced

def test_a_task_that_is_held_back_keeps_no_other_and_loses_no_job(new_url, new_manager, narrow):
    m, go, begun = new_manager(new_url(), handoff=0, concurrency=8), threading.Event(), []
    def computes(n): begun.append(n); go.wait(30)
    def letter(): return 1
    first, _ = m.submit('t', computes, n=0)
    wait_until(lambda: begun)
    wait_until(lambda: m.engine.line.lanes.narrow)
    ids = [first, *(m.submit('t', computes, n=n)[0] for n in range(1, 6))]
    for _ in range(3): assert m.wait(m.submit('u', letter)[0], 10).status == 'completed'
    assert len(begun) == 1 and len(m.list_jobs(status='pending')) >= 5 - 1  # one may be claimed ahead
    async def answered(bg): await asyncio.wait_for(bg(), 10)
    late, bg = m.submit('t', computes, n=6)
    asyncio.run(answered(bg))  # a response does not wait for a place
    assert m.get_job(late).status == 'pending'
    go.set()
    assert [m.wait(id, 20).status for id in (*ids, late)] == ['completed']*7 and sorted(begun) == [*range(7)]

def test_what_becomes_wider_takes_what_is_due(new_url, new_manager, narrow):
    m, go, begun = new_manager(new_url(), handoff=0, concurrency=8), threading.Event(), []
    def waits(n): begun.append(n); go.wait(30)
    m.submit('t', waits, n=0)
    wait_until(lambda: m.engine.line.lanes.narrow)
    for n in range(1, 6): m.submit('t', waits, n=n)
    time.sleep(1)
    assert len(begun) == 1
    narrow.clear()
    wait_until(lambda: len(begun) == 6, 10)
    go.set()

def test_threads_let_go_of_the_interpreter_sooner_while_jobs_compute(new_sqlite, new_manager, narrow):
    m, go, usual = new_manager(new_sqlite(), handoff=0, concurrency=8), threading.Event(), sys.getswitchinterval()
    def computes(): go.wait(30)
    id, _ = m.submit('t', computes)
    wait_until(lambda: sys.getswitchinterval() == pytest.approx(brisk))
    narrow.clear()
    go.set()
    assert m.wait(id, 20).status == 'completed'
    wait_until(lambda: sys.getswitchinterval() == pytest.approx(usual))

def test_jobs_that_wait_have_all_threads(new_sqlite, new_manager):
    m, together = new_manager(new_sqlite(), handoff=0, concurrency=8), threading.Barrier(8)
    def waits(): together.wait(20); time.sleep(0.05)
    ids = [m.submit('t', waits)[0] for _ in range(40)]
    assert {m.wait(id, 30).status for id in ids} == {'completed'} and not m.engine.line.lanes.narrow

def test_a_response_whose_job_found_no_place_is_not_forgotten(new_url, new_manager, narrow):
    m, go, begun = new_manager(new_url(), handoff=60, poll=60, concurrency=8), threading.Event(), []
    def computes(n): begun.append(n); go.wait(30)
    jobs = [m.submit('t', computes, n=n) for n in range(4)]
    async def serve():
        first = asyncio.create_task(jobs[0][1]())
        while not (begun and m.engine.line.lanes.narrow): await asyncio.sleep(0.02)
        await asyncio.wait_for(asyncio.gather(*(bg() for _, bg in jobs[1:])), 10)  # no response waits for a place
        while m.engine._desks[m.store] not in m.engine._blocked: await asyncio.sleep(0.01)
        assert begun == [0]
        go.set()
        await first
    asyncio.run(serve())
    wait_until(lambda: sorted(begun) == [*range(4)], 5)

def test_room_is_asked_for_while_lanes_become_wider(new_sqlite, new_manager):
    line = new_manager(new_sqlite(), concurrency=4).engine.line
    line.lanes.narrow = [lane := line.lanes.of('desk', 'task')]
    assert (lane.most, line.free()) == (None, 4)

class Tenant:
    def __init__(self, weight): self.weight = weight

class Claimed:
    "As much of an attempt as a line looks at"
    lane = seat = None
    def __init__(self, desk, task, queue, is_async): self.desk, self.row, self.is_async, self.counted = desk, dict(task=task, queue=queue), is_async, True

some_job = st.tuples(st.sampled_from([0, 0, 1, 2]), st.sampled_from('tttu'), st.sampled_from('pqqq'), st.sampled_from([False]*5 + [True]))
moves = st.one_of(st.tuples(st.just('put'), st.lists(some_job, min_size=2, max_size=6)), st.tuples(st.sampled_from(['take', 'take', 'follow', 'follow', 'done', 'pull']), st.integers(0, 9)))

@given(st.lists(moves, min_size=20, max_size=60), st.sampled_from([None, dict(p=1, q=3)]))
@settings(max_examples=200, deadline=None)
def test_a_line_knows_what_is_in_it(plan, queues):
    line, desks, waiting, running = Line(4, queues), [Tenant(w) for w in (1, 1, 3)], [], []
    for what, arg in plan:
        if what == 'put':
            for d in desks:
                if new := [Claimed(d, *job[1:]) for job in arg if desks[job[0]] is d]: line.put(d, new); waiting += new
        elif what == 'take':
            if (a := line.take()) is not None: waiting.remove(a); running.append(a)
        elif what == 'pull':
            out = line.pull(desk=desks[arg % 3])
            assert out == [a for a in waiting if a.desk is desks[arg % 3]]
            waiting = [a for a in waiting if a not in out]
        elif running:
            a = running.pop(-1 if what == 'follow' else arg % len(running))  # only the last one taken is followed
            b = line.follow(a, 1e-5) if what == 'follow' and not a.is_async else None
            if b is None: line.done(a, 1e-5)
            else:
                assert b is next(x for x in waiting if x.desk is a.desk) and (b.lane, b.row) == (a.lane, a.row)
                waiting.remove(b); running.append(b)
        lanes = {a.lane for a in waiting + running if a.lane}
        assert (line.waiting, line.running, len(running) <= 4) == (len(waiting), len(running), True)
        assert all(line._by_queue.get(q, 0) == sum(a.row['queue'] == q for a in waiting + running) for q in 'pq')
        assert all(line._running_by_queue.get(q, 0) == sum(a.row['queue'] == q for a in running) <= line.limit(q) for q in 'pq')
        assert all(lane.running == {a for a in running if a.lane is lane} and lane.waiting == sum(a.lane is lane for a in waiting) for lane in lanes)
        assert [*line._ring] == [*dict.fromkeys(line._ring)] and {*line._ring} == {a.desk for a in waiting}

def test_no_place_is_passed_on_that_has_fallen_to_another_process():
    line, desk = Line(4), Tenant(1)
    jobs = [Claimed(desk, 't', 'q', False) for _ in range(4)]
    line.shares = dict(q=2)
    line.put(desk, jobs)
    a, b = line.take(), line.take()
    line.give_up(dict(q=1))
    assert line.follow(b, 1e-5) is None  # two run, and one may
    line.done(b, 1e-5)
    assert line.take() is None
    line.done(a, 1e-5)
    a = line.take()
    assert line.follow(a, 1e-5) is jobs[-1] and line.holds() == dict(q=1)

def test_one_that_never_began_can_give_its_place_back(new_sqlite, new_manager):
    m = new_manager(new_sqlite(), handoff=0, concurrency=0)
    def letter(): return 1
    m.submit('t', letter)
    [a] = (desk := m.engine._desks[m.store])._take(m.store.claim(*desk.names, 'token', 'w', 30, 1))
    line = Line(4)
    line.put(desk, [a])
    line.started(a)
    line.done(a)
    assert (line.running, line.lanes._seats) == (0, [])

def test_a_desk_that_a_limit_holds_back_is_called_by_whom_it_is_a_matter_of(new_sqlite, new_manager):
    e = new_manager(new_sqlite(), handoff=0, concurrency=8).engine
    one, other = (e._desks[e.store(new_sqlite())] for _ in range(2))
    e._bar(one)
    e._unblock(other, 'imports')
    assert one in e._blocked and not one.hungry
    e._unblock(one, 'default')
    assert one.hungry
    e.line.shares, one.seen, one.hungry = dict(imports=1), (e._ended.copy(), one.ended), False  # the place of another's job may be its next
    e._bar(one, ['imports', 'default'])
    e._unblock(other, 'default')
    assert one in e._blocked and not one.hungry
    e._unblock(other, 'imports')
    assert 'imports' in one.offered and one.hungry

@pytest.mark.parametrize('shares,queues,whose,heard', [({}, None, 'own', True), ({}, None, 'other', False), (dict(imports=1), None, 'other', True),
    (dict(imports=1), ['imports'], 'other', True), (dict(imports=1), ['default'], 'other', False)])
def test_a_job_that_ends_while_a_turn_finds_no_room_is_not_missed(new_sqlite, new_manager, shares, queues, whose, heard):
    e = new_manager(new_sqlite(), handoff=0, concurrency=8).engine
    own, other = (e._desks[e.store(new_sqlite())] for _ in range(2))
    e.line.shares, own.seen = shares, (e._ended.copy(), own.ended)
    e._unblock(dict(own=own, other=other)[whose], 'imports')
    assert (e._bar(own, queues) == 0.0, own.hungry) == (heard,)*2 and own in e._blocked  # and keeps its place there
    own.seen = e._ended.copy(), own.ended
    assert e._bar(own, queues) > 0 and own in e._blocked

def test_no_more_is_claimed_than_can_start_where_all_are_in_their_last_attempt(lite):
    e, desk = lite.engine, lite.engine._desks[lite.store]
    e.line._slow, e.line._timed = 1e-4, 1000
    assert e._allot(desk) > e.line.free() > 1
    e._reserved.clear()
    desk.sparing = True
    assert e._allot(desk) == e.line.free()
    e._reserved.clear()
    desk.wanted = [None]*(e.line.free() + 5)  # of responses: they are claimed whatever attempt it is
    assert e._allot(desk) > len(desk.wanted)
    desk.wanted = []

def three_turns(e, new_sqlite, seconds):
    "What three desks may claim whose turns begin at the same moment, and how many of it in their last attempt"
    e.line._slow, e.line._pace, e.line._timed = seconds, seconds, 1000
    found, desks = [], [e._desks[e.store(new_sqlite())] for _ in range(3)]
    for desk in desks:
        found.append((n := e._allot(desk), e._room(desk, n).sure if n else 0))
        desk.turning = True
    for desk in desks: desk.turning = False
    return found

def test_turns_at_once_leave_each_other_their_share_and_none_claims_what_another_may_start(new_sqlite, new_manager):
    short, long = (new_manager(new_sqlite(), handoff=0, concurrency=8).engine for _ in range(2))
    assert three_turns(short, new_sqlite, 1e-5) == [(8 + short.line.ahead(), 8), (64, 0), (64, 0)] and short.line.ahead() == 512
    assert three_turns(long, new_sqlite, 10) == [(8, 8), (0, 0), (0, 0)]

def test_a_desk_that_has_a_turn_leaves_room_for_those_before_it(new_sqlite, new_manager):
    e = new_manager(new_sqlite(), handoff=0, concurrency=8).engine
    first, second, third = (e._desks[e.store(new_sqlite())] for _ in range(3))
    e.line._slow, e.line._pace, e.line._timed = 1e-3, 1e-3, 1000  # 160 ahead, 40 in a turn
    for d in (first, second): e._ring.join(d)
    assert e._allot(third) == 40 and e._left(third)[0] == 168
    e._reserved.clear()
    e._ring.leave(third)
    e.line.waiting = 80  # room for 88: two turns
    assert e._allot(third) == 8 and e._allot(first) == 40
    e.line.waiting = 0

@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(['join', 'leave', 'turn'])), max_size=80))
def test_a_ring_holds_who_is_in_it_once(moves):
    ring, tenants, inside = Ring(), [Tenant(n % 3 + 1) for n in range(6)], set()
    for n, move in moves:
        if move == 'join': ring.join(tenants[n]); inside.add(tenants[n])
        elif move == 'leave': ring.leave(tenants[n]); inside.discard(tenants[n])
        elif (who := ring.first) is not None: ring.took(who, ring.grant(who, 2, n + 1))
        assert len(ring) == len(list(ring)) == len(inside) and set(ring) == inside and (ring.first is None) == (not inside)
        assert all((t in ring) == (t in inside) for t in tenants) and set(ring.served(-1)) <= inside

@given(st.integers(1, 20), st.data())
def test_nobody_in_a_ring_is_starved_by_those_who_come_and_go(others, data):
    ring, patient, crowd = Ring(), Tenant(1), [Tenant(1) for _ in range(others)]
    ring.join(patient)
    ring.took(patient, ring.grant(patient, 1, 1))
    for turn in range(2*others + 2):
        for t in data.draw(st.lists(st.sampled_from(crowd), max_size=others)): ring.join(t)
        if (who := ring.first) is patient: return
        ring.took(who, ring.grant(who, 1, 1))
        ring.leave(who)  # it had a single job, and comes again with the next
    raise AssertionError('it had no turn')

@pytest.mark.parametrize('path', [None, '/somewhere'])
def test_what_leads_a_process_of_its_own_to_its_modules_is_not_for_what_the_task_starts(lite, path, monkeypatch):
    monkeypatch.delenv('PYTHONPATH', raising=False) if path is None else monkeypatch.setenv('PYTHONPATH', path)
    lite.engine.registry = tasks.registry
    id, bg = lite.submit('t', isolated.surroundings)
    call(bg)
    assert lite.result(id) == path

def test_memory_is_limited_below_a_limit_that_is_there():
    code = "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**36, 2**36)); from fh_saas.jobs.child import _limit; _limit(64); a = r.getrlimit(r.RLIMIT_AS); _limit(2**20); print(0 < a[0] < a[1] == 2**36, r.getrlimit(r.RLIMIT_AS) == (2**36, 2**36))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=30)
    assert done.stdout == 'True True\n', done.stderr

# --- Pauses and drains of several at once

def test_a_drain_of_one_takes_back_no_pause_of_all():
    each, own = Rule('*', 'imports', mode='paused'), Rule('acme', 'imports', mode='draining')
    l = limits_of([each, own], 'acme')
    assert l.closed == l.draining == {'imports'} and limits_of([own], 'acme').closed == set()
    all_ = [Rule('*', mode='paused'), Rule('acme', mode='draining')]
    assert limits_of(all_, 'acme').paused and limits_of(all_, 'acme').draining == {''} and not limits_of(all_, 'globex').draining
    assert "none of its jobs is started, by a rule: `fh-saas resume --tenant '*'`" in kept_by(all_, 'acme') and 'takes no new jobs' in kept_by(all_, 'acme')
