#!/usr/bin/env bash
# Stops the demo's server and removes all that it left: .demo/ and what that points to.
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/demo-server.sh"

link=$home
if [ ! -e "$link" ]; then
  rm -f "$link"
  note 'there is no .demo/'
  exit
fi
[ -e "$link/.nightowls-demo" ] || die "$link was not made by make demo; it is left alone"

home=$(cd "$link" && pwd -P)
stop_server
if [ -s "$home/socket-folder" ]; then rm -rf "$(cat "$home/socket-folder")"; fi
rm -rf "$home"
rm -f "$link"
note 'removed .demo/; the build stays (make clean removes it)'
