"The harness of the tests in a browser: it shows the shop at work, and each of its parts can fail."
import re, struct
import pytest
from fasthtml.common import P, fast_app, htmxsrc
from playwright.sync_api import Error, expect
from starlette.testclient import TestClient
from test_shop import sample_data

AT = 'http://127.0.0.1:1/'  # nothing listens there

def put(page, html, **headers):
    "Show the page a document as if it came from this machine"
    page.route(AT, lambda route: route.fulfill(body=html, content_type='text/html', headers={k.replace('_', '-'): v for k, v in headers.items()}))
    page.goto(AT)

def test_an_import_begun_by_a_click_ends_before_ones_eyes(shop, page, shots):
    page.goto(f'{shop.url}/acme')
    page.evaluate('window.still = true')
    page.get_by_role('button', name='product import').click()
    row = page.locator('.fs-jobs tbody tr')
    expect(row).to_contain_text(re.compile('Waiting|Running'))
    expect(row.locator('td').nth(1)).to_have_text('Done with warnings', timeout=60_000)
    expect(page.locator('#products')).to_have_text(f'{sample_data.EXPECTED:,}')
    assert page.evaluate('window.still'), 'the page was loaded again'
    assert shots('shop-imported', full_page=True).stat().st_size > 10_000

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_first_page_is_accessible(shop, new_page, axe, scheme):
    page = new_page(color_scheme=scheme)
    page.goto(shop.url)
    axe.none(page)

def test_a_killed_shop_comes_back_at_its_address(shop, new_page):
    shop.kill()
    with pytest.raises(Error, match='ERR_CONNECTION_REFUSED'): new_page().goto(shop.url)
    shop.start()
    (page := new_page()).goto(shop.url)  # in the other one the browser shows an error of its own, at a moment of its own
    expect(page.get_by_role('link', name='Acme Tools')).to_be_visible()

def test_axe_finds_what_is_wrong_whatever_the_policy(page, axe):
    put(page, '<html lang=en><title>t</title><main><h1>t</h1><img src="data:,"></main>', content_security_policy="default-src 'none'; img-src data:")
    found, = axe(page)
    assert found['id'] == 'image-alt'
    with pytest.raises(AssertionError, match=r'(?s)image-alt \(critical\).*<img') as e: axe.none(page)
    assert found['help'] in str(e.value) and not page.evaluate("'axe' in window")

@pytest.mark.parametrize('script,seen', [
    ('console.error("oh")', 'console: oh'), ('setTimeout(() => { throw Error("ah") })', 'page: .*ah'), ('fetch("/nope").catch(() => 0)', 'console: Failed to load'),
    ('new Image().src = "https://example.com/x.png"', 'outside: https://example.com/x.png'),
    ('new WebSocket("wss://example.com/x")', 'console: .*ERR_NAME_NOT_RESOLVED'),
    ('import("https://cdn.jsdelivr.net/npm/htmx.org@4.0.0/dist/htmx.js").catch(() => 0)', 'outside: .*htmx.org@4'),
    ('import("https://unpkg.com/htmx.org@2/nope.js").catch(() => 0)', 'outside: .*nope.js')])
def test_a_fault_fails_unless_allowed(new_page, script, seen):
    page = new_page()
    put(page, '<title>t</title>')
    page.evaluate(f'() => {{ {script} }}')
    for _ in range(500):
        if any(re.search(seen, w) for w in [*new_page.faults, *(f'outside: {u}' for u in new_page.blocked)]): break
        page.wait_for_timeout(20)
    with pytest.raises(pytest.fail.Exception, match=seen): new_page.check()
    new_page.allowed += [seen, 'net::ERR_BLOCKED_BY_CLIENT']

def test_a_redirect_to_the_outside_is_seen(new_page):
    page = new_page()
    page.route(AT, lambda route: route.fulfill(status=302, headers=dict(location='https://example.com/')))
    with pytest.raises(Error): page.goto(AT)
    assert new_page.blocked == ['https://example.com/']
    new_page.blocked.clear()

def test_what_FastHTML_loads_is_served(new_page, page):
    app, rt = fast_app()
    @rt('/')
    def get(): return P('hello')
    put(page, TestClient(app).get('/').text)
    assert page.evaluate('htmx.version') == re.search(r'htmx\.org@([\d.]+)/', htmxsrc.src)[1]
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--pico-spacing')")

def test_a_page_is_as_asked_for(new_page, shots, tmp_path, monkeypatch):
    html = '<meta name=viewport content="width=device-width"><noscript>plain</noscript><p>text</p>'
    media = '["(prefers-color-scheme: dark)", "(prefers-reduced-motion: reduce)"].map(q => matchMedia(q).matches).concat(innerWidth, innerHeight)'
    for options, want in ((dict(), [False, False, 1280, 800]), (dict(size=(390, 844), color_scheme='dark', reduced_motion='reduce'), [True, True, 390, 844])):
        put(page := new_page(**options), html)
        assert page.evaluate(media) == want
    monkeypatch.setenv('FH_SAAS_SHOTS', str(tmp_path/'kept'))
    png = shots('phone')
    assert png == tmp_path/'kept'/'phone.png' and struct.unpack('>II', png.read_bytes()[16:24]) == (390, 844)
    put(page := new_page(java_script_enabled=False), html)
    expect(page.get_by_text('plain')).to_be_visible()
