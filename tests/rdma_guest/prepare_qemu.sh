#!/usr/bin/env bash
# prepare_qemu.sh FOLDER: put Debian's kernel and an initial RAM disk with its soft-RoCE modules into
# FOLDER (vmlinuz, initrd), and install QEMU. Nothing is compiled, but all in there runs ten times
# slower; it has two processors, which polling needs.
set -euo pipefail
folder=$(realpath -m "$1")
mkdir -p "$folder"
work=$(mktemp -d "$folder/prepare.XXXXXX")
trap 'rm -rf "$work"' EXIT
export DEBIAN_FRONTEND=noninteractive PATH="$PATH:/usr/sbin:/sbin"

missing=()
for pair in qemu-system-x86_64:qemu-system-x86 cpio:cpio busybox:busybox-static modprobe:kmod; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The whole kernel, unpacked and not installed: the flavour for clouds has no rdma_rxe.
package=$(apt-cache depends linux-image-amd64 \
  | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)/\1/p' | head -1)
version=${package#linux-image-}
cd "$work"
apt-get -o APT::Sandbox::User=root download -qq "$package"
dpkg-deb -x "$package"_*.deb kernel
depmod -b kernel "$version"

mkdir -p ram/bin ram/modules ram/proc ram/sys ram/dev ram/new
cp "$(command -v busybox)" ram/bin/
for module in virtio_pci 9pnet_virtio 9p virtio_net dummy ib_uverbs rdma_ucm crc32_generic \
  crc32_pclmul rdma_rxe sch_netem; do
  modprobe -d "$work/kernel" -S "$version" --show-depends "$module" | awk '/^insmod/ {print $2}'
done | awk '!seen[$0]++' | while read -r file; do
  cp "$file" ram/modules/
  echo "/modules/${file##*/}"
done >ram/order
cat >ram/init <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in $($b cat /order); do $b insmod $module || echo "insmod $module failed"; done
nine="-t 9p -o trans=virtio,version=9p2000.L,msize=524288"
$b mount $nine,ro,cache=loose host /new || $b poweroff -f
for folder in tmp run var/tmp mnt; do $b mount -t tmpfs tmpfs /new/$folder; done
for folder in proc sys dev; do $b mount --move /$folder /new/$folder; done
exec $b switch_root /new /bin/bash -c "
  export PATH=/usr/sbin:/usr/bin:/sbin:/bin
  mkdir -p /mnt/run
  mount $nine,cache=none run /mnt/run
  . /mnt/run/env
  mkdir -p \"\$REPO\"
  mount $nine,cache=mmap repo \"\$REPO\"
  . \"\$REPO/tests/rdma_guest/enter.sh\" </dev/null
  sync
  busybox poweroff -f"
INIT
chmod +x ram/init
(cd ram && find . | cpio -o -H newc 2>/dev/null | gzip -1) >initrd
mv "kernel/boot/vmlinuz-$version" "$folder/vmlinuz"
# The last one to come: where it is, all is.
mv initrd "$folder/initrd"
