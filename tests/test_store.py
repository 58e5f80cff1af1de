"One contract, two databases: every statement of the store does the same on SQLite and on PostgreSQL."
import os, shutil, socket, sqlite3, struct, subprocess, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given, strategies as st
from fastsql.core import NotFoundError
from fh_saas import db_connect
from fh_saas.db_connect import (DatabaseBusy, DatabaseCorrupt, DatabaseFull, DatabaseReadOnly, DatabaseUnavailable, InvalidDatabaseURL,
    NewerDatabase, UnsupportedDatabase, connect, open_engine, reading, write_meta, writing)
from fh_saas.db_host import gen_id, seconds, timestamp
from fh_saas.jobs import connections, drivers
from fh_saas.jobs.model import ensure_tables
from fh_saas.jobs.payload import describe
from fh_saas.jobs.states import Outcome, Status, final
from fh_saas.jobs.leases import max_lease
from fh_saas.jobs.drivers import Clock, SQLite, _compiled
from fh_saas.jobs.model import as_text
from fh_saas.jobs.store import Adding, JobNotFound, Store
from conftest import free_port, wait_until

hostile = ["' OR '1'='1", "x'; DROP TABLE tenant_jobs; --", '%', '_', '\\', '"', ':a', '%s', '%(id)s', '?', '$1', '\x00', 'a\x00b', '\ud800', 'é\u202e日本', '', 'x'*10_000]

def add(store, delay=0, **job): return store.add(dict(id=gen_id(), job_type='t', task='t', max_retries=3) | job, delay)
def add_ids(store, *ids, **job): return [add(store, id=i, **job) for i in ids]
def claim(store, n=10, names=('t',), old=('t',), worker='w', lease=30, token=None, suspects=False): return store.claim(names, old, token or gen_id(), worker, lease, n, suspects)
def claimed(store, *args, **kw): return [r['id'] for r in claim(store, *args, **kw)]
def claimed_with(store, **limits): return [r['id'] for r in store.claim(('t',), (), gen_id(), 'w', 30, 10, **limits)]
def later(s): return timestamp(time.time() + s)

def sql(store, text, **params):
    with writing(store.engine) as conn:
        r = conn.execute(sa.text(text), params)
        return r.fetchall() if r.returns_rows else r.rowcount

def together(n, f):
    "Results of `f(0) … f(n-1)`, begun at the same moment; an exception is a result"
    start = threading.Barrier(n)
    def one(i):
        start.wait()
        try: return f(i)
        except Exception as e: return e
    with ThreadPoolExecutor(n) as pool: return list(pool.map(one, range(n)))

def ok(results):
    if bad := [r for r in results if isinstance(r, Exception)]: raise bad[0]
    return results

@pytest.fixture(scope='module', params=['sqlite', 'postgresql'])
def one_store(request, tmp_path_factory):
    "A new database is dear on a server: one for all tests, emptied in between"
    if request.param == 'sqlite': url, drop = f"sqlite:///{tmp_path_factory.mktemp('store')/'one.db'}", None
    else:
        server, name = sa.make_url(request.getfixturevalue('pg_server')), f'fh_saas_test_{gen_id()[-12:]}'
        eng = open_engine(server, isolation_level='AUTOCOMMIT')
        def drop(sql):
            with eng.connect() as conn: conn.exec_driver_sql(sql)
        drop(f'CREATE DATABASE {name}')
        url = server.set(database=name)
    if not drop: sqlite3.connect(sa.make_url(url).database).close()
    s = Store(url)
    yield s
    s.close()
    if drop: drop(f'DROP DATABASE {name} WITH (FORCE)'); eng.dispose()

@pytest.fixture
def store(one_store):
    sql(one_store, 'DELETE FROM tenant_jobs')
    return one_store

# --- Rows

def test_an_added_job_is_read_back_as_it_was_written(store):
    before = time.time()
    row = add(store, id='a', payload='{"x":"é日本🚀"}', triggered_by='api', queue='slow', priority=4, timeout=7)
    got = store.get('a')
    assert {k: got[k] for k in row} == row and got['payload'] == '{"x":"é日本🚀"}' and got['status'] == 'pending'
    assert (got['retry_count'], got['attempt'], got['claim_token'], got['completed_at'], got['result']) == (0, 0, None, None, None)
    assert before - 1 < seconds(got['created_at']) < time.time() + 1 and got['run_at'] == got['created_at']

def test_defaults_of_a_row(store):
    got = store.get(add(store)['id'])
    assert (got['queue'], got['priority'], got['progress_percent'], got['details']) == ('default', 2, None, None)

@pytest.mark.parametrize('bad', hostile + [None, 7, b'x', ['a']])
def test_an_unknown_id_is_a_typed_not_found(store, bad):
    add(store, id='a')
    with pytest.raises(JobNotFound, match='tenant_jobs') as e: store.get(bad)
    assert isinstance(e.value, NotFoundError) and len(str(e.value)) < 300

def test_hostile_ids_are_only_ids(store):
    ids = [h for h in hostile if h and '\x00' not in h and '\ud800' not in h]
    add_ids(store, *ids)
    assert [store.get(i)['id'] for i in ids] == ids
    assert {store.claim_one(i, gen_id(), 'w', 30)['id'] for i in ids} == set(ids)

def test_list_is_newest_first(store):
    ids = list('bdace')
    for i in ids: add(store, id=i); time.sleep(0.005)  # created_at has milliseconds
    store.finish(store.claim_one('d', gen_id(), 'w', 30), Outcome('completed'))
    assert [r['id'] for r in store.list()] == ids[::-1]
    if isinstance(store.kind, SQLite):  # by the order in which they came, which this command keeps
        with store.cursor() as cur: cur.execute('VACUUM')
        assert [r['id'] for r in store.list()] == ids[::-1]

@pytest.mark.parametrize('limit,n', [(0, 0), (1, 1), (3, 3), (5, 5), (100, 5), (None, 5)])
def test_list_has_a_limit(store, limit, n):
    add_ids(store, *'abcde')
    assert len(store.list(limit)) == n

def test_the_default_limit_is_100(store):
    def many(cur, now): [cur.execute(f"INSERT INTO tenant_jobs (id, job_type, status, created_at) VALUES ('{i}', 't', 'pending', '{timestamp(now)}')") for i in range(103)]
    store.write(many)
    assert len(store.list()) == 100 and len(store.list(None)) == 103

@pytest.mark.parametrize('text', hostile)
def test_filters_are_bound(store, text):
    add_ids(store, 'a', 'b')
    assert store.list(job_type=text) == store.list(status=text) == store.list(job_type=text, status=text) == []
    assert len(store.list()) == 2

def test_filters_are_joined_by_and(store):
    add(store, id='a', job_type='x'); add(store, id='b', job_type='y'); add(store, id='c', job_type='x')
    store.claim_one('a', 'tok', 'w', 30)
    assert [[r['id'] for r in store.list(**f)] for f in (dict(job_type='x'), dict(status='pending'), dict(job_type='x', status='pending'))] == [['c', 'a'], ['c', 'b'], ['c']]

# --- Claim

def test_claims_go_by_priority_then_run_at_then_id(store):
    early, late = later(-60), later(-30)
    for i, p, at in (('d', 2, late), ('c', 2, early), ('b', 2, early), ('a', 1, early), ('e', 4, late), ('f', 3, late)): add(store, id=i, priority=p, run_at=at)
    assert [claimed(store, 1) for _ in range(7)] == [['e'], ['f'], ['b'], ['c'], ['d'], ['a'], []]

def test_a_claim_returns_its_rows_in_that_order_too(store):
    for i, p in zip('abcd', (1, 3, 2, 4)): add(store, id=i, priority=p)
    assert claimed(store, 3) == ['d', 'b', 'c'] and claimed(store, 3) == ['a']

values = [v for v in hostile if not {'\x00', '\ud800'} & {*v}] + ['{"n":1}', '{"n":"\\u0000"}', '[', '3.10', "don't", '\t\n\x1f\x7f', 'a"b\\c']
@pytest.mark.parametrize('text', values, ids=range(len(values)))
def test_a_claimed_row_is_as_it_was_written(store, text):
    add(store, id='a', payload=text, timeout=7, triggered_by=None)
    sql(store, 'UPDATE tenant_jobs SET details = :t', t=text)
    [row] = claim(store)
    assert row.items() <= store.get('a').items() and (row['payload'], row['details'], row['timeout'], row['triggered_by']) == (text, text, 7, None)

@pytest.mark.parametrize('damage', ["x'7b7d'", "x'ff00'", '9e999', '1e300', '0.1', "x''"])
def test_a_damaged_row_is_claimed_like_its_neighbours(new_sqlite, damage):
    store = Store(new_sqlite())  # the columns of PostgreSQL have types
    add_ids(store, 'a', 'b', 'c')
    sql(store, f"UPDATE tenant_jobs SET payload = {damage}, triggered_by = {damage} WHERE id = 'b'")
    [(was,)] = sql(store, "SELECT payload FROM tenant_jobs WHERE id = 'b'")
    got = claim(store)
    assert [r['id'] for r in got] == ['a', 'b', 'c'] and got[1]['payload'] == as_text(was) == got[1]['triggered_by']

def test_a_row_whose_id_is_no_text_is_nobodys(new_sqlite):
    "SQLite keeps what it is given; an update finds such a row by no text, and it would be begun again and again"
    store = Store(new_sqlite())
    add_ids(store, 'a', 'b')
    sql(store, "UPDATE tenant_jobs SET id = x'ff01' WHERE id = 'a'")
    assert claimed(store) == ['b'] and claimed(store) == []
    store.close()

@pytest.mark.parametrize('new_url', ['sqlite'], indirect=True)
def test_a_job_whose_row_does_not_change_is_not_begun(new_url):
    store = Store(new_url())
    add_ids(store, 'a', 'b')
    sql(store, "CREATE TRIGGER keep BEFORE UPDATE ON tenant_jobs WHEN old.id = 'a' BEGIN SELECT RAISE(IGNORE); END")
    with pytest.raises(DatabaseCorrupt, match='1 of 2 jobs could be claimed'): claim(store)
    with pytest.raises(DatabaseCorrupt): store.claim_one('a', 't', 'w', 30)
    assert store.get('b')['status'] == 'pending' and store.claim_one('b', 't', 'w', 30)['status'] == 'running'
    store.close()

def test_rows_that_are_too_long_for_one_text_are_claimed(new_sqlite):
    store = Store(new_sqlite())
    add_ids(store, 'a', 'b', 'c', payload='x'*50_000)
    store._writer.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    assert [(r['id'], len(r['payload'])) for r in claim(store)] == [(i, 50_000) for i in 'abc']

def test_a_claim_moves_to_running(store):
    add(store, id='a', payload='{"x":1}')
    (row,) = claim(store, token='tok', worker='me', lease=20)
    got = store.get('a')
    assert {k: got[k] for k in row} == row
    assert (got['status'], got['attempt'], got['claim_token'], got['worker'], got['retry_count']) == ('running', 1, 'tok', 'me', 0)
    assert abs(seconds(got['started_at']) - time.time()) < 2 and abs(seconds(got['lease_until']) - time.time() - 20) < 2

def test_a_job_that_is_not_due_is_not_claimed(store):
    add(store, id='a', run_at=later(60)); add(store, 60, id='b'); add(store, id='c')
    assert claimed(store) == ['c'] and claimed(store) == []

def test_a_job_without_run_at_is_due(store):
    add(store, id='a')
    sql(store, 'UPDATE tenant_jobs SET run_at = NULL')
    assert store.next_due(('t',), ())[0] <= 0 and claimed(store) == ['a']

def test_only_registered_names_are_claimed(store):
    for i, t in zip('abc', ('t', 'u', 'T')): add(store, id=i, task=t)
    assert claimed(store, names=()) == [] and claimed(store, names=('t',)) == ['a'] and claimed(store, names=('t', 'u')) == ['b']
    assert store.get('c')['status'] == 'pending' and store.get('c')['attempt'] == 0

@pytest.mark.parametrize('name', [h for h in hostile if h and '\x00' not in h and '\ud800' not in h])
def test_names_are_bound(store, name):
    add(store, id='a'); add(store, id='b', task=name)
    assert claimed(store, names=(name,), old=(name,)) == ['b']

def test_a_row_without_a_task_is_found_through_its_old_job_type(store):
    add(store, id='a', task=None, job_type='sync'); add(store, id='b', task='other', job_type='sync'); add(store, id='c', task=None, job_type='t')
    assert store.next_due(('t',), ())[0] is None
    assert claimed(store, names=('t',), old=()) == [] and claimed(store, names=('t',), old=('sync',)) == ['a']

def test_claim_one_takes_its_job_whatever_run_at(store):
    add(store, id='a', run_at=later(3600), task='unknown'); add(store, id='b')
    assert store.claim_one('a', 'tok', 'w', 30)['claim_token'] == 'tok'
    assert store.get('b')['status'] == 'pending'

def test_claim_one_takes_only_a_pending_job(store):
    add(store, id='a')
    assert store.claim_one('nope', 'tok', 'w', 30) is None and store.claim_one('a', 'one', 'w', 30)
    assert store.claim_one('a', 'two', 'w', 30) is None and store.get('a')['claim_token'] == 'one'
    store.finish(store.get('a'), Outcome('completed'))
    assert store.claim_one('a', 'two', 'w', 30) is None

def test_each_job_is_claimed_exactly_once_by_many_threads(store):
    ids = [gen_id() for _ in range(200)]
    def many(cur, now): [cur.execute(f"INSERT INTO tenant_jobs (id, job_type, status, task, created_at) VALUES ('{i}', 't', 'pending', 't', '{timestamp(now)}')") for i in ids]
    store.write(many)
    others = [Store(store.url) for _ in range(3)]
    def work(i):
        mine, s = [], [store, *others][i%4]
        while rows := claim(s, 5, worker=f'w{i}'): mine += [(r['id'], f'w{i}') for r in rows]
        return mine
    got = dict(pairs := sum(ok(together(12, work)), []))
    # a claim that met only rows which others hold may have come back empty on PostgreSQL: the rest is left for the next
    while rest := claimed(store, 5): pairs += [(i, 'w') for i in rest]
    for s in others: s.close()
    assert sorted(i for i, _ in pairs) == sorted(ids)
    assert all(store.get(i)['worker'] == w and store.get(i)['attempt'] == 1 for i, w in list(got.items())[:20])

def test_one_job_goes_to_one_of_many_claimers(store):
    add(store, id='a')
    got = ok(together(16, lambda i: store.claim_one('a', f'tok{i}', 'w', 30)))
    assert [r['claim_token'] for r in got if r] == [store.get('a')['claim_token']]

# --- Finish

def begun(store, id='a', lease=30, worker='w', **job):
    add(store, id=id, **job)
    return store.claim_one(id, gen_id(), worker, lease)

@pytest.mark.parametrize('kind,status,failed,ended', [('completed', 'completed', 0, True), ('completed_with_warnings', 'completed_with_warnings', 0, True),
    ('failed', 'failed', 1, True), ('cancelled', 'cancelled', 0, True), ('retry', 'pending', 1, False), ('lost', 'pending', 1, False),
    ('snooze', 'pending', 0, False), ('release', 'pending', 0, False)])
def test_what_an_outcome_writes(store, kind, status, failed, ended):
    row = begun(store)
    assert store.finish(row, Outcome(kind, result='[1]' if ended else None, error='why', log='the trace', delay=40)) is True
    got = store.get('a')
    assert (got['status'], got['retry_count'], got['error_message'], got['error_log']) == (status, failed, 'why', 'the trace')
    assert (got['claim_token'], got['lease_until'], got['cancel_requested_at']) == (None, None, None)
    assert (got['completed_at'] is not None) == ended and got['result'] == ('[1]' if ended else None)
    if ended: assert abs(seconds(got['completed_at']) - time.time()) < 2 and got['run_at'] == row['run_at']
    else: assert abs(seconds(got['run_at']) - time.time() - 40) < 2
    (a,) = store.attempts('a')
    assert (a['job_id'], a['number'], a['outcome'], a['error'], a['worker'], a['started_at']) == ('a', 1, kind, 'why', 'w', row['started_at'])
    assert a['ended_at'] >= a['started_at'] and 0 <= a['waited'] < 2

def test_attempts_are_numbered_and_failures_add_up(store):
    add(store, id='a')
    for kind in ('retry', 'snooze', 'retry', 'completed'): assert store.finish(store.claim_one('a', gen_id(), 'w', 30), Outcome(kind))
    assert [(a['number'], a['outcome']) for a in store.attempts('a')] == [(1, 'retry'), (2, 'snooze'), (3, 'retry'), (4, 'completed')]
    assert store.get('a')['retry_count'] == 2

def test_a_success_keeps_the_last_trace_and_has_no_error(store):
    add(store, id='a')
    store.finish(store.claim_one('a', gen_id(), 'w', 30), Outcome('retry', error='why', log='trace'))
    store.finish(store.claim_one('a', gen_id(), 'w', 30), Outcome('completed', result='0'))
    got = store.get('a')
    assert (got['error_log'], got['error_message'], got['result']) == ('trace', None, '0')

def test_the_queue_wait_is_measured_from_the_due_time(store):
    row = begun(store, run_at=later(-5)) | dict(created_at=later(-500))
    store.finish(row, Outcome('completed'))
    assert 4.5 < store.attempts('a')[0]['waited'] < 7

def unchanged(store, id, write):
    before, parts = store.get(id), (store.attempts(id), store.logs(id))
    assert not write()
    assert store.get(id) == before and (store.attempts(id), store.logs(id)) == parts

@pytest.mark.parametrize('kind', ['completed', 'failed', 'retry', 'release'])
def test_a_finish_with_a_wrong_token_changes_nothing(store, kind):
    row = begun(store)
    for token in ('wrong', None, ''): unchanged(store, 'a', lambda: store.finish(row | dict(claim_token=token), Outcome(kind, result='1')))

def test_a_second_finish_changes_nothing(store):
    row = begun(store)
    assert store.finish(row, Outcome('completed', result='1'))
    unchanged(store, 'a', lambda: store.finish(row, Outcome('failed', error='late')))

def test_a_finish_after_the_rescue_changes_nothing(store):
    row = begun(store, lease=-1)
    store.rescue()
    unchanged(store, 'a', lambda: store.finish(row, Outcome('completed', result='1')))
    store.claim_one('a', gen_id(), 'other', 30)
    unchanged(store, 'a', lambda: store.finish(row, Outcome('completed', result='1')))

def test_one_of_many_finishes_is_recorded(store):
    row = begun(store)
    got = ok(together(12, lambda i: store.finish(row, Outcome('completed', result=str(i)))))
    assert got.count(True) == 1 and store.get('a')['result'] == str(got.index(True)) and len(store.attempts('a')) == 1

def test_the_last_note_is_written_with_the_finish(store):
    row = begun(store)
    assert store.finish(row, Outcome('completed'), store.note(row, (100, 'done'), '{"n":1}', [(1, later(0), 'info', 'hello', None)]))
    got = store.get('a')
    assert (got['progress_percent'], got['progress_message'], got['details']) == (100, 'done', '{"n":1}') and store.logs('a')[0]['message'] == 'hello'

def test_a_claim_takes_no_more_of_a_task_than_it_has_room_for(store):
    for n in range(3): add(store, id=f'a{n}', task='a')
    add(store, id='b', task='b')
    claim = lambda **of: sorted(r['id'] for r in store.claim(('a', 'b'), (), gen_id(), 'w', 30, 10, by_task=of))
    assert claim(a=0) == ['b'] and claim(a=1) == ['a0'] and claim(b=0) == ['a1', 'a2']

def test_those_behind_a_task_without_room_are_claimed_in_its_place(store):
    for n in range(5): add(store, id=f'a{n}', task='a')
    for n in range(2): add(store, id=f'b{n}', task='b')
    assert sorted(r['id'] for r in store.claim(('a', 'b'), (), gen_id(), 'w', 30, 3, by_task=dict(a=1))) == ['a0', 'b0', 'b1']

def test_a_last_attempt_is_claimed_only_if_its_task_can_start(store):
    for n in range(3): add(store, id=f'last{n}', task='a', max_retries=1)
    add(store, id='first', task='a')
    assert sorted(r['id'] for r in store.claim(('a',), (), gen_id(), 'w', 30, 10, by_task=dict(a=10), sure_of_task=dict(a=1))) == ['first', 'last0']

def test_a_last_attempt_is_claimed_only_if_its_queue_has_a_place(store):
    for n in range(3): add(store, id=f'last{n}', queue='q', max_retries=1)
    add(store, id='other', queue='q', max_retries=3)
    add(store, id='free', max_retries=1)
    assert sorted(claimed_with(store, by_queue=dict(q=10, default=10), sure_of_queue=dict(q=1))) == ['free', 'last0', 'other']

def test_neither_note_nor_finish_is_written_without_the_claim(store):
    row = begun(store) | dict(claim_token='wrong')
    unchanged(store, 'a', lambda: store.finish(row, Outcome('completed'), store.note(row, (100, 'done'), '{"n":1}', [(1, later(0), 'info', 'hello', None)])))

def test_a_note_keeps_what_it_does_not_say(store):
    row = begun(store)
    assert store.write(store.note(row, (10, 'one'), '{"a":1}')) and store.write(store.note(row, (None, 'two'))) and store.write(store.note(row, (0, None)))
    got = store.get('a')
    assert (got['progress_percent'], got['progress_message'], got['details'], got['status']) == (0, 'two', '{"a":1}', 'running')

def test_a_note_needs_the_claim(store):
    row = begun(store)
    line = [(1, later(0), 'info', 'x', None)]
    unchanged(store, 'a', lambda: store.write(store.note(row | dict(claim_token='wrong'), (5, 'x'), None, line)))
    store.finish(row, Outcome('completed'))
    unchanged(store, 'a', lambda: store.write(store.note(row, (5, 'x'), None, line)))

def test_logs_come_in_order_of_attempt_and_line(store):
    add(store, id='a')
    for _ in range(2):
        row = store.claim_one('a', gen_id(), 'w', 30)
        store.write(store.note(row, logs=[(n, later(0), 'info', f"{row['attempt']}.{n}", None) for n in (10, 2, 1)]))
        store.finish(row, Outcome('snooze'))
    assert [l['message'] for l in store.logs('a')] == ['1.1', '1.2', '1.10', '2.1', '2.2', '2.10']

@pytest.mark.parametrize('text', ['a\x00b', '\ud800 alone', '日本🚀', '\udcff'*50, 'x'*100_000])
def test_any_error_text_can_be_stored(store, text):
    line, log = describe(ValueError(text))
    assert store.finish(begun(store), Outcome('failed', error=line, log=log))
    got = store.get('a')
    assert got['error_message'].startswith('ValueError: ') and '\n' not in got['error_message'] and len(got['error_message']) <= 500
    assert store.attempts('a')[0]['error'] == got['error_message'] and len(got['error_log']) <= 32_000

# --- Heartbeat, rescue, next due

def test_a_heartbeat_renews_and_lists_only_its_own(store):
    mine, other, gone = begun(store, 'a', 1), begun(store, 'b', 1, 'other'), begun(store, 'c', 1)
    store.finish(gone, Outcome('completed'))
    assert store.heartbeat('w', 50) == {('a', mine['claim_token']): False}
    assert abs(seconds(store.get('a')['lease_until']) - time.time() - 50) < 2
    assert store.get('b')['lease_until'] == other['lease_until'] and store.get('c')['lease_until'] is None

def test_a_heartbeat_does_not_list_what_was_rescued(store):
    begun(store, lease=-1)
    store.rescue()
    assert store.heartbeat('w', 50) == {} and store.get('a')['lease_until'] is None

def test_a_heartbeat_reads_cancel_requests(store):
    a, b = begun(store, 'a'), begun(store, 'b')
    sql(store, "UPDATE tenant_jobs SET cancel_requested_at = :at WHERE id = 'a'", at=later(0))
    assert store.heartbeat('w', 50) == {('a', a['claim_token']): True, ('b', b['claim_token']): False}

def test_a_live_lease_is_not_rescued(store):
    begun(store, lease=30)
    assert store.rescue() == [] and store.get('a')['status'] == 'running'

def test_an_expired_lease_is_rescued_and_the_attempt_counts(store):
    begun(store, lease=-1, worker='dead')
    ((row, o),) = store.rescue()
    got = store.get('a')
    assert (row['id'], o.kind) == ('a', 'lost') and (got['status'], got['retry_count'], got['claim_token'], got['lease_until']) == ('pending', 1, None, None)
    assert 'worker_lost' in got['error_message'] and 'dead' in got['error_message'] and store.attempts('a')[0]['outcome'] == 'lost'
    assert store.rescue() == [] and store.get('a')['lost'] == 1
    assert claimed(store) == [] and claimed(store, suspects=True) == ['a'] and store.get('a')['attempt'] == 2  # a suspect is claimed apart

def test_a_running_job_of_0_9_14_gets_its_attempt_back(store):
    add(store, id='a')
    sql(store, "UPDATE tenant_jobs SET status = 'running', started_at = :at, task = NULL, run_at = NULL", at=later(-99))
    ((row, o),) = store.rescue()
    got = store.get('a')
    assert o.kind == 'release' and (got['status'], got['retry_count'], got['claim_token']) == ('pending', 0, None) and claimed(store) == ['a']

def test_a_job_of_0_9_14_on_its_last_attempt_is_not_failed_by_the_rescue(store):
    add(store, id='a', retry_count=2)
    sql(store, "UPDATE tenant_jobs SET status = 'running', started_at = NULL, task = NULL, run_at = NULL")
    assert [o.kind for _, o in store.rescue()] == ['release'] and store.get('a')['retry_count'] == 2 and claimed(store) == ['a']

def test_a_lease_further_ahead_than_any_can_be_has_expired(store):
    begun(store, 'a', max_lease + 60); begun(store, 'b', max_lease - 60)
    assert [r['id'] for r, _ in store.rescue()] == ['a'] and store.get('b')['status'] == 'running'

def test_next_due_sees_a_lease_too_far_ahead_behind_a_live_one(store):
    begun(store, 'a', max_lease + 60)
    assert store.next_due(('t',), ())[1] <= 0
    begun(store, 'b', 30)
    assert store.next_due(('t',), ())[1] <= 0

def test_what_is_due_is_due_whenever_it_was_created(store):
    add_ids(store, 'a', 'b')
    sql(store, 'UPDATE tenant_jobs SET run_at = NULL, created_at = :at', at=later(300))
    assert store.next_due(('t',), ())[0] <= 0
    sql(store, "UPDATE tenant_jobs SET status = 'running', task = NULL WHERE id = 'a'")
    assert store.next_due(('t',), ())[1] <= 0

def test_a_job_that_loses_its_worker_again_and_again_fails(store):
    add(store, id='a', max_retries=3)
    for _ in range(3):
        store.claim_one('a', gen_id(), 'w', -1)
        store.rescue()
    got = store.get('a')
    assert (got['status'], got['retry_count']) == ('failed', 3) and got['completed_at'] and got['error_message'].startswith('worker_lost')
    assert [a['outcome'] for a in store.attempts('a')] == ['lost', 'lost', 'failed']

@pytest.mark.parametrize('n', [0, 1, None])
def test_a_single_attempt_that_is_lost_fails(store, n):
    begun(store, lease=-1, max_retries=n)
    assert [o.kind for _, o in store.rescue()] == ['failed'] and store.get('a')['status'] == 'failed'

def test_a_rescue_takes_at_most_n(store):
    for i in 'abc': begun(store, i, -1)
    assert [len(store.rescue(2)) for _ in range(3)] == [2, 1, 0]

def test_many_rescuers_rescue_each_job_once(store):
    for i in range(20): begun(store, f'{i:02}', -1)
    other = Store(store.url)
    got = sum(ok(together(8, lambda i: [store, other][i%2].rescue())), []) + store.rescue()
    other.close()
    assert sorted(r['id'] for r, _ in got) == [f'{i:02}' for i in range(20)]
    assert {r['retry_count'] for r in store.list()} == {1}

def test_next_due_of_nothing(store):
    assert store.next_due(('t',), ('t',)) == store.next_due((), ()) == (None, None)

def test_next_due_says_when(store):
    add(store, 40, id='a'); add(store, 20, id='b'); add(store, id='c', task='unknown')
    due, lease = store.next_due(('t',), ())
    assert 18 < due <= 20.1 and lease is None
    begun(store, 'd', 10); begun(store, 'e', 30)
    due, lease = store.next_due(('t',), ())
    assert 18 < due <= 20.1 and 8 < lease <= 10.1
    add(store, id='f', run_at=later(-7))
    assert -9 < store.next_due(('t',), ())[0] <= -6.9
    begun(store, 'g', -5)
    assert store.next_due(('t',), ())[1] < 0

# --- The table's own rules

@pytest.mark.parametrize('change', ["status = 'processing'", "status = ''", "status = 'Pending'", "status = NULL", "status = 'completed'", "status = 'failed'", "status = 'cancelled'",
    "status = 'completed_with_warnings'", "completed_at = '2026-01-01T00:00:00.000000'", 'progress_percent = 101', 'progress_percent = -1', 'priority = 0', 'priority = 5', 'priority = 9',
    'priority = NULL', 'job_type = NULL', 'queue = NULL', 'id = NULL'])
def test_the_table_refuses(store, change):
    add(store, id='a')
    before = store.get('a')
    with pytest.raises(sa.exc.IntegrityError): sql(store, f'UPDATE tenant_jobs SET {change}')
    assert store.get('a') == before

def test_the_table_refuses_a_bad_new_row(store):
    for status, ended in (('processing', None), ('completed', None), ('running', later(0))):
        with pytest.raises(sa.exc.IntegrityError):
            sql(store, 'INSERT INTO tenant_jobs (id, job_type, status, completed_at) VALUES (:i, :i, :s, :e)', i='a', s=status, e=ended)
    assert store.list() == []

def parts(store, *ids): return [(len(store.attempts(i)), len(store.logs(i))) for i in ids]

def ended(store, *ids):
    "Completed jobs with an attempt and a log line each"
    for id in ids:
        row = begun(store, id)
        store.finish(row, Outcome('completed'), store.note(row, logs=[(1, later(0), 'info', 'x', None)]))

def is_lite(store): return store.engine.dialect.name == 'sqlite'

def delete_elsewhere(store, where):
    "How many jobs somebody else deletes: he asks SQLite for no foreign keys, and has another search path on PostgreSQL"
    url = sa.make_url(store.url)
    if is_lite(store): conn, table = sqlite3.connect(url.database, isolation_level=None), 'tenant_jobs'
    else: conn, table = psycopg.connect(url.set(drivername='postgresql').render_as_string(False), autocommit=True, options='-c search_path=pg_catalog'), 'public.tenant_jobs'
    with closing(conn): return conn.execute(f'DELETE FROM {table} WHERE {where}').rowcount

def test_attempts_and_logs_go_with_their_job(store):
    ended(store, 'a', 'b', 'c')
    sql(store, "DELETE FROM tenant_jobs WHERE id = 'a'")
    assert parts(store, 'a', 'b', 'c') == [(0, 0), (1, 1), (1, 1)]
    assert delete_elsewhere(store, "id = 'b'") == 1
    assert parts(store, 'b', 'c') == [(0, 0), (1, 1)]
    sql(store, 'DELETE FROM tenant_jobs')
    assert parts(store, 'c') == [(0, 0)]

def test_who_empties_the_table_empties_those_beside_it(new_pg):
    store = Store(new_pg())
    for which in ('tenant_jobs', 'tenant_jobs, tenant_job_attempts, tenant_job_logs'):
        ended(store, 'a', 'b')
        sql(store, f'TRUNCATE {which}')
        assert parts(store, 'a', 'b') == [(0, 0), (0, 0)]
    store.close()

def test_a_deletion_that_meets_the_end_of_its_job_leaves_no_attempt(store):
    row = begun(store)
    deleted = []
    t = threading.Thread(target=lambda: deleted.append(delete_elsewhere(store, "id = 'a'")))
    def op(cur, now):
        assert store.finishing(row, Outcome('completed'))(cur, now)
        t.start()  # waits for the lock of the row, or of the file
        time.sleep(0.3)
        return not deleted
    assert store.write(op)
    t.join(10)
    assert deleted == [1] and parts(store, 'a') == [(0, 0)]

def test_tables_of_schema_6_lose_what_costs_each_attempt(new_url):
    store = Store(url := new_url())
    lite, keys = is_lite(store), lambda: [len(sa.inspect(store.engine).get_foreign_keys(f'tenant_job_{p}')) for p in ('attempts', 'logs')]
    assert keys() == [0, 0]
    for part, more in (('attempts', 'number INTEGER, started_at VARCHAR, ended_at VARCHAR, outcome VARCHAR, error VARCHAR, worker VARCHAR, waited FLOAT, PRIMARY KEY (job_id, number)'),
            ('logs', 'attempt INTEGER, line INTEGER, at VARCHAR, level VARCHAR, message VARCHAR, item VARCHAR, PRIMARY KEY (job_id, attempt, line)')):
        sql(store, f'DROP TABLE tenant_job_{part}')
        sql(store, f'CREATE TABLE tenant_job_{part} (job_id VARCHAR NOT NULL REFERENCES tenant_jobs (id) ON DELETE CASCADE, {more})')
    if lite: sql(store, 'DROP TRIGGER tenant_job_parts')
    else: sql(store, 'DROP FUNCTION tenant_job_parts_delete, tenant_job_parts_truncate CASCADE')
    sql(store, "UPDATE fh_saas_meta SET value = '6' WHERE key = 'schema:tenant_jobs'")
    ended(store, 'a', 'b')
    store.close()
    store = Store(url)
    assert sql(store, "DELETE FROM tenant_jobs WHERE id = 'a'") == delete_elsewhere(store, "id = 'b'") == 1
    assert parts(store, 'a', 'b') == [(0, 0), (0, 0)]
    assert keys() == ([1, 1] if lite else [0, 0])
    ended(store, 'c')
    assert parts(store, 'c') == [(1, 1)]
    store.close()

def test_what_ends_is_found_by_its_key_however_much_runs(new_pg):
    "The planner's figures are of a time when nothing ran"
    store, read = Store(new_pg()), []  # rows of the table that this connection has read so far
    store.write(Adding(store, [dict(id=f'{i:04}', job_type='t', task='t') for i in range(3000)]))
    def op(cur, now):
        finish(cur, now)
        read.append(cur.execute("SELECT coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables WHERE relname = 'tenant_jobs'").fetchone()[0])
    rows = claim(store, 3000)
    for k in range(0, 3000, 100):
        finish = store.finishing_all([(r, Outcome('completed', result='1'), None) for r in rows[k:k+100]])
        store.write(op)
    assert max(b - a for a, b in pairwise(read)) <= 200 and len(store.list(5000, status='completed')) == 3000
    store.close()

# --- Group commit

def in_one_batch(store, ops):
    "Results of `ops`, called in threads, all of whose writes are waiting when the first is committed"
    with store._turn, ThreadPoolExecutor(len(ops)) as pool:
        futures = [pool.submit(op) for op in ops]
        wait_until(lambda: len(store._queue) == len(ops))
        store._pass_on()
        try: return [f.exception() or f.result() for f in futures]
        finally: store._turn.acquire()

def test_an_op_that_raises_harms_only_itself(store):
    add(store, id='dup')
    ids = ['dup' if i%5 == 0 else f'{i:02}' for i in range(20)]
    got = in_one_batch(store, [lambda i=i: add(store, id=i) for i in ids])
    assert ['IntegrityError' in (c.__name__ for c in type(g).__mro__) for g in got] == [i == 'dup' for i in ids]
    assert sorted(r['id'] for r in store.list()) == sorted({*ids})

def test_an_op_that_raises_after_it_wrote_writes_nothing(store):
    def half(cur, now):
        cur.execute("INSERT INTO tenant_jobs (id, job_type, status) VALUES ('half', 't', 'pending')")
        raise RuntimeError('enough')
    got = in_one_batch(store, [lambda: add(store, id='a'), lambda: store.write(half), lambda: add(store, id='b')])
    assert [type(g) for g in got] == [dict, RuntimeError, dict] and {r['id'] for r in store.list()} == {'a', 'b'}

def test_many_threads_adding_some_twice(store):
    ids = [f'{i//2 if i%8 < 2 else 1000+i:04}' for i in range(64)]
    got = together(16, lambda t: [add_or_error(store, ids[i]) for i in range(t, 64, 16)])
    flat = sum(ok(got), [])
    assert sum(isinstance(g, dict) for g in flat) == len({*ids}) == len(store.list(None))

def add_or_error(store, id):
    try: return add(store, id=id)
    except Exception as e: return e

def test_what_write_returns_is_committed(store):
    other = Store(store.url)
    for i in range(10):
        add(store, id=f'{i}')
        assert other.get(f'{i}')['status'] == 'pending'
    other.close()

def test_writes_return_their_own_results(store):
    got = in_one_batch(store, [lambda i=i: store.write(lambda cur, now: i) for i in range(10)])
    assert got == list(range(10))

def test_forty_threads_write_without_error(store):
    def work(i):
        for k in range(10):
            add(store, id=f'{i}.{k}')
            assert store.finish(store.claim_one(f'{i}.{k}', gen_id(), 'w', 30), Outcome('completed'))
    ok(together(40, work))
    assert len(store.list(None, status='completed')) == 400

def test_a_connection_that_died_is_replaced(new_pg):
    store = Store(new_pg())
    add(store, id='a')
    pid = sql(store, 'SELECT pg_backend_pid()')[0][0]
    killer = open_engine(store.url)
    with writing(killer) as conn: conn.execute(sa.text('SELECT pg_terminate_backend(:p)'), dict(p=pid))
    killer.dispose()
    add(store, id='b')
    assert len(store.list()) == 2
    store.close()

def test_one_statement_is_one_trip_to_a_server(new_pg, statements):
    store = Store(new_pg())
    add(store, id='a')
    statements.clear()
    add(store, id='b')
    with pytest.raises(psycopg.errors.UniqueViolation): add(store, id='b')
    add(store, id='c')
    assert [s.split()[0] for s in statements] == ['INSERT']*3
    assert [j['id'] for j in store.list()] == ['c', 'b', 'a']
    store.close()

def test_a_connection_that_is_told_to_end_just_now_is_replaced(new_pg, pg_server):
    store = Store(url := new_pg())
    with psycopg.connect(pg_server, autocommit=True) as killer:
        for n in range(40):
            add(store, id=str(n))
            killer.execute('SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s', [sa.make_url(url).database])
            add(store, id=f'{n} again')
    assert len(store.list(None)) == 80
    store.close()

class Forgetful:
    "Something between a client and its server that forgets connections: who goes on sending is told so by a reset"
    def __init__(self, host, port):
        self.to, self.pairs, self.door = (host, port), [], socket.create_server(('127.0.0.1', 0))
        self.port = self.door.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()
    def serve(self):
        while True:
            try: client, _ = self.door.accept()
            except OSError: return
            self.pairs.append((client, server := socket.create_connection(self.to)))
            for pair in ((client, server), (server, client)): threading.Thread(target=self.carry, args=pair, daemon=True).start()
    def carry(self, a, b):
        try:
            while data := a.recv(65536): b.sendall(data) if (a, b) in self.pairs or (b, a) in self.pairs else a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)) or a.close()
        except OSError: return
    def forget(self): self.pairs = []
    def close(self):
        for client, _ in self.pairs: client.shutdown(socket.SHUT_RDWR)

def test_a_connection_that_something_between_has_forgotten_is_replaced(new_pg):
    u = sa.make_url(new_pg())
    between = Forgetful(u.host or '127.0.0.1', u.port or 5432)
    store = Store(u.set(host='127.0.0.1', port=between.port))
    add(store, id='a')
    for use in (lambda: store.get('a'), lambda: add(store), lambda: store.by_status(), lambda: add(store)):
        time.sleep(Clock.believed + 0.1)
        between.forget()
        assert use() and use() and use()
        between.close()
        time.sleep(0.05)
        assert use()
    store.close()
    between.door.close()

def test_a_spare_connection_to_a_file_that_was_replaced_is_not_written_to(new_sqlite):
    store, other = Store(url := new_sqlite()), Store(new_sqlite())
    stale = connect(url)
    add(store, id='a')
    store._drop()
    os.replace(other.url.database, store.url.database)
    store.list()
    store._spare.append(stale)  # a reader that had passed the check gives it back
    add(store, id='b')
    assert [j['id'] for j in Store(url).list()] == ['b']

def test_a_connection_that_ends_in_the_middle_is_an_error_for_its_caller(new_pg):
    store = Store(new_pg())
    add(store, id='a')
    with pytest.raises(DatabaseUnavailable, match='terminating'): store.write(lambda cur, now: cur.execute('SELECT pg_terminate_backend(pg_backend_pid())'))
    add(store, id='b')
    assert len(store.list()) == 2
    store.close()

@given(drift=st.floats(-3e-4, 3e-4), steps=st.lists(st.tuples(st.floats(0, 3), st.none() | st.floats(0, 0.5)), max_size=60))
def test_a_server_clock_is_never_ahead_and_never_goes_back(drift, steps):
    clock, here, last = Clock(), [500.0], 0.0
    server = lambda: 1e6 + here[0]*(1 + drift)
    with patch.object(drivers, 'time', SimpleNamespace(monotonic=lambda: here[0], time=lambda: here[0])):
        for wait, way in steps:
            here[0] += wait
            if way is not None:  # asked: the answer is on its way for so long
                said, asked = server(), here[0]
                here[0] += way
                clock.hear(said, asked)
            if (at := clock.read()) is not None:
                assert last - 1e-6 <= at <= server() + 1e-6
                last = at
    if steps and (steps[-1][1] or 1) < Clock.slow: assert last >= server() - Clock.slow

def test_a_server_clock_is_not_believed_after_a_sleep():
    clock, slept = Clock(), [0.0]
    with patch.object(drivers, 'time', SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + slept[0])):
        clock.hear(1000.0, time.monotonic())
        assert 1000.0 <= clock.read() < 1001
        slept[0] = 3600.0  # the machine slept for an hour that its monotonic clock has not counted
        assert clock.read() is None

# --- The database as a whole

def test_a_locked_database_ends_in_bounded_time(new_url):
    store = Store(url := new_url(), busy=0.3)
    other = open_engine(url)
    with writing(other) as conn:
        conn.exec_driver_sql('SELECT 1' if store.url.get_backend_name() == 'sqlite' else 'LOCK TABLE tenant_jobs IN ACCESS EXCLUSIVE MODE')
        start = time.monotonic()
        with pytest.raises(DatabaseBusy, match='write lock'): add(store, id='a')
        assert time.monotonic() - start < 3
    assert store.list() == [] and add(store, id='b')
    store.close(); other.dispose()

def test_many_writers_of_a_locked_database_all_end(new_sqlite):
    store = Store(url := new_sqlite(), busy=0.3)
    other = open_engine(url)
    with writing(other):
        start = time.monotonic()
        got = together(12, lambda i: add(store, id=f'{i}'))
        assert {type(g) for g in got} == {DatabaseBusy} and time.monotonic() - start < 20
    assert store.list() == []
    store.close(); other.dispose()

@contextmanager
def _lent(path):
    "The lock is free for 45 of each 100 ms, and never when somebody comes who asks as SQLite does: after 328 ms, and each 100 from there on"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute('BEGIN IMMEDIATE')
        def lend(start=time.monotonic()):
            for n in range(4):
                time.sleep(max(0, start + 0.355 + n*0.1 - time.monotonic()))
                other.execute('ROLLBACK')
                time.sleep(0.045)
                other.execute('BEGIN IMMEDIATE')
            time.sleep(0.8)
        (t := threading.Thread(target=lend)).start()
        try: yield
        finally: t.join()

@pytest.mark.parametrize('way', ['a statement of ours', 'a commit of ours', 'a short transaction'])
def test_who_waits_for_the_lock_asks_as_often_as_who_comes_new(new_sqlite, way):
    "Among many who write it was the oldest who waited on, until it was too late"
    store, eng = Store(url := new_sqlite(), busy=1), open_engine(url, busy=1)
    store.write(lambda cur, now: None)
    with reading(eng): pass
    with _lent(sa.make_url(url).database):
        if way == 'a statement of ours': add(store, id='a')
        elif way == 'a commit of ours': store.add_many([dict(id=i, job_type='x') for i in 'ab'])
        else:
            with writing(eng) as conn: conn.exec_driver_sql("INSERT INTO tenant_jobs (id, job_type, status) VALUES ('a', 'x', 'pending')")
    assert store.get('a')['status'] == 'pending'
    store.close(); eng.dispose()

def test_an_interrupt_in_the_moment_the_lock_comes_locks_nobody_out(new_url):
    store, other = Store(url := new_url(), busy=0.5), Store(url, busy=0.5)
    begin = store.kind.begin
    def interrupted(*args):
        begin(*args)
        raise KeyboardInterrupt
    store.kind.begin = interrupted
    with pytest.raises(KeyboardInterrupt): store.write(lambda cur, now: None)
    store.kind.begin = begin
    assert add(other, id='b') and add(store, id='c')
    assert {r['id'] for r in store.list()} == {'b', 'c'}
    store.close(); other.close()

def test_a_lone_job_is_one_statement_that_commits_itself(new_sqlite):
    store, asked = Store(new_sqlite()), []
    add(store, id='a')
    store._writer.set_trace_callback(asked.append)
    add(store, id='b')
    assert [s.split()[0] for s in asked] == ['INSERT'] and not store._writer.in_transaction
    with pytest.raises(sqlite3.IntegrityError): add(store, id='b')
    store.add_many([dict(id=i, job_type='x') for i in 'cd'])
    assert [s.split()[0] for s in asked[1:]] == ['INSERT', 'BEGIN', 'INSERT', 'COMMIT'] and {r['id'] for r in store.list()} == {*'abcd'}
    store.close()

def test_a_lone_job_that_waited_for_the_lock_has_the_moment_at_which_it_got_it(new_sqlite):
    store = Store(url := new_sqlite(), busy=5)
    with closing(sqlite3.connect(sa.make_url(url).database, isolation_level=None, check_same_thread=False)) as other:
        other.execute('BEGIN IMMEDIATE')
        begun = time.time()
        (t := threading.Timer(0.6, other.execute, ['COMMIT'])).start()
        add(store, id='a')
        t.join()
    assert seconds(store.get('a')['created_at']) > begun + 0.4
    store.close()

def test_an_outcome_and_its_attempt_are_there_together_or_not_at_all(store):
    add(store, id='a')
    row, asked = store.claim_one('a', 'token', 'w', 30), []
    op = store.finishing_all([(row, Outcome('completed', result='1'), None)])
    if isinstance(store.kind, SQLite):
        store._writer.set_trace_callback(asked.append)
        store.write(op)
        assert [s.split()[0] for s in asked] == ['BEGIN', 'UPDATE', 'INSERT', 'COMMIT']
    else: assert op.single and store.write(op) is None
    assert store.get('a')['status'] == 'completed' and [a['outcome'] for a in store.attempts('a')] == ['completed']

@pytest.mark.parametrize('how', ['the connection is replaced', 'nothing is rolled back'])
def test_a_transaction_that_an_interrupt_has_left_open_swallows_no_job(new_sqlite, monkeypatch, how):
    store, other = Store(url := new_sqlite(), busy=0.5), Store(url, busy=0.5)
    def op(cur, now): raise KeyboardInterrupt
    def undo(lazy): raise KeyboardInterrupt  # and another one, at the worst moment
    if how == 'nothing is rolled back': monkeypatch.setattr(store, '_undo', undo)
    else:
        class Interrupted:
            def __init__(self, conn): self.conn = conn
            def __getattr__(self, name): return getattr(self.conn, name)
            def rollback(self): raise KeyboardInterrupt
        store.write(lambda cur, now: None)
        store._writer = Interrupted(store._writer)
    with pytest.raises(KeyboardInterrupt): store.write(op)
    if how == 'the connection is replaced': assert add(other, id='c')  # nobody holds the lock any more
    monkeypatch.undo()
    add(store, id='a')
    assert other.get('a')['status'] == 'pending' and add(other, id='b')
    store.close(); other.close()

def test_who_waits_to_open_a_locked_file_does_not_wait_for_all_before_it(tmp_path):
    "One at a time opens a file"
    url, took = f'sqlite:///{tmp_path}/a.db', []
    conn = sqlite3.connect(f'{tmp_path}/a.db', isolation_level=None)  # another program's, not in WAL mode
    conn.execute('CREATE TABLE t (x)')
    conn.execute('BEGIN EXCLUSIVE')
    def opens(n):
        began = time.monotonic()
        with pytest.raises(DatabaseBusy), db_connect.db_errors(url): db_connect.connect(url, busy=1.0)
        return time.monotonic() - began
    with ThreadPoolExecutor(6) as pool: took = list(pool.map(opens, range(6)))
    assert 0.9 < min(took) and max(took) < 4  # and not six
    conn.execute('ROLLBACK')
    db_connect.connect(url, busy=1.0).close()
    conn.close()

def test_a_file_that_keeps_its_journal_is_opened_soon(tmp_path):
    conn = SimpleNamespace(execute=lambda sql: SimpleNamespace(fetchone=lambda: ('delete',)))
    began = time.monotonic()
    db_connect._wal(conn, 5.0)
    assert time.monotonic() < began + 1

def test_where_there_is_no_shared_memory_a_commit_waits_for_readers(new_sqlite, monkeypatch):
    "On such a file system SQLite keeps its rollback journal"
    monkeypatch.setattr(db_connect, '_wal', lambda conn, busy: None)
    store = Store(url := new_sqlite(), busy=5)
    with closing(sqlite3.connect(sa.make_url(url).database, isolation_level=None, check_same_thread=False)) as reader:
        assert reader.execute('PRAGMA journal_mode').fetchone() == ('delete',)
        reader.execute('BEGIN')
        reader.execute('SELECT * FROM tenant_jobs').fetchall()
        (t := threading.Timer(0.5, reader.execute, ['COMMIT'])).start()
        add(store, id='a')
        t.join()
    assert store.get('a')['status'] == 'pending'
    store.close()

def test_a_full_database_says_so_and_writes_nothing(new_sqlite):
    store = Store(new_sqlite())
    store.write(lambda cur, now: None)  # opens the connection that writes
    store._writer.execute(f'PRAGMA max_page_count={store._writer.execute("PRAGMA page_count").fetchone()[0] + 2}')
    with pytest.raises(DatabaseFull, match='space'): add(store, id='a', payload='x'*200_000)
    assert store.list() == [] and add(store, id='b')
    store.close()

def test_a_read_only_database_says_so(new_sqlite):
    url = new_sqlite()
    store = Store(url); add(store, id='a'); store.close()
    path = sa.make_url(url).database
    con = sqlite3.connect(path); con.execute('PRAGMA wal_checkpoint(TRUNCATE)'); con.close()
    store = Store(f'sqlite:///file:{path}?mode=ro&uri=true')
    assert store.get('a')['status'] == 'pending'
    with pytest.raises(DatabaseReadOnly, match='permission'): add(store, id='b')
    store.close()

def test_a_file_that_is_no_database_says_so(tmp_path):
    (tmp_path/'bad.db').write_bytes(b'this is no database at all'*100)
    with pytest.raises(DatabaseCorrupt): Store(f"sqlite:///{tmp_path/'bad.db'}")
    assert (tmp_path/'bad.db').read_bytes() == b'this is no database at all'*100

def test_a_missing_file_is_not_made(tmp_path):
    with pytest.raises(DatabaseUnavailable): Store(f"sqlite:///{tmp_path/'none.db'}")
    with pytest.raises(DatabaseUnavailable): Store(f"sqlite:///{tmp_path/'no'/'folder.db'}")
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('url', ['sqlite://', 'sqlite:///:memory:', 'sqlite:///', 'sqlite:///file::memory:?uri=true', 'sqlite:///file:x?mode=memory&cache=shared&uri=true'])
def test_a_database_in_memory_is_refused_with_the_reason(url):
    with pytest.raises(UnsupportedDatabase, match='memory'): Store(url)

@pytest.mark.parametrize('url', ['', 'nonsense', 'mysql://u@h/x', 'postgresql://u@h', 'postgresql://u@h:port/x', None, 7, b'sqlite:///x.db', 'sqlite'])
def test_a_wrong_url_is_a_typed_error(url):
    with pytest.raises(InvalidDatabaseURL): Store(url)

def test_a_server_that_is_not_there_is_a_typed_error(pg_server):
    from conftest import free_port
    for u in (sa.make_url(pg_server).set(port=free_port()), sa.make_url(pg_server).set(database='no_such_database')):
        with pytest.raises(DatabaseUnavailable): Store(u, busy=1)

# --- The schema

def schema(url):
    eng = open_engine(url)
    with eng.connect() as conn:
        got = {t: [str(c['name']) for c in sa.inspect(conn).get_columns(t)] + sorted(i['name'] for i in sa.inspect(conn).get_indexes(t)) for t in sa.inspect(conn).get_table_names()}
    eng.dispose()
    return got

def test_sixteen_threads_make_the_tables_at_once(url):
    engines = [open_engine(url) for _ in range(16)]
    ok(together(16, lambda i: ensure_tables(engines[i])))
    for e in engines: e.dispose()
    assert {'tenant_jobs', 'tenant_job_attempts', 'tenant_job_logs'} <= set(schema(url))
    store = Store(url)
    assert add(store) and claim(store)
    store.close()

def test_a_newer_database_is_refused_and_unchanged(url):
    eng = open_engine(url)
    with writing(eng) as conn: write_meta(conn, **{'schema:tenant_jobs': 99})
    eng.dispose()
    before = schema(url)
    with pytest.raises(NewerDatabase, match='99.*upgrade'): Store(url)
    assert schema(url) == before and 'tenant_jobs' not in before

def test_system_jobs_and_tenant_jobs_can_share_a_database(store):
    other = Store(store.url, 'sys_jobs')
    add(store, id='a'); add(other, id='a')
    other.claim_one('a', 'tok', 'w', 30)
    assert store.get('a')['status'] == 'pending' and other.get('a')['status'] == 'running' and len(store.list()) == len(other.list()) == 1
    other.close()

def plan(store, key, last=...):
    s = next(s for (kind, k), s in _compiled.items() if kind == 'sqlite' and k[:2] == (key, 'tenant_jobs') and last in (..., k[-1]))
    with store.cursor() as cur: return ' | '.join(r[3] for r in cur.execute(f'EXPLAIN QUERY PLAN {s.sql}', [None]*s.sql.count('?')).fetchall())

def test_what_is_closed_or_not_served_is_not_due(store):
    for q, at in (('a', '2020-01-01T00:00:00.000000'), ('b', '2100-01-01T00:00:00.000000')): store.add(dict(id=q, job_type='t', task='t', queue=q, run_at=at, max_retries=3))
    def due(**kw): return store.next_due(('t',), (), **kw)[0]
    assert due() < 0 < due(closed=('a',)) and due(only=('b',)) > 0 > due(only=('a', 'b')) and due(only=('a',), closed=('a',)) is None
    mine, lapse, all_ = store.outlook(('t',), (), ('a',))
    assert mine > 0 and lapse is None and {q: d < 0 for q, d in all_.items()} == dict(a=True, b=False)

def test_claim_and_rescue_use_the_partial_indexes(new_sqlite):
    store = Store(new_sqlite())
    add_ids(store, 'a', 'b')
    sql(store, "UPDATE tenant_jobs SET run_at = NULL WHERE id = 'b'")
    store.next_due(('t',), ('t',)); claim(store, suspects=True); assert claimed(store) == ['b', 'a']; store.rescue(); store.heartbeat('w', 5)
    for suspects in (False, True, None):
        p = plan(store, 'candidates', suspects)
        assert 'ix_tenant_jobs_ready (queue=? AND priority=?' in p and 'TEMP B-TREE' not in p
        assert ('run_at<' in p) == (suspects is not None)
    for key in ('undated', 'waiting'): assert 'ix_tenant_jobs_ready (queue=? AND priority=? AND run_at=?' in plan(store, key), key
    assert 'SCAN tenant_jobs' not in plan(store, 'waiting')
    for key in ('lapsed', 'ahead', 'heartbeat'): assert 'ix_tenant_jobs_lease' in plan(store, key), key
    store.list()
    assert 'TEMP B-TREE' not in plan(store, 'list')  # the newest are the last rows
    store.close()

def opcodes(store, text, *args):
    with store.cursor() as cur: return {r[1] for r in cur.execute(f'EXPLAIN {text}', args).fetchall()}

def test_no_statement_makes_a_table_of_the_states(new_sqlite):
    "What the checks and the conditions of the indexes need is read off the row"
    store = Store(new_sqlite())
    assert 'OpenEphemeral' in opcodes(store, "SELECT 1 FROM tenant_jobs WHERE status IN ('failed', 'cancelled', 'running')")
    for text in ("INSERT INTO tenant_jobs (id, job_type) VALUES ('a', 't')", "UPDATE tenant_jobs SET status = 'completed', completed_at = 'now', claim_token = NULL WHERE id = 'a'"):
        assert 'OpenEphemeral' not in opcodes(store, text), text
    store.close()

@pytest.mark.parametrize('state', ['lost', '', 'Completed'])
def test_the_table_knows_the_states_and_when_a_job_has_ended(store, state):
    add_ids(store, 'a')
    for values in (f"status = '{state}'", f"status = '{state}', completed_at = 'now'", "completed_at = 'now'", *(f"status = '{s}'" for s in Status if s in final), "status = 'running', completed_at = 'now'"):
        with pytest.raises(sa.exc.IntegrityError): sql(store, f'UPDATE tenant_jobs SET {values}')
    for s in Status: assert sql(store, f"UPDATE tenant_jobs SET status = '{s}', completed_at = {repr('now') if s in final else 'NULL'}") == 1

def test_a_table_of_schema_5_gets_the_cheaper_index(new_sqlite):
    store = Store(url := new_sqlite())
    add_ids(store, 'a')
    store.close()
    with closing(sqlite3.connect(sa.make_url(url).database, isolation_level=None)) as conn:
        conn.executescript("DROP INDEX ix_tenant_jobs_rare; UPDATE fh_saas_meta SET value = '5' WHERE key = 'schema:tenant_jobs';"
            "CREATE INDEX ix_tenant_jobs_few ON tenant_jobs (status) WHERE status IN ('failed', 'cancelled', 'completed_with_warnings')")
    store = Store(url)
    indexes = {i for i in schema(url)['tenant_jobs'] if i.startswith('ix_')}
    assert 'ix_tenant_jobs_rare' in indexes and 'ix_tenant_jobs_few' not in indexes and claimed(store) == ['a']
    store.close()

def test_a_claim_costs_the_same_however_many_jobs_have_ended(new_sqlite):
    store = Store(new_sqlite())
    def fill(cur, now):
        at = timestamp(now)
        cur.executemany("INSERT INTO tenant_jobs (id, job_type, status, task, created_at, completed_at) VALUES (?, 't', 'completed', 't', ?, ?)", [(f'{i:06}', at, at) for i in range(20_000)])
    store.write(fill)
    add(store, id='a')
    steps = []
    store._writer.set_progress_handler(lambda: steps.append(1), 1000)
    assert claimed(store) == ['a'] and len(steps) < 5
    store.close()

def test_a_connection_that_somebody_reads_with_is_not_kept_by_a_closed_store(store):
    with store.cursor() as cur:
        cur.execute('SELECT 1')
        store.close()
    assert store._spare == [] and store._writer is None
    assert store.list(1) == []  # the next use opens it again

def test_a_reader_waits_a_moment_for_the_connection_to_a_server(new_pg, monkeypatch):
    monkeypatch.setattr(connections, 'reader_waits', 20)
    store = Store(new_pg())
    add(store)  # the writer takes the connection of the set-up
    store._turn.acquire()
    threading.Timer(0.1, store._pass_on).start()
    assert len(store.list(1)) == 1 and store._spare == []
    monkeypatch.setattr(connections, 'reader_waits', 0.01)
    with store._turn: assert len(store.list(1)) == 1 and len(store._spare) == 1  # a long one keeps no reader waiting
    store.close()


@pytest.mark.parametrize('level', ['repeatable read', 'serializable'])
def test_a_limit_holds_whatever_a_database_has_for_its_default_isolation(new_pg, level):
    url = sa.make_url(new_pg()).set(drivername='postgresql')
    with psycopg.connect(url.render_as_string(False), autocommit=True) as conn: conn.execute(f"ALTER DATABASE {url.database} SET default_transaction_isolation = '{level}'")
    stores, most = [Store(url) for _ in range(4)], []
    stores[0].add_many([dict(id=str(n), job_type='t', task='t') for n in range(200)])
    for turn in range(10):
        at_once = threading.Barrier(4)
        def claim(s): at_once.wait(); return s.claim(('t',), ('t',), f'{turn}-{id(s)}', 'w', 30, 4, most=3)
        with ThreadPoolExecutor(4) as pool: most.append(sum(map(len, pool.map(claim, stores))))
        stores[0].write(lambda cur, now: cur.execute("UPDATE tenant_jobs SET status = 'cancelled', completed_at = started_at, claim_token = NULL, lease_until = NULL WHERE status = 'running'") and None)
    for s in stores: s.close()
    assert most == [3]*10

def test_a_url_may_say_options_of_its_own_and_they_do_not_take_ours_away(new_pg):
    url = sa.make_url(new_pg())
    its = url.update_query_dict(dict(options='-c default_transaction_isolation=serializable -c lock_timeout=1234', application_name='shop'))
    def shown(conn, what): return conn.execute(f'SHOW {what}').fetchone()[0]
    with closing(db_connect.connect(its)) as conn:
        assert [shown(conn, k) for k in ('transaction_isolation', 'lock_timeout', 'TimeZone', 'idle_in_transaction_session_timeout', 'application_name')] == ['read committed', '1234ms', 'UTC', '5s', 'shop']
    eng = db_connect.open_engine(its)
    with eng.connect() as conn: assert [conn.exec_driver_sql(f'SHOW {k}').scalar() for k in ('transaction_isolation', 'TimeZone')] == ['serializable', 'UTC']
    eng.dispose()

def test_no_statement_is_compiled_by_the_server_unless_the_url_says_so(new_pg):
    "The search for suspects among 250,000 jobs took 0.04 s, and its compilation 10 s"
    url = sa.make_url(new_pg())
    for u, jit in ((url, 'off'), (url.update_query_dict(dict(options='-c jit=on')), 'on')):
        with closing(db_connect.connect(u)) as conn: assert conn.execute('SHOW jit').fetchone() == (jit,)
        eng = db_connect.open_engine(u)
        with db_connect.reading(eng) as conn: assert conn.exec_driver_sql('SHOW jit').scalar() == jit
        eng.dispose()

@pytest.mark.skipif(not hasattr(socket, 'TCP_USER_TIMEOUT'), reason='Linux alone has such limits')
def test_a_server_that_vanishes_is_noticed(new_pg):
    "Nothing that it was sent is acknowledged: the statement under way would not end, and nobody else would have its turn"
    def limits(url):
        with closing(db_connect.connect(url)) as conn, socket.socket(fileno=os.dup(conn.fileno())) as s:
            return [s.getsockopt(socket.IPPROTO_TCP, o) for o in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)]
    url = sa.make_url(new_pg())
    assert limits(url) == [10, 3, 3, 15_000]
    assert limits(url.update_query_dict(dict(tcp_user_timeout='60000', keepalives_idle='20'))) == [20, 3, 3, 60_000]

@pytest.mark.parametrize('how', ["ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0", 'client_encoding'])
def test_text_is_text_whatever_encoding_a_server_has_for_its_default(new_pg, pg_server, how):
    url, text = sa.make_url(new_pg()), 'Grüße, 你好 ☃'
    with psycopg.connect(pg_server, autocommit=True) as conn:
        if how == 'client_encoding': conn.execute(f"ALTER DATABASE {url.database} SET client_encoding = 'LATIN1'")
        else: conn.execute(f'DROP DATABASE {url.database}'); conn.execute(f'CREATE DATABASE {url.database} {how}')
    store = Store(url)
    store.add(dict(id='a', job_type=text, task='t', payload='{}'))
    with store.transaction() as conn: assert conn.exec_driver_sql('SELECT job_type FROM tenant_jobs').scalar() == text
    assert store.get('a')['job_type'] == text
    store.close()

more_bins = f"{os.environ.get('PATH', '')}:/usr/sbin"  # where Debian has it
poolers = ['one that passes over them', *['pgbouncer']*bool(shutil.which('pgbouncer', path=more_bins))]

@contextmanager
def pgbouncer(url, folder):
    "Between us and a server, as the page on fleets says; its URL"
    port, ini = free_port(), folder/'pgbouncer.ini'
    ini.write_text(f"""[databases]
        * = host={url.host} port={url.port or 5432} user={url.username} {f"password='{url.password}'" if url.password else ''}
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = any
        pool_mode = session
        ignore_startup_parameters = options""".replace('\n        ', '\n'))
    server = subprocess.Popen([shutil.which('pgbouncer', path=more_bins), *['-u', 'postgres']*(os.getuid() == 0), '-q', str(ini)], cwd=folder)
    def answers():
        try: socket.create_connection(('127.0.0.1', port), 1).close(); return True
        except OSError: return False
    try: wait_until(answers, 10, 'pgbouncer did not start'); yield url.set(host='127.0.0.1', port=port)
    finally: server.terminate(); server.wait(10)

@pytest.fixture(params=poolers)
def pooled(request, new_pg, monkeypatch):
    "URL of a new database behind a pooler that does not pass on the options of a connection"
    url, connects = sa.make_url(new_pg()), psycopg.connect
    monkeypatch.setattr(db_connect, '_heard', {})
    if request.param != 'pgbouncer':
        monkeypatch.setattr(psycopg, 'connect', lambda *args, options=None, **kw: connects(*args, **kw))
        yield url
        return
    (folder := Path(tempfile.mkdtemp())).chmod(0o755)
    with pgbouncer(url, folder) as its: yield its
    shutil.rmtree(folder)

def test_settings_hold_behind_a_pooler(pooled):
    names = ['default_transaction_isolation', 'lock_timeout', 'TimeZone', 'jit', 'idle_in_transaction_session_timeout', 'synchronous_commit', 'application_name']
    url = pooled.update_query_dict(dict(options=r'--lock-timeout=1234 -c TimeZone=America/New\_York -c jit=on -c default_transaction_isolation=serializable', application_name='shop'))
    def shown(conn): return [conn.execute(f'SHOW {k}').fetchone()[0] for k in names]
    for _ in range(2):  # the second one may get the session of the first
        with closing(db_connect.connect(pooled, busy=3, lazy=True)) as conn: assert shown(conn) == ['read committed', '3s', 'UTC', 'off', '5s', 'off', 'fh_saas']
        with closing(db_connect.connect(url)) as conn: assert shown(conn) == ['read committed', '1234ms', 'America/New_York', 'on', '5s', 'on', 'shop']
        eng = db_connect.open_engine(url)
        with eng.connect() as conn: assert shown(own := conn.connection.driver_connection) == ['serializable', '1234ms', 'America/New_York', 'on', '0', 'on', 'shop'] and not own.autocommit
        eng.dispose()

def test_a_server_that_hears_what_it_is_asked_for_is_believed(new_pg, statements, monkeypatch):
    monkeypatch.setattr(db_connect, '_heard', {})
    url = new_pg()
    statements.clear()
    for _ in range(3): db_connect.connect(url).close()
    assert len(statements) == 1
    monkeypatch.setattr(db_connect, '_heard', {at: time.monotonic() - 1 for at in db_connect._heard})
    db_connect.connect(url).close()
    assert len(statements) == 2

def test_jobs_run_behind_a_pooler(pooled, new_manager):
    m = new_manager(pooled, handoff=0)
    ids = [m.submit('t', lambda: 1)[0] for _ in range(5)]
    assert {m.wait(i, 20).status for i in ids} == {'completed'}

def test_after_a_failover_the_next_connection_is_a_new_one(new_pg):
    store = Store(new_pg())
    def standby(cur, now): cur.execute("SET default_transaction_read_only = 'on'")
    store.write(standby)
    def add(id): store.add(dict(id=id, job_type='t', task='t', payload='{}'))
    with pytest.raises(DatabaseReadOnly, match='the server takes no writes: it is a standby'): add('a')
    add('b')
    assert [j['id'] for j in store.list(5)] == ['b']
    store.close()

def test_a_role_that_may_not_is_told_so(new_pg):
    url = sa.make_url(new_pg())
    with closing(db_connect.connect(url)) as conn, pytest.raises(DatabaseUnavailable, match='the role of the URL may not do this'):
        with db_connect.db_errors(url): conn.execute('SET ROLE pg_monitor'); conn.execute('CREATE TABLE pg_catalog.t (n int)')

def test_two_transactions_that_met_are_told_so(new_pg):
    url = sa.make_url(new_pg())
    with closing(db_connect.connect(url)) as a, closing(db_connect.connect(url)) as b:
        a.execute('CREATE TABLE t (n int)'); a.execute('INSERT INTO t VALUES (1)')
        for c in (a, b): c.execute('BEGIN ISOLATION LEVEL REPEATABLE READ'); c.execute('SELECT * FROM t')
        a.execute('UPDATE t SET n = 2'); a.execute('COMMIT')
        with pytest.raises(DatabaseBusy, match='another transaction changed the same rows at the same time: try again'), db_connect.db_errors(url): b.execute('UPDATE t SET n = 3')
