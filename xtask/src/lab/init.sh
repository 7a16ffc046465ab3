#!/bin/busybox sh
# The lab's first process: sets the machine up, runs /lab/command, reports its exit status.
# Its own messages go to the kernel's console; the command has ports of its own.

export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec >/dev/console 2>&1 </dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr

while read -r module; do
    insmod "/lib/modules/$module" || echo "lab: module $module does not load"
done </lib/modules/order

# Guests are promised more memory than they touch.
echo 1 >/proc/sys/vm/overcommit_memory
ip link set lo up
hostname lab
chmod 666 /dev/kvm

port() {
    for name in /sys/class/virtio-ports/*/name; do
        if [ "$(cat "$name")" = "$1" ]; then
            name=${name%/name}
            echo "/dev/${name##*/}"
            return
        fi
    done
}

share() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2"; }
# Opened once, and kept: a port takes nobody else meanwhile.
exec 3>"$(port status)"
echo up >&3
# A machine that says no more that it lives has stopped.
while sleep 2; do echo alive >&3; done &
share target /target ro,cache=loose
share out /out rw,cache=none
# Loading KVM and its first machine rewrite code, which is safe as long as one processor runs.
/lab/xtask inside steady || echo "lab: machines and groups that come and go rewrite this kernel, which may stop it"
for cpu in /sys/devices/system/cpu/cpu*/online; do
    [ "$(cat "$cpu")" = 1 ] || echo 1 >"$cpu"
done

if [ -e /lab/terminal ]; then
    # A login on the virtual console: the command is the leader of its session, so that ^C reaches it.
    console=/dev/hvc0
    stty -F "$console" $(cat /lab/terminal)
    setsid -c sh /lab/command <"$console" >"$console" 2>&1 3>&-
    status=$?
else
    # Pipes stand between the command and the ports, because a port can be opened only once.
    mkfifo /run/stdin /run/stdout /run/stderr
    cat "$(port stdin)" >/run/stdin &
    cat /run/stdout >"$(port stdout)" &
    stdout=$!
    cat /run/stderr >"$(port stderr)" &
    stderr=$!
    # In a process of its own, since opening a pipe waits and the end of a child would interrupt that.
    ( exec sh /lab/command </run/stdin >/run/stdout 2>/run/stderr 3>&- )
    status=$?
    # What the command left running may hold the pipes open; it gets a moment to say its last words.
    ( sleep 1; kill $stdout $stderr 2>/dev/null ) &
    wait $stdout $stderr
fi
sync
echo "exit $status" >&3
poweroff -f
