"The demo shop: its parser and sample data, and the whole of it as a newcomer would use it, kill -9 included."
import collections, io, os, re, signal, socket, sqlite3, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote
import httpx2, pytest
from bs4 import BeautifulSoup
from hypothesis import given, strategies as st

SHOP = Path(__file__).resolve().parents[1]/'examples'/'shop'
sys.path.insert(0, str(SHOP))
import products, sample_data, shops  # noqa: E402
from fh_saas.jobs.retries import Permanent  # noqa: E402

# --- The parser

@pytest.mark.parametrize('kind', sample_data.BROKEN)
def test_broken_lines_are_refused_with_a_reason(kind):
    bad = sample_data.BROKEN[kind](['ACM-1', 'Paint', '12.50', 'EUR', '3'])
    raw = next(products.lines(io.BytesIO((bad if isinstance(bad, bytes) else bad.encode()) + b'\n')))[1]
    with pytest.raises(ValueError, match='.{5,120}'): products.product(products.cells(raw))

@pytest.mark.parametrize('name', sample_data.ODD)
def test_odd_names_are_kept_as_they_are(name):
    raw = sample_data.line('ACM-1', name, '12.5', 'EUR', '3').encode() + b'\r\n'
    assert products.product(products.cells(raw)) == dict(sku='ACM-1', name=name, price_cents=1250, currency='EUR', quantity=3)

@given(st.lists(st.binary(max_size=60).map(lambda b: b.replace(b'\n', b''))))
def test_any_bytes_harm_only_their_own_line(bads):
    good = b'ACM-1,saw,1,EUR,1\n'
    got = []
    for _, raw in products.lines(io.BytesIO(b''.join(b + b'\n' + good for b in bads))):
        try: got.append(products.product(products.cells(raw)))
        except ValueError: got.append(None)
    assert len(got) == 2*len(bads) and all(p and p['name'] == 'saw' for p in got[1::2])

@given(st.lists(st.text(max_size=30), min_size=5, max_size=5))
def test_any_text_is_a_product_or_a_ValueError(fields):
    try: p = products.product(fields)
    except ValueError: return
    assert p['price_cents'] >= 0 and p['quantity'] >= 0 and p['sku'].isascii() and p['currency'] in products.CURRENCIES

def test_last_line_may_lack_its_end(): assert [n for n, _ in products.lines(io.BytesIO(b'a\nb'))] == [1, 2]
def test_a_long_line_is_one_line():
    got = list(products.lines(io.BytesIO(b'x'*products.LIMIT*3 + b'\nb\n')))
    assert [n for n, _ in got] == [1, 2] and len(got[0][1]) == products.LIMIT+1

@pytest.mark.parametrize('n', [products.LIMIT-1, products.LIMIT, products.LIMIT+1])
def test_lines_around_the_limit(n):
    assert [len(raw) for _, raw in products.lines(io.BytesIO(b'x'*n + b'\nb\n'))] in ([n+1, 2], [products.LIMIT+1, 2])

def test_headers():
    head = b'sku,name,price,currency,quantity\n'
    assert products.is_header(head) and products.is_header(b'\xef\xbb\xbf' + head)
    assert not any(map(products.is_header, (b'', b'\n', head.upper(), head.decode().encode('utf-16'), b'PK\x03\x04\0')))

# --- The sample data

def test_sample_file_comes_to_what_it_says(tmp_path):
    report, again = [sample_data.write_products(tmp_path/n, 'acme') for n in ('a.csv', 'b.csv')]
    assert (tmp_path/'a.csv').read_bytes() == (tmp_path/'b.csv').read_bytes() and report == again
    skus, seen = set(), collections.Counter()
    with (tmp_path/'a.csv').open('rb') as f:
        numbered = products.lines(f)
        assert products.is_header(next(numbered)[1])
        for n, raw in numbered:
            if not raw.strip(): seen['blank'] += 1; continue
            try: sku = products.product(products.cells(raw))['sku']
            except ValueError: seen['broken'] += 1; continue
            if sku in skus: seen['duplicates'] += 1
            skus.add(sku)
    assert report == dict(lines=n, products=len(skus), **seen)
    assert n == 20_000 and len(skus) == sample_data.EXPECTED and seen['broken'] > 300
    assert sample_data.write_products(tmp_path/'c.csv', 'globex') == report and (tmp_path/'c.csv').read_bytes() != (tmp_path/'a.csv').read_bytes()

# --- Paths and pages

@pytest.mark.parametrize('name', ['../x', 'a/b', '', '.', '..', '/etc/passwd', '\0'])
def test_file_names_cannot_lead_elsewhere(name):
    with pytest.raises(Permanent): shops.shop_file('acme', name)

def test_links_cannot_lead_elsewhere(tmp_path):
    (tmp_path/'x').symlink_to('/etc/passwd')
    with pytest.raises(Permanent): shops.inside(tmp_path, 'x')

@pytest.mark.parametrize('shop', ['nope', '..', '', 'ACME'])
def test_unknown_shops_have_no_files(shop):
    with pytest.raises(Permanent): shops.shop_file(shop, 'feed.csv')

# --- The whole shop

FINISHED = 'completed', 'completed_with_warnings', 'failed', 'cancelled'
API, TASKS_AT = '/api/v1', '/api/v1/admin/background-tasks'

class Shop:
    "The shop in a process of its own, seen through its pages and its API"
    def __init__(self, data):
        with socket.create_server(('127.0.0.1', 0)) as s: self.port = s.getsockname()[1]
        self.url, self.data = f'http://127.0.0.1:{self.port}', data
        self.http = httpx2.Client(base_url=self.url, trust_env=False, timeout=10)

    def start(self):
        env = os.environ | dict(PORT=str(self.port), FH_SAAS_DATA=str(self.data), PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        self.proc = subprocess.Popen([sys.executable, SHOP/'main.py'], env=env, stdout=subprocess.PIPE, text=True)
        assert self.proc.stdout.readline() == f'The shop is at {self.url}\n'
        for _ in range(200):
            try: self.http.get('/'); return self
            except httpx2.TransportError: time.sleep(.05)
        raise TimeoutError('the shop does not answer')

    def kill(self):
        self.proc.send_signal(signal.SIGKILL)
        self.proc.wait()

    def page(self, path, **kw): return BeautifulSoup(self.http.get(path, **kw).raise_for_status().text, 'html.parser')

    def api(self, shop, path, *, method='GET', **kw):
        "What the API says to a shop's script"
        return self.http.request(method, path, headers=dict(Authorization=f'Bearer demo-{shop}'), **kw).raise_for_status().json()

    def jobs(self, shop): return {j['id']: j for j in self.api(shop, TASKS_AT, params=dict(limit=500))['items']}

    def submit(self, shop, task, **args):
        "Start a job by the API, for example catalog/product-import; its id"
        return self.api(shop, f'{API}/{task}', method='POST', json=args)['job_id']

    def form(self, path, button, **kw):
        "Where the form of a button goes, and all it carries"
        form = next(b for b in self.page(path, **kw).find_all('button') if b.text == button).find_parent('form')
        assert form['method'] == 'post'
        return form['action'], {i['name']: i['value'] for i in form.select('input[type=hidden]')}

    def post(self, path, data, frm='/', **headers):
        "Send a form as a browser does from one of the shop's pages"
        return self.http.post(path, data=data, headers={'Origin': self.url, 'Sec-Fetch-Site': 'same-origin', 'Referer': self.url + frm} | headers)

    def press(self, shop, task):
        "Press a button of the page, with its form and without a script; the new job's id"
        before, (action, data) = self.jobs(shop), self.form(f'/{shop}', task.replace('_', ' '))
        assert data.keys() == {'csrf', 'what'}
        r = self.post(action, data, f'/{shop}')
        assert (r.status_code, r.headers['location']) == (303, f'/{shop}')
        (id, job), = ((i, j) for i, j in self.jobs(shop).items() if i not in before)
        assert (job['task_type'], job['triggered_by']) == (task, 'manual:local')
        return id

    def row(self, shop, job):
        "A job, as the API has it"
        j = self.api(shop, f'{TASKS_AT}/{job}')
        assert (j['completed_at'] is not None) == (j['status'] in FINISHED)
        return SimpleNamespace(percent=j['progress_percent'], **j)

    def part(self, shop, job):
        "A job, as its component shows it; one that has ended asks no more"
        part = self.page(f'/jobs/-/progress/{job}', params=dict(tenant=shop), headers={'HX-Request': 'true'}).section
        assert part.has_attr('hx-get') == (part['data-state'] not in FINISHED)
        return part

    def until(self, shop, job, test, seconds=40):
        end = time.monotonic() + seconds
        while not test(row := self.row(shop, job)):
            assert time.monotonic() < end, f'{job} after {seconds} s: {row}'
            time.sleep(.2)
        return row

    def finished(self, shop, job): return self.until(shop, job, lambda r: r.status in FINISHED)

    def sql(self, shop, q):
        file, = self.data.glob(f'**/*{shop}*.db')
        db = sqlite3.connect(f'file:{file}?mode=ro', uri=True)
        try: return db.execute(q).fetchall()
        finally: db.close()

@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    shop = Shop(tmp_path_factory.mktemp('shop')).start()
    yield shop
    shop.proc.terminate()
    try: shop.proc.wait(15)
    except subprocess.TimeoutExpired: shop.kill(); raise
    finally: shop.http.close()

def test_pages_refuse_what_they_should(shop):
    get = shop.http.get
    assert [get(p).status_code for p in ('/', '/acme', '/globex', '/initech', '/acme/products', '/acme/stock', '/jobs?tenant=acme', '/jobs/list?tenant=acme', '/jobs/tenants')] == [200]*9
    assert get('/jobs').headers['location'] == '/jobs/tenants'
    for path in ('/nope', '/ACME', '/nope/products', '/nope/stock', '/acme/feed', '/nope/feed', '/%2e%2e/feed', '/acme/jobs', '/jobs?tenant=nope', '/jobs/list?tenant=nope', '/jobs/list', '/jobs/nope',
                 '/jobs/job/nope?tenant=acme', f'/jobs/job/{"0"*32}?tenant=acme', '/marketplace/nope/orders', '/marketplace/acme/orders?page=99', '/marketplace/acme/orders?page=x'):
        assert get(path).status_code == 404, path
    assert get('/nope', headers=dict(shop='acme', cookie='shop=acme'), params=dict(shop='acme')).status_code == 404
    for host in ('evil.example', 'evil.example:80', '127.0.0.1.evil.example'):
        for path in ('/acme', '/jobs?tenant=acme', '/jobs/-/banner?tenant=acme', TASKS_AT): assert get(path, headers={'Host': host}).status_code == 400, (host, path)
    assert get('/acme', headers={'X-Forwarded-For': '203.0.113.5'}).status_code == 200 and get('/jobs/list?tenant=acme', headers={'X-Forwarded-For': '203.0.113.5'}).status_code == 403
    assert not shop.page('/acme').select('tbody tr')

def test_buttons_refuse_what_they_should(shop):
    action, data = shop.form('/acme', 'test run')
    for h in ({'Origin': 'http://evil.example'}, {'Origin': 'null'}, {'Sec-Fetch-Site': 'cross-site'}, {'Sec-Fetch-Site': 'same-site'}):
        assert shop.post(action, data, **h).status_code == 403, h
    for gone in data: assert shop.post(action, {k: v for k, v in data.items() if k != gone}).status_code == 403, gone
    # not the last character, of which a signature in base64 uses four bits only
    for k in data: assert shop.post(action, data | {k: data[k][:-5] + ('x' if data[k][-5] != 'x' else 'y') + data[k][-4:]}).status_code == 403, k
    assert shop.post(action, data, Cookie='session_=').status_code == 403  # the page of another session
    action, data = shop.form('/acme', 'test run')  # with the cookie that came since
    for other in ('globex', 'nope'): assert shop.post(f'/jobs/-/start?tenant={other}', data).status_code == 404, other
    assert shop.http.get(action).status_code in (404, 405)
    assert shop.post('/jobs/-/start', data).status_code == 404
    action, data = shop.form('/jobs/tenants', 'Suspend')  # of the dashboard
    assert shop.post(action, data, Origin='http://evil.example').status_code == 403 and shop.post(action, data | dict(csrf='x'*40)).status_code == 403
    assert not any(shop.jobs(s) for s in shops.SHOPS) and 'paused' not in shop.page('/jobs/tenants').text

def test_the_api_refuses_what_it_should(shop):
    def status(path, token='demo-acme', method='GET', **kw): return shop.http.request(method, path, headers={'Authorization': f'Bearer {token}'} if token else {}, **kw).status_code
    job = shop.submit('initech', 'quality/code-quality-scan')
    assert status(f'{TASKS_AT}/{job}', 'demo-initech') == 200 and status(f'{TASKS_AT}/{job}?tenant=initech', 'demo-admin') == 200
    for token in ('demo-acme', 'demo-globex'):
        for path in (f'{TASKS_AT}/{job}', f'{TASKS_AT}/{job}?tenant=initech', f'/jobs/job/{job}', f'/jobs/job/{job}?tenant=initech', f'{TASKS_AT}?tenant=initech'): assert status(path, token) == 404, (token, path)
        for act in ('cancel', 'retry', 'rerun'): assert status(f'{TASKS_AT}/{job}/{act}', token, 'POST') == 404, (token, act)
        assert status(f'{TASKS_AT}/{job}', token, 'DELETE') == 404
        assert status(f'/jobs/-/progress/{job}', token) == status(f'/jobs/-/status/{job}?tenant=initech', token) == 286  # in the place of a component: there is no such job, and no asking again
        assert status('/jobs/tenants', token) == status('/jobs/workers', token) == 403
    assert status(TASKS_AT, 'demo-nope') == status(TASKS_AT, 'demo-') == 401
    assert status(f'{TASKS_AT}/{job}', 'demo-admin') == 404 and status(TASKS_AT, None) == 404  # of no tenant
    assert status(f'{API}/catalog/product-import', method='POST', json={}) == 422 and status(f'{API}/catalog/nope', method='POST', json={}) == 404
    assert shop.finished('initech', job).status == 'completed_with_warnings' and not shop.jobs('acme')

def test_a_killed_import_ends_by_itself_and_is_exact(shop):
    job = shop.press('acme', 'product_import')
    assert shop.http.get(f'/jobs/job/{job}', params=dict(tenant='globex')).status_code == 404 # another shop's job does not exist
    shop.until('acme', job, lambda r: 20 <= (r.percent or 0) <= 80)
    assert shop.part('acme', job)['data-state'] == 'running'
    shop.kill()
    assert 0 < shop.sql('acme', 'SELECT count(*) FROM products')[0][0] < sample_data.EXPECTED
    shop.start()
    row = shop.finished('acme', job)
    assert (row.status, row.attempts) == ('completed_with_warnings', dict(begun=2, failed=1, most=3)), row
    assert shop.sql('acme', 'SELECT count(*), count(DISTINCT sku), count(DISTINCT first_job) FROM products') == [(sample_data.EXPECTED,)*2 + (1,)]
    assert shop.sql('acme', 'SELECT id, retry_count, status FROM tenant_jobs') == [(job, 1, 'completed_with_warnings')]
    result = dict(imported=sample_data.EXPECTED, skipped=445, blank=15, updated=0, lines=20_000, products=sample_data.EXPECTED)
    assert row.result == result and row.details['bytes'] == shop.data.joinpath('files', 'acme', 'products.csv').stat().st_size
    page = shop.page('/acme')
    assert page.find(id='products').text == f'{sample_data.EXPECTED:,}'
    tr, = page.select('.fs-jobs tbody tr')
    assert 'Done with warnings' in tr.text and all(f'{k} {v:,}' in tr.text for k, v in result.items())
    page = shop.page(f'/jobs/job/{job}', params=dict(tenant='acme'))
    assert '1 of 3 failed' in page.find(class_='fs-facts').text and len(page.table.tbody.find_all('tr')) == 2
    for part in (f'"imported": {sample_data.EXPECTED}', '"skipped": 445', '"blank": 15', '"updated": 0'): assert part in page.find(id='result').text
    warnings = [li.text for li in page.select('.fs-warnings li')]
    assert warnings[-1] == '… and 395 more' and len(warnings) == 51 and all(w.startswith('line ') for w in warnings[:-1])
    assert int(re.search(r'Log \(200 of (\d+) lines\)', page.text)[1]) > 445 and len(page.find(id='log').text.splitlines()) == 200  # with those of the first attempt
    assert shop.part('acme', job)['data-state'] == 'completed_with_warnings' and shop.sql('globex', 'SELECT count(*) FROM products') == [(0,)]
    assert shop.finished('acme', shop.press('acme', 'product_export')).status == 'completed'
    feed = shop.http.get('/acme/feed')
    assert feed.headers['content-disposition'].startswith('attachment') and len(feed.text.splitlines()) == sample_data.EXPECTED+1
    assert ',=' not in feed.text and '"=' not in feed.text # what a spreadsheet would run

def test_the_other_four_tasks(shop):
    jobs = {t: shop.press('globex', t) for t in ('order_import', 'product_export', 'test_run', 'code_quality_scan')}
    ends = {t: shop.finished('globex', j) for t, j in jobs.items()}
    assert ends['order_import'].status == 'completed' and ends['order_import'].result == dict(pages=12, orders=600)
    assert ends['order_import'].attempts == dict(begun=2, failed=1, most=8) # the 503, after which it went on with page 5
    assert ends['order_import'].details['resumed_after_page'] == 4
    assert '"resumed_after_page": 4' in shop.page(f"/jobs/job/{jobs['order_import']}", params=dict(tenant='globex')).find(id='details').text
    assert shop.sql('globex', 'SELECT count(*), count(DISTINCT id) FROM orders') == [(600, 600)]
    assert ends['product_export'].status == 'completed_with_warnings' # a feed of no products
    assert ends['test_run'].status == 'completed_with_warnings' and ends['test_run'].result == dict(passed=4, failed=1, errors=0, skipped=1)
    assert ends['code_quality_scan'].status == 'completed_with_warnings' and ends['code_quality_scan'].result == dict(files=3, findings=6)
    shown = ' '.join(tr.text for tr in shop.page('/globex').select('.fs-jobs tbody tr'))
    for outcome in ('pages 12, orders 600', 'passed 4, failed 1, errors 0, skipped 1', 'files 3, findings 6'): assert outcome in shown
    assert 'the shop has no products yet' in shop.part('globex', jobs['product_export']).find(class_='fs-warnings').text
    assert len(shop.part('globex', jobs['code_quality_scan']).select('.fs-warnings li')) == 6 and len(shop.part('globex', jobs['test_run']).select('.fs-warnings li')) == 1
    assert len(shop.http.get('/globex/feed').text.splitlines()) == 1

@pytest.mark.parametrize('evil', ['<img src=x onerror=alert(1)>"\'&'])
def test_shown_text_is_escaped(shop, evil):
    job = shop.submit('initech', 'catalog/product-import', path=evil)
    assert shop.finished('initech', job).status == 'failed'
    for path in ('/initech', f'/jobs/job/{job}?tenant=initech', '/jobs/list?tenant=initech', f'/jobs/list?tenant=initech&q={quote(evil)}', f'/jobs/-/progress/{job}?tenant=initech'):
        html = shop.http.get(path).text
        assert '<img' not in html and '&lt;img' in html, path
