"""deploy/: configurations of balancers, of Compose and of Kubernetes. `make fleet` (TORPOR_FLEET=1) checks them against
their owners' schemas and programs, too; tests/test_fleet.py runs them."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from conftest import BIN, ROOT

DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".sdks" / "deploy"
ENVOY = TOOLS / "python/envoy/_bin/envoy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))

needs_haproxy = pytest.mark.skipif(not shutil.which("haproxy"), reason="needs HAProxy (Debian: haproxy)")
fleet = pytest.mark.skipif(not os.environ.get("TORPOR_FLEET"), reason="make fleet runs it")


def documents(path):
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def manifest(kind, name="torpor"):
    [found] = [one for path in MANIFESTS for one in documents(path)
               if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


def pod_proxy(directory):
    path = directory / "pod.cfg"
    path.write_text(manifest("ConfigMap", "torpor-proxy")["data"]["haproxy.cfg"])
    return path


def haproxy_env(**addresses):
    """Of both configurations: addresses that a check needs, or others."""
    return {**os.environ, "TORPOR_BIND": "127.0.0.1:1", "TORPOR_WORKER_0": "127.0.0.1:2",
            "TORPOR_WORKER_1": "127.0.0.1:3", "TORPOR_SERVER": "127.0.0.1:4", "TORPOR_METRICS_KEY": "k", **addresses}


def envoy_config(directory, port, workers):
    """The file with other addresses."""
    text = (DEPLOY / "envoy.yaml").read_text()
    text, changed = re.subn(r"address: 0\.0\.0\.0, port_value: 8080", f"address: 127.0.0.1, port_value: {port}", text)
    for number, worker in enumerate(workers):
        old, new = rf"address: worker-{number}, port_value: 8080", f"address: 127.0.0.1, port_value: {worker}"
        text, more = re.subn(old, new, text)
        changed += more
    assert changed == 3
    path = directory / "envoy.yaml"
    path.write_text(text)
    return path


# ---- what stands in the files


def test_every_option_and_variable_of_a_server_exists():
    known = subprocess.run([BIN, "serve", "--help"], capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"--[a-z-]+", known)) | {"--store"}
    [server, _] = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    assert server["args"][0] == "serve" and {word for word in server["args"] if word.startswith("--")} <= options
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for settings in (manifest("ConfigMap")["data"], *(compose[f"worker-{i}"]["environment"] for i in (0, 1))):
        for name in settings:
            if name.startswith("TORPOR_"):
                assert "--" + name.removeprefix("TORPOR_").lower().replace("_", "-") in options, name


def test_balancers_find_a_conversation_by_the_same_headers_which_the_server_knows():
    haproxy = re.findall(r"req\.hdr\(([\w-]+)\)", (DEPLOY / "haproxy.cfg").read_text())
    [config] = documents(DEPLOY / "envoy.yaml")
    [chain] = config["static_resources"]["listeners"][0]["filter_chains"]
    [host] = chain["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    named, other = (route["route"]["hash_policy"] for route in host["routes"])
    assert haproxy == [policy["header"]["header_name"] for policy in other if "header" in policy]
    assert haproxy[0] == named[0]["header"]["header_name"] == "x-torpor-agent"
    source = (ROOT / "src/server/request.cc").read_text()
    assert all(f'"{name}"' in source for name in haproxy)
    assert all(policy.get("terminal") for policy in named + other[:-1]), "else two headers are mixed"


def test_ports_names_and_times_of_the_manifests_fit_each_other():
    pod = manifest("Deployment")["spec"]["template"]
    server, proxy = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for one in (server, proxy) for port in one["ports"]}
    assert server["args"][server["args"].index("--port") + 1] == str(ports["server"])
    env = {entry["name"]: entry.get("value") for entry in proxy["env"]}
    assert env["TORPOR_BIND"] == f"*:{ports['http']}" and env["TORPOR_SERVER"] == f"127.0.0.1:{ports['server']}"
    assert [port["number"] for port in manifest("InferencePool")["spec"]["targetPorts"]] == [ports["http"]]
    assert {port["port"] for port in manifest("Service")["spec"]["ports"]} == {ports["http"]}
    labels = pod["metadata"]["labels"]
    selected = [manifest("InferencePool")["spec"]["selector"]["matchLabels"], manifest("Service")["spec"]["selector"]]
    assert selected == [labels, labels]
    drain = int(manifest("ConfigMap")["data"]["TORPOR_DRAIN_TIMEOUT"])
    sleeps = int(proxy["lifecycle"]["preStop"]["exec"]["command"][1])
    assert drain < sleeps < pod["spec"]["terminationGracePeriodSeconds"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for one in (server, proxy) for mount in one["volumeMounts"]} == volumes


def test_ray_is_told_what_the_application_takes():
    ray = manifest("RayService")["spec"]
    [served] = yaml.safe_load(ray["serveConfigV2"])["applications"]
    module, builder = served["import_path"].split(":")
    source = (ROOT / "python" / (module.replace(".", "/") + ".py")).read_text()
    assert re.search(rf"^def {builder}\(args: ", source, re.MULTILINE)
    known = set(re.findall(r'"(\w+)"', source)) | {"store", "memory_budget", "disk_budget"}
    assert set(served["args"]) <= known
    groups = [ray["rayClusterConfig"]["headGroupSpec"], *ray["rayClusterConfig"]["workerGroupSpecs"]]
    pinned = re.search(r"ray\[serve\]==([\d.]+)", (ROOT / "scripts/fetch-sdks").read_text())[1]
    assert ray["rayClusterConfig"]["rayVersion"] == pinned
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        assert {"name": "RAY_SERVE_SESSION_ID_HEADER_KEY", "value": "x-torpor-agent"} in container["env"]


@needs_haproxy
def test_haproxy_takes_both_of_its_configurations(tmp_path):
    for path in (DEPLOY / "haproxy.cfg", pod_proxy(tmp_path)):
        said = subprocess.run(["haproxy", "-c", "-f", path], env=haproxy_env(), capture_output=True, text=True)
        assert said.returncode == 0 and "WARNING" not in said.stdout + said.stderr, said.stderr


# ---- what their owners' schemas and programs say


@fleet
def test_envoy_takes_its_configuration(tmp_path):
    path = envoy_config(tmp_path, 1, (2, 3))
    said = subprocess.run([ENVOY, "--mode", "validate", "-c", path], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    path.write_text(path.read_text().replace("hash_policy", "hash_policies", 1))
    said = subprocess.run([ENVOY, "--mode", "validate", "-c", path], capture_output=True, text=True)
    assert said.returncode and "hash_policies" in said.stderr


def with_tools(script, *args):
    """Python code with the checkers' packages."""
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(TOOLS / "python")})


@fleet
def test_manifests_have_kubernetes_schemas():
    script = "import json, sys, kubernetes_validate as k; k.validate(json.loads(sys.argv[1]), '1.34', strict=True)"

    def check(one):
        return with_tools(script, json.dumps(one))

    own = [one for path in MANIFESTS for one in documents(path)
           if one["apiVersion"].split("/")[0] in ("v1", "apps", "policy")]
    assert {one["kind"] for one in own} == {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget"}
    for one in own:
        said = check(one)
        assert said.returncode == 0, said.stderr
    # Ray's pods, too: their template is a pod's.
    ray = manifest("RayService")["spec"]["rayClusterConfig"]
    for group in (ray["headGroupSpec"], *ray["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        said = check(pod)
        assert said.returncode == 0, said.stderr
    assert check(manifest("Deployment") | {"spec": {"replica": 1}}).returncode


@fleet
def test_manifests_of_other_kinds_have_their_owners_fields(tmp_path):
    said = subprocess.run([TOOLS / "check", *MANIFESTS], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert sorted(said.stdout.split()[1::2]) == ["Gateway", "HTTPRoute", "InferencePool", "RayService"]
    broken = tmp_path / "broken.yaml"
    broken.write_text((DEPLOY / "kubernetes/gateway.yaml").read_text().replace("targetPorts:", "targetPort:"))
    assert "targetPort" in subprocess.run([TOOLS / "check", broken], capture_output=True, text=True).stderr


@fleet
def test_the_compose_file_has_composes_fields():
    text = re.sub(r"\$\{\w+:\?[^}]*\}", "/given", (DEPLOY / "compose.yaml").read_text())
    compose = yaml.safe_load(text)  # with its merges made
    script = "import sys, compose_spec; print(*compose_spec.PyCompose.from_json(sys.argv[1]).to_spec().services)"
    said = with_tools(script, json.dumps(compose))
    assert said.stdout.split() == list(compose["services"]), said.stderr
    compose["services"]["balancer"]["port"] = compose["services"]["balancer"].pop("ports")
    assert with_tools(script, json.dumps(compose)).returncode
