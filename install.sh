#!/usr/bin/env bash
# kirosync: one queue and one shared memory for an IDE, an agent and a human.
#
#   ./install.sh run            start the service and an agent here; Ctrl-C ends both
#   ./install.sh test [ARGS]    run the tests; ARGS go to pytest
#   ./install.sh help           show this
#
# Both make .venv the first time, with what is needed; run again, they take seconds. The environment decides:
#   KIROSYNC_HOST   address to listen on (127.0.0.1)      KIROSYNC_STATE   the state directory (./state)
#   KIROSYNC_PORT   port to listen on (3001)              KIROSYNC_TOKEN   the token (made once: state/token)
#   KIROSYNC_POLICY a file that says what the agent refuses, and what it asks for (see README.md)
#   PYTHON          the Python to make .venv with (the first of python3, python3.13, .12, .11 that is 3.11 or later)
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
}

fail() {
  echo "install.sh: $*" >&2
  exit 1
}

# Print the first Python that is new enough.
find_python() {
  local python
  for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$python"
      return
    fi
  done
  fail "Python 3.11 or later is needed: apt install python3, or set PYTHON to where it is"
}

# Make .venv hold what the file $1 lists, if it does not yet.
ensure_venv() {
  local python version stamp
  stamp=.venv/.has-$1
  if [ -e "$stamp" ] && cat requirements*.txt | cmp -s - "$stamp"; then
    return
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "venv is missing: apt install python$version-venv"
    "$python" -m venv --clear .venv || fail "venv does not work: apt install python$version-venv"
  fi
  echo "installing what $1 lists into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" || fail "pip could not install $1; see above"
  cat requirements*.txt > "$stamp"
}

# Say whether the service at $1:$2 answers to the token of the state directory $3: another's would not.
answers() {
  .venv/bin/python - "$@" <<'PY' 2>/dev/null
import os, pathlib, sys, urllib.request
host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(sys.argv[1], sys.argv[1])
token = os.environ.get("KIROSYNC_TOKEN") or pathlib.Path(sys.argv[3], "token").read_text().strip()
request = urllib.request.Request(f"http://{host}:{sys.argv[2]}/commands?limit=0", headers={"Authorization": f"Bearer {token}"})
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5)
PY
}

# End the processes that run_both started, and wait for them.
end_both() {
  trap - EXIT INT TERM
  kill "${pids[@]}" 2>/dev/null || true
  wait "${pids[@]}" 2>/dev/null || true
}

run_both() {
  local host=${KIROSYNC_HOST:-127.0.0.1} port=${KIROSYNC_PORT:-3001} state=${KIROSYNC_STATE:-$PWD/state} secret
  ensure_venv requirements.txt
  pids=()
  trap end_both EXIT
  trap 'end_both; exit 0' INT TERM
  .venv/bin/python kirosync.py serve --host "$host" --port "$port" --state "$state" &
  pids+=($!)
  until answers "$host" "$port" "$state"; do
    kill -0 "${pids[0]}" 2>/dev/null || fail "the service did not start; see above"
    sleep 0.1
  done
  env -u KIROSYNC_TOKEN .venv/bin/python agent.py --state "$state" &
  pids+=($!)
  secret="\$(cat '$state/token')"
  if [ -n "${KIROSYNC_TOKEN:-}" ]; then secret="\$KIROSYNC_TOKEN"; fi
  echo
  echo "state  $state"
  echo "token  $([ -n "${KIROSYNC_TOKEN:-}" ] && echo "in KIROSYNC_TOKEN" || echo "$state/token")"
  echo "docs   http://$host:$port/docs"
  echo "try    curl -s -H \"Authorization: Bearer $secret\" -H 'Content-Type: application/json'" \
    "-d '{\"type\":\"execute_bash\",\"command\":\"uname -a\"}' 'http://$host:$port/command?wait=20'"
  echo "Ctrl-C ends the service and the agent."
  wait -n "${pids[@]}" || true
  fail "the service or the agent has ended; see above"
}

run_tests() {
  ensure_venv requirements-dev.txt
  exec .venv/bin/python -m pytest "$@"
}

main() {
  cd "$(dirname "$0")"
  case "${1:-help}" in
    run) run_both ;;
    test) shift && run_tests "$@" ;;
    help | -h | --help) usage ;;
    *) usage >&2 && fail "there is no '$1'" ;;
  esac
}

main "$@"
