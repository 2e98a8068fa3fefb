"""Values that the chart documents, one set a thing that people want of it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "helm" / "guard"
Values = dict[str, Any]

LEAST: Values = {
    "guard": {"models": [{"artifact": "/artifacts/resnet18"}]},
    "artifacts": {"volume": {"persistentVolumeClaim": {"claimName": "artifacts", "readOnly": True}}},
}


def with_values(**changed: Any) -> Values:
    """`LEAST` with these at the top."""
    return deepcopy(LEAST) | deepcopy(changed)


GPU = {
    "replicas": 1,
    "minReplicas": 1,
    "maxReplicas": 2,
    "image": {"tag": "0.1.0-cuda"},
    "resources": {
        "requests": {"cpu": "4", "memory": "16Gi"},
        "limits": {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": 1},
    },
    "nodeSelector": {"accelerator": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
}
GATEWAY = {"enabled": True, "parentRefs": [{"name": "public", "namespace": "gateways"}], "hostnames": ["a.example.org"]}
INGRESS = {
    "enabled": True,
    "className": "nginx",
    "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "16m"},
    "hosts": [{"host": "a.example.org"}, {"host": "b.example.org", "path": "/guard", "pathType": "Exact"}],
    "tls": [{"hosts": ["a.example.org"], "secretName": "tls"}],
}
MODELS = [
    {"artifact": "/artifacts/resnet18", "mode": "reject", "threshold": 0.001, "limits": {"images": 16}},
    {"artifact": "/artifacts/v3", "name": "digits", "version": "3", "mode": "observe", "sample": 0.1},
]

VARIANTS: dict[str, Values] = {
    "least": LEAST,
    "several models": with_values(guard={"replicas": 3, "models": MODELS}),
    "object store": with_values(
        artifacts={"objectStore": {"source": "store:guard/artifacts", "secret": "store", "sizeLimit": "8Gi"}}
    ),
    "oci image": with_values(artifacts={"image": {"reference": "ghcr.io/example/artifacts:3"}}),
    "image by digest": with_values(image={"digest": "sha256:" + "a" * 64, "pullSecrets": [{"name": "registry"}]}),
    "keys": with_values(apiKeys={"keys": "inference one-key-of-16-signs\nadministration two-key-of-16-signs\n"}),
    "keys of one's own": with_values(apiKeys={"existingSecret": "ours"}),
    "environment": with_values(
        env=[{"name": "GUARD_MODE", "value": "observe"}], envFrom=[{"secretRef": {"name": "upstream"}}]
    ),
    "grpc": with_values(grpc={"enabled": True}, service={"type": "LoadBalancer", "annotations": {"a": "b"}}),
    "ingress": with_values(ingress=INGRESS),
    "gateway": with_values(httpRoute=GATEWAY),
    "autoscaling": with_values(autoscaling={"enabled": True, "maxReplicas": 12}),
    "gpu": with_values(
        guard={"gpus_per_replica": 0.5, "models": [{"artifact": "/artifacts/resnet18", "device": "cuda"}]},
        workers={"cpu": None, "gpu": GPU},
    ),
    "redis": with_values(
        gcsFaultTolerance={
            "enabled": True,
            "redisAddress": "rediss://redis:6380",
            "passwordSecret": {"name": "redis", "key": "password"},
        },
        networkPolicy={"egress": [{"ports": [{"port": 6380, "protocol": "TCP"}]}]},
    ),
    "monitoring": with_values(
        monitoring={
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "bearerTokenSecret": {"name": "key"}},
            "rules": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboards": {"enabled": True, "annotations": {"folder": "Guard"}},
        }
    ),
    "placed": with_values(
        podLabels={"team": "vision"},
        podAnnotations={"note": "x"},
        priorityClassName="high",
        rayAuth="disabled",
        head={"nodeSelector": {"pool": "system"}, "tolerations": [{"key": "system", "operator": "Exists"}]},
        serviceAccount={"create": False, "name": "ours"},
        networkPolicy={"from": [{"namespaceSelector": {"matchLabels": {"team": "vision"}}}]},
        podDisruptionBudget={"maxUnavailable": 2},
        workers={"cpu": {"replicas": 5}},
        upgradeStrategy="None",
    ),
    "alone": with_values(podDisruptionBudget={"enabled": False}, networkPolicy={"enabled": False}),
}
