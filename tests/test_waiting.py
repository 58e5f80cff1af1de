"What keeps a job from running, as an operator is told, over both databases."
import asyncio, time, uuid
from datetime import timedelta
from types import SimpleNamespace
import pytest
from fh_saas.db_host import timestamp
from fh_saas.db_tenant import get_or_create_tenant_db, resume_tenant, suspend_tenant
from fh_saas.jobs import registered, waiting
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.retries import RetryAfter, Snooze
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import Registry
from fh_saas.jobs.tenancy import rules_of
from fh_saas.jobs.wake import wakes_of
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.fleet import Fleet

def waiting_task(n=0): return n

@pytest.fixture
def shop(host, monkeypatch):
    "A process that runs nothing looks at a tenant's jobs, beside the engines of others; `why` is what it says"
    monkeypatch.setattr(registered, 'believed', -1.0)
    others, fleet, registry, tenant = [], Fleet(host), Registry(), f'why-{uuid.uuid4().hex[:6]}'
    web = Engine(Settings(concurrency=0, handoff=0), registry)
    db = get_or_create_tenant_db(tenant, host=host)
    m = BackgroundTaskManager(db, web)
    t = registry.add(waiting_task, 'waiting_task')
    def other(*names, queues=None):
        others.append(e := Engine(Settings(concurrency=2), r := Registry(), queues))
        for n in names: r.add(print, n)
        fleet.beat(e)
        return e
    def submit(**options): return m.submit('t', t.func, n=1, **options)[0]
    yield SimpleNamespace(m=m, host=host, fleet=fleet, rules=rules_of(host), wakes=wakes_of(host), tenant=tenant, registry=registry, other=other, submit=submit, why=m.why_waiting)
    for e in (web, *others): fleet.leave(e.worker); e.stop(0)
    db.close()

def test_processes(shop):
    s, id = shop, shop.submit(queue='imports')
    [said] = s.why(id)
    assert said.startswith('no process that runs jobs is alive')
    one = s.other('something', queues={'default': 1})
    [said] = s.why(id)
    assert "serves its queue, 'imports'" in said
    two = s.other('something', queues={'imports': 1})
    assert s.why(id) == ["no living process that serves its queue has registered its task, 'waiting_task'"]
    s.fleet.leave(one.worker)
    assert s.why(id) == ["no living process has registered its task, 'waiting_task'"]
    two.registry.add(print, 'new name', aliases=('waiting_task',))
    s.fleet.beat(two)
    assert s.why(id) == []
    s.fleet.beat(two, state='quiet')
    [said] = s.why(s.m.get_job(id))
    assert said.startswith('those that can run it are quiet (1): `fh-saas ask')
    s.other('another', queues={'default': 1})
    assert s.why(id)[0].startswith('those that can run it are quiet (1)')
    s.fleet.beat(two, state='stopping')
    assert 'no living process serves its queue' in s.why(id)[0]

def test_a_process_that_looks_at_its_own_jobs_counts_itself(shop):
    s, id = shop, shop.submit()
    e = Engine(Settings(concurrency=1), Registry())
    m = BackgroundTaskManager(s.m.db, e)
    e.pause(m.store)
    assert m.why_waiting(id) == ["no living process has registered its task, 'waiting_task'"]
    s.fleet.beat(e)  # what it says in the host is older than what it knows
    e.registry.add(print, 'waiting_task')
    assert m.why_waiting(id) == []
    e.quiet = True
    assert 'are quiet' in m.why_waiting(id)[0]
    s.fleet.leave(e.worker)
    e.stop(0)

def test_what_is_not_known_is_not_said(shop, monkeypatch):
    s, id = shop, shop.submit()
    monkeypatch.setattr(registered, '_ask', lambda *args: 1/0)
    assert s.why(id) == []
    monkeypatch.undo()
    async def page(): return s.why(id)
    registered._heard.clear()
    with monkeypatch.context() as mp:
        mp.setattr(registered, '_behind', lambda hear, wakes, h: h.lock.release())  # the answer comes behind it, and has not come yet
        assert asyncio.run(page()) == []
    s.other('something')
    s.fleet.db.write(lambda cur, now: cur.execute('UPDATE fh_saas_workers SET tasks = NULL') and None)
    registered._heard.clear()
    assert s.why(id) == []

def test_rules(shop):
    s, id = shop, shop.submit(queue='imports')
    s.other('waiting_task')
    t = s.tenant
    for scope, what, flags in ((dict(), 'everything', ''), (dict(tenant='*'), 'its tenant', " --tenant '*'"), (dict(tenant=t), 'its tenant', f' --tenant {t}'), (dict(queue='imports'), "queue 'imports'", ' --queue imports'),
            (dict(tenant=t, queue='imports'), "queue 'imports'", f' --tenant {t} --queue imports'), (dict(task='waiting_task'), "task 'waiting_task'", ' --task waiting_task')):
        s.rules.set(**scope, mode='paused')
        assert s.why(id) == [f"{what} is paused, by a rule: `fh-saas resume{flags}` takes it back"]
        s.rules.clear(**scope)
    for scope in (dict(queue='other'), dict(tenant='other'), dict(task='other'), dict(tenant=t, queue='other')): s.rules.set(**scope, mode='paused')
    s.rules.set(queue='imports', mode='draining')
    assert s.why(id) == []

def test_a_rule_means_a_task_by_each_of_its_names(shop):
    s = shop
    s.registry.add(lambda: 1, 'now', aliases=('before',))
    s.m.store.add(dict(id='a', job_type='t', task='before', payload='{}'))
    s.other('now', 'before')
    s.rules.set(task='now', mode='paused')
    assert ["task 'now' is paused" in w for w in s.why('a')] == [True]

def test_the_tenant(shop):
    s, id = shop, shop.submit()
    s.other('waiting_task')
    tenancy = s.m.engine.tenancy(s.m.store)
    def why(): tenancy.read = 0.0; return s.why(id)
    suspend_tenant(s.tenant, s.host)
    assert why() == ['its tenant is suspended: `fh-saas unsuspend` takes it back']
    resume_tenant(s.tenant, s.host)
    assert s.host.hold(s.tenant, 'it is a copy')
    assert why() == ['its tenant is held, and `fh-saas release` or `fh-saas discard` decides about its open jobs: it is a copy']
    assert s.host.let_go(s.host.find(s.tenant), s.wakes.facts(s.tenant)['mark'])
    s.wakes.ring(s.tenant)
    [seq, begun] = s.wakes.lease(s.tenant, 'me', 5)
    s.wakes.trouble(s.tenant, 'me', begun, 'locked by a backup')
    [said] = why()
    assert said.startswith('its database cannot be visited (1 failed), the next visit is due at 20') and said.endswith('Z: locked by a backup')
    s.host.set_state(s.tenant, 'migrating', 'active')
    assert why()[0] == 'its tenant is being upgraded'
    s.host.set_state(s.tenant, 'active', 'migrating')

def test_moments(shop):
    s = shop
    s.other('waiting_task')
    at = timestamp(time.time() + 3600)
    assert s.why(s.submit(run_at=at)) == [f'it is to run at {at[:26]}Z']
    app = BackgroundTaskManager(s.m.db, Engine(Settings(concurrency=1, handoff=60), s.registry))  # it would run it beside its response
    id, _ = app.submit('t', waiting_task)
    [said] = app.why_waiting(id)
    assert said.startswith('it waits for the response that brings it, until 20')
    app.engine.stop(0)
    def fails(error):
        def later(): raise error
        return later
    id, bg = s.m.submit('t', s.registry.add(fails(RetryAfter(500)), 'later').func)
    bg.func(*bg.args)
    [said, _] = s.why(id)
    assert said.startswith('it is tried again at 20') and said.endswith('Z, for 1 of 3 attempts have failed')
    id, bg = s.m.submit('t', s.registry.add(fails(Snooze(500)), 'snoozing').func)
    bg.func(*bg.args)
    assert s.why(id)[0].startswith('it is to run at 20') and s.why(id)[0].endswith('Z, for its last attempt has put it off')
    s.m.store.write(lambda cur, now: cur.execute(f"UPDATE tenant_jobs SET retry_count = 1 WHERE id = '{id}'") and None)
    assert s.why(id)[0].endswith('Z, for its last attempt has put it off')  # another one had failed before
    assert s.why(s.submit(run_at=timedelta(seconds=5)))[0].startswith('it is to run at 20')
    for far in ('0001-01-01', '9999-12-31T23:59:00'): assert all('to run at 9999' in w for w in s.why(s.submit(run_at=far, priority=4)))

def test_of_two_rates_of_a_task_the_slower_is_named(shop):
    s = shop
    s.registry.add(lambda: 1, 'now', aliases=('before',))
    s.m.store.add(dict(id='a', job_type='t', task='now', payload='{}')); s.m.store.add(dict(id='b', job_type='t', task='now', payload='{}'))
    s.other('now', 'before')
    s.m.store.claim(('now',), (), 'a', 'w', 60, 1, rates={'now': (9, 60)})
    s.rules.set(tenant=s.tenant, task='now', starts=1, period=60)
    s.rules.set(tenant=s.tenant, task='before', starts=100, period=60)
    assert s.why('b') == ["its tenant's rate for this task, 1 in 60 s, is used up"]

def test_limits(shop):
    s = shop
    s.other('waiting_task', 'slow')
    first = s.submit(queue='imports', concurrency_key='file')
    [row] = s.m.store.claim(('waiting_task',), (), 'a', 'w', 60, 1, rates={'waiting_task': (9, 60)})
    assert row['id'] == first and s.why(first) == []  # it runs
    id = s.submit(queue='imports')
    assert s.why(id) == []
    s.rules.set(tenant=s.tenant, concurrency=1)
    assert s.why(id) == ["its tenant's limit of running jobs, 1, is reached (1 run)"]
    s.rules.set(tenant=s.tenant, concurrency=2)
    s.rules.set(tenant=s.tenant, queue='imports', concurrency=1)
    assert s.why(id) == ["its tenant's limit for queue 'imports', 1, is reached (1 run)"]
    assert s.why(s.submit()) == []
    s.rules.clear(tenant=s.tenant, queue='imports')
    s.rules.set(tenant=s.tenant, task='waiting_task', starts=1, period=60)
    assert s.why(id) == ["its tenant's rate for this task, 1 in 60 s, is used up"]
    s.rules.set(tenant=s.tenant, task='waiting_task', starts=2, period=60)
    assert s.why(id) == []
    s.rules.clear(tenant=s.tenant, task='waiting_task')
    assert s.why(s.submit(queue='imports', concurrency_key='other')) == ['due jobs of its queue that come first: 1']
    assert s.why(s.submit(queue='imports', concurrency_key='file')) == [f"job {first} runs, and has the same concurrency key, 'file'"]

def test_its_turn(shop, monkeypatch):
    s = shop
    e = s.other('waiting_task')
    a, b = s.submit(), s.submit()
    assert s.why(a) == [] and s.why(b) == ['due jobs of its queue that come first: 1']
    c = s.submit(priority=4)
    assert s.why(a) == ['due jobs of its queue that come first: 1'] and s.why(c) == []
    d = s.submit(priority=4, queue='other')
    assert s.why(d) == [] and s.why(c) == []
    long_ago = timestamp(time.time() - 2*s.m.engine.settings.age - 60)
    s.m.store.write(lambda cur, now: cur.execute(f"UPDATE tenant_jobs SET run_at = '{long_ago}' WHERE id = '{a}'") and None)
    assert s.why(a) == [] and s.why(c) == ['due jobs of its queue that come first: 1']  # waiting has raised the first
    monkeypatch.setattr(waiting, 'most_counted', 1)
    assert s.why(b) == ['due jobs of its queue that come first: more than 1']
    e.line.running = 2
    monkeypatch.setattr(e, 'running_jobs', lambda: [('x', 'y', 'z')]*2)
    s.fleet.beat(e)
    e.line.running = 0
    assert s.why(d) == ['there is no room in the processes that can run it: 2 running in 1']
    s.m.store.write(lambda cur, now: cur.execute(f"UPDATE tenant_jobs SET lost = 2 WHERE id = '{d}'") and None)
    assert s.why(d)[-1] == 'a process has ended while it ran (2): such jobs are tried one at a time'

def test_of_other_processes_nothing_is_said_where_no_host_knows_them(new_manager, url):
    m = new_manager(url, concurrency=0)
    id, _ = m.submit('t', waiting_task)
    assert m.why_waiting(id) == []
    other = new_manager(url)
    other.engine.pause(other.store)
    assert other.why_waiting(id) == []

def test_who_has_no_host_is_told_what_its_rows_say(lite):
    m = lite
    id, bg = m.submit('t', waiting_task, n=1, run_at='2100-01-01')
    assert m.why_waiting(id) == ['it is to run at 2100-01-01T00:00:00.000000Z']
    m.run_job(id, waiting_task)
    assert m.why_waiting(id) == []

def test_an_old_row_without_a_moment(shop):
    s = shop
    s.other('old_type')
    s.m.store.write(lambda cur, now: cur.execute("INSERT INTO tenant_jobs (id, job_type, status, payload, retry_count, max_retries) VALUES ('old', 'old_type', 'pending', '{}', 0, 3)") and None)
    s.submit()
    assert s.why('old') == []

def test_what_a_claim_passes_by_does_not_come_first(shop):
    s = shop
    s.other('waiting_task')
    s.m.store.add(dict(id='gone', job_type='t', task='removed', payload='{}'))
    first = s.submit(concurrency_key='file')
    s.m.store.claim(('waiting_task',), (), 'a', 'w', 60, 1)
    s.submit(concurrency_key='file')
    id = s.submit()
    assert s.m.get_job(first).status == 'running' and s.why(id) == []

def test_tasks_that_may_not_begin_come_before_nobody(shop):
    s = shop
    s.other('waiting_task', 'stopped', 'slow', 'renamed')
    s.other('elsewhere', queues=dict(imports=1))
    s.registry.add(lambda: 1, 'renamed', aliases=('before',))
    for n, name in enumerate(('stopped', 'slow', 'slow', 'renamed', 'elsewhere')): s.m.store.add(dict(id=f'a{n}', job_type='t', task=name, payload='{}'))
    id = s.submit()
    assert s.why(id) == ['due jobs of its queue that come first: 4']
    s.rules.set(task='stopped', mode='paused'); s.rules.set(task='before', mode='paused')
    assert s.why(id) == ['due jobs of its queue that come first: 2']
    s.rules.set(tenant=s.tenant, task='slow', starts=1, period=60)
    s.m.store.claim(('slow',), (), 'a', 'w', 60, 1, rates={'slow': (1, 60)})
    assert s.why(id) == [] and s.why('a2') == ["its tenant's rate for this task, 1 in 60 s, is used up"]

def test_what_may_keep_it_is_said_as_that(shop):
    s, id = shop, shop.submit(queue='imports')
    s.other('waiting_task')
    s.rules.set(queue='imports', concurrency=3)
    assert s.why(id) == []  # it has only just become due
    s.m.store.write(lambda cur, now: cur.execute(f"UPDATE tenant_jobs SET run_at = '{timestamp(now - 9)}' WHERE id = '{id}'") and None)
    assert s.why(id) == ['the limit of its queue, 3 in all processes together, may be reached']
    s.rules.clear(queue='imports')
    s.rules.set(task='new_name', mode='paused'); s.rules.set(task='other', mode='paused')
    assert s.why(id) == []  # this process knows its task, and that it has no other name
    stranger = BackgroundTaskManager(s.m.db, Engine(Settings(concurrency=0), Registry()))
    assert stranger.why_waiting(id) == ["a rule for 'new_name', 'other' may mean it, if that is another name of 'waiting_task': this process does not know"]
    assert stranger.why_waiting(s.submit(queue='imports')) == ['due jobs of its queue that come first: 1']
    assert stranger.why_waiting(s.submit(queue='files')) == []  # it has only just become due
    stranger.engine.stop(0)

def test_jobs_of_the_host_itself(host, monkeypatch):
    monkeypatch.setattr(registered, 'believed', -1.0)
    e, web = Engine(Settings(concurrency=1), Registry()), Engine(Settings(concurrency=0), Registry())
    e.registry.add(print, 'waiting_task')
    m = BackgroundTaskManager(host, web)
    m.store.add(dict(id='a', job_type='t', task='waiting_task', payload='{}'))
    assert m.why_waiting('a')[0].startswith('no process that runs jobs is alive')
    Fleet(host).beat(e)
    assert m.why_waiting('a') == []
    Fleet(host).leave(e.worker)
    for x in (e, web): x.stop(0)

def test_rows_of_somebody_else(shop):
    s = shop
    s.other('odd')
    s.m.store.write(lambda cur, now: [cur.execute(f"INSERT INTO tenant_jobs (id, job_type, status, payload, run_at, retry_count, max_retries) VALUES ('{id}', 'odd', 'pending', '{{}}', '{at}', 0, 3)") and None for id, at in (('a', '2100-01-01T00:00:00'), ('b', 'tomorrow'))] and None)
    assert s.why('a')[0].startswith('it is to run at 2100') and s.why('b')[0].startswith('it is to run at tomorrow')
