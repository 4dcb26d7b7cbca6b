# Outlives the test process and tidies up after it, however it ended: its
# standard input is a pipe that closes with that process.
# usage: sh keeper.sh <the cluster's folder> <its pg_ctl>
trap '' INT HUP
cat >/dev/null
# More than once, because a server may just be starting or another ending.
for _ in 1 2 3 4 5 6 7 8 9 10; do
  for file in "$1"/*.pid; do
    if [ -f "$file" ]; then kill "$(cat "$file")"; fi
  done
  "$2" --pgdata "$1/data" --mode immediate --wait stop
  if rm -rf "$1"; then exit; fi
  sleep 0.3
done
