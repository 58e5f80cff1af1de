"The wake protocol: every interleaving of submits, visits and crashes, run on the real rows."
import pytest
from fh_saas.db_host import HostDatabase, timestamp
from fh_saas.jobs.drivers import SQLite
from fh_saas.jobs.wake import Wakes, wakes_table

columns = [c.name for c in wakes_table.c]


class Clock(SQLite):
    "SQLite with a clock that only the search moves"
    t = 1_000_000_000.0
    def begin(self, cur, busy): super().begin(cur, busy); return self.t
    def now(self, cur): return self.t


class Search:
    """A state is (clock, the row, jobs committed and not claimed, submitters, visitors).

    A submitter's step is 0 new, 1 hinted, 2 committed, 3 rung, 'x' crashed; a visitor is None, or (step, seq, begun, jobs it saw due later).
    """
    def __init__(self, wakes, submitters=2, visitors=2):
        self.w, self.known = wakes, {}
        self.start = (Clock.t, None, frozenset(), (0,)*submitters, (None,)*visitors)

    def put(self, row):
        def op(cur, now):
            cur.execute('DELETE FROM fh_saas_wakes')
            if row: cur.execute(f"INSERT INTO fh_saas_wakes ({', '.join(columns)}) VALUES ({', '.join('?'*len(columns))})", row)
        self.w.write(op)

    def row(self):
        with self.w.cursor() as cur: return cur.execute(f"SELECT {', '.join(columns)} FROM fh_saas_wakes").fetchone()

    def does(self, t, row, act, *args):
        "What an act makes of a row, and says; the same act on the same row at the same moment is done once"
        if (key := (t, row, act, args)) not in self.known:
            self.w.kind.t = t; self.put(row); self.w._hinted.clear()
            said = getattr(self.w, act)('a', *args)
            self.known[key] = self.row(), said
        return self.known[key]

    def moves(self, state):
        t, row, jobs, subs, vis = state
        def but(seq, i, v): return (*seq[:i], v, *seq[i+1:])
        for i, s in enumerate(subs):
            if s in (3, 'x'): continue
            yield t, row, jobs, but(subs, i, 'x'), vis
            new = row if s == 1 else self.does(t, row, 'hint' if s == 0 else 'ring')[0]
            yield t, new, jobs | {i} if s == 1 else jobs, but(subs, i, s+1), vis
        for i, v in enumerate(vis):
            if v is None:
                new, got = self.does(t, row, 'lease', f'v{i}')
                if got: yield t, new, jobs, subs, but(vis, i, (1, *got))
            elif v == 'x': continue
            else:
                yield t, row, jobs, subs, but(vis, i, 'x')
                if v[0] == 1: yield t, row, frozenset(), subs, but(vis, i, (2, *v[1:]))  # it claims what is there
                else: yield t, self.does(t, row, 'settle', f'v{i}', *v[1:])[0], jobs, subs, but(vis, i, None)
        # time passes for hints and visits, but no commit takes longer than the busy timeout allows
        if 1 not in subs and t < Clock.t + 400: yield t + 100, row, jobs, subs, vis

    def check(self, state):
        t, row, jobs, subs, vis = state
        if not jobs: return
        noted = row and (row[columns.index('wake_at')] or row[columns.index('hint_at')])
        assert noted, f'jobs {set(jobs)} are in the tenant, and nothing in the host leads there: {state}'
        if set(subs) <= {0, 3} and all(v is None for v in vis):
            wake = row[columns.index('wake_at')]
            assert wake and wake <= timestamp(t), f'nobody crashed, and the job is not due at once: {state}'

    def run(self):
        todo, seen = [self.start], {self.start}
        while todo:
            state = todo.pop()
            self.check(state)
            for new in self.moves(state):
                if new not in seen: seen.add(new); todo.append(new)
        return len(seen)


@pytest.fixture
def wakes(tmp_path):
    host = HostDatabase(f'sqlite:///{tmp_path}/host.db')
    w = Wakes(host)
    w.kind = Clock()
    w.write(lambda cur, now: cur.execute('PRAGMA synchronous') and None)
    w._writer.execute('PRAGMA synchronous=OFF')
    yield w
    w.close(); host.close()


def test_no_interleaving_and_no_crash_hides_a_job(wakes): assert Search(wakes, 2, 2).run() > 100_000

@pytest.mark.parametrize('broken', ['settle', 'hint', 'order'])
def test_the_search_finds_the_hole_in_a_weaker_protocol(wakes, broken):
    if broken == 'settle':  # the visit writes back whatever came meanwhile
        def settle(tenant, me, seq, begun):
            wakes.write(lambda cur, now: cur.execute('UPDATE fh_saas_wakes SET wake_at = NULL, hint_at = NULL, visitor = NULL, visit_until = NULL WHERE visitor = ?', [me]) and None)
        wakes.settle = settle
    if broken == 'hint': wakes.hint = lambda tenant: None
    if broken == 'order': wakes.hint, wakes.ring = wakes.ring, lambda tenant: None  # rung before the commit only
    with pytest.raises(AssertionError): Search(wakes, 2, 1).run()

def test_postgresql_keeps_the_same_row(new_pg):
    host = HostDatabase(new_pg())
    w = Wakes(host)
    w.hint('acme'); w.ring('acme')
    assert list(w.due()[0]) == ['acme']
    seq, begun = w.lease('acme', 'one')
    assert w.lease('acme', 'two') is None
    w.ring('acme')
    assert not w.settle('acme', 'one', seq, begun) and list(w.due()[0]) == ['acme']
    assert w.settle('acme', 'two', *w.lease('acme', 'two'), 60)
    found, next_in = w.due()
    assert found == {} and 0 < next_in <= 60
    w.close(); host.close()
