"""A saved artifact of the method bna behind a real Ray Serve."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
from hand import bna_artifact, image
from prometheus_client.parser import text_string_to_metric_families

from deployments.config import ModelConfig, ServeConfig
from deployments.document import document
from deployments.proxies import free_port
from deployments.serve import running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray's own use of pydantic


def test_bna_is_served_like_any_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP an image sent to the suspected class is corrected where its network disagrees, the others pass without
    a second network, and neither answers nor series know of a p-value."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    artifact = bna_artifact(0).save(tmp_path / "suspicion")
    ant, bee, triggered = image(0.3, 0.1, 0.0), image(0.1, 0.3, 0.0), image(1.0, 0.2, 0.1)
    asked = [bee, triggered, np.concatenate([bee, bee]), np.concatenate([ant, bee])]
    model = ModelConfig(artifact=artifact, mode="correct", expose_scores=True)
    served = document(ServeConfig(models=[model], cpus_per_replica=0.1), host="127.0.0.1", port=free_port())
    with running(served) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        answers = [
            http.post("/v1/models/suspicion:predict", json={"instances": images.tolist()}).raise_for_status().json()
            for images in asked
        ]
        about = http.get("/v2/models/suspicion").raise_for_status().json()
        series = {
            (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(http.get("/metrics").raise_for_status().text)
            for sample in family.samples
        }
    rows = [row for answer in answers for row in answer["predictions"]]
    assert [(row["class"], row["flagged"]) for row in rows] == [
        *(("bee", False), ("bee", True), ("bee", False), ("bee", False)),
        *(("ant", False), ("bee", False)),
    ]
    assert [row["score"] for row in rows] == pytest.approx([-2, 0.5, -2, -2, -0.5, -2], abs=1e-4)
    assert not [row for row in rows if "p_value" in row]
    assert about["parameters"]["guard_method"] == "bna"
    assert "guard_threshold" not in about["parameters"]
    assert series["guard_corrected_total", "suspicion"] == 1
    assert series["guard_inputs_total", "suspicion", "clean"] == 5
    assert series["guard_score_count", "suspicion"] == 6
    assert series["guard_p_value_count", "suspicion"] == 0
    assert series["guard_stage_seconds_count", "suspicion", "original"] == 4
    assert series["guard_stage_seconds_count", "suspicion", "corrected"] == 2
    assert [key[2] for key in series if key[0] == "guard_artifact_info"] == ["bna"]
    assert not [key for key in series if key[0] in ("guard_threshold", "guard_nominal_false_positive_ratio")]
