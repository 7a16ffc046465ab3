#!/bin/busybox sh
# A guest's first process. It says that it runs before it does anything else:
#   ROTA-GUEST-INIT <processors> <memory in kB> <kernel> <hypervisor>
# and then does what the kernel's command line asks for: rota.then=poweroff|reboot|halt|panic|wait|root|shell (shell if not said).

/bin/busybox mount -t proc proc /proc
read -r _ memory _ </proc/meminfo
read -r kernel </proc/sys/kernel/osrelease
cpus=0
while read -r key _; do
    case $key in cpu[0-9]*) cpus=$((cpus + 1)) ;; esac
done </proc/stat
hypervisor=$(/bin/busybox dmesg | /bin/busybox sed -n 's/.*Hypervisor detected: //p')
echo "ROTA-GUEST-INIT $cpus $memory $kernel ${hypervisor:-none}"

export PATH=/bin
/bin/busybox --install -s /bin
then=shell
for word in $(cat /proc/cmdline); do
    case $word in rota.then=*) then=${word#rota.then=} ;; esac
done
case $then in
poweroff) poweroff -f ;;
reboot) reboot -f ;;
halt) halt -f ;;
wait) while :; do sleep 1000; done ;;
panic) echo c >/proc/sysrq-trigger ;;
esac

mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /tmp
# In the initramfs with drivers for devices.
if [ -e /lib/modules/order ]; then
    while read -r module; do
        insmod "/lib/modules/$module" || echo "guest: module $module does not load"
    done </lib/modules/order
fi
if [ "$then" = root ]; then
    mkdir -p /root
    mount -t ext4 -o ro /dev/vda /root
    for folder in proc sys dev; do mount --move "/$folder" "/root/$folder"; done
    exec switch_root /root /sbin/init
fi
mount -t devpts devpts /dev/pts
hostname guest
export HOME=/ PS1='guest# '
setsid -c sh </dev/console >/dev/console 2>&1
poweroff -f
