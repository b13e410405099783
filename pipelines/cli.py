"""The command line `dqo`. Heavy imports stand inside the commands, so that help and recipe checks answer at once."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dqo.errors import DQOError

if TYPE_CHECKING:
    from dqo.recipe import Recipe
    from pipelines.kubeflow import Access

_OUT = "runs"


def main() -> None:
    """Parse the command line, run one command and exit with its status."""
    arguments = _parser().parse_args()
    try:
        sys.exit(arguments.run(arguments))
    except DQOError as error:
        print(f"dqo: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
    except KeyboardInterrupt:
        print("dqo: interrupted", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqo", description="Post-train language models that stay diverse (Diversity Quality Optimization)."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run a recipe's whole pipeline on this machine")
    run.add_argument("recipe", type=Path, help="recipe file")
    run.add_argument("--out", type=Path, default=Path(_OUT), help=f"folder of runs, checkpoints and MLflow ({_OUT})")
    run.add_argument("--fresh", action="store_true", help="forget finished stages and checkpoints, train anew")
    run.add_argument(
        "--runner",
        choices=["subprocess", "docker"],
        default="subprocess",
        help="how stages run: processes of this machine, or containers of resources.image (subprocess)",
    )
    run.add_argument("--network", help="Docker network of the containers (none, where nothing is asked over one)")
    run.set_defaults(run=_run)

    compile_ = commands.add_parser("compile", help="write a recipe's pipeline as Kubeflow IR")
    compile_.add_argument("recipe", type=Path, help="recipe file")
    compile_.add_argument("-o", "--output", type=Path, required=True, help="file to write, .yaml")
    compile_.set_defaults(run=_compile)

    recipe = commands.add_parser("recipe", help="check or show a recipe, or print its JSON schema")
    actions = recipe.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="report every error of a recipe at once")
    check.add_argument("recipe", type=Path, help="recipe file")
    check.set_defaults(run=_check)
    show = actions.add_parser("show", help="print a recipe with its defaults filled in")
    show.add_argument("recipe", type=Path, help="recipe file")
    show.set_defaults(run=_show)
    schema = actions.add_parser("schema", help="print the JSON schema, for editors")
    schema.set_defaults(run=_schema)

    experiment = commands.add_parser("experiment", help="run a grid of recipes, resuming where it stopped")
    experiment.add_argument("file", type=Path, help="experiment file")
    experiment.add_argument("--out", type=Path, default=Path(_OUT), help=f"folder of checkpoints and MLflow ({_OUT})")
    experiment.add_argument("--results", type=Path, help="folder of the results (experiments in --out)")
    experiment.add_argument("--part", action="append", help="only this part of the file; may be given again")
    experiment.add_argument("--page", type=Path, help="page of results to write (NAME.md beside the results)")
    only = experiment.add_mutually_exclusive_group()
    only.add_argument("--plan", dest="only", action="store_const", const="plan", help="only say what would be run")
    only.add_argument("--page-only", dest="only", action="store_const", const="page", help="only write the page")
    experiment.set_defaults(run=_experiment)
    calibrate = commands.add_parser(
        "calibrate", help="sample once without training: what alpha weighs, what a step costs"
    )
    calibrate.add_argument("recipe", type=Path, help="recipe file")
    calibrate.add_argument("--prompts", type=int, default=16, help="training prompts to sample (16)")
    calibrate.add_argument(
        "--checkpoint", type=Path, help="sample from this checkpoint, e.g. SFT's; else the base model"
    )
    calibrate.add_argument("--share", type=float, help="weight of the bonus beside quality's to find alpha for (0.25)")
    calibrate.add_argument("--out", type=Path, help="folder for calibration.json and the sampled responses")
    calibrate.add_argument("--json", type=Path, help="file for the figures as JSON")
    calibrate.set_defaults(run=_calibrate)
    judge = commands.add_parser("judge", help="see whether a model may judge")
    actions = judge.add_subparsers(title="actions", metavar="ACTION", required=True)
    audit = actions.add_parser("audit", help="hold a judge's verdicts against labelled pairs; exit 1 if it fails")
    audit.add_argument("recipe", type=Path, help="recipe file, or a file with its `judge` section alone")
    audit.add_argument("--labelled", type=Path, help="labelled pairs, .jsonl (the judge's, or 60 of the package)")
    audit.add_argument("--out", type=Path, help="file to write, .json, for a gate to read")
    audit.set_defaults(run=_judge_audit)

    submit = commands.add_parser("submit", help="run a recipe's pipeline on a Kubeflow server")
    submit.add_argument("recipe", type=Path, help="recipe file")
    _add_server(submit)
    _add_run(submit)
    submit.add_argument("--watch", action="store_true", help="follow the run; the exit status is then the run's")
    submit.add_argument("--no-run", action="store_true", help="only upload the pipeline")
    submit.set_defaults(run=_submit)
    schedule = commands.add_parser("schedule", help="let Kubeflow run a recipe by the clock")
    schedule.add_argument("recipe", type=Path, nargs="?", help="recipe file, with --cron")
    _add_server(schedule)
    _add_run(schedule)
    schedule.add_argument("--name", help="name of the schedule (the recipe's)")
    schedule.add_argument("--timezone", default="UTC", help="zone in which the server reads schedules (UTC)")
    action = schedule.add_mutually_exclusive_group(required=True)
    action.add_argument("--cron", help="minute, hour, day of month, month, day of week, such as '0 2 * * *'")
    for name, text in {
        "pause": "start no more runs until resumed",
        "resume": "start runs again",
        "delete": "remove the schedule",
        "list": "show all schedules",
    }.items():
        action.add_argument(f"--{name}", dest="action", action="store_const", const=name, help=text)
    schedule.set_defaults(run=_schedule)
    compare = commands.add_parser("compare", help="compare evaluated models: differences, win rates, a report")
    compare.add_argument(
        "first", metavar="A", help="what the others are compared with: run, NAME/3, NAME@alias, folder"
    )
    compare.add_argument("others", metavar="B", nargs="+", help="as A; RUN:MODEL names another model of the evaluation")
    _add_store(compare)
    compare.add_argument("--html", type=Path, help="page to write, .html")
    compare.add_argument("--json", type=Path, help="file to write, .json")
    compare.set_defaults(run=_compare)

    models = commands.add_parser("models", help="list registered models, or one's versions with their figures")
    models.add_argument("name", nargs="?", help="registered model (all)")
    _add_store(models)
    models.add_argument("--json", type=Path, help="file to write, .json")
    models.add_argument("--repair", action="store_true", help="end the moves of aliases that were interrupted")
    models.set_defaults(run=_models)
    promote = commands.add_parser("promote", help="make a version champion if its gate passes; exit 1 if it does not")
    promote.add_argument("name", help="registered model")
    promote.add_argument("version", help="its number, or an alias that it holds, such as challenger")
    _add_store(promote)
    promote.add_argument("--recipe", type=Path, help="recipe file whose gate is applied (the version's own recipe)")
    promote.add_argument("--force", metavar="REASON", help="promote all the same; the reason goes into the trail")
    promote.set_defaults(run=_promote)
    rollback = commands.add_parser("rollback", help="give champion back to the version that had it before")
    rollback.add_argument("name", help="registered model")
    _add_store(rollback)
    rollback.add_argument("--why", default="", metavar="REASON", help="reason, for the trail")
    rollback.set_defaults(run=_rollback)
    generate = commands.add_parser("generate", help="let a registered model respond: a group, its quality and volume")
    generate.add_argument("model", help="NAME/3, NAME@alias, NAME for its champion, or a checkpoint's folder")
    generate.add_argument("prompt", nargs="?", help="what it is to respond to")
    generate.add_argument("-n", type=int, default=8, help="responses (8)")
    generate.add_argument("--row", metavar="JSON", help="a row of the model's task, instead of the prompt")
    generate.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    generate.add_argument("--temperature", type=float, help="softmax temperature (that of the evaluation)")
    generate.add_argument("--top-p", type=float, help="nucleus (that of the evaluation)")
    generate.add_argument("--max-new-tokens", type=int, help="longest response, in tokens (that of the evaluation)")
    generate.add_argument("--recipe", type=Path, help="recipe of task, reward and encoder (the model's own)")
    generate.add_argument("--json", type=Path, help="file to write, .json")
    _add_store(generate)
    generate.set_defaults(run=_generate)

    ui = commands.add_parser("ui", help="open MLflow's page on the local runs")
    ui.add_argument("--out", type=Path, default=Path(_OUT), help=f"folder given to `dqo run` ({_OUT})")
    ui.add_argument("--port", type=int, default=5000, help="port on this machine (5000)")
    ui.set_defaults(run=_ui)

    doctor = commands.add_parser("doctor", help="say what this machine can run, and what to do about the rest")
    doctor.add_argument("--out", type=Path, default=Path(_OUT), help=f"folder given to `dqo run` ({_OUT})")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path(_OUT), help=f"folder given to `dqo run` ({_OUT})")
    parser.add_argument("--uri", help="MLflow's address (MLFLOW_TRACKING_URI, else the store in --out)")


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", required=True, help="address of Kubeflow Pipelines")
    parser.add_argument("--token-file", type=Path, help="file with a bearer token (the variable KFP_TOKEN)")
    parser.add_argument("--namespace", help="namespace of the runs, where Kubeflow serves several users")
    parser.add_argument("--experiment", help="Kubeflow experiment, which has to exist (Default)")
    parser.add_argument("--ca-file", type=Path, help="certificate of the server's authority, in PEM")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mlflow-uri", help="MLflow's address as the tasks see it (the recipe's tracking.uri)")
    parser.add_argument("--image", help="image of the tasks (the recipe's resources.image)")
    parser.add_argument("--service-account", help="account that the tasks run as (Kubeflow's)")


class _Version(argparse.Action):
    def __call__(self, *_: object, **__: object) -> NoReturn:
        from dqo import __version__

        print(__version__)
        sys.exit(0)


def _run(arguments: argparse.Namespace) -> int:
    from dqo.recipe import load

    recipe = load(arguments.recipe)
    _print_warnings(recipe.warnings)
    from pipelines import follow

    return follow.run(recipe, arguments.recipe, arguments.out, arguments.fresh, arguments.runner, arguments.network)


def _compile(arguments: argparse.Namespace) -> int:
    from dqo.recipe import load

    recipe = load(arguments.recipe)
    if arguments.output.suffix not in (".yaml", ".yml"):
        raise DQOError(f"--output {arguments.output}: expected a name that ends in .yaml")
    if not arguments.output.parent.is_dir():
        raise DQOError(f"--output {arguments.output}: the folder {arguments.output.parent} does not exist")
    if arguments.output.is_dir():
        raise DQOError(f"--output {arguments.output}: is a folder; expected the name of a file")
    from pipelines.pipeline import compile_recipe

    try:
        compile_recipe(recipe, arguments.output)
    except OSError as error:
        raise DQOError(f"--output {arguments.output}: cannot be written ({error.strerror})") from None
    print(f"{arguments.output}: pipeline {recipe.name}, recipe {recipe.digest}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from dqo.recipe import load

    recipe = load(arguments.recipe)
    _print_warnings([*recipe.warnings, *_about_the_task(recipe)])
    models = ", ".join(recipe.model_names)
    print(f"{arguments.recipe}: valid (task {recipe.task}, models {models}, digest {recipe.digest})")
    return 0


def _about_the_task(recipe: "Recipe") -> list[str]:
    """What only the task itself can say of a recipe; one of a user's own need not be on this machine.

    Raises:
        DQOError: If the task is there, and recipe and task do not fit.
    """
    from dqo.tasks import TASKS, get_task

    if recipe.task in TASKS and recipe.reward.kind != "rule" and recipe.method.defences.embed == "response":
        return []  # nothing to ask, and the modules of tasks load large libraries
    from dqo import defences, rewards

    try:
        task = get_task(recipe.task)
    except DQOError as error:
        if recipe.task in TASKS:
            raise
        return [f"on this machine, {error}"]
    rewards.kind(recipe, task)
    defences.check(recipe, task)
    return []


def _show(arguments: argparse.Namespace) -> int:
    from dqo.recipe import load

    print(load(arguments.recipe).to_yaml(), end="")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from dqo.recipe import json_schema

    print(json_schema(), end="")
    return 0


def _experiment(arguments: argparse.Namespace) -> int:
    from pipelines import experiment

    return experiment.run(
        arguments.file, arguments.out, arguments.results, arguments.part, arguments.page, arguments.only
    )


def _calibrate(arguments: argparse.Namespace) -> int:
    from dqo.recipe import load

    recipe = load(arguments.recipe)
    _print_warnings(recipe.warnings)
    from pipelines import calibrate

    return calibrate.run(
        recipe, arguments.prompts, arguments.share, arguments.checkpoint, arguments.out, arguments.json
    )


def _judge_audit(arguments: argparse.Namespace) -> int:
    from dqo.recipe import load_judge

    settings = load_judge(arguments.recipe)
    out: Path | None = arguments.out
    from pipelines.stores import check_file

    check_file("--out", out, ".json")
    from dqo.judges import build
    from dqo.judges.labelled import labelled_of, read_labelled

    if settings.reward is not None:
        from transformers.utils import logging

        logging.disable_progress_bar()
    judge = build(settings)
    labelled = labelled_of(settings) if arguments.labelled is None else read_labelled(arguments.labelled)
    from dqo.judges.audit import audit

    result = audit(judge, labelled, settings.audit)
    if out is not None:
        try:
            result.write(out)
        except OSError as error:
            raise DQOError(f"--out {out}: cannot be written ({error.strerror})") from None
    pairs = f"on {len(labelled.pairs)} labelled pairs ({labelled.digest})"
    if settings.reward is not None:
        print(f"reward model {settings.name}, {pairs}")
    else:
        prompt = " ".join(str(result.judge[name]) for name in ("prompt", "prompt_version"))
        print(
            f"{settings.name} at {settings.endpoint}, prompt {prompt} ({result.judge['prompt_digest']}), {pairs}, "
            f"{result.requests} requests"
        )
    for reason in result.reasons:
        print(f"- {reason}")
    for kind, (right, total) in result.agreement.items():
        print(f"  pairs of kind {kind}: {right} of {total} as labelled")
    for problem in result.problems:
        print(f"  {problem}")
    print("passed: its verdicts may count" if result.passed else "failed: its verdicts must not decide about a model")
    return 0 if result.passed else 1


def _submit(arguments: argparse.Namespace) -> int:
    if arguments.no_run and arguments.watch:
        raise DQOError("--no-run with --watch: there would be no run to follow; give one of them")
    from dqo.recipe import load

    recipe = _with_image(load(arguments.recipe), arguments.image)
    _print_warnings(recipe.warnings)
    from pipelines import submit

    return submit.run(
        recipe,
        _access(arguments),
        arguments.mlflow_uri,
        arguments.watch,
        not arguments.no_run,
        arguments.service_account,
    )


def _schedule(arguments: argparse.Namespace) -> int:
    if arguments.action == "list":
        from pipelines import schedule

        return schedule.show(_access(arguments))
    if arguments.recipe is None and (arguments.action is None or arguments.name is None):
        raise DQOError("no recipe: expected a recipe file" + (", or --name" if arguments.action else " with --cron"))
    if arguments.action is not None and arguments.name is not None:
        from pipelines import schedule

        return schedule.change(_access(arguments), arguments.name, arguments.action)
    from dqo.recipe import load

    recipe = _with_image(load(arguments.recipe), arguments.image)
    from pipelines import schedule

    if arguments.action is not None:
        return schedule.change(_access(arguments), recipe.name, arguments.action)
    _print_warnings(recipe.warnings)
    return schedule.run(
        recipe,
        _access(arguments),
        arguments.cron,
        arguments.name,
        arguments.timezone,
        arguments.mlflow_uri,
        arguments.service_account,
    )


def _with_image(recipe: "Recipe", image: str | None) -> "Recipe":
    if image is None:
        return recipe
    from dqo.recipe import parse

    content = json.loads(recipe.to_json())
    content["resources"]["image"] = image
    return parse(json.dumps(content), "--image")


def _access(arguments: argparse.Namespace) -> "Access":
    from pipelines.kubeflow import Access

    return Access(arguments.host, arguments.token_file, arguments.namespace, arguments.experiment, arguments.ca_file)


def _compare(arguments: argparse.Namespace) -> int:
    from pipelines import compare

    given = [arguments.first, *arguments.others]
    return compare.run(given, arguments.out, arguments.uri, arguments.html, arguments.json)


def _models(arguments: argparse.Namespace) -> int:
    from pipelines import models

    return models.show(arguments.name, arguments.repair, arguments.json, arguments.out, arguments.uri)


def _promote(arguments: argparse.Namespace) -> int:
    from pipelines import models

    return models.promote(
        arguments.name, arguments.version, arguments.recipe, arguments.force, arguments.out, arguments.uri
    )


def _rollback(arguments: argparse.Namespace) -> int:
    from pipelines import models

    return models.rollback(arguments.name, arguments.why, arguments.out, arguments.uri)


def _generate(arguments: argparse.Namespace) -> int:
    from pipelines import generate

    fields = generate.Asked.__dataclass_fields__
    return generate.run(generate.Asked(**{name: getattr(arguments, name) for name in fields}))


def _ui(arguments: argparse.Namespace) -> int:
    from pipelines import follow

    return follow.open_mlflow(arguments.out, arguments.port)


def _doctor(arguments: argparse.Namespace) -> int:
    from pipelines import doctor

    return doctor.run(arguments.out)


def _print_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"dqo: warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
