#!/usr/bin/env bash
# Build the container images and print their sizes.
#
#   images/build.sh [trainer] [evaluator] [mlflow]
#
# Environment:
#   ENGINE    docker, podman or buildah; the first that is installed
#   BASE      base image (python:3.11-slim-bookworm)
#   EXTRAS    `gpu` adds vLLM and DeepSpeed to the trainer (none)
#   PREFIX    put before the images' names, for a registry: `registry.example:5000/`. Without one, podman and buildah
#             name an image localhost/NAME; it gets the name docker.io/library/NAME too, which Kubernetes' nodes look for
#   TAG       tag (the project's version)
set -euo pipefail
cd "$(dirname "$0")/.."

names=("$@")
[[ ${#names[@]} -gt 0 ]] || names=(trainer evaluator mlflow)
for name in "${names[@]}"; do
  case "${name}" in
    trainer | evaluator | mlflow) ;;
    *) echo "build.sh: no image '${name}'; expected trainer, evaluator or mlflow" >&2; exit 2 ;;
  esac
done

engine="${ENGINE:-}"
if [[ -z "${engine}" ]]; then
  for each in docker podman buildah; do
    if command -v "${each}" >/dev/null; then engine="${each}"; break; fi
  done
fi
case "${engine}" in
  docker | podman | buildah) ;;
  "") echo "build.sh: docker, podman or buildah is needed to build images; none is installed" >&2; exit 1 ;;
  *) echo "build.sh: ENGINE=${engine}: expected docker, podman or buildah" >&2; exit 2 ;;
esac
command -v "${engine}" >/dev/null || { echo "build.sh: ENGINE=${engine}: is not installed" >&2; exit 1; }

version="$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' dqo/__init__.py)"
tag="${TAG:-${version}}"
revision="$(git rev-parse HEAD 2>/dev/null || true)"
if [[ -n "${revision}" && -n "$(git status --porcelain 2>/dev/null)" ]]; then revision="${revision}-changed"; fi

for name in "${names[@]}"; do
  image="${PREFIX:-}dqo-${name}:${tag}"
  options=(--build-arg "VERSION=${version}" --build-arg "REVISION=${revision}")
  [[ -z "${BASE:-}" ]] || options+=(--build-arg "BASE=${BASE}")
  [[ "${name}" != trainer || -z "${EXTRAS:-}" ]] || options+=(--build-arg "EXTRAS=${EXTRAS}")
  file="${name}"
  if [[ "${name}" == evaluator ]]; then
    file=trainer
    options+=(--build-arg "TITLE=DQO evaluator")
  fi
  echo "Building ${image}"
  "${engine}" build "${options[@]}" -f "images/${file}/Containerfile" -t "${image}" .
  if [[ "${engine}" != docker && -z "${PREFIX:-}" ]]; then
    "${engine}" tag "${image}" "docker.io/library/${image}"
  fi
done

echo
for name in "${names[@]}"; do
  image="${PREFIX:-}dqo-${name}:${tag}"
  case "${engine}" in
    buildah) size="$(buildah images --format '{{.Size}}' "${image}")" ;;
    *) size="$("${engine}" image inspect --format '{{.Size}}' "${image}" | awk '{printf "%.2f GB", $1 / 1e9}')" ;;
  esac
  printf '%-40s %s\n' "${image}" "${size}"
done
