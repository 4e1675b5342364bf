# Run by the first process of a guest, whichever kernel it is: makes the soft-RoCE device, runs the
# command, and leaves its exit status where the host looks for it. Sourced, with `env` read before.
mkdir -p /dev/shm /dev/pts /run/lock
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts 2>/dev/null
hostname "$GUEST_NAME"
ip link set lo up
device=$(cd /sys/class/net && ls -d vec0 eth0 2>/dev/null | head -1)
if [ -z "$device" ]; then
  # No other host: the device then reaches itself, which two processes need and no more.
  device=rd0
  ip link add rd0 type dummy
fi
# Addresses of the range for benchmarks of networks (RFC 2544), which nobody routes.
ip addr add "$GUEST_ADDRESS/24" dev "$device"
ip link set "$device" up
rdma link add rxe0 type rxe netdev "$device"
# As udev's rules of rdma-core have it.
chmod 666 /dev/infiniband/*
ulimit -l unlimited
cd "$REPO"
/bin/bash /mnt/run/command </dev/null >/mnt/run/output 2>&1
echo $? >/mnt/run/status.new
mv /mnt/run/status.new /mnt/run/status
