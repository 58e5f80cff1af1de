"""The tasks that all peers run. What they have seen goes into one file, a line at a time, so that any process can read it.

A line is `word number time`; it is written in one call with O_APPEND, so lines of several processes do not mix. The
clock is `time.time()`, which all processes of a machine share."""
import os, time
from pathlib import Path

_state = dict(fd=None, began=False)

def log_path(): return Path(os.environ['BENCH_PLACE'])/'tasks.log'

def say(word, n, at):
    if _state['fd'] is None: _state['fd'] = os.open(log_path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(_state['fd'], f'{word} {n} {at!r}\n'.encode())

def said(word) -> list[tuple]:
    "`(number, time)` of each line that begins with `word`, in order"
    if not log_path().exists(): return []
    lines = (l.split() for l in log_path().read_text().splitlines(True) if l.endswith('\n'))  # the last one may be on its way
    return [(int(n), float(at)) for w, n, at in lines if w == word]

def noop(n):
    "Nothing; the first one of a process says when it began"
    if not _state['began']:
        _state['began'] = True
        say('began', n, time.time())
    return n

def stamp(n):
    "Say when it runs: the clock is read in the first line"
    at = time.time()
    say('ran', n, at)
    return n

def nap(n):
    "5 ms of work, said before and after"
    say('start', n, time.time())
    time.sleep(0.005)
    say('end', n, time.time())
    return n

def chew(n):
    "2 ms of waiting, as for a network"
    time.sleep(0.002)
    return n

def burn(n):
    "2 ms of computing"
    until = time.thread_time() + 0.002
    while time.thread_time() < until: pass
    return n

_counter = []

def count(n):
    "A no-op that leaves a byte in a file, so that jobs in a thousand databases can be counted at one look"
    if not _counter: _counter.append(os.open(log_path().with_name('count'), os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    os.write(_counter[0], b'.')
    return noop(n)

functions = dict(noop=noop, stamp=stamp, nap=nap, chew=chew, burn=burn, count=count)
