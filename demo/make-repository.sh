#!/usr/bin/env bash
# Makes a large repository to try the demo on: the same one every time.
# usage: demo/make-repository.sh <folder> [<commits, 25000> [<changes a commit, 4>]]
#        make demo REPO=<folder>
#
# Every fiftieth commit of the main line merges a side branch.
set -euo pipefail

folder=${1:?usage: demo/make-repository.sh <folder> [<commits> [<changes a commit>]]}
commits=${2:-25000}
changes=${3:-4}

git init --quiet --bare --initial-branch=main "$folder"
LC_ALL=C awk -v commits="$commits" -v changes="$changes" '
  # A small generator of its own, as rand() differs from awk to awk.
  function random(below) {
    seed = (seed * 16807) % 2147483647
    return seed % below
  }
  function change(path, text) {
    printf "M %s inline %s\n", random(40) ? "100644" : "100755", path
    printf "data %d\n%s\n", length(text), text
  }
  function header(branch, at, message,   who) {
    who = people[random(random(9) + 1)]
    printf "commit refs/heads/%s\nmark :%d\n", branch, ++mark
    printf "author %s <%s@example.org> %d +0000\ncommitter %s <%s@example.org> %d +0000\n", who, who, at, who, who, at
    printf "data %d\n%s\n", length(message), message
  }
  BEGIN {
    seed = 20240229
    split("ada barbara edsger grace ken lynn margaret radia tony", list, " ")
    for (i = 1; i <= 9; i++) people[i - 1] = list[i]
    at = 1500000000
    for (n = 1; n <= commits; n++) {
      at += random(14400)
      tip = main
      side = 0
      if (n % 50 == 0) {
        # The side branch changes one file, from where the main line is; the merge brings it in.
        header("side", at - 60, "side " n)
        printf "from :%d\n", tip
        change("side/" int(n / 2000) "/" n ".txt", "side " n)
        print ""
        side = mark
      }
      header("main", at, "change " n)
      if (tip) printf "from :%d\n", tip
      if (side) {
        printf "merge :%d\n", side
        change("side/" int(n / 2000) "/" n ".txt", "side " n)
      }
      main = mark
      split("", done)
      for (c = side ? 2 : 1; c <= changes; c++) {
        dice = random(100)
        if (files < 10 || dice < 30) {
          path = sprintf("src/%s/%d/file_%d.txt", people[random(9)], int(files / 500), ++made)
          live[files++] = path
        } else {
          which = random(files)
          path = live[which]
          if (path in done) continue
          if (dice >= 90) {
            printf "D %s\n", path
            done[path]
            live[which] = live[--files]
            delete live[files]
            continue
          }
        }
        done[path]
        change(path, "line " n " " c)
      }
      print ""
    }
  }' | git -C "$folder" fast-import --quiet
printf '%s: %s commits on the main line\n' "$folder" "$(git -C "$folder" rev-list --first-parent --count main)"
