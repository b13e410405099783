"""The command `doctor`: what this machine can run, and what to do about what it cannot."""

import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dqo.errors import DQOError
from dqo.shell import dqo_command

_PACKAGES = ("torch", "transformers", "trl", "peft", "sentence-transformers", "mlflow", "kfp")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `advice` is empty where all is well."""

    subject: str
    seen: str
    advice: str = ""


def run(out: Path) -> int:
    """Print the findings; returns 0 when the quickstart can run here, else 1."""
    findings = [*_machine(out), *_packages(), *_models(), _mlflow(out)]
    console = Console(highlight=False)
    for finding in findings:
        mark = "[yellow]![/]" if finding.advice else "[green]✓[/]"
        console.print(f"{mark} {finding.subject:<22} {finding.seen}", soft_wrap=True)
        if finding.advice:
            console.print(f"  {'':<22} -> {finding.advice}", soft_wrap=True, markup=False)
    blocking = [f for f in findings if f.advice and f.subject in _BLOCKING]
    if blocking:
        console.print("The quickstart cannot run here yet; see the advice above.")
        return 1
    console.print(f"The quickstart can run here: {dqo_command('run', 'recipes/quickstart.yaml')}", soft_wrap=True)
    return 0


_BLOCKING = {"memory", "disk", "MLflow", "bundled models", *_PACKAGES}


def _machine(out: Path) -> list[Finding]:
    import torch

    from dqo.policy import computes_in_bfloat16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings = [Finding("processor cores", str(cores), "" if cores > 1 else "one core works, at half the speed")]
    cpu = torch.device("cpu")
    findings.append(
        Finding(
            "bfloat16 on the CPU",
            "yes" if computes_in_bfloat16(cpu) else "no (float32 is used; steps take about twice as long)",
        )
    )
    memory = _memory()
    if memory is not None:
        gib = memory / 2**30
        findings.append(
            Finding("memory", f"{gib:.1f} GiB", "" if gib >= 6 else "the quickstart needs 6 GiB; close other programs")
        )
    folder = next(path for path in [out.resolve(), *out.resolve().parents] if path.exists())
    free = shutil.disk_usage(folder).free / 2**30
    findings.append(
        Finding("disk", f"{free:.1f} GiB free for {out}", "" if free >= 3 else "3 GiB are needed; give another --out")
    )
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        findings.append(Finding("GPU", names))
        vllm = importlib.util.find_spec("vllm") is not None
        findings.append(
            Finding("vLLM", "installed" if vllm else "missing", "" if vllm else "pip install 'dqo-pipelines[gpu]'")
        )
    else:
        findings.append(Finding("GPU", "none (the quickstart needs none; 7-8B recipes need one)"))
    return findings


def _memory() -> int | None:
    """Memory that a process may use: the smaller of the machine's and the container's limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def _packages() -> list[Finding]:
    findings = []
    for name in _PACKAGES:
        try:
            findings.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "missing", "make install"))
    return findings


def _models() -> list[Finding]:
    from dqo.bundled import bundled_models

    missing = [name for name, version in bundled_models().items() if version is None]
    seen = ", ".join(name for name, version in bundled_models().items() if version is not None) or "none"
    return [Finding("bundled models", seen, f"make install (missing: {', '.join(missing)})" if missing else "")]


def _mlflow(out: Path) -> Finding:
    from dqo.tracking import check_reachable, default_uri

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        return Finding("MLflow", f"local store {default_uri(out).removeprefix('sqlite:///')}")
    try:
        check_reachable(uri)
    except DQOError as error:
        return Finding("MLflow", f"{uri} does not answer", str(error))
    return Finding("MLflow", f"{uri} answers")
