"""The manifests are what Kubernetes accepts and fit each other: selectors, ports, claims, probes,
grace.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from service.settings import Settings

from .files import DEPLOY, documents, manifests

CUSTOM = {"ServiceMonitor", "InferencePool"}
CORE = [manifest for manifest in manifests() if manifest["kind"] not in CUSTOM]


def one(kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests() if manifest["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    found: dict[str, Any] = one("Deployment")["spec"]["template"]["spec"]
    return found


def variable(name: str) -> str:
    (found,) = [each["value"] for each in pod()["containers"][0]["env"] if each["name"] == name]
    return str(found)


@pytest.mark.parametrize("manifest", CORE, ids=lambda m: f"{m['kind']} {m['metadata']['name']}")
@pytest.mark.parametrize("version", ["1.30.0", kubernetes_validate.latest_version()])
def test_a_manifest_is_valid(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_validation_sees_a_misspelt_field() -> None:
    manifest = one("PodDisruptionBudget")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            manifest | {"spec": manifest["spec"] | {"maxUnavailabel": 1}}, "1.30.0", strict=True
        )


def test_everything_is_in_the_kustomization() -> None:
    (whole,) = documents(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert sorted(whole["resources"]) == sorted(
        path.name for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.stem != "kustomization"
    )


def test_everything_selects_the_pods_of_the_deployment() -> None:
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels == {"app": "adapterd"}
    assert one("Service")["spec"]["selector"] == labels
    assert one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    for kind in ("Deployment", "PodDisruptionBudget", "ServiceMonitor", "InferencePool"):
        assert one(kind)["spec"]["selector"]["matchLabels"] == labels, kind
    assert one("Service")["metadata"]["labels"] == labels, "the monitor selects the service by them"


def test_ports_agree() -> None:
    (port,) = pod()["containers"][0]["ports"]
    assert port["containerPort"] == Settings().port
    assert one("InferencePool")["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
    (served,) = one("Service")["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    assert [endpoint["port"] for endpoint in one("ServiceMonitor")["spec"]["endpoints"]] == [served["name"]]


def test_mounts_have_volumes_and_claims_exist() -> None:
    mounts = {mount["name"] for mount in pod()["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert mounts == set(volumes)
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in volumes.values()
        if "persistentVolumeClaim" in volume
    }
    assert claims == {
        manifest["metadata"]["name"]
        for manifest in manifests()
        if manifest["kind"] == "PersistentVolumeClaim"
    }


def test_replicas_do_not_write_over_each_others_registrations() -> None:
    assert one("HorizontalPodAutoscaler")["spec"]["minReplicas"] > 1
    (adapters,) = [mount for mount in pod()["containers"][0]["volumeMounts"] if mount["name"] == "adapters"]
    assert adapters["readOnly"] is True


def test_readiness_decides_on_traffic_and_liveness_only_on_restarts() -> None:
    container = pod()["containers"][0]
    assert (
        container["readinessProbe"]["httpGet"]["path"]
        == container["startupProbe"]["httpGet"]["path"]
        == "/ready"
    )
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"


def test_the_grace_outlasts_the_drain() -> None:
    pause = float(pod()["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod()["terminationGracePeriodSeconds"] >= pause + float(variable("ADAPTERD_DRAIN_S")) + 5


def test_the_services_own_variables_stay_out_of_the_settings() -> None:
    """Kubernetes sets ADAPTERD_PORT=tcp://... for a Service called adapterd, and no pod would
    start.
    """
    assert pod()["enableServiceLinks"] is False


def test_the_pod_has_no_privileges_and_no_token() -> None:
    container = pod()["containers"][0]["securityContext"]
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["automountServiceAccountToken"] is False
    assert (container["readOnlyRootFilesystem"], container["allowPrivilegeEscalation"]) == (True, False)
    assert container["capabilities"] == {"drop": ["ALL"]}


def test_the_endpoint_picker_is_told_where_residency_is() -> None:
    assert variable("ADAPTERD_LORA_REQUESTS_INFO") == "on"
    assert (
        "--lora-info-metric=adapterd_lora_requests_info\n"
        in (DEPLOY / "kubernetes" / "inference-pool.yaml").read_text()
    )


def test_the_queue_scales_the_deployment() -> None:
    spec = one("HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": one("Deployment")["metadata"]["name"],
    }
    assert [metric["pods"]["metric"]["name"] for metric in spec["metrics"]] == [
        "adapterd_num_requests_waiting"
    ]


def test_an_apply_leaves_the_number_of_replicas_to_the_autoscaler() -> None:
    assert "replicas" not in one("Deployment")["spec"]


def test_clients_see_a_models_name_and_not_the_folders() -> None:
    assert variable("ADAPTERD_BASE_ID") not in ("", Path(variable("ADAPTERD_BASE")).name)


def test_a_replica_has_limits_of_memory_and_of_processors() -> None:
    """As many threads compute as the limit has processors; without one, as many as the node has."""
    resources = pod()["containers"][0]["resources"]
    assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys()
    assert int(resources["requests"]["cpu"]) <= int(resources["limits"]["cpu"])


def test_the_endpoint_picker_reaches_the_replicas() -> None:
    picker = one("InferencePool")["spec"]["endpointPickerRef"]["name"]
    (rule,) = one("NetworkPolicy")["spec"]["ingress"]
    assert {"podSelector": {"matchLabels": {"inferencepool": picker}}} in rule["from"]
    assert rule["ports"] == [{"protocol": "TCP", "port": pod()["containers"][0]["ports"][0]["name"]}]
