"""One process of a measurement: `measure` takes it and prints the figure as JSON, `work` is a worker, `serve` a web server."""
import importlib.metadata, json, logging, os, sys, traceback
from types import SimpleNamespace
from .measures import Missing, Wrong, measures
from .peers import load

def take(key, name, options):
    out = dict(figure=None)
    try: peer = load(key, os.environ['BENCH_PLACE'])
    except ImportError as e: return out | dict(failed=f'not installed: {e}')
    out |= dict(durability=peer.durability, peer_note=peer.note, raws=peer.raws)
    if peer.package: out['version'] = importlib.metadata.version(peer.package)
    if name in peer.missing: return out | dict(missing=peer.missing[name])
    try:
        try:
            peer.create()
            out['figure'] = getattr(peer, f'measure_{name}', lambda o: measures[name](peer, o))(SimpleNamespace(**options))
        finally: peer.drop()
    except Missing as e: out['missing'] = str(e)
    except Wrong as e: out['failed'] = str(e)
    except Exception as e:
        traceback.print_exc()
        out['failed'] = f'{type(e).__name__}: {e}'.splitlines()[0]
    return out

def main(what, key, *args):
    logging.basicConfig(level=logging.ERROR)
    if what == 'measure':
        print(json.dumps(take(key, args[0], json.loads(args[1]))), flush=True)
        os._exit(0)  # threads of a peer are not waited for
    peer = load(key, os.environ['BENCH_PLACE'])
    if what == 'serve':
        import uvicorn
        return uvicorn.run(peer.app(), host='127.0.0.1', port=int(args[0]), log_level='error', access_log=False)
    print('ready', flush=True)
    sys.stdin.readline()
    peer.work()

if __name__ == '__main__': main(*sys.argv[1:])
