# shellcheck shell=bash disable=SC2034,SC2154
# What scripts/bench.sh measures with: candidates that take turns, their rates and ratios, and the bars. Sourced by it.

elapsed() { printf '%d:%02d' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }
stage() { say "[$(elapsed)] $*"; }

# --- rates ---------------------------------------------------------------------------------------

# A candidate: its label, database, user and script; how many things one transaction does; what pgbench is told besides.
declare -A label database user script options each
candidate() { # <name> <label> <database> <user> <script, of benches/ or a path> <each> [<option of pgbench>…]
  local name=$1
  label[$name]=$2 database[$name]=$3 user[$name]=$4 script[$name]=$5 each[$name]=$6
  shift 6
  options[$name]=$([ $# = 0 ] || printf '%q ' "$@")
}

round_of() { # <group> <candidate> <clients> <round>: one round; its rate is in $rate
  local group=$1 name=$2 clients=$3 round=$4 said file folder=$home/results/$part/$1 threads more
  file=${script[$name]}
  case $file in /*) ;; *) file=$root/benches/$file ;; esac
  threads=$((clients < 2 ? 1 : 2))
  eval "more=(${options[$name]})"
  rm -f "$folder"/log.*
  if ! said=$("$bin/pgbench" --no-vacuum --protocol=prepared --client="$clients" --jobs="$threads" --time="$length" \
    --log --log-prefix="$folder/log" --file="$file" -U "${user[$name]}" -D "org=$org" -D "run=${name:0:1}$group$round" -D n=-1 \
    -D "round=$round" -D "clients=$clients" -D event_type=order_paid -D "payload=$payload" "${more[@]}" "${database[$name]}" 2>&1); then
    printf '%s\n' "$said" | tail -n 5 >&2
    die "pgbench failed on ${label[$name]}"
  fi
  cat "$folder"/log.* | cut -d ' ' -f 3 >>"$folder/$name.latency"
  rate=$(sed -n 's/^tps = \([0-9.]*\).*/\1/p' <<<"$said" | awk -v each="${each[$name]}" '{printf "%.1f", $1 * each}')
  [ -n "$rate" ] || die "pgbench gave no rate for ${label[$name]}"
  printf '%s\n' "$rate" >>"$folder/$name.rate"
}

declare -A clients_of
group() { # <group> <clients> <candidate>…: all rounds of a comparison; `rounds=15 group …` for another number of them
  local name=$1 clients=$2 round one i line order
  shift 2
  clients_of[$name]=$clients
  mkdir -p "$home/results/$part/$name"
  sql postgres postgres -c checkpoint
  for ((round = 1; round <= rounds; round++)); do
    line=
    # There and back, so that none always follows the same other.
    order=("$@")
    if [ $((round % 2)) = 0 ]; then
      order=()
      for ((i = $#; i >= 1; i--)); do order+=("${!i}"); done
    fi
    for one in "${order[@]}"; do
      round_of "$name" "$one" "$clients" "$round"
      line="$line  $one ${rate%.*}"
    done
    note "round $round of $rounds:$line"
  done
}

# --- figures -------------------------------------------------------------------------------------

quantile() { # <share> of the numbers in standard input
  sort -g | awk -v share="$1" '{n[NR] = $1} END {if (NR) {i = share * (NR - 1) + 1; f = int(i);
    printf "%.6f", n[f] + (f < NR ? (i - f) * (n[f + 1] - n[f]) : 0)}}'
}

thousands() { printf '%.0f' "$1" | sed -E ':a; s/^([0-9]+)([0-9]{3})/\1,\2/; ta'; }

# The ratio of two candidates, round by round: median, least, greatest. Of the last so many rounds, if that is said.
ratio() { # <group> <candidate> <other> [<rounds>]
  local folder=$home/results/$part/$1
  paste "$folder/$2.rate" "$folder/$3.rate" | tail -n "${4:-+1}" | awk '{printf "%.6f\n", $1 / $2}' >"$home/results/ratios"
  printf '%.2f %.2f %.2f\n' "$(quantile 0.5 <"$home/results/ratios")" "$(quantile 0 <"$home/results/ratios")" "$(quantile 1 <"$home/results/ratios")"
}

verdict() { awk -v ratio="$1" -v bar="$2" 'BEGIN {print (ratio >= bar ? "ok" : "BELOW")}'; }

judge() { # <what> <figure> <shown> <bar> <shown>
  printf '| %s | %s | %s | %s |\n' "$1" "$3" "$5" "$(verdict "$2" "$4")" >>"$home/results/$part.bars"
}

judge_at_most() { # <what> <figure> <shown> <bar> <shown>
  printf '| %s | %s | %s | %s |\n' "$1" "$3" "$5" "$(awk -v figure="$2" -v bar="$4" 'BEGIN {print (figure <= bar ? "ok" : "ABOVE")}')" \
    >>"$home/results/$part.bars"
}

out() { printf '%s\n' "$@" >>"$home/results/$part.md"; }

# A table of a group; `<candidate>/<other>=<bar>=<what>` asks for a ratio, with a bar if it has one.
table() { # <group> <title> <unit> <candidate>… -- <ratio>…
  local name=$1 title=$2 unit=$3 one pair bar what median least most shown cells names=() pairs=() folder=$home/results/$part/$1
  shift 3
  while [ "$1" != -- ]; do
    names+=("$1")
    shift
  done
  shift
  pairs=("$@")
  printf '\n  %s; %s client%s\n' "$title" "${clients_of[$name]}" "$([ "${clients_of[$name]}" = 1 ] || echo s)"
  out '' "### $title; ${clients_of[$name]} client$([ "${clients_of[$name]}" = 1 ] || echo s)" '' "| | $unit | p50 ms | p99 ms | ratios |" '| --- | ---: | ---: | ---: | --- |'
  for one in "${names[@]}"; do
    cells=
    for pair in "${pairs[@]}"; do
      [ "${pair%%/*}" = "$one" ] || continue
      IFS='=' read -r pair bar what <<<"$pair="
      read -r median least most <<<"$(ratio "$name" "$one" "${pair#*/}")"
      shown="$median × ${label[${pair#*/}]} ($least–$most)"
      if [ -n "$bar" ]; then
        judge "${what%=}" "$median" "$median ($least–$most)" "$bar" "≥ $bar"
        shown="$shown, bar $bar: $(verdict "$median" "$bar")"
      fi
      cells="$cells${cells:+; }$shown"
    done
    set -- "${label[$one]}" "$(thousands "$(quantile 0.5 <"$folder/$one.rate")")" \
      "$(awk '{print $1 / 1000}' "$folder/$one.latency" | quantile 0.5)" "$(awk '{print $1 / 1000}' "$folder/$one.latency" | quantile 0.99)" "$cells"
    printf '    %-45s %9s %s  p50 %.2f ms  p99 %.2f ms  %s\n' "$1" "$2" "$unit" "$3" "$4" "${5:+  $5}"
    out "$(printf '| %s | %s | %.2f | %.2f | %s |' "$1" "$2" "$3" "$4" "$5")"
  done
}
