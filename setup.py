from configparser import ConfigParser
from setuptools import setup

cfg = ConfigParser(delimiters=['='])
with open('settings.ini', encoding='utf-8') as f: cfg.read_file(f)  # `read` would pass over a missing file
extras = {k: v.split() for k, v in cfg['extras'].items() if k not in cfg.defaults()}
setup(install_requires=cfg['DEFAULT']['requirements'].split(), extras_require=extras)
