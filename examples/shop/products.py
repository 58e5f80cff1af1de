"A shop's product file, read line by line: one bad line harms one line."
import csv, re, unicodedata

COLUMNS = ['sku', 'name', 'price', 'currency', 'quantity']
CURRENCIES = 'EUR', 'GBP', 'USD'
LIMIT = 4000 # bytes in a line
_sku, _price, _quantity = re.compile('[A-Z0-9][A-Z0-9-]{0,31}'), re.compile(r'([0-9]{1,7})(?:\.([0-9]{1,2}))?'), re.compile('[0-9]{1,6}')

def lines(f):
    "Each line of the binary file `f` with its number; one longer than `LIMIT` comes cut, so that no line can fill the memory"
    n = 0
    while raw := f.readline(LIMIT+1):
        n, rest = n+1, raw
        while len(rest) > LIMIT and not rest.endswith(b'\n'): rest = f.readline(LIMIT+1)
        yield n, raw

def _short(s, n=40): return ascii(s if len(s) <= n else s[:n]+'...')

def cells(raw:bytes) -> list[str]:
    "The fields of one line; `ValueError` says why there are none"
    if len(raw) > LIMIT: raise ValueError(f"longer than {LIMIT:,} bytes")
    if b'\0' in raw: raise ValueError("a NUL byte")
    try: text = raw.decode().removesuffix('\n').removesuffix('\r')
    except UnicodeDecodeError as e: raise ValueError(f"not UTF-8: byte 0x{raw[e.start]:02x} at position {e.start}") from None
    # A quoted field could run over many lines; here a line ends at its line end, whatever the quotes say.
    try: return next(csv.reader([text], strict=True), [])
    except csv.Error as e: raise ValueError(f"broken quotes: {e}") from None

def product(fields:list[str]) -> dict:
    "The product in `fields`; `ValueError` says what is wrong with it"
    if len(fields) != len(COLUMNS): raise ValueError(f"number of columns: {len(fields)} instead of {len(COLUMNS)}")
    sku, name, price, currency, quantity = map(str.strip, fields)
    if not sku: raise ValueError("no SKU")
    if not _sku.fullmatch(sku): raise ValueError(f"SKU {_short(sku)} is not of the form ABC-123")
    if not name: raise ValueError("no name")
    if len(name) > 200: raise ValueError(f"a name of {len(name):,} characters; 200 are allowed")
    if any(unicodedata.category(c) == 'Cc' for c in name): raise ValueError(f"control character in the name {_short(name)}")
    if not (m := _price.fullmatch(price)): raise ValueError(f"price {_short(price)} is not of the form 12.50")
    if currency not in CURRENCIES: raise ValueError(f"currency {_short(currency)} is none of {', '.join(CURRENCIES)}")
    if not _quantity.fullmatch(quantity): raise ValueError(f"quantity {_short(quantity)} is not a whole number from 0 to 999999")
    return dict(sku=sku, name=name, price_cents=int(m[1])*100 + int((m[2] or '').ljust(2, '0')), currency=currency, quantity=int(quantity))

def is_header(raw:bytes) -> bool:
    "Does the file begin as a product file does? A byte order mark is welcome"
    try: return cells(raw.removeprefix(b'\xef\xbb\xbf')) == COLUMNS
    except ValueError: return False
