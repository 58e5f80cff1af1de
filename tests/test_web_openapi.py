"The OpenAPI document is valid, and the API keeps to it, whatever it is sent."
import json
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Literal, Optional
from urllib.parse import quote
import jsonschema, pytest, schemathesis
from fasthtml.common import FastHTML
from hypothesis import HealthCheck, given, settings, strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from starlette.testclient import TestClient
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.jobs.states import Status
from fh_saas.jobs.tasks import task
from fh_saas.testing import JobTester
from fh_saas.web.access import Access
from fh_saas.web.setup import setup_jobs

checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
at = '/api/v1/admin/background-tasks'

class Colour(Enum): red = 'r'; blue = 'b'

@dataclass
class Order:
    sku: str
    number: int = 1
    parts: 'Optional[list[Order]]' = None

def plain(path:str, limit:int=None): # The file; most lines
    "Bring a shop's products up to date"
    return dict(path=path, limit=limit)
def typed(n:int, x:float, on:bool, at:datetime, day:date, price:Decimal, colour:Colour, kind:Literal['a', 1], words:list[str], file:Path=Path('a'), more:dict[str, int]=None): return n
def orders(order:Order, others:list[Order]=()): return len(others)
def untyped(a, b=3, **rest): return [a, b, rest]
@task('web_nothing')
def nothing(): pass
operations = 14
exposed = dict(catalog=[plain, typed], orders=[orders, untyped, nothing])

@pytest.fixture(scope='module')
def api(tmp_path_factory):
    "An app with a job of each state, and a client that may do everything"
    host = HostDatabase(f"sqlite:///{tmp_path_factory.mktemp('openapi')}/host.db")
    with JobTester() as jt, get_or_create_tenant_db('acme', 'Acme', host):
        app = FastHTML(secret_key='x')
        jobs = setup_jobs(app, host, tokens=dict(all=Access('admin', 'acme', 'fuzz')), role=lambda req: None, tasks=exposed, rate=(1_000_000, 60))
        m = jobs.directory.manager('acme')
        ids = [m.submit('plain', plain, path=str(s))[0] for s in Status]
        jt.drain()
        for id, s in zip(ids, Status): m.store.write(lambda cur, now: cur.execute("UPDATE tenant_jobs SET status = ?, completed_at = CASE WHEN ? IN ('pending', 'running') THEN NULL ELSE created_at END WHERE id = ?", [s, s, id]) and None)
        with TestClient(app, headers={'Authorization': 'Bearer all'}, raise_server_exceptions=False) as c:
            c.ids, c.doc = ids, c.get('/api/v1/openapi.json').json()
            yield c
    host.close()

def test_the_document_is_valid(api):
    schema = schemathesis.openapi.from_dict(api.doc)
    schema.validate()
    assert api.doc['openapi'] == '3.1.0' and len([*schema.get_all_operations()]) == operations + 1
    for s in api.doc['components']['schemas'].values(): jsonschema.Draft202012Validator.check_schema(s)

def test_the_document_is_open_and_complete(api):
    r = api.get('/api/v1/openapi.json', headers={'Authorization': ''})
    assert r.status_code == 200 and r.headers['content-type'] == 'application/json' and 'acme' not in r.text and 'Bearer' not in r.text
    refs = {r for r in _refs(api.doc)}
    for r in refs:
        o = api.doc
        for part in r.removeprefix('#/').split('/'): o = o[part]
    assert {'/api/v1/catalog/plain', '/api/v1/catalog/typed', '/api/v1/orders/orders', '/api/v1/orders/untyped', '/api/v1/orders/web-nothing', at, f'{at}/{{job_id}}', '/api/v1/health'} <= api.doc['paths'].keys()
    served = {(r.path, m.lower()) for r in api.app.state.jobs.routes if r.path.startswith('/api/') and not r.path.endswith('openapi.json') for m in {*r.methods} - {'HEAD'}}
    assert served == {(p, m) for p, ms in api.doc['paths'].items() for m in ms}

def _refs(o):
    if isinstance(o, dict):
        if isinstance(o.get('$ref'), str): yield o['$ref']
        for v in o.values(): yield from _refs(v)
    elif isinstance(o, list):
        for v in o: yield from _refs(v)

def send(api, case):
    kw = case.as_transport_kwargs(base_url='http://testserver')
    if 'data' in kw: kw['content'] = kw.pop('data')
    return api.request(**{k: v for k, v in kw.items() if v is not None})

@pytest.mark.parametrize('mode', [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=['fits', 'fits_not'])
@pytest.mark.parametrize('n', range(operations + 1))
def test_the_api_keeps_to_its_document(api, n, mode):
    op = [*schemathesis.openapi.from_dict(api.doc).get_all_operations()][n].ok()
    if mode is GenerationMode.NEGATIVE and op.path.endswith('/health'): return  # takes nothing
    @settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(case=op.as_strategy(mode), known=st.sampled_from([None, *api.ids]))
    def fuzz(case, known):
        if known and case.path_parameters: case.path_parameters['job_id'] = known
        for params in (case.query, case.headers): params and params.pop('tenant', None)
        case.validate_response(send(api, case), checks=checks)
    fuzz()

ugly = ['a\0b', '%', "'\"\\", '\u2028\uffff', '🎉', 'x' * 20_000, '9' * 5000, '-1', '1e400', '9223372036854775808', '١', ' ', ',,', '{}']
raw = [*(quote(u, safe='') for u in ugly), '%ED%A0%80', '%FF%FE', '%zz', '']

def fine(r):
    assert r.status_code < 500 and (r.status_code < 400 or r.headers['content-type'] == 'application/problem+json' and len(r.content) < 5000 and r.json()['status'] == r.status_code), (r.status_code, r.text[:300])

def test_ugly_values_in_each_parameter(api, subtests):
    "NUL, halves of surrogates, huge numbers: answered or refused, and never a crash"
    for path, names in ((at, None), (f'{at}/running', ('limit', 'q')), (f'{at}/statistics', None)):
        for p in api.doc['paths'][path]['get']['parameters']:
            if names and p['name'] not in names: continue
            for v in raw:
                with subtests.test(f"{path} {p['name']}={v[:30]}"): fine(api.get(f"{path}?{p['name']}={v}"))

def test_ugly_ids(api, subtests):
    for v in raw:
        if v == '': continue  # another path
        for method, more in (('GET', ''), ('DELETE', ''), ('POST', '/cancel'), ('POST', '/rerun')):
            with subtests.test(f'{method} {v[:30]}{more}'):
                r = api.request(method, f'{at}/{v}{more}')
                assert r.status_code == 404
                fine(r)

def test_ugly_keys_and_bodies(api, subtests):
    values = [*ugly, '\ud800', 10**400, 1e308, -2**63 - 1, True, None, [], {}, {'\ud800': 1}, {'\0': '\0'}, ['\ud800'], [None] * 1000]
    calls = [('/api/v1/catalog/plain', lambda v: dict(path=v)), ('/api/v1/catalog/plain', lambda v: dict(path='a', limit=v)), ('/api/v1/orders/orders', lambda v: dict(order=v)), ('/api/v1/orders/orders', lambda v: dict(order=dict(sku=v, parts=v))), ('/api/v1/orders/untyped', lambda v: dict(a=v, rest=v)),
        ('/api/v1/orders/web-nothing', lambda v: {str(v): v}), (f'{at}/{api.ids[-1]}/rerun', lambda v: dict(path=v)), (f'{at}/{api.ids[-1]}/cancel', lambda v: {str(v): v}), (f'{at}/bulk', lambda v: dict(action=v, dry_run=True)), (f'{at}/bulk', lambda v: dict(action='cancel', dry_run=v)), (f'{at}/bulk', lambda v: {str(v): v}),
        *((f'{at}/bulk', lambda v, k=k: dict(action='delete', dry_run=True, filter={k: v})) for k in ('task_type', 'task', 'queue', 'status', 'tag', 'since', 'until'))]
    for path, body in calls:
        for v in values:
            with subtests.test(f'{path} {body(v)!r}'[:100]): fine(api.post(path, content=json.dumps(body(v)), headers={'Content-Type': 'application/json'}))
    for v in (*(u.encode() for u in ugly if '\0' not in u), b'\xff', b'\x80'):
        with subtests.test(f'key {v[:30]}'): fine(api.post('/api/v1/orders/web-nothing', headers={'Idempotency-Key': v}))
    r = api.post('/api/v1/orders/untyped', content='{"a": "\\ud800\\u0000"}', headers={'Content-Type': 'application/json'})
    assert r.status_code == 202 and api.get(r.headers['location']).status_code == 200
    for v in raw: api.get(f'{at}?q={v}').json()  # every list can still be sent
