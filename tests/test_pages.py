"Pages of jobs, searches and counts over both databases, against a list in Python."
import base64, json, string
import psycopg, pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings, strategies as st
from fh_saas.db_host import gen_id, timestamp
from fh_saas.jobs import pages
from fh_saas.jobs.options import InvalidJob
from fh_saas.jobs.payload import dumps
from fh_saas.jobs.pages import sought
from fh_saas.jobs.states import Status, final
from fh_saas.jobs.store import Store

quick = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
statuses, start = [*map(str, Status)], 1_700_000_000
tricky = st.text("abAB%_/\\'\"[]*? -.,öß漢🎉é" + "\u0301", max_size=8)
words = st.sampled_from(['a', 'ab', 'a%', 'a_', "o'b", 'ö', 'a b'])
maybe = lambda s: st.none() | s  # noqa: E731
job = st.fixed_dictionaries(dict(step=st.sampled_from([0, 0, 1, 60]), job_type=st.sampled_from(['t', 'T', 'u%', 'ü']), status=st.sampled_from(statuses), queue=st.sampled_from(['default', 'q']), task=maybe(st.sampled_from(['t', 'x'])),
    triggered_by=maybe(st.sampled_from(['api', 'manual:ö'])), rerun_of=maybe(st.just('r')), error_message=maybe(tricky), progress_message=maybe(tricky), payload=maybe(st.dictionaries(st.sampled_from('xy'), st.text(string.ascii_letters + '%_/', max_size=5), max_size=1)),
    tags=st.lists(words, max_size=3, unique=True), gone=st.sampled_from([False]*5 + [True])))
moments = st.integers(-1, 200).map(lambda s: timestamp(start + s))
only = st.fixed_dictionaries({}, optional=dict(job_type=st.sampled_from(['t', 'T', 'u%', 'ü', 'none']), status=st.lists(st.sampled_from(statuses), min_size=1, max_size=4).map(','.join), queue=st.just('q'), task=st.just('t'), triggered_by=st.just('manual:ö'),
    rerun_of=st.just('r'), tag=words, since=moments, until=moments, q=tricky.filter(str.strip), error=tricky.filter(str.strip)))

def folded(s): return s.translate(str.maketrans(string.ascii_uppercase, string.ascii_lowercase))

def holds(r, k, v):
    "Does a filter hold for a row?"
    if k == 'status': return r[k] in v.split(',')
    if k == 'tag': return v in (r['tags'] or '').split(',')
    if k == 'since': return r['created_at'] >= v
    if k == 'until': return r['created_at'] < v
    if k in ('q', 'error'): return any(folded(v) in folded(r[c] or '') for c in (['error_message'] if k == 'error' else ['id', 'error_message', 'progress_message']))
    return r[k] == v

plain = dict(job_type='t', status='failed', queue='default', payload=None, tags=[], gone=False)

def fill(store, jobs):
    "Jobs into an empty table; what the model has of them, the newest first"
    rows, at = [], start
    for j in jobs:
        at, j = at + j.get('step', 0), {**plain, **j}
        rows.append(j | {'id': gen_id(), 'created_at': timestamp(at), 'completed_at': timestamp(at) if j['status'] in final else None, 'payload': None if j['payload'] is None else json.dumps(j['payload']), 'tags': f",{','.join(j['tags'])}," if j['tags'] else None})
    t = store.t.jobs
    names = 'id', 'job_type', 'status', 'queue', 'task', 'triggered_by', 'rerun_of', 'error_message', 'progress_message', 'payload', 'tags', 'created_at', 'completed_at'
    add = store.statement(('test add',), lambda: t.insert().values({c: sa.bindparam(c, required=False) for c in names}))
    def op(cur, now):
        cur.execute('DELETE FROM tenant_jobs')
        if rows: add.many(cur, [{k: r.get(k) for k in names} for r in rows])
        for r in rows: r['gone'] and cur.execute(f"DELETE FROM tenant_jobs WHERE id = '{r['id']}'")
    store.write(op)
    return [r for r in reversed(rows) if not r['gone']]

def walk(store, limit, **only):
    "The ids on all pages"
    found, cursor, n = [], None, 0
    while n == 0 or cursor:
        rows, cursor = store.page(limit, cursor, **only)
        found.append([r['id'] for r in rows])
        assert len(rows) <= limit and (n := n + 1) < 500
    return found

@pytest.fixture
def store(new_url):
    "One that does not wait for the disk"
    s = Store(url := new_url(), synchronous='NORMAL')
    if s.kind.name == 'postgresql':
        s.close()
        with psycopg.connect(url, autocommit=True) as conn: conn.execute(f'ALTER DATABASE {conn.info.dbname} SET synchronous_commit = off')
    yield s
    s.close()

@pytest.fixture
def narrow(monkeypatch): monkeypatch.setattr(pages, 'stretch', 7)

@quick
@given(jobs=st.lists(job, min_size=1, max_size=18), only=only, limit=st.integers(2, 9), oldest=st.booleans())
def test_all_pages_together_are_the_jobs_that_match(store, narrow, jobs, only, limit, oldest):
    rows = fill(store, jobs)[::-1 if oldest else 1]
    assert sum(walk(store, limit, oldest=oldest, **only), []) == [r['id'] for r in rows if all(holds(r, k, v) for k, v in only.items())]

@quick
@given(jobs=st.lists(job, min_size=1, max_size=18), only=only, wide=st.booleans())
def test_counts_are_right_or_say_that_there_is_more(store, monkeypatch, jobs, only, wide):
    if not wide: monkeypatch.setattr(pages, 'stretch', 7); monkeypatch.setattr(pages, 'most_counted', 7)
    else: monkeypatch.undo()
    match = [r for r in fill(store, jobs) if all(holds(r, k, v) for k, v in only.items())]
    counts = store.counts(**only)
    assert [*counts] == [s for s in statuses if s in only.get('status', ','.join(statuses)).split(',')]
    for s, (n, more) in counts.items():
        true = sum(r['status'] == s for r in match)
        assert n == true if not more else n <= true, (s, n, more, true)

def test_a_count_of_none_says_whether_there_may_be_more(store, monkeypatch):
    monkeypatch.setattr(pages, 'stretch', 7); monkeypatch.setattr(pages, 'most_counted', 7)
    fill(store, [dict(job_type='old', status=s) for s in ('completed', 'failed')] + [dict(status='pending')]*10)
    assert store.counts(job_type='old')['failed'] == (0, True) and store.counts(job_type='old', status='failed') == dict(failed=(0, True))
    assert store.counts() == dict(pending=(7, True), running=(0, False), completed=(0, True), completed_with_warnings=(0, False), failed=(1, False), cancelled=(0, False))

def test_pages_go_on_while_jobs_come_and_go(store):
    ids = [r['id'] for r in fill(store, [dict(step=n % 2, status='pending') for n in range(120)])]
    found, cursor, n = [], None, 0
    while n == 0 or cursor:
        rows, cursor = store.page(7, cursor)
        found += [r['id'] for r in rows]
        for _ in range(n := n + 1): store.add(dict(id=gen_id(), job_type='new'))
        store.write(lambda cur, now: cur.execute(f"DELETE FROM tenant_jobs WHERE id = '{found[-1]}'") and None)  # the very one the cursor is at
    assert found == ids

def missed(store, rows, ask):
    "Which questions do not find their row alone?"
    ids = [r['id'] for r in reversed(fill(store, rows))]
    return [q for q, id in zip(ask, ids) if [r['id'] for r in store.page(q=q)[0]] != [id]]

@pytest.mark.parametrize('column', ['error_message', 'progress_message'])
def test_a_search_finds_the_letters_of_any_alphabet(store, column):
    pairs = [('Köln', 'Köln'), ('ÄRGER', 'ÄR'), ('İstanbul', 'İstanbul'), ('ΣΊΣΥΦΟΣ', 'ΣΊΣ'), ('МОСКВА', 'МОСК'), ('plain', 'PLAIN'), ('漢字', '漢')]
    assert missed(store, [{column: f'not in {text}.'} for text, _ in pairs], [q for _, q in pairs]) == []

def test_a_search_does_not_look_into_arguments(manager):
    "It would tell a secret letter by letter"
    def f(password): pass
    manager.submit('t', f, password='hunter22')
    assert manager.store.page(q='hunter22')[0] == [] != manager.store.page(q='')[0]

cursors = ['x', '=', '!', 'bnVsbA', 'W10', 'WzFd', 'Wy0xXQ', 'WzEuNV0', 'WyJhIl0', 'WyJhIiwiYiJd', 'W251bGwsbnVsbF0', 'WyJcdTAwMDAiLCJhIl0', 'W3RydWVd', 'W1tbW1tbW1tb', '\x00', 'ö', '\ud800', 'A'*10_000, 'WzkyMjMzNzIwMzY4NTQ3NzU4MDhd', 'WyJcdWQ4MDAiLCJcdWQ4MDAiXQ',
    base64.urlsafe_b64encode(b'['*100_000).decode(), base64.urlsafe_b64encode(b'[' + b'9'*5000 + b']').decode(), base64.urlsafe_b64encode(b'[1e400]').decode()]

def test_a_cursor_of_anybodys_making_is_refused_or_harmless(store):
    fill(store, [{}])
    wrong = []
    for n, cursor in enumerate(cursors):
        try: rows, _ = store.page(5, cursor)
        except InvalidJob as e: assert len(str(e)) < 300 and str(e).isprintable()
        except Exception as e: wrong.append((n, type(e).__name__))
        else: assert len(rows) <= 1
    assert wrong == []

@pytest.mark.parametrize('only', [dict(status='dead'), dict(status='failed,'), dict(nothing=1), dict(since='soon'), dict(until='0000-01-01'), dict(tag='a,b'), dict(q='\x00'), dict(q='x'*201), dict(job_type=' '), dict(q='\ud800'), dict(status=[1])], ids=str)
def test_odd_filters_are_refused(only):
    with pytest.raises(InvalidJob): sought(**only)

def test_what_is_left_empty_is_no_filter():
    assert sought(status='', q=None, tag='', since=(), job_type=[]) == {} and sought(status='failed,pending,failed') == sought(status=['pending', 'failed']) == dict(status=('failed', 'pending'))
    assert sought(since='2026-01-01T01:00+01:00') == dict(since='2026-01-01T00:00:00.000000')

def test_the_few_that_failed_are_found_by_their_index(new_url):
    store = Store(new_url())
    lite = store.kind.name == 'sqlite'
    number = 'WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) ' if lite else 'WITH n(i) AS (SELECT generate_series(1, 20000)) '
    pad = "printf('%06d', i)" if lite else "lpad(i::text, 6, '0')"
    store.write(lambda cur, now: cur.execute(f"{number}INSERT INTO tenant_jobs (id, job_type, status, created_at, completed_at) SELECT {pad}, 't', CASE WHEN i % 1000 = 1 THEN 'failed' ELSE 'completed' END, 'at' || {pad}, 'at' || {pad} FROM n") and None)
    with sa.create_engine(store.url).connect() as conn: conn.execute(sa.text('ANALYZE')); conn.commit()
    def plan(s, **kw):
        with store.cursor() as cur: return '\n'.join(str(r[-1]) for r in cur.execute(('EXPLAIN QUERY PLAN ' if lite else 'EXPLAIN ') + s.sql, s.pack(s.fixed | kw)).fetchall())
    for status in (('failed',), ('cancelled',), ('cancelled', 'failed')):
        for later in (False, True):
            at = (dict(at0=15_000) if lite else dict(at0='at015000', at1='015000')) if later else {}
            said = plan(store._page(dict(status=status), later, False, False), n=51, **at)
            assert ('ix_tenant_jobs_rare ' if lite else 'ix_tenant_jobs_few_pg') in said and 'SCAN tenant_jobs' not in said and 'Seq Scan' not in said, said
            if len(status) == 1: assert 'TEMP B-TREE' not in said and 'Sort' not in said, said
    assert len(walk(store, 7, status='failed')) == 3 and store.counts()['failed'] == (20, False) and store.counts()['completed'][1]
    store.close()

def test_what_is_under_way(store):
    rows = fill(store, [dict(status=s) for s in ['running', 'pending', 'failed', 'pending', 'completed']*3])
    want = [[r['id'] for r in rows if r['status'] == s] for s in ('running', 'pending')]
    assert [r['id'] for r in store.under_way()] == sum(want, []) and [r['id'] for r in store.under_way(2)] == want[0][:2] + want[1][:2]

def test_what_is_under_way_of_some_types_is_found_behind_many_others(store):
    others = [dict(status='pending', job_type='a')]*60
    fill(store, others + [dict(status='pending', job_type='b'), dict(status='running', job_type='b'), dict(status='running', job_type='c')] + others)
    assert [r['job_type'] for r in store.under_way() if r['status'] == 'pending'] == ['a']*50
    assert sorted((r['status'], r['job_type']) for r in store.under_way(5, ('b', 'c'))) == [('pending', 'b'), ('running', 'b'), ('running', 'c')]
    assert [r['job_type'] for r in store.under_way(5, ('a',))] == ['a']*5 and store.under_way(5, ("a' OR '1'='1",)) == []
    assert [r['id'] for r in store.under_way(3, ('a',))] == [r['id'] for r in store.page(3, job_type='a')[0]]

def test_a_page_has_no_row_that_is_long(store):
    "What is left out has a mark in its place; what is short, or nothing, is as it was"
    long, ids = dumps(dict(o='x'*pages.longest)), [f'{n:032x}' for n in range(1, 7)]
    store.add_many([dict(id=i, job_type='t', task='t', payload=long if i == ids[0] else '{}', max_retries=3) for i in ids])
    values = [dict(result='1', details='{}'), dict(result=long), dict(details=long), dict(result='1', details='{}'), dict(error_log=long), {}]
    for i, v in zip(ids, values): store.write(lambda cur, now: [cur.execute(f"UPDATE tenant_jobs SET {k} = '{x}' WHERE id = '{i}'") for k, x in v.items()] and None)
    mark, empty = pages.left_out, ('{}', None, None, None)
    wanted = dict(zip(ids, [(mark, mark, mark, None), ('{}', mark, None, None), ('{}', None, mark, None), ('{}', '1', '{}', None), empty, empty]))
    for rows in (store.page(10)[0], store.under_way(10), store.under_way(10, ('t',)), store.glance(ids), store.page(10, job_type='t', oldest=True)[0]):
        assert {r['id']: (r['payload'], r['result'], r['details'], r['error_log']) for r in rows} == wanted and rows[0].keys() == store.get(ids[0]).keys()
    assert json.loads(mark) == '...' and dumps(json.loads(mark)) != mark
