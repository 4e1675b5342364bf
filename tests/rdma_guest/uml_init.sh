#!/bin/bash
# The first process of a User-Mode Linux guest. Its root is the host's, read-only; the repository is
# mounted again, writable. WUKONG_RUN, from the kernel's command line, is this run's own folder.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
for folder in /run /var/tmp /mnt; do mount -t tmpfs tmpfs $folder; done
mkdir -p /mnt/run /mnt/repo
mount -t hostfs -o "$WUKONG_RUN" none /mnt/run
. /mnt/run/env
mount -t hostfs -o "$REPO" none /mnt/repo
mount -t tmpfs tmpfs /tmp
# The repository may lie in /tmp, which is empty from now on.
mkdir -p "$REPO"
mount --move /mnt/repo "$REPO"
. "$REPO/tests/rdma_guest/enter.sh" </dev/null
halt -f -f -n >/dev/null 2>&1
