#!/bin/busybox sh
# What the guest agent calls for guest-shutdown: "shutdown -h -P +0".
export PATH=/bin:/sbin
exec >/dev/ttyS0 2>&1
[ -s /run/workload.pid ] && kill "$(cat /run/workload.pid)"
i=0
while [ $i -lt 50 ] && [ -d "/proc/$(cat /run/workload.pid)" ]; do sleep 0.1; i=$((i + 1)); done
umount /data /data2 2>/dev/null || sync
echo "LAB power off"
case "$*" in *-r*) reboot -f ;; *) poweroff -f ;; esac
