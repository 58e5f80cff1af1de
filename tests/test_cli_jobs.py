"A tenant's jobs on the command line, over both databases."
import json, re, sys, time
import pytest
from fh_saas.db_host import HostDatabase, timestamp
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs import registered
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.retries import Permanent
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import Registry
from fh_saas.ops.cli import main
from fh_saas.ops.terminal import person
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.web.audit import Audit
from fh_saas.workers.fleet import Fleet

def cli_sync(account, api_key='', job=None):
    if job: job.log(f'login with {api_key}\x1b[2J\nsecond line')
    if account < 0: raise Permanent('no such account')
    return account

def test_all_jobs_are_meant_only_by_a_word(shop, run):
    m, *_ = shop
    m.submit('t', cli_sync, account=1, run_at='2100-01-01')
    assert '--everything' in run('cancel', code=1) and '--everything' in run('remove', '--yes', code=1) and len(m.list_jobs(status='pending')) == 1
    assert run('cancel', '--everything', '--yes') and m.list_jobs(status='pending') == []

def cli_named(job_id, self=None): return [job_id, self]

@pytest.fixture
def shop(new_url, new_engine):
    host = HostDatabase(new_url())
    with get_or_create_tenant_db(f'acme{time.time_ns()}', 'Acme', host) as db:
        m = BackgroundTaskManager(db, new_engine())
        yield m, host.url.render_as_string(hide_password=False), db.tenant_id
    from fh_saas.db_tenant import delete_tenant
    m.engine.stop(0)
    delete_tenant(db.tenant_id, host, force=True)
    host.close()

@pytest.fixture
def run(shop, capsys, monkeypatch):
    m, url, tenant = shop
    def run(command, *args, code=0, of=tenant):
        monkeypatch.setattr(sys, 'argv', ['fh-saas', command, of, *args, '--host', url])
        assert (main() or 0) == code
        o = capsys.readouterr()
        return o.err if code else o.out
    return run

def test_seen(shop, run):
    m, *_ = shop
    assert 'there are none' in run('jobs')
    a, bg = m.submit('cli_sync', cli_sync, account=-1, api_key='q7Yb2', tags=['vip'])
    bg.func(*bg.args)
    b, _ = m.submit('cli_sync', cli_sync, account=1, queue='q', run_at='2100-01-01')
    lines = run('jobs').splitlines()
    assert len(lines) == 3 and b in lines[1] and 'scheduled' in lines[1] and a in lines[2] and 'no such account' in lines[2]
    assert 'stored as pending: use --status pending' in run('jobs', '--status', 'retrying', code=1) and 'use one of pending,' in run('jobs', '--status', 'odd', code=1)
    assert a not in run('jobs', '--queue', 'q') and b not in run('jobs', '--tag', 'vip') and len(run('jobs', '--limit', '1').splitlines()) == 2
    shown = run('job', a)
    assert all(w.endswith('Z') for l in shown.splitlines() for w in l.split() if w.startswith('20') and 'T' in w) and ' s\n' in shown
    assert 'no such account' in shown and 'Permanent' in shown and '"api_key": "***"' in shown and 'q7Yb2' not in shown and '\x1b' not in shown and 'Traceback' in shown
    why = [l.split(None, 1)[1] for l in run('job', b).splitlines() if l.startswith('waits')]
    assert why[0] == 'it is to run at 2100-01-01T00:00:00.000000Z' and why[1].startswith('no process that runs jobs is alive')
    numbers = run('stats')
    assert 'failed=1' in numbers and 'default' not in numbers and 'q ' in numbers
    assert 'no job' in run('job', 'x', code=1)

def test_waits_are_told_in_seconds_of_three_digits_or_more(shop, run):
    m, *_ = shop
    m.engine.be_quiet()
    for q, ago in dict(soon=5, late=4321).items(): m.submit('cli_sync', cli_sync, account=1, queue=q, run_at=timestamp(time.time() - ago))
    lines = {l.split()[0]: l for l in run('stats').splitlines() if l}
    assert re.search(r'\b[5-9](\.\d+)? s\b', lines['soon']) and re.search(r'\b4,3[2-9]\d s\b', lines['late'])

def test_steered(shop, run):
    m, *_ = shop
    ids = [m.submit('cli_sync', cli_sync, account=n, queue='q', run_at='2100-01-01')[0] for n in range(4)]
    run('cancel', ids[0])
    assert m.get_job(ids[0]).status == 'cancelled' and 'has ended' in run('cancel', ids[0], code=1)
    assert '3 jobs match' in run('cancel', '--queue', 'q') and m.get_job(ids[1]).status == 'pending'
    assert '3 jobs' in run('cancel', '--queue', 'q', '--yes') and {j.status for j in m.list_jobs()} == {'cancelled'}
    assert '--everything' in run('remove', '--yes', code=1) and 'not both' in run('remove', ids[0], '--queue', 'q', code=1)
    run('remove', ids[3])
    assert '3 jobs deleted' in run('remove', '--everything', '--yes') and m.list_jobs() == []

def test_again_and_elsewhere(shop, run):
    m, *_ = shop
    a, bg = m.submit('cli_sync', cli_sync, account=-1)
    bg.func(*bg.args)
    new = run('rerun', a, 'account=7').strip()
    assert json.loads(m.get_job(new).payload) == dict(account=7) and m.get_job(new).rerun_of == a
    m.engine.attend(m.store)
    assert m.wait(new, 20).status == 'completed'
    assert 'name=JSON' in run('rerun', a, 'account=x', code=1)
    run('retry', a)
    assert m.wait(a, 20).retry_count == 2
    b, _ = m.submit('cli_sync', cli_sync, account=1, run_at='2100-01-01')
    assert 'waits in slow with priority 4' in run('move', b, '--queue', 'slow', '--priority', '4')
    assert 'priority=9' in run('move', b, '--priority', '9', code=1) and 'no tenant' in run('jobs', code=1, of='nobody')

@pytest.fixture
def command(shop, capsys, monkeypatch):
    "One that names no tenant: exit status, output, errors"
    def run(*args, host=True):
        monkeypatch.setattr(sys, 'argv', ['fh-saas', *args, *(['--host', shop[1]] if host else [])])
        code = main() or 0
        return code, *capsys.readouterr()
    return run

def test_what_a_worker_cannot_run_with_is_told_apart_from_what_may_come_yet(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    for name, text in dict(cli_odd_import='import nonexistent_thing', cli_odd_syntax='def', cli_odd_url="from fh_saas import HostDatabase\nhost = HostDatabase('mysql://x/y')", cli_odd_disk="open('/nowhere/at/all')", cli_odd_key="import os; os.environ['NOWHERE_AT_ALL']", cli_odd_name='nowhere', cli_odd_task="from fh_saas.jobs.tasks import task\ntask('x', priority=9)").items():
        (tmp_path/f'{name}.py').write_text(text)
        code, _, said = command('worker', f'{name}:host', host=False)
        assert code == (1 if name == 'cli_odd_disk' else 78) and said and ('Traceback' in said) == (name not in ('cli_odd_url', 'cli_odd_task')), (name, code, said)
    for odd, what in (('*=2', 'leave -q out'), ('x=0', 'name=number')):
        code, _, said = command('worker', 'cli_odd_disk:host', '-q', odd, host=False)
        assert code == 78 and what in said
    code, _, said = command('worker', 'cli_odd_disk:host', '-q', 'x=2', '-q', 'x=3', host=False)
    assert code == 78 and "'x' has 2 already" in said

def test_an_interrupted_command_says_so_in_a_line(command, monkeypatch):
    def interrupted(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr('fh_saas.ops.cli.tenant_report', interrupted)
    assert command('tenants') == (130, '', 'fh-saas tenants: interrupted\n')

def test_tenants_whose_upgrade_has_not_ended_are_not_up_to_date(shop, command):
    _, url, tenant = shop
    h = HostDatabase(url)
    h.set_state(tenant, 'migrating', 'active')
    code, said, _ = command('migrate')
    assert code == 1 and tenant in said and 'migrate_tenants again' in said
    h.set_state(tenant, 'active', 'migrating')
    code, said, _ = command('migrate')
    assert code == 0 and said.endswith('all tenants are up to date\n')
    h.close()

def test_a_copy_goes_back_only_with_a_yes(shop, run, tmp_path):
    m, _, tenant = shop
    run('export', copy := str(tmp_path/'copy'))
    m.submit('cli_sync', cli_sync, account=1)
    assert 'say --yes' in run('restore', copy, code=1) and len(m.list_jobs()) == 1
    assert 'are held' in run('restore', copy, '--yes') and m.list_jobs() == []
    assert 'no file' in run('restore', str(tmp_path/'none'), '--yes', code=1)

def test_what_is_mistyped_is_said(run, command):
    assert 'use one of' in run('jobs', '--status', 'foo', code=1)
    assert command('frobnicate', host=False)[2] == "fh-saas: there is no command 'frobnicate'\n"
    assert 'a whole number' in command('rules', 'concurrency=1.5')[2] and 'a number' in command('rules', 'weight=x')[2]
    assert "only a tenant may be '*'" in command('rules', 'concurrency=1', '--queue', '*')[2]
    assert 'use 1 or more' in command('migrate', '--at-once', '0')[2]
    assert 'from 1 to 1000' in command('worker', 'main:host', '-q', 'a=0', host=False)[2]

def test_an_option_that_is_given_empty_does_not_mean_everything(shop, command):
    for name in ('pause', 'drain', 'resume'):
        for option in ('--tenant', '--queue', '--task'):
            code, out, err = command(name, option, '')
            assert code == 1 and f'{option} is empty' in err and not out
    code, out, err = command('tenants', '--host', '', host=False)  # as of a variable that is not set
    assert code == 1 and '--host is empty' in err and not out
    assert command('rules', 'weight=2', '--tenant', '')[0] == 1 and command('rules')[1] == 'there are no rules\n'

def test_rules_of_a_tenant_go_with_it(shop, command):
    url, gone = shop[1], f'gone{time.time_ns()}'
    host = HostDatabase(url)
    get_or_create_tenant_db(gone, host=host).close()
    command('pause', '--tenant', gone); command('rules', 'concurrency=2', '--tenant', gone); command('rules', 'weight=2', '--tenant', '*')
    assert command('delete', gone, '--yes')[0] == 0
    assert len(command('rules')[1].splitlines()) == 2 and gone not in command('rules')[1]
    host.close()

def test_one_mode_in_the_place_of_another_is_said(shop, command):
    command('drain', '--queue', 'q')
    assert 'instead of draining' in command('pause', '--queue', 'q')[1] and 'instead' not in command('pause', '--queue', 'q')[1]

def test_a_rule_for_a_name_that_nobody_knows_is_made_and_said(shop, command, monkeypatch):
    monkeypatch.setattr(registered, 'believed', -1.0)
    host = HostDatabase(shop[1])
    assert 'no living process' not in command('pause', '--queue', 'impots')[1]  # there is none that could say
    e = Engine(Settings(), Registry(), queues=dict(imports=1))
    e.registry.add(cli_sync, 'cli_sync')
    (fleet := Fleet(host)).beat(e)
    assert command('pause', '--queue', 'impots')[1] == "queue 'impots': nothing is started; no living process serves queue 'impots'\n"
    assert command('drain', '--queue', 'imports')[1] == "queue 'imports': no new jobs are taken\n"
    assert command('pause', '--task', 'cli_sink')[1] == "task 'cli_sink': nothing is started; no living process has registered task 'cli_sink'\n"
    assert command('pause', '--task', 'cli_sync')[1] == "task 'cli_sync': nothing is started\n"
    assert 'no living process' not in command('resume', '--queue', 'impots')[1]
    assert "concurrency=3; no living process serves queue 'other'" in command('rules', 'concurrency=3', '--queue', 'other')[1]
    assert 'no living process' not in command('rules', 'concurrency=', '--queue', 'other')[1]
    assert 'no living' not in command('rules', 'concurrency=3', '--queue', 'imports')[1]
    fleet.leave(e.worker); e.stop(0); host.close()

@pytest.mark.parametrize('odd', ['tenant=5', 'queue=q', 'task=t', 'self=3', 'cls=1', 'wieght=2'])
def test_a_rule_that_there_is_none_of_is_named(shop, command, odd):
    code, _, err = command('rules', odd)
    assert code == 1 and f'{odd}: there is no such rule; use concurrency, ' in err and '--tenant' in err

@pytest.mark.parametrize('odd', ['\udcff=3', f"{'q'*65}=3", '=3', 'q=0', 'q'])
def test_a_queue_that_cannot_be_one_is_refused_before_anything_is_imported(command, odd):
    code, _, err = command('worker', 'nowhere:host', '-q', odd, host=False)
    assert code == 78 and '-q' in err and 'nowhere' not in err and 'Traceback' not in err

def test_arguments_nested_too_deeply_are_refused(shop, run):
    m, *_ = shop
    id, _ = m.submit('cli_sync', cli_sync, account=1, run_at='2100-01-01')
    assert 'use name=JSON' in run('rerun', id, f"account={'['*30_000}", code=1) and len(m.list_jobs()) == 1

def test_who_is_suspended_is_told_what_takes_it_back(shop, run, command):
    tenant = shop[2]
    run('suspend')
    assert 'fh-saas unsuspend' in command('tenants', '--wrong')[1]
    command('pause', '--tenant', tenant)
    assert f'still, suspended: `fh-saas unsuspend {tenant}`' in command('resume', '--tenant', tenant)[1]
    run('unsuspend')

def test_rules_of_one_tenant_are_shown(shop, command):
    tenant = shop[2]
    command('rules', 'weight=2', '--tenant', tenant)
    command('rules', 'concurrency=8', '--queue', 'imports')
    assert len(command('rules')[1].splitlines()) == 3
    assert [l.split()[0] for l in command('rules', '--tenant', tenant)[1].splitlines()] == ['tenant', tenant]
    assert command('rules', '--task', 'cli_sync')[1] == 'there are no such rules\n'

def test_each_act_is_in_the_audit_and_says_what_it_did(shop, run, command, tmp_path):
    m, url, tenant = shop
    def noted(): return [(e.by, e.tenant, e.action, e.what) for e in reversed(Audit(m.db.host).entries(limit=1000))]
    a, b, c = (m.submit('cli_sync', cli_sync, account=n, run_at='2100-01-01')[0] for n in range(3))
    run('jobs'); run('job', a); run('stats'); command('tenants'); command('rules'); command('workers')
    run('cancel', '--type', 'cli_sync')  # counts them only
    assert noted() == []
    assert 'nobody' in run('cancel', a, 'nobody', b, code=1)
    run('retry', '--status', 'cancelled', '--yes'); run('move', c, '--priority', '4'); new = run('rerun', c, 'api_key="q7Yb2"').strip()
    assert 'is suspended' in run('suspend') and 'is active' in run('unsuspend')
    assert "queue 'q': no new jobs" in command('drain', '--queue', 'q')[1] and command('resume')[1] == 'everything: there was no such rule\n' and 'taken back' in command('resume', '--queue', 'q')[1]
    command('rules', 'weight=2', '--tenant', tenant); command('pause', '--tenant', tenant); command('pause', '--tenant', '*')
    assert f'fh-saas resume --tenant {tenant}`' in command('tenants', '--wrong')[1]
    assert "fh-saas resume --tenant '*'`" in command('resume', '--tenant', tenant)[1] and "tenant '*'" in command('resume', '--tenant', '*')[1]
    assert command('tenants', '--wrong')[1] == 'there are none\n'
    run('export', str(tmp_path/'copy')); command('migrate')
    done = noted()
    assert {by for by, *_ in done} == {person()}
    assert [(t, action) for _, t, action, _ in done] == [(tenant, x) for x in ('cancel', 'retry', 'move', 'rerun')] + [(None, x) for x in ('suspend', 'unsuspend', 'drain', 'resume', 'resume', 'rules', 'pause', 'pause', 'resume', 'resume', 'export', 'migrate')]
    what = dict((action, what) for *_, action, what in done)
    assert what['cancel'] == f'{a}, {b}' and what['retry'] == '2 jobs with status cancelled' and what['rerun'] == f'{c} as {new}' and 'q7Yb2' not in str(done)
    assert what['rules'] == f"tenant '{tenant}': weight=2" and what['drain'] == "queue 'q'" and what['export'] == f"tenant '{tenant}': {tmp_path/'copy'}"

def test_an_act_that_cannot_be_noted_is_done_and_says_what_it_did(shop, command, monkeypatch):
    from fh_saas.db_connect import DatabaseBusy
    m, url, tenant = shop
    a, _ = m.submit('cli_sync', cli_sync, account=1, run_at='2100-01-01')
    def locked(*args): raise DatabaseBusy('the host is locked')
    monkeypatch.setattr('fh_saas.ops.terminal.Audit', locked)
    code, out, err = command('rerun', tenant, a)
    assert code == 0 and out.strip() in {j.id for j in m.list_jobs()} and 'not in the audit: the host is locked' in err

def test_an_interrupted_command_has_noted_what_it_did(shop, command, monkeypatch):
    m, url, tenant = shop
    ids = [m.submit('cli_sync', cli_sync, account=n, run_at='2100-01-01')[0] for n in range(3)]
    cancel = BackgroundTaskManager.cancel
    def stops(self, id): return cancel(self, id) if id != ids[2] else 1/0
    monkeypatch.setattr(BackgroundTaskManager, 'cancel', stops)
    with pytest.raises(ZeroDivisionError): command('cancel', tenant, *ids)
    assert [e.what for e in Audit(m.db.host).entries(tenant)] == [f'{ids[0]}, {ids[1]}']

def test_the_environment_does_not_say_who_it_was(monkeypatch):
    import os, pwd
    for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME'): monkeypatch.setenv(name, 'alice')
    assert person() == f'{pwd.getpwuid(os.getuid()).pw_name} (fh-saas)'

def test_arguments_may_have_any_names(shop, run):
    m, _, _ = shop
    id, _ = m.submit('t', cli_named, payload=dict(job_id=1))
    new = run('rerun', id, 'job_id="6"', 'self=7').strip()
    assert json.loads(m.get_job(new).payload) == dict(job_id='6', self=7)

def test_jobs_of_a_suspended_tenant_are_seen_and_cancelled_but_not_begun(shop, run):
    m, url, tenant = shop
    id, _ = m.submit('t', cli_sync, account=1)
    host = HostDatabase(url)
    for state in ('paused', 'migrating'):
        host.set_state(tenant, state)
        assert id in run('jobs') and id in run('job', id)
        assert dict(paused='suspended').get(state, state) in run('rerun', id, code=1)
    run('cancel', id)
    assert m.get_job(id).status == 'cancelled' and len(m.list_jobs()) == 1
    host.close()
