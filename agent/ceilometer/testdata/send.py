"""Sends samples as Ceilometer's polling agent does: send.py URL, with the messages
of another sender on standard input, a JSON body a line."""
import json
import sys

import oslo_messaging
from ceilometer import messaging, sample, service
from ceilometer.publisher import utils

conf = service.prepare_service(["send"], config_files=[sys.argv[1]])
notifier = oslo_messaging.Notifier(
    messaging.get_transport(conf), driver=conf.publisher_notifier.telemetry_driver, publisher_id="ceilometer.polling")
secret = conf.publisher.telemetry_secret
for line in sys.stdin:
    sent = json.loads(json.loads(line)["oslo.message"])["payload"]["samples"]
    own = []
    for s in sent:
        made = sample.Sample(
            name=s["counter_name"], type=s["counter_type"], unit=s["counter_unit"], volume=s["counter_volume"], user_id=s["user_id"],
            project_id=s["project_id"], resource_id=s["resource_id"], timestamp=s["timestamp"],
            resource_metadata=s["resource_metadata"], source=s["source"], id=s["message_id"], monotonic_time=s["monotonic_time"])
        own.append(utils.meter_message_from_counter(made, secret))
    notifier.sample({}, "telemetry.polling", {"samples": own})
