"""The command `schedule`: runs of a recipe that Kubeflow starts by the clock, one schedule a name."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import kfp_server_api as api
from cronsim import CronSim, CronSimError

from dqo.errors import DQOError
from dqo.recipe import Recipe
from pipelines.kubeflow import Access, Server, connected, named, parameters
from pipelines.submit import same_parameters

_FIELDS = ("minute", "hour", "day-of-month", "month", "day-of-week")
_RANGES = {
    "minute": "0 to 59",
    "hour": "0 to 23",
    "day-of-month": "1 to 31, one that the months have",
    "month": "1 to 12 or jan to dec",
    "day-of-week": "0 to 7 (0 and 7 are Sunday) or sun to sat",
}
_ENABLED = "ENABLED"


def run(
    recipe: Recipe,
    access: Access,
    cron: str,
    name: str | None = None,
    timezone: str = "UTC",
    mlflow_uri: str | None = None,
    service_account: str | None = None,
) -> int:
    """Upload a recipe's pipeline and make or change its schedule; returns the exit status.

    Args:
        recipe: The recipe.
        access: The server.
        cron: Minute, hour, day of month, month, day of week.
        name: Name of the schedule; None takes the recipe's.
        timezone: The zone in which the server reads schedules. Kubeflow has one for all schedules (the variable
            CRON_SCHEDULE_TIMEZONE of its ScheduledWorkflow controller, UTC unless changed), and its API tells it to
            nobody.
        mlflow_uri: As of `submit`.
        service_account: As of `submit`.

    Raises:
        DQOError: If the cron line or zone is wrong, or the server refuses something.
    """
    if recipe.resources.caching.get("prepare", False):
        raise DQOError("resources.caching.prepare: got true; with it, a schedule would never see changed data")
    kubeflow = to_kubeflow(cron)
    echo = in_words(cron, timezone)
    name = name or recipe.name
    with connected(access) as server:
        experiment = server.experiment_id()
        uploaded = server.upload(recipe)
        body = api.V2beta1RecurringRun(
            display_name=name,
            description=f"dqo schedule: recipe {recipe.name} {recipe.digest}, {cron}",
            experiment_id=experiment,
            pipeline_version_reference=uploaded.reference,
            runtime_config=parameters(recipe, mlflow_uri, skip_unchanged=True),
            service_account=service_account,
            trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=kubeflow)),
            mode="DISABLE",
            no_catchup=True,
            max_concurrency="1",
        )
        what = _replace(server, body)
    print(f"Schedule {name} {what}: pipeline version {uploaded.name}")
    print("\n".join(echo))
    print("One run at a time; missed ones are not made up for; unchanged data and recipe end a run after preparation.")
    return 0


def change(access: Access, name: str, action: str) -> int:
    """Pause, resume or delete a schedule; returns the exit status.

    Args:
        access: The server.
        name: Name of the schedule.
        action: `pause`, `resume` or `delete`.

    Raises:
        DQOError: If there is none of that name, or the server refuses.
    """
    with connected(access) as server:
        found = _named(server, name)
        if not found:
            known = ", ".join(sorted(entry.display_name for entry in _all(server))) or "none"
            raise DQOError(f"--name {name!r}: no such schedule in Kubeflow; there are: {known}")
        service = server.recurring
        methods: dict[str, Callable[..., Any]] = {
            "pause": service.recurring_run_service_disable_recurring_run,
            "resume": service.recurring_run_service_enable_recurring_run,
            "delete": service.recurring_run_service_delete_recurring_run,
        }
        for entry in found:
            server.call(f"{action} a schedule", methods[action], entry.recurring_run_id)
    said = {"pause": "paused", "resume": "resumed", "delete": "deleted"}[action]
    print(f"Schedule {name} {said}" + ("; runs that have started go on" if action != "resume" else ""))
    return 0


def show(access: Access) -> int:
    """Print all schedules of the namespace; returns the exit status.

    Raises:
        DQOError: If the server cannot be asked.
    """
    with connected(access) as server:
        entries = _all(server)
    if not entries:
        print("No schedules.")
    for entry in sorted(entries, key=lambda entry: entry.display_name):
        trigger = entry.trigger
        if trigger and trigger.cron_schedule:
            when = trigger.cron_schedule.cron
        elif trigger and trigger.periodic_schedule:
            when = f"every {trigger.periodic_schedule.interval_second} s"
        else:
            when = "by no clock"
        state = "running" if entry.status == _ENABLED else "paused"
        print(f"{entry.display_name}  {state}  {when}  {entry.description or ''}".rstrip())
    return 0


def to_kubeflow(cron: str) -> str:
    """Kubeflow's six fields, seconds first, of cron's five.

    Its parser (robfig/cron) counts the days of a week from 0 to 6 and knows no `L`, `W` and `#`.

    Raises:
        DQOError: Naming the field that is wrong.
    """
    fields = cron.split()
    if len(fields) != len(_FIELDS):
        raise DQOError(
            f"--cron {cron!r}: got {len(fields)} fields, expected 5: {', '.join(_FIELDS)}, such as '0 2 * * *'"
        )
    for name, field in zip(_FIELDS, fields, strict=True):
        letters = field.upper().replace("JUL", "").replace("WED", "")
        if "#" in field or (name in ("day-of-month", "day-of-week") and ("L" in letters or "W" in letters)):
            raise DQOError(f"--cron {cron!r}: {name} {field!r}: Kubeflow knows no L, W and #; expected {_RANGES[name]}")
    try:
        parsed = CronSim(cron, datetime.now(UTC))
    except CronSimError as error:
        wrong = str(error).removeprefix("Bad ")
        if wrong not in _FIELDS:
            raise DQOError(f"--cron {cron!r}: {error}; expected {', '.join(_FIELDS)}") from None
        raise DQOError(
            f"--cron {cron!r}: {wrong} {fields[_FIELDS.index(wrong)]!r}: expected {_RANGES[wrong]}, *, a list a,b, "
            "a range a-b or a step */n"
        ) from None
    if next(parsed, None) is None:
        raise DQOError(f"--cron {cron!r}: no such day comes")
    days = fields[4]
    # A pair is a weekday with its place in the month, such as 5#2; it stays as it was written.
    plain = sorted({day % 7 for day in parsed.weekdays if isinstance(day, int)})
    if not days.startswith("*") and "7" in days.partition("/")[0] and len(plain) > 0:
        days = ",".join(map(str, plain))
    return " ".join(["0", *fields[:4], days])


def in_words(cron: str, timezone: str, now: datetime | None = None) -> list[str]:
    """What a valid cron line means, with its next three times, in lines for people.

    Args:
        cron: The five fields.
        timezone: IANA name of the server's zone.
        now: The moment to count from, aware; None is now.

    Raises:
        DQOError: If there is no such zone.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise DQOError(f"--timezone {timezone!r}: no such time zone; expected a name such as Europe/Berlin") from None
    times = CronSim(cron, (now or datetime.now(UTC)).astimezone(zone))
    lines = [f"  {times.explain()}, time zone {timezone}. Next:"]
    for moment, _ in zip(times, range(3), strict=False):
        local = moment.astimezone()
        here = "" if local.utcoffset() == moment.utcoffset() else f"  ({local:%H:%M %Z} here)"
        lines.append(f"    {moment:%a %Y-%m-%d %H:%M %Z}{here}")
    lines.append(
        "  Kubeflow has one time zone for all schedules, UTC unless CRON_SCHEDULE_TIMEZONE of its ScheduledWorkflow "
        "controller says another; --timezone tells this command which."
    )
    return lines


def _replace(server: Server, body: Any) -> str:
    """Make a schedule and remove others of its name; returns what was done.

    Kubeflow can't change one. The new one stands still until the others are gone, so that no two start runs; of several
    made at once, the last one stays.
    """
    service = server.recurring
    before = _named(server, body.display_name)
    paused = bool(before) and all(entry.status != _ENABLED for entry in before)
    if len(before) == 1 and _same(before[0], body):
        return "is as it was" + (" (paused)" if paused else "")
    made = server.call("make a schedule", service.recurring_run_service_create_recurring_run, body)
    entries = _named(server, body.display_name)
    last = max(entries, key=lambda entry: (entry.created_at, entry.recurring_run_id), default=made)
    for entry in entries:
        if entry.recurring_run_id != last.recurring_run_id:
            _delete(server, entry)
    if not paused:
        enable = service.recurring_run_service_enable_recurring_run
        server.call("start a schedule", enable, last.recurring_run_id)
    if last.recurring_run_id != made.recurring_run_id:
        return "was changed by another command at the same time, which counts"
    done = "changed" if before else "made"
    return f"{done}, paused as before (--resume starts it)" if paused else done


def _same(there: Any, wanted: Any) -> bool:
    """Whether a schedule on the server is the wanted one already."""
    reference, asked = there.pipeline_version_reference, wanted.pipeline_version_reference
    cron = there.trigger and there.trigger.cron_schedule and there.trigger.cron_schedule.cron
    return (
        reference is not None
        and reference.pipeline_version_id == asked.pipeline_version_id
        and cron == wanted.trigger.cron_schedule.cron
        and there.experiment_id == wanted.experiment_id
        and bool(there.no_catchup)
        and str(there.max_concurrency) == wanted.max_concurrency
        and (wanted.service_account is None or there.service_account == wanted.service_account)
        and same_parameters(there.runtime_config, wanted.runtime_config)
    )


def _delete(server: Server, entry: Any) -> None:
    """Delete a schedule, unless another command just did."""
    try:
        method = server.recurring.recurring_run_service_delete_recurring_run
        server.call("delete the schedule that this one replaces", method, entry.recurring_run_id)
    except DQOError:
        if any(other.recurring_run_id == entry.recurring_run_id for other in _named(server, entry.display_name)):
            raise


def _named(server: Server, name: str) -> list[Any]:
    return [entry for entry in _all(server, filter=named(name)) if entry.display_name == name]


def _all(server: Server, **options: Any) -> list[Any]:
    method = server.recurring.recurring_run_service_list_recurring_runs
    return list(server.everything("list schedules", method, "recurring_runs", **server.namespace, **options))
