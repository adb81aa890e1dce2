#!/bin/busybox sh
# The first process of the lab's guest. The kernel's command line and the serial
# number that the VM's definition gives the machine choose:
#   lab.agent=0     no guest agent           lab.hook=0   an agent without its freeze hook
#   lab.workload=0  nothing writes           lab.every=MS time between two records
#   lab.probe       say hello and power off
/bin/busybox mkdir -p /bin /sbin /proc /sys /dev /run /tmp /data /data2 /etc /usr/sbin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
# A machine without a serial port is no reason to die.
log=/dev/ttyS0
(: >$log) 2>/dev/null || log=/dev/kmsg
exec >$log 2>&1 </dev/null
echo "LAB user space"

option() { # option NAME DEFAULT
	for word in $(cat /proc/cmdline /sys/class/dmi/id/product_serial 2>/dev/null); do
		case $word in "lab.$1="*) echo "${word#*=}"; return ;; "lab.$1") echo 1; return ;; esac
	done
	echo "$2"
}
if [ "$(option probe 0)" = 1 ]; then
	echo "LAB probe good"
	poweroff -f
fi
while read -r module; do insmod "$module"; done </lib/modules/order

# Ports of the agent: no udev makes the links here.
mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do
	[ -s "$port/name" ] && ln -s "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done

mount_label() { # mount_label LABEL DIRECTORY
	i=0
	while [ $i -lt 100 ]; do
		device=$(findfs "LABEL=$1" 2>/dev/null) && [ -n "$device" ] && break
		[ "$3" = maybe ] && return 1
		sleep 0.1
		i=$((i + 1))
	done
	[ -n "$device" ] && mount -t ext4 "$device" "$2" && echo "LAB $2 is $device" && return
	echo "LAB no file system $1"
	return 1
}
mkfifo /run/wl.ctl /run/wl.ack
if mount_label LABROOT /data; then
	boots=$(($(cat /data/boots 2>/dev/null || echo 0) + 1))
	echo $boots >/data/boots
	mount_label LABDATA /data2 maybe
	mkdir -p /data/wl
	/bin/workload verify -dir /data/wl >/run/verify.txt 2>&1
	cat /run/verify.txt
	sync
	if [ "$(option workload 1)" != 0 ]; then
		/bin/workload run -dir /data/wl -every "$(option every 20)ms" -control /run/wl.ctl -answer /run/wl.ack &
		echo $! >/run/workload.pid
	fi
fi
if [ "$(option agent 1)" != 0 ]; then
	hook=
	[ "$(option hook 1)" != 0 ] && hook=-F/etc/qemu/fsfreeze-hook
	port=/dev/virtio-ports/org.qemu.guest_agent.0
	/usr/sbin/qemu-ga -m virtio-serial -p $port $hook -t /run -f /run/qga.pid -l /run/qga.log &
fi
echo "LAB ready: boot $boots, agent $(option agent 1), hook $(option hook 1)"
# The first process must reap what others leave behind.
while true; do wait; sleep 1; done
