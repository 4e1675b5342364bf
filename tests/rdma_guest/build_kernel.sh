#!/usr/bin/env bash
# build_kernel.sh TARGET: build User-Mode Linux with a soft-RoCE device from Debian's kernel sources.
# About 9 CPU minutes, once; afterwards a guest starts in a second and runs Python at full speed.
# Needs root, apt, flex, bison, bc, make, gcc, xz, and 2.5 GB of space beside TARGET for the while;
# leaves TARGET alone (7 MB).
set -euo pipefail
target=$(realpath -m "$1")
config=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/kernel.config
mkdir -p "$(dirname "$target")"
# One at a time; what others have left that were killed is taken away.
exec 9>"$target.lock"
flock 9
[ ! -e "$target" ] || exit 0
rm -rf "$(dirname "$target")"/build.*
work=$(mktemp -d "$(dirname "$target")/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
export DEBIAN_FRONTEND=noninteractive

cd "$work"
# The package is taken apart here, and not installed: 140 MB of sources serve nobody afterwards.
apt-get -o APT::Sandbox::User=root download -qq linux-source-6.1
dpkg-deb -x linux-source-6.1_*.deb package
rm linux-source-6.1_*.deb
mkdir source
tar xJf package/usr/src/linux-source-6.1.tar.xz -C source --strip-components=1 \
  --exclude='*/drivers/gpu/*.[chS]' --exclude='*/drivers/net/wireless/*.[ch]' \
  --exclude='*/drivers/net/ethernet/*.[ch]' --exclude='*/drivers/scsi/*.[ch]' \
  --exclude='*/drivers/staging/*.[ch]' --exclude='*/drivers/media/*.[ch]' \
  --exclude='*/sound/*/*.c' --exclude='*/arch/[a-tv-w]*.[chS]' --exclude='*.dts' \
  --exclude='*.dtsi' --exclude='*/tools/testing/*' --exclude='*/Documentation/*.rst' \
  --exclude='*/Documentation/*.yaml' --exclude='*/Documentation/*.txt'
rm -rf package
cd source

# The kernel keeps the host's floating point state in 2,696 bytes. Processors with AMX have 11,008,
# and ptrace wants the exact length: give it room, and remember the length that the host reported.
sed -i 's/DEFINE_LONGS(HOST_FP_SIZE, 2696);/DEFINE_LONGS(HOST_FP_SIZE, 12288);/' \
  arch/x86/um/user-offsets.c
registers=arch/x86/um/os-Linux/registers.c
sed -i -e 's/iov\.iov_len = FP_SIZE \* sizeof(unsigned long);/iov.iov_len = state_bytes;/' \
  -e '/^int have_xstate_support;/a static unsigned long state_bytes = FP_SIZE * sizeof(unsigned long);' \
  -e 's/^\t\thave_xstate_support = 1;/\t\thave_xstate_support = 1, state_bytes = iov.iov_len;/' \
  "$registers"
# The first question, whose answer is the length, is asked with all the room there is.
grep -q 'state_bytes = iov.iov_len' "$registers"

KCONFIG_ALLCONFIG="$config" make -s ARCH=um O="$work/out" allnoconfig
# The linker warns of an executable stack, which every build of this kernel has.
make -s ARCH=um O="$work/out" -j"$(nproc)" linux 2>"$work/errors" \
  || { cat "$work/errors" >&2; exit 1; }
strip -o "$work/linux" "$work/out/linux"
mv "$work/linux" "$target"
