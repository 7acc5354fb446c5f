#!/bin/sh
# usage: enter.sh ROOT FOLDER COMMAND...
#
# Runs COMMAND in FOLDER of ROOT, a system for arm64, with qemu behind every program of it. Needs no rights: all of
# it happens in a user namespace, whose own binfmt_misc (Linux 6.7 and newer) tells the kernel about qemu. In ROOT,
# the checkout is /checkout. ROOT may be /: then this machine's programs run as ever, and those for arm64 in qemu.
#
#   QEMU       the emulator, a static program
#   QEMU_CPU   what it is to look like
#   CPUINFO    shown as /proc/cpuinfo: ONNX Runtime dies where that is not an Arm's. There is no /sys for that reason
#   CHECKOUT   shown as /checkout
set -eu

if [ "${ENTERED:-}" != yes ]; then
    export ENTERED=yes
    exec unshare --user --map-root-user --mount -- "$0" "$@"
fi
unset ENTERED

root=$1
folder=$2
shift 2
binfmt=/proc/sys/fs/binfmt_misc
mount -t binfmt_misc none "$binfmt"
# name, type, offset, magic, mask, interpreter, flags: the head of a program or library (e_type 2 or 3) for e_machine
# 0xb7; F opens the interpreter now, out here.
printf '%s' ':arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:'"$QEMU"':F' >"$binfmt/register"
if [ "$root" = / ]; then
    cd "$folder"
    exec "$@"
fi
for name in proc dev; do mount --rbind "/$name" "$root/$name"; done
mount --bind "$CPUINFO" "$root/proc/cpuinfo"
mount --bind "$CHECKOUT" "$root/checkout"
exec chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin HOME=/tmp LC_ALL=C.UTF-8 QEMU_CPU="$QEMU_CPU" \
    PYTHONPYCACHEPREFIX=/tmp/pycache OMP_NUM_THREADS=1 DIJIANG_SPINNING=off \
    /bin/sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
