"serve.py <port>: an app started the way FastHTML's serve() does: this file is run, and imported again by the reloader's child"
import os, sys, uvicorn
from app import app, manager  # noqa: F401

if __name__ == '__main__':
    print('supervisor', os.getpid())
    uvicorn.run('serve:app', host='127.0.0.1', port=int(sys.argv[1]), reload=True, log_level='warning')
