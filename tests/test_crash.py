"kill -9 at random moments, again and again: no job is lost, and each is finished once. The full loop is `soak_kill.py`."
import os, random, re, time, uuid
from collections import Counter
from types import SimpleNamespace
import pytest
from children.launch import Child
from conftest import wait_until
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import delete_tenant, get_or_create_tenant_db, open_tenant_db
from fh_saas.jobs.states import final
from fh_saas.jobs.store import Store

concurrency = 16  # of the children: the default
# the database itself notes every change to a job that had ended, whoever makes it
watch = dict(sqlite=["CREATE TRIGGER watch AFTER UPDATE ON tenant_jobs WHEN OLD.completed_at IS NOT NULL BEGIN INSERT INTO reopened VALUES (OLD.id); END"],
    postgresql=["CREATE FUNCTION note() RETURNS trigger AS $$ BEGIN INSERT INTO reopened VALUES (OLD.id); RETURN NEW; END $$ LANGUAGE plpgsql",
        "CREATE TRIGGER watch AFTER UPDATE ON tenant_jobs FOR EACH ROW WHEN (OLD.completed_at IS NOT NULL) EXECUTE FUNCTION note()"])


@pytest.fixture
def four_tenants(new_url, tmp_path):
    "A host and four of its tenants, with a table of the app's own in each"
    url = new_url()
    host = HostDatabase(url)
    names = [f'k{uuid.uuid4().hex[:8]}' for _ in range(4)]
    for n in names:
        with get_or_create_tenant_db(n, host=host) as db:
            store = Store(db.conn_str)  # makes the job tables
            with store.engine.begin() as conn:
                conn.exec_driver_sql('CREATE TABLE ran (job_id TEXT, attempt INTEGER)')
                conn.exec_driver_sql('CREATE TABLE reopened (id TEXT)')
                for sql in watch[conn.dialect.name]: conn.exec_driver_sql(sql)
            store.close()
    yield SimpleNamespace(host=host, url=url, names=names)
    for n in names: delete_tenant(n, host, force=True)
    host.close()


def rows(t, name, sql):
    with open_tenant_db(name, t.host) as db: return [tuple(r) for r in db.conn.exec_driver_sql(sql)]


def torture(t, kills, jobs, seed):
    "Submit `jobs`, with `kills` processes killed meanwhile; what came of it"
    rnd, start, left = random.Random(seed), time.monotonic(), kills
    submitted = lambda: sum(len(re.findall(r'^\w+ \w+$', p.text, re.M)) for p in submitters)
    runner = lambda: Child('crash.py', 'run', t.url, ','.join(t.names))
    # a submitter that was killed leaves numbers behind; the next one begins after those it has said
    submitter = lambda: Child('crash.py', 'submit', t.url, ','.join(t.names), submitted(), jobs)
    def aim():
        "Put the runner first that has a job in hand"
        busy = lambda: {int(w.split(':')[1]) for n in t.names for w, in rows(t, n, "SELECT worker FROM tenant_jobs WHERE status = 'running'")}
        until = time.monotonic() + 1
        while time.monotonic() < until and not (hit := [p for p in runners if p.pid in busy()]): time.sleep(0.005)
        if hit: runners.remove(hit[0]); runners.insert(0, hit[0])
    runners, submitters = [runner(), runner()], []
    submitters.append(submitter())
    try:
        submitters[0].says(r'^\w+ \w{32}$')
        while left:
            wait_until(lambda: submitted() >= jobs * (kills-left) / kills or not submitters[-1].running, 30, 'enough jobs were not submitted')
            said = submitted()
            wait_until(lambda: submitted() > said or not submitters[-1].running, 30)  # a burst, of which some are due a handoff later
            time.sleep(rnd.uniform(0.0, 0.6))
            if kills - left in (1, 3, 5): aim()  # a few wait for a job to be running; if all did, one job would be hit ten times
            if submitters[-1].running and left % 4 == 2: submitters[-1].kill(); submitters.append(submitter())
            else: runners[0].kill(); runners.append(runner()); runners[0].close(); runners.pop(0)
            left -= 1
        submitters[-1].says('^all$', 60)
        ids = [m.groups() for p in submitters for m in re.finditer(r'^(\w+) (\w{32})$', p.text, re.M)]
        ended = time.monotonic()
        open_jobs = lambda: sum(rows(t, n, "SELECT count(*) FROM tenant_jobs WHERE status IN ('pending', 'running')")[0][0] for n in t.names)
        wait_until(lambda: not open_jobs(), 30, 'not all jobs ended')
        return SimpleNamespace(kills=kills, ids=ids, took=time.monotonic()-start, healed=time.monotonic()-ended)
    finally:
        for p in runners + submitters: p.close()


def check(t, r, jobs):
    "The promises, one by one; the figures"
    c = Counter()
    for name in t.names:
        have = {id: (status, done, failed) for id, status, done, failed in rows(t, name, 'SELECT id, status, completed_at, retry_count FROM tenant_jobs')}
        lost = [id for n, id in r.ids if n == name and id not in have]
        assert not lost, f'submit returned, and yet these are not there: {lost}'
        bad = rows(t, name, "SELECT id, status, retry_count, error_message, worker FROM tenant_jobs WHERE status <> 'completed'")
        assert not bad, [(j, rows(t, name, f"SELECT number, outcome, error, worker, started_at, ended_at FROM tenant_job_attempts WHERE job_id = '{j[0]}'")) for j in bad]
        assert {s for s, *_ in have.values()} == {'completed'} and all(done for _, done, _ in have.values())
        assert not rows(t, name, 'SELECT id FROM reopened'), 'a job that had ended was changed'
        attempts = rows(t, name, 'SELECT job_id, number, outcome FROM tenant_job_attempts')
        ends = Counter(id for id, _, o in attempts if o in final)
        assert ends == dict.fromkeys(have, 1)
        ran = rows(t, name, 'SELECT job_id, attempt FROM ran')
        assert len(ran) == len(set(ran)), 'an attempt ran twice'
        assert set(ran) <= {(id, n) for id, n, _ in attempts}, 'an execution of which no attempt tells'
        assert {id for id, _ in ran} == set(have)
        failed = Counter(id for id, _, o in attempts if o in ('retry', 'lost'))
        assert all(failed[id] == n for id, (*_, n) in have.items())
        c.update(jobs=len(have), executions=len(ran), retries=sum(o == 'retry' for *_, o in attempts), worker_lost=sum(o == 'lost' for *_, o in attempts))
        c['most_lost'] = max([c['most_lost'], *Counter(id for id, _, o in attempts if o == 'lost').values()])
        if t.url.startswith('sqlite'): assert rows(t, name, 'PRAGMA integrity_check') == [('ok',)]
    c['extra'] = c['executions'] - c['jobs'] - c['retries']
    # a submitter killed between its commit and its word leaves a job that nobody was told of: it runs too
    assert len({id for _, id in r.ids}) >= jobs - r.kills and c['jobs'] >= len(r.ids)
    assert c['extra'] <= c['worker_lost'] <= concurrency * r.kills
    assert c['worker_lost'], 'no kill has hit a running job: this tested nothing'
    return dict(c) | dict(kills=r.kills, seconds=round(r.took, 1), healed_after=round(r.healed, 1))


def test_kill_at_random_moments(four_tenants):
    jobs = int(os.environ.get('FH_SAAS_CRASH_JOBS', 200))
    r = torture(four_tenants, int(os.environ.get('FH_SAAS_CRASH_KILLS', 10)), jobs, seed=time.time_ns())
    check(four_tenants, r, jobs)
