"Writes the product file a shop sends: 20,000 lines, some of them broken in every way real shops manage."
import csv, io, json, os, random, sys
from pathlib import Path
from products import COLUMNS

LINES, EACH, DUPLICATES, BLANK = 20_000, 15, 25, 15 # LINES counts the header too

def line(*fields):
    "One CSV line without its end"
    csv.writer(out := io.StringIO(), lineterminator='').writerow(fields)
    return out.getvalue()

def _with(**kw):
    "A line with other values in the named columns"
    return lambda r: line(*[kw.get(c, v) for c, v in zip(COLUMNS, r)])

BROKEN = {
    'missing columns':         lambda r: line(*r[:3]),
    'extra column':            lambda r: line(*r, 'a note'),
    'semicolons':              lambda r: ';'.join(r),
    'no sku':                  _with(sku=''),
    'formula as sku':          _with(sku="=cmd|' /C calc'!A0"),
    'no name':                 _with(name='  '),
    'long name':               _with(name='very '*80),
    'endless field':           _with(name='x'*20_000),
    'control character':       _with(name='\x1b[31mRed\x07 paint'),
    'negative price':          _with(price='-1.00'),
    'price NaN':               _with(price='NaN'),
    'price 1e3':               _with(price='1e3'),
    'price with a comma':      _with(price='12,50'),
    'price in Arabic digits':  _with(price='١٢.٥٠'),
    'price with a sign':       _with(price='€ 12.50'),
    'price in words':          _with(price='free'),
    'no price':                _with(price=''),
    'unknown currency':        _with(currency='DOGE'),
    'currency in lower case':  _with(currency='eur'),
    'quantity in words':       _with(quantity='many'),
    'negative quantity':       _with(quantity='-3'),
    'half a quantity':         _with(quantity='1.5'),
    'unterminated quote':      lambda r: line(*r).replace(r[1], f'"{r[1]}', 1),
    'text after a quote':      lambda r: line(*r).replace(r[1], f'"{r[1]}" new', 1),
    'carriage return inside':  lambda r: line(*r).replace(r[1], f'{r[1]}\rnew', 1),
    'latin-1':                 lambda r: _with(name='Café crème')(r).encode('latin-1'),
    'half a character':        lambda r: _with(name='Crème')(r).encode().replace('è'.encode(), b'\xc3'),
    'NUL byte':                _with(name='Nut\0bolt')}

# Odd but right: these are products, and shown as they are.
ODD = ['<b>Bold</b> hammer', "<script>alert('paint')</script>", '"Best" saw, 2nd edition', 'Tom & Jerry mouse trap', '=HYPERLINK("http://evil")', '@SUM(1+1)',
    'Gift box 🎁', 'Family set 👨‍👩‍👧‍👦', 'מברשת צבע', 'فرشاة طلاء', 'Cafe\u0301 table', '電動工具', 'Z̸̢a̷l̵g̶o lamp', "Robert'); DROP TABLE products;--", '日'*200]

EXPECTED = LINES - 1 - EACH*len(BROKEN) - DUPLICATES - BLANK # products in the file

def _records(shop, rng):
    "Endless products, each with a SKU of its own"
    kinds, things = 'small big red blue heavy folding garden office'.split(), 'hammer saw lamp chair stapler rake desk drill'.split()
    for i in range(LINES):
        name = rng.choice(ODD) if rng.random() < .01 else f'{rng.choice(kinds)} {rng.choice(things)} {i}'
        yield [f'{shop[:3].upper()}-{i:05}', name, f'{rng.randrange(100, 99_999)/100:.2f}', rng.choice(['EUR', 'EUR', 'GBP', 'USD']), str(rng.randrange(500))]

def product_lines(shop:str):
    "The lines of the shop's file, without their ends; the same at every call"
    rng = random.Random(f'products of {shop}')
    kinds = [*BROKEN]*EACH + ['duplicate']*DUPLICATES + ['blank']*BLANK
    odd, good = dict(zip(rng.sample(range(100, LINES), len(kinds)), kinds)), []
    yield line(*COLUMNS)
    for n, r in enumerate(_records(shop, rng), 2):
        if n > LINES: return
        match odd.get(n):
            case None: good.append(r[0]); yield line(*r)
            case 'blank': yield rng.choice(['', '  '])
            case 'duplicate': yield line(rng.choice(good), *r[1:])
            case kind: yield BROKEN[kind]([r[0], 'Paint', *r[2:]])

def write_products(path:Path, shop:str) -> dict:
    "Write the shop's product file; the report says what an import of it must come to"
    tmp = path.with_name(f'.{path.name}.{os.getpid()}')
    with tmp.open('wb') as f:
        f.write(b'\xef\xbb\xbf')
        for n, s in enumerate(product_lines(shop)):
            f.write((s if isinstance(s, bytes) else s.encode()) + (b'\r\n' if 5000 <= n < 8000 else b'\n'))
    tmp.replace(path)
    return dict(lines=LINES, products=EXPECTED, broken=EACH*len(BROKEN), duplicates=DUPLICATES, blank=BLANK)

if __name__ == '__main__': print(json.dumps(write_products(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else 'acme')))
