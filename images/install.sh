#!/usr/bin/env bash
# uv pip install into /opt/venv with the pip settings of the base image: index, folder of wheels. uv reads none of pip's.
#
#   install.sh ARGUMENTS-OF-UV-PIP-INSTALL...
set -euo pipefail

# `pip config get` knows one file only; the list has them all, a value in quotes, several lines as \n.
settings="$(python -m pip config list)"
setting() { sed -n "s/^\(global\|install\|:env:\)\.$1='\(.*\)'\$/\2/p" <<<"${settings}" | sed 's/\\n/ /g'; }

options=()
for each in $(setting find-links); do options+=(--find-links "${each}"); done
for each in $(setting index-url); do options+=(--default-index "${each}"); done
for each in $(setting extra-index-url); do options+=(--index "${each}"); done

UV_NO_CACHE=1 UV_SYSTEM_CERTS=1 exec /build/uv/bin/uv pip install \
  --python /opt/venv/bin/python --compile-bytecode "${options[@]}" "$@"
