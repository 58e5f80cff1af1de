"The demo shop: its parser and sample data, and the whole of it as a newcomer would use it, kill -9 included."
import collections, io, os, re, signal, socket, sqlite3, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import httpx2, pytest
from bs4 import BeautifulSoup
from hypothesis import given, strategies as st

SHOP = Path(__file__).resolve().parents[1]/'examples'/'shop'
sys.path.insert(0, str(SHOP))
import pages, products, sample_data, shops  # noqa: E402
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

def test_shown_text_is_escaped():
    evil = '<img src=x onerror=alert(1)>"\'&'
    none = dict.fromkeys('triggered_by started_at completed_at result payload details run_at'.split())
    job = SimpleNamespace(**none, id='0', created_at='2026-01-01T00:00:00', job_type=evil, status='running', retry_count=1, max_retries=3, attempt=1,
        progress_percent=5, progress_message=evil, error_message=evil, error_log=evil)
    logs = [dict(at='', attempt=1, level='warning', message=evil, item=evil)]
    tries = [dict(number=1, started_at='', ended_at='', outcome=evil, error=evil)]
    html = pages.to_xml((pages.row('acme', job), pages.job_page('acme', job, tries, logs)))
    assert '<img' not in html and html.count('&lt;img') >= 8

# --- The whole shop

FINISHED = 'completed', 'completed with warnings', 'failed', 'cancelled'

class Shop:
    "The shop in a process of its own, seen through its pages"
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

    def press(self, shop, task):
        "Press a button of the page's form; the new job's id"
        form = self.page(f'/{shop}').form
        assert form.find('button', value=task)
        r = self.http.post(form['action'], data=dict(name=task), headers={'Origin': self.url, 'Sec-Fetch-Site': 'same-origin'})
        assert (r.status_code, r.headers['location']) == (303, f'/{shop}')
        return next(tr['id'] for tr in self.page(f'/{shop}').select('tbody tr') if task in tr.text).removeprefix('job-')

    def row(self, shop, job):
        "Status and percent of a job, as its fragment shows them"
        tr = self.page(f'/{shop}/jobs/{job}/row', headers={'HX-Request': 'true'}).tr
        cells, bar = [td.get_text(' ', strip=True) for td in tr.find_all('td')], tr.progress
        assert tr.has_attr('hx-get') == (cells[1] not in FINISHED)
        return SimpleNamespace(status=cells[1], percent=int(bar['value']) if bar else None, attempts=cells[3], outcome=cells[6])

    def until(self, shop, job, test, seconds=40):
        end = time.monotonic() + seconds
        while not test(row := self.row(shop, job)):
            assert time.monotonic() < end, f'{job} after {seconds} s: {row}'
            time.sleep(.1)
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

def test_pages_refuse_what_they_should(shop):
    get, post = shop.http.get, shop.http.post
    assert [get(p).status_code for p in ('/', '/acme', '/globex', '/initech', '/acme/products')] == [200]*5
    for path in ('/nope', '/ACME', '/nope/products', '/acme/feed', '/acme/jobs/nope', '/acme/jobs/nope/row', '/nope/feed', '/%2e%2e/feed',
                 '/marketplace/nope/orders', '/marketplace/acme/orders?page=99', '/marketplace/acme/orders?page=x'):
        assert get(path).status_code == 404, path
    assert get('/nope', headers=dict(shop='acme', cookie='shop=acme'), params=dict(shop='acme')).status_code == 404
    assert post('/acme/jobs', data=dict(name='nope')).status_code == 404 and post('/nope/jobs', data=dict(name='test_run')).status_code == 404
    assert get('/acme/jobs', params=dict(name='test_run')).status_code in (404, 405)
    for h in ({'Origin': 'http://evil.example'}, {'Origin': 'null'}, {'Sec-Fetch-Site': 'cross-site'}, {'Sec-Fetch-Site': 'same-site'}):
        assert post('/acme/jobs', data=dict(name='test_run'), headers=h).status_code == 403, h
    assert get('/acme', headers={'Host': 'evil.example'}).status_code == 400
    assert not shop.page('/acme').select('tbody tr')

def test_a_killed_import_ends_by_itself_and_is_exact(shop):
    job = shop.press('acme', 'product_import')
    assert shop.http.get(f'/globex/jobs/{job}').status_code == 404 # another shop's job does not exist
    shop.until('acme', job, lambda r: 20 <= (r.percent or 0) <= 80)
    shop.kill()
    assert 0 < shop.sql('acme', 'SELECT count(*) FROM products')[0][0] < sample_data.EXPECTED
    shop.start()
    row = shop.finished('acme', job)
    assert (row.status, row.attempts) == ('completed with warnings', '1 of 3 failed'), row
    assert shop.sql('acme', 'SELECT count(*), count(DISTINCT sku), count(DISTINCT first_job) FROM products') == [(sample_data.EXPECTED,)*2 + (1,)]
    assert shop.sql('acme', 'SELECT id, retry_count, status FROM tenant_jobs') == [(job, 1, 'completed_with_warnings')]
    assert shop.page('/acme').find(id='products').text == f'{sample_data.EXPECTED:,}'
    page = shop.page(f'/acme/jobs/{job}')
    result = page.find(id='result').text
    for part in (f'"imported": {sample_data.EXPECTED}', '"skipped": 445', '"blank": 15', '"updated": 0'): assert part in result
    assert re.search(r'100 of 445\b', page.text) and 'line ' in page.text
    assert not page.find(id='job').has_attr('hx-get') and shop.sql('globex', 'SELECT count(*) FROM products') == [(0,)]
    assert shop.finished('acme', shop.press('acme', 'product_export')).status == 'completed'
    feed = shop.http.get('/acme/feed')
    assert feed.headers['content-disposition'].startswith('attachment') and len(feed.text.splitlines()) == sample_data.EXPECTED+1
    assert ',=' not in feed.text and '"=' not in feed.text # what a spreadsheet would run

def test_the_other_four_tasks(shop):
    jobs = {t: shop.press('globex', t) for t in ('order_import', 'product_export', 'test_run', 'code_quality_scan')}
    ends = {t: shop.finished('globex', j) for t, j in jobs.items()}
    assert ends['order_import'].status == 'completed' and ends['order_import'].outcome == 'pages 12, orders 600'
    assert ends['order_import'].attempts == '1 of 8 failed' # the 503, after which it went on with page 5
    assert '"resumed_after_page": 4' in shop.page(f"/globex/jobs/{jobs['order_import']}").find(id='details').text
    assert shop.sql('globex', 'SELECT count(*), count(DISTINCT id) FROM orders') == [(600, 600)]
    assert ends['product_export'].status == 'completed with warnings' # a feed of no products
    assert ends['test_run'].status == 'completed with warnings' and ends['test_run'].outcome == 'passed 4, failed 1, errors 0, skipped 1'
    assert ends['code_quality_scan'].status == 'completed with warnings' and ends['code_quality_scan'].outcome == 'files 3, findings 6'
    assert len(shop.http.get('/globex/feed').text.splitlines()) == 1
