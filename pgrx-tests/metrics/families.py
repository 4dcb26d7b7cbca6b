"""Reads OpenMetrics from standard input; prints each sample as name, labels and value."""
import json
import sys

from prometheus_client.openmetrics.parser import text_string_to_metric_families

for family in text_string_to_metric_families(sys.stdin.read()):
    for sample in family.samples:
        print(sample.name, json.dumps(sample.labels, sort_keys=True), sample.value)
