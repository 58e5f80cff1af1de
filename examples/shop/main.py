"The demo shop: three tenants, five background jobs, and a page to watch them. Run it with `python examples/shop/main.py`."
import os, secrets, socket
from contextlib import contextmanager, suppress
from functools import cache
from urllib.parse import urlsplit
import tasks, uvicorn
from fasthtml.common import *
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.store import JobNotFound
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.web.setup import setup_jobs
from marketplace import ar as marketplace
from pages import FINISHED, hdrs, job_page, live, page, row, table
from sample_data import EXPECTED, write_products
from shops import DATA, FEED, PORT, PRODUCTS, SCHEMA, SHOPS, URL, shop_file
from starlette.middleware.trustedhost import TrustedHostMiddleware

# Each task with its arguments and options. A marketplace that is often busy is no reason to give up, and a wait it asked for counts as an attempt.
TASKS = dict(product_import=dict(path=PRODUCTS), order_import=dict(max_retries=8), product_export={}, test_run={}, code_quality_scan={})

@cache
def host(): return HostDatabase(f"sqlite:///{DATA/'host.db'}")

def same_site(req):
    "Refuse a change that another site's page asks for"
    if req.method in ('GET', 'HEAD'): return
    origin = req.headers.get('origin')
    if req.headers.get('sec-fetch-site', 'none') not in ('same-origin', 'none') or origin and urlsplit(origin).netloc != req.headers.get('host'):
        raise HTTPException(403, "This request comes from another site")

def not_found(req, exc): return page("Not found", P("There is no such page. The shops are on the first one."))

# The demo answers on this machine only, and another name for it (DNS rebinding) is refused. It has no sessions, so it writes no key file.
app = FastHTML(title="The shop", hdrs=hdrs, default_hdrs=False, canonical=False, sess_cls=None, secret_key=secrets.token_hex(), before=same_site,
    exception_handlers={404: not_found}, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=['127.0.0.1', 'localhost'])])
rt = app.route
marketplace.to_app(app)

@contextmanager
def opened(shop:str):
    "The database of a shop, which must be one of ours, and the manager of its jobs"
    if shop not in SHOPS: raise HTTPException(404)
    with get_or_create_tenant_db(shop, SHOPS[shop], host=host()) as db:
        try: yield db, BackgroundTaskManager(db)
        except JobNotFound: raise HTTPException(404) from None

def count(db, table): return db.q(f'SELECT count(*) AS n FROM {table}')[0]['n']

@rt('/', methods=['get'])
def index(): return page("Choose a shop", Ul(*[Li(A(name, href=f'/{shop}')) for shop, name in SHOPS.items()]))

@rt('/{shop}', methods=['get'])
def shop_page(shop:str):
    with opened(shop) as (db, m): jobs, products, orders = m.list_jobs(limit=50), count(db, 'products'), count(db, 'orders')
    buttons = [(Button(name.replace('_', ' '), name='name', value=name), Small(getattr(tasks, name).__doc__)) for name in TASKS]
    feed = A("Download the feed", href=f'/{shop}/feed') if shop_file(shop, FEED).exists() else ''
    return page(SHOPS[shop],
        P(Strong(f'{products:,}', id='products'), f" products, {orders:,} orders. ", Small(f"A full import comes to {EXPECTED:,} products. "), feed,
            id='stock', **live(f'/{shop}', *jobs, hx_select='#stock')),
        Form(*buttons, cls='start', method='post', action=f'/{shop}/jobs'),
        H2("Jobs"), table(['Task', 'Status', 'Progress', 'Attempts', 'Created', 'Ended', 'Outcome'], [row(shop, j) for j in jobs]),
        '' if jobs else P("None yet: start one above."), shop=shop, live=any(j.status not in FINISHED for j in jobs))

@rt('/{shop}/jobs', methods=['post'])
def start(shop:str, name:str):
    if name not in TASKS: raise HTTPException(404)
    with opened(shop) as (_, m): _, bg_task = m.submit(name, getattr(tasks, name), triggered_by='manual:demo', **TASKS[name])
    return RedirectResponse(f'/{shop}', 303), bg_task

@rt('/{shop}/jobs/{job_id}', methods=['get'])
def show_job(shop:str, job_id:str):
    with opened(shop) as (_, m): return job_page(shop, m.get_job(job_id), m.attempts(job_id), m.logs(job_id))

@rt('/{shop}/jobs/{job_id}/row', methods=['get'])
def show_row(shop:str, job_id:str):
    with opened(shop) as (_, m): return row(shop, m.get_job(job_id))

@rt('/{shop}/products', methods=['get'])
def show_products(shop:str):
    with opened(shop) as (db, _): n, first = count(db, 'products'), db.q('SELECT * FROM products ORDER BY sku LIMIT 100')
    rows = [Tr(*map(Td, (p['sku'], p['name'], f"{p['price_cents']/100:.2f} {p['currency']}", p['quantity']))) for p in first]
    return page(f"Products of {SHOPS[shop]}", P(f"{len(rows)} of {n:,}"), table(['SKU', 'Name', 'Price', 'Quantity'], rows), shop=shop)

@rt('/{shop}/feed', methods=['get'])
def feed(shop:str):
    if shop not in SHOPS or not (file := shop_file(shop, FEED)).is_file(): raise HTTPException(404)
    return FileResponse(file, media_type='text/csv', filename=f'{shop}-feed.csv')

def prepare():
    "The shops' databases and sample files, made where they are missing"
    for shop, name in SHOPS.items():
        file = shop_file(shop, PRODUCTS)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists(): write_products(file, shop)
        with get_or_create_tenant_db(shop, name, host=host()) as db:
            for sql in SCHEMA: db.q(sql)
            db.conn.commit()

def listen():
    "The socket to serve, taken before any job runs: a second shop on the same port does nothing"
    if not (PORT.isascii() and PORT.isdecimal() and 0 < int(PORT) < 65536): raise SystemExit(f"PORT={PORT!r} is not a port: use a number from 1 to 65535")
    try: return socket.create_server(('127.0.0.1', int(PORT)))
    except OSError as e: raise SystemExit(f"Port {PORT} cannot be used: {os.strerror(e.errno)}. Set PORT to another") from None

def main():
    with listen() as sock:
        try: prepare()
        except OSError as e: raise SystemExit(f"The data folder {DATA} cannot be used: {e.strerror}. Set FH_SAAS_DATA to another") from None
        setup_jobs(app, host(), Settings(lease=10))
        print(f"The shop is at {URL}", flush=True)
        with suppress(KeyboardInterrupt): uvicorn.Server(uvicorn.Config(app, log_level='warning', timeout_graceful_shutdown=3)).run(sockets=[sock])

if __name__ == '__main__': main()
