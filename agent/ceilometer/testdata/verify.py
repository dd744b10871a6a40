"""Verifies with Ceilometer's own code the signatures of the samples that stand on
standard input, a message's JSON body a line, and prints how many hold: verify.py SECRET"""
import json
import sys

from ceilometer.publisher import utils
from oslo_messaging._drivers import common

good = bad = 0
for line in sys.stdin:
    message = common.deserialize_msg(json.loads(line))
    for sample in message["payload"]["samples"]:
        if utils.verify_signature(sample, sys.argv[1]) and not utils.verify_signature(dict(sample, counter_volume=-1), sys.argv[1]):
            good += 1
        else:
            bad += 1
            print(json.dumps(sample), file=sys.stderr)
json.dump({"good": good, "bad": bad}, sys.stdout)
