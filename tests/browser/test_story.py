"What a user and an operator of the demo shop live through, in a browser: leaving and coming back, a killed server, no script, a phone, a screen reader."
import re
import httpx2, pytest
from playwright.sync_api import expect
from conftest import wait_until
from test_shop import sample_data
from .conftest import OUTSIDE

DONE = f'imported {sample_data.EXPECTED:,}'
VOICE = '.fs-hidden[role=status]'
DOWN = 'ERR_CONNECTION_REFUSED', 'ERR_CONTENT_LENGTH_MISMATCH', 'ERR_INCOMPLETE_CHUNKED_ENCODING', 'ERR_CONNECTION_RESET', 'ERR_EMPTY_RESPONSE', 'ERR_SOCKET_NOT_CONNECTED', 'htmx:', 'Failed to fetch'

def stay(page): page.evaluate('window.still = true')
def stayed(page): assert page.evaluate('window.still'), 'the page was loaded again'
def dash(shop, tenant, path='/list', q=''): return f'{shop.url}/jobs{path}?tenant={tenant}{q}'
def job_page(shop, tenant, id): return dash(shop, tenant, f'/job/{id}')
def slow(shop, tenant, pause=.5): return shop.submit(tenant, 'catalog/product-import', path='products.csv', pause=pause)
def stop(shop, tenant, *ids):
    for id in ids:
        try: shop.api(tenant, f'/api/v1/admin/background-tasks/{id}/cancel', method='POST')
        except httpx2.HTTPStatusError as e:
            if e.response.status_code != 409: raise  # 409: it has ended meanwhile, on a slow machine
    for id in ids: shop.finished(tenant, id)
def percent(el): return float(el.get_attribute('value') or 0)
def beyond(el, n, seconds=20): wait_until(lambda: el.count() and percent(el.first) > n, seconds, f'the bar did not come beyond {n}')
def status(page): return page.locator('main > p > .fs-status')
def pace(page, seconds='1'): page.locator('#fs-every').select_option(seconds)
def renewals(page, n=2):
    "Wait until the main part has come anew `n` times"
    for _ in range(n):
        with page.expect_response(lambda r: 'x-jobs-refresh' in r.request.headers): pass
    page.wait_for_timeout(100)

@pytest.fixture(scope='module')
def history(shop):
    "Jobs of Globex that have ended: one with warnings, one that failed, one more"
    ids = dict(warned=slow(shop, 'globex', 0), failed=shop.submit('globex', 'catalog/product-import', path='nope.csv'), scan=shop.submit('globex', 'quality/code-quality-scan'))
    for id in ids.values(): shop.finished('globex', id)
    return ids

# --- The shop

def test_a_user_leaves_and_comes_back(shop, page, shots):
    at, banner, rows = f'{shop.url}/acme', '.fs-banner .fs-line', '.fs-jobs tbody tr'
    page.goto(at)
    page.get_by_role('button', name='code quality scan').click()
    expect(page.locator(rows)).to_contain_text('files 3, findings 6')
    stay(page)
    for name in ('product import', 'order import'): page.get_by_role('button', name=name).click()
    lines = page.locator(f'{banner}[data-state=running]')
    expect(lines).to_have_count(2)
    expect(page.locator(f'{banner} progress')).to_have_count(2)
    shots('shop')
    bar = page.locator(f'{banner} progress').last, page.locator(f'{rows} progress').last
    for b in bar: beyond(b, 5)
    stayed(page)
    context = page.context
    page.close()
    page = context.new_page()
    page.goto(at)
    line = page.locator(banner).filter(has_text='Product import')
    expect(line).to_contain_text('Running')
    beyond(line.locator('progress'), 20)
    was = percent(line.locator('progress'))
    page.reload()
    expect(line).to_have_count(1)
    assert percent(line.locator('progress')) >= was
    shots('shop-running', page)
    stay(page)
    expect(line).to_contain_text('Done with warnings', timeout=30_000)
    expect(line).to_contain_text(DONE)
    expect(page.locator(rows).filter(has_text=DONE)).to_have_count(1)
    expect(page.locator('#products')).to_have_text(f'{sample_data.EXPECTED:,}')
    expect(page.locator(f'{rows} progress')).to_have_count(0, timeout=30_000)
    stayed(page)
    shots('shop-done', page, full_page=True)
    page.reload()
    expect(page.locator(banner)).to_have_count(0)

def test_two_shops_side_by_side(shop, new_page):
    ids = {t: slow(shop, t) for t in ('acme', 'globex')}
    pages = {t: new_page() for t in ids}
    asked = {t: [] for t in ids}
    for t, p in pages.items():
        p.on('request', lambda r, t=t: asked[t].append(r.url))
        p.goto(f'{shop.url}/{t}')
        expect(p.locator('.fs-banner .fs-line[data-state=running]').first).to_be_visible()
    for t in ids: shop.submit(t, 'catalog/product-import', path=f'only-{t}.csv')
    for t, p in pages.items(): expect(p.locator('.fs-jobs')).to_contain_text(f'only-{t}.csv')
    for t, other in (('acme', 'globex'), ('globex', 'acme')):
        for url in (f'{shop.url}/{t}', dash(shop, t), dash(shop, t, '')):
            pages[t].goto(url)
            expect(pages[t].locator('h1')).to_be_visible()
            assert f'only-{other}.csv' not in (html := pages[t].content()) and ids[other] not in html
        assert any('/stream' in u for u in asked[t]) and not any(f'tenant={other}' in u or ids[other] in u for u in asked[t])
        pages[t].goto(job_page(shop, t, ids[other]))
        expect(pages[t].locator('[role=alert]')).to_contain_text('no job')
    for t, id in ids.items(): stop(shop, t, id)
    new_page.allowed.append('status of 404')

def test_the_server_is_killed_under_open_pages(shop, new_page):
    id = slow(shop, 'initech', .1)
    new_page.allowed += DOWN
    one, two = new_page(), new_page()
    one.goto(f'{shop.url}/initech')
    two.goto(job_page(shop, 'initech', id))
    pace(two)
    line, row = one.locator('.fs-banner .fs-line'), one.locator('.fs-jobs tbody tr').first
    beyond(line.locator('progress'), 15)
    for p in (one, two): stay(p)
    shop.kill()
    one.wait_for_timeout(1500)
    expect(line).to_contain_text('Running')
    expect(status(two)).to_have_text('Running')
    shop.start()
    expect(status(two)).to_have_text('Done with warnings', timeout=60_000)
    for el in (line, row): expect(el).to_contain_text(DONE)
    expect(two.locator('.fs-result')).to_contain_text(f'{sample_data.EXPECTED:,}')
    expect(two.locator('.fs-facts').first).to_contain_text('1 of 3 failed')
    for p in (one, two): stayed(p)

def test_the_CDN_cannot_be_reached(shop, new_page):
    page = new_page()
    page.context.route(OUTSIDE, lambda route: route.abort())
    new_page.allowed += ['ERR_FAILED', 'outside: https://cdn']
    page.goto(f'{shop.url}/initech')
    assert page.evaluate('typeof htmx') == 'undefined'
    page.get_by_role('button', name='order import').click()
    expect(page).to_have_url(f'{shop.url}/initech')
    line = page.locator('.fs-banner .fs-line').filter(has_text='Order import')
    expect(line).to_contain_text(re.compile('Waiting|Running'))
    stay(page)
    row = page.locator('.fs-jobs tbody tr').first
    expect(row.locator('progress')).to_have_attribute('value', re.compile(r'\d+'))
    for el in (line, row): expect(el).to_contain_text('pages 12, orders 600', timeout=30_000)
    expect(page.locator('#stock')).to_contain_text('600 orders')
    stayed(page)

def test_a_button_that_is_refused_says_so(shop, new_page):
    "The session has ended since the page was loaded"
    page = new_page()
    page.goto(f'{shop.url}/initech')
    before = shop.jobs('initech').keys()
    page.context.clear_cookies()
    page.get_by_role('button', name='test run').click()
    expect(page.locator('main [role=alert]')).to_contain_text('load it again', timeout=5000)
    assert shop.jobs('initech').keys() == before

def test_a_stream_that_was_refused_is_opened_again(shop, new_page):
    "As a proxy does while the server behind it comes up: a browser gives up such a stream for good"
    page, refused = new_page(), []
    new_page.allowed.append('status of 503')
    id = slow(shop, 'initech', .25)
    def refuse(route):
        if len(refused) >= 2: return route.continue_()
        refused.append(1)
        route.fulfill(status=503, body='no')
    page.route('**/-/stream?*', refuse)
    page.goto(f'{shop.url}/initech')
    bar = page.locator('.fs-banner progress').first
    expect(bar).to_be_visible()
    beyond(bar, percent(bar) + 5, 15)  # it comes only with the poll of 30 s
    stop(shop, 'initech', id)

# --- What a screen reader and those who want no motion get

def told(page):
    "All that the live region has been given since, one after the other"
    page.evaluate(f'''() => {{
        window.told = []
        new MutationObserver(ms => {{ if (ms.some(m => m.target.closest?.('{VOICE}') || [...m.addedNodes].some(n => n.matches?.('{VOICE}')))) told.push(document.querySelector('{VOICE}').textContent) }})
            .observe(document.body, {{ childList: true, subtree: true, characterData: true }})
    }}''')
    return lambda: page.evaluate('told')

def test_the_live_region_says_that_a_job_has_ended(shop, page):
    page.goto(f'{shop.url}/acme')
    heard = told(page)
    page.get_by_role('button', name='test run').click()
    expect(page.locator(VOICE)).to_have_text('Test run: Done with warnings', timeout=60_000)  # it runs pytest in a process of its own
    assert heard()[-1] == 'Test run: Done with warnings' and len(heard()) <= 3
    for _ in range(3):  # one that may be over before the page looks
        page.get_by_role('button', name='code quality scan').click()
        expect(page.locator('.fs-banner')).to_contain_text('Code quality scan', timeout=5000)
    expect(page.locator(VOICE)).to_have_text(re.compile(r'^Code quality scan: Done with warnings(, [23] jobs)?$'), timeout=5000)

def test_the_live_region_counts_jobs_that_end_together(shop, page):
    page.goto(f'{shop.url}/acme')
    expect(page.locator(VOICE)).to_have_text('')
    page.evaluate('''() => {
        for (const [job, said] of [['a', 'Scan: Done'], ['b', 'Scan: Done'], ['c', 'Import: Failed']]) {
            const el = document.createElement('i')
            Object.assign(el.dataset, { job, said, state: 'completed', ended: '' })
            document.body.append(el)
        }
        document.dispatchEvent(new CustomEvent('htmx:afterSettle', { detail: { elt: document.body } }))
    }''')
    expect(page.locator(VOICE)).to_have_text('Scan: Done, 2 jobs. Import: Failed')

def test_the_live_region_is_there_before_it_speaks(shop, page):
    "A region that comes with its first words is not read out"
    page.goto(f'{shop.url}/acme')
    expect(page.locator(VOICE)).to_have_count(1, timeout=3000)
    expect(page.locator(VOICE)).to_have_text('')

def test_the_live_region_says_each_thing_once(shop, page):
    ids = [slow(shop, 'acme', p) for p in (.03, .5)]
    page.goto(f'{shop.url}/acme')
    expect(page.locator('.fs-banner .fs-line[data-state=running]')).to_have_count(2)
    heard = told(page)
    expect(page.locator('.fs-banner .fs-line').filter(has_text='lines 20,000')).to_have_count(1, timeout=30_000)
    page.wait_for_timeout(2500)
    assert heard() == ['Product import: Done with warnings']  # two lines of one title are taken for one job that goes to and fro
    stop(shop, 'acme', ids[1])

def test_the_dashboard_says_that_a_job_has_ended(shop, page):
    id = slow(shop, 'acme', .05)
    page.goto(job_page(shop, 'acme', id))
    pace(page)
    expect(status(page)).to_have_text('Done with warnings', timeout=30_000)
    expect(page.locator(VOICE)).to_have_text('Product import: Done with warnings', timeout=3000)

def test_no_motion_for_those_who_want_none(shop, new_page):
    id, moves = slow(shop, 'acme'), 'document.getAnimations().length'
    for motion, want in (('reduce', False), ('no-preference', True)):
        page = new_page(reduced_motion=motion)
        for url in (f'{shop.url}/acme', job_page(shop, 'acme', id), dash(shop, 'acme')):
            page.goto(url)
            expect(page.locator('.fs-status.fs-running').first).to_be_visible()
            assert bool(page.evaluate(moves)) == want, (motion, url)
    stop(shop, 'acme', id)

# --- The dashboard

def test_cancel_try_again_and_run_anew_with_other_arguments(shop, new_page, page, history):
    new_page.allowed.append('status of 422')
    id = slow(shop, 'globex')
    page.goto(job_page(shop, 'globex', id))
    pace(page)
    beyond(page.locator('main > progress'), 1)
    page.get_by_role('button', name='Cancel').click()
    expect(status(page)).to_have_text('Cancelled')
    page.get_by_role('button', name='Try again').click()
    expect(status(page)).to_have_text('Running')
    expect(page.locator('tbody tr')).to_have_count(2)
    page.get_by_role('button', name='Cancel').click()
    expect(status(page)).to_have_text('Cancelled')
    page.get_by_text('Run it again').click()
    page.get_by_label('Arguments as JSON').fill('{"path": "products.csv", "pause": "soon"}')
    page.get_by_role('button', name='Submit as a new job').click()
    expect(page.locator('[role=alert]')).to_contain_text('pause')
    page.go_back()
    if not page.get_by_label('Arguments as JSON').is_visible(): page.get_by_text('Run it again').click()
    page.get_by_label('Arguments as JSON').fill('{"path": "products.csv", "pause": 0}')
    page.get_by_role('button', name='Submit as a new job').click()
    expect(status(page)).to_have_text('Done with warnings', timeout=30_000)
    assert id not in page.url
    expect(page.locator('#args')).to_have_text(re.compile('"pause": 0(.0)?\\s'))
    page.locator('.fs-facts').get_by_role('link', name=id).click()
    expect(page.locator('#job-id')).to_have_text(id)

def test_a_failed_job_is_tried_again(shop, page, shots):
    id = shop.submit('globex', 'catalog/product-import', path='later.csv')
    shop.finished('globex', id)
    page.goto(job_page(shop, 'globex', id))
    pace(page)
    expect(page.locator('.fs-why')).to_contain_text("there is no file 'later.csv'")
    expect(page.locator('#trace')).to_contain_text('in product_import')
    expect(page.locator('#trace')).not_to_contain_text('attempt.py')
    shots('job-failed', full_page=True)
    page.get_by_role('button', name='Try again').click()
    expect(page.locator('tbody tr')).to_have_count(2)
    expect(status(page)).to_have_text('Failed')
    files = shop.data/'files'/'globex'
    (files/'later.csv').write_bytes(b''.join((files/'products.csv').read_bytes().splitlines(True)[:11]))
    page.get_by_role('button', name='Try again').click()
    expect(status(page)).to_have_text('Done')
    expect(page.locator('.fs-result')).to_contain_text('products')
    expect(page.locator('tbody tr')).to_have_count(3)

def test_the_keyboard(shop, page, history, shots):
    for _ in range(2): shop.submit('globex', 'quality/code-quality-scan')
    page.goto(dash(shop, 'globex'))
    pace(page, '0')
    page.locator('#fs-every').blur()
    shots('list')
    search, dialog, chosen = page.locator('#fs-q'), page.locator('#fs-keys'), page.locator('tr[aria-selected=true]')
    rows = page.locator('tbody tr')
    page.keyboard.press('/')
    expect(search).to_be_focused()
    page.keyboard.type('jkxr?/')
    expect(search).to_have_value('jkxr?/')
    expect(dialog).to_be_hidden()
    page.keyboard.press('Escape')
    search.blur()
    page.keyboard.press('?')
    expect(dialog).to_be_visible()
    page.keyboard.press('j')
    expect(chosen).to_have_count(0)
    page.keyboard.press('Escape')
    expect(dialog).to_be_hidden()
    for key, at in (('k', 0), ('j', 1), ('j', 2), ('k', 1)):
        page.keyboard.press(key)
        expect(rows.nth(at)).to_have_attribute('aria-selected', 'true')
    page.keyboard.press('x')
    expect(rows.nth(1).get_by_role('checkbox')).to_be_checked()
    expect(page.locator('[data-chosen]')).to_have_text('1 chosen')
    expect(page.get_by_role('button', name='Delete')).to_be_enabled()
    page.keyboard.press('x')
    expect(page.get_by_role('button', name='Delete')).to_be_disabled()
    page.keyboard.press('x')
    with page.expect_response(lambda r: 'x-jobs-refresh' in r.request.headers): page.keyboard.press('r')
    expect(rows.nth(1).get_by_role('checkbox')).to_be_checked()
    url = rows.nth(1).get_by_role('link').get_attribute('href')
    page.keyboard.press('Control+j')
    page.keyboard.press('Enter')
    expect(page).to_have_url(shop.url + url)
    page.go_back()
    expect(page).to_have_url(dash(shop, 'globex'))

def test_a_search_is_in_the_address(shop, new_page, page, history):
    new_page.allowed.append('status of 422')
    page.goto(dash(shop, 'globex'))
    rows = page.locator('tbody tr')
    total = rows.count()
    page.locator('#fs-q').fill('status:failed error:nope.csv')
    page.keyboard.press('Enter')
    expect(page).to_have_url(re.compile(r'q=status%3Afailed\+error%3Anope\.csv'))
    expect(page).to_have_url(re.compile('tenant=globex'))
    expect(rows).to_have_count(1)
    rows.get_by_role('link').click()
    expect(page.locator('#job-id')).to_have_text(history['failed'])
    page.go_back()
    expect(page.locator('#fs-q')).to_have_value('status:failed error:nope.csv')
    expect(rows).to_have_count(1)
    page.get_by_role('navigation', name='By state').get_by_role('link', name='With warnings').click()
    expect(page.locator('#fs-q')).to_have_value('error:nope.csv status:completed_with_warnings')
    expect(page.locator('.fs-empty')).to_be_visible()
    page.go_back(); page.go_back()
    expect(page).to_have_url(dash(shop, 'globex'))
    expect(rows).to_have_count(total)
    page.locator('#fs-q').fill('nope:1')
    page.keyboard.press('Enter')
    expect(page.locator('[role=alert]')).to_contain_text('nothing to search by')

@pytest.fixture
def small(new_page): return new_page(size=(1000, 320))

def test_a_refresh_keeps_what_is_begun_in_a_list(shop, small, history):
    page = small
    for n in range(6): shop.submit('globex', 'catalog/product-import', path=f'none{n}.csv')
    page.goto(dash(shop, 'globex'))
    page.evaluate('document.querySelector("main").firstElementChild.old = true')
    page.keyboard.press('j')
    box = page.locator('tbody tr').nth(4).get_by_role('checkbox')
    box.check()
    page.evaluate('scrollTo(0, 10000)')
    at = page.evaluate('scrollY')
    assert at > 200
    pace(page)
    box.evaluate('el => el.focus({preventScroll: true})')
    page.evaluate(f'scrollTo(0, {at})')
    renewals(page)
    assert not page.evaluate('document.querySelector("main").firstElementChild.old'), 'it has not been renewed'
    expect(box).to_be_checked()
    expect(page.locator('[data-chosen]')).to_have_text('1 chosen')
    expect(page.locator('tbody tr').first).to_have_attribute('aria-selected', 'true')
    assert page.evaluate('scrollY') == at  # it goes back to the selected row
    expect(box).to_be_focused(timeout=3000)  # whoever goes by the keyboard is thrown to the top of the page

def test_a_refresh_keeps_what_is_begun_on_a_job(shop, small, history):
    page = small
    page.goto(job_page(shop, 'globex', history['warned']))
    page.evaluate('document.querySelector("main").firstElementChild.old = true')
    page.get_by_text('Run it again').click()
    args = page.get_by_label('Arguments as JSON')
    args.fill('{"path": "other.csv"}')
    args.blur()
    log = page.locator('#log')
    log.evaluate('el => { el.scrollTop = 300 }')
    pace(page)
    page.locator('#fs-every').blur()
    renewals(page)
    assert not page.evaluate('document.querySelector("main").firstElementChild.old'), 'it has not been renewed'
    expect(page.locator('#fs-again')).to_have_attribute('open', '')
    assert log.evaluate('el => el.scrollTop') == 300
    expect(args).to_have_value('{"path": "other.csv"}', timeout=3000)  # what was typed is gone

def test_a_hidden_tab_asks_nothing(shop, new_page, history):
    id, asked, pages = slow(shop, 'acme'), [], [new_page() for _ in range(2)]
    for p, url in zip(pages, (dash(shop, 'acme'), f'{shop.url}/acme')):
        p.goto(url)
        p.wait_for_timeout(500)
    pace(pages[0])
    renewals(pages[0], 1)
    for p in pages: p.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true}); document.dispatchEvent(new Event('visibilitychange'))")
    pages[0].wait_for_timeout(700)
    for p in pages: p.on('request', lambda r: None if '/stock' in r.url else asked.append(r.url))  # that one is the shop's own
    pages[0].wait_for_timeout(2500)
    assert asked == []
    for p in pages: p.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    wait_until(lambda: pages[0].wait_for_timeout(100) or any('/stream' in u for u in asked) and any('/list' in u for u in asked), 10)
    stop(shop, 'acme', id)

def test_a_question_waits_for_its_answer(shop, page, history):
    "The page that asks whether all are meant is not replaced by the list"
    page.goto(dash(shop, 'globex', q='&q=status:failed'))
    pace(page)
    page.get_by_role('button', name='All that match').click()
    expect(page.locator('h1')).to_have_text('All that match')
    page.wait_for_timeout(2500)
    expect(page.locator('h1')).to_have_text('All that match')
    expect(page.get_by_role('button', name='Delete: ')).to_be_visible()

# --- Without a script

def test_without_a_script(shop, new_page):
    page = new_page(java_script_enabled=False)
    rows, cells = page.locator('tbody tr'), lambda: page.locator('tbody tr').all_inner_texts()
    def again(true, what): wait_until(lambda: true() or page.wait_for_timeout(300) or page.reload() and None, 20, what)
    page.goto(f'{shop.url}/initech')
    for task in ('test run', 'code quality scan', 'product import'):
        page.get_by_role('button', name=task).click()
        expect(page).to_have_url(f'{shop.url}/initech')
    expect(page.locator('.fs-banner')).to_contain_text('Product import')
    page.get_by_role('link', name='Dashboard').click()
    expect(page.locator('h1')).to_have_text('Overview')
    page.get_by_role('navigation', name='Jobs').get_by_role('link', name='Jobs').click()
    rows.filter(has_text='Product import').first.get_by_role('link').click()
    page.get_by_role('button', name='Cancel').click()
    again(lambda: status(page).inner_text() == 'Cancelled', 'it was not cancelled')
    page.get_by_role('button', name='Try again').click()
    again(lambda: status(page).inner_text() == 'Running', 'it was not tried again')
    page.get_by_role('button', name='Cancel').click()
    again(lambda: status(page).inner_text() == 'Cancelled', 'it was not cancelled')
    page.get_by_text('Run it again').click()
    page.get_by_label('Arguments as JSON').fill('{"path": "products.csv", "pause": 0.001}')
    page.get_by_role('button', name='Submit as a new job').click()
    again(lambda: status(page).inner_text() == 'Done with warnings', 'it has not ended')
    page.get_by_role('navigation', name='Jobs').get_by_role('link', name='Jobs').click()
    before = rows.count()
    page.locator('#fs-q').fill('type:product_import')
    page.get_by_role('button', name='Search').click()
    expect(page).to_have_url(re.compile('q=type%3Aproduct_import'))
    assert 0 < rows.count() < before and all('Product import' in c for c in cells())
    page.locator('#fs-q').fill('status:cancelled')
    page.keyboard.press('Enter')
    expect(page).to_have_url(re.compile('q=status%3Acancelled'))
    assert (n := rows.count()) and all('Cancelled' in c for c in cells())
    rows.first.get_by_role('checkbox').check()
    page.get_by_role('button', name='Try again').click()
    expect(page.locator('.fs-note')).to_contain_text('1 job due again')
    assert rows.count() == n - 1 and page.locator('#fs-q').input_value() == 'status:cancelled'
    page.goto(dash(shop, 'initech', q='&q=status:running'))
    again(lambda: rows.count(), 'it does not run')
    rows.first.get_by_role('checkbox').check()
    page.get_by_role('button', name='Cancel').click()
    expect(page.locator('.fs-note')).to_contain_text('1 job cancelled, or asked to stop')
    page.goto(dash(shop, 'initech', q='&q=status:cancelled'))
    again(lambda: rows.count() == n, 'it was not cancelled')
    page.get_by_role('button', name='All that match').click()
    expect(page.locator('main p').first).to_contain_text('status:cancelled')
    page.get_by_role('button', name=re.compile(f'^Delete: {n} job')).click()
    expect(page.locator('.fs-note')).to_contain_text(re.compile(f'{n} jobs? deleted'))
    expect(page.locator('.fs-empty')).to_be_visible()
    for path in ('/tenants', '/workers', '/audit'):
        page.goto(f'{shop.url}/jobs{path}')
        expect(page.locator('tbody tr').first).to_be_visible()
    expect(page.locator('tbody')).to_contain_text(re.compile(f'delete: {n} jobs? with status:cancelled'))
    assert page.locator('[data-js]:visible').count() == 0

# --- Every page: on a phone, in light and dark, to axe, under its policy

def seen_as_a_chart(svg):
    "Each bar is a thing of its own, drawn where it belongs, and the highest reaches to the top"
    rects = svg.locator('> rect').all()
    assert len(rects) == svg.locator('rect').count() > 1 and svg.locator('> line').count() == 1 and svg.locator('> text').count() == 3
    boxes, whole = [r.bounding_box() for r in rects], svg.bounding_box()
    assert all(b['width'] > 0 and b['height'] > 0 for b in boxes) and min(b['y'] for b in boxes) < whole['y'] + whole['height']/4

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_every_page(shop, new_page, history, axe, shots, scheme):
    id, page, outside = slow(shop, 'globex', 3), new_page(color_scheme=scheme), []  # it has to run as long as the pages are visited
    page.on('request', lambda r: None if r.url.startswith((shop.url, 'data:')) else outside.append(r.url))
    t, names = 'globex', {}
    urls = dict(index='/', shop='/globex', products='/globex/products', missing='/nope', **{n: dash(shop, t, p, q).removeprefix(shop.url) for n, p, q in (
        ('overview', '', ''), ('list', '/list', ''), ('nothing', '/list', '&q=type:nope'), ('wrong', '/list', '&q=nope:1'), ('failed', f"/job/{history['failed']}", ''), ('warned', f"/job/{history['warned']}", ''),
        ('running', f'/job/{id}', ''), ('absent', '/job/nope', ''), ('tenants', '/tenants', ''), ('workers', '/workers', ''), ('audit', '/audit', ''))})
    new_page.allowed += ['status of 404', 'status of 422']
    for name, url in urls.items():
        page.set_viewport_size(dict(width=390, height=844))
        outside.clear()
        r = page.goto(shop.url + url)
        if name == 'failed': page.locator('details').evaluate_all('els => els.forEach(d => { d.open = true })')
        wide = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
        assert wide[0] <= wide[1], (name, wide)
        if name in ('shop', 'list', 'failed') and scheme == 'light': shots(f'phone-{name}')
        page.set_viewport_size(dict(width=1280, height=800))
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), name
        axe.none(page)
        if name == 'overview': seen_as_a_chart(page.locator('svg.fs-chart'))
        if '/jobs' in url:
            assert "default-src 'none'" in r.headers['content-security-policy'] and outside == [], name
        shots(f'{name}-{scheme}' if scheme == 'dark' else name, full_page=True)
    page.goto(dash(shop, t))
    page.locator('tbody tr').first.get_by_role('checkbox').check()
    page.locator('#fs-every').blur()
    page.keyboard.press('j'); page.keyboard.press('?')
    expect(page.locator('#fs-keys')).to_be_visible()
    axe.none(page)
    shots(f'dialog-{scheme}')
    page.keyboard.press('Escape')
    page.get_by_role('button', name='All jobs').click()
    expect(page.locator('h1')).to_have_text('All that match')
    axe.none(page)
    page.set_viewport_size(dict(width=390, height=844))
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    other = 'dark' if scheme == 'light' else 'light'
    page.goto(dash(shop, t))
    page.locator('#fs-look').select_option(other)
    axe.none(page)
    stop(shop, t, id)
