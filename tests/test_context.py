"What a task says while it goes through its items, and which job the code in it believes to work for."
import asyncio, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
import pytest
from fastsql import Database
from fh_saas.jobs.context import current_job
from fh_saas.utils_bgtsk import BackgroundTaskManager

mine = ContextVar('mine', default='nobody')

def run(m, f, **kw):
    id, bg = m.submit('t', f, **kw)
    asyncio.run(bg())
    return m.get_job(id)

def test_track_gives_each_item_and_says_how_far_it_is(manager):
    seen = []
    def f(job):
        for x in job.track([1, 2, 3, 4], what='lines'):
            time.sleep(0.11)
            seen.append((x, job._progress))
    job = run(manager, f)
    assert [x for x, _ in seen] == [1, 2, 3, 4] and (job.progress_percent, job.progress_message) == (100, '4 lines')
    percent, text = [said for _, said in seen if said[0] is not None][-1]  # a heartbeat may have taken one
    assert percent in (25, 50, 75) and ' of 4 lines, ' in text and text.endswith(' s left')

@pytest.mark.parametrize('items,total,said', [('abc', None, '3'), ('abc', 3, '3'), ('', None, '0'), ('', 0, '0'), ('abc', 2, '3')])
def test_track_takes_whatever_can_be_gone_through(manager, items, total, said):
    def f(job): return sum(1 for _ in job.track(iter(items), total))
    job = run(manager, f)
    assert (job.status, job.result, job.progress_percent, job.progress_message) == ('completed', said, 100, said)

def test_track_ends_a_cancelled_job(manager):
    begun, done = threading.Event(), []
    def f(job):
        for x in job.track(range(10_000)): begun.set(); done.append(x); time.sleep(0.005)
    id, bg = manager.submit('t', f)
    t = threading.Thread(target=lambda: asyncio.run(bg()))
    t.start()
    assert begun.wait(10)
    manager.cancel(id)
    t.join(10)
    assert manager.get_job(id).status == 'cancelled' and len(done) < 2000

@pytest.mark.parametrize('kind', ['sync', 'async', 'thread', 'own thread', 'direct'])
def test_code_below_a_task_knows_its_job(manager, kind):
    def below(): return current_job().id
    def f(): return below()
    async def g(): await asyncio.sleep(0); return below()
    async def h(): return await asyncio.to_thread(below)
    def own():
        with ThreadPoolExecutor(1) as pool: return pool.submit(copy_context().run, below).result()
    id, bg = manager.submit('t', {'sync': f, 'async': g, 'thread': h, 'own thread': own, 'direct': f}[kind])
    bg.func(*bg.args) if kind == 'direct' else asyncio.run(bg())
    assert manager.get_job(id).result == f'"{id}"' and current_job() is None

@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_no_job_sees_what_another_tenant_has_left(new_engine, new_url, kind):
    "Two tenants in one engine with few threads: each sees its own job, and no variable of the one before"
    engine = new_engine(handoff=0, concurrency=2)
    dbs = [Database(new_url()) for _ in range(2)]
    ms = [BackgroundTaskManager(db, engine) for db in dbs]
    def look(tenant):
        was, job = mine.get(), current_job()
        mine.set(tenant)
        return [was, job.tenant, tenant, mine.get()]
    def f(tenant): return look(tenant)
    async def g(tenant):
        r = look(tenant)
        await asyncio.sleep(0.001)
        return r[:3] + [mine.get() if current_job().tenant == r[1] else 'another']
    ids = [(m, m.submit('t', f if kind == 'sync' else g, tenant=m.store.tenant)[0]) for _ in range(40) for m in ms]
    for m, id in ids:
        t = m.store.tenant
        assert m.wait(id, 20).result == f'["nobody","{t}","{t}","{t}"]'
    assert mine.get() == 'nobody'
    for db in dbs: db.conn.close(); db.engine.dispose()

def test_what_is_too_large_or_no_number_is_clamped(manager):
    seen = []
    def f(job):
        for p in (140, -3, float('nan'), float('inf'), None, 'half', 55.9): job.progress(p); seen.append(job._progress[0])
        job.warn('w'*1_000_000, item='i'*1_000_000)
        job.log('l'*1_000_000, level='x'*1000)
        job.progress(60, 'm'*1_000_000)
        job.details['big'] = 'x'*100_000
    id, bg = manager.submit('t', f)
    bg.func(*bg.args)
    job, (warning, line) = manager.get_job(id), manager.logs(id)
    assert seen == [100, 0, 0, 0, 0, 0, 55] and job.status == 'completed_with_warnings' and len(job.progress_message) == 255 and job.details in (None, '{}')
    assert (len(warning['message']), len(warning['item']), len(line['message']), len(line['level'])) == (2000, 500, 2000, 20)

def test_a_line_of_the_log_is_one_line(manager, caplog):
    "Whatever a file of a stranger's has in it; what is kept with the job is what was said"
    forged = 'row 7\n2026-01-01 ERROR tenant=globex job=0 type=pay: all is lost\r\x1b[2J\u202e'
    def f(job): job.log(forged); job.warn('odd', item=forged); raise ValueError(forged)
    with caplog.at_level('INFO'): id, bg = manager.submit('t\nERROR', f, max_retries=1); bg.func(*bg.args)
    said = [r.getMessage() for r in caplog.records if r.name.startswith('fh_saas') and 'row 7' in r.getMessage()]
    assert len(said) == 3 and all(s.isprintable() and s.startswith(f'tenant={manager.store.tenant} job={id} type=t ERROR attempt=1: ') for s in said), said
    assert manager.logs(id)[0]['message'] == forged and manager.get_job(id).status == 'failed'

def test_letters_and_emoji_that_are_joined_stay_joined(manager, caplog):
    def f(job): job.log('می\u200cخواهم 👩\u200d🔬')
    with caplog.at_level('INFO'): run(manager, f)
    assert any(r.getMessage().endswith('می\u200cخواهم 👩\u200d🔬') for r in caplog.records)

@pytest.mark.parametrize('left', ['['*100_000, '{"a":'*100_000, '{', '9'*5000])
def test_details_that_are_damaged_keep_no_job_running(manager, left):
    "Somebody else has written them"
    id, bg = manager.submit('t', lambda: 'done')
    manager.store.write(lambda cur, now: cur.execute(f"UPDATE tenant_jobs SET details = '{left}' WHERE id = '{id}'") and None)
    bg.func(*bg.args)
    assert manager.get_job(id).status == 'completed'
