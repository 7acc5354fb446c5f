#!/bin/sh
# Run a compiler; keep what it says in OBJECT.ptxas for resource_report.py, and show all but ptxas's statistics.
previous= object=
for argument in "$@"; do
    [ "$previous" = -o ] && object=$argument
    previous=$argument
done
[ -n "$object" ] || exec "$@"
"$@" 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e '^ *[0-9]* bytes stack frame' "$object.ptxas" >&2
exit $status
