"""Prints what oslo.config reads of the options on standard input: of each the
value that counts, then all of them."""
import json
import sys

from oslo_config import cfg

asked = json.load(sys.stdin)


def read(wanted, kind):
    conf = cfg.ConfigOpts()
    for name in asked:
        group, option = name.split(".", 1)
        opt = (kind if name == wanted else cfg.StrOpt)(option)
        conf.register_opt(opt, None if group == "DEFAULT" else group)
    conf(["--config-file=" + f for f in sys.argv[1:]])
    group, option = wanted.split(".", 1)
    return conf[option] if group == "DEFAULT" else conf[group][option]


json.dump({n: [read(n, cfg.StrOpt)] + read(n, cfg.MultiStrOpt) for n in asked}, sys.stdout)
