"The demo shop: three tenants, five background jobs, and a page to watch them. Run it with `python examples/shop/main.py`."
import os, socket
from contextlib import contextmanager, suppress
from functools import cache
import tasks, uvicorn
from fasthtml.common import *
from fh_saas import Access, BackgroundTaskManager, HostDatabase, JobBanner, JobButton, JobList, Settings, get_or_create_tenant_db, setup_jobs
from marketplace import ar as marketplace
from pages import hdrs, page, table
from sample_data import EXPECTED, write_products
from shops import DATA, FEED, PORT, PRODUCTS, SCHEMA, SHOPS, URL, shop_file
from starlette.middleware.trustedhost import TrustedHostMiddleware

# Each task with its arguments; by domain, as the API has them.
TASKS = dict(catalog={tasks.product_import: dict(path=PRODUCTS), tasks.product_export: {}}, orders={tasks.order_import: {}}, quality={tasks.test_run: {}, tasks.code_quality_scan: {}})
TOKENS = {f'demo-{shop}': Access('operator', shop, f'{shop} script') for shop in SHOPS} | {'demo-admin': Access('admin', user='admin script')}

@cache
def host(): return HostDatabase(f"sqlite:///{DATA/'host.db'}")

def not_found(req, exc): return page("Not found", P("There is no such page. The shops are on the first one."))

# The demo answers on this machine only, and another name for it (DNS rebinding) is refused.
try: DATA.mkdir(parents=True, exist_ok=True)
except OSError as e: raise SystemExit(f"The data folder {DATA} cannot be used: {e.strerror}. Set FH_SAAS_DATA to another") from None
app = FastHTML(title="The shop", hdrs=hdrs, default_hdrs=False, canonical=False, key_fname=str(DATA/'.sesskey'), htmlkw=dict(lang='en'),
    exception_handlers={404: not_found}, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=['127.0.0.1', 'localhost'])])
rt = app.route
marketplace.to_app(app)

@contextmanager
def opened(shop:str):
    "The database of a shop, which must be one of ours, and the manager of its jobs"
    if shop not in SHOPS: raise HTTPException(404)
    with get_or_create_tenant_db(shop, SHOPS[shop], host=host()) as db: yield db, BackgroundTaskManager(db)

def count(db, table): return db.q(f'SELECT count(*) AS n FROM {table}')[0]['n']

@rt('/', methods=['get'])
def index():
    return page("Choose a shop", Ul(*[Li(A(name, href=f'/{shop}')) for shop, name in SHOPS.items()]), P(A("The dashboard of all shops", href='/jobs')))

def stock(shop, db):
    feed = A("Download the feed", href=f'/{shop}/feed') if shop_file(shop, FEED).exists() else ''
    return P(Strong(f"{count(db, 'products'):,}", id='products'), f" products, {count(db, 'orders'):,} orders. ", Small(f"A full import comes to {EXPECTED:,} products. "), feed,
        id='stock', hx_get=f'/{shop}/stock', hx_trigger='every 3s', hx_swap='outerHTML')

@rt('/{shop}', methods=['get'])
def shop_page(shop:str):
    with opened(shop) as (db, m):
        buttons = [(JobButton(m, f.__name__.replace('_', ' '), f, show=False, live=True, **args), Small(f.__doc__)) for domain in TASKS.values() for f, args in domain.items()]
        return page(SHOPS[shop], stock(shop, db), Div(*buttons, cls='tasks'), H2("Under way"), JobBanner(m, live=True), H2("Jobs"), JobList(m, live=True, limit=20), shop=shop)

@rt('/{shop}/stock', methods=['get'])
def show_stock(shop:str):
    with opened(shop) as (db, _): return stock(shop, db)

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
        # No role is named, so everything of it answers this machine alone, and whoever sits at it is the admin. A script brings a token.
        setup_jobs(app, host(), Settings(lease=10), tokens=TOKENS, tasks={domain: [*fs] for domain, fs in TASKS.items()})
        print(f"The shop is at {URL}", flush=True)
        with suppress(KeyboardInterrupt): uvicorn.Server(uvicorn.Config(app, log_level='warning', timeout_graceful_shutdown=3)).run(sockets=[sock])

if __name__ == '__main__': main()
