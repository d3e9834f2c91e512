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
#
# On a server (Debian, Ubuntu), as root. Each may be repeated; with --dry-run it only says what it would do:
#   ./install.sh install [OPTIONS]     a service and an agent that start with the machine; again: what is different now
#   ./install.sh upgrade [OPTIONS]     the same where it is installed: the code here, if it proves healthy
#   ./install.sh rollback              back to the release before
#   ./install.sh status                what is installed, and whether it is healthy
#   ./install.sh admin ARGS            kirosync.py ARGS on the installed state, as its user: admin token add phone ...
#                                      That user reaches no files of yours: admin backup - >FILE, admin restore - <FILE
#   ./install.sh uninstall [--purge]   takes it away, but for settings, state and logs; --purge (which asks, or wants
#                                      --yes) takes those, too
#
#   --agent confined    the agent and its commands write below /var/lib/kirosync-agent and nowhere else (the default)
#   --agent user        they may do what their user may
#   --agent none        no agent on this machine
#   --agent-user NAME   who they run as (kirosync-agent, which is made)
#   --agent-writes DIR  where a confined agent may write, too; may be repeated; '' is nowhere else
#   --domain NAME       have Caddy serve https://NAME; '' ends that
#   --port PORT         where the service listens on loopback (3001)
#
# What is chosen is kept in /etc/kirosync/install.conf until something else is. The environment decides:
#   PYTHON          the Python to make the release's venv with (/usr/bin/python3)
#   VENV            a venv to copy for the release, where pip has no index to ask
#   DESTDIR         a folder that stands for /: nothing outside is touched, no user is made, nothing is started
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

# Make a venv with the Python $1 in $2.
make_venv() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$1" -c 'import ensurepip, venv' 2>/dev/null || fail "venv is missing: apt install python$version-venv"
  "$1" -m venv --clear "$2" || fail "venv does not work: apt install python$version-venv"
}

# Say that what shows text to a person is not there, which is no reason to do without the rest.
without_page() { echo "install.sh: $*; text is shown as it is, Markdown and code too" >&2; }

# Make .venv hold what the file $1 lists, if it does not yet; if that cannot be, $2 says so, which is fail if not given.
ensure_venv() {
  local python stamp
  stamp=.venv/.has-$1
  if [ -e "$stamp" ] && cat requirements*.txt | cmp -s - "$stamp"; then
    return
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    make_venv "$python" .venv
  fi
  echo "installing what $1 lists into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" || ${2:-fail} "pip could not install $1; see above, and remove $stamp to have it tried again"
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

# Run $@ away from the terminal: Ctrl-C and a terminal that is closed are for install.sh alone, which ends it once and in
# peace. Should install.sh be killed, it is ended all the same.
apart() { exec setsid setpriv --pdeathsig TERM "$@" </dev/null; }

# End the processes that run_both started, and wait for them.
end_both() {
  trap - EXIT HUP INT TERM
  kill "${pids[@]}" 2>/dev/null || true
  wait "${pids[@]}" 2>/dev/null || true
}

run_both() {
  local host=${KIROSYNC_HOST:-127.0.0.1} port=${KIROSYNC_PORT:-3001} state=${KIROSYNC_STATE:-$PWD/state} secret
  ensure_venv requirements.txt
  ensure_venv requirements-page.txt without_page
  pids=()
  trap end_both EXIT
  trap 'end_both; exit 0' HUP INT TERM
  apart .venv/bin/python kirosync.py serve --host "$host" --port "$port" --state "$state" &
  pids+=($!)
  until answers "$host" "$port" "$state"; do
    kill -0 "${pids[0]}" 2>/dev/null || fail "the service did not start; see above"
    sleep 0.1
  done
  apart env -u KIROSYNC_TOKEN .venv/bin/python agent.py --state "$state" &
  pids+=($!)
  secret="\$(cat '$state/token')"
  if [ -n "${KIROSYNC_TOKEN:-}" ]; then secret="\$KIROSYNC_TOKEN"; fi
  echo
  echo "state  $state"
  echo "token  $([ -n "${KIROSYNC_TOKEN:-}" ] && echo "in KIROSYNC_TOKEN" || echo "$state/token")"
  echo "page   http://$host:$port/"
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

# On a server

on_server() {
  local command=$1
  shift
  options "$@"
  places
  [ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "this wants root: sudo ./install.sh $command"
  [ "$command" = install ] || [ -d "$etc" ] || fail "kirosync is not installed here"
  unfinished='' admin_token=''
  trap leave EXIT
  "$command"
  if [ -n "$dry_run" ]; then echo "This was a dry run: nothing of it was done."; fi
}

# However this ends: what is not finished goes, and a token that was made is shown, for nobody else knows it.
leave() {
  if [ -z "$dry_run" ]; then rm -rf "$unfinished"; fi
  if [ -z "$admin_token" ]; then return; fi
  echo "The service is at http://$address${domain:+, and for others at https://$domain}."
  echo "The token of its admin, shown this once:"
  echo "$admin_token"
}

# Run the installed kirosync.py with $@, as the service's user and on its state.
admin() {
  options --agent none
  places
  decide
  [ -n "$(current)" ] || fail "kirosync is not installed here"
  in_release "$(current)" "$@"
}

# Name what lies where; $root is DESTDIR, or nothing.
places() {
  here=$PWD
  root=${DESTDIR:+$(realpath -m "$DESTDIR")}
  code=$root/opt/kirosync
  etc=$root/etc/kirosync
  units=$root/etc/systemd/system
  caddy=$root/etc/caddy
  backups=$root/var/backups/kirosync
  home=/var/lib/kirosync-agent
  umask 022
}

# Take the arguments: what is to be kept into the array chosen, the rest into dry_run, purge and yes.
options() {
  declare -gA chosen=()
  dry_run='' purge='' yes='' changes=0
  while [ $# -gt 0 ]; do
    case "$1" in
      --dry-run) dry_run=1 ;;
      --purge) purge=1 ;;
      --yes) yes=1 ;;
      --agent) choose '(confined|user|none)' "$@" ;;
      --agent-user) choose '[a-z_][a-z0-9_-]*' "$@" ;;
      --agent-writes) choose '(/[A-Za-z0-9._/@+-]*)?' "$@" ;;
      --domain) choose '([A-Za-z0-9][A-Za-z0-9.-]*)?' "$@" ;;
      --port) choose '[1-9][0-9]{0,4}' "$@" ;;
      *) fail "there is no option '$1': ./install.sh help shows them" ;;
    esac
    [[ $1 =~ ^--(dry-run|purge|yes)$ ]] || shift
    shift
  done
}

# Take the option $2 with the value $3, if that has the form $1.
choose() {
  [ $# -ge 3 ] || fail "$2 wants a value"
  [[ $3 =~ ^$1$ ]] || fail "$2 cannot be '$3'"
  if [ "$2" = --agent-writes ]; then
    chosen[agent-writes]="${chosen[agent-writes]:+${chosen[agent-writes]} }$3"
  else
    chosen[${2#--}]=$3
  fi
}

# Print what was chosen for $1, now or else before, or else $2.
choice() {
  if [ -n "${chosen[$1]+set}" ]; then echo "${chosen[$1]}"; else setting install.conf "$1" "$2"; fi
}

# Print what the file $1 of the settings says, without the quotes that systemd takes off.
settings() { sed -E "s/^([A-Za-z_-]+=)([\"'])(.*)\2\s*$/\1\3/" "$etc/$1" 2>/dev/null || true; }

# Print what the file $1 of the settings says of $2, or else $3.
setting() {
  local line
  if line=$(settings "$1" | grep "^$2=" | tail -n 1); then echo "${line#*=}"; else echo "$3"; fi
}

# Settle what is chosen and set, for all that follows.
decide() {
  agent=$(choice agent '')
  agent_user=$(choice agent-user kirosync-agent)
  agent_writes=$(choice agent-writes '')
  domain=$(choice domain '')
  if [ -z "$agent" ]; then agent=$(ask_what_the_agent_may); fi
  host=$(setting kirosync.env KIROSYNC_HOST 127.0.0.1)
  port=${chosen[port]:-$(setting kirosync.env KIROSYNC_PORT 3001)}
  state=$(setting kirosync.env KIROSYNC_STATE /var/lib/kirosync)
  log=$(setting kirosync.env KIROSYNC_LOG /var/log/kiro-sync)
  case "$host" in 0.0.0.0 | ::) address=127.0.0.1:$port ;; *:*) address=[$host]:$port ;; *) address=$host:$port ;; esac
}

ask_what_the_agent_may() {
  local answer=confined
  if [ -t 0 ] && [ -z "$dry_run" ]; then
    cat >&2 <<TEXT
An agent executes the commands of whoever holds a token. What may it do here?
  confined  run as $agent_user, and write nowhere but below $home${agent_writes:+ and $agent_writes}
  user      whatever $agent_user may
  none      there is to be no agent on this machine
TEXT
    read -r -p "Which? [confined] " answer
  fi
  [[ ${answer:=confined} =~ ^(confined|user|none)$ ]] || fail "it cannot be '$answer'"
  echo "$answer"
}

# Refuse what cannot become a sound installation, before anything is changed.
refuse() {
  local folder
  if [ "$agent" = none ]; then return; fi
  [ "$agent_user" != kirosync ] || fail "the agent cannot be kirosync: its commands could read every token and all state"
  [ "$agent $agent_user" != "confined root" ] || fail "root cannot be confined: --agent user, or another --agent-user"
  if is_machine && [ "$agent_user" != kirosync-agent ]; then
    id "$agent_user" >/dev/null 2>&1 || fail "there is no user '$agent_user' here"
  fi
  for folder in $agent_writes; do
    [ -d "$root$folder" ] || fail "--agent-writes $folder: there is no such folder"
    [[ ! $folder/ =~ ^/(home|root|run/user)?/ ]] ||
      fail "--agent-writes $folder: a confined agent sees no home folders; use another folder, or --agent user"
  done
}

# Say what is done to the machine, and do it, unless this is a dry run. Every change goes through here.
change() {
  changes=$((changes + 1))
  echo "  $1"
  if [ -z "$dry_run" ]; then "${@:2}"; fi
}

# Users, owners and services are the machine's: there are none in DESTDIR.
is_machine() { [ -z "$root" ]; }
has_systemd() { is_machine && [ -d /run/systemd/system ]; }

# Run $2... as the user $1.
as() {
  if is_machine; then
    (cd / && exec setpriv --reuid="$1" --regid="$(id -g "$1")" --init-groups --reset-env "${@:2}")
  else
    "${@:2}"
  fi
}

# Print the user $1 with its group, as chown wants it.
with_group() { echo "$1:$(id -gn "$1" 2>/dev/null || echo "$1")"; }

# Have the folder $1, of mode $2 and owner $3.
ensure_folder() {
  if [ ! -d "$1" ]; then change "make the folder $1" mkdir -p -m "$2" "$1"; fi
  ensure_owner "$@"
}

# Have the file $1, of mode $2 and owner $3, say what comes on stdin.
ensure_file() {
  local text
  text=$(cat)
  [ -n "$text" ] || fail "there is nothing to write into $1"
  if [ ! -f "$1" ] || [ "$(cat "$1")" != "$text" ]; then change "write $1" put "$1" "$2" "$3" "$text"; fi
  ensure_owner "$@"
}

ensure_owner() {
  [ -e "$1" ] || return 0
  if [ "$(stat -c %a "$1")" != "$2" ]; then change "set the mode of $1 to $2" chmod "$2" "$1"; fi
  if is_machine && [ "$(stat -c %U:%G "$1")" != "$3" ]; then change "give $1 to $3" chown "$3" "$1"; fi
}

ensure_gone() {
  local path
  for path in "$@"; do
    if [ -e "$path" ] || [ -L "$path" ]; then change "remove $path" rm -rf "$path"; fi
  done
}

# Write the file $1, of mode $2 and owner $3, with the text $4: aside, and then in place as a whole.
put() {
  mkdir -p "$(dirname "$1")"
  rm -f "$1.new"
  (umask 077 && printf '%s\n' "$4" >"$1.new")
  chmod "$2" "$1.new"
  if is_machine; then chown "$3" "$1.new"; fi
  mv -f "$1.new" "$1"
}

# Print the file $1 of deploy/ with what is settled in its places.
render() {
  local text
  text=$(cat "$1")
  text=${text//@STATE@/"$state"}
  text=${text//@LOG@/"$log"}
  text=${text//@PORT@/"$port"}
  text=${text//@ADDRESS@/"$address"}
  text=${text//@DOMAIN@/"$domain"}
  text=${text//@AGENT_USER@/"$agent_user"}
  text=${text//@AGENT_WRITES@/"$agent_writes"}
  text=${text//@SETTINGS@/"$(fingerprint "$etc/kirosync.env")"}
  text=${text//@AGENT_SETTINGS@/"$(fingerprint "$etc/agent.env" "$etc/policy.toml" "$etc/agent.token")"}
  printf '%s\n' "$text"
}

fingerprint() { { cat "$@" 2>/dev/null || true; } | sha256sum | cut -c 1-64; }

install() {
  decide
  refuse
  ensure_users
  ensure_folders
  alone
  ensure_settings
  ensure_release
  ensure_agent_token
  ensure_admin_token
  take_over
  ensure_caddy
  ensure_few_releases
  if [ "$changes" = 0 ]; then echo "  nothing: all is as it should be"; fi
  say_how_to_go_on
}

upgrade() {
  [ -n "$(current)" ] || fail "kirosync is not installed here"
  install
}

rollback() {
  decide
  alone
  old=$(current)
  release=$(releases | awk -v old="${old:-0}" '$1 < old' | tail -n 1)
  [ -n "$release" ] || fail "there is no release before ${old:-the first}"
  take_over
}

# Have no other install.sh at work on the same installation.
alone() {
  [ -d "$etc" ] || return 0
  exec 9<"$etc"
  flock -n 9 || fail "another install.sh is at work here"
}

ensure_users() {
  is_machine || return 0
  ensure_user kirosync "$state" /usr/sbin/nologin
  if [ "$agent" != none ]; then ensure_user "$agent_user" "$home" /bin/bash; fi
}

ensure_user() {
  id "$1" >/dev/null 2>&1 || change "make the system user $1" \
    useradd --system --user-group --home-dir "$2" --no-create-home --shell "$3" "$1"
}

ensure_folders() {
  ensure_folder "$code" 755 root:root
  ensure_folder "$code/releases" 755 root:root
  ensure_folder "$etc" 755 root:root
  ensure_folder "$root$state" 700 kirosync:kirosync
  ensure_folder "$root$log" 750 kirosync:kirosync
  if [ "$agent" != none ]; then ensure_folder "$root$home" 700 "$(with_group "$agent_user")"; fi
}

# Settings that are there stay as they are, but for what an option asks for.
ensure_settings() {
  ensure_file "$etc/install.conf" 644 root:root <<TEXT
# What install.sh was told. It keeps to this until it is told otherwise.
agent=$agent
agent-user=$agent_user
agent-writes=$agent_writes
domain=$domain
TEXT
  if [ ! -e "$etc/kirosync.env" ]; then
    ensure_file "$etc/kirosync.env" 640 root:kirosync < <(render "$here/deploy/kirosync.env")
  fi
  ensure_setting KIROSYNC_PORT "$port"
  if [ -n "$domain" ] && ! grep -qs ^KIROSYNC_TRUSTED_PROXY= "$etc/kirosync.env"; then
    ensure_setting KIROSYNC_TRUSTED_PROXY 127.0.0.1
  fi
  if [ "$agent" != none ] && [ ! -e "$etc/agent.env" ]; then
    ensure_file "$etc/agent.env" 640 root:root < <(render "$here/deploy/agent.env")
  fi
}

# Have kirosync.env say $1=$2.
ensure_setting() {
  local text
  if [ -e "$etc/kirosync.env" ] && [ "$(setting kirosync.env "$1" '')" != "$2" ]; then
    text=$(grep -v "^$1=" "$etc/kirosync.env"; echo "$1=$2")
    change "set $1=$2 in $etc/kirosync.env" put "$etc/kirosync.env" 640 root:kirosync "$text"
  fi
}

current() { [ ! -L "$code/current" ] || basename "$(readlink "$code/current")"; }
releases() { { find "$code/releases" -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null || true; } | sort -n; }

# Print the files that make a release, of the folder $1.
code_files() {
  (
    shopt -s nullglob
    cd "$1" && find ./*.py ./*.html requirements.txt requirements-page*.txt README.md install.sh deploy -name __pycache__ -prune -o -type f -print
  ) | sort
}

is_same_code() { [ "$(cd "$1" && code_files . | xargs sha256sum)" = "$(cd "$2" && code_files . | xargs sha256sum)" ]; }

# Have a release of the code here, in $release; where it is new, it has been tried, and $old is the one before.
ensure_release() {
  old=$(current)
  release=$old
  if [ -n "$old" ] && is_same_code "$here" "$code/releases/$old" && "$code/current/.venv/bin/python" -c ''; then return; fi
  release=$(($(releases | tail -n 1) + 1))
  unfinished=$code/releases/$release
  change "make release $release in $unfinished, with a venv of its own" make_release
  change "try it on a state of its own, as kirosync" try_release
  if [ -n "$old" ]; then back_up; fi
}

make_release() {
  local python
  python=$(PYTHON=${PYTHON:-/usr/bin/python3 $(compgen -G '/usr/bin/python3.1[1-9]' || true) python3} find_python)
  if is_machine && [[ $("$python" -c 'import sys; print(sys.base_prefix)')/ =~ ^/(home|root)/ ]]; then
    fail "$python lies in a home folder, out of the reach of other users: apt install python3, or set PYTHON"
  fi
  mkdir "$unfinished"
  code_files "$here" | (cd "$here" && xargs cp --parents -t "$unfinished")
  if [ -n "${VENV:-}" ]; then
    cp -a --no-preserve=ownership "$VENV" "$unfinished/.venv"
  else
    make_venv "$python" "$unfinished/.venv"
    add_packages requirements.txt || fail "pip could not install requirements.txt; see above"
    add_packages requirements-page.txt || without_page "pip could not install requirements-page.txt; see above"
  fi
  chmod -R a+rX,go-w "$unfinished"
}

# Have the venv of the unfinished release hold what its file $1 lists.
add_packages() {
  "$unfinished/.venv/bin/python" -m pip install --quiet --disable-pip-version-check ${root:+--no-cache-dir} -r "$unfinished/$1"
}

try_release() {
  as kirosync "$unfinished/.venv/bin/python" "$unfinished/deploy/trial.py" "$unfinished" ||
    fail "release $release does not work here, see above; ${old:+release $old goes on, and }nothing else was changed"
}

# Back the state up, if the release that runs knows how to; the last three are kept. The folder is root's: whoever else
# could name a file there could have root remove, or write, another.
back_up() {
  local file=$backups/before-release-$release.tar.gz outdated
  "$code/current/.venv/bin/python" "$code/current/kirosync.py" backup --help >/dev/null 2>&1 || return 0
  ensure_folder "$backups" 700 root:root
  ensure_gone "$file" "$file.new"
  change "back the state up: $file" save_backup "$file"
  mapfile -d '' -t outdated < <(find "$backups" -mindepth 1 -maxdepth 1 -type f \
    -regex '.*/before-release-[0-9]+\.tar\.gz' -print0 2>/dev/null | sort -zV | head -zn -3)
  ensure_gone "${outdated[@]}"
}

save_backup() {
  (umask 077 && set -C && in_release "$old" backup - >"$1.new" && mv -f "$1.new" "$1")
}

# Have a token for the agent, that none but the agent can read.
ensure_agent_token() {
  if [ "$agent" = none ]; then return; fi
  if [ ! -e "$etc/agent.token" ]; then
    change "make a token for the agent: $etc/agent.token" put_agent_token
  fi
  ensure_owner "$etc/agent.token" 400 "$(with_group "$agent_user")"
}

put_agent_token() {
  local token
  if [[ $(who_has_tokens) == *'"agent"'* ]]; then in_release "$release" token revoke agent 2>/dev/null; fi # its secret is gone
  token=$(in_release "$release" token add agent --scope agent 2>/dev/null)
  put "$etc/agent.token" 400 "$(with_group "$agent_user")" "$token"
}

# Have a token for a human before the service starts for the first time: it would make one itself, and keep that in a file.
ensure_admin_token() {
  if [ -n "$dry_run$old" ] || [[ ! $(who_has_tokens) =~ ^(\ *\"agent\":\ \{)?$ ]]; then return; fi # or others can ask already
  admin_token=$(in_release "$release" token add admin --scope admin 2>/dev/null) || fail "no token could be made for an admin"
}

who_has_tokens() { in_release "$release" token list --json | grep -o '^  "[^"]*": {' || true; }

# Run the kirosync.py of release $1 with ${@:2}, as the service's user, on its state and with its settings. Those come
# through a pipe: a secret among them is not for all who look at the arguments of processes.
in_release() {
  local folder=$code/releases/$1
  # shellcheck disable=SC2016
  as kirosync bash -c 'unset ${!KIROSYNC_*}; while read -ru 3 line; do export "$line"; done; exec "$@" 3<&-' - \
    "$folder/.venv/bin/python" "$folder/kirosync.py" "${@:2}" 3< <(service_settings)
}

service_settings() {
  settings kirosync.env | grep -E '^KIROSYNC_[A-Z_]+=' || true
  echo "KIROSYNC_STATE=$root$state"
  echo "KIROSYNC_LOG=$root$log"
}

# Make $release the one that runs; if it does not become healthy, give $old back and fail. So it is, too, if this is to
# end before that is known, be it by Ctrl-C or for want of a terminal: what nobody has seen work is not left running.
take_over() {
  made=$unfinished
  unfinished='' # it may be the one that runs
  exec 8>&1 # a trap says what it says where the command that it interrupts does
  trap 'give_back "this was ended before release $release proved healthy" >&8' HUP INT PIPE TERM
  if activate "$release"; then
    trap - HUP INT PIPE TERM
    return
  fi
  say_why >&2
  give_back "the service or the agent is not healthy; what they said is above"
}

# Have $old run again, for the reason $1, and fail.
give_back() {
  trap '' HUP INT PIPE TERM
  set +e # there may be no terminal any more to say anything at
  if [ -z "$old" ] || [ "$old" = "$release" ]; then fail "$1"; fi
  echo "$1: back to release $old"
  activate "$old"
  local again=$?
  if [ "$(current)" != "$release" ]; then rm -rf "$made"; fi
  [ $again = 0 ] || fail "release $old is not healthy either: systemctl status kirosync kirosync-agent"
  fail "release $release was not taken, see above; release $old runs again, state and settings are as they were"
}

# Have release $1 in its place, with its units, and running; return whether it is healthy.
activate() {
  local before=$changes
  ensure_units "$code/releases/$1/deploy"
  if [ "$(current)" != "$1" ]; then change "switch to release $1" switch "$1"; fi
  has_systemd || return 0
  if [ "$changes" != "$before" ]; then change "have systemd read its units" systemctl daemon-reload; fi
  ensure_running kirosync "$before" || return 1
  if [ "$agent" != none ]; then ensure_running kirosync-agent "$before" || return 1; fi
  [ -n "$dry_run" ] || [ "$changes" = "$before" ] || becomes_healthy
}

switch() {
  ln -sfn "releases/$1" "$code/current.new"
  mv -fT "$code/current.new" "$code/current"
}

# Have the units that the folder $1 holds; in a dry run there is no such folder yet.
ensure_units() {
  local source=$1
  [ -d "$source" ] || source=$here/deploy
  ensure_file "$units/kirosync.service" 644 root:root < <(render "$source/kirosync.service")
  if [ "$agent" = none ]; then
    ensure_stopped kirosync-agent
    return
  fi
  ensure_file "$units/kirosync-agent.service" 644 root:root < <(render "$source/kirosync-agent.service")
  if [ "$agent" = confined ]; then
    ensure_file "$units/kirosync-agent.service.d/confined.conf" 644 root:root \
      < <(render "$source/kirosync-agent.service.d/confined.conf")
  else
    ensure_gone "$units/kirosync-agent.service.d/confined.conf"
  fi
}

# Have the unit $1 enabled, and started again if there were more changes than $2.
ensure_running() {
  systemctl is-enabled --quiet "$1" 2>/dev/null || change "have $1 start with the machine" systemctl enable --quiet "$1"
  if [ "$changes" != "$2" ] || ! systemctl is-active --quiet "$1"; then change "start $1" systemctl restart "$1"; fi
}

ensure_stopped() {
  [ -e "$units/$1.service" ] || return 0
  if has_systemd; then change "stop $1" systemctl disable --quiet --now "$1"; fi
  ensure_gone "$units/$1.service" "$units/$1.service.d/confined.conf"
  if [ -d "$units/$1.service.d" ] && [ -z "$(ls -A "$units/$1.service.d")" ]; then ensure_gone "$units/$1.service.d"; fi
}

# Wait until the service is ready; give up when it has ended, or after a minute.
becomes_healthy() {
  local end=$((SECONDS + 60))
  until is_ready >/dev/null; do
    systemctl is-active --quiet kirosync && [ $SECONDS -lt $end ] || return 1
    sleep 0.2
  done
  [ "$agent" = none ] || { sleep 1 && systemctl is-active --quiet kirosync-agent; }
}

# Say whether the service itself can work, and print its problem: that may also be one which no release can help, such as
# a command that waits for an agent far away. Older releases tell no difference.
is_ready() {
  "$code/current/.venv/bin/python" - "http://$address/health" <<'PY' 2>/dev/null
import json, sys, urllib.error, urllib.request
try:
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=5)
except urllib.error.HTTPError as refusal:
    answer = refusal
health = json.load(answer)
print(health.get("problem", ""))
sys.exit(not health.get("ready", health["status"] == "healthy"))
PY
}

say_why() { journalctl --unit kirosync --unit kirosync-agent --lines 15 --output cat --no-pager; }

ensure_caddy() {
  local before=$changes
  if [ -z "$domain" ]; then
    ensure_no_caddy
    return
  fi
  ensure_file "$caddy/kirosync.caddy" 644 root:root < <(render "$here/deploy/kirosync.caddy")
  if ! grep -qs '^import kirosync.caddy$' "$caddy/Caddyfile"; then
    change "add 'import kirosync.caddy' at the end of $caddy/Caddyfile, and leave the rest as it is" import_snippet
  fi
  if [ "$changes" != "$before" ]; then reload_caddy; fi
}

import_snippet() {
  if [ -n "$(tail -c 1 "$caddy/Caddyfile" 2>/dev/null)" ]; then echo >>"$caddy/Caddyfile"; fi
  echo 'import kirosync.caddy' >>"$caddy/Caddyfile"
  if command -v caddy >/dev/null && ! caddy adapt --config "$caddy/Caddyfile" >/dev/null; then
    forget_snippet
    fail "Caddy cannot read $caddy/Caddyfile with kirosync.caddy in it, see above; it is as it was"
  fi
}

forget_snippet() { sed -i '/^import kirosync.caddy$/d' "$caddy/Caddyfile"; }

ensure_no_caddy() {
  local before=$changes
  if grep -qs '^import kirosync.caddy$' "$caddy/Caddyfile"; then
    change "take 'import kirosync.caddy' out of $caddy/Caddyfile" forget_snippet
  fi
  ensure_gone "$caddy/kirosync.caddy"
  if [ "$changes" != "$before" ]; then reload_caddy; fi
}

reload_caddy() {
  if has_systemd; then change "have Caddy read its Caddyfile" systemctl reload-or-restart caddy; fi
}

# Keep the last three releases, and the one that runs.
ensure_few_releases() {
  local number
  for number in $({ releases && echo "$release"; } | sort -nu | head -n -3); do
    [ "$number" = "$release" ] || ensure_gone "$code/releases/$number"
  done
}

# Say what is left for a human to do.
say_how_to_go_on() {
  if [ -n "$dry_run" ]; then return; fi
  if ! has_systemd && [ "$changes" -gt 0 ]; then
    echo "There is no systemd here to start and restart it. Have your supervisor run, as root (it gives that up at once):"
    command_lines
  fi
}

# Print what starts the service and the agent where there is no systemd.
command_lines() {
  local run='setpriv --reset-env --init-groups --no-new-privs' at=/opt/kirosync/current
  echo "  $run --reuid=kirosync --regid=kirosync env \$(grep '^KIROSYNC_' /etc/kirosync/kirosync.env)" \
    "$at/.venv/bin/python $at/kirosync.py serve"
  if [ "$agent" = none ]; then return; fi
  echo "  $run --reuid=$agent_user --regid=$(with_group "$agent_user" | cut -d : -f 2)" \
    "env \$(grep '^[A-Z]' /etc/kirosync/agent.env)" \
    "$at/.venv/bin/python $at/agent.py --server http://$address --token-file /etc/kirosync/agent.token"
  if [ "$agent" = confined ]; then echo "Nothing confines the agent there: it may do what $agent_user may."; fi
}

status() {
  local health
  decide
  [ -n "$(current)" ] || fail "kirosync is not installed here"
  health=$(health)
  echo "release   $(current), of $(releases | paste -s -d ' '), in /opt/kirosync"
  echo "service   $health, http://$address${domain:+, https://$domain}"
  echo "agent     $(what_the_agent_may)"
  echo "settings  /etc/kirosync"
  echo "state     $state"
  echo "logs      $log$(has_systemd && echo ", journalctl -u kirosync -u kirosync-agent")"
  [[ $health != "not healthy"* ]]
}

health() {
  local problem
  if ! is_machine; then
    echo "not asked, for DESTDIR is no machine"
  elif problem=$(is_ready); then
    echo "${problem:+ready, but }${problem:-healthy}"
  else
    echo "not healthy${problem:+: $problem}"
  fi
}

what_the_agent_may() {
  case "$agent" in
    none) echo "none" ;;
    user) echo "may do what $agent_user may" ;;
    confined) echo "confined, as $agent_user, may write below $home${agent_writes:+ $agent_writes}" ;;
  esac
  if [ "$agent" != none ] && has_systemd; then systemctl is-active kirosync-agent || true; fi
}

uninstall() {
  decide
  confirm_purge
  alone
  ensure_stopped kirosync-agent
  ensure_stopped kirosync
  if has_systemd; then change "have systemd read its units" systemctl daemon-reload; fi
  ensure_no_caddy
  ensure_gone "$code"
  if [ -n "$purge" ]; then
    ensure_purged
  else
    echo "Kept: $etc, $root$state, $root$log, $root$home, $backups; with --purge they go, too."
  fi
  if is_machine && ! has_systemd; then echo "What runs is to be ended by what started it."; fi
}

confirm_purge() {
  local answer=''
  if [ -z "$purge" ] || [ -n "$yes$dry_run" ]; then return; fi
  if [ -t 0 ]; then
    read -r -p "All state, logs, backups and settings of kirosync, and the home of its agent, go for good. Type purge to go on: " answer
  fi
  [ "$answer" = purge ] || fail "nothing was removed: --purge wants the answer purge, or --yes"
}

# Remove what uninstall keeps; folders of other names than ours hold who knows what else, and stay.
ensure_purged() {
  local folder user
  for folder in "$state" "$log"; do
    case "$folder" in
      /var/lib/kirosync | /var/log/kiro-sync) ensure_gone "$root$folder" ;;
      *) echo "Left alone: $root$folder, which was not made by install.sh under a name of its own." ;;
    esac
  done
  ensure_gone "$root$home" "$backups" "$etc"
  is_machine || return 0
  for user in kirosync-agent kirosync; do
    if id "$user" >/dev/null 2>&1; then change "remove the user $user" userdel "$user"; fi
  done
}

main() {
  cd "$(dirname "$0")"
  case "${1:-help}" in
    run) run_both ;;
    test) shift && run_tests "$@" ;;
    install | upgrade | rollback | status | uninstall) on_server "$@" ;;
    admin) shift && admin "$@" ;;
    help | -h | --help) usage ;;
    *) usage >&2 && fail "there is no '$1'" ;;
  esac
}

main "$@"
