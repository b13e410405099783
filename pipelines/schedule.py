"""The command `schedule`: runs of a recipe that Kubeflow starts by the clock, one schedule a name."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import kfp_server_api as api
from cronsim import CronSim, CronSimError

from dqo.errors import DQOError
from dqo.recipe import Recipe
from pipelines.kubeflow import Access, Server, connected, named, parameters, require_no_password
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
# What robfig/cron 1.2, the parser of Kubeflow's controller, takes in its six fields.
_BOUNDS = {"second": (0, 59), "minute": (0, 59), "hour": (0, 23), "day-of-month": (1, 31), "month": (1, 12),
           "day-of-week": (0, 6)}  # fmt: skip
_NAMES = {
    "month": {name: at for at, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)},
    "day-of-week": {name: at for at, name in enumerate("sun mon tue wed thu fri sat".split())},
}
_YEARS = 5  # that it looks ahead


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
        DQOError: If the cron line or zone is wrong, MLflow's address holds a password, or the server refuses something.
    """
    require_no_password(mlflow_uri, "--mlflow-uri")
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
            mode="ENABLE",
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

    Its parser (robfig/cron 1.2) counts the days of a week from 0 to 6 and knows no `L`, `W` and `#`.

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
        CronSim(cron, datetime.now(UTC))
    except CronSimError as error:
        wrong = str(error).removeprefix("Bad ")
        if wrong not in _FIELDS:
            raise DQOError(f"--cron {cron!r}: {error}; expected {', '.join(_FIELDS)}") from None
        raise DQOError(
            f"--cron {cron!r}: {wrong} {fields[_FIELDS.index(wrong)]!r}: expected {_RANGES[wrong]}, *, a list a,b, "
            "a range a-b or a step */n"
        ) from None
    line = " ".join(["0", *map(_for_kubeflow, _FIELDS, fields)])
    if KubeflowCron(line).next(datetime.now(UTC), UTC) is None:
        raise DQOError(f"--cron {cron!r}: no such day comes in the {_YEARS} years that Kubeflow looks ahead")
    return line


def _for_kubeflow(name: str, field: str) -> str:
    """A field that means to Kubeflow's parser what it means to cron.

    To it, a week's days end with 6, `1/2` ends there too, `3-3/2` is 3 alone, and a star counts as one wherever it
    stands in a list.
    """
    at, meant, same = _FIELDS.index(name), set[int](), True
    stars = []
    for item in field.split(","):
        parsed = CronSim(" ".join(item if place == at else "*" for place in range(len(_FIELDS))), datetime.now(UTC))
        wanted = (parsed.minutes, parsed.hours, parsed.days, parsed.months, parsed.weekdays)[at]
        # A pair of day and week is what `#` makes, which is refused before.
        values = {value % 7 if name == "day-of-week" else value for value in wanted if isinstance(value, int)}
        try:
            read, star = _read(name, item)
        except ValueError:
            read, star = frozenset[int](), False
        if star and read == values and field.startswith("*"):
            stars.append(item)
        else:
            meant |= values
            same = same and read == values and not star
    return field if same else ",".join([*stars, *map(str, sorted(meant))])


def _read(name: str, field: str) -> tuple[frozenset[int], bool]:
    """A field's numbers as robfig/cron 1.2 reads them, and whether it counts as a star.

    Raises:
        ValueError: If it takes no such field.
    """
    low, high = _BOUNDS[name]
    values: set[int] = set()
    star = False

    def number(text: str) -> int:
        return _NAMES.get(name, {})[text.lower()] if text.lower() in _NAMES.get(name, {}) else int(text)

    for item in field.split(","):
        span, slash, step = item.partition("/")
        first, hyphen, last = span.partition("-")
        if first == "*":
            begin, end, star = low, high, True
        else:
            begin = number(first)
            end = number(last) if hyphen else high if slash else begin
        by = int(step) if slash else 1
        if not low <= begin <= end <= high or by < 1:
            raise ValueError(f"{item}: out of {low} to {high}")
        values |= set(range(begin, end + 1, by))
    return frozenset(values), star


class KubeflowCron:
    """When Kubeflow's controller starts a schedule: by the rules of robfig/cron 1.2, in one time zone.

    They differ from cron's. A time that the clocks skip is left out, and one that comes twice counts twice. A day has
    to fit both its month's and its week's field where one of them has a star, else one of the two. In zones that change
    their clocks at midnight, a day may be missed or an hour of the next one taken, as by the controller.

    Raises:
        ValueError: If a field is none that it takes.
    """

    def __init__(self, line: str) -> None:
        second, minute, hour, day, month, weekday = line.split()
        self._seconds, self._minutes, self._hours, self._months = (
            _read(name, field)[0]
            for name, field in (("second", second), ("minute", minute), ("hour", hour), ("month", month))
        )
        self._days, self._any_day = _read("day-of-month", day)
        self._weekdays, self._any_weekday = _read("day-of-week", weekday)

    def next(self, moment: datetime, zone: tzinfo) -> datetime | None:
        """The first time after a moment, in the zone; None where the years that it looks ahead have none.

        Args:
            moment: Aware.
            zone: The controller's.
        """

        def at(year: int, month: int, day: int = 1, hour: int = 0, minute: int = 0, second: int = 0) -> datetime:
            """Go's time.Date: which moment a clock time is that comes twice or never, depends on the zone's side."""
            clock = datetime(year, month, 1, hour, minute, second, tzinfo=UTC) + timedelta(days=day - 1)
            return clock - _offset(clock - _offset(clock, zone), zone)

        def later(here: datetime, months: int = 0, days: int = 0) -> datetime:
            """Go's AddDate: the same time of the clock on another day."""
            years, month = divmod(here.month - 1 + months, 12)
            return at(here.year + years, month + 1, here.day + days, here.hour, here.minute, here.second)

        # Of each field: whether it fits, how the fields below are set back, the next value, whether that begins anew.
        # Days and months follow the clock, what is shorter follows time.
        walk: tuple[tuple[Callable[[datetime], Any], ...], ...] = (
            (
                lambda here: here.month in self._months,
                lambda here: at(here.year, here.month),
                lambda here: later(here, months=1),
                lambda here: here.month == 1,
            ),
            (
                self._fits,
                lambda here: at(here.year, here.month, here.day),
                lambda here: later(here, days=1),
                lambda here: here.day == 1,
            ),
            (
                lambda here: here.hour in self._hours,
                lambda here: at(here.year, here.month, here.day, here.hour),
                lambda here: here.astimezone(UTC) + timedelta(hours=1),
                lambda here: here.hour == 0,
            ),
            (
                lambda here: here.minute in self._minutes,
                lambda here: here.astimezone(UTC).replace(second=0),
                lambda here: here.astimezone(UTC) + timedelta(minutes=1),
                lambda here: here.minute == 0,
            ),
            (
                lambda here: here.second in self._seconds,
                lambda here: here,
                lambda here: here.astimezone(UTC) + timedelta(seconds=1),
                lambda here: here.second == 0,
            ),
        )
        here = (moment.astimezone(UTC).replace(microsecond=0) + timedelta(seconds=1)).astimezone(zone)
        end, set_back = here.year + _YEARS, False
        while here.year <= end:
            for fits, floor, step, anew in walk:
                while not fits(here):
                    if not set_back:
                        set_back, here = True, floor(here).astimezone(zone)
                    here = step(here).astimezone(zone)
                    if anew(here):
                        break  # all fields again, from the month
                else:
                    continue
                break
            else:
                return here
        return None

    def _fits(self, here: datetime) -> bool:
        fitting = here.day in self._days, here.isoweekday() % 7 in self._weekdays
        return all(fitting) if self._any_day or self._any_weekday else any(fitting)


def _offset(moment: datetime, zone: tzinfo) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta()


def _times(cron: str, zone: tzinfo, moment: datetime) -> Iterator[datetime]:
    """The times of a valid line of five fields after a moment."""
    schedule, following = KubeflowCron(to_kubeflow(cron)), moment
    while (coming := schedule.next(following, zone)) is not None:
        yield coming
        following = coming


def in_words(cron: str, timezone: str, now: datetime | None = None) -> list[str]:
    """What a valid cron line means, with the next three times of Kubeflow's controller, in lines for people.

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
    now = now or datetime.now(UTC)
    lines = [f"  {CronSim(cron, now).explain()}, time zone {timezone}. Next:"]
    for moment in islice(_times(cron, zone, now), 3):
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

    Kubeflow can't change one. The new one is made in the state that it will have, running or paused: what is paused was
    then paused by somebody, wherever a command ended before its time. Where the old one can't be removed, both run,
    which the error says, until a repeat removes them. Of several made at once, the last one stays.
    """
    service = server.recurring
    before = _named(server, body.display_name)
    paused = bool(before) and all(entry.status != _ENABLED for entry in before)
    if len(before) == 1 and _same(before[0], body):
        return "is as it was" + (" (paused; --resume starts it)" if paused else "")
    body.mode = "DISABLE" if paused else "ENABLE"
    made = server.call("make a schedule", service.recurring_run_service_create_recurring_run, body)
    try:
        for entry in before:
            _delete(server, entry)
        entries = _named(server, body.display_name)
        last = max(entries, key=lambda entry: (entry.created_at, entry.recurring_run_id), default=made)
        for entry in entries:
            if entry.recurring_run_id != last.recurring_run_id:
                _delete(server, entry)
    except DQOError as error:
        raise DQOError(
            f"{error}\nThe new schedule {body.display_name} is made; another of that name may still start runs beside "
            "it: repeat the command"
        ) from None
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
