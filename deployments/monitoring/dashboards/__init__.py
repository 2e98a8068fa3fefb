"""Grafana's dashboards as code: edit these files, then ``python -m deployments.monitoring.dashboards``.

Panels are written here in the few words that matter to us; `panels` turns them into the JSON that Grafana 10 and newer
import. No library: what we need of that JSON is a page of code, and the public one has a release for each version of
Grafana.
"""
