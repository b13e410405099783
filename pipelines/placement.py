"""Where and how a task runs on a cluster: the recipe's `resources` as settings of Kubeflow's tasks.

Kubeflow fixes these when the pipeline is compiled. The account that tasks run as is not among them: it is set for a
whole run, when it is submitted.
"""

from kfp import dsl, kubernetes

from dqo.recipe import Recipe, Resources, Step
from dqo.stages.preflight import secret_variables
from dqo.tracking import KUBEFLOW_VARIABLE

WORKSPACE = "/workspace"
MODELS = "/models"
_RUN_ID = "metadata.labels['pipeline/runid']"  # Kubeflow puts it on every pod of a run
_QUEUE = "kueue.x-k8s.io/queue-name"
_LIGHT_CPU, _LIGHT_MEMORY_REQUEST, _LIGHT_MEMORY = "500m", "1Gi", "8Gi"


def place_light(task: dsl.PipelineTask, recipe: Recipe, step: Step | None = None) -> dsl.PipelineTask:
    """Settings of a task that computes little: any node, no accelerator.

    Args:
        task: The task.
        recipe: The recipe.
        step: Its name in `resources.timeouts` and `resources.caching`; None for preflight and the exit handler, which
            are never taken from Kubeflow's cache.
    """
    task.set_cpu_request(_LIGHT_CPU)
    task.set_memory_request(_LIGHT_MEMORY_REQUEST)
    task.set_memory_limit(_LIGHT_MEMORY)
    return _everywhere(task, recipe, step)


def place_heavy(task: dsl.PipelineTask, recipe: Recipe, step: Step) -> dsl.PipelineTask:
    """Settings of a task that trains or samples: processors, memory, accelerators, and the nodes that have them.

    A task that has several nodes train for it only waits for them, so it asks for little itself.
    """
    resources = recipe.resources
    if recipe.distributed.nodes > 1 and step in ("sft", "rl"):
        return place_light(task, recipe, step)
    task.set_cpu_request(resources.cpu)
    task.set_memory_limit(resources.memory)
    if resources.accelerator is not None:
        task.set_accelerator_type(resources.accelerator)
        task.set_accelerator_limit(resources.accelerator_count)
    for label, value in resources.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in resources.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    for term in resources.node_affinity:
        expressions = [expression.model_dump() for expression in term.expressions]
        kubernetes.add_node_affinity(task, match_expressions=expressions, weight=term.weight)
    if resources.shared_memory is not None:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=resources.shared_memory)
    if resources.queue is not None:
        kubernetes.add_pod_label(task, _QUEUE, resources.queue)
    return _everywhere(task, recipe, step)


def _everywhere(task: dsl.PipelineTask, recipe: Recipe, step: Step | None) -> dsl.PipelineTask:
    """Settings of all tasks."""
    resources = recipe.resources
    task.set_container_image(resources.image)
    for name, value in _environment(resources).items():
        task.set_env_variable(name, value)
    kubernetes.use_field_path_as_env(task, KUBEFLOW_VARIABLE, _RUN_ID)
    for section, keys in secret_variables(recipe).items():
        # Optional, so that a pod without it starts and preflight names it; else the pod would wait without a word.
        kubernetes.use_secret_as_env(task, getattr(resources.secrets, section), keys, optional=True)
    if resources.workspace_claim is not None:
        kubernetes.mount_pvc(task, resources.workspace_claim, WORKSPACE)
    if resources.models_claim is not None:
        kubernetes.mount_pvc(task, resources.models_claim, MODELS)
    if resources.run_as_user is not None or resources.run_as_group is not None:
        kubernetes.set_security_context(
            task,
            run_as_user=resources.run_as_user,
            run_as_group=resources.run_as_group,
            run_as_non_root=True if resources.run_as_user is not None else None,
        )
    if resources.image_pull_policy is not None:
        kubernetes.set_image_pull_policy(task, resources.image_pull_policy)
    if resources.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, resources.image_pull_secrets)
    if step is None:
        task.set_caching_options(False)
        return task
    task.set_caching_options(resources.caching.get(step, True))
    hours = resources.timeouts.get(step)
    # The deadline of training on several nodes is that of its TrainJob, which does not count the time in a queue.
    if hours is not None and (recipe.distributed.nodes == 1 or step not in ("sft", "rl")):
        kubernetes.set_timeout(task, round(hours * 3600))
    retries = resources.retries
    if retries.count:
        task.set_retry(
            num_retries=retries.count,
            backoff_duration=f"{retries.backoff_seconds}s",
            backoff_factor=retries.backoff_factor,
            # Argo counts from the start of the first attempt: Kubeflow's default of an hour would allow no further
            # attempt of a training that fails after two.
            backoff_max_duration=f"{round(retries.within_hours * 3600)}s",
        )
    return task


def _environment(resources: Resources) -> dict[str, str]:
    """Variables of all tasks; caches stand where a user without a home may write, and where they are kept."""
    variables = {
        "HOME": "/tmp",
        "HF_HOME": f"{MODELS}/huggingface" if resources.models_claim else "/tmp/huggingface",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONUNBUFFERED": "1",
    }
    if resources.workspace_claim:
        variables["XDG_CACHE_HOME"] = f"{WORKSPACE}/cache"  # rebuilt bundled models, the judge's answers
    if resources.offline:
        variables["HF_HUB_OFFLINE"] = "1"
    return variables | resources.environment
