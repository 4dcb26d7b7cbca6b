# shellcheck shell=bash disable=SC2034,SC2154
# The page that scripts/bench.sh writes: benches/README.md, a block for each part, of which a run replaces those that it has run.

# How much of the processor is in use just now, in percent, over two seconds.
processor_in_use() {
  local before after
  before=$(head -n 1 /proc/stat)
  sleep 2
  after=$(head -n 1 /proc/stat)
  printf '%s\n%s\n' "$before" "$after" | awk '{idle[NR] = $5 + $6; for (i = 2; i <= 9; i++) all[NR] += $i}
    END {printf "%.0f", 100 - 100 * (idle[2] - idle[1]) / (all[2] - all[1])}'
}

busy() { [ "$1" -gt 10 ]; }

warn_if_busy() {
  if busy "$1"; then
    printf 'warning: the machine is busy (%s %% of the processor): the figures will be noisy, and the ratios less sharp\n' "$1" >&2
  fi
}

machine() {
  local cpu memory disk
  cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
  memory=$(awk '/^MemTotal/ {printf "%.0f", $2 / 1048576}' /proc/meminfo)
  disk=$(df --output=fstype "$place" | tail -n 1)
  printf '%s, %s cores, %s GB, %s; %s, Linux %s' "${cpu:-$(uname -m)}" "$(nproc)" "$memory" "$disk" \
    "$(. /etc/os-release && printf '%s' "$PRETTY_NAME")" "$(uname -r | sed 's/^\([0-9]*\.[0-9]*\).*/\1/')"
}

title() { part_title=$1; }

# The part's block is whole: where and when, the bars, the tables.
end_block() {
  local busy_after
  busy_after=$(processor_in_use)
  {
    printf '<!-- part %s, a %s run -->\n\n## %s\n\n' "$part" "$mode" "$part_title"
    cat <<BLOCK
| | |
| --- | --- |
| Date | $(date -u '+%Y-%m-%d %H:%M UTC'), nightowls $version, a $mode run of $(((SECONDS - part_started) / 60)) min $(((SECONDS - part_started) % 60)) s |
| Machine | $(machine) |
| PostgreSQL | $("$bin/postgres" --version | sed 's/^postgres (PostgreSQL) //'); $({
      settings
      if [ ${#extra_settings[@]} -gt 0 ]; then printf '%s\n' "${extra_settings[@]}"; fi
    } | paste -sd ';' | sed 's/;/; /g') |
| In use by others | $busy_before % of the processor before, $busy_after % after$(if busy "$busy_before" || busy "$busy_after"; then printf ' — **the machine was busy: do not quote these figures**'; fi) |
BLOCK
    if [ -s "$home/results/$part.bars" ]; then
      printf '\n| bar | measured | | |\n| --- | --- | --- | --- |\n'
      cat "$home/results/$part.bars"
    fi
    cat "$home/results/$part.md"
    printf '\n<!-- end -->\n'
  } >"$home/results/$part.block"
}

block() { # <page> <part>: the block of a part in a page, if it has one
  [ -e "$1" ] || return 0
  awk -v start="<!-- part $2," 'index($0, start) == 1 {found = 1} found {print} found && /^<!-- end -->$/ {exit}' "$1"
}

write_page() {
  local page=$root/benches/README.md new=$home/README.md one kept
  mkdir -p "$home/results/blocks"
  for one in "${all_parts[@]}"; do
    block "$page" "$one" >"$home/results/blocks/$one"
    if [ ! -e "$home/results/$one.block" ]; then continue; fi
    kept=$(head -n 1 "$home/results/blocks/$one")
    if [ "$mode" = quick ] && [[ $kept == *'a full run'* ]]; then
      note "benches/README.md keeps the figures of a full run of $one; these are in ${home#"$root"/}/results/$one.block"
    else
      cp "$home/results/$one.block" "$home/results/blocks/$one"
    fi
  done
  {
    cat <<PAGE
<!-- Written by make bench; change scripts/bench/page.sh or benches/*.sh instead. -->
# Benchmarks

\`make bench\` writes this page anew, \`make bench PART=fold\` one part of it; with \`QUICK=1\` it takes short rounds, which do not replace a
full run's figures.

- What stands in one table took turns on one server, there and back. A ratio is the median of the rounds' ratios, with the least and the
  greatest behind it. Trust ratios; the rates belong to the machine's disk.
- Rates are medians of the rounds (5 of 3 s in a full run, 3 of 1 s in a quick one, unless it is said otherwise); p50 and p99 are over
  all transactions of all rounds.
- Every figure is with the commit flushed to disk. With one client the disk decides; with 16 clients the commits share flushes and the
  processor decides, which the client (pgbench, prepared protocol) and the server share.
- "extension" and "plain" are the two installs; who calls is a role with \`grant_service\`, without an org in the call (the default org).

What is not measured: a network between client and server, a pooler, other settings of the disk or of commits, more cores, more orgs, large
payloads, \`append_many\`, handlers and table projections, logs that do not fit into memory, checkpoints (none falls into a round).

## Bars that are missed

PAGE
    if grep -hE '\| (BELOW|ABOVE) \|$' "$home"/results/blocks/* >"$home/results/missed"; then
      printf '| | measured | bar | |\n| --- | --- | --- | --- |\n'
      cat "$home/results/missed"
    else
      printf 'None.\n'
    fi
    for one in "${all_parts[@]}"; do
      if [ -s "$home/results/blocks/$one" ]; then
        printf '\n'
        cat "$home/results/blocks/$one"
      fi
    done
  } >"$new"
  if cmp -s "$new" "$page"; then return; fi
  cp "$new" "$page"
  note 'wrote benches/README.md'
}
