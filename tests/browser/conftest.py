"Real Chromium for tests of pages: what they load from a CDN comes from installed npm packages, and nothing else leaves the machine."
import json, os, re, shutil, subprocess
from pathlib import Path
import pytest
from conftest import absent

PACKAGES = Path(__file__).resolve().parents[2]/'.venv'/'npm'/'node_modules'
BROWSERS = 'chromium', 'chromium-browser', 'google-chrome'
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update '
    '--disable-sync').split() + ['--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1']
OUTSIDE = re.compile(r'^(?:http|ws)s?://(?!(?:127\.0\.0\.1|localhost)(?:[:/]|$))')
CDN = re.compile(r'^https://(?:cdn\.jsdelivr\.net/npm|unpkg\.com)/((?:@[^/@?]+/)?[^/@?]+)(?:@([^/?]+))?(?:/([^?]*))?(?:\?|$)')
GITHUB = 'https://cdn.jsdelivr.net/gh/'
FROM_GITHUB = {'gnat/css-scope-inline@': 'css-scope-inline/script.js'}
TAILWIND = 'https://cdn.tailwindcss.com/3.'
EMPTY = 'answerdotai/fasthtml-js@', 'answerdotai/surreal@'  # of FastHTML's own headers, not on npm


def packaged(url):
    "The file that a CDN's URL names in an installed package of the same major version; None if there is none"
    for k, v in FROM_GITHUB.items():
        if url.startswith(GITHUB + k): return PACKAGES/v
    if not (m := CDN.match(url)) or not (about := PACKAGES/m[1]/'package.json').is_file(): return
    about, wanted = json.loads(about.read_text()), m[2] or ''
    if wanted[:1].isdigit() and wanted.split('.')[0] != about['version'].split('.')[0]: return
    main = next((about[k] for k in ('jsdelivr', 'unpkg', 'browser', 'main') if isinstance(about.get(k), str)), 'index.js')
    file = (PACKAGES/m[1]/(m[3] or main)).resolve()
    if not file.is_file(): file = file.with_name(re.sub(r'\.min(?=\.\w+$)', '', file.name))  # jsDelivr makes the small ones itself
    return file if file.is_file() and file.is_relative_to(PACKAGES.resolve()) else None


def tailwind():
    "What Tailwind's CDN does to every page, made of its package: its reset. The classes that it makes of a page's own are not there"
    css = re.sub(r"theme\('[^']*', ([^()]*)\)", r'\1', (PACKAGES/'tailwindcss'/'src'/'css'/'preflight.css').read_text())
    return f"window.tailwind = {{}}; document.head.appendChild(document.createElement('style')).textContent = {json.dumps(css)}"


class Pages:
    "Call it for a page in a context of its own. `faults` and `blocked` tell what went wrong in all of them; a regex in `allowed` excuses it"
    def __init__(self, browser): self.browser, self.contexts, self.faults, self.blocked, self.allowed, self.last = browser, [], [], [], [], None

    def __call__(self, size=(1280, 800), **options):
        "`options` are those of a browser context: color_scheme='dark', reduced_motion='reduce', java_script_enabled=False"
        context = self.browser.new_context(viewport=dict(zip(('width', 'height'), size)), service_workers='block', **options)
        self.contexts.append(context)
        context.route(OUTSIDE, self.answer)
        context.on('console', lambda m: self.faults.append(f"console: {m.text} ({m.location['url']})") if m.type == 'error' else None)
        context.on('weberror', lambda e: self.faults.append(f'page: {e.error}'))
        context.on('requestfailed', self.failed)
        self.last = context.new_page()
        return self.last

    def answer(self, route):
        "What npm has, what FastHTML could do without, or a refusal"
        url = route.request.url
        headers = {'access-control-allow-origin': '*'}
        if file := packaged(url): route.fulfill(path=file, headers=headers)
        elif url.startswith(TAILWIND): route.fulfill(body=tailwind(), content_type='text/javascript', headers=headers)
        elif url.startswith(tuple(GITHUB + e for e in EMPTY)): route.fulfill(body='', content_type='text/javascript', headers=headers)
        else: route.abort('blockedbyclient')

    def failed(self, request):
        "Also of a redirect to the outside, which is never asked about"
        if OUTSIDE.match(request.url) and request.failure != 'net::ERR_ABORTED': self.blocked.append(request.url)

    def close(self):
        while self.contexts: self.contexts.pop().close()

    def check(self):
        "Fail for each fault and each request to the outside that is not allowed"
        wrong = [w for w in [*self.faults, *(f'outside: {u}' for u in self.blocked)] if not any(re.search(a, w) for a in self.allowed)]
        if wrong: pytest.fail('\n'.join(['The browser saw', *wrong]), pytrace=False)


@pytest.fixture(scope='package')
def chromium():
    "A Chromium that ends with the last test of this folder: while it lives, this thread has a running event loop, and `asyncio.run` refuses"
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path: absent('CHROMIUM', f"none of {', '.join(BROWSERS)} is installed")
    if not PACKAGES.is_dir(): absent('NPM PACKAGES', '`make .venv/npm` installs them, with npm')
    from playwright.sync_api import expect, sync_playwright
    expect.set_options(timeout=20_000)
    with sync_playwright() as p:
        yield (browser := p.chromium.launch(executable_path=path, args=FLAGS))
        browser.close()


@pytest.fixture
def new_page(chromium):
    "`Pages`: call it for a page of 1280x800, or of another `size`. An error in a console or a page, or a request to the outside, fails the test when it ends"
    yield (pages := Pages(chromium))
    pages.close()
    pages.check()


@pytest.fixture
def page(new_page): return new_page()


class Axe:
    "Call it with a page for what axe-core finds serious or critical, out of reach of the page's scripts and content security policy"
    def __call__(self, page, impacts=('serious', 'critical')):
        cdp = page.context.new_cdp_session(page)
        frame = cdp.send('Page.getFrameTree')['frameTree']['frame']['id']
        world = cdp.send('Page.createIsolatedWorld', dict(frameId=frame, worldName='axe'))['executionContextId']
        def run(js):
            got = cdp.send('Runtime.evaluate', dict(expression=js, contextId=world, awaitPromise=True, returnByValue=True))
            assert 'exceptionDetails' not in got, got['exceptionDetails']
            return got['result'].get('value')
        try:
            run((PACKAGES/'axe-core'/'axe.min.js').read_text() + ';0')
            found = run("axe.run(document, {resultTypes: ['violations'], preload: false}).then(r => r.violations)")
        finally: cdp.detach()
        return [v for v in found if v['impact'] in impacts]

    def none(self, page):
        "Assert that there is nothing serious or critical; if there is, say what, where and why"
        lines = [f"{v['id']} ({v['impact']}): {v['help']}\n    " + '\n    '.join(f"{n['target']} {n['html']}" for n in v['nodes']) for v in self(page)]
        assert not lines, '\n'.join([page.url, *lines])


@pytest.fixture
def axe(): return Axe()


@pytest.fixture
def shots(new_page, tmp_path_factory):
    "`shots(name)`: the path of a PNG of a page, by default the newest, in the folder FH_SAAS_SHOTS or in that of this run"
    def shoot(name, page=None, **options):
        path = Path(os.environ.get('FH_SAAS_SHOTS') or tmp_path_factory.getbasetemp()/'shots')/f'{name}.png'
        (page or new_page.last).screenshot(path=path, animations='disabled', **options)
        return path
    return shoot


@pytest.fixture(scope='module')
def shop(chromium, tmp_path_factory):
    "The demo shop in a process of its own at `url`; `kill()` it, and `start()` it on the same port and data"
    from test_shop import Shop
    shop = Shop(tmp_path_factory.mktemp('shop')).start()
    yield shop
    shop.proc.terminate()
    try: shop.proc.wait(15)
    except subprocess.TimeoutExpired: shop.kill(); raise
    finally: shop.http.close()
