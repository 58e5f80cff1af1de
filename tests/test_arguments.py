"Arguments by the types of the signature: refused in front of the caller, given back as what they were."
import json, uuid
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from functools import cached_property, partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, Optional, TypedDict
import msgspec, pydantic, pytest
from fastcore.basics import AttrDict
from hypothesis import given, strategies as st
from fh_saas.jobs.arguments import BadPayload, Signature
from fh_saas.jobs.payload import NotJson, loads, to_json
from fh_saas.jobs.tasks import Task, task


class Colour(Enum): red = 'r'; blue = 'b'
class Point(NamedTuple): x: int; y: int = 0
class Size(TypedDict): wide: int
class Item(msgspec.Struct): sku: str; price: Decimal
class Customer(pydantic.BaseModel):
    name: str
    since: date
    friends: list['Customer'] = []

@dataclass
class Order:
    id: uuid.UUID
    items: list[Item]
    at: datetime
    parts: 'Optional[Order]' = None
    notes: dict = field(default_factory=dict)


def order(parts=None): return Order(uuid.uuid4(), [Item('a', Decimal('1.10'))], datetime(2026, 1, 31, 12, tzinfo=timezone.utc), parts, {'x': [1]})

values = [
    (int, 3), (float, 2.5), (float, 2), (bool, True), (str, ''), (Optional[int], None), (int | str, 'x'), (list[int], []), (tuple[int, str], (1, 'a')), (set[int], {1, 2}),
    (frozenset[str], frozenset('a')), (dict[int, str], {1: 'a'}), (dict[uuid.UUID, int], {uuid.uuid4(): 1}), (bytes, b'\x00\xff'), (date, date(2026, 2, 28)), (datetime, datetime(2026, 1, 1, tzinfo=timezone.utc)),
    (datetime, datetime(2026, 1, 1, 1, 1, 1, 7)), (timedelta, timedelta(seconds=1.5)), (Decimal, Decimal('0.10')), (uuid.UUID, uuid.uuid4()), (Path, Path('/a/b')), (PurePosixPath, PurePosixPath('x')), (Colour, Colour.red),
    (Literal['a', 1], 1), (Point, Point(1, 2)), (Size, {'wide': 1}), (Item, Item('a', Decimal('2'))), (Order, order(order())), (list[Order], [order()]), (Customer, Customer(name='Ö', since=date(2026, 1, 1), friends=[Customer(name='b', since=date(2025, 1, 1))])),
    (dict[str, list[Customer]], {'a': [Customer(name='c', since=date(2024, 1, 1))]}), (Optional[Path], Path('p')), (Annotated[int, msgspec.Meta(gt=0)], 5), (dict[str, Any], {'a': [1, None]}), (list, [1, 'a', {}]), (int, 2**80)]

@pytest.mark.parametrize('typ,value', values, ids=[f'{n}-{t}'[:40] for n, (t, _) in enumerate(values)])
def test_an_argument_comes_back_as_its_type(lite, typ, value):
    got = []
    def f(value): got.append(value); return value
    f.__annotations__ = dict(value=typ, **{'return': typ})
    id, bg = lite.submit('t', f, value=value)
    bg.func(*bg.args)
    assert got == [value] and (type(got[0]) is type(value) or typ is float)
    assert lite.result(id) == value

@pytest.mark.parametrize('typ,value', [
    (int, '3'), (int, 2.5), (int, True), (int, None), (str, 3), (bool, 1), (float, 'x'), (list[int], ['a']), (list[int], 'a'), (date, 'soon'), (date, 7), (uuid.UUID, 'x'), (Decimal, 'x'), (Path, 3), (Colour, 'green'), (Literal['a'], 'b'),
    (Order, {'id': 'x'}), (Customer, {'name': 1}), (Item, Customer(name='a', since=date(2026, 1, 1))), (Annotated[int, msgspec.Meta(gt=0)], -1), (tuple[int, str], (1,)), (dict[int, str], {'a': 'b'}), (Size, {}),
    (str, b'x'), (str | None, date(2026, 1, 1)), (list[str], ['a', Decimal(1)]), (dict[str, int], {uuid.UUID(int=1): 1}), (str, Path('a')), (Customer, {'name': b'x', 'since': '2026-01-01'})], ids=lambda v: str(v)[:40])
def test_a_wrong_type_is_refused_with_its_name_and_nothing_is_stored(lite, typ, value):
    def f(value): pass
    f.__annotations__ = dict(value=typ)
    with pytest.raises(BadPayload, match='value=') as e: lite.submit('t', f, value=value)
    assert "task" in str(e.value) and len(str(e.value)) < 700 and lite.list_jobs() == []

@pytest.mark.parametrize('typ', [list, dict, Any, list[Any], dict[str, Any], 'Nowhere', str | Path, object, tuple, 'none'])
@pytest.mark.parametrize('value', [date(2026, 1, 1), [date(2026, 1, 1)], {'a': {1: 2}}, {1: 2}, Item('a', Decimal(1)), [b'x'], float('nan')], ids=str)
def test_what_has_no_type_to_come_back_as_must_be_json_itself(lite, typ, value):
    def f(value): pass
    if typ != 'none': f.__annotations__ = dict(value=typ)
    with pytest.raises((NotJson, BadPayload)): lite.submit('t', f, value=value)
    assert lite.list_jobs() == []

def test_not_a_number_hides_in_no_type(lite):
    def f(value:list[float]): pass
    with pytest.raises(NotJson, match='nan'): lite.submit('t', f, value=[float('nan')])

def test_json_forms_are_taken_for_their_types(lite):
    "An API brings text where the task wants a date"
    got = []
    def f(at:date, to:Order, c:Customer=None): got.append((at, to))
    id, bg = lite.submit('t', f, at='2026-02-28', to=json.loads(msgspec.json.encode(o := order())))
    bg.func(*bg.args)
    assert got == [(date(2026, 2, 28), o)]

def test_a_row_of_an_older_signature_runs_where_defaults_and_forms_allow(manager):
    got = []
    def f(path, n='3'): pass
    f.__qualname__ = 'older'
    id, _ = manager.submit('t', f, path='a', n='7')
    old, _ = manager.submit('t', f, path='b')
    def g(path:str, n:int=3, also:date=date(2026, 1, 1)): got.append((path, n, also))
    g.__qualname__ = 'older'
    for job in (id, old): manager.run_job(job, g)
    assert got == [('a', 7, date(2026, 1, 1)), ('b', 3, date(2026, 1, 1))]

def test_a_row_that_cannot_be_of_the_type_fails_at_once(manager):
    def f(n): pass
    id, _ = manager.submit('t', f, n='many')
    def g(n:int): raise AssertionError
    manager.run_job(id, g)
    job = manager.get_job(id)
    assert job.status == 'failed' and job.error_message.startswith("BadPayload: task") and "n='many': Expected `int`" in job.error_message

def test_extra_keywords_are_of_the_type_of_kwargs(lite):
    got = []
    def f(**days:date): got.append(days)
    id, bg = lite.submit('t', f, a=date(2026, 1, 1), b=date(2026, 1, 2))
    bg.func(*bg.args)
    assert got == [dict(a=date(2026, 1, 1), b=date(2026, 1, 2))]
    with pytest.raises(BadPayload, match='a=7'): lite.submit('t', f, a=7)

def test_rerun_with_a_changed_argument_is_checked(lite):
    def f(at:date): return at
    id, bg = lite.submit('t', f, at=date(2026, 1, 1))
    f.__defaults__ = None
    with pytest.raises(BadPayload, match="at=5"): lite.rerun(id, at=5)
    assert json.loads(lite.get_job(lite.rerun(id, at=date(2026, 1, 9))).payload) == dict(at='2026-01-09')
    assert json.loads(lite.get_job(lite.rerun(id)).payload) == dict(at='2026-01-01')
    def g(job): return 1
    id, bg = lite.submit('t', g)
    with pytest.raises(BadPayload, match="'job' is filled when the job begins"): lite.rerun(id, job=5)

def test_none_will_do_where_it_is_the_default(lite):
    def f(n:int=None): return n
    id, bg = lite.submit('t', f, n=None)
    bg.func(*bg.args)
    assert lite.get_job(id).status == 'completed'

def test_methods_callables_and_partials_are_read_like_functions(lite):
    class Tool:
        def run(self, n:int): return n
        def __call__(self, at:date): return at
    for f, bad in ((Tool().run, dict(n='x')), (task('a_tool')(Tool()), dict(at=3)), (partial(Tool().run), dict(n='x'))):
        with pytest.raises(BadPayload): lite.submit('t', f, **bad)

node = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.dates() | st.decimals(allow_nan=False, allow_infinity=False) | st.uuids(), lambda s: st.lists(s, max_size=4))

@given(st.lists(st.tuples(st.text(), st.dates(), st.decimals(allow_nan=False, allow_infinity=False), st.uuids(), st.datetimes(timezones=st.none() | st.just(timezone.utc)), st.sets(st.integers()), st.dictionaries(st.integers(), st.binary()))))
def test_any_value_of_a_nested_type_survives(rows):
    def f(rows:list[tuple[str, date, Decimal, uuid.UUID, datetime, set[int], dict[int, bytes]]]): pass
    s = Signature(f)
    assert s.unpack(json.loads(s.pack(dict(rows=rows)))) == dict(rows=rows)

@given(node)
def test_an_untyped_value_is_refused_or_survives(value):
    def f(value): pass
    s = Signature(f)
    try: text = s.pack(dict(value=value))
    except NotJson: return
    assert s.unpack(json.loads(text)) == dict(value=value)

# --- The schema

def test_the_schema_says_what_submit_takes():
    def f(order:Order, customer:Customer, path:Path, limit:int=10, note:str=None, loose=None, at:date=date(2026, 1, 1), job=None): "Send it"
    s = Task(f, 'send').schema
    assert s['title'] == 'send' and s['description'] == 'Send it' and s['required'] == ['order', 'customer', 'path'] and s['additionalProperties'] is False
    assert s['properties']['limit'] == {'type': 'integer', 'default': 10} and s['properties']['path'] == {'type': 'string', 'format': 'path'} and 'job' not in s['properties']
    assert s['properties']['at'] == {'type': 'string', 'format': 'date', 'default': '2026-01-01'} and s['properties']['loose'] == {'default': None}
    refs = {r for r in json.dumps(s).split('"') if r.startswith('#/$defs/')}
    assert refs and {r.rpartition('/')[2] for r in refs} <= s['$defs'].keys()

def test_every_payload_that_is_taken_fits_the_schema():
    jsonschema = pytest.importorskip('jsonschema')
    for typ, value in values:
        def f(value): pass
        f.__annotations__ = dict(value=typ)
        t = Task(f, 'f')
        jsonschema.validate(json.loads(t.pack(dict(value=value))), t.schema)

def test_functions_that_say_nothing_have_a_schema_too():
    assert Task(print, 'print').schema['type'] == 'object' and Task(lambda **kw: 1, 'l').schema['additionalProperties'] is True

def test_unknown_fields_are_refused_where_a_type_would_drop_them(lite):
    class Loose(pydantic.BaseModel):
        n: int = pydantic.Field(alias='N')
    class Lean(msgspec.Struct, omit_defaults=True): a: int = 0; b: int = 0
    def f(order:Order=None, loose:Loose=None, lean:Lean=None, size:Size=None, many:dict[str, list[Customer | None]]=None, orders:list[Order]=None): pass
    f.__annotations__ |= dict(order=Order | None, loose=Loose | None, lean=Lean | None, size=Size | None, orders=list[Order] | None)
    o = json.loads(msgspec.json.encode(order(order())))
    for ok in (dict(order=o), dict(loose={'N': 1}), dict(lean={'a': 0, 'b': 1}), dict(size={'wide': 1}), dict(orders=[o])): lite.submit('t', f, **ok, run_at='2100-01-01')
    for bad, said in ((dict(order=o | {'nots': 1}), 'nots'), (dict(order=o | {'parts': o['parts'] | {'itms': 1}}), 'parts.itms'), (dict(size={'wide': 1, 'high': 2}), 'high'), (dict(orders=[o, o | {'x': 1}]), 'x')):
        with pytest.raises(BadPayload, match=f'unknown field `{said}`'): lite.submit('t', f, **bad)

@dataclass
class Shelf: n: int

def test_a_field_with_an_empty_name_is_unknown():
    def f(shelf:Shelf, more:list[Shelf]=()): pass
    for bad in (dict(shelf={'n': 1, '': 2}), dict(shelf={'n': 1}, more=[{'n': 1, '': 2}])):
        with pytest.raises(BadPayload, match="unknown field `''`"): Signature(f).pack(bad)

texts = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)), lambda o: st.lists(o) | st.dictionaries(st.text(), o), max_leaves=20).map(json.dumps)

def read(f, text):
    try: return repr(f(text))
    except Exception as e: return type(e)

@given(texts | st.text() | st.sampled_from(['NaN', '-Infinity', '1e400', '1'*5000, '['*100_000, '"\\ud800"', '"\ud800"', '{"a":1,"a":2}', '-0', '9007199254740993.0', '', ' 1 ', '1 2']))
def test_json_is_read_as_python_reads_it(text): assert read(loads, text) == read(json.loads, text)

@pytest.mark.parametrize('v', [0, -1, 10**30, True, False, 1.5, [1], {'a': True}, 'é', IntEnum('E', 'a').a])
def test_json_is_written_as_python_writes_it(v): assert to_json(v, 'v') == json.dumps(v, separators=(',', ':'))

class Text(str): ...
class Whole(int): ...
class Real(float): ...
class Named(StrEnum): a = 'x'
Pair = namedtuple('Pair', 'a b')

odd = st.sampled_from([Text('t'), Whole(3), Real(2.5), Named.a, Pair(1, 'b'), OrderedDict(a=1), AttrDict(b=[1]), {Text('k'): 1}, {Named.a: 2}, 2**70, -2**70, 1e16, 1e-7, -0.0, '\ud800', '\x7f'])

class Shown(dict):
    "Shows one value where it holds several, as a `MultiDict` does"
    def items(self): return ((k, v[0]) for k, v in super().items())
@dataclass
class Sized(str): n: int = 1

def test_what_a_subclass_shows_is_what_is_written():
    (later := OrderedDict(a=1, b=2)).move_to_end('a')
    for v, text in ((Shown(a=['1', '2']), '{"a":"1"}'), (Sized(), '""'), (later, '{"b":2,"a":1}'), ([Shown(a=['é'])], '[{"a":"\\u00e9"}]')): assert to_json(v, 'v') == text
    class Hides(dict):
        def items(self): return ()
    assert to_json(Hides(a=float('nan'), b=b'secret'), 'v') == '{}'

@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec=None)) | odd, lambda o: st.lists(o) | st.tuples(o) | st.dictionaries(st.text(st.characters(codec=None)), o), max_leaves=20))
def test_json_means_what_python_writes(v):
    text = to_json(v, 'v')
    assert text.isascii() and repr(json.loads(text)) == repr(json.loads(json.dumps(v)))

def test_a_number_that_python_does_not_write_is_no_json():
    with pytest.raises(NotJson, match='result cannot be encoded'): to_json(10**5000, 'result')

class Base(pydantic.BaseModel): a: int
class More(Base): b: int = 0
class Around(pydantic.BaseModel): inner: Base
class Hidden(pydantic.BaseModel): a: int; key: str = pydantic.Field('', exclude=True)
class Sum(pydantic.BaseModel):
    net: float = pydantic.Field(alias='Net')
    tax: float = 0
    @pydantic.computed_field
    @cached_property
    def total(self) -> float: return self.net + self.tax
class Closed(Sum, extra='forbid'): pass
class Array:
    def __init__(self, v): self.v = v
    def __eq__(self, other): raise ValueError('the truth value of an array is ambiguous')
class Odd(pydantic.BaseModel, arbitrary_types_allowed=True):
    a: Array
    @pydantic.field_validator('a', mode='before')
    @classmethod
    def read(cls, v): return v if isinstance(v, Array) else Array(v)
    @pydantic.field_serializer('a')
    def write(self, a): return a.v
class Change(pydantic.BaseModel): name: str | None = None; size: int = 3
class Wide(pydantic.BaseModel, extra='allow'): a: int
class Outward(pydantic.BaseModel): n: int = pydantic.Field(serialization_alias='N')

def test_nothing_of_a_model_is_lost_without_a_word():
    def f(base:Base=None, around:Around=None, hidden:Hidden=None, many:list[Base]=(), wide:Wide=None): pass
    s = Signature(f)
    for lost in (dict(base=More(a=1, b=2)), dict(around=Around(inner=More(a=1, b=2))), dict(hidden=Hidden(a=1, key='k')), dict(hidden=dict(a=1, key='k')), dict(many=[Base(a=1), More(a=1)]), dict(wide=Wide(a=1, day=datetime(2026, 1, 1)))):
        with pytest.raises(BadPayload, match='comes? back'): s.pack(lost)
    for kept in (dict(base=Base(a=1)), dict(around=Around(inner=Base(a=1))), dict(hidden=Hidden(a=1)), dict(wide=Wide(a=1, day='today')), dict(many=[Base(a=1), Base(a=2)])): assert s.unpack(json.loads(s.pack(kept))) == kept

def test_a_model_comes_back_with_the_fields_set_that_were_set():
    def f(change:Change): pass
    for change in (Change(), Change(name=None), Change(size=3), Change(name='a', size=4)):
        back = Signature(f).unpack(json.loads(Signature(f).pack(dict(change=change))))['change']
        assert back == change and back.model_dump(exclude_unset=True) == change.model_dump(exclude_unset=True)

@pytest.mark.parametrize('cls', [Sum, Closed])
def test_a_result_shows_what_a_model_computes_if_it_can_be_read_from_that(cls):
    def f(sum:Sum): return sum
    def plain(): pass
    f.__annotations__ = {'sum': cls, 'return': cls}
    s, v = Signature(f), cls(Net=1, tax=2)
    for _ in range(2):
        assert s.unpack(json.loads(s.pack(dict(sum=v)))) == dict(sum=v)
        assert v.total == 3  # kept in the model from here on
    text = s.pack_result(v)
    assert json.loads(text) == dict(Net=1, tax=2) | (dict(total=3) if cls is Sum else {}) and type(s.unpack_result(text)) is cls and s.unpack_result(text).total == 3
    assert json.loads(Signature(plain).pack_result(v)) == dict(net=1, tax=2, total=3)

def test_models_of_which_nobody_can_say_whether_they_are_the_same():
    def f(odd:Odd) -> Odd: pass
    with pytest.raises(BadPayload, match='come back'): Signature(f).pack(dict(odd=Odd(a=Array([1]))))
    assert json.loads(Signature(f).pack_result(Odd(a=Array([1])))) == dict(a=[1])  # the work is done

def test_a_path_of_any_kind_is_a_path():
    def f(p:PurePath, more:list[PurePath]=()): pass
    assert Signature(f).unpack(json.loads(Signature(f).pack(dict(p=Path('/a'), more=[Path('b')])))) == dict(p=PurePath('/a'), more=[PurePath('b')])

def test_a_result_comes_back_by_the_name_from_which_it_is_read():
    def g() -> Outward: pass
    assert Signature(g).unpack_result(Signature(g).pack_result(Outward(n=1))) == Outward(n=1)

def test_a_model_comes_back_as_it_went_in_or_is_refused():
    class Opts(pydantic.BaseModel): page_size: int = pydantic.Field(50, alias='pageSize')
    class Needs(pydantic.BaseModel): n: int = pydantic.Field(alias='N')
    class Login(pydantic.BaseModel): password: pydantic.SecretStr
    class Apart(pydantic.BaseModel): n: int = pydantic.Field(1, validation_alias='come', serialization_alias='go')
    def f(opts:Opts=None, needs:Needs=None, login:Login=None, apart:Apart=None, many:list[Opts | None]=None) -> Opts: pass
    f.__annotations__ |= dict(opts=Opts | None, needs=Needs | None, login=Login | None, apart=Apart | None, many=list[Opts | None] | None)
    s = Signature(f)
    def again(**kw): return s.unpack(json.loads(s.pack(kw)))
    for given in (Opts(pageSize=500), dict(pageSize=500)): assert again(opts=given)['opts'].page_size == 500
    assert again(needs=dict(N=1))['needs'] == again(needs=Needs(N=1))['needs'] == Needs(N=1)
    assert again(many=[Opts(pageSize=7), None, Opts()])['many'] == [Opts(pageSize=7), None, Opts()]
    for odd in (dict(login=Login(password='s3cret')), dict(login=dict(password='s3cret')), dict(apart=Apart(come=5))):
        with pytest.raises(BadPayload, match='does not come back from its JSON') as e: s.pack(odd)
        assert 's3cret' not in str(e.value)
    assert again(apart=Apart())['apart'] == Apart()
    assert s.unpack_result(s.pack_result(Opts(pageSize=9))) == Opts(pageSize=9) and json.loads(s.pack_result(Login(password='s3cret'))) == dict(password='**********')  # the work is done
