"""Answers cases with Ceilometer's own code, one JSON object a line.

A case is {kind: meter or event, definitions: text, options: [group.option=value],
inputs: [notification]}, its answer {refused: bool, answers: [{failed, samples,
event}]}: samples are those that would be published. The inputs of a sample
pipeline and an event pipeline are names, the answers {name, takes, publishers}: the names that a pipeline takes, and for how many publishers.
"""
import json
import logging
import os
import sys
import tempfile
import types

from ceilometer import sample as sample_util
from ceilometer import service
from ceilometer.event import converter
from ceilometer.meter import notifications
from ceilometer.pipeline import event as event_pipeline
from ceilometer.pipeline import sample as pipeline
from stevedore import extension

FIELDS = ("name", "type", "unit", "volume", "user_id", "project_id", "resource_id", "timestamp", "resource_metadata", "source")


def prepare(conf, options):
    conf.clear_override("meter_definitions_dirs", "meter")
    for group, name in [("DEFAULT", "reserved_metadata_keys"), ("DEFAULT", "reserved_metadata_length"), ("DEFAULT", "reserved_metadata_namespace"), ("DEFAULT", "sample_source"),
                        ("event", "drop_unmatched_notifications"), ("event", "store_raw")]:
        conf.clear_override(name, None if group == "DEFAULT" else group)
    for option in options:
        name, value = option.split("=", 1)
        group, name = name.split(".", 1)
        value = [value] if name in ("store_raw", "reserved_metadata_keys", "reserved_metadata_namespace") else value
        value = value == "true" if name == "drop_unmatched_notifications" else value
        conf.set_override(name, value, None if group == "DEFAULT" else group)
    sample_util.setup(conf)


def meters(conf, file, inputs):
    conf.set_override("meter_definitions_dirs", [os.path.dirname(file)], "meter")
    endpoint = notifications.ProcessMeterNotifications.__new__(notifications.ProcessMeterNotifications)
    endpoint.conf = conf
    endpoint.definitions = endpoint._load_definitions()
    valid = pipeline.SamplePipeline._validate_volume
    for message in inputs:
        if message.get("priority", "info") not in ("info", "sample"):
            yield {"samples": []}
            continue
        try:
            found = [s for s in list(endpoint.build_sample(message)) if valid(None, s)]
        except Exception as why:
            yield {"failed": True, "why": repr(why)}
        else:
            yield {"samples": [{f: getattr(s, f) for f in FIELDS} for s in found]}


def events(conf, file, inputs):
    conf.set_override("definitions_cfg_file", file, "event")
    made = converter.setup_events(conf, extension.ExtensionManager(namespace="ceilometer.event.trait_plugin"))
    for message in inputs:
        try:
            event = made.to_event(message.get("priority", "info"), {k: v for k, v in message.items() if k != "priority"})
            yield {"event": event and event.serialize()}
        except Exception as why:
            yield {"failed": True, "why": repr(why)}


def pipelines(conf, option, manager, file, names):
    conf.set_override(option, file)
    for p in manager(conf).pipelines:
        takes = [n for n in names if p.supported(types.SimpleNamespace(name=n, event_type=n))]
        yield {"name": p.name, "takes": takes, "publishers": len(set(map(id, p.publishers)))}


def sample_pipelines(conf, file, names):
    return pipelines(conf, "pipeline_cfg_file", pipeline.SamplePipelineManager, file, names)


def event_pipelines(conf, file, names):
    return pipelines(conf, "event_pipeline_cfg_file", event_pipeline.EventPipelineManager, file, names)


KINDS = {"meter": meters, "event": events, "sample pipeline": sample_pipelines, "event pipeline": event_pipelines}


def answer(conf, case):
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "definitions.yaml")
        with open(file, "w") as f:
            f.write(case["definitions"])
        try:
            prepare(conf, case["options"])
            return {"answers": list(KINDS[case["kind"]](conf, file, case["inputs"]))}
        except Exception as why:
            return {"refused": True, "why": repr(why)}


# What Ceilometer says on standard output must not be among the answers.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
logging.disable(logging.CRITICAL)
conf = service.prepare_service(argv=[], config_files=[])
for line in sys.stdin:
    print(json.dumps(answer(conf, json.loads(line))), file=answers, flush=True)
