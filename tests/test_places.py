"Places in a queue whose limit is reached, and parts of a turn: who gets them."
import threading, time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
import pytest
from hypothesis import given, settings, strategies as st
from conftest import wait_until
from fh_saas.db_connect import FhSaasError
from fh_saas.jobs.allotment import Offer
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.ring import Ring
from fh_saas.jobs.settings import Settings
from fh_saas.jobs.tasks import Registry

ran = []

def place(name):
    ran.append(name)
    time.sleep(0.01)

@pytest.fixture
def narrow(new_url, new_manager):
    "Four databases of an engine that runs one job of `default` at a time, and what has run, in this order"
    (registry := Registry()).add(place)
    e = Engine(Settings(concurrency=6, handoff=0), registry, queues=dict(default=1, other=4))
    ms = {name: new_manager(new_url(), e) for name in 'abcd'}
    ran.clear()
    def fill(n, names='abc', **weights):
        for name in names:
            desk = e._desks[ms[name].store]
            desk._free = replace(desk._free, weight=weights.get(name, 1))
            e.pause(ms[name].store)
            ms[name].submit_many('place', place, [dict(name=name)]*n)
        for name in names: e.pause(ms[name].store, False)
    fill.ran, fill.ms, fill.engine = ran, ms, e
    yield fill
    e.stop(0)

def test_a_place_goes_round(narrow):
    "It stayed with the database that had it, for as long as that had jobs"
    narrow(30)
    wait_until(lambda: len(narrow.ran) >= 60, 60)
    assert all(15 <= n <= 25 for n in Counter(narrow.ran[:60]).values()) and len(set(narrow.ran[:60])) == 3

def test_a_place_goes_round_by_weight(narrow):
    narrow(60, a=3)
    wait_until(lambda: len(narrow.ran) >= 80, 60)
    got = Counter(narrow.ran[:80])
    assert got['a'] > 1.4*max(got['b'], got['c']) and min(got['b'], got['c']) >= 5

def test_who_comes_with_a_single_job_waits_for_one_of_each(narrow):
    narrow(60)
    for n in range(3):
        wait_until(lambda: len(narrow.ran) >= 10*(n + 1), 60)
        before = len(narrow.ran)
        narrow(1, 'd')
        wait_until(lambda: narrow.ran.count('d') == n + 1, 30)
        assert narrow.ran.index('d', before) - before <= 12

@pytest.fixture
def offers(new_sqlite, new_manager):
    "An engine of which two databases wait for a place in `q`"
    e = new_manager(new_sqlite(), handoff=0, concurrency=8).engine
    a, b, c = (e._desks[e.store(new_sqlite())] for _ in range(3))
    e.line.shares, e.crew.call = dict(q=1), lambda *args: None  # nobody goes on by itself
    for d in (a, b): d.seen = e._ended.copy(), d.ended; e._bar(d, ['q'])
    return e, a, b, c

def line(e): return [*e._lines['q']]
def asked(desk): return desk.offered['q'].others if 'q' in desk.offered else None
def answers(e, desk, *queues): e._answered(desk, [SimpleNamespace(row=dict(queue=q)) for q in queues], desk.offered)

def test_who_cannot_use_a_place_passes_it_on(offers):
    e, a, b, c = offers
    e._unblock(c, 'q')
    assert (asked(a), asked(b), line(e)) == (8, None, [b, a])
    answers(e, a)
    assert (asked(a), asked(b), line(e)) == (None, 7, [a, b])
    b.offered = dict(q=Offer(0))
    answers(e, b)  # they were asked
    assert (asked(a), asked(b)) == (None, None)

def test_a_place_that_was_offered_is_kept_from_others_for_a_moment(offers):
    "Where a turn lasts longer than a job, whoever looked meanwhile had it, and weights counted for nothing"
    e, a, b, c = offers
    def places(desk): return e._room(desk, 4).by_queue['q']
    e._unblock(c, 'q')
    assert (places(a), places(b), places(c)) == (1, 0, 0)
    a.offered['q'].at -= 1  # it is stuck
    assert (places(a), places(b), places(c)) == (1, 1, 1)
    e._unblock(c, 'q')
    assert (asked(b), places(b), places(c)) == (8, 1, 0)
    for d in (b, a): answers(e, d, 'q')
    assert (places(c), e._offered) == (1, {})

def test_a_place_that_somebody_else_has_taken_is_offered_to_nobody(offers):
    e, a, b, c = offers
    e._unblock(c, 'q')
    e.line._by_queue['q'] = 1
    answers(e, a)
    assert (asked(a), asked(b), line(e)) == (None, None, [a, b])  # and nobody has lost its place in this line
    e.line._by_queue.clear()

def test_who_has_had_the_place_is_behind_those_who_wait(offers):
    e, a, b, c = offers
    e._unblock(a, 'q')  # a job of its own has ended: it is first, and may go on
    assert a.hungry and asked(a) == 8 and asked(b) is None and a not in e._errands
    answers(e, a, 'q')
    assert line(e) == [b, a]
    a.hungry = False
    e._unblock(a, 'q')
    assert (a.hungry, asked(b)) == (False, 8) and a.due is not None  # it is its own again, if nobody takes it
    answers(e, b, 'q')
    assert line(e) == [a, b]

def test_two_who_cannot_use_a_place_do_not_pass_it_to_and_fro(offers, new_sqlite):
    e, a, b, c = offers
    d = e._desks[e.store(new_sqlite())]
    d.seen = e._ended.copy(), d.ended
    e._bar(d, ['q'])
    e._unblock(c, 'q')
    who = []
    for _ in range(3):
        who.append(x := next(x for x in (a, b, d) if asked(x)))
        answers(e, x)
        e._bar(x, ['q'])  # as it does in the same turn
    assert who == [a, b, d]

def test_a_job_of_another_queue_costs_no_place_in_this_one(offers):
    e, a, b, c = offers
    e.line.shares = dict(q=1, other=1)
    for d in (a, b): d.seen = e._ended.copy(), d.ended; e._bar(d, ['q', 'other'])
    answers(e, a, 'other')
    assert line(e) == [a, b] and [*e._lines['other']] == [b, a]
    e._unblock(a, 'other')
    assert line(e) == [a, b] and b.offered.keys() == {'other'}
    e._unblock(c, 'q')
    answers(e, a, 'other')  # that is no answer
    assert asked(b) == 7 and line(e) == [a, b]

def test_who_waits_no_more_stands_in_no_line(offers):
    e, a, b, c = offers
    e._rest(a, None, None)
    assert line(e) == [b] and [*e._blocked] == [b]
    e._bar(b, [])  # something else keeps it now
    assert line(e) == [] and [*e._blocked] == [b]

@pytest.mark.parametrize('how', ['shut', 'in trouble', 'gave way', 'forgotten'])
def test_an_offer_that_is_not_heard_is_passed_on(offers, how):
    e, a, b, c = offers
    e._unblock(c, 'q')
    assert asked(a) and b.due is not None  # and if it is stuck, the next looks by itself
    if how == 'shut': a.paused = True; e._have_turn(a, [], [], [], [])
    elif how == 'in trouble': e._troubled(a, [], [], FhSaasError('locked'))
    elif how == 'forgotten': e.forget(a.store)
    else:
        e._ring.join(a); e._ring.took(a, 1)
        a.rung, a.tenancy = True, SimpleNamespace(tenant_id='a', untold=False, serving=True, limits=a.limits)
        e._errands.pop(a)
        assert e.give_way(1, -1) == ['a']
        a.tenancy = None
    assert not asked(a) and asked(b)

def test_an_offer_is_answered_by_the_next_turn_if_one_is_on_its_way(offers):
    e, a, b, c = offers
    before = a.offered
    e._unblock(c, 'q')
    e._answered(a, [SimpleNamespace(row=dict(queue='other'))], before)
    assert asked(a) and not asked(b)

def test_a_place_that_is_given_up_by_an_async_job_is_offered_once_it_is_free(offers, monkeypatch):
    e, a, b, c = offers
    freed = []
    for name, f in dict(_record=lambda *args: freed.append('recorded'), _off=lambda x: freed.append('off'), _fed=lambda: None).items(): monkeypatch.setattr(e, name, f)
    monkeypatch.setattr(e, '_unblock', lambda desk, queue: freed.append(queue))
    e._abandon(SimpleNamespace(gate=threading.Lock(), desk=c, row=dict(queue='q', timeout=1), is_async=True, failed=lambda why: None, done=None))
    assert freed == ['recorded', 'off', 'q']

def test_places_that_come_together_are_offered_by_weight(offers):
    e, a, b, c = offers
    e.line.shares, a._free = dict(q=8), replace(a._free, weight=3)
    for _ in range(8): e._unblock(c, 'q')
    assert (a.offered['q'].places, b.offered['q'].places) == (6, 2)

def test_a_claim_that_is_on_its_way_answers_for_the_places_of_before(offers):
    e, a, b, c = offers
    e.line.shares = dict(q=8)
    e._unblock(c, 'q')
    before = a.offered
    for _ in range(2): e._unblock(c, 'q')
    assert (a.offered['q'].places, b.offered['q'].places) == (2, 1)
    e._answered(a, [SimpleNamespace(row=dict(queue='q'))], before)
    assert (a.offered['q'].places, e._lines['q'][a]) == (1, 1)

def test_what_a_claim_takes_beyond_its_turn_the_others_get_first(offers):
    e, a, b, c = offers
    e.line.shares = dict(q=8)
    e._unblock(c, 'q')
    answers(e, a, *'qqqq')
    got = []
    for _ in range(6):
        e._unblock(c, 'q')
        got.append(x := next(x for x in (a, b) if asked(x)))
        answers(e, x, 'q')
    assert got == [b, b, b, b, a, b]

def test_who_is_not_heard_of_gets_no_more_places(offers):
    e, a, b, c = offers
    e.line.shares, a._free = dict(q=8), replace(a._free, weight=50)
    e._unblock(c, 'q')
    a.offered['q'].at -= 1
    for _ in range(2): e._unblock(c, 'q')
    assert (a.offered['q'].places, b.offered['q'].places) == (1, 2)

def test_who_is_shut_is_offered_nothing(offers):
    e, a, b, c = offers
    a.paused = True
    e._unblock(c, 'q')
    assert (asked(a), asked(b)) == (None, 8)

class Tenant:
    def __init__(self, weight): self.weight = weight

@given(st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.9, 1, 1.4, 2, 3.7]), min_size=2, max_size=5), st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_turns_are_shared_by_weight_also_where_a_weight_is_less_than_one(weights, unit):
    ring, tenants, got = Ring(), [Tenant(w) for w in weights], Counter()
    for t in tenants: ring.join(t)
    for _ in range(3000):
        ring.took(who := ring.first, n := ring.grant(who, unit, 1000))
        got[who] += n
    total, weight = sum(got.values()), sum(weights)
    assert all(abs(got[t] - total*t.weight/weight) <= 2 + unit*t.weight + 0.01*total for t in tenants)

def test_what_one_takes_while_those_before_it_cannot_is_a_loan():
    ring, (a, half) = Ring(), [Tenant(1), Tenant(0.5)]
    for t in (a, half): ring.join(t); ring.took(t, ring.grant(t, 1, 1))
    for _ in range(5): ring.took(half, ring.grant(half, 1, 1))  # a is stuck
    got = []
    for _ in range(30): ring.took(who := ring.first, ring.grant(who, 1, 1)); got.append(who)
    assert got[:4] == [a]*4 and 5 <= got.count(half) <= 8
