"A fake marketplace. It holds the shops' old orders, takes its time, and is too busy now and then."
import asyncio, random
from collections import Counter
from datetime import datetime, timedelta
from fasthtml.common import APIRouter, HTTPException, JSONResponse
from shops import SHOPS

PAGES, EACH, BUSY = 12, 50, 5
CUSTOMERS = ['Ada Lovelace', "Conan O'Brien", '<b>Bob</b>', 'Søren Åberg', 'שרה לוי', 'Zoë 🎈', '=1+1']
calls, ar = Counter(), APIRouter('/marketplace')

def orders(shop:str, page:int) -> list[dict]:
    "The orders of one page; the same at every call"
    rng = random.Random(f'orders of {shop}, page {page}')
    def order(n): return dict(id=f'{shop}-{n:05}', placed_at=(datetime(2024, 1, 1) + timedelta(hours=n)).isoformat()+'Z',
        customer=rng.choice(CUSTOMERS), total_cents=rng.randrange(500, 90_000), currency='EUR')
    return [order(n) for n in range((page-1)*EACH, page*EACH)]

@ar('/{shop}/orders', methods=['get'])
async def orders_page(shop:str, page:int=1):
    if shop not in SHOPS or not 1 <= page <= PAGES: raise HTTPException(404)
    await asyncio.sleep(.15)
    calls[shop] += 1
    if calls[shop] % (PAGES-1) == BUSY: return JSONResponse(dict(error='busy'), 503, headers={'Retry-After': '2'})
    return JSONResponse(dict(page=page, pages=PAGES, orders=orders(shop, page)))
