#!/bin/sh
# Makes the disk images that Debian guests boot, from the packages of a release; as root, in a folder of its own:
#   debian.sh RELEASE PACKAGES
# leaves debian.raw, debian.qcow2 (the same), and in iperf3/ that program with its libraries, for the other end of a network.
set -eu
release=$1 packages=$2
export PATH="$PWD/mmdebstrap/usr/bin:$PATH:/usr/sbin:/sbin"
trap 'rm -rf root' EXIT

# Nothing is asked for that only a person would read.
mmdebstrap --quiet --mode=root --variant=essential --format=directory \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --include="$packages" "$release" root "deb http://deb.debian.org/debian $release main"

echo debian >root/etc/hostname
echo '127.0.0.1 localhost debian' >root/etc/hosts
echo '/dev/vda / ext4 errors=remount-ro 0 1' >root/etc/fstab
echo root:rota | chroot root chpasswd
# A guest that has been booted before: what is done once, and the same on every machine, is done.
echo 0123456789abcdef0123456789abcdef >root/etc/machine-id
for unit in fstrim.timer systemd-timesyncd.service getty@tty1.service systemd-hwdb-update.service \
    dpkg-db-backup.timer systemd-tmpfiles-clean.timer iperf3.service; do
    ln -sf /dev/null "root/etc/systemd/system/$unit"
done

mkdir iperf3
for file in $(chroot root ldd /usr/bin/iperf3 | grep -o '/[^ ]*') /usr/bin/iperf3; do
    cp "root$file" iperf3/
done

mke2fs -q -t ext4 -L debian -d root debian.raw 416M
qemu-img convert -O qcow2 debian.raw debian.qcow2
