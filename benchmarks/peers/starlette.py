"Starlette's BackgroundTask alone: nothing is stored, and a crash loses what had not run. The floor for a web route with a task."
from starlette.background import BackgroundTask
from .base import Peer, answer, starlette
from .. import tasks

class Plain(Peer):
    package, raws, web_worker = 'starlette', ('raw-sqlite-full',), False
    durability = 'none: jobs live in the memory of the web process'
    missing = {m: 'nothing is stored, and there is no other process' for m in ('submit', 'bulk', 'drain', 'drain2', 'latency', 'inside', 'crash')}

    def done(self): return len(tasks.said('did'))

    def app(self):
        def did(n): tasks.say('did', tasks.noop(n), 0.0)  # else nobody could count them
        def route(request): return answer(BackgroundTask(did, 0))
        return starlette(route)

class PlainAsync(Plain):
    "The same from a route that is a coroutine; the task is still a plain function, so it runs in a thread"
    def app(self):
        def did(n): tasks.say('did', tasks.noop(n), 0.0)
        async def route(request): return answer(BackgroundTask(did, 0))
        return starlette(route)
