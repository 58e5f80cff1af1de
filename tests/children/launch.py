"Start the scripts of this folder as processes of their own, and read what they print"
import os, re, signal, subprocess, sys, tempfile, time
from pathlib import Path

here = Path(__file__).parent
root = here.parent.parent


class Child:
    "A Python process; its output goes to a file, so that nothing it said is lost when it is killed"
    def __init__(self, *args, cwd=here, **env):
        self.out = Path(tempfile.mkstemp(prefix='fh_saas_child_', suffix='.log')[1])
        keep = {k: v for k, v in os.environ.items() if not k.startswith('FH_SAAS_')}
        with self.out.open('wb') as out:
            self.proc = subprocess.Popen([sys.executable, '-u', *map(str, args)], cwd=cwd, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True,
                env=keep | dict(PYTHONPATH=f'{root}:{here}', PYTHONFAULTHANDLER='1') | {k: str(v) for k, v in env.items()})
        self.pid = self.proc.pid

    @property
    def text(self): return self.out.read_text(errors='replace')
    @property
    def running(self): return self.proc.poll() is None

    def says(self, pattern, seconds=20):
        "Wait for a line that matches; its match object"
        until = time.monotonic() + seconds
        while not (m := re.search(pattern, self.text, re.M)):
            if time.monotonic() > until or not self.running and not re.search(pattern, self.text, re.M):
                raise AssertionError(f'the child (exit code {self.proc.poll()}) did not say {pattern!r}, but:\n{self.text[-3000:]}')
            time.sleep(0.02)
        return m

    def send(self, sig): self.proc.send_signal(sig)

    def kill(self):
        "kill -9, the whole family; can be called again"
        try: os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.proc.wait(10)

    def ends(self, seconds):
        "Seconds until it ended by itself"
        start = time.monotonic()
        try: self.proc.wait(seconds)
        except subprocess.TimeoutExpired: raise AssertionError(f'the child was still there after {seconds} s; it said:\n{self.text[-3000:]}') from None
        return time.monotonic() - start

    def close(self):
        self.kill()
        self.proc.stdin.close()
        self.out.unlink(missing_ok=True)
