"""What a cluster could hold, as preflight looks at it with the account of its task's pod.

Imported inside the component's body only: it needs the client of Kubernetes, which the image holds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

CALLS = (("list", "", "nodes"), ("list", "", "resourcequotas"))
"""Verb, API group and resource of what is asked; the chart allows these with `runner.readCapacity`."""
Listed = list[dict[str, Any]] | str
"""Objects as Kubernetes writes them, or why they could not be listed."""
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SECONDS = 5  # of a request


def look() -> tuple[Listed, Listed]:
    """The cluster's nodes and the namespace's ResourceQuotas, each a list or why it is not known; raises nothing."""
    try:
        config.load_incluster_config()
        return look_with(client.ApiClient(), _ACCOUNT.read_text(encoding="utf-8").strip())
    except Exception as error:  # no pod of a cluster, or no token in it
        reason = f"Kubernetes cannot be asked ({type(error).__name__})"
        return reason, reason


def look_with(api: client.ApiClient, namespace: str) -> tuple[Listed, Listed]:
    """As `look`, with a client and a namespace."""
    core = client.CoreV1Api(api)

    def listed(what: str, call: Callable[..., Any], *where: str) -> Listed:
        try:
            found: list[dict[str, Any]] = api.sanitize_for_serialization(call(*where, _request_timeout=_SECONDS).items)
        except ApiException as error:
            if error.status == 403:
                return (
                    f"the task's service account may not list {what}; the chart's value runner.readCapacity=true "
                    "allows it"
                )
            return f"the service account cannot list {what} ({error.reason or error.status})"
        except Exception as error:  # no way to the API server, or an answer that is none
            return f"the service account cannot list {what} ({type(error).__name__})"
        return found

    return listed("nodes", core.list_node), listed("resourcequotas", core.list_namespaced_resource_quota, namespace)
