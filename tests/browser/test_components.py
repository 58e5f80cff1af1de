"Each component through the life of a job, in apps of four looks: Pico's, a bare one, and MonsterUI's, light and dark."
import io, re, threading
import monsterui.core as monster, pytest, uvicorn
from PIL import Image
from fasthtml.common import FastHTML, P, Titled, fast_app
from fastsql import Database
from playwright.sync_api import expect
from conftest import free_port, wait_until
from fh_saas import JobBanner, JobButton, JobList, JobProgress, JobResult, JobStatus, Settings, setup_jobs
from fh_saas.jobs.context import JobContext
from fh_saas.jobs.retries import Permanent
from fh_saas.jobs.store import QuotaExceeded
from fh_saas.utils_bgtsk import BackgroundTaskManager

class Steps:
    "What the task waits for: the test says how far it may go"
    def __init__(self): self.reset()
    def reset(self): self.percent, self.end, self.broken = 0, threading.Event(), False
steps = Steps()

def step_by_step(job: JobContext, rows: int = 1234):
    "Goes as far as it is told, and ends when it is told"
    at = None
    while not steps.end.wait(.02):
        if at != steps.percent: at = steps.percent; job.progress(at or None, f'step {at}')
        job.give_way()
    if steps.broken: raise Permanent('the shelf is empty')
    if rows < 0: job.warn('fewer than none', item='rows')
    return dict(rows_read=rows, note='<b>ok</b>', exact=True)

LOOKS = dict(pico=lambda: fast_app(secret_key='x', htmlkw=dict(lang='en')), bare=lambda: (a := FastHTML(secret_key='x', htmlkw=dict(lang='en')), a.route),
    **{f'monster_{m}': lambda m=m: monster.fast_app(secret_key='x', htmlkw=dict(lang='en'), hdrs=monster.Theme.blue.headers(mode=m)) for m in ('light', 'dark')})

class App:
    "An app of the test's own, served in a thread of this process"
    def __init__(self, look, folder):
        self.look, self.db = look, Database(f"sqlite:///{folder/'app.db'}")
        self.app, rt = LOOKS[look]()
        self.jobs, self.url = setup_jobs(self.app, settings=Settings(poll=.2, grace=1, handoff=.2)), f'http://127.0.0.1:{(port := free_port())}'
        m = lambda: BackgroundTaskManager(self.db)

        @rt('/', methods=['GET'])
        def index(live: bool = False): return Titled('Start', JobButton(m(), 'Begin', step_by_step, live=live), JobButton(m(), 'Begin a bad one', step_by_step, live=live, rows=-1))

        @rt('/three', methods=['GET'])
        def three(job: str, live: bool = True): return Titled('Three', JobProgress(m(), job, live=live), P(JobStatus(m(), job, live=live)), JobResult(m(), job), JobBanner(m(), live=live), JobList(m(), live=live))

        @rt('/list', methods=['GET'])
        def listed(limit: int = 10, live: bool = True): return Titled('List', JobList(m(), live=live, limit=limit))

        @rt('/all', methods=['GET'])
        def every(live: bool = False):
            jobs = [m().job_class(**r) for r in m().store.page(20)[0]]
            return Titled('All', *(o for j in jobs for o in (JobProgress(m(), j, live=live), P(JobStatus(m(), j.id, live=live)), JobResult(m(), j.id))), JobList(m(), live=live), JobBanner(m(), live=live))
        self.m = m()
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=port, log_level='error', timeout_graceful_shutdown=2))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self):
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def submit(self, **kw): return self.m.submit('step_by_step', step_by_step, **kw)[0]

    def stop(self):
        steps.end.set()
        self.server.should_exit = True
        self.thread.join(20)
        self.db.conn.close(); self.db.engine.dispose()

@pytest.fixture(scope='module', params=LOOKS)
def app(request, chromium, tmp_path_factory):
    app = App(request.param, tmp_path_factory.mktemp(request.param)).start()
    yield app
    app.stop()

@pytest.fixture(autouse=True)
def tidy(app):
    "The task waits anew, and no job of another test is there"
    steps.reset()
    yield
    steps.end.set()
    wait_until(lambda: app.m.store.page(1, status='running')[0] == [], 20, 'a job still runs')
    app.m.cancel_all(everything=True)
    app.m.delete_all(everything=True)

one_look = pytest.mark.parametrize('app', ['bare'], indirect=True)  # what does not depend on how it looks

def asked(page):
    "What the page asks of the job system from now on"
    found = []
    page.on('request', lambda r: found.append(r.url) if '/jobs/-/' in r.url else None)
    return found

def quiet(page, found, seconds):
    "Nothing more is asked"
    page.wait_for_timeout(300)
    before = len(found)
    page.wait_for_timeout(seconds*1000)
    assert found[before:] == []

@one_look
@pytest.mark.parametrize('live', [False, True])
def test_from_start_to_end(app, page, live):
    found = asked(page)
    page.goto(f'{app.url}/?live={"1" if live else ""}')
    page.get_by_role('button', name='Begin', exact=True).click()
    job = page.locator('.fs-slot .fs-job')
    expect(job).to_have_attribute('data-state', 'running')
    expect(job.locator('progress')).not_to_have_attribute('value', re.compile('.'))
    for n in (30, 60):
        steps.percent = n
        expect(job.locator('progress')).to_have_attribute('value', str(n))
        expect(job.locator('.fs-said')).to_contain_text(f'{n} % · step {n}')
        if n == 30: page.wait_for_timeout(1500); before = len(found)
    if live: assert found[before:] == []  # the stream has moved it
    steps.end.set()
    expect(job).to_have_attribute('data-state', 'completed')
    expect(job.locator('.fs-status')).to_have_text('Done')
    expect(job.locator('.fs-result')).to_have_text(re.compile('rows read.*1,234.*note.*<b>ok</b>.*exact.*true', re.S))
    expect(job.get_by_role('button')).to_have_count(0)
    expect(job.locator('progress')).to_have_count(0)
    assert sum('/stream' in u for u in found) == live
    quiet(page, found, 1.5 if live else 3.5)
    wait_until(lambda: app.jobs.streams == 0)

@one_look
def test_one_that_fails_is_tried_again(app, page):
    steps.broken = True
    page.goto(f'{app.url}/?live=1')
    page.get_by_role('button', name='Begin a bad one').click()
    job = page.locator('.fs-slot .fs-job')
    expect(job).to_have_attribute('data-live', re.compile('.'))
    steps.end.set()
    expect(job.locator('.fs-status')).to_have_text('Failed')
    expect(job.locator('.fs-why')).to_contain_text('the shelf is empty')
    assert page.locator('[data-live]').count() == 0
    steps.reset()
    job.get_by_role('button', name='Try again').click()
    expect(job.locator('.fs-status')).to_have_text('Running')
    expect(job).to_have_attribute('data-live', re.compile('.'), timeout=4000)  # it is not told any more, but asks
    steps.end.set()
    expect(job.locator('.fs-status')).to_have_text('Done with warnings')
    expect(job.locator('.fs-warnings')).to_have_text('rows: fewer than none')

@one_look
@pytest.mark.parametrize('live', [False, True])
def test_one_is_cancelled_and_all_parts_know(app, page, live):
    id = app.submit()
    page.goto(f'{app.url}/three?job={id}&live={"1" if live else ""}')
    job, state, line, cell = page.locator('.fs-job'), page.locator(f'#job-status-{id}'), page.locator('.fs-line .fs-status'), page.locator('.fs-jobs tbody .fs-status')
    parts = job.locator('.fs-status'), state, line, cell
    for el in parts: expect(el).to_have_text('Running')
    job.get_by_role('button', name='Cancel').click()
    for el in parts: expect(el).to_have_text('Cancelled')
    expect(job.locator('.fs-why')).to_be_visible()
    if not live: return
    steps.percent = 10
    job.get_by_role('button', name='Try again').click()
    expect(job.locator('.fs-status')).to_have_text('Running')
    expect(cell).to_have_text('Running', timeout=4000)  # a list with nothing open is not told that a job was tried again
    expect(line).to_have_text('Running', timeout=4000)

@one_look
def test_one_stream_for_a_page(app, page):
    id, found = app.submit(), asked(page)
    streams = lambda: [u for u in found if '/stream' in u]
    page.goto(f'{app.url}/three?job={id}')
    expect(page.locator('[data-live]')).to_have_count(4)
    wait_until(lambda: page.wait_for_timeout(50) or app.jobs.streams == 1)
    for n in (20, 40):
        steps.percent = n
        for bar in page.locator('progress').all(): expect(bar).to_have_attribute('value', str(n))
    assert len(streams()) == app.jobs.streams == 1
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true}); document.dispatchEvent(new Event('visibilitychange'))")
    wait_until(lambda: page.wait_for_timeout(50) or app.jobs.streams == 0)
    steps.percent = 70
    quiet(page, found, 1)
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    for bar in page.locator('progress').all(): expect(bar).to_have_attribute('value', '70')
    wait_until(lambda: page.wait_for_timeout(50) or app.jobs.streams == 1)  # the parts may have been there before it
    assert len(streams()) == 2
    steps.end.set()
    expect(page.locator('.fs-status', has_text='Done')).to_have_count(4)
    expect(page.locator('[data-live]:not([data-live=""])')).to_have_count(0)
    quiet(page, found, 1.5)
    assert len(streams()) == 2 and app.jobs.streams == 0

@one_look
def test_more_jobs_than_a_stream_has_room_for(app, page):
    app.m.submit_many(step_by_step, [{}]*60, run_at='2100-01-01')
    id = app.submit()
    page.goto(f'{app.url}/list?limit=61')
    expect(page.locator('tbody tr')).to_have_count(61)
    wait_until(lambda: page.wait_for_timeout(50) or app.jobs.streams == 1, 5, 'no stream was opened')
    steps.percent = 55
    expect(page.locator('progress[value="55"]')).to_have_count(1, timeout=5000)

@one_look
def test_a_live_list_shows_what_others_submit(app, page):
    "Also while the jobs that it shows only go on"
    app.submit()
    page.goto(f'{app.url}/list')
    rows = page.locator('.fs-jobs tbody tr')
    for n in (2, 3):
        expect(rows).to_have_count(n - 1)
        page.wait_for_timeout(1500)  # the stream is open, and what came with it is over
        app.submit(run_at='2100-01-01')
        expect(rows).to_have_count(n, timeout=5000)

@one_look
@pytest.mark.parametrize('setup', ['document.body.setAttribute("hx-indicator", "body")', 'htmx.config.globalViewTransitions = true', 'htmx.config.defaultSwapDelay = 500'])
def test_a_step_that_comes_while_the_part_is_on_its_way_is_not_lost(app, new_page, setup):
    id, page = app.submit(), new_page()
    new_page.allowed.append('Transition was skipped')
    steps.percent = 30
    page.goto(f'{app.url}/three?job={id}')
    bar = page.locator('.fs-job progress')
    expect(bar).to_have_attribute('value', '30')
    page.evaluate(setup)
    page.wait_for_timeout(1500)  # what came with the stream is over
    def late(route):
        got = route.fetch()
        steps.percent = 60
        page.wait_for_timeout(1500)  # its step comes by the stream
        route.fulfill(response=got)
    page.route('**/-/progress/*', late, times=1)
    page.evaluate("htmx.trigger('.fs-job', 'jobs-changed')")
    page.wait_for_timeout(3500)
    expect(bar).to_have_attribute('value', '60', timeout=2000)

@one_look
def test_several_that_end_together_are_all_spoken(app, page):
    id = app.submit()
    wait_until(lambda: app.m.get_job(id).status == 'running')
    page.goto(f'{app.url}/three?job={id}')
    voice = page.locator('.fs-hidden[role=status]')
    expect(voice).to_have_text('')
    page.wait_for_timeout(1500)  # what came with the stream is over
    page.evaluate("""() => {
        for (const [job, state] of [['a', 'running'], ['b', 'running']]) document.body.insertAdjacentHTML('beforeend', `<i data-said="${job}: ${state}" data-job="${job}" data-state="${state}">x</i>`)
        document.dispatchEvent(new CustomEvent('htmx:afterSettle', { detail: { elt: document.body } }))
        for (const el of document.querySelectorAll('i[data-said]')) { el.dataset.state = 'failed'; el.dataset.said = `${el.dataset.job}: Failed` }
        document.dispatchEvent(new CustomEvent('htmx:afterSettle', { detail: { elt: document.body } }))
    }""")
    expect(voice).to_have_text('a: Failed. b: Failed')

@pytest.mark.parametrize('app', ['monster_light', 'pico'], indirect=True)
def test_the_bar_is_seen_in_forced_colours(app, new_page):
    page = new_page(forced_colors='active')
    id = app.submit()
    steps.percent = 50
    page.goto(f'{app.url}/three?job={id}')
    bar = page.locator('.fs-job progress')
    expect(bar).to_have_attribute('value', '50')
    def seen():
        shot = Image.open(io.BytesIO(page.screenshot(clip=bar.bounding_box(), animations='disabled'))).convert('RGB')
        left, right = (shot.getpixel((shot.width*at//4, shot.height//2)) for at in (1, 3))
        return left != right  # what is done, and what is not
    wait_until(seen, 5)  # the page may move between the look for its place and the picture

@one_look
def test_a_button_says_why_it_was_refused(app, new_page, monkeypatch):
    page = new_page()
    page.goto(app.url)
    page.context.clear_cookies()
    page.get_by_role('button', name='Begin', exact=True).click()
    expect(page.locator('.fs-slot [role=alert]').first).to_contain_text('load it again')
    page.goto(app.url)
    def full(*a, **kw): raise QuotaExceeded('this tenant has 5 pending jobs, and may have no more')
    monkeypatch.setattr(BackgroundTaskManager, 'submit_with', full)
    new_page.allowed.append('status of 429')
    page.get_by_role('button', name='Begin', exact=True).click()
    expect(page.locator('.fs-slot [role=alert]').first).to_contain_text('5 pending jobs', timeout=4000)

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_all_states_are_readable(app, new_page, axe, shots, scheme):
    def ended(id, *states): return wait_until(lambda: (s := app.m.get_job(id).status) in states and s)
    steps.end.set()
    for rows, want in ((5, 'completed'), (-5, 'completed_with_warnings')): ended(app.submit(rows=rows), want)
    steps.broken = True
    ended(app.submit(), 'failed')
    steps.reset()
    ended(cancelled := app.submit(), 'running')
    app.m.cancel(cancelled)
    ended(cancelled, 'cancelled')
    app.submit(run_at='2100-01-01')
    steps.percent = 42
    ended(app.submit(), 'running')
    page = new_page(color_scheme=scheme)
    page.goto(f'{app.url}/all')
    expect(page.locator('.fs-job')).to_have_count(6)
    assert {j.get_attribute('data-state') for j in page.locator('.fs-job').all()} == {'completed', 'completed_with_warnings', 'failed', 'cancelled', 'scheduled', 'running'}
    expect(page.locator('.fs-job progress').first).to_have_attribute('value', '42')
    axe.none(page)
    shots(f'components-{app.look}-{scheme}', full_page=True)
    page.set_viewport_size(dict(width=390, height=844))
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    page.goto(app.url)
    axe.none(page)
    shots(f'buttons-{app.look}-{scheme}')
