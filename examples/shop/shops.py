"The three shops, and where their files lie."
import os
from pathlib import Path
from fh_saas.jobs.retries import Permanent

SHOPS = dict(acme='Acme Tools', globex='Globex Garden', initech='Initech Office')
PORT = os.environ.get('PORT') or '5001'
URL = f'http://127.0.0.1:{PORT}'
DATA = Path(os.environ.get('FH_SAAS_DATA') or 'data-shop').resolve()
PRODUCTS, FEED = 'products.csv', 'feed.csv' # in each shop's folder
SAMPLES = Path(__file__).resolve().parent/'samples'

SCHEMA = ('''CREATE TABLE IF NOT EXISTS products (sku TEXT PRIMARY KEY, name TEXT NOT NULL, price_cents INTEGER NOT NULL CHECK (price_cents >= 0),
    currency TEXT NOT NULL, quantity INTEGER NOT NULL, first_job TEXT NOT NULL, last_job TEXT NOT NULL)''',
  '''CREATE TABLE IF NOT EXISTS orders (id TEXT PRIMARY KEY, placed_at TEXT NOT NULL, customer TEXT NOT NULL,
    total_cents INTEGER NOT NULL, currency TEXT NOT NULL)''',
  'CREATE TABLE IF NOT EXISTS order_pages (job TEXT PRIMARY KEY, page INTEGER NOT NULL, pages INTEGER NOT NULL)')

def inside(folder:Path, name:str) -> Path:
    "The path of the file or folder `name` in `folder`; a name that leads elsewhere is refused"
    try: path = (folder/name).resolve()
    except ValueError: path = folder  # a NUL byte
    if path.parent != folder.resolve(): raise Permanent(f"{name!r} is not the name of a file in {folder.name}")
    return path

def shop_file(shop:str, name:str) -> Path:
    "The path of the file `name` in the shop's own folder"
    if shop not in SHOPS: raise Permanent(f"there is no shop {shop!r}")
    return inside(DATA/'files'/shop, name)
